//! The Llama-family decoder: configuration, tensor names, forward pass, KV cache.
//!
//! Nothing here knows how weights are stored: matrices are reached through [`weights::Weights`] only. Whoever uses a model holds a
//! [`runner::Runner`], and does not know where it computes.

pub mod config;
pub mod kv;
pub mod llama;
pub mod names;
pub mod runner;
pub mod weights;

pub use llama::Model;
pub use runner::{CpuRunner, Runner};

use std::path::PathBuf;
use tersor_format::{ModelDir, Place, Tensor};
use thiserror::Error;

/// Why a directory cannot be run as a model.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A key of a JSON file is missing, has the wrong type or a value that makes no sense.
    #[error("{}: {key}: {cause}", file.display())]
    BadKey {
        /// The JSON file.
        file: PathBuf,
        /// The key, with its path from the root.
        key: String,
        /// What is wrong with it.
        cause: String,
    },
    /// A key asks for something that this program does not do.
    #[error("{}: {key} {value:?} is not supported", file.display())]
    Unsupported {
        /// The JSON file.
        file: PathBuf,
        /// The key, with its path from the root.
        key: String,
        /// The value that is not supported.
        value: String,
    },
    /// A tensor that the configuration asks for is not in the directory.
    #[error("{}: tensor {tensor} is missing", dir.display())]
    TensorMissing {
        /// The model directory.
        dir: PathBuf,
        /// Name of the tensor.
        tensor: String,
    },
    /// A tensor has another shape than the configuration says.
    #[error("{place} has shape {found:?}, the configuration asks for {expected:?}")]
    TensorShape {
        /// The file and the tensor.
        place: Place,
        /// Shape that the configuration asks for.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// A tensor is stored in a form that cannot be used in its place.
    #[error("{place} is {found}, {expected} is needed")]
    TensorForm {
        /// The file and the tensor.
        place: Place,
        /// What is needed, in words.
        expected: &'static str,
        /// What the file has, in words.
        found: String,
    },
    /// A file of the directory cannot be read.
    #[error("{}: {cause}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// What the system or the parser said, in one line.
        cause: String,
    },
}

/// The tensor `name`, which must have this shape.
pub(crate) fn find<'a>(dir: &'a ModelDir, name: &str, expected: &[usize]) -> Result<&'a Tensor, ModelError> {
    let missing = || ModelError::TensorMissing { dir: dir.path().to_owned(), tensor: name.to_owned() };
    let tensor = dir.tensor(name).ok_or_else(missing)?;
    let found = tensor.shape();
    if found != expected {
        return Err(ModelError::TensorShape { place: dir.place(name), expected: expected.to_vec(), found });
    }
    Ok(tensor)
}

/// The error for a tensor that is stored in a form that its place cannot use.
pub(crate) fn wrong_form(dir: &ModelDir, name: &str, expected: &'static str, found: String) -> ModelError {
    ModelError::TensorForm { place: dir.place(name), expected, found }
}
