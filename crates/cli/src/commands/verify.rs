//! `tersor verify`: every checksum, every symbol.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use serde::Serialize;

use crate::output::{self, units};
use crate::progress::Progress;

/// Check every checksum of a directory and decode every tensor
#[derive(clap::Args)]
pub struct Args {
    /// Model directory
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    ok: bool,
    files: usize,
    coded_tensors: usize,
    raw_tensors: usize,
    chunks: u64,
    symbols: u64,
    unlisted_files: &'a [String],
    seconds: f64,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let start = Instant::now();
    let mut progress: Option<Progress> = None;
    let report = tersor_format::verify(&args.directory, &mut |state| {
        let bar = progress.get_or_insert_with(|| Progress::new("verify", state.bytes_total));
        bar.message(state.item);
        bar.set(state.bytes_done);
    })?;
    drop(progress);
    let seconds = start.elapsed().as_secs_f64();
    if args.json {
        return output::json(&Report {
            ok: true,
            files: report.files,
            coded_tensors: report.coded_tensors,
            raw_tensors: report.raw_tensors,
            chunks: report.chunks,
            symbols: report.symbols,
            unlisted_files: &report.unlisted,
            seconds,
        });
    }
    let mut text = format!(
        "ok: {} files, {} coded tensors ({} chunks, {} symbols decoded), {} raw tensors, {}\n",
        report.files,
        report.coded_tensors,
        report.chunks,
        units::count(report.symbols as f64),
        report.raw_tensors,
        units::seconds(seconds)
    );
    if !report.unlisted.is_empty() {
        text += &format!("not in the manifest, not checked: {}\n", report.unlisted.join(", "));
    }
    output::text(&text)
}
