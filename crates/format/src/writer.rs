//! Writing model directories, all or nothing.

use std::path::{Path, PathBuf};

use crate::encode::EncodedTensor;
use crate::error::FormatError;
use crate::tensor::Dtype;

/// Writes a directory under a temporary name and renames it when everything is on disk. Dropped before
/// [`finish`](Self::finish), it removes what it wrote.
#[derive(Debug)]
pub struct DirWriter {
    temp: PathBuf,
}

impl DirWriter {
    /// Creates the temporary directory `.NAME.tersor-tmp-PID` beside `path`.
    ///
    /// # Errors
    /// `path` exists and `force` is false, or it exists and is not a model directory, or its parent does not.
    pub fn create(path: impl AsRef<Path>, force: bool) -> Result<Self, FormatError> {
        todo!()
    }

    /// The temporary directory, for those who must remove it when they end the process without unwinding.
    pub fn temp_path(&self) -> &Path {
        &self.temp
    }

    /// Announces the names that will be written (the model's names), so that the room kept for the header fits.
    /// Optional: without it the file is copied once more if the header turns out longer than the room kept.
    pub fn expect<'a>(&mut self, names: impl IntoIterator<Item = &'a str>) {
        todo!()
    }

    /// Writes a tensor as it is.
    ///
    /// # Errors
    /// A name written twice, a length that does not fit the shape, or an I/O error.
    pub fn write_raw(&mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Result<(), FormatError> {
        todo!()
    }

    /// Writes the coded tensor that the model calls `name`, which must end in `.weight`: `X.coded`, `X.scales`, `X.biases`.
    ///
    /// # Errors
    /// As [`write_raw`](Self::write_raw), or a name without `.weight`.
    pub fn write_coded(&mut self, name: &str, tensor: &EncodedTensor) -> Result<(), FormatError> {
        todo!()
    }

    /// Copies a file (tokenizer.json, ...) into the directory under its own name.
    ///
    /// # Errors
    /// A name that is reserved or taken, or an I/O error.
    pub fn copy_file(&mut self, source: impl AsRef<Path>) -> Result<(), FormatError> {
        todo!()
    }

    /// Writes a small file.
    ///
    /// # Errors
    /// As [`copy_file`](Self::copy_file).
    pub fn write_file(&mut self, name: &str, bytes: &[u8]) -> Result<(), FormatError> {
        todo!()
    }

    /// Adds `quantization_config` to `config`, writes it and the manifest, syncs everything and renames the directory
    /// to its final name.
    ///
    /// # Errors
    /// `config` is not an object, or an I/O error; the temporary directory is removed.
    pub fn finish(self, config: serde_json::Value) -> Result<(), FormatError> {
        todo!()
    }
}
