//! `tersor quantize`: a Hugging Face checkpoint in, a directory of entropy-coded tensors out.
//!
//! Two passes over the weights, tensor by tensor, so that no more than one tensor is in memory: the first measures how entropy depends on
//! the quantization step, from which the step that meets `--bpw` follows; the second quantizes, encodes and writes. If what was written
//! misses the target, the step is corrected by the error, between results too small and too large by half, and the second pass runs again.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use tersor_codec::{Codec, Histogram, rans_pairs};
use tersor_format::{
    CHUNK_SYMBOLS_TARGET, DirWriter, MlxDir, ModelDir, RawRows, RawTensor, TILE_COLS, TILE_ROWS, TILE_SYMBOLS, Tensor, encode_tensor,
};
use tersor_quant::{DEFAULT_ROUNDING, Plan, RateModel, RateTarget, RateTensor, Role, Scheme, SymbolCounts, solve_step};
use tersor_runtime::model::config::Config;
use tersor_runtime::model::names::{self, LinearInfo};

use crate::convert::{self, Written};
use crate::interrupt;
use crate::machine;
use crate::observer::{Observer, Terminal, with_threads};
use crate::options::{Usage, positive, thread_count};
use crate::output::table::Table;
use crate::output::{self, units};

/// Target of `ecsq` unless the user names one.
const BPW_DEFAULT: f64 = 4.0;
/// The second pass runs again if the result misses the target by more than this part of it. The promise is 0.5 %.
const MISS_MAX: f64 = 0.004;
/// Second passes at most. A target may never be met closely: tiny models' padding moves in steps, and `tiered` leaps by 0.1 bit where it begins to
/// keep raw bits, over the whole model if its tensors are alike.
const PASSES_MAX: usize = 4;

/// Quantize and entropy-code a Hugging Face checkpoint
///
/// Reads config.json and F32, F16 or BF16 safetensors of a Llama-family model; codes its linear layers and its embedding, keeps norms
/// and biases as they are, and copies tokenizer and licence files. The output appears under its name only when it is complete.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    options: Options,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// What to quantize, and how.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// Checkpoint: a Hugging Face directory
    #[arg(value_name = "SRC")]
    pub source: PathBuf,
    /// Directory to write
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// ecsq (any --bpw; recommended), affine4 (MLX's 4 bit), q4_0 (GGUF's), int4-row, int4-tensor
    #[arg(long, default_value = "ecsq")]
    pub scheme: Scheme,
    /// Bits per weight of the whole model, everything counted; ecsq only [default: 4.0]
    #[arg(long, value_parser = positive, allow_negative_numbers = true)]
    pub bpw: Option<f64>,
    /// Weights that share a scale: 32, 64 or 128; affine4 only [default: 64]
    #[arg(long, value_name = "N", value_parser = group_size)]
    pub group_size: Option<u32>,
    /// rans (fast), rans-precise (smallest), huffman, block-ans, tiered (fastest fused), rans-pairs, fixed, or a full id such as rans/s16-w8-p7-l64
    #[arg(long, default_value = "rans")]
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
    model_type: String,
    scheme: String,
    codec: String,
    weights: u64,
    coded_tensors: usize,
    raw_tensors: usize,
    bytes_before: u64,
    bytes_after: u64,
    target_bpw: Option<f64>,
    bpw: f64,
    coded_bpw: f64,
    entropy_bits: f64,
    overhead_bits: f64,
    passes: usize,
    measure_seconds: f64,
    solve_seconds: f64,
    quantize_seconds: f64,
    encode_seconds: f64,
    write_seconds: f64,
    seconds: f64,
    weights_per_second: f64,
    threads: usize,
    peak_rss_bytes: u64,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let _graceful = interrupt::graceful();
    let report = quantize(&args.options, &mut Terminal::default())?;
    if args.json { output::json(&report) } else { output::text(&render(&report)) }
}

/// Quantizes and encodes a checkpoint.
///
/// # Errors
/// Options that do not fit each other, a checkpoint that cannot be quantized, files, or what the observer says.
pub fn quantize(options: &Options, observer: &mut dyn Observer) -> Result<Report> {
    let scheme = scheme(options)?;
    with_threads(options.threads, || quantize_dir(options, scheme, observer))
}

fn quantize_dir(args: &Options, scheme: Scheme, observer: &mut dyn Observer) -> Result<Report> {
    let start = Instant::now();
    let source = Source::open(&args.source)?;
    // Made before the long first pass, so that an output that is in the way is told at once.
    let mut writer = convert::create(&args.source, &args.output, args.force, observer)?;

    let wanted = args.bpw.unwrap_or(BPW_DEFAULT);
    let mut target = wanted;
    // Targets whose results were too small and too large: a codec that changes its way of coding near the target leaps over it from both.
    let (mut too_small, mut too_large) = (None, None);
    let (mut measure, mut solve) = (Duration::ZERO, Duration::ZERO);
    let mut passes = 0;
    let written = loop {
        passes += 1;
        let plans = if scheme == Scheme::Ecsq {
            let start = Instant::now();
            // Not kept for a further pass, which is rare: together they may take more memory than a tensor.
            let models = source.measure(observer)?;
            measure += start.elapsed();
            let start = Instant::now();
            let plans = source.solve(&models, args.codec, target)?;
            solve += start.elapsed();
            plans
        } else {
            vec![plan(scheme); source.linears.len()]
        };
        let written = source.write(&mut writer, &plans, args.codec, observer)?;
        let miss = written.bpw() - wanted;
        // Before the last pass, which takes the target that gave too little: that is what this one found.
        let found_less = miss < 0.0 && too_large.is_some() && passes + 1 == PASSES_MAX;
        if scheme != Scheme::Ecsq || miss.abs() <= MISS_MAX * wanted || passes == PASSES_MAX || found_less {
            break written;
        }
        *if miss < 0.0 { &mut too_small } else { &mut too_large } = Some(target);
        target = match (too_small, too_large) {
            // Less than was asked for rather than more.
            (Some(low), Some(_)) if passes + 1 == PASSES_MAX => low,
            (Some(low), Some(high)) => (low + high) / 2.0,
            _ => target - miss,
        };
        drop(writer);
        writer = convert::create(&args.source, &args.output, args.force, observer)?;
    };
    let finish = Instant::now();
    let config = source.config_with(scheme, args.codec, &written);
    convert::finish(writer, &source.dir, config, observer)?;

    let seconds = start.elapsed().as_secs_f64();
    Ok(Report {
        source: args.source.display().to_string(),
        output: args.output.display().to_string(),
        model_type: source.model_type().to_owned(),
        scheme: scheme.to_string(),
        codec: args.codec.to_string(),
        weights: written.weights,
        coded_tensors: source.linears.len(),
        raw_tensors: source.raw.len(),
        bytes_before: source.dir.file_bytes(),
        bytes_after: ModelDir::open(&args.output)?.file_bytes(),
        target_bpw: (scheme == Scheme::Ecsq).then_some(wanted),
        bpw: written.bpw(),
        coded_bpw: written.coded_bpw(),
        entropy_bits: written.entropy_bits(),
        overhead_bits: written.coded_bpw() - written.entropy_bits(),
        passes,
        measure_seconds: measure.as_secs_f64(),
        solve_seconds: solve.as_secs_f64(),
        quantize_seconds: written.quantize.as_secs_f64(),
        encode_seconds: written.encode.as_secs_f64(),
        write_seconds: (written.write + finish.elapsed()).as_secs_f64(),
        seconds,
        weights_per_second: written.weights as f64 / seconds,
        threads: rayon::current_num_threads(),
        peak_rss_bytes: machine::peak_rss_bytes(),
    })
}

/// The scheme with its options, which must fit it.
fn scheme(args: &Options) -> Result<Scheme> {
    if args.bpw.is_some() && args.scheme != Scheme::Ecsq {
        let text = format!("--bpw is for --scheme ecsq; the size of {} is what it is", args.scheme);
        return Err(Usage(text).into());
    }
    match (args.scheme, args.group_size) {
        (scheme, None) => Ok(scheme),
        (Scheme::Affine4 { .. }, Some(group_size)) => Ok(Scheme::Affine4 { group_size }),
        (scheme, Some(_)) => Err(Usage(format!("--group-size is for --scheme affine4, not {scheme}")).into()),
    }
}

/// A group size that `affine4` knows.
fn group_size(text: &str) -> Result<u32, String> {
    match text {
        "32" => Ok(32),
        "64" => Ok(64),
        "128" => Ok(128),
        _ => Err("possible values: 32, 64, 128".to_owned()),
    }
}

/// The plan of a scheme without rate control.
fn plan(scheme: Scheme) -> Plan {
    match scheme {
        Scheme::Affine4 { group_size } => Plan::Affine4 { group_size },
        Scheme::Q4_0 => Plan::Q4_0,
        Scheme::Int4Row => Plan::Int4Row,
        Scheme::Int4Tensor => Plan::Int4Tensor,
        other => unreachable!("{other} has rate control"),
    }
}

/// A checkpoint: what is coded and what stays.
struct Source {
    dir: ModelDir,
    linears: Vec<LinearInfo>,
    /// Names of the tensors stored as they are.
    raw: Vec<String>,
}

impl Source {
    fn open(path: &Path) -> Result<Self> {
        let dir = ModelDir::open(path)?;
        if dir.is_tersor() {
            bail!("{}: already a Tersor directory; quantize the original checkpoint", path.display());
        }
        if MlxDir::new(&dir).is_some() {
            bail!("{}: quantized by MLX already; `tersor encode` codes it without loss", path.display());
        }
        let config = Config::from_json(path, dir.config(), None)?;
        let linears = names::linears(&config);
        for linear in &linears {
            let Tensor::Raw(raw) = dir.require(&linear.name)? else {
                bail!("{}: tensor {} is already coded", path.display(), linear.name);
            };
            if raw.shape() != [linear.rows, linear.cols] {
                bail!(
                    "{}: tensor {}: shape {:?}, the configuration asks for [{}, {}]",
                    path.display(),
                    linear.name,
                    raw.shape(),
                    linear.rows,
                    linear.cols
                );
            }
            if raw.as_rows().is_none() {
                bail!("{}: tensor {}: dtype {} cannot be quantized (F32, F16 and BF16 can)", path.display(), linear.name, raw.dtype());
            }
        }
        // A tied head may be stored a second time; the model never reads it.
        let goes = |name: &str| linears.iter().any(|linear| linear.name == name) || (config.tied && name == "lm_head.weight");
        let raw = dir.tensors().map(|(name, _)| name.to_owned()).filter(|name| !goes(name)).collect();
        Ok(Self { dir, linears, raw })
    }

    fn model_type(&self) -> &str {
        self.dir.config().get("model_type").and_then(|t| t.as_str()).unwrap_or("unknown")
    }

    fn raw_tensor(&self, name: &str) -> Result<&RawTensor> {
        match self.dir.require(name)? {
            Tensor::Raw(raw) => Ok(raw),
            _ => bail!("{}: tensor {name} is already coded", self.dir.path().display()),
        }
    }

    fn rows(&self, linear: &LinearInfo) -> Result<RawRows<'_>> {
        self.raw_tensor(&linear.name)?.as_rows().context("a checked tensor is a float matrix")
    }

    /// Adds to an error what it is about.
    fn named(&self, name: &str) -> String {
        format!("{}: tensor {name}", self.dir.path().display())
    }

    fn coded_weights(&self) -> u64 {
        self.linears.iter().map(weights_of).sum()
    }

    /// The first pass.
    fn measure(&self, observer: &mut dyn Observer) -> Result<Vec<RateModel>> {
        observer.begin("measure", self.coded_weights());
        let mut models = Vec::with_capacity(self.linears.len());
        for linear in &self.linears {
            observer.at(&linear.name)?;
            let model = RateModel::measure(&self.rows(linear)?).with_context(|| self.named(&linear.name))?;
            models.push(model);
            self.dir.release(&linear.name);
            observer.add(weights_of(linear));
        }
        Ok(models)
    }

    /// The plan of every linear that together meet `bpw`.
    fn solve(&self, models: &[RateModel], codec: Codec, bpw: f64) -> Result<Vec<Plan>> {
        let tensors: Vec<RateTensor<'_>> =
            self.linears.iter().zip(models).map(|(linear, model)| RateTensor::recommended(model, Role::of_name(&linear.name))).collect();
        let side: f64 = self.linears.iter().map(|linear| side_bits(codec, linear)).sum();
        let (mut raw_bits, mut raw_weights) = (0.0, 0.0);
        for name in &self.raw {
            let raw = self.raw_tensor(name)?;
            raw_bits += raw.bytes().len() as f64 * 8.0;
            raw_weights += raw.len() as f64;
        }
        let target = RateTarget { bpw, fixed_bits: side + raw_bits, fixed_weights: raw_weights, rounding: DEFAULT_ROUNDING };
        let failure = Mutex::new(None);
        let cost = |tensor: usize, counts: &SymbolCounts| {
            coded_bits(codec, counts, &self.linears[tensor]).unwrap_or_else(|error| {
                *failure.lock().expect("no holder panics") = Some((tensor, error));
                f64::INFINITY
            })
        };
        let solution = solve_step(&tensors, &target, &cost);
        if let Some((tensor, error)) = failure.into_inner().expect("no holder panics") {
            return Err(anyhow::Error::new(error).context(format!("codec {codec}")))
                .with_context(|| self.named(&self.linears[tensor].name));
        }
        let solution = solution.with_context(|| self.dir.path().display().to_string())?;
        Ok(solution.params.into_iter().map(Plan::Ecsq).collect())
    }

    /// The second pass.
    fn write(&self, writer: &mut DirWriter, plans: &[Plan], codec: Codec, observer: &mut dyn Observer) -> Result<Written> {
        observer.begin("encode", self.coded_weights());
        let mut written = Written::default();
        for (linear, plan) in self.linears.iter().zip(plans) {
            writer.expect_coded(&linear.name, matches!(plan, Plan::Affine4 { .. }));
        }
        for name in &self.raw {
            writer.expect_raw(name);
        }
        for (linear, plan) in self.linears.iter().zip(plans) {
            observer.at(&linear.name)?;
            let start = Instant::now();
            let tensor = tersor_quant::quantize(plan, &self.rows(linear)?).with_context(|| self.named(&linear.name))?;
            self.dir.release(&linear.name);
            let mut histogram = Histogram::new();
            histogram.add(&tensor.symbols);
            let quantized = Instant::now();
            let encoded = encode_tensor(&tensor, codec, CHUNK_SYMBOLS_TARGET).with_context(|| self.named(&linear.name))?;
            drop(tensor);
            let coded = Instant::now();
            writer.write_coded(&linear.name, &encoded)?;
            let weights = weights_of(linear);
            let bytes = encoded.tensor().coded_bytes() + encoded.tensor().scales().bytes();
            written.add_coded(weights, bytes, histogram.entropy_bits());
            written.quantize += quantized - start;
            written.encode += coded - quantized;
            written.write += coded.elapsed();
            observer.add(weights);
        }
        for name in &self.raw {
            observer.at(name)?;
            let start = Instant::now();
            written.add_raw(writer, name, self.raw_tensor(name)?)?;
            self.dir.release(name);
            written.write += start.elapsed();
        }
        Ok(written)
    }

    fn config_with(&self, scheme: Scheme, codec: Codec, written: &Written) -> serde_json::Value {
        let mut config = self.dir.config().clone();
        config["quantization_config"] = convert::quantization_config(&scheme.to_string(), codec, written);
        config
    }
}

fn weights_of(linear: &LinearInfo) -> u64 {
    linear.rows as u64 * linear.cols as u64
}

/// Symbols that a tensor is padded with.
fn padding_symbols(linear: &LinearInfo) -> u64 {
    let padded = linear.rows.next_multiple_of(TILE_ROWS) * linear.cols.next_multiple_of(TILE_COLS);
    padded as u64 - weights_of(linear)
}

/// Expected bits of codes, escapes and table for expected symbol counts.
fn coded_bits(codec: Codec, counts: &SymbolCounts, linear: &LinearInfo) -> Result<f64, tersor_codec::TableError> {
    let padding = padding_symbols(linear) as f64;
    let total = counts.total() + padding;
    let histogram = histogram(counts, padding, total);
    let table = tersor_codec::Table::build(codec, &histogram)?;
    let mut bytes = Vec::new();
    table.write(&mut bytes);
    // The histogram is a model of the tensor, not as large as it.
    let payload = table.payload_bits(&histogram) * total / histogram.total().max(1) as f64;
    Ok(payload + bytes.len() as f64 * 8.0)
}

/// Symbols in a histogram of expected counts: enough that what is rounded away is far below the accuracy that is promised.
const HISTOGRAM_SYMBOLS: f64 = 65_536.0;

/// Expected counts, and `padding` zeros, as a histogram of about [`HISTOGRAM_SYMBOLS`] symbols.
fn histogram(counts: &SymbolCounts, padding: f64, total: f64) -> Histogram {
    let scale = (HISTOGRAM_SYMBOLS / total).min(1.0);
    let mut histogram = Histogram::new();
    let run = |symbol: i16| [symbol; 256];
    let mut add = |symbol: i16, count: usize| {
        let symbols = run(symbol);
        for _ in 0..count / symbols.len() {
            histogram.add(&symbols);
        }
        histogram.add(&symbols[..count % symbols.len()]);
    };
    add(0, (padding * scale).round() as usize);
    // The fraction that rounding leaves is carried on, so that a long thin tail keeps its mass.
    let mut carry = 0.0;
    for &(symbol, count) in &counts.counts {
        let exact = count * scale + carry;
        let whole = exact.round().max(0.0);
        carry = exact - whole;
        add(symbol, whole as usize);
    }
    histogram
}

/// Expected bits that do not depend on the symbols: header, chunk index, what chunks hold beside their codes, padding.
fn side_bits(codec: Codec, linear: &LinearInfo) -> f64 {
    let steps = linear.cols.div_ceil(TILE_COLS);
    let row_tiles = linear.rows.div_ceil(TILE_ROWS);
    let per_chunk = (CHUNK_SYMBOLS_TARGET as usize / (steps * TILE_SYMBOLS)).max(1);
    let chunks = row_tiles.div_ceil(per_chunk) as f64;
    let chunk_symbols = (per_chunk.min(row_tiles) * steps * TILE_SYMBOLS) as f64;
    let chunk_bits = match codec {
        // A final state is spread over word_bits of its range, so it carries half of them on average.
        Codec::Rans(p) => 64.0 + f64::from(p.lanes) * (f64::from(p.state_bits) - f64::from(p.word_bits) / 2.0),
        // 32 bits of length and half a byte at the end of every lane.
        Codec::Huffman(p) => 64.0 + f64::from(p.lanes) * 36.0,
        Codec::BlockAns(p) => {
            let blocks = (chunk_symbols / f64::from(p.block_symbols)).ceil();
            32.0 + blocks * (16.0 + f64::from(p.state_bits) - f64::from(p.word_bits) / 2.0)
        }
        // Three more counts, and on average half of the last line of two tiers.
        Codec::Tiered => 64.0 + 32.0 + 2.0 * (32.0 + 256.0),
        // As for `rans`, and one more count. Chunks of 64 Ki symbols fill their raw lines.
        Codec::RansPairs => 64.0 + 32.0 + rans_pairs::LANES as f64 * 12.0,
        _ => 64.0,
    };
    // Chunks start at multiples of 16 bytes: 7.5 bytes are lost on average. The blob ends with 64 to 128 zeros.
    let index_and_gap = 8.0 * (tersor_format::INDEX_ENTRY_BYTES as f64 + 7.5);
    8.0 * (tersor_format::HEADER_BYTES as f64 + 8.0 + 96.0) + chunks * (index_and_gap + chunk_bits)
}

fn render(report: &Report) -> String {
    let mut table = Table::new(&["", ">"]);
    let mut row = |name: &str, value: String| table.row([name.to_owned(), value]);
    row("before", units::bytes(report.bytes_before));
    row("after", units::bytes(report.bytes_after));
    row("ratio", format!("{:.2}x", report.bytes_before as f64 / report.bytes_after.max(1) as f64));
    row("weights", units::count(report.weights as f64));
    match report.target_bpw {
        Some(target) => row("bits per weight", format!("{:.3} (asked {target})", report.bpw)),
        None => row("bits per weight", format!("{:.3}", report.bpw)),
    }
    row("entropy", format!("{:.3}", report.entropy_bits));
    let percent = report.overhead_bits / report.entropy_bits.max(f64::MIN_POSITIVE) * 100.0;
    row("overhead", format!("{:.3} ({percent:.1} %)", report.overhead_bits));
    row("scheme", report.scheme.clone());
    row("codec", report.codec.clone());
    row("time", units::seconds(report.seconds));
    row("weights/s", units::count(report.weights_per_second));
    let encoded = report.weights as f64 / report.encode_seconds.max(1e-9);
    row("of it encoding", format!("{}, {}/s", units::seconds(report.encode_seconds), units::count(encoded)));
    let mut text = table.render();
    if let Some(target) = report.target_bpw.filter(|target| (report.bpw / target - 1.0).abs() > 0.005) {
        text += &format!(
            "\nThe target of {target} bpw is missed by {:+.3}: no result was nearer, as sizes of small models and of tables come in steps.\n",
            report.bpw - target
        );
    }
    text += &format!(
        "\nnext:  tersor generate {0} --prompt TEXT\n       tersor eval {0} --text FILE --reference {1}    (what the size costs in quality)\n",
        report.output, report.source
    );
    text
}
