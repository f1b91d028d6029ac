//! `tersor export`: back to the files that other programs read.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, anyhow};
use serde::Serialize;
use tersor_format::{FormatError, ModelDir, restore_original};

use crate::interrupt;
use crate::observer::{Observer, Terminal, with_threads};
use crate::options::thread_count;
use crate::output::{self, units};

/// Turn a directory back into the files it was encoded from
///
/// Takes what `tersor encode` wrote and gives the original directory, every file the same to the byte and compared with its checksum.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    options: Options,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// What to export, and where to.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// Model directory
    #[arg(value_name = "DIR")]
    pub source: PathBuf,
    /// Form of the output
    #[arg(long)]
    pub to: Target,
    /// Directory to write
    #[arg(short, long, value_name = "OUT")]
    pub output: PathBuf,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = thread_count)]
    pub threads: Option<usize>,
    /// Replace OUT if it is a model directory
    #[arg(long)]
    pub force: bool,
}

/// Forms that a directory can be exported to.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Target {
    /// The MLX directory that was encoded
    Mlx,
}

/// What was written.
#[derive(Serialize)]
pub struct Report {
    source: String,
    output: String,
    identical: bool,
    files: usize,
    bytes: u64,
    seconds: f64,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let _graceful = interrupt::graceful();
    let report = export(&args.options, &mut Terminal::default())?;
    if args.json {
        return output::json(&report);
    }
    let Report { files, bytes, seconds, .. } = report;
    output::text(&format!("{files} files, {}, each the same to the byte, {}\n", units::bytes(bytes), units::seconds(seconds)))
}

/// Exports a directory.
///
/// # Errors
/// A directory that cannot be exported so, a file that does not come out as it was, or what the observer says.
pub fn export(options: &Options, observer: &mut dyn Observer) -> Result<Report> {
    let start = Instant::now();
    let Options { source, output, threads, force, to: Target::Mlx } = options;
    let dir = ModelDir::open(source)?;
    let mut begun = false;
    let mut bytes_done = 0;
    // The observer's own error says more than that the work was stopped.
    let mut stopped = None;
    let written = with_threads(*threads, || {
        let result = restore_original(&dir, output, *force, &mut |state| {
            if !begun {
                observer.begin("export", state.bytes_total);
                observer.temporary(Some(state.temporary));
                begun = true;
            }
            observer.add(state.bytes_done - bytes_done);
            bytes_done = state.bytes_done;
            match observer.at(state.item) {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    stopped = Some(error);
                    ControlFlow::Break(())
                }
            }
        });
        result.map_err(|error| match error {
            FormatError::Stopped { .. } => stopped.take().unwrap_or_else(|| anyhow!(error)),
            error => error.into(),
        })
    })?;
    observer.temporary(None);
    Ok(Report {
        source: source.display().to_string(),
        output: output.display().to_string(),
        identical: true,
        files: written.files,
        bytes: written.bytes,
        seconds: start.elapsed().as_secs_f64(),
    })
}
