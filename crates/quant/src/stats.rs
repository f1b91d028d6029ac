//! One pass over a row: is it finite, how large, how energetic; and the fp16 form of a set of scales.

use crate::QuantizeError;
use half::f16;

/// What a scheme needs to know about a row before it chooses a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct RowStats {
    /// Largest magnitude.
    pub abs_max: f32,
    /// Sum of squares.
    pub energy: f64,
}

/// Partial sums kept side by side: fixed, so that the order of additions is the same on every machine, and wide enough for the
/// compiler to use vectors.
const LANES: usize = 16;

/// `sum(f(i))` over `0..len` in [`LANES`] partial sums.
#[inline(always)]
pub(crate) fn lane_sum(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f64) -> f64 {
    let mut lanes = [0f64; LANES];
    let (a_blocks, b_blocks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (a_rest, b_rest) = (a_blocks.remainder(), b_blocks.remainder());
    for (a, b) in a_blocks.zip(b_blocks) {
        for (lane, (&a, &b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane += f(a, b);
        }
    }
    for (lane, (&a, &b)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lane += f(a, b);
    }
    lanes.iter().sum()
}

/// Statistics of row `row`, or its first weight that is not finite.
pub(crate) fn row_stats(row: usize, weights: &[f32]) -> Result<RowStats, QuantizeError> {
    // Bits of |w| order as integers, with infinity and NaN above all finite values: one integer maximum finds both.
    let abs_bits = weights.iter().fold(0u32, |max, w| max.max(w.to_bits() & 0x7fff_ffff));
    let abs_max = f32::from_bits(abs_bits);
    if !abs_max.is_finite() {
        let (col, &value) = weights.iter().enumerate().find(|(_, w)| !w.is_finite()).expect("one is not finite");
        return Err(QuantizeError::NotFinite { row, col, value });
    }
    Ok(RowStats { abs_max, energy: lane_sum(weights, weights, |w, _| f64::from(w) * f64::from(w)) })
}

/// `floor(log2(x))` of a positive, normal x, from its bits: the same on every machine.
fn binary_exponent(x: f64) -> i32 {
    (x.to_bits() >> 52 & 0x7ff) as i32 - 1023
}

/// The power of two by which weights are multiplied before f32 arithmetic: 0 unless their magnitude is so extreme that a step or
/// its reciprocal would leave f32's normal range.
pub(crate) fn guard_exponent(abs_max: f32) -> i32 {
    let exponent = binary_exponent(f64::from(abs_max));
    if abs_max == 0.0 || exponent.abs() < 60 { 0 } else { -exponent }
}

/// Multiplies by `2^exponent`, exactly but for weights that underflow.
pub(crate) fn apply_guard(weights: &mut [f32], exponent: i32) {
    if exponent != 0 {
        let factor = 2f64.powi(exponent);
        weights.iter_mut().for_each(|w| *w = (f64::from(*w) * factor) as f32);
    }
}

/// Scales as fp16 bits and one shared exponent: real scale = fp16 * 2^exponent.
///
/// The exponent is 0 if every scale that is not 0 is normal in fp16 (2^-14..65504); otherwise it puts the largest into
/// [2^14, 2^15), so that 28 binades below it keep fp16's full precision.
pub(crate) fn to_f16(scales: &[f64]) -> (Vec<u16>, i8) {
    let (mut least, mut most) = (f64::INFINITY, 0f64);
    for &s in scales.iter().filter(|&&s| s != 0.0) {
        least = least.min(s);
        most = most.max(s);
    }
    let normal = least >= f16::MIN_POSITIVE.to_f64() && most <= f16::MAX.to_f64();
    let exponent = if most == 0.0 || normal { 0 } else { (binary_exponent(most) - 14).clamp(-128, 127) };
    let factor = 2f64.powi(-exponent);
    (scales.iter().map(|&s| f16::from_f64(s * factor).to_bits()).collect(), exponent as i8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_first_weight_that_is_not_finite() {
        let mut w = vec![1.0f32; 40];
        w[33] = f32::NEG_INFINITY;
        w[35] = f32::NAN;
        assert_eq!(row_stats(7, &w), Err(QuantizeError::NotFinite { row: 7, col: 33, value: f32::NEG_INFINITY }));
        w[33] = -3.0;
        w[35] = 2.0;
        assert_eq!(row_stats(7, &w), Ok(RowStats { abs_max: 3.0, energy: 38.0 + 9.0 + 4.0 }));
    }

    #[test]
    fn f16_exponent_is_used_only_when_needed() {
        assert_eq!(to_f16(&[1.0, 0.0, 0.5]), (vec![0x3c00, 0, 0x3800], 0));
        assert_eq!(to_f16(&[0.0, 0.0]), (vec![0, 0], 0));
        // 2^-20 would be subnormal: it becomes 2^14 * 2^-34.
        let (bits, exponent) = to_f16(&[2f64.powi(-20), 1.5 * 2f64.powi(-40)]);
        assert_eq!(exponent, -34);
        assert_eq!(bits.iter().map(|&b| f16::from_bits(b).to_f64()).collect::<Vec<_>>(), [16384.0, 1.5 * 2f64.powi(-6)]);
        let (bits, exponent) = to_f16(&[2f64.powi(100)]);
        assert_eq!((f16::from_bits(bits[0]).to_f64(), exponent), (16384.0, 86));
    }
}
