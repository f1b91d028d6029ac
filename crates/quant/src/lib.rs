//! Quantizers designed for an entropy coder: real weights in, integer *symbols* and scales out, with rate control.
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
