//! Errors by kind: what a caller got wrong is a `ValueError`, what this version cannot do a `NotImplementedError`, memory a
//! `MemoryError`, files an `OSError`, and bytes that are not what they should be a `CorruptError`.

use pyo3::PyErr;
use pyo3::exceptions::{PyMemoryError, PyNotImplementedError, PyOSError, PyValueError};
use tersor_codec::ParamsError;
use tersor_cpu::{KernelError, ScalesError};
use tersor_format::{EncodeTensorError, ErrorKind, FormatError, TensorError};

pyo3::create_exception!(
    tersor,
    CorruptError,
    PyValueError,
    "Coded bytes or a model directory that contradict the format or their checksums."
);

/// A library's error as Python's. (Neither type is ours, so `From` cannot be had.)
pub trait IntoPyErr {
    /// The exception with the error's one line.
    fn into_py(self) -> PyErr;
}

/// `map_err` with [`IntoPyErr`].
pub trait OrRaise<T> {
    /// The value, or the exception.
    fn or_raise(self) -> Result<T, PyErr>;
}

impl<T, E: IntoPyErr> OrRaise<T> for Result<T, E> {
    fn or_raise(self) -> Result<T, PyErr> {
        self.map_err(IntoPyErr::into_py)
    }
}

/// The exception of a kind.
fn of_kind(kind: ErrorKind, text: String) -> PyErr {
    match kind {
        ErrorKind::Corrupt => CorruptError::new_err(text),
        ErrorKind::Unsupported => PyNotImplementedError::new_err(text),
        ErrorKind::Io => PyOSError::new_err(text),
        _ => PyValueError::new_err(text),
    }
}

impl IntoPyErr for TensorError {
    fn into_py(self) -> PyErr {
        match self {
            Self::OutOfMemory { .. } => PyMemoryError::new_err(self.to_string()),
            _ => of_kind(self.kind(), self.to_string()),
        }
    }
}

impl IntoPyErr for FormatError {
    fn into_py(self) -> PyErr {
        match &self {
            Self::Tensor { cause: TensorError::OutOfMemory { .. }, .. } => PyMemoryError::new_err(self.to_string()),
            _ => of_kind(self.kind(), self.to_string()),
        }
    }
}

impl IntoPyErr for EncodeTensorError {
    fn into_py(self) -> PyErr {
        match self {
            Self::Format(cause) => cause.into_py(),
            _ => PyValueError::new_err(self.to_string()),
        }
    }
}

impl IntoPyErr for KernelError {
    fn into_py(self) -> PyErr {
        match self {
            Self::Shape { what, expected, found, .. } => PyValueError::new_err(format!("{what} is {found}, must be {expected}")),
            Self::NotNibbles { .. } => PyValueError::new_err(self.to_string()),
            _ => CorruptError::new_err(self.to_string()),
        }
    }
}

impl IntoPyErr for ScalesError {
    fn into_py(self) -> PyErr {
        PyValueError::new_err(self.to_string())
    }
}

impl IntoPyErr for ParamsError {
    fn into_py(self) -> PyErr {
        PyValueError::new_err(self.to_string())
    }
}
