//! Reading everything once and believing nothing.

use std::path::Path;

use crate::error::FormatError;

/// What [`verify`] is doing; passed to its callback.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct VerifyProgress<'a> {
    /// File or tensor at hand.
    pub item: &'a str,
    /// Bytes done.
    pub bytes_done: u64,
    /// Bytes in all (every file is read once for the manifest, every tensor once more).
    pub bytes_total: u64,
}

/// What [`verify`] found in order.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct VerifyReport {
    /// Files that match the manifest.
    pub files: usize,
    /// Coded tensors decoded.
    pub coded_tensors: usize,
    /// Raw tensors whose checksum matches (scales and biases included).
    pub raw_tensors: usize,
    /// Chunks decoded.
    pub chunks: u64,
    /// Symbols decoded, padding included.
    pub symbols: u64,
    /// Files in the directory that the manifest does not list. They are not read.
    pub unlisted_files: Vec<String>,
}

/// Checks a directory of ours: manifest, checksums, zero padding; decodes every tensor with the codec's oracle and compares the
/// header's statistics; scales must be finite. In parallel on rayon's current pool.
///
/// # Errors
/// The first thing found wrong, or a directory that is not ours (it has no checksums to verify).
pub fn verify(
    path: impl AsRef<Path>,
    progress: &mut (dyn FnMut(VerifyProgress<'_>) + Send),
) -> Result<VerifyReport, FormatError> {
    todo!()
}
