//! Symmetric absmax int4: `scale = max|w| / 7`, `symbol = round(w / scale)`, in -7..=7; one scale per row or for the tensor.
//!
//! The classic setting in which "4-bit weights have 2.2 bits of entropy": small because it is coarse. The symbols come from the
//! unrounded scale, as in GGML and MLX; halves round away from zero.

use crate::quantize::{Parts, all_row_stats, for_rows};
use crate::stats::{apply_guard, guard_exponent, to_f16};
use crate::{QuantizeError, Rows, Scales};

const SYMBOL_MAX: f64 = 7.0;

pub(crate) fn quantize_rows(weights: &dyn Rows) -> Result<Parts, QuantizeError> {
    let (symbols, scales) = for_rows(weights, |_, row, stats, symbols| {
        round(row, stats.abs_max, symbols);
        Ok(f64::from(stats.abs_max) / SYMBOL_MAX)
    })?;
    let (scales, scale_exponent) = to_f16(&scales);
    Ok((symbols, Scales::Row { scales, scale_exponent }))
}

pub(crate) fn quantize_tensor(weights: &dyn Rows) -> Result<Parts, QuantizeError> {
    let abs_max = all_row_stats(weights)?.iter().fold(0f32, |max, s| max.max(s.abs_max));
    let (symbols, _) = for_rows(weights, |_, row, _, symbols| {
        round(row, abs_max, symbols);
        Ok(())
    })?;
    let (scale, scale_exponent) = to_f16(&[f64::from(abs_max) / SYMBOL_MAX]);
    Ok((symbols, Scales::Tensor { scale: scale[0], scale_exponent }))
}

fn round(row: &mut [f32], abs_max: f32, symbols: &mut [i16]) {
    let guard = guard_exponent(abs_max);
    apply_guard(row, guard);
    let scale = f64::from(abs_max) / SYMBOL_MAX * 2f64.powi(guard);
    let inverse = if scale == 0.0 { 0.0 } else { (1.0 / scale) as f32 };
    for (q, &w) in symbols.iter_mut().zip(row.iter()) {
        let u = w * inverse;
        let magnitude = (u.abs() + 0.5).min(SYMBOL_MAX as f32) as i32;
        *q = (if u < 0.0 { -magnitude } else { magnitude }) as i16;
    }
}
