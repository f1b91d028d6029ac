//! Python callables and tqdm bars as observers of long work.

use std::path::Path;

use anyhow::anyhow;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use tersor_cli::Observer;

/// An observer that tells a Python object, and stops the work when that raises or a signal is pending.
pub struct PyObserver {
    progress: Option<Py<PyAny>>,
    done: u64,
    total: u64,
    /// What Python raised; says more than that the work was stopped.
    raised: Option<PyErr>,
}

impl PyObserver {
    /// `progress`: None, a callable `(done, total)`, or a tqdm bar.
    pub fn new(progress: Option<Py<PyAny>>) -> Self {
        Self { progress, done: 0, total: 0, raised: None }
    }

    /// The exception that ended the work, if it came from Python.
    pub fn into_raised(self) -> Option<PyErr> {
        self.raised
    }

    /// Runs `call` with the progress object. The first exception is kept.
    fn tell(&mut self, call: impl FnOnce(Python<'_>, &Bound<'_, PyAny>) -> PyResult<()>) {
        if self.raised.is_some() {
            return;
        }
        let Some(progress) = &self.progress else { return };
        if let Err(error) = Python::attach(|py| call(py, progress.bind(py))) {
            self.raised = Some(error);
        }
    }
}

/// A tqdm bar counts by itself; anything else is called with what is done.
fn is_bar(progress: &Bound<'_, PyAny>) -> PyResult<bool> {
    progress.hasattr("update")
}

impl Observer for PyObserver {
    fn begin(&mut self, label: &'static str, total: u64) {
        (self.done, self.total) = (0, total);
        self.tell(|py, progress| {
            if !is_bar(progress)? {
                return progress.call1((0, total)).map(drop);
            }
            if progress.hasattr("reset")? {
                let total = [("total", total)];
                let arguments = PyDict::new(py);
                total.iter().try_for_each(|(name, value)| arguments.set_item(name, value))?;
                progress.call_method("reset", (), Some(&arguments))?;
            } else {
                progress.setattr("total", total)?;
            }
            if progress.hasattr("set_description")? {
                progress.call_method1("set_description", (label,))?;
            }
            Ok(())
        });
    }

    fn at(&mut self, _item: &str) -> anyhow::Result<()> {
        if self.raised.is_none() {
            self.raised = Python::attach(|py| py.check_signals()).err();
        }
        if self.raised.is_some() { Err(anyhow!("stopped by an exception")) } else { Ok(()) }
    }

    fn add(&mut self, units: u64) {
        self.done += units;
        let (done, total) = (self.done, self.total);
        self.tell(|_, progress| {
            if is_bar(progress)? { progress.call_method1("update", (units,)) } else { progress.call1((done, total)) }.map(drop)
        });
    }

    fn temporary(&mut self, _path: Option<&Path>) {}
}
