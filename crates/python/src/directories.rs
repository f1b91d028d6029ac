//! Whole model directories: quantize, encode, export, inspect. The work is the command line's; reports come back as dicts with its keys.

use std::path::PathBuf;

use pyo3::prelude::*;
use serde::Serialize;
use tersor_cli::{EncodeOptions, ExportOptions, ExportTarget, Observer, QuantizeOptions, Usage};
use tersor_codec::Codec;
use tersor_quant::Scheme;

use crate::errors::{OrRaise, from_anyhow};
use crate::progress::PyObserver;

/// Runs `work` without the GIL under an observer, and makes its report a dict.
fn run<'py, R: Serialize + Send>(
    py: Python<'py>,
    progress: Option<Py<PyAny>>,
    work: impl FnOnce(&mut dyn Observer) -> anyhow::Result<R> + Send,
) -> PyResult<Bound<'py, PyAny>> {
    let (result, observer) = py.detach(|| {
        let mut observer = PyObserver::new(progress);
        (work(&mut observer), observer)
    });
    if let Some(raised) = observer.into_raised() {
        return Err(raised);
    }
    let report = result.and_then(|report| Ok(serde_json::to_string(&report)?)).map_err(from_anyhow)?;
    py.import("json")?.call_method1("loads", (report,))
}

fn threads(threads: Option<usize>) -> PyResult<Option<usize>> {
    match threads {
        Some(count @ (0 | 1025..)) => Err(from_anyhow(Usage(format!("threads is {count}, must be 1 to 1024")).into())),
        threads => Ok(threads),
    }
}

/// Quantizes and codes a Hugging Face checkpoint, as ``tersor quantize`` does. ``bpw``: of the whole model with everything counted, 4.0
/// unless given; for ``ecsq`` only. Returns the report that ``tersor quantize --json`` prints. The unit of progress is a weight; ``ecsq``
/// has two phases. With ``threads`` given, Ctrl-C is heeded only when the work is done.
#[pyfunction]
#[pyo3(signature = (src, dst, *, scheme = "ecsq", bpw = None, group_size = None, codec = "rans", threads = None, force = false, progress = None))]
#[allow(clippy::too_many_arguments)] // The options of the command.
pub fn quantize<'py>(
    py: Python<'py>,
    src: PathBuf,
    dst: PathBuf,
    scheme: &str,
    bpw: Option<f64>,
    group_size: Option<u32>,
    codec: &str,
    threads: Option<usize>,
    force: bool,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    if let Some(bpw) = bpw.filter(|bpw| !(bpw.is_finite() && *bpw > 0.0)) {
        return Err(from_anyhow(Usage(format!("bpw is {bpw}, must be a number greater than zero")).into()));
    }
    let options = QuantizeOptions {
        source: src,
        output: dst,
        scheme: scheme.parse::<Scheme>().or_raise()?,
        bpw,
        group_size,
        codec: codec.parse::<Codec>().or_raise()?,
        threads: self::threads(threads)?,
        force,
    };
    run(py, progress, move |observer| tersor_cli::quantize(&options, observer))
}

/// Codes an MLX 4-bit directory without loss, as ``tersor encode`` does; :func:`export` gives the same files back. Returns the report
/// that ``tersor encode --json`` prints.
#[pyfunction]
#[pyo3(signature = (src, dst, *, codec = "rans-precise", threads = None, force = false, progress = None))]
pub fn encode_dir<'py>(
    py: Python<'py>,
    src: PathBuf,
    dst: PathBuf,
    codec: &str,
    threads: Option<usize>,
    force: bool,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let codec = codec.parse::<Codec>().or_raise()?;
    let options = EncodeOptions { source: src, output: dst, codec, threads: self::threads(threads)?, force };
    run(py, progress, move |observer| tersor_cli::encode(&options, observer))
}

/// Turns what :func:`encode_dir` wrote back into the original files, each the same to the byte. The unit of progress is a byte.
#[pyfunction]
#[pyo3(signature = (src, dst, *, to = "mlx", threads = None, force = false, progress = None))]
pub fn export<'py>(
    py: Python<'py>,
    src: PathBuf,
    dst: PathBuf,
    to: &str,
    threads: Option<usize>,
    force: bool,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    if to != "mlx" {
        return Err(from_anyhow(Usage(format!("unknown form {to:?} to export to: mlx")).into()));
    }
    let options = ExportOptions { source: src, to: ExportTarget::Mlx, output: dst, threads: self::threads(threads)?, force };
    run(py, progress, move |observer| tersor_cli::export(&options, observer))
}

/// Where the bits of a directory go, with the keys of ``tersor inspect --json``. Decodes every tensor.
#[pyfunction]
#[pyo3(signature = (directory, *, progress = None))]
pub fn inspect<'py>(py: Python<'py>, directory: PathBuf, progress: Option<Py<PyAny>>) -> PyResult<Bound<'py, PyAny>> {
    run(py, progress, move |observer| tersor_cli::inspect(&directory, observer))
}
