//! What `quantize` and `encode` share: the output directory, the files that travel along, the account of what was written.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tersor_codec::Codec;
use tersor_format::{DirWriter, ModelDir, RawTensor};

use crate::observer::Observer;
use crate::options::Usage;

/// Begins the output directory.
pub fn create(source: &Path, output: &Path, force: bool, observer: &mut dyn Observer) -> Result<DirWriter> {
    if matches!((source.canonicalize(), output.canonicalize()), (Ok(a), Ok(b)) if a == b) {
        return Err(Usage("-o names the checkpoint itself; write to another directory".to_owned()).into());
    }
    let writer = DirWriter::create(output, force)?;
    observer.temporary(Some(writer.temp_path()));
    Ok(writer)
}

/// Copies tokenizer, chat template, generation defaults and licence, writes the configuration, and gives the directory its name.
pub fn finish(mut writer: DirWriter, source: &ModelDir, config: Value, observer: &mut dyn Observer) -> Result<()> {
    let path = source.path();
    let mut files: Vec<PathBuf> = std::fs::read_dir(path)
        .with_context(|| path.display().to_string())?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.is_file() && path.file_name().and_then(|n| n.to_str()).is_some_and(travels_along))
        .collect();
    files.sort();
    for file in files {
        writer.copy_file(&file)?;
    }
    install(writer, config, observer)
}

/// Writes the configuration and gives the directory its name.
pub fn install(writer: DirWriter, config: Value, observer: &mut dyn Observer) -> Result<()> {
    observer.at(tersor_format::MODEL_FILE)?;
    writer.finish(config)?;
    observer.temporary(None);
    Ok(())
}

/// Does a file of the checkpoint belong into the output?
fn travels_along(name: &str) -> bool {
    const NAMES: [&str; 5] = ["generation_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"];
    let lower = name.to_ascii_lowercase();
    NAMES.contains(&name)
        || (name.starts_with("tokenizer") && (name.ends_with(".json") || name.ends_with(".model")))
        || name.starts_with("chat_template")
        || lower.starts_with("license")
        || lower.starts_with("notice")
}

/// What config.json says of the coding; the directory's own version is added by the writer.
pub fn quantization_config(scheme: &str, codec: Codec, written: &Written) -> Value {
    // Four digits are what the figures are good for.
    let rounded = |value: f64| (value * 1e4).round() / 1e4;
    json!({
        "quant_method": "tersor",
        "version": tersor_format::VERSION,
        "scheme": scheme,
        "codec": codec.to_string(),
        "bpw": rounded(written.bpw()),
        "entropy_bits": rounded(written.entropy_bits()),
    })
}

/// The account of what was written, and of the time it took.
#[derive(Default)]
pub struct Written {
    pub weights: u64,
    pub bytes: u64,
    coded_weights: u64,
    coded_bytes: u64,
    /// Sum over coded tensors of weights times entropy, bits.
    entropy: f64,
    pub coded_tensors: usize,
    pub raw_tensors: usize,
    pub quantize: Duration,
    pub encode: Duration,
    pub write: Duration,
}

impl Written {
    /// Counts a coded tensor.
    pub fn add_coded(&mut self, weights: u64, bytes: u64, entropy_bits: f64) {
        self.coded_tensors += 1;
        self.coded_weights += weights;
        self.coded_bytes += bytes;
        self.weights += weights;
        self.bytes += bytes;
        self.entropy += entropy_bits * weights as f64;
    }

    /// Writes a tensor as it is, and counts it.
    pub fn add_raw(&mut self, writer: &mut DirWriter, name: &str, raw: &RawTensor) -> Result<()> {
        writer.write_raw(name, raw.dtype(), raw.shape(), raw.bytes())?;
        self.raw_tensors += 1;
        self.weights += raw.len() as u64;
        self.bytes += raw.bytes().len() as u64;
        Ok(())
    }

    /// Bits per weight of all tensors, everything counted.
    pub fn bpw(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.weights.max(1) as f64
    }

    /// The same for the coded tensors alone.
    pub fn coded_bpw(&self) -> f64 {
        self.coded_bytes as f64 * 8.0 / self.coded_weights.max(1) as f64
    }

    /// Mean entropy of the coded symbols.
    pub fn entropy_bits(&self) -> f64 {
        self.entropy / self.coded_weights.max(1) as f64
    }
}
