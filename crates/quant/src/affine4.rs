//! `affine4`: MLX's 4-bit affine quantization, bit for bit.
//!
//! Each group of 32, 64 or 128 consecutive columns has a scale and a bias: `w = scale * nibble + bias`, nibble in 0..=15. The grid
//! is placed so that the edge of larger magnitude and, nearly always, 0 are exact. All arithmetic is f32; scale and bias are stored
//! in the weights' own type after the nibbles have been chosen with their f32 values. With `min`, `max` of the group:
//!
//! ```text
//! scale = max((max - min) / 15, 1e-7);  if |min| <= |max| { scale = -scale }
//! edge  = the one of min, max of larger magnitude (max when equal)
//! q0    = rint(edge / scale);           if q0 != 0 { scale = edge / q0; bias = edge } else { bias = 0 }
//! nibble = clamp(rint((w - bias) / scale), 0, 15)
//! ```
//!
//! Source: `quantize` of MLX's CPU backend (`mlx/backend/cpu/quantized.cpp`); checked against MLX 0.32.4 by `tools/golden_quant.py`.
//! Our symbols are `nibble - 8`. MLX packs eight nibbles into a u32, the lowest first, row-major: [`pack`], [`unpack`].

use crate::quantize::{Parts, for_rows};
use crate::{Dtype, PackError, QuantizeError, QuantizedTensor, Rows, ScaleVec, Scales};
use half::{bf16, f16};

const GROUP_SIZES: [u32; 3] = [32, 64, 128];
const NIBBLE_MAX: f32 = 15.0;
const SCALE_MIN: f32 = 1e-7;
/// Nibbles in one of MLX's words.
const PER_WORD: usize = 8;

pub(crate) fn quantize(group_size: u32, weights: &dyn Rows) -> Result<Parts, QuantizeError> {
    if !GROUP_SIZES.contains(&group_size) {
        return Err(QuantizeError::UnsupportedGroupSize { group_size });
    }
    let (cols, dtype, group) = (weights.cols(), weights.dtype(), group_size as usize);
    if !cols.is_multiple_of(group) {
        return Err(QuantizeError::ColumnsNotGrouped { cols, group_size: group });
    }
    let (symbols, grids) = for_rows(weights, |row, weights, _, symbols| {
        let groups = weights.chunks_exact(group).zip(symbols.chunks_exact_mut(group)).enumerate();
        groups
            .map(|(g, (weights, symbols))| {
                let grid = quantize_group(weights, symbols);
                let stored = match dtype {
                    Dtype::F32 => grid.scale,
                    Dtype::F16 => f16::from_f32(grid.scale).to_f32(),
                    Dtype::Bf16 => bf16::from_f32(grid.scale).to_f32(),
                };
                if stored.is_finite() { Ok(grid) } else { Err(QuantizeError::ScaleOverflow { row, col: g * group }) }
            })
            .collect::<Result<Vec<Affine>, _>>()
    })?;
    let grids: Vec<Affine> = grids.into_iter().flatten().collect();
    let store = |field: fn(&Affine) -> f32| {
        let values = grids.iter().map(field);
        match dtype {
            Dtype::F32 => ScaleVec::F32(values.collect()),
            Dtype::F16 => ScaleVec::F16(values.map(|x| f16::from_f32(x).to_bits()).collect()),
            Dtype::Bf16 => ScaleVec::Bf16(values.map(|x| bf16::from_f32(x).to_bits()).collect()),
        }
    };
    Ok((symbols, Scales::Group { group_size, scales: store(|g| g.scale), biases: Some(store(|g| g.bias)) }))
}

struct Affine {
    scale: f32,
    bias: f32,
}

fn quantize_group(weights: &[f32], symbols: &mut [i16]) -> Affine {
    let (mut min, mut max) = (f32::INFINITY, f32::NEG_INFINITY);
    for &w in weights {
        min = if w < min { w } else { min };
        max = if w > max { w } else { max };
    }
    let min_is_edge = min.abs() > max.abs();
    let magnitude = ((max - min) / NIBBLE_MAX).max(SCALE_MIN);
    let (edge, mut scale) = if min_is_edge { (min, magnitude) } else { (max, -magnitude) };
    let mut bias = 0.0;
    let q0 = (edge / scale).round_ties_even();
    if q0 != 0.0 {
        scale = edge / q0;
        bias = edge;
    }
    for (q, &w) in symbols.iter_mut().zip(weights) {
        *q = rint_nibble((w - bias) / scale) - 8;
    }
    Affine { scale, bias }
}

/// `clamp(rint(x), 0, 15)`. Clamping first gives the same, and keeps x where adding 1.5 * 2^23 rounds to the nearest integer, ties
/// to even, in any vector instruction set (a call of `rint` would not vectorize on baseline x86-64).
#[inline(always)]
fn rint_nibble(x: f32) -> i16 {
    const MAGIC: f32 = 12_582_912.0;
    let rounded = x.clamp(0.0, NIBBLE_MAX) + MAGIC;
    (rounded.to_bits() - MAGIC.to_bits()) as i16
}

/// Packs symbols (-8..=7, row-major) as MLX does: nibble = symbol + 8, eight to a u32, lowest first.
///
/// # Errors
/// A symbol out of range, or a count that is not a multiple of 8.
pub fn pack(symbols: &[i16]) -> Result<Vec<u32>, PackError> {
    if !symbols.len().is_multiple_of(PER_WORD) {
        return Err(PackError::Length { what: "symbols", actual: symbols.len(), expected: symbols.len().next_multiple_of(PER_WORD) });
    }
    if let Some(index) = symbols.iter().position(|s| !(-8..=7).contains(s)) {
        return Err(PackError::SymbolRange { index, symbol: symbols[index] });
    }
    let word = |eight: &[i16]| eight.iter().rev().fold(0u32, |word, &s| word << 4 | (s + 8) as u32);
    Ok(symbols.chunks_exact(PER_WORD).map(word).collect())
}

/// The inverse of [`pack`]: eight symbols for each word.
pub fn unpack(words: &[u32]) -> Vec<i16> {
    words.iter().flat_map(|&word| (0..PER_WORD).map(move |i| (word >> (4 * i) & 15) as i16 - 8)).collect()
}

/// A tensor from MLX's parts: `words` (rows, cols / 8), `scales` and `biases` (rows, cols / group_size), all row-major.
///
/// # Errors
/// A shape that is empty, too large or not a multiple of the group; lengths that disagree with the shape; scales and biases of
/// different types.
pub fn from_packed(
    rows: usize,
    cols: usize,
    group_size: u32,
    words: &[u32],
    scales: ScaleVec,
    biases: ScaleVec,
) -> Result<QuantizedTensor, PackError> {
    let group = group_size as usize;
    let count = rows.checked_mul(cols).filter(|&n| n > 0);
    let Some(count) = count.filter(|_| GROUP_SIZES.contains(&group_size) && cols.is_multiple_of(group)) else {
        return Err(PackError::Shape { rows, cols, group_size: group });
    };
    let lengths =
        [("words", words.len(), count / PER_WORD), ("scales", scales.len(), count / group), ("biases", biases.len(), count / group)];
    if let Some(&(what, actual, expected)) = lengths.iter().find(|(_, actual, expected)| actual != expected) {
        return Err(PackError::Length { what, actual, expected });
    }
    if scales.dtype() != biases.dtype() {
        return Err(PackError::ScaleKind);
    }
    let scales = Scales::Group { group_size, scales, biases: Some(biases) };
    Ok(QuantizedTensor { rows, cols, symbols: unpack(words), scales })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_ties_to_even_and_clamps() {
        let x = [-7.0, -0.5, 0.0, 0.5, 0.50001, 1.5, 2.5, 14.5, 15.0, 15.5, 1e9];
        assert_eq!(x.map(rint_nibble), [0, 0, 0, 0, 1, 2, 2, 14, 15, 15, 15]);
    }

    #[test]
    fn packs_lowest_nibble_first() {
        let symbols = [-8, -7, -6, -5, -4, -3, -2, 7];
        assert_eq!(pack(&symbols), Ok(vec![0xf654_3210]));
        assert_eq!(unpack(&[0xf654_3210]), symbols);
        assert_eq!(pack(&[0, 8, 0, 0, 0, 0, 0, 0]), Err(PackError::SymbolRange { index: 1, symbol: 8 }));
        assert!(matches!(pack(&[0; 7]), Err(PackError::Length { actual: 7, expected: 8, .. })));
    }

    #[test]
    fn a_group_worked_by_hand() {
        // min -1, max 14: max is the edge, scale = -1, q0 = -14, bias = 14: w = 14 - nibble.
        let mut weights = [0.0f32; 32];
        weights[0] = 14.0;
        weights[1] = -1.0;
        weights[2] = 3.4;
        let mut symbols = [0i16; 32];
        let Affine { scale, bias } = quantize_group(&weights, &mut symbols);
        assert_eq!((scale, bias), (-1.0, 14.0));
        assert_eq!(symbols[..4], [0 - 8, 15 - 8, 11 - 8, 14 - 8]);
    }
}
