//! What the commands print: text and JSON on stdout, units, tables and the plot.

pub mod plot;
pub mod table;
pub mod units;

use std::io::Write;

use anyhow::Result;
use serde::Serialize;

/// Writes `text` to stdout and flushes it. A reader that has gone away ends the command quietly: `main` recognizes [`std::io::ErrorKind::BrokenPipe`].
pub fn text(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(StdoutError)?;
    Ok(())
}

/// Writes `value` to stdout as one JSON document.
pub fn json(value: &impl Serialize) -> Result<()> {
    let mut document = serde_json::to_string_pretty(value)?;
    document.push('\n');
    text(&document)
}

/// Stdout could not be written.
#[derive(Debug)]
pub struct StdoutError(std::io::Error);

impl StdoutError {
    /// Did the reader of the pipe go away? That is its right, and no failure of ours.
    pub fn is_closed_pipe(&self) -> bool {
        self.0.kind() == std::io::ErrorKind::BrokenPipe
    }
}

impl std::fmt::Display for StdoutError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "stdout: {}", self.0)
    }
}

impl std::error::Error for StdoutError {}
