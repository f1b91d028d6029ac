//! Errors by kind: what a caller got wrong is a `ValueError`, what this version cannot do a `NotImplementedError`, memory a
//! `MemoryError`, files an `OSError`, and bytes that are not what they should be a `CorruptError`.

use pyo3::PyErr;
use pyo3::exceptions::{
    PyFileNotFoundError, PyMemoryError, PyNotImplementedError, PyOSError, PyPermissionError, PyRuntimeError, PyValueError,
};
use tersor_cli::Usage;
use tersor_codec::ParamsError;
use tersor_cpu::{KernelError, ScalesError};
use tersor_format::{EncodeTensorError, ErrorKind, FormatError, TensorError};
use tersor_quant::{QuantizeError, SolveError, UnknownScheme};
use tersor_runtime::generate::session::SessionError;
use tersor_runtime::generate::tokenizer::TokenizerError;
use tersor_runtime::model::ModelError;
use tersor_runtime::model::weights::RunError;
use tersor_runtime::residency::OpenError;

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
        of_format(&self, self.to_string())
    }
}

/// The exception of a directory's error, with `text`.
fn of_format(error: &FormatError, text: String) -> PyErr {
    match error {
        FormatError::Tensor { cause: TensorError::OutOfMemory { .. }, .. } => PyMemoryError::new_err(text),
        FormatError::Io { cause, .. } if cause.kind() == std::io::ErrorKind::NotFound => PyFileNotFoundError::new_err(text),
        FormatError::Io { cause, .. } if cause.kind() == std::io::ErrorKind::PermissionDenied => PyPermissionError::new_err(text),
        _ => of_kind(error.kind(), text),
    }
}

fn of_model(error: &ModelError, text: String) -> PyErr {
    match error {
        ModelError::Unsupported { .. } => PyNotImplementedError::new_err(text),
        ModelError::File { .. } => PyOSError::new_err(text),
        _ => PyValueError::new_err(text),
    }
}

fn of_open(error: &OpenError, text: String) -> PyErr {
    match error {
        OpenError::Format(cause) => of_format(cause, text),
        OpenError::Model(cause) => of_model(cause, text),
        OpenError::CorruptChunk { .. } | OpenError::Decode { .. } => CorruptError::new_err(text),
        OpenError::BudgetTooSmall { .. } => PyMemoryError::new_err(text),
        OpenError::NeedsGpu | OpenError::Scales { .. } => PyNotImplementedError::new_err(text),
        _ => PyRuntimeError::new_err(text),
    }
}

fn of_run(error: &RunError, text: String) -> PyErr {
    match error {
        RunError::Corrupt { .. } => CorruptError::new_err(text),
        RunError::KvTooLarge { .. } => PyMemoryError::new_err(text),
        RunError::TokenOutOfRange { .. } | RunError::ContextFull { .. } | RunError::NoTokens => PyValueError::new_err(text),
        _ => PyRuntimeError::new_err(text),
    }
}

fn of_tokenizer(error: &TokenizerError, text: String) -> PyErr {
    match error {
        TokenizerError::Missing { .. } => PyFileNotFoundError::new_err(text),
        _ => PyValueError::new_err(text),
    }
}

/// The exception of an error of the command line: the first cause whose kind is known decides, the text is that of the whole chain.
pub fn from_anyhow(error: anyhow::Error) -> PyErr {
    let text = tersor_cli::message(&error);
    for cause in error.chain() {
        if let Some(cause) = cause.downcast_ref::<FormatError>() {
            return of_format(cause, text);
        } else if let Some(cause) = cause.downcast_ref::<OpenError>() {
            return of_open(cause, text);
        } else if let Some(cause) = cause.downcast_ref::<ModelError>() {
            return of_model(cause, text);
        } else if let Some(cause) = cause.downcast_ref::<RunError>() {
            return of_run(cause, text);
        } else if let Some(cause) = cause.downcast_ref::<TensorError>() {
            return of_kind(cause.kind(), text);
        } else if cause.is::<Usage>() || cause.is::<QuantizeError>() || cause.is::<SolveError>() || cause.is::<EncodeTensorError>() {
            return PyValueError::new_err(text);
        } else if cause.is::<std::io::Error>() {
            return PyOSError::new_err(text);
        }
    }
    PyValueError::new_err(text)
}

impl IntoPyErr for RunError {
    fn into_py(self) -> PyErr {
        of_run(&self, self.to_string())
    }
}

impl IntoPyErr for TokenizerError {
    fn into_py(self) -> PyErr {
        of_tokenizer(&self, self.to_string())
    }
}

impl IntoPyErr for SessionError {
    fn into_py(self) -> PyErr {
        match &self {
            Self::Run(cause) => of_run(cause, self.to_string()),
            _ => PyValueError::new_err(self.to_string()),
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

/// Errors that are always the caller's.
macro_rules! value_error {
    ($($error:ty),*) => {
        $(impl IntoPyErr for $error {
            fn into_py(self) -> PyErr {
                PyValueError::new_err(self.to_string())
            }
        })*
    };
}

value_error!(ScalesError, ParamsError, QuantizeError, SolveError, UnknownScheme);
