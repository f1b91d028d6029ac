//! `tersor generate`: continue a text.

use std::path::PathBuf;

use anyhow::{Result, bail};
use serde::Serialize;
use tersor_runtime::device::Device;
use tersor_runtime::generate::session::{Options, Session, Stop};
use tersor_runtime::generate::tokenizer::Tokenizer;
use tersor_runtime::model::weights::ResidencyReport;
use tersor_runtime::residency::{Plan, PlanRow};

use crate::engine::{EngineArgs, Opened, Setup};
use crate::interrupt::{self, Interrupted};
use crate::machine;
use crate::output::table::Table;
use crate::output::{self, units};
use crate::sampling::{SamplingArgs, stream, usage_if_sampling};

/// Continue a text
///
/// The prompt and its continuation go to stdout as they are made, figures to stderr. DIR may also be an unquantized Hugging Face directory. Greedy unless --temp
/// is given; equal options give equal tokens, whatever the strategy and the number of threads.
#[derive(clap::Args)]
pub struct Args {
    /// Model directory
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Text to continue
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// Tokens to generate at most
    #[arg(short = 'n', long = "tokens", value_name = "N", default_value_t = 128)]
    tokens: usize,
    /// Positions of the KV cache: prompt and generated tokens [default: as many as needed]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    engine: EngineArgs,
    /// Say on stderr what the strategy holds where, and why
    #[arg(long)]
    explain: bool,
    /// Print one JSON document instead of the text
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    text: String,
    tokens: Vec<u32>,
    prompt_tokens: usize,
    stop: &'static str,
    strategy: String,
    strategy_detail: String,
    device: Device,
    level: String,
    threads: usize,
    context: usize,
    load_seconds: f64,
    prefill_tokens_per_second: f64,
    step_tokens_per_second: f64,
    resident_weight_bytes: u64,
    peak_rss_bytes: u64,
    hits: u64,
    misses: u64,
    /// Decoded bytes that were multiplied without being decoded for it, of all; `null` where nothing is coded.
    hit_rate: Option<f64>,
    decode_hidden_seconds: f64,
    decode_exposed_seconds: f64,
    logits_hash: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    explain: Option<Explanation>,
}

#[derive(Serialize)]
struct Explanation {
    total_bytes: u64,
    weight_bytes: u64,
    step_seconds: f64,
    groups: Vec<Group>,
}

#[derive(Serialize)]
struct Group {
    group: String,
    tensors: usize,
    choice: String,
    bytes: u64,
    step_seconds: f64,
    slice_seconds: f64,
    reason: String,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    if args.prompt.is_empty() {
        bail!("the prompt is empty: there is nothing to continue");
    }
    let setup = Setup::new(&args.engine)?;
    let opened = Opened::new(&args.directory)?;
    let tokenizer = Tokenizer::load(&args.directory)?;
    let prompt = tokenizer.encode(&args.prompt)?;
    let context = opened.context(args.context, prompt.len().saturating_add(args.tokens))?;
    let sampling = args.sampling.sampling(opened.model.config().repetition_penalty);
    let options = Options { tokens_max: args.tokens, context, sampling, ignore_eos: false };
    // Checks the prompt and the sampler's options before the weights are loaded.
    options.check(&prompt).map_err(usage_if_sampling)?;
    let plan = if args.explain { opened.explain(&setup, context)? } else { None };
    if args.explain {
        eprint!("{}", explain(plan.as_ref()));
    }
    let mut engine = opened.load(&setup, context, false)?;
    let mut session = Session::new(engine.runner.as_ref(), &prompt, &options)?;
    if !args.json {
        session = session.without_hash();
    }

    let _graceful = interrupt::graceful();
    if !args.json {
        output::text(&args.prompt)?;
    }
    let (text, generation) = stream(engine.runner.as_mut(), &mut session, tokenizer.detokenizer(&prompt), !args.json)?;
    if generation.stop == Stop::Interrupted {
        return Err(Interrupted.into());
    }
    let report = engine.runner.report();
    let hit_rate = hit_rate(&report);
    let report = Report {
        text,
        tokens: session.generated().to_vec(),
        prompt_tokens: prompt.len(),
        stop: match generation.stop {
            Stop::Eos => "eos",
            Stop::Length => "length",
            Stop::ContextFull => "context",
            Stop::Interrupted => "interrupted",
        },
        strategy: report.strategy,
        strategy_detail: report.detail,
        device: setup.device(),
        level: setup.level().to_string(),
        threads: setup.threads,
        context,
        load_seconds: engine.load_seconds,
        prefill_tokens_per_second: generation.prefill_tokens_per_second(),
        step_tokens_per_second: generation.step_tokens_per_second(),
        resident_weight_bytes: report.resident_bytes,
        peak_rss_bytes: machine::peak_rss_bytes(),
        hits: report.hits,
        misses: report.misses,
        hit_rate,
        decode_hidden_seconds: report.decode_hidden_ns as f64 / 1e9,
        decode_exposed_seconds: report.decode_exposed_ns as f64 / 1e9,
        logits_hash: session.logits_hash().map_or_else(String::new, |hash| format!("{hash:016x}")),
        explain: plan.as_ref().map(explanation),
    };
    if args.json {
        return output::json(&report);
    }
    let hits = report.hit_rate.map_or(String::new(), |rate| format!(" ({:.0} % of bytes held decoded)", 100.0 * rate));
    eprintln!(
        "{} prompt tokens at {}/s; {} tokens at {}/s ({}); {}{hits}; weights {}, peak {}; loaded in {}",
        report.prompt_tokens,
        units::digits3(report.prefill_tokens_per_second),
        report.tokens.len(),
        units::digits3(report.step_tokens_per_second),
        report.stop,
        report.strategy,
        units::bytes(report.resident_weight_bytes),
        units::bytes(report.peak_rss_bytes),
        units::seconds(report.load_seconds)
    );
    Ok(())
}

/// By bytes, since a strategy that holds half of the bytes may hold most of the matrices.
fn hit_rate(report: &ResidencyReport) -> Option<f64> {
    let used = report.hit_bytes + report.miss_bytes;
    (used > 0).then(|| report.hit_bytes as f64 / used as f64)
}

fn explanation(plan: &Plan) -> Explanation {
    let group = |row: &PlanRow| Group {
        group: row.group.to_owned(),
        tensors: row.tensors,
        choice: row.choice.to_string(),
        bytes: row.bytes,
        step_seconds: row.step_seconds,
        slice_seconds: row.slice_seconds,
        reason: row.reason.clone(),
    };
    Explanation {
        total_bytes: plan.footprint.total_bytes(),
        weight_bytes: plan.footprint.weight_bytes(),
        step_seconds: plan.step_seconds(),
        groups: plan.rows.iter().map(group).collect(),
    }
}

fn explain(plan: Option<&Plan>) -> String {
    let Some(plan) = plan else {
        return "dense: the directory is not quantized; its weights are used where they lie\n".to_owned();
    };
    let mut table = Table::new(&["matrices", ">count", "held", ">bytes", ">step", ">256 tokens", "because"]);
    for row in &plan.rows {
        table.row([
            row.group.to_owned(),
            row.tensors.to_string(),
            row.choice.to_string(),
            units::bytes(row.bytes),
            units::seconds(row.step_seconds),
            units::seconds(row.slice_seconds),
            row.reason.clone(),
        ]);
    }
    format!(
        "{}: {} in all ({}); predicted {} a token\n{}",
        plan.strategy,
        units::bytes(plan.footprint.total_bytes()),
        plan.footprint,
        units::seconds(plan.step_seconds()),
        table.render()
    )
}
