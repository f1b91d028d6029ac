//! `tersor eval`: what a size costs in quality.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Serialize;
use tersor_cpu::Level;
use tersor_runtime::device::Device;
use tersor_runtime::eval::{self, EvalError};
use tersor_runtime::generate::tokenizer::Tokenizer;
use tersor_runtime::model::Runner;
use tersor_runtime::residency::Strategy;

use crate::engine::{Engine, EngineArgs, LimitArgs, Opened, Setup};
use crate::interrupt::{self, Interrupted};
use crate::output::table::Table;
use crate::output::{self, units};
use crate::progress::Progress;

/// Tokens of a window unless the user says otherwise.
const CONTEXT_DEFAULT: usize = 512;

/// Measure perplexity on a text, and the divergence from a reference model
///
/// The text is read in windows of --context tokens, each from an empty cache. With --reference both models read the same windows; KL is
/// KL(reference || DIR) in nats, over all predicted tokens.
#[derive(clap::Args)]
pub struct Args {
    /// Model directory: ours, or an unquantized Hugging Face one
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Text to predict
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Directory to compare with, normally the unquantized checkpoint
    #[arg(long, value_name = "HFDIR")]
    reference: Option<PathBuf>,
    /// Where the reference runs [default: as --device; an unquantized one runs on the CPU]
    #[arg(long, value_name = "D", requires = "reference")]
    reference_device: Option<Device>,
    /// Tokens of a window [default: 512, or the longest that the model was made for]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Use the first N tokens of the text [default: all]
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    #[command(flatten)]
    engine: EngineArgs,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    tokens: usize,
    predicted_tokens: usize,
    context: usize,
    perplexity: f64,
    nll: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    kl_mean: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kl_p99: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top1_agreement: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reference_perplexity: Option<f64>,
    strategy: String,
    weight_bytes: u64,
    bpw: f64,
    seconds: f64,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let setup = Setup::new(&args.engine)?;
    let opened = Opened::new(&args.directory)?;
    let context = opened.context(args.context, CONTEXT_DEFAULT)?;
    let (weight_bytes, bpw) = opened.size();
    let text = std::fs::read_to_string(&args.text).with_context(|| args.text.display().to_string())?;
    let mut tokens = Tokenizer::load(&args.directory)?.encode(&text)?;
    tokens.truncate(args.tokens.unwrap_or(usize::MAX));
    let mut engine = opened.load(&setup, context, false)?;
    let mut reference = args.reference.as_ref().map(|path| load_reference(path, args, context, setup.threads)).transpose()?;

    let _graceful = interrupt::graceful();
    let progress = Progress::new("eval", tokens.len() as u64);
    let start = std::time::Instant::now();
    let subject = engine.runner.as_mut();
    let against = reference.as_mut().map(|engine| engine.runner.as_mut() as &mut dyn Runner);
    let report = eval::evaluate(&tokens, context, subject, against, interrupt::flag(), &mut |read| progress.set(read as u64));
    let report = match report {
        Err(EvalError::Interrupted) => return Err(Interrupted.into()),
        other => other.with_context(|| args.text.display().to_string())?,
    };
    drop(progress);
    let divergence = report.divergence.as_ref();
    let report = Report {
        tokens: report.tokens,
        predicted_tokens: report.predicted,
        context,
        perplexity: report.perplexity,
        nll: report.nll,
        kl_mean: divergence.map(|d| d.kl_mean),
        kl_p99: divergence.map(|d| d.kl_p99),
        top1_agreement: divergence.map(|d| d.top1_agreement),
        reference_perplexity: divergence.map(|d| d.reference_perplexity),
        strategy: engine.runner.report().strategy,
        weight_bytes,
        bpw,
        seconds: start.elapsed().as_secs_f64(),
    };
    if args.json { output::json(&report) } else { output::text(&render(&report)) }
}

/// The reference has all the machine: no budget, whatever the level of the model under test. An unquantized one runs on the CPU.
fn load_reference(path: &std::path::Path, args: &Args, context: usize, threads: usize) -> Result<Engine> {
    let opened = Opened::new(path)?;
    let context = opened.context(Some(context), context)?;
    let device = args.reference_device.unwrap_or(if opened.is_coded() { args.engine.limits.device } else { Device::Cpu });
    let level = (device == Device::Cpu).then(Level::best);
    let limits = LimitArgs { memory_budget: None, level, device, ..args.engine.limits.clone() };
    opened.load(&Setup::of(Strategy::Auto, &limits, threads)?, context, false)
}

fn render(report: &Report) -> String {
    let mut table = Table::new(&["", ">"]);
    let mut row = |name: &str, value: String| table.row([name.to_owned(), value]);
    row("tokens", format!("{} ({} predicted, windows of {})", report.tokens, report.predicted_tokens, report.context));
    row("size", format!("{}, {:.3} bpw", units::bytes(report.weight_bytes), report.bpw));
    row("perplexity", format!("{:.4}", report.perplexity));
    row("nll", format!("{:.5}", report.nll));
    if let Some(perplexity) = report.reference_perplexity {
        row("reference perplexity", format!("{perplexity:.4}"));
    }
    if let (Some(mean), Some(p99), Some(top1)) = (report.kl_mean, report.kl_p99, report.top1_agreement) {
        row("KL mean", format!("{mean:.5}"));
        row("KL 99 %", format!("{p99:.4}"));
        row("same first choice", format!("{:.2} %", top1 * 100.0));
    }
    row("strategy", report.strategy.clone());
    row("time", units::seconds(report.seconds));
    table.render()
}
