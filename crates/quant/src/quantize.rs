//! The quantizers' common driver.
use crate::{Plan, QuantizeError, QuantizedTensor, Rows};

/// Quantizes a tensor, rows in parallel on the current rayon pool; the result does not depend on the number of threads.
///
/// # Errors
/// See [`QuantizeError`].
pub fn quantize(_plan: &Plan, _weights: &dyn Rows) -> Result<QuantizedTensor, QuantizeError> {
    todo!()
}

/// Signal-to-quantization-noise ratio in dB: `10 log10(sum w^2 / sum (w - w')^2)`; infinite when nothing is lost.
///
/// # Panics
/// If the shapes differ.
pub fn sqnr_db(_weights: &dyn Rows, _tensor: &QuantizedTensor) -> f64 {
    todo!()
}
