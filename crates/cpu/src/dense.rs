//! Products of unquantized matrices with f32 activations: the reference that quantized models are
//! compared with.
//!
//! Computes `out[t, r] = Σ_c w[r, c] * x[t, c]` with the 16-lane sums of [`crate::ops`]. Layout:
//! weights row-major, little-endian, at any alignment, so that they may stay in a mapped file. A
//! task widens four rows to f32 in the L2 cache once and multiplies them with all tokens. Bound by
//! reading the weights for one token, by multiplication and addition (not fused) for many.
//!
//! Measured (AMD EPYC, Zen 5, one of two shared cores, `cargo run --release -p tersor-cpu --example
//! ops`): bf16, 2048 x 2048, 23 GMAC/s for one token and 50 for 32 at AVX-512; 17 and 34 at AVX2.
//! f16 takes twice the time for one token, as widening it costs more than the product.

use crate::buffer::AlignedBytes;
use crate::isa::{Isa, per_isa};
use crate::level::per_level;
use crate::ops::{LANES, f16_to_f32, fold};
use crate::{Level, Pool, SharedOut};

/// Element type of a dense matrix.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DenseType {
    /// IEEE binary32.
    F32,
    /// The upper half of binary32.
    Bf16,
    /// IEEE binary16.
    F16,
}

impl DenseType {
    /// Bytes of an element.
    pub const fn bytes(self) -> usize {
        match self {
            DenseType::F32 => 4,
            DenseType::Bf16 | DenseType::F16 => 2,
        }
    }
}

/// A dense matrix: a view of little-endian bytes.
#[derive(Clone, Copy, Debug)]
pub struct Dense<'a> {
    dtype: DenseType,
    rows: usize,
    cols: usize,
    bytes: &'a [u8],
}

impl<'a> Dense<'a> {
    /// A view of (rows, cols) elements, row-major.
    ///
    /// # Panics
    /// If `bytes` has another length.
    pub fn new(dtype: DenseType, rows: usize, cols: usize, bytes: &'a [u8]) -> Dense<'a> {
        let expected = rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.bytes()));
        assert_eq!(Some(bytes.len()), expected, "bytes must be ({rows}, {cols}) elements of {dtype:?}");
        Dense { dtype, rows, cols, bytes }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Widens one row to f32: an embedding lookup.
    ///
    /// # Panics
    /// If there is no such row, or `out.len() != cols`.
    pub fn read_row(&self, level: Level, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(out.len(), self.cols, "out must have as many elements as the matrix has columns");
        widen_rows(level, self.dtype, self.row_bytes(row, 1), out);
    }

    fn row_bytes(&self, row: usize, rows: usize) -> &'a [u8] {
        let row_bytes = self.cols * self.dtype.bytes();
        &self.bytes[row * row_bytes..(row + rows) * row_bytes]
    }
}

/// Rows multiplied together: enough to reuse each load of `x`, few enough that their sums stay in
/// registers at every level.
const ROWS_TOGETHER: usize = 4;

/// `out = x W^T`. `x`: (tokens, cols); `out`: (tokens, rows).
///
/// # Panics
/// If the lengths disagree with the shapes.
pub fn dense_matmul(pool: &Pool, level: Level, w: Dense<'_>, x: &[f32], tokens: usize, out: &mut [f32]) {
    assert_eq!(x.len(), tokens * w.cols, "x must be (tokens, cols)");
    assert_eq!(out.len(), tokens * w.rows, "out must be (tokens, rows)");
    if out.is_empty() {
        return;
    }
    if w.cols == 0 {
        out.fill(0.0);
        return;
    }
    // About 64 KiB of weights a task, in whole groups of rows.
    let groups = w.rows.div_ceil(ROWS_TOGETHER);
    let group_bytes = ROWS_TOGETHER * w.cols * w.dtype.bytes();
    let groups_per_task = (65_536 / group_bytes).clamp(1, groups.div_ceil(pool.threads()));
    let out = SharedOut::new(out);
    pool.run(groups.div_ceil(groups_per_task), &|task| {
        WIDE.with_borrow_mut(|wide| {
            wide.ensure(ROWS_TOGETHER * w.cols * size_of::<f32>());
            let wide = floats(wide);
            for group in task * groups_per_task..groups.min((task + 1) * groups_per_task) {
                let row = group * ROWS_TOGETHER;
                let rows = ROWS_TOGETHER.min(w.rows - row);
                let wide = &mut wide[..rows * w.cols];
                widen_rows(level, w.dtype, w.row_bytes(row, rows), wide);
                for (token, x) in x.chunks_exact(w.cols).enumerate() {
                    // SAFETY: each group of rows is in one task only, and its outputs are nobody else's.
                    let out = unsafe { out.slice(token * w.rows + row, rows) };
                    dot_rows(level, wide, x, out);
                }
            }
        });
    });
}

thread_local! {
    /// Widened rows, kept between calls.
    static WIDE: std::cell::RefCell<AlignedBytes> = std::cell::RefCell::default();
}

/// The buffer as f32 values.
fn floats(bytes: &mut AlignedBytes) -> &mut [f32] {
    // SAFETY: any bits are an f32, and the buffer is aligned to 64 bytes.
    let (before, floats, _) = unsafe { bytes.align_to_mut::<f32>() };
    debug_assert!(before.is_empty());
    floats
}

per_level! {
    fn widen_rows(dtype: DenseType, bytes: &[u8], out: &mut [f32]) {
        match dtype {
            DenseType::F32 => {
                for (b, out) in bytes.as_chunks::<4>().0.iter().zip(out) {
                    *out = f32::from_le_bytes(*b);
                }
            }
            DenseType::Bf16 => {
                for (b, out) in bytes.as_chunks::<2>().0.iter().zip(out) {
                    *out = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
                }
            }
            DenseType::F16 => {
                for (b, out) in bytes.as_chunks::<2>().0.iter().zip(out) {
                    *out = f16_to_f32(u16::from_le_bytes(*b));
                }
            }
        }
    }
}

per_isa! {
    /// `out[r] = w[r] . x`. `w`: (out.len(), x.len()), at most [`ROWS_TOGETHER`] rows.
    fn dot_rows(isa; w: &[f32], x: &[f32], out: &mut [f32]) {
        match out.len() {
            4 => dot_block::<_, 4>(isa, w, x, out),
            3 => dot_block::<_, 3>(isa, w, x, out),
            2 => dot_block::<_, 2>(isa, w, x, out),
            _ => dot_block::<_, 1>(isa, w, x, out),
        }
    }
}

/// `R` dot products with `x` at once. `w`: (R, x.len()); `out`: (R)
#[inline(always)]
pub(crate) fn dot_block<I: Isa, const R: usize>(isa: I, w: &[f32], x: &[f32], out: &mut [f32]) {
    let cols = x.len();
    let rows: [&[f32]; R] = std::array::from_fn(|r| &w[r * cols..][..cols]);
    let rows16: [&[[f32; LANES]]; R] = std::array::from_fn(|r| rows[r].as_chunks().0);
    let (x16, x_tail) = x.as_chunks::<LANES>();
    let mut lanes = [isa.floats(&[0.0; LANES]); R];
    for (i, x) in x16.iter().enumerate() {
        let x = isa.floats(x);
        for r in 0..R {
            lanes[r] = isa.multiply_add(lanes[r], isa.floats(&rows16[r][i]), x);
        }
    }
    for r in 0..R {
        if x_tail.is_empty() {
            out[r] = isa.fold(lanes[r]);
            continue;
        }
        let mut tail = [0.0; LANES];
        isa.store_floats(lanes[r], &mut tail);
        for ((lane, w), x) in tail.iter_mut().zip(rows[r].as_chunks::<LANES>().1).zip(x_tail) {
            *lane += w * x;
        }
        out[r] = fold(tail);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::levels;
    use half::{bf16, f16};

    fn value(i: usize) -> f32 {
        ((i * 2_654_435_761 % 2003) as f32 - 1001.0) / 512.0
    }

    /// The definition: lane `c % 16` takes the products in order, then the tree.
    fn naive(w: &[f32], x: &[f32]) -> f32 {
        let mut lanes = [0f32; 16];
        for (c, (w, x)) in w.iter().zip(x).enumerate() {
            lanes[c % 16] += w * x;
        }
        for width in [8, 4, 2, 1] {
            for j in 0..width {
                lanes[j] += lanes[j + width];
            }
        }
        lanes[0]
    }

    #[test]
    fn every_level_type_and_tail_is_the_definition() {
        for (rows, cols, tokens) in [(1, 1, 1), (3, 15, 2), (4, 16, 1), (5, 17, 3), (37, 100, 2), (130, 259, 1)] {
            let x: Vec<f32> = (0..tokens * cols).map(value).collect();
            for dtype in [DenseType::F32, DenseType::Bf16, DenseType::F16] {
                let mut real = Vec::new();
                let mut bytes = vec![0u8]; // one byte off, so that nothing is aligned
                for i in 0..rows * cols {
                    let v = value(i + 7);
                    match dtype {
                        DenseType::F32 => {
                            real.push(v);
                            bytes.extend(v.to_le_bytes());
                        }
                        DenseType::Bf16 => {
                            real.push(bf16::from_f32(v).to_f32());
                            bytes.extend(bf16::from_f32(v).to_le_bytes());
                        }
                        DenseType::F16 => {
                            real.push(f16::from_f32(v).to_f32());
                            bytes.extend(f16::from_f32(v).to_le_bytes());
                        }
                    }
                }
                let w = Dense::new(dtype, rows, cols, &bytes[1..]);
                let want: Vec<f32> =
                    (0..tokens * rows).map(|i| naive(&real[i % rows * cols..][..cols], &x[i / rows * cols..][..cols])).collect();
                for level in levels() {
                    for threads in [1, 3] {
                        let mut out = vec![f32::NAN; tokens * rows];
                        dense_matmul(&Pool::new(threads), level, w, &x, tokens, &mut out);
                        assert_eq!(out, want, "{level} {dtype:?} {rows}x{cols}, {tokens} tokens, {threads} threads");
                    }
                    let mut row = vec![f32::NAN; cols];
                    w.read_row(level, rows - 1, &mut row);
                    assert_eq!(row, real[(rows - 1) * cols..]);
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "must be (2, 3) elements")]
    fn a_wrong_length_is_refused() {
        Dense::new(DenseType::F16, 2, 3, &[0; 13]);
    }
}
