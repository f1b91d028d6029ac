//! `q4_0`: GGML's blocks.
use crate::{PackError, QuantizedTensor};

/// Packs a tensor into GGML's 18-byte blocks, row-major.
///
/// # Errors
/// Scales or symbols that are not those of `q4_0`.
pub fn pack(_tensor: &QuantizedTensor) -> Result<Vec<u8>, PackError> {
    todo!()
}

/// The inverse of [`pack`].
///
/// # Errors
/// Lengths that disagree with the shape.
pub fn unpack(_rows: usize, _cols: usize, _blocks: &[u8]) -> Result<QuantizedTensor, PackError> {
    todo!()
}
