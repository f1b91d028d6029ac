//! What scripts rely on: keys of the JSON documents, equal answers of all strategies, sizes as asked for.

use crate::common::{SMALL, Scratch, TINY, has_keys};
use serde_json::Value;

#[test]
fn quantize_inspect_verify_agree() {
    let scratch = Scratch::new();
    scratch.llama("src", SMALL);
    for (codec, target) in [
        ("rans", "3.3"),
        ("rans-precise", "2.4"),
        ("huffman", "3.7"),
        ("block-ans", "3.0"),
        ("tiered", "3.2"),
        ("rans-pairs", "3.1"),
        ("fixed", "4.6"),
    ] {
        let out = format!("out-{codec}");
        let report = scratch.json(&["quantize", "src", "-o", &out, "--bpw", target, "--codec", codec, "--json"]);
        let (bpw, target) = (report["bpw"].as_f64().unwrap(), target.parse::<f64>().unwrap());
        assert!((bpw / target - 1.0).abs() <= 0.005, "{codec}: {bpw} for {target}");

        let inspected = scratch.json(&["inspect", &out, "--json"]);
        has_keys(&inspected, &["format_version", "model_type", "weights", "bytes", "bpw", "entropy_bits", "tensors"]);
        assert_eq!(inspected["format_version"], 1);
        assert_eq!(inspected["model_type"], "llama");
        assert!((inspected["bpw"].as_f64().unwrap() - bpw).abs() < 1e-9);
        assert!((inspected["entropy_bits"].as_f64().unwrap() - report["entropy_bits"].as_f64().unwrap()).abs() < 1e-9);
        let tensors = inspected["tensors"].as_array().unwrap();
        let keys = ["name", "shape", "scheme", "codec", "weights", "entropy_bits", "code_bits", "side_bits", "bpw", "bytes"];
        for tensor in tensors {
            has_keys(tensor, &keys);
            let number = |key: &str| tensor[key].as_f64().unwrap();
            assert!((number("bpw") - number("code_bits") - number("side_bits")).abs() < 1e-9, "{tensor}");
            assert!((number("bpw") - number("bytes") * 8.0 / number("weights")).abs() < 1e-9, "{tensor}");
            if tensor["scheme"] == "raw" {
                assert_eq!(tensor["entropy_bits"], Value::Null);
            } else {
                assert_eq!(tensor["scheme"], "ecsq");
                assert!(number("side_bits") > 0.0, "{tensor}");
                // No code is shorter than the entropy; padding symbols add a little, and there is none in these shapes.
                assert!(number("code_bits") > number("entropy_bits") - 1e-3, "{tensor}");
            }
        }
        let sum = |key: &str| tensors.iter().map(|tensor| tensor[key].as_f64().unwrap()).sum::<f64>();
        assert_eq!(sum("bytes"), inspected["bytes"].as_f64().unwrap());
        assert_eq!(sum("weights"), inspected["weights"].as_f64().unwrap());

        let verified = scratch.json(&["verify", &out, "--json"]);
        assert_eq!(verified["ok"], true);
        assert_eq!(verified["coded_tensors"].as_u64(), Some(1 + 7 * SMALL.layers as u64));
    }
}

#[test]
fn every_scheme_runs() {
    let scratch = Scratch::new();
    scratch.llama("src", TINY);
    for (scheme, more) in [("affine4", &["--group-size", "32"][..]), ("q4_0", &[]), ("int4-row", &[]), ("int4-tensor", &[])] {
        let args = [&["quantize", "src", "-o", scheme, "--scheme", scheme, "--json"], more].concat();
        let report = scratch.json(&args);
        assert_eq!(report["target_bpw"], Value::Null);
        scratch.ok(&["verify", scheme]);
        let generated = generate(&scratch, scheme, &["--strategy", "fused"]);
        assert_eq!(generated["tokens"].as_array().unwrap().len(), 12, "{scheme}");
    }
}

#[test]
fn files_travel_along_and_config_says_what_was_done() {
    let scratch = Scratch::new();
    let source = scratch.llama("src", TINY);
    std::fs::write(source.join("model.py"), "").unwrap();
    scratch.ok(&["quantize", "src", "-o", "out"]);
    let mut names: Vec<String> =
        std::fs::read_dir(scratch.path("out")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["LICENSE", "config.json", "generation_config.json", "model.safetensors", "tersor.manifest.json", "tokenizer.json"]);
    let config: Value = serde_json::from_slice(&std::fs::read(scratch.path("out/config.json")).unwrap()).unwrap();
    let quantization = &config["quantization_config"];
    assert_eq!(quantization["quant_method"], "tersor");
    assert_eq!(quantization["version"], 1);
    assert_eq!(quantization["scheme"], "ecsq");
    assert_eq!(quantization["codec"], "rans/s16-w8-p7-l64");
    assert!(quantization["bpw"].is_number());
    assert_eq!(config["hidden_size"], TINY.hidden);
}

#[test]
fn the_same_bytes_for_any_number_of_threads() {
    let scratch = Scratch::new();
    scratch.llama("src", TINY);
    for threads in ["1", "2", "3"] {
        scratch.ok(&["quantize", "src", "-o", threads, "--threads", threads]);
    }
    let read = |dir: &str| std::fs::read(scratch.path(dir).join("model.safetensors")).unwrap();
    assert_eq!(read("1"), read("2"));
    assert_eq!(read("1"), read("3"));
}

fn generate(scratch: &Scratch, dir: &str, more: &[&str]) -> Value {
    scratch.json(&[&["generate", dir, "--prompt", "w5 w17 w3 w90", "-n", "12", "--json"], more].concat())
}

#[test]
fn strategies_and_threads_give_the_same_tokens_and_hash() {
    let scratch = Scratch::new();
    scratch.llama("src", TINY);
    scratch.ok(&["quantize", "src", "-o", "out", "--bpw", "4.5"]);
    let first = generate(&scratch, "out", &["--strategy", "fused", "--threads", "1"]);
    has_keys(
        &first,
        &[
            "text",
            "tokens",
            "prompt_tokens",
            "strategy",
            "strategy_detail",
            "load_seconds",
            "prefill_tokens_per_second",
            "step_tokens_per_second",
            "resident_weight_bytes",
            "peak_rss_bytes",
            "logits_hash",
        ],
    );
    assert_eq!(first["prompt_tokens"], 4);
    assert_eq!(first["logits_hash"].as_str().unwrap().len(), 16);
    assert!(first["peak_rss_bytes"].as_u64().unwrap() > first["resident_weight_bytes"].as_u64().unwrap());
    for strategy in ["fused", "cached", "prefetch", "lru", "auto"] {
        for threads in ["1", "2"] {
            let other = generate(&scratch, "out", &["--strategy", strategy, "--threads", threads]);
            assert_eq!(other["tokens"], first["tokens"], "{strategy}, {threads}");
            assert_eq!(other["logits_hash"], first["logits_hash"], "{strategy}, {threads}");
            assert_eq!(other["strategy"], strategy);
        }
    }
    let scalar = generate(&scratch, "out", &["--strategy", "cached", "--level", "scalar"]);
    assert_eq!(scalar["logits_hash"], first["logits_hash"]);

    // What is streamed is the prompt and the JSON document's text.
    let prompt = "w5 w17 w3 w90";
    let text = scratch.ok(&["generate", "out", "--prompt", prompt, "-n", "12", "--strategy", "cached"]);
    assert_eq!(text, format!("{prompt}{}\n", first["text"].as_str().unwrap()));
}

#[test]
fn sampling_follows_the_seed() {
    let scratch = Scratch::new();
    scratch.llama("src", TINY);
    scratch.ok(&["quantize", "src", "-o", "out"]);
    let sample = |seed: &str| {
        let more = ["--strategy", "cached", "--temp", "1.5", "--top-k", "100", "--top-p", "0.99", "--min-p", "0.001", "--seed", seed];
        generate(&scratch, "out", &more)["tokens"].clone()
    };
    assert_eq!(sample("1"), sample("1"));
    assert_ne!(sample("1"), sample("2"));
}

#[test]
fn plain_directories_run_as_dense() {
    let scratch = Scratch::new();
    scratch.llama("src", TINY);
    let report = generate(&scratch, "src", &[]);
    assert_eq!(report["strategy"], "dense");
    let inspected = scratch.json(&["inspect", "src", "--json"]);
    assert_eq!(inspected["format_version"], Value::Null);
    assert_eq!(inspected["bpw"], 16.0);
}

#[test]
fn explain_tells_every_matrix() {
    let scratch = Scratch::new();
    scratch.llama("src", TINY);
    scratch.ok(&["quantize", "src", "-o", "out"]);
    let report = generate(&scratch, "out", &["--explain"]);
    let groups = report["explain"]["groups"].as_array().unwrap();
    let matrices: u64 = groups.iter().map(|group| group["tensors"].as_u64().unwrap()).sum();
    assert_eq!(matrices, 1 + 7 * TINY.layers as u64);
    assert!(groups.iter().all(|group| !group["reason"].as_str().unwrap().is_empty()));
}

#[test]
fn bench_checks_answers_and_prints_rows() {
    let scratch = Scratch::new();
    scratch.llama("src", TINY);
    scratch.ok(&["quantize", "src", "-o", "out"]);
    let report = scratch.json(&["bench", "out", "--strategy", "all", "-p", "20", "-n", "5", "--threads", "1,2", "--repeat", "2", "--json"]);
    has_keys(&report, &["machine", "runs"]);
    let runs = report["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 10);
    for run in runs {
        let keys = ["strategy", "device", "threads", "load_seconds", "prefill_tokens_per_second", "step_tokens_per_second"];
        has_keys(run, &keys);
        has_keys(run, &["resident_weight_bytes", "peak_rss_bytes", "decode_fraction"]);
        assert!(run["step_tokens_per_second"].as_f64().unwrap() > 0.0);
        let fraction = run["decode_fraction"].as_f64().unwrap();
        assert!(fraction >= 0.0, "{run}");
        if run["strategy"] == "cached" {
            assert_eq!(fraction, 0.0);
        }
    }
    assert!(scratch.ok(&["bench", "out", "--repeat", "1"]).contains("all logits equal"));
}

#[test]
fn kernels_print_rows_of_every_kernel() {
    let scratch = Scratch::new();
    let report = scratch.json(&[
        "kernels",
        "--codec",
        "rans,fixed",
        "--level",
        "all",
        "--threads",
        "1,2",
        "--rows",
        "64",
        "--cols",
        "256",
        "--seconds",
        "0.01",
        "--working-set",
        "cache",
        "--json",
    ]);
    has_keys(&report["machine"], &["cpu", "level", "cores", "read_gb_per_second"]);
    assert!(report["machine"]["read_gb_per_second"]["2"].as_f64().unwrap() > 0.0);
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len() % 12, 0);
    for row in rows {
        let keys = ["kernel", "codec", "level", "threads", "entropy_bits", "bpw", "working_set", "weights_per_second"];
        has_keys(row, &keys);
        has_keys(row, &["coded_gb_per_second", "fraction_of_bandwidth"]);
        assert!((row["entropy_bits"].as_f64().unwrap() - 2.25).abs() < 0.05, "{row}");
        assert!(row["weights_per_second"].as_f64().unwrap() > 0.0);
    }
}

#[test]
fn eval_reports_quality_beside_size() {
    let scratch = Scratch::new();
    scratch.llama("src", TINY);
    scratch.ok(&["quantize", "src", "-o", "out", "--bpw", "6"]);
    let words: Vec<String> = (0..300).map(|i| format!("w{}", 2 + i * 7 % 190)).collect();
    std::fs::write(scratch.path("text"), words.join(" ")).unwrap();
    let args = ["eval", "out", "--text", "text", "--context", "32", "--tokens", "100", "--strategy", "fused", "--json"];
    let alone = scratch.json(&args);
    has_keys(&alone, &["tokens", "perplexity", "nll"]);
    assert_eq!(alone["tokens"], 100);
    assert!(alone.get("kl_mean").is_none() && alone.get("kl_p99").is_none() && alone.get("top1_agreement").is_none());
    let compared = scratch.json(&[&args[..], &["--reference", "src"]].concat());
    assert_eq!(compared["perplexity"], alone["perplexity"]);
    let number = |key: &str| compared[key].as_f64().unwrap();
    assert!((number("perplexity").ln() - number("nll")).abs() < 1e-6);
    assert!(number("kl_mean") > 0.0 && number("kl_mean") < 0.05, "{compared}");
    assert!(number("kl_p99") >= number("kl_mean"));
    assert!(number("top1_agreement") > 0.5, "{compared}");
    let itself = scratch.json(&["eval", "src", "--text", "text", "--context", "32", "--tokens", "100", "--reference", "src", "--json"]);
    assert_eq!(itself["kl_mean"], 0.0);
    assert_eq!(itself["top1_agreement"], 1.0);
}

#[test]
fn info_describes_the_machine() {
    let scratch = Scratch::new();
    let report = scratch.json(&["info", "--json"]);
    has_keys(&report, &["version", "cpu", "level", "levels_available", "cores", "memory_bytes", "devices", "profile"]);
    // On a machine with a GPU it is named; the CPU is no entry.
    for device in report["devices"].as_array().unwrap() {
        has_keys(device, &["device", "name", "memory_bytes"]);
    }
    assert!(report["levels_available"].as_array().unwrap().contains(&report["level"]));
    // The second time the profile is read, not measured.
    assert_eq!(scratch.json(&["info", "--json"])["profile"], report["profile"]);
}

#[test]
fn the_plot_is_an_svg_with_a_mark_for_every_coded_tensor() {
    let scratch = Scratch::new();
    scratch.llama("src", TINY);
    scratch.ok(&["quantize", "src", "-o", "out"]);
    scratch.ok(&["inspect", "out", "--plot", "plot.svg"]);
    let svg = std::fs::read_to_string(scratch.path("plot.svg")).unwrap();
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    assert_eq!(svg.matches("<title>").count(), 1 + 7 * TINY.layers);
}

#[test]
fn encode_loses_nothing() {
    let scratch = Scratch::new();
    scratch.mlx("mlx", SMALL);
    let report = scratch.json(&["encode", "mlx", "-o", "out", "--json"]);
    assert_eq!(report["lossless"], true);
    assert_eq!(report["coded_tensors"].as_u64(), Some(1 + 7 * SMALL.layers as u64));
    let number = |key: &str| report[key].as_f64().unwrap();
    // A scale and a bias of 16 bits for 32 weights; norms are a few thousandths.
    assert!((number("bpw_before") - 5.0).abs() < 0.02, "{report}");
    assert!(number("bpw") < number("entropy_bits") + 1.0 + 0.1, "{report}");
    scratch.ok(&["verify", "out"]);
    let inspected = scratch.json(&["inspect", "out", "--json"]);
    assert_eq!(inspected["scheme"], "affine4");
    assert_eq!(generate(&scratch, "out", &["--strategy", "cached"])["tokens"].as_array().unwrap().len(), 12);
    let config: Value = serde_json::from_slice(&std::fs::read(scratch.path("out/config.json")).unwrap()).unwrap();
    assert!(config.get("quantization").is_none());
    assert_eq!(config["quantization_config"]["source"]["quantization"]["group_size"], 32);

    let exported = scratch.json(&["export", "out", "--to", "mlx", "-o", "back", "--json"]);
    assert_eq!(exported["files"], 3);
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        let [original, back] = ["mlx", "back"].map(|dir| std::fs::read(scratch.path(dir).join(name)).unwrap());
        assert!(original == back, "{name} is not the same");
    }
    assert!(scratch.fails(1, &["export", "out", "--to", "mlx", "-o", "back"]).contains("already exists"));
    assert!(scratch.fails(2, &["export", "out", "--to", "onnx", "-o", "other"]).contains("onnx"));
}

#[test]
fn only_what_was_encoded_can_be_exported() {
    let scratch = Scratch::new();
    scratch.llama("hf", TINY);
    scratch.ok(&["quantize", "hf", "-o", "out"]);
    assert!(scratch.fails(1, &["export", "out", "--to", "mlx", "-o", "back"]).contains("keeps no record"));
    assert!(!scratch.path("back").exists());
}

/// Users say `w7 ...`, the model answers after `w8`; instructions come after `w9`.
const TEMPLATE: &str = "{% for message in messages %}
{{ {'system': 'w9', 'user': 'w7', 'assistant': 'w8'}[message.role] }} {{ message.content.strip() }} {% endfor %}
{% if add_generation_prompt %}w8{% endif %}";

#[test]
fn chat_writes_each_turn_by_the_template() {
    let scratch = Scratch::new();
    scratch.llama("src", TINY);
    std::fs::write(scratch.path("src/chat_template.jinja"), TEMPLATE).unwrap();
    scratch.ok(&["quantize", "src", "-o", "out", "--bpw", "6"]);
    // What generate continues when it is given the conversation so far.
    let reply =
        |prompt: &str| scratch.json(&["generate", "out", "--prompt", prompt, "-n", "6", "--json"])["text"].as_str().unwrap().to_owned();
    let first = reply("w9 w20 w7 w5 w8");
    let second = reply(&format!("w9 w20 w7 w5 w8 {first} w7 w6 w8"));
    let third = reply("w9 w20 w7 w30 w31 w8");
    assert!(first != second && second != third, "replies must depend on the conversation");
    let args = ["chat", "out", "--system", "w20", "-n", "6", "--strategy", "cached"];
    let output = scratch.with_input(&args, b"w5\n\nw6\r\n/clear\nw30 w31\n/exit\nw5\n");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{first}\n{second}\n{third}\n"));
    // The end of stdin ends it as well.
    assert_eq!(scratch.with_input(&args, b"w5").stdout, format!("{first}\n").as_bytes());
}
