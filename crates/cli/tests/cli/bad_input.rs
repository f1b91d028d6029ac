//! Whatever is wrong: one line that names file, tensor and cause, the right exit code, nothing half-written.

use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::common::{Safetensors, Scratch, Shape, TINY, config, tensors, write_json};
use serde_json::json;

fn contains(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is missing in: {text}");
    }
}

#[test]
fn wrong_usage_is_2() {
    let scratch = Scratch::new();
    scratch.llama("src", TINY);
    for (args, part) in [
        (&["quantize", "src"][..], "--output"),
        (&["quantize", "src", "-o", "out", "--frob"], "--frob"),
        (&["quantize", "src", "-o", "out", "--codec", "zip"], "zip"),
        (&["quantize", "src", "-o", "out", "--codec", "rans/s16-w8-p30-l64"], "prob_bits"),
        (&["quantize", "src", "-o", "out", "--scheme", "int3"], "int3"),
        (&["quantize", "src", "-o", "out", "--bpw", "-1"], "greater than zero"),
        (&["quantize", "src", "-o", "out", "--bpw", "nan"], "greater than zero"),
        (&["quantize", "src", "-o", "out", "--scheme", "int4-row", "--bpw", "4"], "--bpw"),
        (&["quantize", "src", "-o", "out", "--group-size", "64"], "--group-size"),
        (&["quantize", "src", "-o", "out", "--scheme", "affine4", "--group-size", "48"], "48"),
        (&["quantize", "src", "-o", "out", "--threads", "0"], "thread"),
        (&["quantize", "src", "-o", "src", "--force"], "checkpoint itself"),
        (&["frobnicate"], "frobnicate"),
        (&["generate", "src"], "--prompt"),
        (&["generate", "src", "--prompt", "w5", "--strategy", "magic"], "magic"),
        (&["generate", "src", "--prompt", "w5", "--strategy", "gpu-async"], "needs a GPU"),
        (&["generate", "src", "--prompt", "w5", "--strategy", "fused"], "not quantized"),
        (&["generate", "src", "--prompt", "w5", "--device", "tpu"], "unknown device"),
        (&["generate", "src", "--prompt", "w5", "--device", "cuda:1"], "not quantized"),
        (&["generate", "src", "--prompt", "w5", "--device", "cuda", "--level", "avx2"], "CPU only"),
        (&["kernels", "--device", "cuda", "--threads", "2"], "CPU only"),
        (&["generate", "src", "--prompt", "w5", "--memory-budget", "2 parsecs"], "parsecs"),
        (&["generate", "src", "--prompt", "w5", "--level", "mmx"], "mmx"),
        (&["generate", "src", "--prompt", "w5", "--temp", "-1"], "temperature"),
        (&["generate", "src", "--prompt", "w5", "--top-p", "0"], "top-p"),
        (&["generate", "src", "--prompt", "w5", "--context", "4096"], "128 tokens"),
        (&["bench", "src", "-p", "1000"], "128"),
        (&["bench", "src", "--strategy", "fused,magic"], "magic"),
        (&["kernels", "--codec", "zip"], "zip"),
        (&["kernels", "--level", "mmx"], "mmx"),
        (&["eval", "src"], "--text"),
    ] {
        contains(&scratch.fails(2, args), &[part]);
    }
    assert_eq!(scratch.names(), ["src"]);
}

#[test]
fn chats_that_cannot_be_held() {
    let scratch = Scratch::new();
    scratch.llama("src", TINY);
    contains(&scratch.fails(1, &["chat", "src"]), &["src", "no chat template"]);
    let template = |text: &str| std::fs::write(scratch.path("src/chat_template.jinja"), text).unwrap();
    template("{% for %}");
    contains(&scratch.fails(1, &["chat", "src"]), &["chat_template.jinja", "no Jinja"]);
    template("{% if messages|length > 1 %}{{ raise_exception('one at a time') }}{% endif %}{{ messages[0].content }}");
    contains(&scratch.fails(2, &["chat", "src", "--temp", "-1"]), &["temperature"]);
    contains(&scratch.fails(2, &["chat", "src", "--context", "4096"]), &["128 tokens"]);
    let long = "w5 ".repeat(200);
    for (input, replies, part) in [
        (&b"w5\nw6\n"[..], 1, "one at a time"),
        (long.as_bytes(), 0, "200 tokens"),
        (b"\xff\n", 0, "stdin"),
        (&[b'w'; 1 << 21], 0, "more than 1048576 bytes"),
    ] {
        let output = scratch.with_input(&["chat", "src", "-n", "3"], input);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), output.stdout.iter().filter(|&&byte| byte == b'\n').count()), (Some(1), replies), "{stderr}");
        contains(stderr.lines().last().unwrap(), &["error: ", part]);
    }
}

#[test]
fn a_gpu_that_is_not_there_is_one_line() {
    let scratch = Scratch::new();
    scratch.llama("src", TINY);
    scratch.ok(&["quantize", "src", "-o", "out", "--scheme", "int4-row"]);
    std::fs::write(scratch.path("text"), "w5 w6 w7").unwrap();
    let device = ["--device", "cuda:99"];
    for command in [
        &["generate", "out", "--prompt", "w5", "--strategy", "gpu-async"][..],
        &["generate", "out", "--prompt", "w5", "--explain"],
        &["bench", "out", "--strategy", "all"],
        &["bench", "out"],
        &["kernels"],
        &["eval", "out", "--text", "text"],
    ] {
        let line = scratch.fails(1, &[command, &device].concat());
        // Without a driver nobody can say how many there are.
        assert!(line.contains("cuda:99") || line.contains("no NVIDIA driver"), "{command:?}: {line}");
    }
}

#[test]
fn broken_checkpoints_are_refused_by_name() {
    let scratch = Scratch::new();
    let refused = |name: &str, parts: &[&str]| {
        let line = scratch.fails(1, &["quantize", name, "-o", "out"]);
        contains(&line, parts);
        assert!(!scratch.path("out").exists(), "{name}");
    };
    refused("nowhere", &["nowhere"]);

    std::fs::write(scratch.path("file"), "text").unwrap();
    refused("file", &["file"]);

    let dir = scratch.llama("truncated", TINY);
    let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
    std::fs::write(dir.join("model.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    refused("truncated", &["truncated/model.safetensors"]);
    std::fs::write(dir.join("model.safetensors"), &bytes[..5]).unwrap();
    refused("truncated", &["truncated/model.safetensors"]);

    let dir = scratch.llama("architecture", TINY);
    let mut other = config(TINY);
    other["model_type"] = json!("mamba");
    write_json(&dir.join("config.json"), &other);
    refused("architecture", &["architecture/config.json", "mamba"]);

    let dir = scratch.llama("json", TINY);
    std::fs::write(dir.join("config.json"), "{\"model_type\": ").unwrap();
    refused("json", &["json/config.json"]);

    let dir = scratch.llama("missing-config", TINY);
    std::fs::remove_file(dir.join("config.json")).unwrap();
    refused("missing-config", &["missing-config", "config.json"]);

    let dir = scratch.llama("missing-shard", TINY);
    std::fs::rename(dir.join("model.safetensors"), dir.join("model-00001-of-00002.safetensors")).unwrap();
    let map: serde_json::Map<_, _> = tensors(TINY)
        .into_iter()
        .enumerate()
        .map(|(i, (name, _))| (name, json!(format!("model-0000{}-of-00002.safetensors", 1 + i % 2))))
        .collect();
    write_json(&dir.join("model.safetensors.index.json"), &json!({"metadata": {}, "weight_map": map}));
    refused("missing-shard", &["model-00002-of-00002.safetensors"]);

    // A fault in one tensor: the whole file is written anew with that tensor changed.
    let with = |name: &str, tensor: &str, dtype: &str, bytes_per_weight: usize, fault: &dyn Fn(&mut Vec<u8>)| {
        let dir = scratch.llama(name, TINY);
        let mut file = Safetensors::default();
        for (found, dims) in tensors(TINY) {
            let count: usize = dims.iter().product();
            if found == tensor {
                let mut bytes = vec![0; count * bytes_per_weight];
                fault(&mut bytes);
                file.push(&found, dtype, &dims, bytes);
            } else {
                file.push(&found, "F32", &dims, vec![0; count * 4]);
            }
        }
        std::fs::write(dir.join("model.safetensors"), file.bytes()).unwrap();
    };
    let q = "model.layers.1.self_attn.q_proj.weight";
    with("nan", q, "F32", 4, &|bytes| bytes[(64 * 3 + 5) * 4..][..4].copy_from_slice(&f32::NAN.to_le_bytes()));
    refused("nan", &["nan", q, "row 3", "column 5", "NaN"]);
    let line = scratch.fails(1, &["quantize", "nan", "-o", "out", "--scheme", "int4-row"]);
    contains(&line, &["nan", q, "row 3"]);
    with("infinite", q, "BF16", 2, &|bytes| bytes[..2].copy_from_slice(&[0x80, 0x7f]));
    refused("infinite", &["infinite", q, "row 0", "inf"]);
    with("dtype", q, "I32", 4, &|_| ());
    refused("dtype", &["dtype", q, "I32"]);
    with("unknown-dtype", q, "F4", 1, &|_| ());
    refused("unknown-dtype", &["unknown-dtype/model.safetensors", "F4"]);

    let dir = scratch.llama("shape", TINY);
    let mut other = config(TINY);
    other["intermediate_size"] = json!(112);
    write_json(&dir.join("config.json"), &other);
    refused("shape", &["shape", "mlp", "112"]);

    // A target that cannot be met says what could be.
    scratch.llama("fine", TINY);
    let line = scratch.fails(1, &["quantize", "fine", "-o", "out", "--bpw", "0.01"]);
    contains(&line, &["fine", "0.01", "between"]);
    assert!(scratch.names().iter().all(|name| !name.starts_with('.') && name != "out"), "{:?}", scratch.names());
}

#[test]
fn an_output_in_the_way_is_kept() {
    let scratch = Scratch::new();
    scratch.llama("src", TINY);
    scratch.ok(&["quantize", "src", "-o", "out", "--scheme", "int4-row"]);
    let before = std::fs::read(scratch.path("out/model.safetensors")).unwrap();
    contains(&scratch.fails(1, &["quantize", "src", "-o", "out"]), &["out", "exists"]);
    assert_eq!(std::fs::read(scratch.path("out/model.safetensors")).unwrap(), before);
    scratch.ok(&["quantize", "src", "-o", "out", "--scheme", "q4_0", "--force"]);
    assert_ne!(std::fs::read(scratch.path("out/model.safetensors")).unwrap(), before);

    // Not even --force replaces what is no model.
    std::fs::create_dir(scratch.path("photos")).unwrap();
    std::fs::write(scratch.path("photos/cat.jpg"), "cat").unwrap();
    scratch.fails(1, &["quantize", "src", "-o", "photos", "--force"]);
    assert_eq!(std::fs::read(scratch.path("photos/cat.jpg")).unwrap(), b"cat");
    scratch.fails(1, &["quantize", "src", "-o", "no/such/parent"]);
    contains(&scratch.fails(1, &["quantize", "out", "-o", "again"]), &["out", "already"]);
    scratch.mlx("mlx", TINY);
    contains(&scratch.fails(1, &["quantize", "mlx", "-o", "again"]), &["mlx", "encode"]);
    contains(&scratch.fails(2, &["encode", "src", "-o", "again"]), &["src", "quantize"]);
    assert_eq!(scratch.names(), ["mlx", "out", "photos", "src"]);
}

#[test]
fn damaged_directories_are_refused() {
    let scratch = Scratch::new();
    scratch.llama("src", TINY);
    scratch.ok(&["quantize", "src", "-o", "out"]);
    let path = scratch.path("out/model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let mut damaged = whole.clone();
    // The first blob begins behind the header; this byte is in one of its chunks.
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    damaged[8 + header + 3000] ^= 0x10;
    std::fs::write(&path, &damaged).unwrap();
    contains(&scratch.fails(1, &["verify", "out"]), &["out/model.safetensors"]);
    for strategy in ["fused", "cached", "prefetch", "lru"] {
        let line = scratch.fails(1, &["generate", "out", "--prompt", "w5", "-n", "2", "--strategy", strategy]);
        contains(&line, &["out/model.safetensors"]);
    }
    // Each of several strategies runs in a process of its own; its error is told as one's own.
    let line = scratch.fails(1, &["bench", "out", "--strategy", "cached,fused", "-p", "4", "-n", "2", "--repeat", "1"]);
    contains(&line, &["cached", "out/model.safetensors"]);
    std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    scratch.fails(1, &["verify", "out"]);
    scratch.fails(1, &["inspect", "out"]);
    contains(&scratch.fails(1, &["verify", "src"]), &["src"]);
}

#[test]
fn prompts_texts_and_budgets_that_cannot_be() {
    let scratch = Scratch::new();
    let source = scratch.llama("src", TINY);
    scratch.ok(&["quantize", "src", "-o", "out"]);
    let generate = ["generate", "out", "--strategy", "fused"];
    let fails = |more: &[&str]| scratch.fails(1, &[&generate[..], more].concat());
    contains(&fails(&["--prompt", ""]), &["prompt is empty"]);
    contains(&fails(&["--prompt", "  "]), &["prompt is empty"]);
    let long = vec!["w7"; 200].join(" ");
    contains(&fails(&["--prompt", &long]), &["200 tokens", "128"]);
    contains(&fails(&["--prompt", "w5", "--memory-budget", "10kB"]), &["10000 bytes", "too small", "at least"]);

    std::fs::remove_file(source.join("tokenizer.json")).unwrap();
    contains(&scratch.fails(1, &["generate", "src", "--prompt", "w5"]), &["src/tokenizer.json"]);
    contains(&scratch.fails(1, &["eval", "out", "--text", "nowhere.txt"]), &["nowhere.txt"]);
    std::fs::write(scratch.path("short"), "w5").unwrap();
    contains(&scratch.fails(1, &["eval", "out", "--text", "short", "--context", "16"]), &["short"]);
    std::fs::write(scratch.path("bytes"), [0xff, 0xfe]).unwrap();
    contains(&scratch.fails(1, &["eval", "out", "--text", "bytes", "--context", "16"]), &["bytes", "UTF-8"]);
}

/// A file size limit stands in for a full disk: the shell ignores its signal, so writes fail.
#[test]
fn a_full_disk_leaves_nothing() {
    let scratch = Scratch::new();
    scratch.llama("src", TINY);
    let script = "trap '' XFSZ; ulimit -f 8; exec \"$@\"";
    let output = std::process::Command::new("sh")
        .args(["-c", script, "sh", env!("CARGO_BIN_EXE_tersor"), "quantize", "src", "-o", "out"])
        .current_dir(scratch.path("."))
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.starts_with("error: ") && stderr.lines().count() == 1, "{stderr}");
    assert_eq!(scratch.names(), ["src"]);

    if std::path::Path::new("/dev/full").exists() {
        scratch.ok(&["quantize", "src", "-o", "out"]);
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let output = scratch.command(&["inspect", "out"]).stdout(full).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.starts_with("error: stdout: ") && stderr.lines().count() == 1, "{stderr}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let scratch = Scratch::new();
    scratch.llama("src", TINY);
    let mut child = scratch.command(&["inspect", "src"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{:?}", output.status);
    assert_eq!(output.stderr, b"");
}

/// 650 M weights: long enough to be interrupted in, small on disk as it is sparse.
const LONG: Shape = Shape { hidden: 2048, layers: 12, ffn: 8192, vocab: 1000 };

#[test]
fn an_interrupt_leaves_nothing() {
    let scratch = Scratch::new();
    scratch.zeros("src", LONG);
    for args in [&["--scheme", "int4-row"][..], &[]] {
        let args = [&["quantize", "src", "-o", "out"], args].concat();
        let child = scratch.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let start = Instant::now();
        while !scratch.names().iter().any(|name| name.starts_with(".out")) {
            assert!(start.elapsed() < Duration::from_secs(30), "no temporary directory appeared");
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(200));
        let kill = std::process::Command::new("sh").args(["-c", &format!("kill -INT {}", child.id())]).status().unwrap();
        assert!(kill.success());
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(130), "{stderr} {:?}", output.status.signal());
        assert_eq!(stderr, "error: interrupted\n");
        assert_eq!(output.stdout, b"");
        assert_eq!(scratch.names(), ["src"]);
    }
}

#[test]
fn memory_stays_below_twice_the_largest_tensor_and_the_output() {
    let scratch = Scratch::new();
    let shape = Shape { hidden: 4096, layers: 1, ffn: 14336, vocab: 1000 };
    scratch.zeros("src", shape);
    let report = scratch.json(&["quantize", "src", "-o", "out", "--scheme", "int4-row", "--json"]);
    let largest = (shape.hidden * shape.ffn * 2) as u64;
    let output = report["bytes_after"].as_u64().unwrap();
    let peak = report["peak_rss_bytes"].as_u64().unwrap();
    // Program, threads and their stacks: a third of a further copy of the tensor, of which a debug build takes some 33 MB.
    let program = 48 << 20;
    assert!(peak > largest / 2 && peak < 2 * largest + output + program, "peak {peak}, largest tensor {largest}, output {output}");
}
