//! Quantizers designed for an entropy coder: real weights in, integer *symbols* and scales out, with rate control.
//!
//! | [`Scheme`] | symbols | scales | result |
//! |---|---|---|---|
//! | `ecsq` | any i16 | fp16, per row or tensor | the recommended one: any size in bits per weight |
//! | `affine4` | -8..=7 | scale and bias per 32, 64 or 128 columns, in the weights' type | MLX's, bit for bit: [`affine4`] |
//! | `q4_0` | -8..=7 | fp16 per 32 columns | GGML's, bit for bit: [`q4_0`] |
//! | `int4-row`, `int4-tensor` | -7..=7 | fp16, `max abs(w) / 7` | the classic coarse setting, for comparison |
//!
//! ```
//! use tersor_quant::*;
//! let weights: Vec<f32> = (0..64 * 256).map(|i| ((i * i) as f32).sin() * 0.02).collect();
//! let rows = SliceRows::new(&weights, 256, Dtype::Bf16); // or any `Rows`, converted row by row
//! let model = RateModel::measure(&rows)?;
//! let tensors = [RateTensor::recommended(&model, Role::Linear)];
//! let target = RateTarget { bpw: 3.5, fixed_bits: 0.0, fixed_weights: 0.0, rounding: DEFAULT_ROUNDING };
//! let solution = solve_step(&tensors, &target, &entropy_cost_bits).expect("3.5 bits per weight are in reach");
//! let tensor = quantize(&Plan::Ecsq(solution.params[0]), &rows)?;
//! assert!(sqnr_db(&rows, &tensor) > 17.0);
//! # Ok::<(), QuantizeError>(())
//! ```
//!
//! # `ecsq`: entropy-coded scalar quantization
//!
//! ```text
//! step   = relative_step * rms        rms of the row (Grid::Row) or of the tensor (Grid::Tensor)
//! symbol = sign(w) * floor(|w| / step + rounding)
//! scale  = <w, symbol> / <symbol, symbol>        over the row or the tensor; 0 where all symbols are 0
//! w'     = fp16(scale / 2^scale_exponent) * 2^scale_exponent * symbol
//! ```
//!
//! A uniform grid without limits, coded at its entropy, is 0.254 bit above the rate-distortion bound at high rate for every smooth
//! density (H. Gish, J. Pierce, "Asymptotically efficient quantizing", IEEE Trans. Inf. Theory 14, 1968), and no scalar quantizer does
//! better there; outliers are rare symbols and need no clipping. The quotient is taken as `w * f32(1 / step)`. Only where an outlier
//! would leave i16 is the row's (tensor's) step widened to `max abs(w) / 32767`. `scale_exponent` is 0 unless a scale would be subnormal
//! or infinite in fp16.
//!
//! ## Why one scale replaces a centroid table
//! The best value for a symbol is the mean of the weights it stands for. For a density f and steps small against it this centroid is
//! `q step + step^2/12 * f'(q step)/f(q step) + O(step^4)`. Where f is Gaussian with variance s^2, `f'/f = -w/s^2`, so the centroid is
//! `q step (1 - step^2 / 12 s^2)`: proportional to q, and what least squares finds. Trained weights are nearly Gaussian within a row.
//! Measured, whole tables (one mean for each symbol of each tensor) against the least-squares scale, real weights[^1], signal-to-noise ratio:
//!
//! | bits per weight | 2 | 2.5 | 3 | 3.5 | 4 |
//! |---|---|---|---|---|---|
//! | least-squares scale, dB | 10.350 | 13.360 | 16.372 | 19.382 | 22.391 |
//! | centroid tables add, dB, at equal size | 0.003 | 0.001 | 0.001 | 0.001 | 0.000 |
//!
//! so tables are not stored.
//!
//! ## Rounding
//! For Laplacian sources a dead zone (rounding below 0.5) gains at low rates, as centroids lean towards zero by a constant
//! (G. Sullivan, "Efficient scalar quantization of exponential and Laplacian random variables", IEEE Trans. Inf. Theory 42, 1996). By the
//! derivation above a Gaussian gains nothing. Measured[^1], bits per weight gained at equal SQNR over rounding 0.5:
//!
//! | rounding | 2 bits | 3 bits | 3.75 bits |
//! |---|---|---|---|
//! | 0.46 | -0.0024 | -0.0037 | -0.0042 |
//! | 0.42 | -0.0093 | -0.0145 | -0.0168 |
//! | 0.38 | -0.0200 | -0.0317 | -0.0368 |
//!
//! KL agrees (below). Hence [`DEFAULT_ROUNDING`] is 0.5; the parameter stays for weights that are not Gaussian.
//!
//! ## Row or tensor step
//! At equal relative steps both grids have the same squared error, `step^2 / 12` on average. One step for the tensor costs no more bits
//! if the rows are Gaussian: their mixture, of the same variance, has at most the Gaussian's entropy. Measured[^1] it saves
//! 0.028 to 0.030 bit at equal squared error, part of it the row scales. [`RateModel::cheapest_grid`] decides for each tensor. But rows of an
//! embedding are not equally used: there the row step is better by KL although it is worse by squared error, so
//! [`RateTensor::recommended`] fixes it.
//!
//! ## Finer steps for some tensors
//! Mean KL against bf16[^2], all at the same size of the whole model (entropy and scales):
//!
//! | | 3.75 bpw | 3.0 bpw | 2.25 bpw |
//! |---|---|---|---|
//! | row steps | 0.0339 | 0.0974 | 0.3136 |
//! | tensor steps | 0.0369 | 0.1086 | 0.3601 |
//! | embedding by row, others by tensor | 0.0317 | 0.0943 | 0.3021 |
//! | the same, embedding at 0.65 | 0.0295 | 0.0842 | 0.2736 |
//! | the same, also values at 0.7 (**recommended**) | 0.0273 | 0.0810 | 0.2637 |
//! | recommended, but rounding 0.42 | 0.0299 | 0.0842 | not measured |
//! | recommended multipliers, row steps | 0.0274 | 0.0817 | not measured |
//!
//! (MLX's affine4 g64 at 4.5 bpw: 0.0332.) KL falls fourfold a bit, so the recommendation is worth 0.16 bit at 3.75 bpw (0.13 at 3.0 and 2.25) over row steps
//! everywhere. Repeating such a measurement with other weights moves a figure by about 3 %; smaller differences mean nothing. Multipliers
//! between 0.55 and 0.7 for the embedding (also the head in this model) and between 0.6 and 0.8 for the value projections were within that
//! of each other; finer `o_proj`, finer `down_proj` and coarser `q_proj`, `k_proj` gained nothing.
//!
//! # Threads and memory
//! Rows are read one at a time into a buffer of a task; results, errors included, do not depend on the number of threads. A weight that is
//! NaN or infinite is refused by row and column. One thread of a Zen 5 core, baseline x86-64 (`--example quantize_rates`), million weights a second: ecsq 360 by row and
//! 290 by tensor, affine4 365, q4_0 280, int4-row 430; measuring a rate model 250.
//!
//! [^1]: `shared/data/books-52m`, the embedding and layers 0, 5, 10, row step unless said: `measure/quality.py rate`.
//! [^2]: the same model, all tensors, 12 windows of 512 tokens of `valid_books.txt`: `measure/quality.py kl`.
#![forbid(unsafe_code)]

mod ecsq;
mod error;
mod int4;
mod quantize;
mod rate;
mod rows;
mod scheme;
mod stats;
mod tensor;

pub mod affine4;
pub mod q4_0;

pub use error::{PackError, QuantizeError, SolveError};
pub use quantize::{quantize, sqnr_db};
pub use rate::{
    EMBEDDING_STEP_MULTIPLIER, GridChoice, RateModel, RateTarget, RateTensor, Role, Solution, SymbolCounts, VALUE_STEP_MULTIPLIER,
    entropy_cost_bits, solve_step,
};
pub use rows::{Dtype, Rows, SliceRows};
pub use scheme::{DEFAULT_ROUNDING, EcsqParams, Grid, Plan, Scheme, UnknownScheme};
pub use tensor::{QuantizedTensor, ScaleVec, Scales};
