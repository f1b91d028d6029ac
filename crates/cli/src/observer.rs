//! Long work reports to an [`Observer`]: the terminal's bar, or what a Python caller made of it.

use std::path::Path;

use anyhow::Result;

use crate::interrupt;
use crate::progress::Progress;

/// Told how long work gets on, and asked whether it should.
pub trait Observer: Send {
    /// A phase begins: `label` in one word, and how many units of work (weights, bytes) it has.
    fn begin(&mut self, label: &'static str, total: u64);

    /// Work on `item` begins.
    ///
    /// # Errors
    /// The work is to stop; what was written is removed.
    fn at(&mut self, item: &str) -> Result<()>;

    /// `units` of the phase are done.
    fn add(&mut self, units: u64);

    /// A directory is being written under this temporary name; `None` when it has got its own.
    fn temporary(&mut self, path: Option<&Path>);
}

/// A bar on a terminal, and Ctrl-C.
#[derive(Default)]
pub struct Terminal(Option<Progress>);

impl Observer for Terminal {
    fn begin(&mut self, label: &'static str, total: u64) {
        // The old bar clears its line before the new one draws.
        self.0 = None;
        self.0 = Some(Progress::new(label, total));
    }

    fn at(&mut self, item: &str) -> Result<()> {
        interrupt::check()?;
        if let Some(bar) = &self.0 {
            bar.message(item);
        }
        Ok(())
    }

    fn add(&mut self, units: u64) {
        if let Some(bar) = &self.0 {
            bar.add(units);
        }
    }

    fn temporary(&mut self, path: Option<&Path>) {
        match path {
            Some(path) => interrupt::remember_temporary(path),
            None => interrupt::forget_temporary(),
        }
    }
}

/// Runs `work` with `threads` threads of rayon, or with all cores.
pub fn with_threads<T: Send>(threads: Option<usize>, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    match threads {
        Some(threads) => rayon::ThreadPoolBuilder::new().num_threads(threads).build()?.install(work),
        None => work(),
    }
}
