//! Small random coded models, and ways to run and to damage them.
#![allow(dead_code)] // Each test file uses its part.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tersor_codec::Codec;
use tersor_cpu::Level;
use tersor_format::{DirWriter, Dtype, ModelDir, encode_tensor};
use tersor_quant::{EcsqParams, Grid, Plan, SliceRows, quantize};
use tersor_runtime::model::config::Config;
use tersor_runtime::model::kv::{KvCache, KvPrecision};
use tersor_runtime::model::llama::{LogitsOf, Model};
use tersor_runtime::model::names;
use tersor_runtime::model::weights::{ResidencyReport, RunError, Weights};
use tersor_runtime::residency::{MachineProfile, OpenError, Options, Policy, Strategy, open};
use xxhash_rust::xxh3::xxh3_64;

/// What a test model is made of.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    pub plan: Plan,
    pub codec: Codec,
    pub layers: usize,
    pub tied: bool,
    /// The embedding and every `v` stay BF16.
    pub partly_raw: bool,
    /// A multiple of 64. At 64, tables and checksums weigh more than what coding saves; at 256 coding pays.
    pub hidden: usize,
    /// What the layers' norms multiply by: large factors make large activations.
    pub loudness: f32,
}

/// The recommended scheme, with symbols that need escapes and some beyond a byte.
pub const ECSQ: Plan = Plan::Ecsq(EcsqParams { grid: Grid::Row, relative_step: 0.25, rounding: 0.5 });

impl Recipe {
    pub fn new(codec: &str, layers: usize) -> Self {
        Self { plan: ECSQ, codec: codec.parse().unwrap(), layers, tied: false, partly_raw: false, hidden: 64, loudness: 1.0 }
    }

    /// Large enough that the coded form is the smaller one.
    pub fn wide(codec: &str, layers: usize) -> Self {
        Self { hidden: 256, ..Self::new(codec, layers) }
    }
}

pub fn plans() -> [Plan; 6] {
    let tensor = Plan::Ecsq(EcsqParams { grid: Grid::Tensor, relative_step: 0.5, rounding: 0.5 });
    [ECSQ, tensor, Plan::Affine4 { group_size: 32 }, Plan::Q4_0, Plan::Int4Row, Plan::Int4Tensor]
}

struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 24) as f32
    }

    /// Roughly normal, with rare outliers of up to some 100 deviations.
    fn weight(&mut self) -> f32 {
        let normal = (0..6).map(|_| self.uniform()).sum::<f32>() - 3.0;
        if self.uniform() < 0.0005 { normal * 60.0 } else { normal }
    }
}

/// A model directory, gone with its handle.
pub struct TestModel {
    root: tempfile::TempDir,
}

impl TestModel {
    pub fn new(recipe: Recipe) -> Self {
        let root = tempfile::tempdir().unwrap();
        let mut writer = DirWriter::create(root.path().join("model"), false).unwrap();
        let json = serde_json::json!({
            "model_type": "llama", "hidden_size": recipe.hidden, "intermediate_size": recipe.hidden * 5 / 2, "num_hidden_layers": recipe.layers,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": recipe.tied, "max_position_embeddings": 128,
        });
        let config = Config::from_json(root.path(), &json, None).unwrap();
        let mut random = Random(recipe.layers as u64 + 17);
        for linear in names::linears(&config) {
            let weights: Vec<f32> = (0..linear.rows * linear.cols).map(|_| half::bf16::from_f32(0.1 * random.weight()).to_f32()).collect();
            if recipe.partly_raw && (linear.name.contains("embed") || linear.name.contains("v_proj")) {
                let bytes: Vec<u8> = weights.iter().flat_map(|w| half::bf16::from_f32(*w).to_le_bytes()).collect();
                writer.write_raw(&linear.name, Dtype::Bf16, &[linear.rows, linear.cols], &bytes).unwrap();
                continue;
            }
            let quantized = quantize(&recipe.plan, &SliceRows::new(&weights, linear.cols, tersor_quant::Dtype::Bf16)).unwrap();
            // Two row tiles in a chunk, so that even these matrices have several.
            let chunk_symbols = 32 * recipe.hidden as u32;
            writer.write_coded(&linear.name, &encode_tensor(&quantized, recipe.codec, chunk_symbols).unwrap()).unwrap();
        }
        let mut norms = vec![names::FINAL_NORM.to_owned()];
        for layer in 0..recipe.layers {
            norms.push(names::in_layer(layer, "input_layernorm.weight"));
            norms.push(names::in_layer(layer, "post_attention_layernorm.weight"));
        }
        for name in norms {
            let factor = if name == names::FINAL_NORM { 1.0 } else { recipe.loudness };
            let bytes: Vec<u8> = (0..recipe.hidden).flat_map(|_| (factor * (0.5 + random.uniform())).to_le_bytes()).collect();
            writer.write_raw(&name, Dtype::F32, &[recipe.hidden], &bytes).unwrap();
        }
        writer.finish(json).unwrap();
        Self { root }
    }

    pub fn path(&self) -> PathBuf {
        self.root.path().join("model")
    }

    pub fn dir(&self) -> ModelDir {
        ModelDir::open(self.path()).unwrap()
    }

    pub fn open(&self, strategy: Strategy, options: &Options) -> Result<Box<dyn Weights>, OpenError> {
        open(self.dir(), strategy, options)
    }

    /// Logits of a prompt, of some steps, and of a second prompt on the same weights, all as bits; and the report at the end.
    pub fn logits(&self, strategy: Strategy, options: &Options) -> (Vec<u32>, ResidencyReport) {
        let mut model = Model::load(&self.dir()).unwrap();
        let mut weights = self.open(strategy, options).unwrap_or_else(|e| panic!("{strategy}: {e}"));
        let bits = run(&mut model, weights.as_mut()).unwrap_or_else(|e| panic!("{strategy}: {e}"));
        (bits, weights.report())
    }

    pub fn model(&self) -> Model {
        Model::load(&self.dir()).unwrap()
    }
}

/// Two sequences: a prompt and three steps each.
pub fn run(model: &mut Model, weights: &mut dyn Weights) -> Result<Vec<u32>, RunError> {
    let mut bits = Vec::new();
    for prompt in [&[3u32, 98, 41, 0, 7][..], &[12]] {
        let mut kv = KvCache::new(model.config(), 16, KvPrecision::F16).unwrap();
        let mut push = |logits: &[f32]| bits.extend(logits.iter().map(|x| x.to_bits()));
        push(model.forward(weights, &mut kv, prompt, LogitsOf::All)?);
        for token in [5, 60, 33] {
            push(model.forward(weights, &mut kv, &[token], LogitsOf::Last)?);
        }
    }
    Ok(bits)
}

pub fn options(threads: usize) -> Options {
    Options { profile: Some(Arc::new(profile(20e9, 10e9, 10e9))), ..Options::new(threads, Level::best()) }
}

pub fn with_budget(options: &Options, budget: u64) -> Options {
    Options { memory_budget: Some(budget), ..options.clone() }
}

pub fn with_policy(options: &Options, policy: Policy) -> Options {
    Options { policy, ..options.clone() }
}

/// A made-up machine: rates in weights per second of two threads, for every codec alike.
pub fn profile(plain: f64, fused: f64, decode: f64) -> MachineProfile {
    let codec = |codec: Codec| {
        serde_json::json!({
            "codec": codec.to_string(), "sample_bpw": 3.0, "fused_weights_per_second": fused,
            "fused_cache_weights_per_second": fused,
            "decode_weights_per_second": decode, "macs_per_second": 100e9,
        })
    };
    let plain = |bits: u8| serde_json::json!({"bits": bits, "weights_per_second": plain, "cache_weights_per_second": plain, "macs_per_second": 100e9});
    let codecs: Vec<_> = Codec::SHORT_NAMES.iter().map(|(_, id)| codec(*id)).collect();
    serde_json::from_value(serde_json::json!({
        "version": 1, "library": "test", "cpu": "test", "level": "test", "threads": 2,
        "read_bytes_per_second": {"1": 15e9, "2": 30e9}, "read_bytes_per_second_by_mib": {"2": 30e9},
        "plain": [plain(4), plain(8)], "codecs": codecs, "measured_seconds": 0.0,
    }))
    .unwrap()
}

/// The least budget that a strategy accepts, from its refusal of a budget of one byte.
pub fn least(model: &TestModel, strategy: Strategy, options: &Options) -> u64 {
    match model.open(strategy, &with_budget(options, 1)) {
        Err(OpenError::BudgetTooSmall { least, .. }) => least.total_bytes(),
        Err(other) => panic!("{strategy}: {other}"),
        Ok(_) => panic!("{strategy} accepts a budget of one byte"),
    }
}

/// The safetensors file of a small model, taken apart.
pub struct File {
    path: PathBuf,
    bytes: Vec<u8>,
    header: serde_json::Value,
    data: usize,
}

impl File {
    pub fn open(model: &Path) -> Self {
        let path = model.join("model.safetensors");
        let bytes = fs::read(&path).unwrap();
        let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = serde_json::from_slice(&bytes[8..data]).unwrap();
        Self { path, bytes, header, data }
    }

    /// Where a stored tensor lies in the file.
    pub fn range(&self, stored: &str) -> std::ops::Range<usize> {
        let offset = |i: usize| self.data + self.header[stored]["data_offsets"][i].as_u64().unwrap() as usize;
        offset(0)..offset(1)
    }

    pub fn flip(&mut self, at: usize) {
        self.bytes[at] ^= 0x10;
    }

    fn u32_at(&self, at: usize) -> usize {
        u32::from_le_bytes(self.bytes[at..at + 4].try_into().unwrap()) as usize
    }

    /// Offset of a chunk of a blob in the file, and its length; and offset of its index entry.
    pub fn chunk(&self, stored: &str, chunk: usize) -> (usize, usize, usize) {
        let blob = self.range(stored).start;
        let (chunks, table) = (self.u32_at(blob + 32), self.u32_at(blob + 36));
        let index = blob + 64 + table;
        let mut start = (64 + table + 8 * chunks).next_multiple_of(16);
        for before in 0..chunk {
            start = (start + self.u32_at(index + 8 * before)).next_multiple_of(16);
        }
        (blob + start, self.u32_at(index + 8 * chunk), index + 8 * chunk)
    }

    /// Makes a chunk undecodable while every checksum over it is right: what only a hostile writer produces.
    pub fn forge(&mut self, stored: &str, chunk: usize) {
        let (start, bytes, entry) = self.chunk(stored, chunk);
        // More escapes than the chunk is long.
        self.bytes[start..start + 4].copy_from_slice(&[0xff; 4]);
        let checksum = xxh3_64(&self.bytes[start..start + bytes]) as u32;
        self.bytes[entry + 4..entry + 8].copy_from_slice(&checksum.to_le_bytes());
        let blob = self.range(stored);
        let (chunks, table) = (self.u32_at(blob.start + 32), self.u32_at(blob.start + 36));
        let mut head = self.bytes[blob.start..blob.start + 56].to_vec();
        head.extend_from_slice(&self.bytes[blob.start + 64..blob.start + 64 + table + 8 * chunks]);
        let checksum = xxh3_64(&head).to_le_bytes();
        self.bytes[blob.start + 56..blob.start + 64].copy_from_slice(&checksum);
        let checksum = format!("{:016x}", xxh3_64(&self.bytes[blob]));
        let old = self.header["__metadata__"][format!("xxh3:{stored}")].as_str().unwrap().to_owned();
        let at = self.bytes[..self.data].windows(16).position(|window| window == old.as_bytes()).unwrap();
        self.bytes[at..at + 16].copy_from_slice(checksum.as_bytes());
    }

    pub fn save(self) {
        // A new file, as the mapped one must not change.
        let new = self.path.with_extension("new");
        fs::write(&new, self.bytes).unwrap();
        fs::rename(new, self.path).unwrap();
    }
}
