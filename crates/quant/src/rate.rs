//! Rate control for `ecsq`: what a tensor would cost at any step, and the step at which a model has a given size.
//!
//! [`RateModel::measure`] keeps, for each grid, a histogram of the normalized weights u = w / rms in bins of 1/1024 over -8..8, and
//! the weights beyond exactly (by Chebyshev's inequality at most one in 64; in trained tensors a handful). The symbols' counts at a step
//! follow from the cumulative histogram, interpolated linearly inside the bins that a decision threshold cuts. The bins are finer than
//! bf16's spacing near a threshold, or else a tensor step, whose thresholds fall between the same two bf16 values in every row, would be
//! misjudged. `tests/real_weights.rs` asserts 0.003 bit and prints the largest difference.

use crate::quantize::{all_row_stats, check_shape};
use crate::{EcsqParams, Grid, QuantizeError, Rows, SolveError};
use rayon::prelude::*;

/// Step multiplier recommended for the embedding and the head (a tied tensor is both): their step is this times the others'.
///
/// Measured, see the crate's documentation.
pub const EMBEDDING_STEP_MULTIPLIER: f64 = 0.65;
/// Step multiplier recommended for the attention's value projections.
///
/// Measured, see the crate's documentation; llama.cpp's mixed K-quants favour `attn_v` for the same reason.
pub const VALUE_STEP_MULTIPLIER: f64 = 0.7;

/// Histogram bins per rms.
const BINS_PER_RMS: usize = 1024;
/// Magnitude in rms from which weights are kept exactly.
const TAIL: f32 = 8.0;
const BINS: usize = 2 * TAIL as usize * BINS_PER_RMS;
/// Weights a measuring task takes: its two histograms are 128 KiB each, so it should not be short.
const TASK_WEIGHTS: usize = 1 << 20;
/// [`solve_step`] searches relative steps 2^(k / 4096) with whole k: 0.00024 bit apart, and far enough for the answer not to depend on
/// the last digit of a platform's logarithm.
const STEPS_PER_OCTAVE: i32 = 4096;
/// Range of k: about 11 bits per weight down to none.
const STEP_INDEXES: (i32, i32) = (-9 * STEPS_PER_OCTAVE, 4 * STEPS_PER_OCTAVE);
const SYMBOL_MAX: f64 = i16::MAX as f64;

/// Expected number of each symbol; counts need not be whole.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct SymbolCounts {
    /// (symbol, expected count > 0), ascending by symbol.
    pub counts: Vec<(i16, f64)>,
}

impl SymbolCounts {
    /// Sum of the counts: the number of weights.
    pub fn total(&self) -> f64 {
        self.counts.iter().map(|&(_, n)| n).sum()
    }

    /// Entropy in bits per symbol, `sum -p log2 p`; 0 without symbols.
    pub fn entropy_bits(&self) -> f64 {
        let total = self.total();
        if total == 0.0 {
            return 0.0;
        }
        // `+ 0.0`: a single symbol gives 0, not -0.
        self.counts.iter().map(|&(_, n)| -(n / total) * (n / total).log2()).sum::<f64>() + 0.0
    }
}

/// What a pass over a tensor must remember to tell its entropy and its error at any step.
#[derive(Clone, Debug)]
pub struct RateModel {
    rows: usize,
    cols: usize,
    row: Distribution,
    tensor: Distribution,
}

/// The distribution of u = w / rms.
#[derive(Clone, Debug)]
struct Distribution {
    /// Bin whose lower edge is the first of `below`; bin b begins at u = b / 1024 - 8.
    first_bin: usize,
    /// Number of weights below each bin edge, (bins in use + 1).
    below: Vec<f64>,
    /// Sum of u below each bin edge.
    moment_below: Vec<f64>,
    /// Sum of u^2 over all weights.
    energy: f64,
    /// Weights of magnitude 8 and more, ascending.
    tail: Vec<f32>,
}

/// One symbol's share of a distribution.
struct Cell {
    symbol: i16,
    count: f64,
    /// Sum of u.
    moment: f64,
}

impl RateModel {
    /// Measures a tensor, in parallel on the current rayon pool: reads it twice (rms first), independent of the number of threads.
    ///
    /// # Errors
    /// [`QuantizeError::NotFinite`], [`QuantizeError::Shape`].
    pub fn measure(weights: &dyn Rows) -> Result<RateModel, QuantizeError> {
        check_shape(weights)?;
        let (rows, cols) = (weights.rows(), weights.cols());
        let stats = all_row_stats(weights)?;
        let energy: f64 = stats.iter().map(|s| s.energy).sum();
        let tensor_rms = (energy / (rows as f64 * cols as f64)).sqrt();
        let task_rows = TASK_WEIGHTS.div_ceil(cols);
        let (row, tensor) = (0..rows.div_ceil(task_rows))
            .into_par_iter()
            .map(|task| {
                let (mut row_bins, mut tensor_bins) = (Bins::new(), Bins::new());
                let mut buffer = vec![0f32; cols];
                for (row, stats) in stats.iter().enumerate().skip(task * task_rows).take(task_rows) {
                    weights.read(row, &mut buffer);
                    row_bins.add(&buffer, (stats.energy / cols as f64).sqrt());
                    tensor_bins.add(&buffer, tensor_rms);
                }
                (row_bins, tensor_bins)
            })
            .reduce(|| (Bins::new(), Bins::new()), |a, b| (a.0.merge(b.0), a.1.merge(b.1)));
        Ok(RateModel { rows, cols, row: row.into_distribution(), tensor: tensor.into_distribution() })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Number of weights.
    pub fn weights(&self) -> f64 {
        self.rows as f64 * self.cols as f64
    }

    /// Expected symbol counts at a step (in rms of the row or tensor), see [`EcsqParams`].
    pub fn counts(&self, grid: Grid, relative_step: f64, rounding: f64) -> SymbolCounts {
        let cells = self.distribution(grid).cells(relative_step, rounding);
        SymbolCounts { counts: cells.into_iter().map(|cell| (cell.symbol, cell.count)).collect() }
    }

    /// Expected entropy, bits per weight, without scales.
    pub fn entropy_bits(&self, grid: Grid, relative_step: f64, rounding: f64) -> f64 {
        self.counts(grid, relative_step, rounding).entropy_bits()
    }

    /// Expected `sum (w - w')^2 / sum w^2` with least-squares scales.
    pub fn relative_error(&self, grid: Grid, relative_step: f64, rounding: f64) -> f64 {
        self.distribution(grid).relative_error(relative_step, rounding)
    }

    /// The grid, and its step, that costs fewer bits (entropy and scales) at the squared error that `Grid::Row` has at `row_step`.
    ///
    /// Squared error is not quality: see "Row or tensor step" in the crate's documentation before using it.
    pub fn cheapest_grid(&self, row_step: f64, rounding: f64) -> (Grid, f64) {
        let error = self.relative_error(Grid::Row, row_step, rounding);
        // The error grows with the step; at high rate both grids have it at the same relative step.
        let (mut low, mut high) = (row_step / 8.0, row_step * 8.0);
        for _ in 0..40 {
            let middle = (low * high).sqrt();
            if self.relative_error(Grid::Tensor, middle, rounding) <= error { low = middle } else { high = middle }
        }
        let cost = |grid, step| self.entropy_bits(grid, step, rounding) * self.weights() + self.scale_bits(grid);
        if cost(Grid::Tensor, low) < cost(Grid::Row, row_step) { (Grid::Tensor, low) } else { (Grid::Row, row_step) }
    }

    /// Bits of the tensor's fp16 scales.
    pub fn scale_bits(&self, grid: Grid) -> f64 {
        match grid {
            Grid::Row => 16.0 * self.rows as f64,
            Grid::Tensor => 16.0,
        }
    }

    fn distribution(&self, grid: Grid) -> &Distribution {
        match grid {
            Grid::Row => &self.row,
            Grid::Tensor => &self.tensor,
        }
    }
}

/// The symbol of u at a step, before the limit of i16.
fn symbol(u: f64, step: f64, rounding: f64) -> f64 {
    ((u.abs() / step + rounding).floor().min(SYMBOL_MAX)).copysign(u)
}

impl Distribution {
    /// Symbols in ascending order with what falls to them.
    fn cells(&self, step: f64, rounding: f64) -> Vec<Cell> {
        let mut cells: Vec<Cell> = Vec::new();
        let mut push = |symbol: f64, count: f64, moment: f64| {
            let symbol = symbol as i16;
            match cells.last_mut() {
                _ if count <= 0.0 => {}
                Some(last) if last.symbol == symbol => {
                    last.count += count;
                    last.moment += moment;
                }
                _ => cells.push(Cell { symbol, count, moment }),
            }
        };
        let (negative, positive) = self.tail.split_at(self.tail.partition_point(|&u| u < 0.0));
        negative.iter().for_each(|&u| push(symbol(f64::from(u), step, rounding), 1.0, f64::from(u)));
        let bins = self.below.len() - 1;
        if bins > 0 {
            let edge = |bin: usize| bin as f64 / BINS_PER_RMS as f64 - f64::from(TAIL);
            let mut q = symbol(edge(self.first_bin), step, rounding);
            let last = symbol(edge(self.first_bin + bins), step, rounding);
            let mut below = (0.0, 0.0);
            while q < last {
                // where q ends: the lower threshold of q + 1
                let threshold = if q + 1.0 > 0.0 { (q + 1.0 - rounding) * step } else { (q + rounding) * step };
                let next = self.below(threshold);
                push(q, next.0 - below.0, next.1 - below.1);
                below = next;
                q += 1.0;
            }
            push(last, self.below[bins] - below.0, self.moment_below[bins] - below.1);
        }
        positive.iter().for_each(|&u| push(symbol(f64::from(u), step, rounding), 1.0, f64::from(u)));
        cells
    }

    /// Number and sum of the binned weights below u, as if a bin's weights were spread evenly in it.
    fn below(&self, u: f64) -> (f64, f64) {
        let bins = self.below.len() - 1;
        let position = ((u + f64::from(TAIL)) * BINS_PER_RMS as f64 - self.first_bin as f64).clamp(0.0, bins as f64);
        let bin = (position as usize).min(bins.saturating_sub(1));
        let fraction = position - bin as f64;
        let count = (self.below[bin + 1] - self.below[bin]) * fraction;
        let begin = (self.first_bin + bin) as f64 / BINS_PER_RMS as f64 - f64::from(TAIL);
        let middle = begin + 0.5 * fraction / BINS_PER_RMS as f64;
        (self.below[bin] + count, self.moment_below[bin] + count * middle)
    }

    /// With the least-squares scale s = <u, q> / <q, q>, sum (u - s q)^2 = <u, u> - <u, q>^2 / <q, q>.
    fn relative_error(&self, step: f64, rounding: f64) -> f64 {
        let (mut weight_symbol, mut symbol_symbol) = (0.0, 0.0);
        for Cell { symbol, count, moment } in self.cells(step, rounding) {
            let q = f64::from(symbol);
            weight_symbol += q * moment;
            symbol_symbol += q * q * count;
        }
        if symbol_symbol == 0.0 { 1.0 } else { (1.0 - weight_symbol * weight_symbol / symbol_symbol / self.energy).max(0.0) }
    }
}

/// A histogram being filled.
struct Bins {
    counts: Vec<u64>,
    tail: Vec<f32>,
}

impl Bins {
    fn new() -> Bins {
        Bins { counts: vec![0; BINS], tail: Vec::new() }
    }

    fn add(&mut self, weights: &[f32], rms: f64) {
        let inverse = if rms == 0.0 { 0.0 } else { 1.0 / rms };
        let exact = inverse > f64::from(f32::MAX) / 2.0 || inverse < f64::from(f32::MIN_POSITIVE) * 2.0;
        let mut normalized = [0f32; 256];
        for weights in weights.chunks(normalized.len()) {
            let normalized = &mut normalized[..weights.len()];
            if exact {
                normalized.iter_mut().zip(weights).for_each(|(u, &w)| *u = (f64::from(w) * inverse) as f32);
            } else {
                let inverse = inverse as f32;
                normalized.iter_mut().zip(weights).for_each(|(u, &w)| *u = w * inverse);
            }
            for &u in normalized.iter() {
                // Magnitudes of 8 and more fall outside: -8 exactly is caught by the comparison.
                match self.counts.get_mut(((u + TAIL) * BINS_PER_RMS as f32) as usize) {
                    Some(count) if u > -TAIL => *count += 1,
                    _ => self.tail.push(u),
                }
            }
        }
    }

    fn merge(mut self, other: Bins) -> Bins {
        self.counts.iter_mut().zip(other.counts).for_each(|(a, b)| *a += b);
        self.tail.extend(other.tail);
        self
    }

    fn into_distribution(mut self) -> Distribution {
        // Order of merging depends on threads, the sorted tail does not.
        self.tail.sort_unstable_by(f32::total_cmp);
        let first_bin = self.counts.iter().position(|&n| n > 0).unwrap_or(0);
        let end_bin = self.counts.iter().rposition(|&n| n > 0).map_or(first_bin, |bin| bin + 1);
        let (mut below, mut moment_below) = (vec![0.0], vec![0.0]);
        let (mut count, mut moment) = (0.0, 0.0);
        let mut energy: f64 = self.tail.iter().map(|&u| f64::from(u) * f64::from(u)).sum();
        for bin in first_bin..end_bin {
            let n = self.counts[bin] as f64;
            let middle = (bin as f64 + 0.5) / BINS_PER_RMS as f64 - f64::from(TAIL);
            count += n;
            moment += n * middle;
            energy += n * (middle * middle + 1.0 / (12.0 * (BINS_PER_RMS * BINS_PER_RMS) as f64));
            below.push(count);
            moment_below.push(moment);
        }
        Distribution { first_bin, below, moment_below, energy, tail: self.tail }
    }
}

/// Which grid a tensor of [`solve_step`] gets.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum GridChoice {
    /// This one.
    Fixed(Grid),
    /// [`RateModel::cheapest_grid`]: the one that costs fewer bits at equal squared error.
    Cheapest,
}

/// A tensor in the solver.
#[derive(Clone, Copy, Debug)]
pub struct RateTensor<'a> {
    /// Its measured model.
    pub model: &'a RateModel,
    /// Its step is the common relative step times this.
    pub step_multiplier: f64,
    /// Its grid.
    pub grid: GridChoice,
}

/// What a tensor does in the model, as far as its rate depends on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Role {
    /// Token embedding or output head.
    Embedding,
    /// Value projection of an attention.
    Value,
    /// Any other linear.
    Linear,
}

impl Role {
    /// The role that a tensor's name in a Hugging Face checkpoint tells: `..embed_tokens..`, `..lm_head..`, `..v_proj..`.
    pub fn of_name(name: &str) -> Role {
        let is = |part: &str| name.split('.').any(|p| p == part);
        if is("embed_tokens") || is("lm_head") {
            Role::Embedding
        } else if is("v_proj") {
            Role::Value
        } else {
            Role::Linear
        }
    }
}

impl<'a> RateTensor<'a> {
    /// The multiplier and grid that measured best for a role.
    pub fn recommended(model: &'a RateModel, role: Role) -> RateTensor<'a> {
        let (step_multiplier, grid) = match role {
            Role::Embedding => (EMBEDDING_STEP_MULTIPLIER, GridChoice::Fixed(Grid::Row)),
            Role::Value => (VALUE_STEP_MULTIPLIER, GridChoice::Cheapest),
            Role::Linear => (1.0, GridChoice::Cheapest),
        };
        RateTensor { model, step_multiplier, grid }
    }
}

/// What to meet.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct RateTarget {
    /// Bits per weight wanted for the whole model: (coded bits + scales + `fixed_bits`) / (weights of the tensors + `fixed_weights`).
    pub bpw: f64,
    /// Bits that do not depend on the step: headers, indexes, tensors stored raw.
    pub fixed_bits: f64,
    /// Weights of tensors stored raw.
    pub fixed_weights: f64,
    /// See [`EcsqParams::rounding`].
    pub rounding: f32,
}

/// What meets it.
#[derive(Clone, PartialEq, Debug)]
pub struct Solution {
    /// The common relative step.
    pub relative_step: f64,
    /// Expected bits per weight of the whole model; at most the target.
    pub bpw: f64,
    /// Parameters for each tensor, in the order given.
    pub params: Vec<EcsqParams>,
}

/// A cost for [`solve_step`]: the entropy, as if the coder were perfect.
pub fn entropy_cost_bits(_tensor: usize, counts: &SymbolCounts) -> f64 {
    counts.entropy_bits() * counts.total()
}

/// Finds the common relative step at which the model has the target size, from below and within 0.0003 bit where the cost is
/// continuous.
///
/// `cost_bits(tensor index, expected counts)` returns the coded bits of a tensor: payload and table, without scales. It is called for
/// all tensors in parallel on the current rayon pool, about ten times each.
///
/// The common step is optimal where a tensor's error matters in proportion to its energy: at equal steps relative to rms, all tensors
/// spend their last bit for the same relative gain (6.02 dB).
///
/// # Errors
/// No weights; a target that no step between 2^-9 and 2^4 rms meets; a parameter that is not a usable number.
pub fn solve_step(
    tensors: &[RateTensor<'_>],
    target: &RateTarget,
    cost_bits: &(dyn Fn(usize, &SymbolCounts) -> f64 + Sync),
) -> Result<Solution, SolveError> {
    check(tensors, target)?;
    let rounding = f64::from(target.rounding);
    let weights = tensors.iter().map(|t| t.model.weights()).sum::<f64>() + target.fixed_weights;
    let evaluate = |index: i32| -> Solution {
        let relative_step = (f64::from(index) / f64::from(STEPS_PER_OCTAVE)).exp2();
        let each: Vec<(f64, EcsqParams)> = tensors
            .par_iter()
            .enumerate()
            .map(|(index, tensor)| {
                let step = relative_step * tensor.step_multiplier;
                let (grid, step) = match tensor.grid {
                    GridChoice::Fixed(grid) => (grid, step),
                    GridChoice::Cheapest => tensor.model.cheapest_grid(step, rounding),
                };
                let counts = tensor.model.counts(grid, step, rounding);
                let bits = cost_bits(index, &counts) + tensor.model.scale_bits(grid);
                (bits, EcsqParams { grid, relative_step: step as f32, rounding: target.rounding })
            })
            .collect();
        // Summed in order: the same result for any number of threads.
        let bits = each.iter().map(|(bits, _)| bits).sum::<f64>() + target.fixed_bits;
        Solution { relative_step, bpw: bits / weights, params: each.into_iter().map(|(_, params)| params).collect() }
    };

    let (mut fine_at, mut coarse_at) = STEP_INDEXES;
    let (mut fine, mut coarse) = (evaluate(fine_at), evaluate(coarse_at));
    if !(coarse.bpw <= target.bpw && target.bpw <= fine.bpw) {
        return Err(SolveError::OutOfReach { target_bpw: target.bpw, least_bpw: coarse.bpw, most_bpw: fine.bpw });
    }
    // The rate is nearly linear in log2(step), so interpolation takes few steps; every third is a bisection, which bounds them.
    let mut round = 0;
    while coarse_at - fine_at > 1 {
        round += 1;
        let share = if round % 3 == 0 { 0.5 } else { (target.bpw - coarse.bpw) / (fine.bpw - coarse.bpw) };
        let middle_at = coarse_at - (f64::from(coarse_at - fine_at) * share) as i32;
        let middle_at = middle_at.clamp(fine_at + 1, coarse_at - 1);
        let middle = evaluate(middle_at);
        if middle.bpw <= target.bpw {
            (coarse_at, coarse) = (middle_at, middle);
        } else {
            (fine_at, fine) = (middle_at, middle);
        }
    }
    Ok(coarse)
}

fn check(tensors: &[RateTensor<'_>], target: &RateTarget) -> Result<(), SolveError> {
    if tensors.is_empty() {
        return Err(SolveError::NoWeights);
    }
    let positive = |name, value: f64| if value > 0.0 && value.is_finite() { Ok(()) } else { Err(SolveError::Parameter { name, value }) };
    let not_negative = |name, value: f64| if value == 0.0 { Ok(()) } else { positive(name, value) };
    positive("bpw", target.bpw)?;
    not_negative("fixed_bits", target.fixed_bits)?;
    not_negative("fixed_weights", target.fixed_weights)?;
    if !(0.0..=0.5).contains(&target.rounding) {
        return Err(SolveError::Parameter { name: "rounding", value: f64::from(target.rounding) });
    }
    tensors.iter().try_for_each(|t| positive("step_multiplier", t.step_multiplier))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Dtype, SliceRows};

    #[test]
    fn counts_by_hand() {
        // rms = 1: bins make the counts exact, as no threshold cuts an occupied bin.
        let weights = [1.0, -1.0, 0.5, -0.5, 1.5, -1.5, 0.25, -0.25];
        let energy: f32 = weights.iter().map(|w: &f32| w * w).sum();
        let weights = weights.map(|w: f32| w * (8.0 / energy).sqrt());
        let model = RateModel::measure(&SliceRows::new(&weights, 8, Dtype::F32)).unwrap();
        // in rms: 1.03, 0.52, 1.55, 0.26; step 0.8: 1.29, 0.65, 1.94, 0.32
        let counts = model.counts(Grid::Row, 0.8, 0.5);
        assert_eq!(counts.counts, [(-2, 1.0), (-1, 2.0), (0, 2.0), (1, 2.0), (2, 1.0)]);
        assert!((counts.entropy_bits() - 2.25).abs() < 1e-12);
        let deadzone = model.counts(Grid::Tensor, 0.8, 0.25);
        assert_eq!(deadzone.counts, [(-2, 1.0), (-1, 1.0), (0, 4.0), (1, 1.0), (2, 1.0)]);
    }

    #[test]
    fn roles_come_from_names() {
        let role = |name| Role::of_name(name);
        assert_eq!(role("model.embed_tokens.weight"), Role::Embedding);
        assert_eq!(role("lm_head.weight"), Role::Embedding);
        assert_eq!(role("model.layers.3.self_attn.v_proj.weight"), Role::Value);
        assert_eq!(role("model.layers.3.self_attn.qv_proj.weight"), Role::Linear);
    }

    #[test]
    fn tails_and_zeros_are_exact() {
        let mut weights = vec![0.0f32; 4096];
        weights[0] = 3.0;
        weights[1] = -3.0;
        let model = RateModel::measure(&SliceRows::new(&weights, 4096, Dtype::F32)).unwrap();
        // rms = 3 sqrt(2/4096) = 3 / 45.25
        assert_eq!(model.counts(Grid::Row, 1.0, 0.5).counts, [(-45, 1.0), (0, 4094.0), (45, 1.0)]);
        assert!(model.relative_error(Grid::Row, 1.0, 0.5) < 1e-4);
        let zeros = RateModel::measure(&SliceRows::new(&[0.0; 64], 8, Dtype::F32)).unwrap();
        assert_eq!(zeros.counts(Grid::Tensor, 0.5, 0.5).counts, [(0, 64.0)]);
        assert_eq!(zeros.entropy_bits(Grid::Row, 0.5, 0.5), 0.0);
    }
}
