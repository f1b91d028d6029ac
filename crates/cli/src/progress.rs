//! A progress bar on a terminal, nothing in a pipe. It draws on stderr, so that stdout stays the command's answer.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar counting units of work, removed when dropped.
pub struct Progress(ProgressBar);

impl Progress {
    /// A bar of `total` units under a `label` such as `encode`.
    pub fn new(label: &'static str, total: u64) -> Self {
        let bar = ProgressBar::with_draw_target(Some(total), target());
        let style = ProgressStyle::with_template("{prefix:>8} {bar:32} {percent:>3} %  {eta:>4} left  {wide_msg}")
            .expect("the template is constant and valid")
            .progress_chars("━╸ ");
        bar.set_style(style);
        bar.set_prefix(label);
        bar.enable_steady_tick(Duration::from_millis(200));
        Self(bar)
    }

    /// Says what is worked on.
    pub fn message(&self, text: &str) {
        if !self.0.is_hidden() {
            self.0.set_message(text.to_owned());
        }
    }

    /// Counts `units` more as done.
    pub fn add(&self, units: u64) {
        self.0.inc(units);
    }

    /// Sets how many units are done.
    pub fn set(&self, done: u64) {
        self.0.set_position(done);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

fn target() -> ProgressDrawTarget {
    if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() }
}
