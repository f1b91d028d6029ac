//! Activations as int8 with one scale per segment of columns: the right-hand side of every coded linear.

use crate::level::per_level;
use crate::{Level, TILE_COLS, round_up};

/// Most columns one segment may span: `512 * 127 * (32767 + 128)` is the largest sum a segment can
/// reach with any i16 symbols, and it still fits an i32.
pub const SEGMENT_COLS_MAX: usize = 512;

/// Columns that share an activation scale when the weights have row or tensor scales.
pub const SEGMENT_COLS: usize = 128;

/// Tokens of a block, whose values lie together, so that kernels reach all of them from one address: as many sums as a kernel has registers for.
pub(crate) const BLOCK_TOKENS: usize = 8;

/// int8 activations. `x[t, c]` is about `q[t, c] * scales[t, c / segment]`.
///
/// Per segment, `scale = absmax / 127` and `q = round_half_even(x * (127 / absmax))` in f32; a
/// segment whose absmax is below 1e-36 is zero; one that holds a NaN or an infinity has the scale
/// NaN, so that the fault reaches the output.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Activations {
    tokens: usize,
    cols: usize,
    segment: usize,
    /// Blocks of up to [`BLOCK_TOKENS`] tokens, (column steps, tokens of the block) each; columns beyond `cols` are 0.
    q: Vec<[i8; TILE_COLS]>,
    /// Of the same blocks, (segments, tokens of the block) each.
    scales: Vec<f32>,
    /// As the scales: the sum of the segment's `q`.
    sums: Vec<i32>,
    rows: Rows,
}

/// One token behind the other, on the way to blocks.
#[derive(Clone, Debug, Default, PartialEq)]
struct Rows {
    /// (tokens, column steps)
    q: Vec<[i8; TILE_COLS]>,
    /// (tokens, segments)
    scales: Vec<f32>,
    /// (tokens, segments)
    sums: Vec<i32>,
}

/// Some tokens of [`Activations`].
#[derive(Clone, Copy, Debug)]
pub struct TokenBlock<'a> {
    /// How many.
    pub tokens: usize,
    /// (column steps, tokens) of 4 columns each.
    pub q: &'a [[i8; TILE_COLS]],
    /// (segments, tokens)
    pub scales: &'a [f32],
    /// (segments, tokens): the sums of the segments' `q`.
    pub sums: &'a [i32],
}

impl Activations {
    /// Quantizes `x`, (tokens, cols), with `segment` columns to a scale.
    ///
    /// # Panics
    /// If `x.len() != tokens * cols`, or `segment` is not a multiple of 4 in `4..=`[`SEGMENT_COLS_MAX`].
    pub fn quantize(level: Level, x: &[f32], tokens: usize, cols: usize, segment: usize) -> Activations {
        let mut out = Activations::default();
        out.requantize(level, x, tokens, cols, segment);
        out
    }

    /// As [`Activations::quantize`], into the buffers that are already there.
    ///
    /// # Panics
    /// As [`Activations::quantize`].
    pub fn requantize(&mut self, level: Level, x: &[f32], tokens: usize, cols: usize, segment: usize) {
        assert_eq!(x.len(), tokens * cols, "x must be (tokens, cols)");
        assert!(
            segment.is_multiple_of(4) && (4..=SEGMENT_COLS_MAX).contains(&segment),
            "a segment is a multiple of 4 columns up to {SEGMENT_COLS_MAX}, not {segment}"
        );
        let segments = cols.div_ceil(segment);
        let steps = cols.div_ceil(TILE_COLS);
        (self.tokens, self.cols, self.segment) = (tokens, cols, segment);
        // One token is a block as it is.
        let Rows { q, scales, sums } = &mut self.rows;
        let (q, scales, sums) = if tokens == 1 { (&mut self.q, &mut self.scales, &mut self.sums) } else { (q, scales, sums) };
        q.clear();
        q.resize(tokens * steps, [0; TILE_COLS]);
        scales.resize(tokens * segments, 0.0);
        sums.resize(tokens * segments, 0);
        if cols > 0 {
            quantize_rows(level, x, cols, segment, q.as_flattened_mut(), scales, sums);
        }
        if tokens != 1 {
            interleave(&self.rows.q, steps, &mut self.q);
            interleave(&self.rows.scales, segments, &mut self.scales);
            interleave(&self.rows.sums, segments, &mut self.sums);
        }
    }

    /// Rows of the input.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Columns of the input, without padding.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Columns that share a scale.
    pub fn segment(&self) -> usize {
        self.segment
    }

    /// Segments of a token.
    pub fn segments(&self) -> usize {
        if self.segment == 0 { 0 } else { self.cols.div_ceil(self.segment) }
    }

    /// The tokens in blocks, in order, all but the last of eight.
    pub fn blocks(&self) -> impl Iterator<Item = TokenBlock<'_>> {
        (0..self.tokens).step_by(BLOCK_TOKENS).map(|first| self.block(first))
    }

    /// The only token.
    ///
    /// # Panics
    /// If there are none or more.
    pub fn only(&self) -> TokenBlock<'_> {
        assert_eq!(self.tokens, 1, "for one token");
        self.block(0)
    }

    /// The block that begins with the token `first`.
    fn block(&self, first: usize) -> TokenBlock<'_> {
        let tokens = BLOCK_TOKENS.min(self.tokens - first);
        let (steps, segments) = (self.cols.div_ceil(TILE_COLS), self.segments());
        let of = first * segments..(first + tokens) * segments;
        TokenBlock { tokens, q: &self.q[first * steps..][..tokens * steps], scales: &self.scales[of.clone()], sums: &self.sums[of] }
    }
}

/// Blocks of `rows`, (tokens, len), each as (len, tokens of the block).
fn interleave<T: Copy>(rows: &[T], len: usize, out: &mut Vec<T>) {
    out.clear();
    for block in rows.chunks(BLOCK_TOKENS * len.max(1)) {
        for i in 0..len {
            out.extend(block[i..].iter().step_by(len));
        }
    }
}

per_level! {
    fn quantize_rows(x: &[f32], cols: usize, segment: usize, q: &mut [i8], scales: &mut [f32], sums: &mut [i32]) {
        // 1.5 * 2^23: adding it leaves the integer, rounded half to even, in the low bits of the mantissa.
        const MAGIC: f32 = 12_582_912.0;
        let segments = cols.div_ceil(segment);
        let rows = x.chunks_exact(cols).zip(q.chunks_exact_mut(round_up(cols, 4)));
        for ((x, q), (scales, sums)) in rows.zip(scales.chunks_exact_mut(segments).zip(sums.chunks_exact_mut(segments))) {
            let parts = x.chunks(segment).zip(q.chunks_mut(segment));
            for ((x, q), (scale, sum)) in parts.zip(scales.iter_mut().zip(sums.iter_mut())) {
                // Compared as integers, so that a NaN is the greatest and the result does not
                // depend on the order.
                let bits = x.iter().fold(0u32, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
                let absmax = f32::from_bits(bits);
                if bits >= f32::INFINITY.to_bits() || absmax < 1e-36 {
                    *scale = if absmax < 1e-36 { 0.0 } else { f32::NAN };
                    *sum = 0;
                    q.fill(0);
                    continue;
                }
                let inverse = 127.0 / absmax;
                let mut total = 0i32;
                for (x, q) in x.iter().zip(q.iter_mut()) {
                    let v = (x * inverse + MAGIC).to_bits() as i32 - MAGIC.to_bits() as i32;
                    *q = v as i8;
                    total += v;
                }
                *scale = absmax / 127.0;
                *sum = total;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_by_hand() {
        // absmax 127: the values are the inputs, rounded half to even.
        let x = [127.0f32, -63.5, 2.5, 0.5, 0.0, 0.0];
        let a = Activations::quantize(Level::Scalar, &x, 1, 6, 4);
        assert_eq!(a.only().q, [[127, -64, 2, 0], [0; 4]]);
        assert_eq!(a.only().sums, [65, 0]);
        assert_eq!(a.only().scales, [1.0, 0.0]);
    }

    #[test]
    fn faults_become_nan_scales_and_tiny_segments_zero() {
        let x = [1.0, f32::NAN, 0.0, 0.0, f32::INFINITY, 1.0, 2.0, 3.0, 1e-38, 0.0, 0.0, 0.0];
        let a = Activations::quantize(Level::best(), &x, 1, 12, 4);
        let TokenBlock { q, scales, .. } = a.only();
        assert!(scales[0].is_nan() && scales[1].is_nan());
        assert_eq!(scales[2], 0.0);
        assert!(q.iter().all(|q| *q == [0; 4]));
    }

    /// Blocks hold what each token alone has.
    #[test]
    fn blocks_interleave_tokens() {
        let x: Vec<f32> = (0..19 * 70).map(|i| ((i * 7919 % 1000) as f32 - 500.0) / 77.0).collect();
        for tokens in [0, 1, 2, 7, 8, 9, 16, 19] {
            let all = Activations::quantize(Level::best(), &x[..tokens * 70], tokens, 70, 32);
            let widths: Vec<usize> = all.blocks().map(|block| block.tokens).collect();
            assert_eq!(widths.iter().sum::<usize>(), tokens);
            assert!(widths.iter().rev().skip(1).all(|width| *width == BLOCK_TOKENS));
            for (first, block) in (0..).step_by(BLOCK_TOKENS).zip(all.blocks()) {
                for t in 0..block.tokens {
                    let one = Activations::quantize(Level::best(), &x[(first + t) * 70..][..70], 1, 70, 32);
                    let TokenBlock { q, scales, sums, .. } = one.only();
                    assert!(block.q[t..].iter().step_by(block.tokens).eq(q));
                    assert!(block.scales[t..].iter().step_by(block.tokens).eq(scales));
                    assert!(block.sums[t..].iter().step_by(block.tokens).eq(sums));
                }
            }
        }
    }

    #[test]
    fn levels_agree_on_every_tail() {
        let x: Vec<f32> = (0..3 * 301).map(|i| ((i * 7919 % 1000) as f32 - 500.0) / 77.0).collect();
        for cols in (1..=301).step_by(7) {
            let want = Activations::quantize(Level::Scalar, &x[..3 * cols], 3, cols, 32);
            for level in Level::available() {
                assert_eq!(Activations::quantize(level, &x[..3 * cols], 3, cols, 32), want, "{level} {cols}");
            }
        }
    }
}
