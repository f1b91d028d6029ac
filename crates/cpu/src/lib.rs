//! CPU kernels: decode, GEMV and GEMM at every SIMD level.
//!
//! Every result is the same to the bit at every [`Level`], for coded and decoded weights, for any
//! number of threads and however tokens are batched; the crate opens no file.
#![deny(unsafe_op_in_unsafe_fn)]

mod activations;
mod affine4;
mod bandwidth;
mod buffer;
mod decoded;
mod dense;
mod error;
mod isa;
mod level;
mod matmul;
pub mod ops;
mod pairs;
mod planes;
mod pool;
mod rans_pairs;
mod scales;
mod source;
#[cfg(test)]
mod testing;
mod tiered;

pub use activations::{Activations, SEGMENT_COLS, SEGMENT_COLS_MAX, TokenBlock};
pub use affine4::decode_affine4;
pub use bandwidth::read_bandwidth;
pub use decoded::{Decoded, decode_bytes, decode_into};
pub use dense::{Dense, DenseType, dense_matmul};
pub use error::KernelError;
pub use level::{Avx2, Avx512, Level, LevelError};
pub use matmul::{Job, Matrix, matmul, read_row};
pub use pool::{Pool, THREADS_MAX};
pub use scales::{KernelScales, ScalesError};

use std::marker::PhantomData;

/// Rows of a tile, and lanes of a dot product.
pub(crate) const TILE_ROWS: usize = 16;
/// Columns of a tile.
pub(crate) const TILE_COLS: usize = 4;
/// Symbols of a tile: the step of every kernel.
pub(crate) const TILE_SYMBOLS: usize = TILE_ROWS * TILE_COLS;

/// `n` rounded up to a multiple of `to`.
pub(crate) const fn round_up(n: usize, to: usize) -> usize {
    n.div_ceil(to) * to
}

/// An output that several threads write in disjoint parts.
#[derive(Clone, Copy)]
pub(crate) struct SharedOut<'a, T> {
    start: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a `&mut [T]` whose parts are handed out by `slice`, whose contract demands that
// they be disjoint.
unsafe impl<T: Send> Sync for SharedOut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for SharedOut<'_, T> {}

impl<'a, T> SharedOut<'a, T> {
    pub(crate) fn new(out: &'a mut [T]) -> SharedOut<'a, T> {
        SharedOut { start: out.as_mut_ptr(), len: out.len(), lifetime: PhantomData }
    }

    /// `len` elements from `at` on.
    ///
    /// # Safety
    /// No two slices that overlap may be alive at a time.
    ///
    /// # Panics
    /// If the slice reaches beyond the end.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn slice(&self, at: usize, len: usize) -> &'a mut [T] {
        assert!(at <= self.len && len <= self.len - at, "{at} + {len} is beyond {}", self.len);
        // SAFETY: within the borrowed slice, as just checked, and disjoint from all others by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }
}
