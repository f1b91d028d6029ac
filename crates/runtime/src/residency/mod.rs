//! Strategies: who holds which weights decoded, when they are decoded, and by whom.
//!
//! | strategy | memory | per token |
//! |---|---|---|
//! | [`fused`](Strategy::Fused) | coded size | decoding inside each product |
//! | [`cached`](Strategy::Cached) | decoded size | nothing: decoded once, while loading |
//! | [`prefetch`](Strategy::Prefetch) | coded size and two layer buffers | a worker decodes layer n + 1 while layer n computes |
//! | [`lru`](Strategy::Lru) | coded size and a budget | what does not fit the budget is decoded inside its product |
//! | [`auto`](Strategy::Auto) | any budget | per matrix the cheapest of these |
//!
//! [`open`] makes a [`Weights`] of a directory; [`explain`] says beforehand what it would hold and predict. All strategies end in the same
//! arithmetic (`engine`), so their logits are equal to the bit. Whatever the strategy, every checksum is compared once, while loading and before
//! anything is computed.

mod auto;
mod budget;
mod cached;
mod cost;
pub mod dense;
mod engine;
mod fused;
mod held;
mod lru;
mod prefetch;
pub mod profile;
pub(crate) mod set;

pub use auto::{Choice, Plan, PlanRow};
pub use budget::Footprint;
pub use cost::{CostModel, MatrixCost, Offer, choose};
pub use profile::{MachineProfile, ProfileError};

use crate::model::ModelError;
use crate::model::weights::{RunError, Weights};
use auto::Decision;
use budget::Size;
use set::TensorSet;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use tersor_cpu::{Level, ScalesError};
use tersor_format::{FormatError, ModelDir, Place};
use thiserror::Error;

/// Who holds which weights decoded, and when.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[non_exhaustive]
pub enum Strategy {
    /// Per matrix the cheapest of the others, by a measured machine profile.
    #[default]
    Auto,
    /// Decoded inside each product; memory: the coded size.
    Fused,
    /// Decoded once while loading; memory: the decoded size.
    Cached,
    /// Decoded one layer ahead by a worker; memory: the coded size and two layers.
    Prefetch,
    /// As many decoded matrices as a budget allows, beside the coded ones.
    Lru,
    /// Decoded on a second stream of a GPU. Not for the CPU.
    GpuAsync,
}

impl Strategy {
    /// All strategies, in the order of the documentation.
    pub const ALL: [Self; 6] = [Self::Auto, Self::Fused, Self::Cached, Self::Prefetch, Self::Lru, Self::GpuAsync];
    /// Those that [`open`] runs on a CPU.
    pub const CPU: [Self; 5] = [Self::Auto, Self::Fused, Self::Cached, Self::Prefetch, Self::Lru];
    /// Those that run on an NVIDIA GPU.
    pub const CUDA: [Self; 6] = Self::ALL;

    /// As the command line spells it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Fused => "fused",
            Self::Cached => "cached",
            Self::Prefetch => "prefetch",
            Self::Lru => "lru",
            Self::GpuAsync => "gpu-async",
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Strategy {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        let found = Self::ALL.into_iter().find(|strategy| strategy.name() == name);
        found.ok_or_else(|| UnknownName { what: "strategy", name: name.to_owned(), known: Self::ALL.map(Self::name).join(", ") })
    }
}

/// What `lru` evicts when its budget is full. See the strategy's documentation for why the policy named `lru` is the worst of them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[non_exhaustive]
pub enum Policy {
    /// Nothing: what came first stays, the rest is decoded inside its product. Hits capacity / size of the bytes.
    #[default]
    Pin,
    /// The matrix whose last use is longest ago. Hits nothing on a cyclic sweep that does not fit.
    Lru,
    /// The matrix used last.
    Mru,
}

impl Policy {
    /// All policies.
    pub const ALL: [Self; 3] = [Self::Pin, Self::Lru, Self::Mru];

    /// As the command line spells it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pin => "pin",
            Self::Lru => "lru",
            Self::Mru => "mru",
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Policy {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        let found = Self::ALL.into_iter().find(|policy| policy.name() == name);
        found.ok_or_else(|| UnknownName { what: "policy", name: name.to_owned(), known: Self::ALL.map(Self::name).join(", ") })
    }
}

/// A strategy or policy of an unknown name.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("unknown {what} {name:?}: one of {known}")]
pub struct UnknownName {
    what: &'static str,
    name: String,
    known: String,
}

/// How to open a model's weights.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bound, in bytes, on everything that a [`Footprint`] counts; `None`: no bound.
    pub memory_budget: Option<u64>,
    /// Bytes of the key-value caches that will be used, counted against the budget.
    pub kv_bytes: u64,
    /// Bytes that the model itself holds (`Model::bytes`: norms, biases and activation buffers), counted against the budget. Where it is less than the
    /// norms of the directory in f32 take, those are counted.
    pub model_bytes: u64,
    /// Threads of products and decoding together.
    pub threads: usize,
    /// SIMD level.
    pub level: Level,
    /// What `lru` evicts.
    pub policy: Policy,
    /// What the machine can do. `auto` and [`explain`] measure it if it is missing, which takes up to 3 s; the other strategies use it to tell how
    /// much of their products is decoding.
    pub profile: Option<Arc<MachineProfile>>,
    /// Where a device's backend keeps compiled kernels and its own profile between runs; `None`: nowhere. The CPU keeps nothing.
    pub cache_dir: Option<PathBuf>,
    /// Time when layers are computed with and when their buffers are filled, where a second stream of a device fills them. Passes are then not recorded.
    pub timeline: bool,
}

impl Options {
    /// No budget, the default policy, no profile.
    #[must_use]
    pub fn new(threads: usize, level: Level) -> Self {
        Self {
            memory_budget: None,
            kv_bytes: 0,
            model_bytes: 0,
            threads,
            level,
            policy: Policy::default(),
            profile: None,
            cache_dir: None,
            timeline: false,
        }
    }
}

/// Why weights cannot be opened.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// A file of the directory is damaged or not readable.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A chunk whose bytes do not have the checksum they were written with.
    #[error("{cause} (chunk {chunk})")]
    CorruptChunk {
        /// The first bad chunk of the tensor.
        chunk: usize,
        /// Names file and tensor.
        cause: FormatError,
    },
    /// The directory is not a model that can be run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Scales that the kernels cannot use.
    #[error("{place}: {cause}")]
    Scales {
        /// The file and the tensor.
        place: Place,
        /// What is wrong with them.
        cause: ScalesError,
    },
    /// Coded bytes that have the right checksum but do not decode.
    #[error("{}: {cause}", file.display())]
    Decode {
        /// The file that holds the tensor.
        file: PathBuf,
        /// Names tensor and chunk.
        cause: RunError,
    },
    /// The memory budget does not cover what the strategy needs.
    #[error(
        "a memory budget of {} ({budget_bytes} bytes) is too small for {strategy}: it needs at least {} ({} bytes: {least}){}",
        Size(*budget_bytes), Size(least.total_bytes()), least.total_bytes(), smaller_hint(*smaller)
    )]
    BudgetTooSmall {
        /// The strategy.
        strategy: Strategy,
        /// The budget, bytes.
        budget_bytes: u64,
        /// The least that would do.
        least: Box<Footprint>,
        /// A strategy that needs less than this one, and the bytes that it needs.
        smaller: Option<(Strategy, u64)>,
    },
    /// A strategy for GPUs.
    #[error("strategy gpu-async needs a GPU: on the CPU use prefetch, which decodes ahead with threads, or auto")]
    NeedsGpu,
    /// The device is absent, too small, or failed.
    #[error("{cause}")]
    Device {
        /// Names the device and says what is wrong, in one line.
        cause: String,
    },
    /// No machine profile.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// The system refuses a thread.
    #[error("cannot start the decoding thread: {cause}")]
    Thread {
        /// What the system says.
        cause: io::Error,
    },
}

fn smaller_hint(smaller: Option<(Strategy, u64)>) -> String {
    smaller.map_or_else(String::new, |(strategy, bytes)| format!("; {strategy} needs {} ({bytes} bytes)", Size(bytes)))
}

/// Opens the weights of a model directory under a strategy. Compares every checksum first.
///
/// Takes the directory, so that its files are unmapped as soon as no matrix needs them: `Model::load` comes first.
///
/// # Errors
/// [`OpenError`]: a damaged directory, a budget that is too small, a strategy that needs a GPU.
pub fn open(dir: ModelDir, strategy: Strategy, options: &Options) -> Result<Box<dyn Weights>, OpenError> {
    let set = TensorSet::open(&dir)?;
    let settled = settle(&set, strategy, options)?;
    let options = &settled.options;
    Ok(match (strategy, settled.decision) {
        (Strategy::Auto, Some(Decision::Prefetch)) | (Strategy::Prefetch, _) => Box::new(prefetch::open(&dir, set, strategy, options)?),
        (Strategy::Auto, Some(Decision::Mixture(decoded))) => Box::new(auto::open(&dir, set, &decoded, options)?),
        (Strategy::Cached, _) => Box::new(cached::open(&dir, set, options)?),
        (Strategy::Lru, _) => Box::new(lru::open(&dir, set, options)?),
        (Strategy::Fused, _) => Box::new(fused::open(&dir, set, options)?),
        (Strategy::Auto | Strategy::GpuAsync, _) => return Err(OpenError::NeedsGpu),
    })
}

/// What [`open`] would hold, matrix kind by matrix kind, with predicted times and reasons. Reads headers and scales only.
///
/// # Errors
/// As [`open`], but for damage in the coded bytes.
pub fn explain(dir: &ModelDir, strategy: Strategy, options: &Options) -> Result<Plan, OpenError> {
    let set = TensorSet::open(dir)?;
    let Settled { options, decision, footprint } = settle(&set, strategy, options)?;
    let options = with_profile(&options)?;
    let choices = auto::choices(&set, strategy, &options, decision.as_ref());
    let profile = options.profile.as_ref().expect("measured above");
    let rows = auto::rows(&set, &choices, strategy, &options, profile);
    Ok(Plan { strategy, footprint, rows })
}

/// A strategy that fits its budget.
struct Settled {
    /// With a profile, if the strategy needs one.
    options: Options,
    /// What `auto` decided; `None` for the others.
    decision: Option<Decision>,
    footprint: Footprint,
}

fn settle(set: &TensorSet, strategy: Strategy, options: &Options) -> Result<Settled, OpenError> {
    let least = least(set, strategy, options)?;
    let refused = || refuse(set, strategy, options, least);
    if options.memory_budget.is_some_and(|budget| least.total_bytes() > budget) {
        return Err(refused());
    }
    if strategy != Strategy::Auto {
        let footprint = if strategy == Strategy::Lru { lru::footprint(set, options) } else { least };
        return Ok(Settled { options: options.clone(), decision: None, footprint });
    }
    let options = with_profile(options)?;
    let profile = options.profile.as_ref().expect("measured above");
    let decision = auto::decide(set, &options, profile).ok_or_else(refused)?;
    let footprint = match &decision {
        Decision::Mixture(decoded) => set.footprint_with(&options, decoded),
        Decision::Prefetch => prefetch::footprint(set, &options),
    };
    Ok(Settled { decision: Some(decision), footprint, options })
}

/// The least that a strategy can do with.
fn least(set: &TensorSet, strategy: Strategy, options: &Options) -> Result<Footprint, OpenError> {
    Ok(match strategy {
        Strategy::Auto => auto::least(set, options),
        Strategy::Fused => fused::footprint(set, options),
        Strategy::Cached => cached::footprint(set, options),
        Strategy::Prefetch => prefetch::footprint(set, options),
        Strategy::Lru => lru::least(set, options),
        Strategy::GpuAsync => return Err(OpenError::NeedsGpu),
    })
}

fn refuse(set: &TensorSet, strategy: Strategy, options: &Options, needed: Footprint) -> OpenError {
    let others = Strategy::CPU.into_iter().filter_map(|other| Some((other, least(set, other, options).ok()?.total_bytes())));
    let smaller = others.min_by_key(|(_, bytes)| *bytes).filter(|(_, bytes)| *bytes < needed.total_bytes());
    OpenError::BudgetTooSmall { strategy, budget_bytes: options.memory_budget.unwrap_or(u64::MAX), least: Box::new(needed), smaller }
}

fn with_profile(options: &Options) -> Result<Options, OpenError> {
    let mut options = options.clone();
    if options.profile.is_none() {
        options.profile = Some(Arc::new(MachineProfile::measure(options.level, options.threads)?));
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for strategy in Strategy::ALL {
            assert_eq!(strategy.to_string().parse(), Ok(strategy));
        }
        for policy in Policy::ALL {
            assert_eq!(policy.to_string().parse(), Ok(policy));
        }
        let error = "gpu".parse::<Strategy>().unwrap_err();
        assert_eq!(error.to_string(), "unknown strategy \"gpu\": one of auto, fused, cached, prefetch, lru, gpu-async");
    }
}
