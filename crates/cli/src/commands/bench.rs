//! `tersor bench`: prefill and step rates of every strategy, in one run on one machine.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tersor_runtime::device::{self, Device};
use tersor_runtime::generate::sampler::Sampling;
use tersor_runtime::generate::session::{self, Generation, Options, Session, Stop};
use tersor_runtime::model::weights::Span;
use tersor_runtime::residency::Strategy;

use crate::engine::{Engine, LimitArgs, Opened, Setup};
use crate::interrupt::{self, Interrupted};
use crate::machine;
use crate::options::{Usage, default_threads, thread_count};
use crate::output::table::Table;
use crate::output::{self, units};
use crate::progress::Progress;

/// Prompt and generated tokens unless the user says otherwise, as far as the context allows.
const LENGTHS_DEFAULT: (usize, usize) = (512, 128);

/// Measure prefill and step rates of strategies and thread counts
///
/// Every run continues the same prompt of pseudo-random tokens greedily. Figures are medians over --repeat runs after one to warm up; they
/// are printed only if all runs, whatever their strategy and threads, computed bit-identical logits.
#[derive(clap::Args)]
pub struct Args {
    /// Model directory
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Strategies (auto, fused, cached, prefetch, lru; on a GPU also gpu-async), or all of the device
    #[arg(long, value_name = "S,S", value_delimiter = ',', default_value = "auto")]
    strategy: Vec<String>,
    /// Tokens of the prompt [default: 512, less for models of a short context]
    #[arg(short = 'p', long = "prompt-tokens", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    prompt_tokens: Option<u32>,
    /// Tokens to generate [default: 128, less for models of a short context]
    #[arg(short = 'n', long = "tokens", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    tokens: Option<u32>,
    /// Thread counts [default: all cores]
    #[arg(long, value_name = "N,N", value_delimiter = ',', value_parser = thread_count)]
    threads: Vec<usize>,
    /// Timed runs, of which the median counts
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeat: u32,
    /// Also print when layers are decoded or copied and when they are computed with, in the last pass: gpu-async and prefetch on a GPU, alone. Slower
    #[arg(long)]
    timeline: bool,
    #[command(flatten)]
    limits: LimitArgs,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Serialize, Deserialize)]
struct Report {
    machine: Machine,
    prompt_tokens: usize,
    tokens: usize,
    repeat: u32,
    logits_hash: String,
    runs: Vec<Run>,
}

#[derive(Serialize, Deserialize)]
struct Machine {
    cpu: String,
    level: String,
    cores: usize,
    memory_bytes: u64,
    /// The maker's name of the GPU, where one is measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct Run {
    strategy: String,
    strategy_detail: String,
    device: String,
    threads: usize,
    load_seconds: f64,
    prefill_tokens_per_second: f64,
    step_tokens_per_second: f64,
    resident_weight_bytes: u64,
    peak_rss_bytes: u64,
    /// Part of the time that went into decoding and was not hidden behind other work.
    decode_fraction: f64,
    /// Part of the decoded bytes that were found decoded; `null` where nothing is ever looked up.
    hit_fraction: Option<f64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    timeline: Vec<Span>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let strategies = strategies(&args.strategy, args.limits.device)?;
    let threads = if args.threads.is_empty() { vec![default_threads()] } else { args.threads.clone() };
    let (prompt_tokens, tokens) = lengths(args)?;
    if args.timeline && (strategies.len(), threads.len()) != (1, 1) {
        return Err(Usage("--timeline: for one strategy and one number of threads".to_owned()).into());
    }
    let combinations: Vec<(Strategy, usize)> =
        strategies.iter().flat_map(|&strategy| threads.iter().map(move |&count| (strategy, count))).collect();
    let _graceful = interrupt::graceful();
    let report = match combinations[..] {
        [(strategy, count)] => alone(args, strategy, count, prompt_tokens, tokens)?,
        _ => together(args, &combinations, prompt_tokens, tokens)?,
    };
    if args.json { output::json(&report) } else { output::text(&render(&report)) }
}

/// One strategy with one number of threads, in this process.
fn alone(args: &Args, strategy: Strategy, threads: usize, prompt_tokens: usize, tokens: usize) -> Result<Report> {
    let progress = Progress::new("bench", u64::from(args.repeat + 1));
    progress.message(&format!("{strategy}, {threads} threads"));
    let mut setup = Setup::of(strategy, &args.limits, threads)?;
    setup.timeline = args.timeline;
    let (run, hash) = measure(args, &setup, prompt_tokens, tokens, &progress)?;
    let machine = Machine {
        cpu: machine::cpu_name(),
        level: setup.level().to_string(),
        cores: default_threads(),
        memory_bytes: machine::memory_bytes(),
        device: match setup.device() {
            Device::Cuda(index) => Some(device::info(index)?.name),
            _ => None,
        },
    };
    Ok(Report { machine, prompt_tokens, tokens, repeat: args.repeat, logits_hash: format!("{hash:016x}"), runs: vec![run] })
}

/// Several, each in a process of its own: memory that an allocator keeps of one run would count as the next one's.
fn together(args: &Args, combinations: &[(Strategy, usize)], prompt_tokens: usize, tokens: usize) -> Result<Report> {
    let progress = Progress::new("bench", combinations.len() as u64);
    let mut all: Option<(Report, String)> = None;
    for &(strategy, threads) in combinations {
        let name = format!("{strategy}, {threads} threads");
        progress.message(&name);
        let report = in_child(args, strategy, threads, prompt_tokens, tokens)?;
        progress.add(1);
        match &mut all {
            None => all = Some((report, name)),
            Some((all, first)) => {
                ensure!(
                    report.logits_hash == all.logits_hash,
                    "{}: logits of {name} ({}) differ from those of {first} ({}); timings of wrong answers are not shown",
                    args.directory.display(),
                    report.logits_hash,
                    all.logits_hash
                );
                all.runs.extend(report.runs);
            }
        }
    }
    all.map(|(report, _)| report).context("no strategy to measure")
}

fn in_child(args: &Args, strategy: Strategy, threads: usize, prompt_tokens: usize, tokens: usize) -> Result<Report> {
    let limits = &args.limits;
    let mut command = Command::new(std::env::current_exe().context("this program's own file")?);
    command.arg("bench").arg(&args.directory).arg("--json");
    let mut option = |name: &str, value: &dyn std::fmt::Display| {
        command.arg(format!("{name}={value}"));
    };
    option("--strategy", &strategy);
    option("--threads", &threads);
    option("--prompt-tokens", &prompt_tokens);
    option("--tokens", &tokens);
    option("--repeat", &args.repeat);
    option("--lru-policy", &limits.lru_policy);
    option("--device", &limits.device);
    if let Some(budget) = limits.memory_budget {
        option("--memory-budget", &budget.0);
    }
    if let Some(level) = limits.level {
        option("--level", &level);
    }
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // What it prints fits the pipes, so that nobody need read before it ends.
    while child.try_wait()?.is_none() {
        if interrupt::requested() {
            let _ = child.kill();
            let _ = child.wait();
            return Err(Interrupted.into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let line = String::from_utf8_lossy(&output.stderr);
        let cause = line.trim().strip_prefix("error: ").unwrap_or(line.trim()).to_owned();
        bail!("{strategy}, {threads} threads: {}", if cause.is_empty() { output.status.to_string() } else { cause });
    }
    serde_json::from_slice(&output.stdout).context("the report of a run")
}

fn strategies(names: &[String], device: Device) -> Result<Vec<Strategy>> {
    if names.iter().any(|name| name == "all") {
        return Ok(device.strategies().to_vec());
    }
    names.iter().map(|name| name.parse().map_err(|error| Usage(format!("--strategy: {error}")).into())).collect()
}

/// Prompt and generated tokens: the defaults are scaled down to the model's context, what the user asks for must fit.
fn lengths(args: &Args) -> Result<(usize, usize)> {
    let most = Opened::new(&args.directory)?.model.config().context_max;
    let (prompt_default, tokens_default) = LENGTHS_DEFAULT;
    let (prompt_default, tokens_default) =
        if prompt_default + tokens_default <= most { LENGTHS_DEFAULT } else { ((most * 4 / 5).max(1), (most / 5).max(1)) };
    let prompt = args.prompt_tokens.map_or(prompt_default, |n| n as usize);
    let tokens = args.tokens.map_or(tokens_default, |n| n as usize);
    ensure!(
        prompt + tokens <= most,
        Usage(format!("{prompt} prompt tokens and {tokens} more do not fit the context of {most}; give smaller -p and -n"))
    );
    Ok((prompt, tokens))
}

fn measure(args: &Args, setup: &Setup, prompt_tokens: usize, tokens: usize, progress: &Progress) -> Result<(Run, u64)> {
    let opened = Opened::new(&args.directory)?;
    let context = opened.context(None, prompt_tokens + tokens)?;
    let mut engine = opened.load(setup, context, true)?;
    let prompt = prompt(prompt_tokens, engine.runner.config().vocab);
    // Not timed: the logits are hashed.
    let first = generate(&mut engine, &prompt, tokens, true)?;
    let hash = first.logits_hash.expect("they were hashed");
    progress.add(1);

    let before = engine.runner.report();
    let (mut prefill, mut step) = (Vec::new(), Vec::new());
    let mut time = Duration::ZERO;
    for _ in 0..args.repeat {
        let Generated { generation, tokens: chosen, .. } = generate(&mut engine, &prompt, tokens, false)?;
        ensure!(chosen == first.tokens, "two equal runs gave different tokens");
        prefill.push(generation.prefill_tokens_per_second());
        step.push(generation.step_tokens_per_second());
        time += generation.prefill + generation.steps;
        progress.add(1);
    }
    let after = engine.runner.report();
    let decode_ns = (after.decode_exposed_ns - before.decode_exposed_ns) + (after.decode_fused_ns - before.decode_fused_ns);
    let (hit, miss) = (after.hit_bytes - before.hit_bytes, after.miss_bytes - before.miss_bytes);
    let run = Run {
        strategy: after.strategy,
        strategy_detail: after.detail,
        device: setup.device().to_string(),
        threads: setup.threads,
        load_seconds: engine.load_seconds,
        prefill_tokens_per_second: median(prefill),
        step_tokens_per_second: median(step),
        resident_weight_bytes: after.resident_bytes,
        peak_rss_bytes: machine::peak_rss_bytes(),
        decode_fraction: decode_ns as f64 / (time.as_nanos() as f64).max(1.0),
        hit_fraction: (hit + miss > 0).then(|| hit as f64 / (hit + miss) as f64),
        timeline: after.timeline,
    };
    Ok((run, hash))
}

struct Generated {
    generation: Generation,
    tokens: Vec<u32>,
    logits_hash: Option<u64>,
}

fn generate(engine: &mut Engine, prompt: &[u32], tokens: usize, hashed: bool) -> Result<Generated> {
    let options = Options { tokens_max: tokens, context: engine.context, sampling: Sampling::default(), ignore_eos: true };
    let mut session = Session::new(engine.runner.as_ref(), prompt, &options)?;
    if !hashed {
        session = session.without_hash();
    }
    let generation = session::generate(engine.runner.as_mut(), &mut session, interrupt::flag(), &mut |_| {})?;
    if generation.stop == Stop::Interrupted {
        return Err(Interrupted.into());
    }
    Ok(Generated { generation, tokens: session.generated().to_vec(), logits_hash: session.logits_hash() })
}

/// The same tokens on every machine, spread over the vocabulary.
fn prompt(tokens: usize, vocab: usize) -> Vec<u32> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = || {
        // xorshift64 (Marsaglia 2003)
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (((state >> 32) * vocab as u64) >> 32) as u32
    };
    (0..tokens).map(|_| next()).collect()
}

/// The middle value, or the mean of the two in the middle.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) }
}

fn render(report: &Report) -> String {
    let mut text = format!(
        "{}{}, {} cores, {}; {} prompt tokens, {} generated; medians of {}; all logits equal ({})\n\n",
        report.machine.device.as_ref().map_or(String::new(), |name| format!("{name}; ")),
        report.machine.cpu,
        report.machine.cores,
        report.machine.level,
        report.prompt_tokens,
        report.tokens,
        report.repeat,
        report.logits_hash
    );
    let mut table = Table::new(&[
        "strategy",
        ">threads",
        ">load",
        ">prefill tok/s",
        ">step tok/s",
        ">weights",
        ">peak RSS",
        ">decoding",
        ">hits",
        "detail",
    ]);
    for run in &report.runs {
        table.row([
            run.strategy.clone(),
            run.threads.to_string(),
            units::seconds(run.load_seconds),
            units::digits3(run.prefill_tokens_per_second),
            units::digits3(run.step_tokens_per_second),
            units::bytes(run.resident_weight_bytes),
            units::bytes(run.peak_rss_bytes),
            format!("{:.0} %", run.decode_fraction * 100.0),
            run.hit_fraction.map_or("-".to_owned(), |part| format!("{:.0} %", part * 100.0)),
            run.strategy_detail.clone(),
        ]);
    }
    text += &table.render();
    for run in report.runs.iter().filter(|run| !run.timeline.is_empty()) {
        text += &timeline(&run.timeline);
    }
    text
}

/// The pieces of a pass in order, microseconds.
fn timeline(spans: &[Span]) -> String {
    let mut spans: Vec<&Span> = spans.iter().collect();
    spans.sort_by(|a, b| a.from_us.total_cmp(&b.from_us));
    let mut table = Table::new(&[">from µs", ">to µs", "computing with", "filling the buffer of"]);
    for span in spans {
        let (layer, none) = (format!("layer {}", span.layer), String::new());
        let (computing, filling) = if span.computing { (layer, none) } else { (none, layer) };
        table.row([format!("{:.0}", span.from_us), format!("{:.0}", span.until_us), computing, filling]);
    }
    format!("\n{}", table.render())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_stay_in_the_vocabulary_and_spread() {
        let prompt = prompt(1000, 10);
        for token in 0..10 {
            let count = prompt.iter().filter(|&&t| t == token).count();
            assert!((50..200).contains(&count), "{token}: {count}");
        }
    }

    #[test]
    fn medians() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
