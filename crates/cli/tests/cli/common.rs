//! Tiny models and a way to run the built binary on them.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

/// Hyperparameters of a random Llama.
#[derive(Clone, Copy)]
pub struct Shape {
    pub hidden: usize,
    pub layers: usize,
    pub ffn: usize,
    pub vocab: usize,
}

/// Runs in well under a second even unoptimized.
pub const TINY: Shape = Shape { hidden: 64, layers: 3, ffn: 96, vocab: 200 };
/// 2 M weights: enough that a target of bits per weight can be met closely.
pub const SMALL: Shape = Shape { hidden: 256, layers: 2, ffn: 768, vocab: 2048 };

/// A scratch directory with a cache directory of its own, so that no test sees the user's.
pub struct Scratch(TempDir);

impl Scratch {
    pub fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The binary with `args`, run in this directory.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tersor"));
        command.args(args).current_dir(self.0.path()).env("XDG_CACHE_HOME", self.path("cache"));
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs a command that must succeed, and returns its stdout.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command with `input` on its stdin.
    pub fn with_input(&self, args: &[&str], input: &[u8]) -> Output {
        let mut command = self.command(args);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // A command that fails early does not read.
        let _ = child.stdin.take().unwrap().write_all(input);
        child.wait_with_output().unwrap()
    }

    /// Runs a command that must print exactly one JSON document on stdout.
    pub fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.ok(args)).unwrap_or_else(|error| panic!("{args:?}: {error}"))
    }

    /// Runs a command that must fail with `code` and one line on stderr, which is returned.
    pub fn fails(&self, code: i32, args: &[&str]) -> String {
        let output = self.run(args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert_eq!(output.stdout, b"", "{args:?}");
        assert!(stderr.starts_with("error: ") && stderr.ends_with('\n'), "{args:?}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
        stderr
    }

    /// Names in the scratch directory, ascending, hidden ones included.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> =
            std::fs::read_dir(self.0.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Writes a random Llama as a Hugging Face directory `name`.
    pub fn llama(&self, name: &str, shape: Shape) -> PathBuf {
        let dir = self.path(name);
        std::fs::create_dir(&dir).unwrap();
        write_json(&dir.join("config.json"), &config(shape));
        write_json(&dir.join("tokenizer.json"), &tokenizer(shape.vocab));
        write_json(&dir.join("generation_config.json"), &json!({"eos_token_id": 1}));
        std::fs::write(dir.join("LICENSE"), "CC0\n").unwrap();
        let mut file = Safetensors::default();
        let mut random = 7_u64;
        for (name, dims) in tensors(shape) {
            let count = dims.iter().product::<usize>();
            let values: Vec<f32> =
                if dims.len() == 1 { vec![1.0; count] } else { (0..count).map(|_| gaussian(&mut random) * 0.08).collect() };
            // Truncated to bf16: half the size, and what checkpoints come in.
            file.push(&name, "BF16", &dims, values.iter().flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect());
        }
        std::fs::write(dir.join("model.safetensors"), file.bytes()).unwrap();
        dir
    }

    /// Writes a random Llama as MLX's 4-bit affine quantization in groups of 32 does. Its codes have an entropy of about 3 bits.
    pub fn mlx(&self, name: &str, shape: Shape) -> PathBuf {
        let dir = self.path(name);
        std::fs::create_dir(&dir).unwrap();
        let mut config = config(shape);
        config["quantization"] = json!({"group_size": 32, "bits": 4});
        config["quantization_config"] = config["quantization"].clone();
        write_json(&dir.join("config.json"), &config);
        write_json(&dir.join("tokenizer.json"), &tokenizer(shape.vocab));
        let mut file = Safetensors::default();
        let mut random = 11_u64;
        for (name, dims) in tensors(shape) {
            let bf16 = |value: f32| ((value.to_bits() >> 16) as u16).to_le_bytes();
            let [rows, cols] = dims[..] else {
                file.push(&name, "BF16", &dims, (0..dims[0]).flat_map(|_| bf16(1.0)).collect());
                continue;
            };
            let mut nibble = || (gaussian(&mut random) * 2.0 + 8.0).clamp(0.0, 15.0) as u8;
            let bytes = (0..rows * cols / 2).map(|_| nibble() | nibble() << 4).collect();
            file.push(&name, "U32", &[rows, cols / 8], bytes);
            let stem = name.strip_suffix(".weight").unwrap();
            let groups = rows * cols / 32;
            for (part, sign) in [("scales", 1.0), ("biases", -8.0)] {
                let values = (0..groups).flat_map(|i| bf16(sign * (0.02 + (i % 7) as f32 * 0.001)));
                file.push(&format!("{stem}.{part}"), "BF16", &[rows, cols / 32], values.collect());
            }
        }
        std::fs::write(dir.join("model.safetensors"), file.bytes()).unwrap();
        dir
    }

    /// Writes a Llama of zeros in bf16 whose file is sparse, so that it may be large.
    pub fn zeros(&self, name: &str, shape: Shape) -> PathBuf {
        let dir = self.path(name);
        std::fs::create_dir(&dir).unwrap();
        write_json(&dir.join("config.json"), &config(shape));
        let (mut header, mut end) = (serde_json::Map::new(), 0_u64);
        for (name, dims) in tensors(shape) {
            let bytes = dims.iter().product::<usize>() as u64 * 2;
            header.insert(name, json!({"dtype": "BF16", "shape": dims, "data_offsets": [end, end + bytes]}));
            end += bytes;
        }
        let header = Value::Object(header).to_string();
        let path = dir.join("model.safetensors");
        std::fs::write(&path, [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()).unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(8 + header.len() as u64 + end).unwrap();
        dir
    }
}

/// A safetensors file in the making.
#[derive(Default)]
pub struct Safetensors {
    header: serde_json::Map<String, Value>,
    data: Vec<u8>,
}

impl Safetensors {
    pub fn push(&mut self, name: &str, dtype: &str, shape: &[usize], bytes: Vec<u8>) {
        let start = self.data.len();
        self.data.extend(bytes);
        self.header.insert(name.to_owned(), json!({"dtype": dtype, "shape": shape, "data_offsets": [start, self.data.len()]}));
    }

    pub fn bytes(self) -> Vec<u8> {
        let header = Value::Object(self.header).to_string();
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &self.data].concat()
    }
}

/// Name and dimensions of every tensor.
pub fn tensors(shape: Shape) -> Vec<(String, Vec<usize>)> {
    let Shape { hidden, layers, ffn, vocab } = shape;
    let mut all = vec![("model.embed_tokens.weight".to_owned(), vec![vocab, hidden]), ("model.norm.weight".to_owned(), vec![hidden])];
    for layer in 0..layers {
        let mut push = |part: &str, dims: &[usize]| all.push((format!("model.layers.{layer}.{part}.weight"), dims.to_vec()));
        push("input_layernorm", &[hidden]);
        push("post_attention_layernorm", &[hidden]);
        push("self_attn.q_proj", &[hidden, hidden]);
        push("self_attn.k_proj", &[hidden / 2, hidden]);
        push("self_attn.v_proj", &[hidden / 2, hidden]);
        push("self_attn.o_proj", &[hidden, hidden]);
        push("mlp.gate_proj", &[ffn, hidden]);
        push("mlp.up_proj", &[ffn, hidden]);
        push("mlp.down_proj", &[hidden, ffn]);
    }
    all
}

pub fn config(shape: Shape) -> Value {
    json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": shape.ffn,
        "vocab_size": shape.vocab, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "eos_token_id": 1
    })
}

/// Words `w2`, `w3`, ... separated by blanks.
fn tokenizer(vocab: usize) -> Value {
    let words: serde_json::Map<String, Value> = (0..vocab)
        .map(|id| match id {
            0 => ("<unk>".to_owned(), json!(0)),
            1 => ("</s>".to_owned(), json!(1)),
            id => (format!("w{id}"), json!(id)),
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null, "decoder": null,
        "added_tokens": [{"id": 1, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    })
}

pub fn write_json(path: &Path, value: &Value) {
    std::fs::write(path, value.to_string()).unwrap();
}

/// Sum of twelve uniform numbers (Irwin-Hall): Gaussian enough for weights.
fn gaussian(state: &mut u64) -> f32 {
    let mut uniform = || {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*state >> 40) as f32 / (1 << 24) as f32
    };
    (0..12).map(|_| uniform()).sum::<f32>() - 6.0
}

/// Asserts that a JSON object has these keys.
pub fn has_keys(value: &Value, keys: &[&str]) {
    let object = value.as_object().expect("an object");
    for key in keys {
        assert!(object.contains_key(*key), "key {key} is missing in {:?}", object.keys().collect::<Vec<_>>());
    }
}
