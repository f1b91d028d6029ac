//! `tersor._native`: what the Python package does in Rust. `python/tersor/_native.pyi` describes it for Python.
//!
//! Arrays come in and go out as NumPy's; the GIL is released while there is work to do. Inputs are copied before that, so another Python
//! thread may do with them what it likes.

mod arrays;
mod coded;
mod directories;
mod errors;
mod model;
mod progress;
mod quantizers;

use std::ffi::OsString;
use std::sync::OnceLock;

use pyo3::prelude::*;
use tersor_cpu::{Level, Pool};

/// Threads and SIMD level for kernels that are called with no model around them: all cores, the best level.
fn machine() -> &'static (Pool, Level) {
    static MACHINE: OnceLock<(Pool, Level)> = OnceLock::new();
    MACHINE.get_or_init(|| {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        (Pool::new(cores), Level::best())
    })
}

/// Runs the command line, whose first argument is the program's name; returns the exit code. Takes over the process's signals.
#[pyfunction]
fn command(py: Python<'_>, arguments: Vec<OsString>) -> u8 {
    py.detach(|| tersor_cli::main(arguments))
}

#[pymodule]
fn _native(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    m.add("CorruptError", m.py().get_type::<errors::CorruptError>())?;
    m.add_function(wrap_pyfunction!(command, m)?)?;
    m.add_class::<coded::Coded>()?;
    m.add_class::<coded::CodedLinear>()?;
    m.add_function(wrap_pyfunction!(coded::encode, m)?)?;
    m.add_function(wrap_pyfunction!(coded::encode_affine4, m)?)?;
    m.add_function(wrap_pyfunction!(coded::entropy, m)?)?;
    m.add_function(wrap_pyfunction!(quantizers::quantize_array, m)?)?;
    m.add_function(wrap_pyfunction!(directories::quantize, m)?)?;
    m.add_function(wrap_pyfunction!(directories::encode_dir, m)?)?;
    m.add_function(wrap_pyfunction!(directories::export, m)?)?;
    m.add_function(wrap_pyfunction!(directories::inspect, m)?)?;
    m.add_class::<model::Model>()?;
    m.add_class::<model::Stream>()?;
    m.add_function(wrap_pyfunction!(model::set_launcher, m)?)?;
    Ok(())
}
