//! The command `tersor`, as a function so that the Python package can have it, too. It is the only part of the project that prints. Its
//! contract: exit code 0 when done, 1 on failure, 2 on wrong usage, 130 when interrupted; an error is one line on stderr.
#![forbid(unsafe_code)]

mod account;
mod commands;
mod convert;
mod engine;
mod interrupt;
mod machine;
mod observer;
mod options;
mod output;
mod progress;
mod sampling;

use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

pub use commands::encode::{Options as EncodeOptions, Report as EncodeReport, encode};
pub use commands::export::{Options as ExportOptions, Report as ExportReport, Target as ExportTarget, export};
pub use commands::inspect::{Report as InspectReport, inspect};
pub use commands::quantize::{Options as QuantizeOptions, Report as QuantizeReport, quantize};
pub use engine::{Engine, LimitArgs, Opened, Setup};
pub use machine::set_launcher;
pub use observer::Observer;
pub use options::{ByteSize, Usage, default_threads};

use interrupt::Interrupted;
use output::StdoutError;

/// Language models with entropy-coded weights.
#[derive(Parser)]
#[command(name = "tersor", version, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Quantize(commands::quantize::Args),
    Encode(commands::encode::Args),
    Inspect(commands::inspect::Args),
    Verify(commands::verify::Args),
    Generate(commands::generate::Args),
    Chat(commands::chat::Args),
    Serve(commands::serve::Args),
    Bench(commands::bench::Args),
    Kernels(commands::kernels::Args),
    Eval(commands::eval::Args),
    Export(commands::export::Args),
    Info(commands::info::Args),
}

/// Runs the command line `arguments`, of which the first is the program's name, and returns the exit code. Takes over the process's
/// signals.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    interrupt::install();
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let result = match cli.command {
        Command::Quantize(args) => commands::quantize::run(&args),
        Command::Encode(args) => commands::encode::run(&args),
        Command::Inspect(args) => commands::inspect::run(&args),
        Command::Verify(args) => commands::verify::run(&args),
        Command::Generate(args) => commands::generate::run(&args),
        Command::Chat(args) => commands::chat::run(&args),
        Command::Serve(args) => commands::serve::run(&args),
        Command::Bench(args) => commands::bench::run(&args),
        Command::Kernels(args) => commands::kernels::run(&args),
        Command::Eval(args) => commands::eval::run(&args),
        Command::Export(args) => commands::export::run(&args),
        Command::Info(args) => commands::info::run(&args),
    };
    match result {
        Ok(()) => 0,
        Err(error) => fail(&error),
    }
}

/// Help and version go to stdout; a usage error becomes one line.
fn usage(error: &clap::Error) -> u8 {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        // A closed pipe is all that can go wrong here, and then nobody reads.
        let _ = error.print();
        return 0;
    }
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = error.print();
        return 2;
    }
    // clap's first paragraph names the argument and the cause; what follows is advice and the usage line.
    let rendered = error.to_string();
    let first = rendered.split("\n\n").next().unwrap_or(&rendered);
    let line = one_line(first);
    eprintln!("{}", if line.starts_with("error: ") { line } else { format!("error: {line}") });
    2
}

fn fail(error: &anyhow::Error) -> u8 {
    let stdout = error.downcast_ref::<StdoutError>();
    if stdout.is_some_and(StdoutError::is_closed_pipe) {
        return 0;
    }
    if stdout.is_none() && (error.is::<Interrupted>() || interrupt::requested()) {
        eprintln!("error: interrupted");
        return interrupt::EXIT_CODE;
    }
    eprintln!("error: {}", message(error));
    if error.is::<Usage>() { 2 } else { 1 }
}

/// An error in one line.
pub fn message(error: &anyhow::Error) -> String {
    one_line(&chain(error))
}

/// The causes from the outermost in, joined by `: `. A cause that its parent's text already ends with is not said twice.
fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.ends_with(&cause) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause);
    }
    text
}

/// Names from files may hold anything: no line breaks, no terminal control.
fn one_line(text: &str) -> String {
    let words: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    words.join(" ").chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn chains_say_each_cause_once_and_on_one_line() {
        let inner = std::io::Error::other("cause\nwith a \u{1b}[31mbreak");
        let error = anyhow::Error::new(inner).context("model.safetensors: layers.0").context("m");
        assert_eq!(one_line(&chain(&error)), "m: model.safetensors: layers.0: cause with a \u{fffd}[31mbreak");
        let repeated = anyhow::anyhow!("cause").context("x: cause");
        assert_eq!(chain(&repeated), "x: cause");
    }
}
