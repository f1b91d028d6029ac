//! Entropy-coded scalar quantization, see the crate's documentation for the formulas and measurements.

use crate::quantize::{Parts, all_row_stats, for_rows};
use crate::stats::{apply_guard, guard_exponent, lane_sum, to_f16};
use crate::{EcsqParams, Grid, QuantizeError, Rows, Scales};

/// Largest magnitude of a symbol. A row (or tensor) with an outlier beyond it gets the step that makes the outlier this symbol.
const SYMBOL_MAX: f32 = i16::MAX as f32;

pub(crate) fn quantize(params: &EcsqParams, weights: &dyn Rows) -> Result<Parts, QuantizeError> {
    check(params)?;
    let relative_step = f64::from(params.relative_step);
    match params.grid {
        Grid::Row => {
            let cols = weights.cols() as f64;
            let (symbols, scales) = for_rows(weights, |_, row, stats, symbols| {
                let rms = (stats.energy / cols).sqrt();
                Ok(Step::new(relative_step * rms, stats.abs_max, params.rounding).quantize(row, symbols).scale())
            })?;
            let (scales, scale_exponent) = to_f16(&scales);
            Ok((symbols, Scales::Row { scales, scale_exponent }))
        }
        Grid::Tensor => {
            let stats = all_row_stats(weights)?;
            let energy: f64 = stats.iter().map(|s| s.energy).sum();
            let abs_max = stats.iter().fold(0f32, |max, s| max.max(s.abs_max));
            let rms = (energy / (weights.rows() as f64 * weights.cols() as f64)).sqrt();
            let step = Step::new(relative_step * rms, abs_max, params.rounding);
            let (symbols, fits) = for_rows(weights, |_, row, _, symbols| Ok(step.quantize(row, symbols)))?;
            let zero = Fit { step: step.step, weight_symbol: 0.0, symbol_symbol: 0.0 };
            let fit = fits.iter().fold(zero, |sum, fit| Fit {
                step: step.step,
                weight_symbol: sum.weight_symbol + fit.weight_symbol,
                symbol_symbol: sum.symbol_symbol + fit.symbol_symbol,
            });
            let (scale, scale_exponent) = to_f16(&[fit.scale()]);
            Ok((symbols, Scales::Tensor { scale: scale[0], scale_exponent }))
        }
    }
}

fn check(params: &EcsqParams) -> Result<(), QuantizeError> {
    let EcsqParams { relative_step, rounding, .. } = *params;
    if !(relative_step > 0.0 && relative_step.is_finite()) {
        return Err(QuantizeError::Parameter { name: "relative_step", value: f64::from(relative_step) });
    }
    if !(0.0..=0.5).contains(&rounding) {
        return Err(QuantizeError::Parameter { name: "rounding", value: f64::from(rounding) });
    }
    Ok(())
}

/// A step ready to divide by.
#[derive(Clone, Copy)]
struct Step {
    /// In units of the weights.
    step: f64,
    /// Weights are multiplied by 2^guard first.
    guard: i32,
    /// 1 / (step * 2^guard); 0 for all-zero weights.
    inverse: f32,
    rounding: f32,
}

/// The sums of the least-squares scale over some weights: with u = w / step and symbols q, scale = step * <u, q> / <q, q>.
#[derive(Clone, Copy)]
struct Fit {
    step: f64,
    /// <u, q>
    weight_symbol: f64,
    /// <q, q>
    symbol_symbol: f64,
}

impl Fit {
    /// 0 where all symbols are.
    fn scale(&self) -> f64 {
        if self.symbol_symbol == 0.0 { 0.0 } else { self.step * self.weight_symbol / self.symbol_symbol }
    }
}

impl Step {
    fn new(step: f64, abs_max: f32, rounding: f32) -> Step {
        let step = step.max(f64::from(abs_max) / f64::from(SYMBOL_MAX));
        let guard = guard_exponent(abs_max);
        let inverse = if step == 0.0 { 0.0 } else { (1.0 / (step * 2f64.powi(guard))) as f32 };
        Step { step, guard, inverse, rounding }
    }

    /// Writes the symbols of `row`, which it may overwrite.
    fn quantize(&self, row: &mut [f32], symbols: &mut [i16]) -> Fit {
        apply_guard(row, self.guard);
        for (w, q) in row.iter_mut().zip(symbols.iter_mut()) {
            let u = *w * self.inverse;
            let magnitude = (u.abs() + self.rounding).min(SYMBOL_MAX) as i32;
            *q = (if u < 0.0 { -magnitude } else { magnitude }) as i16;
            *w = u;
        }
        let (mut weight_symbol, mut symbol_symbol) = (0.0, 0.0);
        let mut block = [0f32; 256];
        for (u, q) in row.chunks(block.len()).zip(symbols.chunks(block.len())) {
            let block = &mut block[..q.len()];
            block.iter_mut().zip(q).for_each(|(b, &q)| *b = f32::from(q));
            weight_symbol += lane_sum(u, block, |u, q| f64::from(u) * f64::from(q));
            symbol_symbol += lane_sum(block, block, |a, b| f64::from(a) * f64::from(b));
        }
        Fit { step: self.step, weight_symbol, symbol_symbol }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_by_the_offset_and_fits_the_scale() {
        let mut row = [0.0, 0.25, -0.75, 1.0, -1.5, 7.25];
        let mut q = [0i16; 6];
        // step 0.5: u = 0, 0.5, -1.5, 2, -3, 14.5
        let fit = Step::new(0.5, 7.25, 0.5).quantize(&mut row.clone(), &mut q);
        assert_eq!(q, [0, 1, -2, 2, -3, 15]);
        // <u,q> = 0.5 + 3 + 4 + 9 + 217.5 = 234; <q,q> = 1 + 4 + 4 + 9 + 225 = 243
        assert_eq!((fit.weight_symbol, fit.symbol_symbol), (234.0, 243.0));
        assert_eq!(fit.scale(), 0.5 * 234.0 / 243.0);
        Step::new(0.5, 7.25, 0.25).quantize(&mut row, &mut q);
        assert_eq!(q, [0, 0, -1, 2, -3, 14]);
    }

    #[test]
    fn an_outlier_beyond_i16_widens_the_step() {
        let mut q = [0i16; 3];
        let fit = Step::new(1.0, 65534.0, 0.5).quantize(&mut [65534.0, -2.0, 0.5], &mut q);
        assert_eq!(q, [32767, -1, 0]);
        assert_eq!(fit.step, 2.0);
    }

    #[test]
    fn extreme_magnitudes_keep_their_symbols() {
        for exponent in [-140, -120, 0, 120] {
            let unit = 2f64.powi(exponent);
            let mut row = [3.0, -1.0, 0.0, 5.0].map(|x: f64| (x * unit) as f32);
            let mut q = [0i16; 4];
            let fit = Step::new(unit, row[3], 0.5).quantize(&mut row, &mut q);
            assert_eq!(q, [3, -1, 0, 5], "2^{exponent}");
            assert_eq!(fit.scale(), unit);
        }
    }
}
