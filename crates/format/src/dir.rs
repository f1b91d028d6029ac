//! Opening model directories.

use std::path::{Path, PathBuf};

use crate::error::FormatError;
use crate::tensor::Tensor;

/// An open model directory: ours, or a plain Hugging Face one. Opening maps the files and checks their headers; weights
/// are read when they are touched.
#[derive(Debug)]
pub struct ModelDir {
    path: PathBuf,
    config: serde_json::Value,
}

impl ModelDir {
    /// Opens a directory with `config.json` and either `model.safetensors` or shards listed in
    /// `model.safetensors.index.json`.
    ///
    /// The files must not be modified while the directory is open (replacing them by renaming is fine).
    ///
    /// # Errors
    /// Missing or malformed files, unknown versions, anything that contradicts FORMAT.md.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, FormatError> {
        todo!()
    }

    /// The directory as given to [`open`](Self::open).
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Contents of `config.json`.
    pub fn config(&self) -> &serde_json::Value {
        &self.config
    }

    /// Whether this directory was written by [`DirWriter`](crate::DirWriter) (a plain one holds raw tensors only).
    pub fn is_tersor(&self) -> bool {
        todo!()
    }

    /// The tensor that the model calls `name`; a coded one is found as `X.weight` though stored as `X.coded`.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        todo!()
    }

    /// As [`tensor`](Self::tensor), with an error that names directory and tensor.
    pub fn require(&self, name: &str) -> Result<&Tensor, FormatError> {
        todo!()
    }

    /// All tensors by the model's names, ascending.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        std::iter::empty()
    }

    /// Tells the system that the bytes of `name` are not needed for now (madvise DONTNEED); they stay valid. Unknown names
    /// are ignored.
    pub fn release(&self, name: &str) {
        todo!()
    }

    /// Compares the checksums of `name` (for a coded tensor: blob, scales and biases) with those in the file's metadata.
    /// Tensors of plain directories have none and pass.
    ///
    /// # Errors
    /// A mismatch, or no such tensor.
    pub fn check(&self, name: &str) -> Result<(), FormatError> {
        todo!()
    }

    /// Bytes of all tensor files.
    pub fn file_bytes(&self) -> u64 {
        todo!()
    }
}
