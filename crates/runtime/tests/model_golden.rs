//! The forward pass against logits of an independent NumPy implementation (tools/reference_forward.py), on tiny random
//! models of every configuration that is implemented (tools/make_tiny_models.py).

mod common;

use common::{golden_dir, open};
use std::fs;
use std::sync::Arc;
use tersor_cpu::{Level, Pool};
use tersor_runtime::model::kv::{KvCache, KvPrecision};
use tersor_runtime::model::llama::{Continuation, LogitsOf, Model};
use tersor_runtime::model::weights::{RunError, Weights};

const MODELS: [&str; 6] = ["llama2", "llama3", "llama-linear", "mistral", "qwen2", "qwen3"];

/// Both sides compute in float32 but add in different orders. The largest difference seen is 1.4e-5, with logits up to
/// 19; mlx-lm 0.32.2 differs from NumPy by up to 1e-5.
const TOLERANCE: f32 = 2e-5;

/// Tokens and logits (tokens, vocab) that NumPy computed.
fn golden(name: &str) -> (Vec<u32>, Vec<f32>) {
    let dir = golden_dir().join(name);
    let json: serde_json::Value = serde_json::from_slice(&fs::read(dir.join("golden.json")).unwrap()).unwrap();
    let tokens = json["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap() as u32).collect();
    let bytes = fs::read(dir.join("golden.f32")).unwrap();
    (tokens, bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

fn all_logits(model: &mut Model, weights: &mut dyn Weights, tokens: &[u32], precision: KvPrecision) -> Vec<f32> {
    let mut kv = KvCache::new(model.config(), tokens.len(), precision).unwrap();
    model.forward(weights, &mut kv, tokens, LogitsOf::All).unwrap().to_vec()
}

#[test]
fn logits_agree_with_numpy() {
    for name in MODELS {
        let (tokens, expected) = golden(name);
        let (mut model, mut weights) = open(&golden_dir().join(name), Level::best(), 1);
        let found = all_logits(&mut model, &mut weights, &tokens, KvPrecision::F32);
        let difference = largest_difference(&found, &expected);
        println!("{name}: largest difference {difference:.1e}");
        assert!(difference < TOLERANCE, "{name}: {difference}");
    }
}

#[test]
fn a_half_precision_cache_costs_little() {
    for name in MODELS {
        let (tokens, expected) = golden(name);
        let (mut model, mut weights) = open(&golden_dir().join(name), Level::best(), 1);
        let found = all_logits(&mut model, &mut weights, &tokens, KvPrecision::F16);
        let difference = largest_difference(&found, &expected);
        // f16 has 11 significant bits: an error of 2^-12 of values around 1, here and there amplified by two layers.
        assert!(difference > 0.0 && difference < 0.05, "{name}: {difference}");
    }
}

#[test]
fn every_feature_moves_the_logits() {
    // Else agreement would prove nothing about it: the reference read with one key changed must no longer agree.
    let changes = [
        ("llama3", "/rope_scaling", serde_json::Value::Null),
        ("llama-linear", "/rope_scaling/factor", 2.0.into()),
        ("mistral", "/sliding_window", 8.into()),
        ("qwen2", "/max_window_layers", 2.into()),
        ("qwen2", "/sliding_window", 5.into()),
        ("qwen3", "/rope_parameters/rope_theta", 10_000.into()),
        ("qwen3", "/rms_norm_eps", 1e-3.into()),
    ];
    for (name, pointer, value) in changes {
        let dir = common::with_config(name, |config| *config.pointer_mut(pointer).unwrap() = value.clone());
        let (tokens, expected) = golden(name);
        let (mut model, mut weights) = open(dir.path(), Level::best(), 1);
        let found = all_logits(&mut model, &mut weights, &tokens, KvPrecision::F32);
        assert!(largest_difference(&found, &expected) > 100.0 * TOLERANCE, "{name}: {pointer} has no effect");
    }
}

#[test]
fn logits_are_the_same_bits_however_tokens_are_sliced_and_at_every_level() {
    for name in MODELS {
        // Longer than a slice of the forward pass.
        let tokens: Vec<u32> = (0..300u32).map(|i| (i * i + 7 * i) % 64).collect();
        for precision in [KvPrecision::F16, KvPrecision::F32] {
            let (mut model, mut weights) = open(&golden_dir().join(name), Level::Scalar, 1);
            let expected = bits(&all_logits(&mut model, &mut weights, &tokens, precision));
            for level in Level::available() {
                for (threads, slice) in [(1, 1), (2, 300), (2, 7), (3, 256), (2, 257)] {
                    let (mut model, mut weights) = open(&golden_dir().join(name), level, threads);
                    let mut kv = KvCache::new(model.config(), tokens.len(), precision).unwrap();
                    let mut found = Vec::new();
                    for part in tokens.chunks(slice) {
                        found.extend(bits(model.forward(&mut weights, &mut kv, part, LogitsOf::All).unwrap()));
                    }
                    assert!(found == expected, "{name}: {level:?}, {threads} threads, slices of {slice}");
                }
            }
        }
    }
}

#[test]
fn a_batch_gives_each_sequence_the_bits_it_gets_alone() {
    let (mut model, mut weights) = open(&golden_dir().join("qwen2"), Level::best(), 2);
    let vocab = model.config().vocab;
    // Together more than one slice; the second sequence begins inside the first slice and ends in the second.
    let sequences: [Vec<u32>; 3] = [(0..200).map(|i| i % 60).collect(), (0..100).map(|i| (i * 5) % 64).collect(), vec![9, 8, 7]];
    let alone: Vec<Vec<u32>> = sequences.iter().map(|s| bits(&all_logits(&mut model, &mut weights, s, KvPrecision::F16))).collect();
    let new_cache = |model: &Model| KvCache::new(model.config(), 200, KvPrecision::F16).unwrap();
    let mut caches = [new_cache(&model), new_cache(&model), new_cache(&model)];
    let mut together = [Vec::new(), Vec::new(), Vec::new()];
    let wants = [LogitsOf::All, LogitsOf::Last, LogitsOf::None];
    let mut batch: Vec<_> =
        caches.iter_mut().zip(&sequences).zip(wants).map(|((kv, tokens), want)| Continuation { kv, tokens, want }).collect();
    model
        .forward_batch(&mut weights, &mut batch, &mut |sequence, token, row| {
            assert!(wants[sequence] == LogitsOf::All || token + 1 == sequences[sequence].len());
            together[sequence].extend(bits(row));
        })
        .unwrap();
    assert!(together[0] == alone[0]);
    assert!(together[1] == alone[1][99 * vocab..]);
    assert!(together[2].is_empty());
    // The third's cache was filled all the same.
    caches[2].truncate(2);
    let again = model.forward(&mut weights, &mut caches[2], &[7], LogitsOf::Last).unwrap();
    assert!(bits(again) == alone[2][2 * vocab..]);
}

#[test]
fn refused_tokens_leave_the_cache_usable() {
    let (mut model, mut weights) = open(&golden_dir().join("llama2"), Level::best(), 1);
    let mut kv = KvCache::new(model.config(), 4, KvPrecision::F16).unwrap();
    let mut run = |kv: &mut KvCache, tokens: &[u32]| model.forward(&mut weights, kv, tokens, LogitsOf::Last).map(<[f32]>::len);
    assert!(matches!(run(&mut kv, &[]), Err(RunError::NoTokens)));
    assert!(matches!(run(&mut kv, &[1, 64]), Err(RunError::TokenOutOfRange { token: 64, vocab: 64 })));
    assert!(matches!(run(&mut kv, &[1; 5]), Err(RunError::ContextFull { needed: 5, capacity: 4 })));
    assert!(kv.is_empty());
    assert_eq!(run(&mut kv, &[1; 4]).unwrap(), 64);
    assert_eq!(kv.len(), 4);
    assert!(matches!(run(&mut kv, &[1]), Err(RunError::ContextFull { needed: 5, capacity: 4 })));
}

#[test]
fn cache_bytes_are_what_is_announced() {
    let (model, _) = open(&golden_dir().join("qwen3"), Level::best(), 1);
    // 2 layers, 2 heads of 12, keys and values.
    for (precision, bytes) in [(KvPrecision::F16, 2), (KvPrecision::F32, 4)] {
        let kv = KvCache::new(model.config(), 10, precision).unwrap();
        assert_eq!(kv.bytes(), 10 * 2 * 2 * 12 * 2 * bytes);
        assert_eq!(KvCache::bytes_for(model.config(), 10, precision), kv.bytes());
    }
    let refused = KvCache::new(model.config(), usize::MAX / 1024, KvPrecision::F32);
    assert!(matches!(refused, Err(RunError::KvTooLarge { .. })), "{refused:?}");
}

#[test]
fn one_pool_serves_two_models() {
    let pool = Arc::new(Pool::new(2));
    let (mut a, mut a_weights) = common::open_with(&golden_dir().join("llama2"), Level::best(), Arc::clone(&pool));
    let (mut b, mut b_weights) = common::open_with(&golden_dir().join("mistral"), Level::best(), pool);
    for (model, weights, name) in [(&mut a, &mut a_weights, "llama2"), (&mut b, &mut b_weights, "mistral")] {
        let (tokens, expected) = golden(name);
        let found = all_logits(model, weights, &tokens, KvPrecision::F32);
        assert!(largest_difference(&found, &expected) < TOLERANCE);
    }
}
