//! Rate control for `ecsq`.
use crate::{Grid, QuantizeError, Rows, SolveError};

/// Step multiplier recommended for the embedding and the head.
pub const EMBEDDING_STEP_MULTIPLIER: f64 = 0.7;

/// Expected number of each symbol, ascending by symbol; counts may be fractional.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct SymbolCounts {
    /// (symbol, expected count > 0), ascending.
    pub counts: Vec<(i16, f64)>,
}

impl SymbolCounts {
    /// Sum of the counts.
    pub fn total(&self) -> f64 {
        todo!()
    }
    /// Empirical entropy in bits per symbol.
    pub fn entropy_bits(&self) -> f64 {
        todo!()
    }
}

/// What one pass over a tensor must remember to tell its entropy at any step.
#[derive(Clone, Debug)]
pub struct RateModel {
    _private: (),
}

impl RateModel {
    /// Measures a tensor, in parallel on the current rayon pool.
    ///
    /// # Errors
    /// [`QuantizeError::NotFinite`], [`QuantizeError::Shape`].
    pub fn measure(_weights: &dyn Rows) -> Result<RateModel, QuantizeError> {
        todo!()
    }
    /// Number of rows.
    pub fn rows(&self) -> usize {
        todo!()
    }
    /// Number of columns.
    pub fn cols(&self) -> usize {
        todo!()
    }
    /// Expected symbol counts at a step.
    pub fn counts(&self, _grid: Grid, _relative_step: f64, _rounding: f64) -> SymbolCounts {
        todo!()
    }
    /// Estimated entropy, bits per weight, without side information.
    pub fn entropy_bits(&self, grid: Grid, relative_step: f64, rounding: f64) -> f64 {
        self.counts(grid, relative_step, rounding).entropy_bits()
    }
}

/// A tensor in the solver.
#[derive(Clone, Copy, Debug)]
pub struct RateTensor<'a> {
    /// Its measured model.
    pub model: &'a RateModel,
    /// Its step is the common relative step times this; 1 normally, [`EMBEDDING_STEP_MULTIPLIER`] for embeddings and heads.
    pub step_multiplier: f64,
    /// A grid to use whatever it costs; `None` chooses.
    pub grid: Option<Grid>,
}

/// What to meet.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct RateTarget {
    /// Bits per weight wanted for the whole model: (coded bits + scales + `fixed_bits`) / (weights of the tensors + `fixed_weights`).
    pub bpw: f64,
    /// Bits that do not depend on the step: tables, indexes, tensors stored raw.
    pub fixed_bits: f64,
    /// Weights of tensors stored raw.
    pub fixed_weights: f64,
    /// See [`EcsqParams::rounding`](crate::EcsqParams::rounding).
    pub rounding: f32,
}

/// What meets it.
#[derive(Clone, PartialEq, Debug)]
pub struct Solution {
    /// The common relative step.
    pub relative_step: f64,
    /// Expected bits per weight of the whole model.
    pub bpw: f64,
    /// Parameters for each tensor, in the order given.
    pub params: Vec<crate::EcsqParams>,
}

/// A cost for [`solve_step`]: the entropy, as if the coder were perfect.
pub fn entropy_cost_bits(_tensor: usize, counts: &SymbolCounts) -> f64 {
    counts.entropy_bits() * counts.total()
}

/// Finds the common relative step at which the model has the target size.
///
/// `cost_bits(tensor index, expected counts)` returns the coded bits of a tensor: payload and table, without scales.
///
/// # Errors
/// See [`SolveError`].
pub fn solve_step(
    _tensors: &[RateTensor<'_>],
    _target: &RateTarget,
    _cost_bits: &(dyn Fn(usize, &SymbolCounts) -> f64 + Sync),
) -> Result<Solution, SolveError> {
    todo!()
}
