//! `tersor inspect`: where the bits of a directory go.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;
use tersor_format::ModelDir;

use crate::account::{self, TensorAccount};
use crate::observer::{Observer, Terminal};
use crate::output::plot::{self, Point};
use crate::output::table::Table;
use crate::output::{self, units};

/// Show where the bits of a model go: every tensor's entropy, codes and side information
///
/// Every coded tensor is decoded to measure the entropy of its symbols. `code` counts the codes with their escapes; `side` counts scales,
/// tables, index, coder states, headers and padding; bpw = code + side.
#[derive(clap::Args)]
pub struct Args {
    /// Model directory
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    /// Also write a plot of bits per weight against entropy
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

/// Where the bits go.
#[derive(Serialize)]
pub struct Report {
    format_version: Option<u64>,
    model_type: Option<String>,
    scheme: Option<String>,
    weights: u64,
    bytes: u64,
    file_bytes: u64,
    bpw: f64,
    coded_weights: u64,
    coded_bpw: Option<f64>,
    entropy_bits: Option<f64>,
    code_bits: Option<f64>,
    side_bits: Option<f64>,
    tensors: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    name: String,
    shape: Vec<usize>,
    scheme: String,
    scales: Option<String>,
    codec: String,
    weights: u64,
    entropy_bits: Option<f64>,
    code_bits: f64,
    side_bits: f64,
    bpw: f64,
    bytes: u64,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let (report, accounts) = account_for(&args.directory, &mut Terminal::default())?;
    if let Some(path) = &args.plot {
        let svg = draw(&args.directory, &report, &accounts);
        std::fs::write(path, svg).with_context(|| path.display().to_string())?;
    }
    if args.json { output::json(&report) } else { output::text(&render(&report)) }
}

/// Accounts for every tensor of a directory.
///
/// # Errors
/// What is no model directory or damaged, or what the observer says.
pub fn inspect(directory: &Path, observer: &mut dyn Observer) -> Result<Report> {
    Ok(account_for(directory, observer)?.0)
}

fn account_for(directory: &Path, observer: &mut dyn Observer) -> Result<(Report, Vec<TensorAccount>)> {
    let dir = ModelDir::open(directory)?;
    let accounts = measure(&dir, observer)?;
    Ok((report(&dir, &accounts), accounts))
}

fn measure(dir: &ModelDir, observer: &mut dyn Observer) -> Result<Vec<TensorAccount>> {
    let total = dir.tensors().map(|(_, tensor)| tensor.bytes()).sum();
    observer.begin("inspect", total);
    let mut accounts = Vec::new();
    for (name, tensor) in dir.tensors() {
        observer.at(name)?;
        let account = TensorAccount::measure(name, tensor).with_context(|| dir.path().display().to_string())?;
        accounts.push(account);
        dir.release(name);
        observer.add(tensor.bytes());
    }
    Ok(accounts)
}

fn report(dir: &ModelDir, accounts: &[TensorAccount]) -> Report {
    let config = dir.config();
    let ours = config.get("quantization_config").filter(|_| dir.is_tersor());
    let scheme = ours.and_then(|q| q.get("scheme")).and_then(|s| s.as_str()).map(str::to_owned);
    let weights: u64 = accounts.iter().map(|account| account.weights).sum();
    let bytes: u64 = accounts.iter().map(|account| account.bytes).sum();
    let coded: Vec<&TensorAccount> = accounts.iter().filter(|account| account.coding.is_some()).collect();
    let coded_weights: u64 = coded.iter().map(|account| account.weights).sum();
    // A mean over the coded tensors, weighted by their sizes.
    let mean = |value: &dyn Fn(&TensorAccount) -> f64| {
        let sum: f64 = coded.iter().map(|account| value(account) * account.weights as f64).sum();
        (coded_weights > 0).then(|| sum / coded_weights as f64)
    };
    let tensors = accounts.iter().map(|account| row(account, scheme.as_deref())).collect();
    Report {
        format_version: ours.and_then(|q| q.get("version")).and_then(serde_json::Value::as_u64),
        model_type: config.get("model_type").and_then(|t| t.as_str()).map(str::to_owned),
        weights,
        bytes,
        file_bytes: dir.file_bytes(),
        bpw: bytes as f64 * 8.0 / weights.max(1) as f64,
        coded_weights,
        coded_bpw: mean(&TensorAccount::bpw),
        entropy_bits: mean(&|account| account.coding.as_ref().map_or(0.0, |coding| coding.entropy_bits)),
        code_bits: mean(&TensorAccount::code_bits),
        side_bits: mean(&TensorAccount::side_bits),
        scheme,
        tensors,
    }
}

fn row(account: &TensorAccount, scheme: Option<&str>) -> Row {
    let coding = account.coding.as_ref();
    Row {
        name: account.name.clone(),
        shape: account.shape.clone(),
        scheme: if coding.is_some() { scheme.unwrap_or("unknown") } else { "raw" }.to_owned(),
        scales: coding.map(|coding| coding.scales.clone()),
        codec: account.codec.clone(),
        weights: account.weights,
        entropy_bits: coding.map(|coding| coding.entropy_bits),
        code_bits: account.code_bits(),
        side_bits: account.side_bits(),
        bpw: account.bpw(),
        bytes: account.bytes,
    }
}

fn render(report: &Report) -> String {
    let mut table = Table::new(&["tensor", ">shape", "scheme", "codec", ">entropy", ">code", ">side", ">bpw", ">bytes"]);
    let bits = |value: f64| format!("{value:.3}");
    // Norms and biases are many and tiny: one line for all of them.
    let (mut raw_count, mut raw_weights, mut raw_bytes) = (0_u64, 0_u64, 0_u64);
    for row in &report.tensors {
        let Some(entropy_bits) = row.entropy_bits else {
            raw_count += 1;
            raw_weights += row.weights;
            raw_bytes += row.bytes;
            continue;
        };
        let shape: Vec<String> = row.shape.iter().map(usize::to_string).collect();
        table.row([
            row.name.clone(),
            shape.join("x"),
            format!("{}/{}", row.scheme, row.scales.as_deref().unwrap_or("-")),
            row.codec.clone(),
            bits(entropy_bits),
            bits(row.code_bits),
            bits(row.side_bits),
            bits(row.bpw),
            units::bytes(row.bytes),
        ]);
    }
    if raw_count > 0 {
        let bpw = raw_bytes as f64 * 8.0 / raw_weights.max(1) as f64;
        let dash = || "-".to_owned();
        let name = format!("{raw_count} tensors stored as they are");
        table.row([name, dash(), "raw".into(), dash(), dash(), bits(bpw), bits(0.0), bits(bpw), units::bytes(raw_bytes)]);
    }
    let mut text = table.render();
    let _ = writeln!(
        text,
        "\n{} model, {} weights, {}: {:.3} bits per weight, everything counted",
        report.model_type.as_deref().unwrap_or("unknown"),
        units::count(report.weights as f64),
        units::bytes(report.bytes),
        report.bpw
    );
    if let (Some(bpw), Some(entropy), Some(code), Some(side)) = (report.coded_bpw, report.entropy_bits, report.code_bits, report.side_bits)
    {
        let _ = writeln!(
            text,
            "coded tensors: {bpw:.3} bpw = {code:.3} code + {side:.3} side; entropy {entropy:.3}, overhead {:.3} ({:.1} %)",
            bpw - entropy,
            (bpw / entropy - 1.0) * 100.0
        );
    }
    text
}

fn draw(path: &Path, report: &Report, accounts: &[TensorAccount]) -> String {
    let name = std::path::absolute(path).ok().and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
    let title = format!("Bits per weight against entropy: {}", name.as_deref().unwrap_or("model"));
    let mut codecs: Vec<&str> = Vec::new();
    for account in accounts.iter().filter(|account| account.coding.is_some()) {
        if !codecs.contains(&account.codec.as_str()) {
            codecs.push(&account.codec);
        }
    }
    let subtitle = match (report.coded_bpw, report.entropy_bits) {
        (Some(bpw), Some(entropy)) => format!(
            "{} weights, {:.3} bpw over an entropy of {entropy:.3}; {}; area of a mark: weights",
            units::count(report.coded_weights as f64),
            bpw,
            codecs.join(", ")
        ),
        _ => "no coded tensors".to_owned(),
    };
    let points: Vec<Point> = accounts
        .iter()
        .filter_map(|account| {
            let coding = account.coding.as_ref()?;
            Some(Point {
                name: account.name.clone(),
                class: account::class(&account.name),
                entropy_bits: coding.entropy_bits,
                bpw: account.bpw(),
                weights: account.weights,
            })
        })
        .collect();
    plot::svg(&title, &subtitle, &points)
}
