//! The quantizers' common driver: which scheme, which threads, which errors.
//!
//! Rows are cut into tasks of whole rows. A task reads a row into its own buffer, so no f32 copy of the tensor exists, and writes
//! only its own rows; sums over rows are taken in row order afterwards. The result therefore does not depend on the number of threads.

use crate::stats::{RowStats, row_stats};
use crate::{Plan, QuantizeError, QuantizedTensor, Rows, Scales, affine4, ecsq, int4, q4_0};
use rayon::prelude::*;

/// Weights a task takes, rounded up to whole rows: long enough to hide the hand-over, short enough to spread.
const TASK_WEIGHTS: usize = 1 << 16;

/// Quantizes a tensor, rows in parallel on the current rayon pool; the result does not depend on the number of threads.
///
/// # Errors
/// The first weight that is not finite (in row-major order), a shape the scheme refuses, a scale that does not fit its float type,
/// a parameter out of range.
pub fn quantize(plan: &Plan, weights: &dyn Rows) -> Result<QuantizedTensor, QuantizeError> {
    check_shape(weights)?;
    let (symbols, scales) = match plan {
        Plan::Ecsq(params) => ecsq::quantize(params, weights)?,
        Plan::Affine4 { group_size } => affine4::quantize(*group_size, weights)?,
        Plan::Q4_0 => q4_0::quantize(weights)?,
        Plan::Int4Row => int4::quantize_rows(weights)?,
        Plan::Int4Tensor => int4::quantize_tensor(weights)?,
    };
    Ok(QuantizedTensor { rows: weights.rows(), cols: weights.cols(), symbols, scales })
}

/// Symbols and scales: what a scheme's `quantize` returns.
pub(crate) type Parts = (Vec<i16>, Scales);

pub(crate) fn check_shape(weights: &dyn Rows) -> Result<(), QuantizeError> {
    let (rows, cols) = (weights.rows(), weights.cols());
    match rows.checked_mul(cols) {
        Some(n) if n > 0 && n <= isize::MAX as usize / 4 => Ok(()),
        _ => Err(QuantizeError::Shape { rows, cols }),
    }
}

/// Quantizes every row: `quantize_row(row index, weights, statistics, symbols)` writes the row's symbols and returns what is to be
/// known about it. Returns all symbols (rows, cols) and the rows' values in order.
pub(crate) fn for_rows<T: Send>(
    weights: &dyn Rows,
    quantize_row: impl Fn(usize, &mut [f32], RowStats, &mut [i16]) -> Result<T, QuantizeError> + Sync,
) -> Result<(Vec<i16>, Vec<T>), QuantizeError> {
    let (rows, cols) = (weights.rows(), weights.cols());
    let task_rows = TASK_WEIGHTS.div_ceil(cols);
    let mut symbols = vec![0i16; rows * cols];
    let tasks: Vec<Result<Vec<T>, QuantizeError>> = symbols
        .par_chunks_mut(task_rows * cols)
        .enumerate()
        .map_init(
            || vec![0f32; cols],
            |buffer, (task, symbols)| {
                symbols
                    .chunks_exact_mut(cols)
                    .enumerate()
                    .map(|(i, symbols)| {
                        let row = task * task_rows + i;
                        weights.read(row, buffer);
                        let stats = row_stats(row, buffer)?;
                        quantize_row(row, buffer, stats, symbols)
                    })
                    .collect()
            },
        )
        .collect();
    // The first error in row order, whichever thread met its own first.
    let mut values = Vec::with_capacity(rows);
    for task in tasks {
        values.extend(task?);
    }
    Ok((symbols, values))
}

/// Statistics of all rows, in row order.
pub(crate) fn all_row_stats(weights: &dyn Rows) -> Result<Vec<RowStats>, QuantizeError> {
    let stats: Vec<Result<RowStats, QuantizeError>> = (0..weights.rows())
        .into_par_iter()
        .with_min_len(TASK_WEIGHTS.div_ceil(weights.cols()))
        .map_init(
            || vec![0f32; weights.cols()],
            |buffer, row| {
                weights.read(row, buffer);
                row_stats(row, buffer)
            },
        )
        .collect();
    stats.into_iter().collect()
}

/// Signal-to-quantization-noise ratio in dB: `10 log10(sum w^2 / sum (w - w')^2)`, with w' from
/// [`QuantizedTensor::dequantize_row`]. Infinite when nothing is lost, also for an all-zero tensor.
///
/// # Panics
/// If the shapes differ.
pub fn sqnr_db(weights: &dyn Rows, tensor: &QuantizedTensor) -> f64 {
    assert_eq!((weights.rows(), weights.cols()), (tensor.rows, tensor.cols), "shapes of the weights and of the tensor");
    let cols = tensor.cols;
    let rows: Vec<(f64, f64)> = (0..tensor.rows)
        .into_par_iter()
        .map_init(
            || (vec![0f32; cols], vec![0f32; cols]),
            |(original, restored), row| {
                weights.read(row, original);
                tensor.dequantize_row(row, restored);
                original.iter().zip(restored.iter()).fold((0.0, 0.0), |(signal, noise), (&w, &r)| {
                    let (w, r) = (f64::from(w), f64::from(r));
                    (signal + w * w, noise + (w - r) * (w - r))
                })
            },
        )
        .collect();
    let (signal, noise) = rows.iter().fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
    if noise == 0.0 { f64::INFINITY } else { 10.0 * (signal / noise).log10() }
}
