//! `q4_0`: GGML's blocks, value for value.
//!
//! A block of 32 consecutive columns has one fp16 scale d: `w = d * (nibble - 8)`, nibble in 0..=15. With `m` the weight of largest
//! magnitude (the first of equals), in f32:
//!
//! ```text
//! d = m / -8;  id = d != 0 ? 1 / d : 0;  nibble = min(15, trunc(w * id + 8.5));  stored d = fp16(d)
//! ```
//!
//! so the extreme weight is always nibble 0 and exact up to the fp16 rounding. Source: `quantize_row_q4_0_ref` in llama.cpp's
//! `ggml/src/ggml-quants.c`, multiply and add rounded separately. Golden vectors: an independent NumPy form in `tools/golden_quant.py`.
//! (gguf-py agrees but for the sign of d in an all-zero block, which is the C code's here.) Where d is so small that 1/d overflows (|m| < 2^-125), GGML computes with infinity; we store 0. Our symbols are `nibble - 8`.
//!
//! Layout of a block ([`pack`], [`unpack`]), 18 bytes: d as little-endian fp16, then 16 bytes of which byte j holds column j in its
//! low nibble and column j + 16 in its high nibble.

use crate::quantize::{Parts, for_rows};
use crate::{PackError, QuantizeError, QuantizedTensor, Rows, ScaleVec, Scales};
use half::f16;

/// Weights in a block.
pub const BLOCK: usize = 32;
/// Bytes of a block.
pub const BLOCK_BYTES: usize = 18;

pub(crate) fn quantize(weights: &dyn Rows) -> Result<Parts, QuantizeError> {
    let cols = weights.cols();
    if !cols.is_multiple_of(BLOCK) {
        return Err(QuantizeError::ColumnsNotGrouped { cols, group_size: BLOCK });
    }
    let (symbols, scales) = for_rows(weights, |row, weights, _, symbols| {
        let blocks = weights.chunks_exact(BLOCK).zip(symbols.chunks_exact_mut(BLOCK)).enumerate();
        blocks
            .map(|(b, (weights, symbols))| {
                let d = f16::from_f32(quantize_block(weights, symbols));
                if d.is_finite() { Ok(d.to_bits()) } else { Err(QuantizeError::ScaleOverflow { row, col: b * BLOCK }) }
            })
            .collect::<Result<Vec<u16>, _>>()
    })?;
    let scales = ScaleVec::F16(scales.into_iter().flatten().collect());
    Ok((symbols, Scales::Group { group_size: BLOCK as u32, scales, biases: None }))
}

fn quantize_block(weights: &[f32], symbols: &mut [i16]) -> f32 {
    let (mut magnitude, mut extreme) = (0f32, 0f32);
    for &w in weights {
        if w.abs() > magnitude {
            (magnitude, extreme) = (w.abs(), w);
        }
    }
    let d = extreme / -8.0;
    let inverse = if d != 0.0 && (1.0 / d).is_finite() { 1.0 / d } else { 0.0 };
    for (q, &w) in symbols.iter_mut().zip(weights) {
        *q = ((w * inverse + 8.5) as i32).min(15) as i16 - 8;
    }
    d
}

/// Packs a `q4_0` tensor into GGML's 18-byte blocks, row-major.
///
/// # Errors
/// Scales that are not fp16 per 32 columns without biases, a symbol outside -8..=7, or fields that disagree with the shape.
pub fn pack(tensor: &QuantizedTensor) -> Result<Vec<u8>, PackError> {
    let Scales::Group { group_size, scales: ScaleVec::F16(scales), biases: None } = &tensor.scales else {
        return Err(PackError::ScaleKind);
    };
    if *group_size as usize != BLOCK {
        return Err(PackError::ScaleKind);
    }
    let count = weight_count(tensor.rows, tensor.cols)?;
    check_length("symbols", tensor.symbols.len(), count)?;
    check_length("scales", scales.len(), count / BLOCK)?;
    if let Some(index) = tensor.symbols.iter().position(|s| !(-8..=7).contains(s)) {
        return Err(PackError::SymbolRange { index, symbol: tensor.symbols[index] });
    }
    let mut blocks = Vec::with_capacity(count / BLOCK * BLOCK_BYTES);
    for (symbols, scale) in tensor.symbols.chunks_exact(BLOCK).zip(scales) {
        blocks.extend(scale.to_le_bytes());
        let (low, high) = symbols.split_at(BLOCK / 2);
        blocks.extend(low.iter().zip(high).map(|(&l, &h)| (l + 8) as u8 | ((h + 8) as u8) << 4));
    }
    Ok(blocks)
}

/// The inverse of [`pack`]. Scales may be any fp16 value, as the blocks have them.
///
/// # Errors
/// A shape that is empty, too large or not a multiple of 32 columns; a length that disagrees with it.
pub fn unpack(rows: usize, cols: usize, blocks: &[u8]) -> Result<QuantizedTensor, PackError> {
    let count = weight_count(rows, cols)?;
    check_length("blocks, bytes", blocks.len(), count / BLOCK * BLOCK_BYTES)?;
    let mut symbols = Vec::with_capacity(count);
    let mut scales = Vec::with_capacity(count / BLOCK);
    for block in blocks.chunks_exact(BLOCK_BYTES) {
        scales.push(u16::from_le_bytes([block[0], block[1]]));
        symbols.extend(block[2..].iter().map(|b| i16::from(b & 15) - 8));
        symbols.extend(block[2..].iter().map(|b| i16::from(b >> 4) - 8));
    }
    let scales = Scales::Group { group_size: BLOCK as u32, scales: ScaleVec::F16(scales), biases: None };
    Ok(QuantizedTensor { rows, cols, symbols, scales })
}

fn weight_count(rows: usize, cols: usize) -> Result<usize, PackError> {
    let count = rows.checked_mul(cols).filter(|&n| n > 0 && cols.is_multiple_of(BLOCK));
    count.ok_or(PackError::Shape { rows, cols, group_size: BLOCK })
}

fn check_length(what: &'static str, actual: usize, expected: usize) -> Result<(), PackError> {
    if actual == expected { Ok(()) } else { Err(PackError::Length { what, actual, expected }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_worked_by_hand() {
        let mut weights = [0.0f32; BLOCK];
        weights[..6].copy_from_slice(&[-8.0, 8.0, 1.5, -0.5, -0.51, 7.49]);
        let mut symbols = [0i16; BLOCK];
        // the extreme is -8 (first of equals): d = 1
        assert_eq!(quantize_block(&weights, &mut symbols), 1.0);
        assert_eq!(symbols[..7], [-8, 7, 2, 0, -1, 7, 0]);
        assert_eq!(quantize_block(&[0.0; BLOCK], &mut symbols), 0.0);
        assert_eq!(symbols, [0; BLOCK]);
    }

    #[test]
    fn block_bytes() {
        let mut symbols = vec![0i16; BLOCK];
        symbols[0] = -8;
        symbols[16] = 7;
        symbols[31] = -3;
        let scales = Scales::Group { group_size: 32, scales: ScaleVec::F16(vec![0x3c01]), biases: None };
        let tensor = QuantizedTensor { rows: 1, cols: 32, symbols, scales };
        let bytes = pack(&tensor).unwrap();
        assert_eq!(bytes[..4], [0x01, 0x3c, 0xf0, 0x88]);
        assert_eq!(bytes[17], 0x58);
        assert_eq!(unpack(1, 32, &bytes), Ok(tensor));
        assert!(matches!(unpack(1, 32, &bytes[1..]), Err(PackError::Length { actual: 17, expected: 18, .. })));
        assert!(matches!(unpack(1, 33, &bytes), Err(PackError::Shape { .. })));
        assert!(matches!(unpack(usize::MAX, 32, &bytes), Err(PackError::Shape { .. })));
    }
}
