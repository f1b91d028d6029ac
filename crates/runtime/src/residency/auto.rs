//! `auto`: per matrix the cheaper of decoding inside the product and holding it decoded, under the memory budget, by the prices of a measured
//! [`MachineProfile`](super::profile::MachineProfile).
//!
//! Starting from everything coded, each matrix is an offer: so many more bytes if it is held decoded, so many seconds saved per step. The budget
//! buys the best set (see [`cost::choose`](super::cost::choose)). The coded bytes of what is held decoded are released, so under the same budget the mixture
//! is never behind `fused`, `cached` or `lru`, which are all among the sets. `prefetch` for the whole model is priced beside it. Where decoding
//! cannot keep up it chooses `cached`, as far as the budget reaches.
//!
//! The choice is made for steps of one token, where the bytes of every weight count. For slices of a prompt the same matrices are as good: a product with a
//! coded matrix decodes each chunk once for all tokens of a slice, so decoding is already shared among them, and the price of a slice is
//! shown beside the step's.

use super::budget::{Footprint, Size};
use super::cost::{CostModel, MatrixCost, Offer, choose};
use super::held::HeldWeights;
use super::profile::MachineProfile;
use super::set::{Linear, TensorSet};
use super::{OpenError, Options, Strategy, lru, prefetch};
use crate::model::llama::SLICE_TOKENS_MAX;
use std::fmt;
use tersor_format::ModelDir;

/// A gain below this share of the fused price is within the noise of measuring: the smaller form is kept.
const TIE: f64 = 0.02;

/// How much faster than the mixture `prefetch` must be predicted to be chosen: its prediction assumes perfect overlap.
const PREFETCH_ADVANTAGE: f64 = 0.9;

/// How a matrix is held.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
pub enum Choice {
    /// Coded, decoded inside each product.
    Fused,
    /// Decoded once, while loading.
    Cached,
    /// Coded, decoded one layer ahead of its use.
    Prefetch,
    /// Floats, as stored.
    Raw,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Fused => "fused",
            Self::Cached => "cached",
            Self::Prefetch => "prefetch",
            Self::Raw => "raw",
        })
    }
}

/// Matrices of one kind that are held alike, with what they cost and why.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub struct PlanRow {
    /// The kind of matrix: `embed`, `q`, `k`, `v`, `o`, `gate`, `up`, `down`, `head`.
    pub group: &'static str,
    /// Matrices in the row.
    pub tensors: usize,
    /// How they are held.
    pub choice: Choice,
    /// Bytes they take in that form, scales and tables included.
    pub bytes: u64,
    /// Predicted time of all of them in a step of one token, seconds.
    pub step_seconds: f64,
    /// Predicted time of all of them in a slice of [`SLICE_TOKENS_MAX`](crate::model::llama::SLICE_TOKENS_MAX) tokens of a prompt, seconds.
    pub slice_seconds: f64,
    /// Why, for people.
    pub reason: String,
}

/// What a strategy will do with a model on this machine.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub struct Plan {
    /// The strategy that was asked for.
    pub strategy: Strategy,
    /// What will be held in memory.
    pub footprint: Footprint,
    /// All matrices, by kind and choice, in the order of use.
    pub rows: Vec<PlanRow>,
}

impl Plan {
    /// Predicted time of all matrices in a step of one token, seconds.
    #[must_use]
    pub fn step_seconds(&self) -> f64 {
        self.rows.iter().map(|row| row.step_seconds).sum()
    }
}

/// What `auto` settled on.
#[derive(Debug)]
pub(super) enum Decision {
    /// For each matrix, whether it is held decoded.
    Mixture(Vec<bool>),
    Prefetch,
}

/// The least that `auto` can do with: the smaller form of every matrix.
pub(super) fn least(set: &TensorSet, options: &Options) -> Footprint {
    let smaller: Vec<bool> =
        set.linears.iter().map(|linear| linear.cost().is_some_and(|cost| cost.decoded_bytes < cost.coded_bytes)).collect();
    set.footprint_with(options, &smaller)
}

/// Decides. `None` if the budget is below [`least`].
pub(super) fn decide(set: &TensorSet, options: &Options, profile: &MachineProfile) -> Option<Decision> {
    let model = CostModel::new(profile, options.threads, set.working_set_bytes());
    let offers: Vec<Offer> = (0..set.linears.len()).map(|slot| offer(set, slot, &model)).collect();
    let capacity = options.memory_budget.map(|budget| {
        let room = i128::from(budget) - i128::from(set.footprint(options).total_bytes());
        i64::try_from(room).unwrap_or(if room < 0 { i64::MIN } else { i64::MAX })
    });
    let decoded = choose(&offers, capacity)?;
    let mixture = |slot: usize| prices(set, slot, &model, 1).map_or(0.0, |p| if decoded[slot] { p.decoded } else { p.fused });
    let mixture_seconds: f64 = (0..set.linears.len()).map(mixture).sum();
    let fits = options.memory_budget.is_none_or(|budget| prefetch::footprint(set, options).total_bytes() <= budget);
    if fits && prefetch_seconds(set, options, &model) < mixture_seconds * PREFETCH_ADVANTAGE {
        return Some(Decision::Prefetch);
    }
    Some(Decision::Mixture(decoded))
}

/// The layers as `prefetch` prices them, the head and the embedding coded.
fn prefetch_seconds(set: &TensorSet, options: &Options, model: &CostModel<'_>) -> f64 {
    let outside = (0..set.linears.len()).filter(|slot| set.is_outside_layers(*slot));
    let outside: f64 = outside.filter_map(|slot| prices(set, slot, model, 1)).map(|prices| prices.fused).sum();
    prefetch::step_seconds(set, options) + outside
}

fn offer(set: &TensorSet, slot: usize, model: &CostModel<'_>) -> Offer {
    let (Some(cost), Some(prices)) = (set.linears[slot].cost(), prices(set, slot, model, 1)) else {
        return Offer { extra_bytes: 0, gain_seconds: 0.0 };
    };
    let gain = prices.fused - prices.decoded;
    let tie = gain.abs() < prices.fused * TIE;
    let extra_bytes =
        i64::try_from(cost.decoded_bytes).unwrap_or(i64::MAX).saturating_sub(i64::try_from(cost.coded_bytes).unwrap_or(i64::MAX));
    Offer { extra_bytes, gain_seconds: if tie { 0.0 } else { gain } }
}

/// Seconds of one matrix in a forward pass over `tokens` tokens, in either form.
#[derive(Clone, Copy, Debug, Default)]
struct Prices {
    fused: f64,
    decoded: f64,
}

fn prices(set: &TensorSet, slot: usize, model: &CostModel<'_>, tokens: usize) -> Option<Prices> {
    let linear = &set.linears[slot];
    let cost = linear.cost()?;
    let mut prices = Prices { fused: 0.0, decoded: 0.0 };
    if set.is_multiplied(slot) {
        // Logits of the last token are all that a slice needs of the head.
        let tokens = if set.is_outside_layers(slot) { 1 } else { tokens };
        prices = Prices { fused: model.fused(&cost, tokens), decoded: model.decoded(&cost, tokens) };
    }
    if slot == 0 {
        prices.fused += lookup_seconds(linear, &cost, model) * tokens as f64;
    }
    Some(prices)
}

/// An embedding lookup decodes the chunk that holds the row.
fn lookup_seconds(linear: &Linear, cost: &MatrixCost, model: &CostModel<'_>) -> f64 {
    let chunk = linear.coded().map_or(0, |tensor| if tensor.chunk_count() == 0 { 0 } else { tensor.chunk_symbols(0) });
    model.coded_row(cost.codec, chunk as u64)
}

/// What each matrix will be, under any strategy.
pub(super) fn choices(set: &TensorSet, strategy: Strategy, options: &Options, decision: Option<&Decision>) -> Vec<Choice> {
    let mut room = lru::capacity(&lru::least(set, options), options);
    let mut pinned = |slot: usize| {
        let bytes = set.linears[slot].decoded_bytes();
        let fits = set.is_multiplied(slot) && bytes <= room;
        room -= if fits { bytes } else { 0 };
        fits
    };
    let mut choice = |slot: usize| {
        if set.linears[slot].coded().is_none() {
            return Choice::Raw;
        }
        let decoded = match (strategy, decision) {
            (Strategy::Auto, Some(Decision::Mixture(decoded))) => decoded[slot],
            (Strategy::Prefetch, _) | (Strategy::Auto, Some(Decision::Prefetch)) => {
                return if set.is_outside_layers(slot) { Choice::Fused } else { Choice::Prefetch };
            }
            (Strategy::Lru, _) => pinned(slot),
            (Strategy::Cached, _) => true,
            _ => false,
        };
        if decoded { Choice::Cached } else { Choice::Fused }
    };
    (0..set.linears.len()).map(&mut choice).collect()
}

/// The rows of a plan: matrices of one kind and choice together.
pub(super) fn rows(set: &TensorSet, choices: &[Choice], strategy: Strategy, options: &Options, profile: &MachineProfile) -> Vec<PlanRow> {
    let model = CostModel::new(profile, options.threads, set.working_set_bytes());
    // All layers are decoded and multiplied side by side; each matrix is shown with its share of that time.
    let in_layers = (0..set.linears.len()).filter(|&slot| !set.is_outside_layers(slot));
    let layer_weights: u64 = in_layers.filter_map(|slot| set.linears[slot].cost()).map(|cost| cost.weights).sum();
    let prefetch_share = |cost: &MatrixCost| prefetch::step_seconds(set, options) * cost.weights as f64 / layer_weights.max(1) as f64;
    let mut groups: Vec<(&'static str, Choice, Vec<usize>)> = Vec::new();
    for (slot, (linear, &choice)) in set.linears.iter().zip(choices).enumerate() {
        match groups.iter_mut().find(|(group, other, _)| *group == linear.group() && *other == choice) {
            Some((_, _, slots)) => slots.push(slot),
            None => groups.push((linear.group(), choice, vec![slot])),
        }
    }
    let row = |(group, choice, slots): (&'static str, Choice, Vec<usize>)| {
        let sum = |tokens: usize| {
            let all = slots.iter().filter_map(|&slot| prices(set, slot, &model, tokens));
            all.fold(Prices::default(), |sum, p| Prices { fused: sum.fused + p.fused, decoded: sum.decoded + p.decoded })
        };
        let (step, slice) = (sum(1), sum(SLICE_TOKENS_MAX));
        let linears = || slots.iter().map(|&slot| &set.linears[slot]);
        let held = |linear: &Linear| match choice {
            Choice::Cached => linear.decoded_bytes(),
            _ => linear.mapped_bytes() + linear.table_bytes(),
        };
        let raw: u64 = linears().filter(|linear| linear.coded().is_none()).map(Linear::mapped_bytes).sum();
        let (step_seconds, slice_seconds) = match choice {
            Choice::Fused => (step.fused, slice.fused),
            Choice::Cached => (step.decoded, slice.decoded),
            Choice::Prefetch => (linears().filter_map(Linear::cost).map(|cost| prefetch_share(&cost)).sum(), slice.decoded),
            Choice::Raw => (model.read(raw), model.read(raw)),
        };
        let coded: u64 = linears().filter_map(Linear::cost).map(|cost| cost.coded_bytes).sum();
        let decoded: u64 = linears().map(Linear::decoded_bytes).sum();
        PlanRow {
            group,
            tensors: slots.len(),
            choice,
            bytes: linears().map(|linear| held(linear) + linear.scale_bytes()).sum(),
            step_seconds,
            slice_seconds,
            reason: reason(strategy, choice, step, coded, decoded),
        }
    };
    groups.into_iter().map(row).collect()
}

fn reason(strategy: Strategy, choice: Choice, step: Prices, coded: u64, decoded: u64) -> String {
    if choice == Choice::Raw {
        return "not coded: multiplied as stored".to_owned();
    }
    let (fused_ms, decoded_ms) = (step.fused * 1e3, step.decoded * 1e3);
    let prices = format!("fused {fused_ms:.3} ms, decoded {decoded_ms:.3} ms");
    let sizes = format!("coded {}, decoded {}", Size(coded), Size(decoded));
    let gain = step.fused - step.decoded;
    let why = match (strategy, choice) {
        (Strategy::Auto, Choice::Cached) if decoded <= coded => "no larger decoded",
        (Strategy::Auto, Choice::Cached) => "faster decoded, and the budget allows it",
        (Strategy::Auto, Choice::Prefetch) => "decoding ahead overlaps with computing",
        (Strategy::Auto, _) if gain.abs() < step.fused * TIE => "as fast coded, and smaller",
        (Strategy::Auto, _) if gain < 0.0 => "faster coded",
        (Strategy::Auto, _) => "the budget is better spent on others",
        _ => "as asked for",
    };
    format!("{why}: {prices}; {sizes}")
}

pub(super) fn open(dir: &ModelDir, set: TensorSet, decoded: &[bool], options: &Options) -> Result<HeldWeights, OpenError> {
    HeldWeights::load(dir, set, decoded, Strategy::Auto, options)
}
