//! `affine4`: MLX's packed layout.
use crate::{PackError, QuantizedTensor, ScaleVec};

/// Packs symbols (-8..=7) as MLX does: nibble = symbol + 8, eight to a u32, lowest first.
///
/// # Errors
/// A symbol out of range, or a count that is not a multiple of 8.
pub fn pack(_symbols: &[i16]) -> Result<Vec<u32>, PackError> {
    todo!()
}

/// The inverse of [`pack`].
pub fn unpack(_words: &[u32]) -> Vec<i16> {
    todo!()
}

/// A tensor from MLX's parts: `words` (rows, cols/8), `scales` and `biases` (rows, cols/group_size).
///
/// # Errors
/// Lengths that disagree with the shape.
pub fn from_packed(
    _rows: usize,
    _cols: usize,
    _group_size: u32,
    _words: &[u32],
    _scales: ScaleVec,
    _biases: ScaleVec,
) -> Result<QuantizedTensor, PackError> {
    todo!()
}
