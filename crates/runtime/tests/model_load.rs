//! Configurations and checkpoints that are refused, each with one line that names the file and the cause.

mod common;

use common::with_config;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use tersor_format::ModelDir;
use tersor_runtime::model::config::{Config, Family, RopeScaling};
use tersor_runtime::model::names;
use tersor_runtime::model::weights::{LinearId, LinearKind};
use tersor_runtime::model::{Model, ModelError};

fn parse(config: &Value) -> Result<Config, ModelError> {
    Config::from_json(Path::new("dir"), config, None)
}

fn base() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 96, "vocab_size": 100
    })
}

fn with(changes: Value) -> Value {
    let mut config = base();
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    config
}

#[test]
fn defaults_are_those_of_transformers() {
    let config = parse(&base()).unwrap();
    assert_eq!(config.family, Family::Llama);
    assert_eq!((config.kv_heads, config.head_dim, config.context_max), (4, 16, 2048));
    assert_eq!((config.rms_eps, config.rope_theta, config.rope_scaling), (1e-6, 10_000.0, RopeScaling::None));
    assert!(!config.tied && !config.qkv_bias && !config.o_bias && !config.qk_norm && config.eos.is_empty());
    assert_eq!(config.windows, [None; 4]);
    let mistral = parse(&with(json!({"model_type": "mistral", "num_attention_heads": 8}))).unwrap();
    assert_eq!((mistral.kv_heads, &mistral.windows[..]), (8, &[Some(4096); 4][..]));
    let qwen3 = parse(&with(json!({"model_type": "qwen3", "num_key_value_heads": 2}))).unwrap();
    assert!(qwen3.qk_norm && !qwen3.qkv_bias);
    assert_eq!(qwen3.head_dim, 128);
}

#[test]
fn windows_follow_each_family() {
    let windows = |changes| parse(&with(changes)).unwrap().windows;
    let (w, none) = (Some(9), None);
    assert_eq!(windows(json!({"sliding_window": 9})), [none; 4], "Llama has no window");
    assert_eq!(windows(json!({"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": 9})), [w; 4]);
    assert_eq!(windows(json!({"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": null})), [none; 4]);
    let qwen = |more: Value| {
        let mut changes = json!({"model_type": "qwen2", "num_key_value_heads": 4, "sliding_window": 9});
        changes.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        windows(changes)
    };
    assert_eq!(qwen(json!({})), [none; 4]);
    assert_eq!(qwen(json!({"use_sliding_window": true, "max_window_layers": 3})), [none, none, none, w]);
    assert_eq!(qwen(json!({"use_sliding_window": true})), [none; 4]);
    let types = json!(["full_attention", "sliding_attention", "full_attention", "sliding_attention"]);
    assert_eq!(qwen(json!({"use_sliding_window": true, "layer_types": types})), [none, w, none, w]);
}

#[test]
fn end_tokens_come_from_the_generation_config_first() {
    let eos = |config: Value, generation: Option<Value>| {
        Config::from_json(Path::new("dir"), &with(config), generation.as_ref()).map(|config| config.eos)
    };
    assert_eq!(eos(json!({"eos_token_id": 3}), None).unwrap(), [3]);
    assert_eq!(eos(json!({"eos_token_id": [3, 4]}), Some(json!({}))).unwrap(), [3, 4]);
    assert_eq!(eos(json!({"eos_token_id": 3}), Some(json!({"eos_token_id": [5, 6]}))).unwrap(), [5, 6]);
    assert_eq!(eos(json!({"eos_token_id": null}), None).unwrap(), [0; 0]);
    let error = eos(json!({}), Some(json!({"eos_token_id": 100}))).unwrap_err().to_string();
    assert_eq!(error, "dir/generation_config.json: eos_token_id: 100 is not a token of a vocabulary of 100");
}

#[test]
fn rotary_frequencies_have_three_zones() {
    let scaling = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64
    });
    let plain = parse(&base()).unwrap().rope_frequencies();
    let scaled = parse(&with(json!({"rope_scaling": scaling}))).unwrap().rope_frequencies();
    // Wavelengths 6.28, 19.9, 62.8, 199, ...; limits 16 and 64.
    assert_eq!(scaled[0], plain[0]);
    let blend = |x: f64| (1.0 - x) / 8.0 + x;
    let expected = plain[1] * blend((64.0 / (2.0 * std::f64::consts::PI / plain[1]) - 1.0) / 3.0);
    assert!((scaled[1] - expected).abs() < 1e-15 && scaled[1] < plain[1] && scaled[1] > plain[1] / 8.0);
    assert!(scaled[2] < plain[2] && scaled[2] > plain[2] / 8.0);
    for i in 3..8 {
        assert_eq!(scaled[i], plain[i] / 8.0);
    }
    let newer = parse(&with(json!({"rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": 100.0}}))).unwrap();
    assert_eq!((newer.rope_theta, newer.rope_scaling), (100.0, RopeScaling::Linear { factor: 4.0 }));
}

#[test]
fn what_is_not_implemented_is_refused_by_name() {
    let cases = [
        (json!({"model_type": "mixtral"}), "model_type \"mixtral\""),
        (json!({"architectures": ["LlamaForSequenceClassification"]}), "architectures \"LlamaForSequenceClassification\""),
        (json!({"hidden_act": "gelu"}), "hidden_act \"gelu\""),
        (json!({"mlp_bias": true}), "mlp_bias \"true\""),
        (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor \"0.5\""),
        (json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}), "rope_scaling.rope_type \"yarn\""),
        (json!({"rope_scaling": {"type": "dynamic", "factor": 4.0}}), "rope_scaling.type \"dynamic\""),
        (json!({"quantization_config": {"quant_method": "gptq"}}), "quantization_config.quant_method \"gptq\""),
        (
            json!({"model_type": "qwen2", "num_key_value_heads": 4, "use_sliding_window": true,
                   "layer_types": ["full_attention", "linear_attention", "full_attention", "full_attention"]}),
            "layer_types \"\\\"linear_attention\\\"\"",
        ),
    ];
    for (changes, cause) in cases {
        let error = parse(&with(changes)).unwrap_err();
        assert!(matches!(error, ModelError::Unsupported { .. }));
        assert_eq!(error.to_string(), format!("dir/config.json: {cause} is not supported"));
    }
}

#[test]
fn senseless_numbers_are_refused_by_key() {
    let cases = [
        (json!({"model_type": 3}), "model_type: 3 is not a string"),
        (json!({"hidden_size": null}), "hidden_size: missing"),
        (json!({"hidden_size": 0}), "hidden_size: 0 is outside 1..=1048576"),
        (json!({"hidden_size": -4}), "hidden_size: -4 is not a whole number from 0"),
        (json!({"hidden_size": 1e30}), "hidden_size: 1e+30 is not a whole number from 0"),
        (json!({"hidden_size": [64]}), "hidden_size: a list is not a whole number from 0"),
        (json!({"num_hidden_layers": 70_000}), "num_hidden_layers: 70000 is outside 1..=4096"),
        (json!({"vocab_size": u64::MAX}), "vocab_size: 18446744073709551615 is outside 1..=16777216"),
        (json!({"num_attention_heads": 3}), "num_attention_heads: 3 does not divide hidden_size 64, and there is no head_dim"),
        (json!({"num_key_value_heads": 3}), "num_key_value_heads: 3 does not divide num_attention_heads 4"),
        (json!({"head_dim": 15}), "head_dim: 15 is odd, so positions cannot be rotated"),
        (json!({"head_dim": 1 << 20}), "head_dim: 4 heads of 1048576 are more than 1048576 rows"),
        (json!({"rms_norm_eps": -1.0}), "rms_norm_eps: -1 is outside 0..=1"),
        (json!({"rope_theta": 0.0}), "rope_theta: 0 is outside 1..=1e15"),
        (json!({"rope_scaling": 7}), "rope_scaling: is not an object"),
        (json!({"rope_scaling": {"factor": 2.0}}), "rope_scaling.rope_type: missing"),
        (json!({"rope_scaling": {"type": "linear", "factor": 0}}), "rope_scaling.factor: 0 is not above 0"),
        (json!({"tie_word_embeddings": "yes"}), "tie_word_embeddings: \"yes\" is not true or false"),
        (json!({"eos_token_id": 100}), "eos_token_id: 100 is not a token of a vocabulary of 100"),
    ];
    for (changes, cause) in cases {
        let error = parse(&with(changes)).unwrap_err();
        assert_eq!(error.to_string(), format!("dir/config.json: {cause}"));
    }
    assert_eq!(parse(&json!([])).unwrap_err().to_string(), "dir/config.json: not a JSON object");
}

#[test]
fn a_tied_head_is_the_embedding() {
    let untied = parse(&base()).unwrap();
    let tied = parse(&with(json!({"tie_word_embeddings": true}))).unwrap();
    assert_eq!(names::linear(&untied, LinearId::HEAD), "lm_head.weight");
    assert_eq!(names::linear(&tied, LinearId::HEAD), names::linear(&tied, LinearId::EMBED));
    let (all, less) = (names::linears(&untied), names::linears(&tied));
    assert_eq!((all.len(), less.len()), (2 + 4 * 7, 1 + 4 * 7));
    let down = all.iter().find(|linear| linear.id == LinearId::new(3, LinearKind::Down)).unwrap();
    assert_eq!((down.name.as_str(), down.rows, down.cols), ("model.layers.3.mlp.down_proj.weight", 64, 96));
}

fn load_error(dir: &Path) -> String {
    let message = Model::load(&ModelDir::open(dir).unwrap()).unwrap_err().to_string();
    assert!(!message.contains('\n'), "{message}");
    message
}

#[test]
fn checkpoints_must_have_every_tensor_in_its_shape() {
    let dir = with_config("llama2", |config| config["num_hidden_layers"] = 3.into());
    assert!(load_error(dir.path()).ends_with(": tensor model.layers.2.self_attn.q_proj.weight is missing"));
    let dir = with_config("llama3", |config| config["tie_word_embeddings"] = false.into());
    assert!(load_error(dir.path()).ends_with(": tensor lm_head.weight is missing"));
    let dir = with_config("llama3", |config| config["model_type"] = "qwen3".into());
    fs::write(dir.path().join("config.json"), {
        let text = fs::read_to_string(dir.path().join("config.json")).unwrap();
        text.replace("LlamaForCausalLM", "Qwen3ForCausalLM")
    })
    .unwrap();
    assert!(load_error(dir.path()).ends_with(": tensor model.layers.0.self_attn.q_norm.weight is missing"));
    let dir = with_config("llama3", |config| config["intermediate_size"] = 47.into());
    let message = load_error(dir.path());
    let expected =
        "model.safetensors: tensor \"model.layers.0.mlp.gate_proj.weight\" has shape [48, 32], the configuration asks for [47, 32]";
    assert!(message.ends_with(expected), "{message}");
}

#[test]
fn a_norm_that_is_not_a_number_is_refused() {
    let dir = with_config("llama3", |_| {});
    let path = dir.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    // The last tensor is the final norm: its last value becomes a bf16 infinity.
    let end = bytes.len();
    bytes[end - 2..].copy_from_slice(&[0x80, 0x7f]);
    fs::write(&path, bytes).unwrap();
    let message = load_error(dir.path());
    assert!(message.ends_with("tensor \"model.norm.weight\" is inf at index 31, F32, BF16 or F16, all finite, is needed"), "{message}");
}

#[test]
fn a_broken_generation_config_is_reported() {
    let dir = with_config("llama3", |_| {});
    fs::write(dir.path().join("generation_config.json"), "{").unwrap();
    assert!(load_error(dir.path()).contains("generation_config.json: EOF while parsing"));
}
