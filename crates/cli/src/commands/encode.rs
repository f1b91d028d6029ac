//! `tersor encode`: a checkpoint that is quantized already, made smaller without changing a bit of it.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;
use tersor_codec::{Codec, Histogram};
use tersor_format::{CHUNK_SYMBOLS_TARGET, DirWriter, MlxDir, MlxQuantized, MlxTensor, ModelDir, Tensor, encode_tensor, to_mlx};

use crate::convert::{self, Written};
use crate::interrupt;
use crate::observer::{Observer, Terminal, with_threads};
use crate::options::{Usage, thread_count};
use crate::output::table::Table;
use crate::output::{self, units};

/// Entropy-code an already quantized checkpoint without loss
///
/// Reads 4-bit affine directories as MLX writes them. Every tensor is decoded again while it is written and compared with the original, bit
/// by bit. Expect 6 to 8 %: group-quantized codes have little to save; `quantize` on the original checkpoint saves more.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    options: Options,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// What to encode, and how.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// Quantized checkpoint: an MLX directory
    #[arg(value_name = "SRC")]
    pub source: PathBuf,
    /// Directory to write
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// rans (fast), rans-precise (smallest), huffman, block-ans, tiered (fastest fused), rans-pairs, fixed, or a full id
    #[arg(long, default_value = "rans-precise")]
    pub codec: Codec,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = thread_count)]
    pub threads: Option<usize>,
    /// Replace DIR if it is a model directory
    #[arg(long)]
    pub force: bool,
}

/// What was written.
#[derive(Serialize)]
pub struct Report {
    source: String,
    output: String,
    codec: String,
    lossless: bool,
    weights: u64,
    coded_tensors: usize,
    raw_tensors: usize,
    bytes_before: u64,
    bytes_after: u64,
    bpw_before: f64,
    bpw: f64,
    entropy_bits: f64,
    seconds: f64,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let _graceful = interrupt::graceful();
    let report = encode(&args.options, &mut Terminal::default())?;
    if args.json { output::json(&report) } else { output::text(&render(&report)) }
}

/// Encodes a directory.
///
/// # Errors
/// A checkpoint that is not quantized in a way known here, files, or what the observer says.
pub fn encode(options: &Options, observer: &mut dyn Observer) -> Result<Report> {
    with_threads(options.threads, || encode_dir(options, observer))
}

fn encode_dir(args: &Options, observer: &mut dyn Observer) -> Result<Report> {
    let start = Instant::now();
    let dir = ModelDir::open(&args.source)?;
    let not_quantized = || {
        let text = "neither quantized by MLX nor by another program that is known here; `tersor quantize` takes unquantized checkpoints";
        Usage(format!("{}: {text}", args.source.display()))
    };
    let tensors = MlxDir::new(&dir).ok_or_else(not_quantized)?.tensors()?;
    let mut writer = convert::create(&args.source, &args.output, args.force, observer)?;
    for (name, tensor) in &tensors {
        match tensor {
            MlxTensor::Quantized(_) => writer.expect_coded(name, true),
            MlxTensor::Raw(_) => writer.expect_raw(name),
        }
    }
    let written = write(&mut writer, &dir, &tensors, args.codec, observer)?;
    ensure!(written.coded_tensors > 0, not_quantized());

    let mut config = dir.config().clone();
    let object = config.as_object_mut().context("a directory that was opened has an object for its configuration")?;
    // What MLX says of its packed words would mislead a reader of the coded ones; the files themselves are kept, for `export`.
    let original = object.remove("quantization").unwrap_or(Value::Null);
    let mut quantization = convert::quantization_config("affine4", args.codec, &written);
    quantization["source"] = serde_json::json!({"format": "mlx", "quantization": original});
    config["quantization_config"] = quantization;
    writer.keep_original(&dir)?;
    convert::install(writer, config, observer)?;

    Ok(Report {
        source: args.source.display().to_string(),
        output: args.output.display().to_string(),
        codec: args.codec.to_string(),
        lossless: true,
        weights: written.weights,
        coded_tensors: written.coded_tensors,
        raw_tensors: written.raw_tensors,
        bytes_before: dir.file_bytes(),
        bytes_after: ModelDir::open(&args.output)?.file_bytes(),
        bpw_before: dir.tensors().map(|(_, tensor)| tensor.bytes()).sum::<u64>() as f64 * 8.0 / written.weights as f64,
        bpw: written.bpw(),
        entropy_bits: written.entropy_bits(),
        seconds: start.elapsed().as_secs_f64(),
    })
}

fn write(
    writer: &mut DirWriter,
    dir: &ModelDir,
    tensors: &[(&str, MlxTensor<'_>)],
    codec: Codec,
    observer: &mut dyn Observer,
) -> Result<Written> {
    let size = |tensor: &MlxTensor<'_>| match tensor {
        MlxTensor::Quantized(quantized) => quantized.rows() as u64 * quantized.cols() as u64,
        MlxTensor::Raw(raw) => raw.len() as u64,
    };
    observer.begin("encode", tensors.iter().map(|(_, tensor)| size(tensor)).sum());
    let mut written = Written::default();
    for (name, tensor) in tensors {
        observer.at(name)?;
        match tensor {
            MlxTensor::Raw(raw) => written.add_raw(writer, name, raw)?,
            MlxTensor::Quantized(quantized) => {
                let context = || format!("{}: tensor {name}", dir.path().display());
                encode_tensor_checked(writer, dir, name, quantized, codec, &mut written).with_context(context)?;
            }
        }
        dir.release(name);
        observer.add(size(tensor));
    }
    Ok(written)
}

fn encode_tensor_checked(
    writer: &mut DirWriter,
    dir: &ModelDir,
    name: &str,
    quantized: &MlxQuantized<'_>,
    codec: Codec,
    written: &mut Written,
) -> Result<()> {
    let tensor = quantized.to_tensor()?;
    let mut histogram = Histogram::new();
    histogram.add(&tensor.symbols);
    let encoded = encode_tensor(&tensor, codec, CHUNK_SYMBOLS_TARGET)?;
    drop(tensor);
    let coded = encoded.tensor();
    let back = to_mlx(coded)?;
    let stem = name.strip_suffix("weight").unwrap_or(name);
    let same = [("weight", &back.words), ("scales", &back.scales), ("biases", &back.biases)].into_iter().all(|(part, back)| {
        let original = dir.tensor(&format!("{stem}{part}"));
        matches!(original, Some(Tensor::Raw(original)) if original.dtype() == back.dtype() && original.bytes()[..] == back.bytes()[..])
    });
    ensure!(same, "decoding does not give the original back");
    writer.write_coded(name, &encoded)?;
    let weights = quantized.rows() as u64 * quantized.cols() as u64;
    written.add_coded(weights, coded.coded_bytes() + coded.scales().bytes(), histogram.entropy_bits());
    Ok(())
}

fn render(report: &Report) -> String {
    let mut table = Table::new(&["", ">"]);
    let mut row = |name: &str, value: String| table.row([name.to_owned(), value]);
    row("before", format!("{}, {:.3} bpw", units::bytes(report.bytes_before), report.bpw_before));
    row("after", format!("{}, {:.3} bpw", units::bytes(report.bytes_after), report.bpw));
    row("saved", format!("{:.1} %", (1.0 - report.bytes_after as f64 / report.bytes_before as f64) * 100.0));
    row("entropy of the codes", format!("{:.3}", report.entropy_bits));
    row("codec", report.codec.clone());
    row("lossless", "yes, compared bit by bit".to_owned());
    row("time", units::seconds(report.seconds));
    table.render()
}
