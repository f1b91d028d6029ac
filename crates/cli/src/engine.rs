//! Opens a model directory for the commands that run it: model, weights under a strategy, and how long that took.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, bail};
use tersor_cpu::{Level, Pool};
use tersor_format::ModelDir;
use tersor_runtime::device::{self, Device};
use tersor_runtime::model::kv::{KvCache, KvPrecision};
use tersor_runtime::model::llama::{Model, SLICE_TOKENS_MAX};
use tersor_runtime::model::{CpuRunner, Runner};
use tersor_runtime::residency::dense::Dense;
use tersor_runtime::residency::{self, MachineProfile, OpenError, Plan, Policy, Strategy};

use crate::machine;
use crate::options::{ByteSize, Usage, default_threads, thread_count};

/// Options of the commands that run one model.
#[derive(clap::Args, Clone)]
pub struct EngineArgs {
    /// Where weights live decoded: auto, fused, cached, prefetch, lru; on a GPU also gpu-async
    #[arg(long, value_name = "S", default_value = "auto")]
    pub strategy: Strategy,
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = thread_count)]
    pub threads: Option<usize>,
}

/// Options that hold for every strategy.
#[derive(clap::Args, Clone)]
pub struct LimitArgs {
    /// What lru evicts: pin (nothing; recommended), lru, mru
    #[arg(long, value_name = "POLICY", default_value = "pin")]
    pub lru_policy: Policy,
    /// Bound on weights, buffers, tables and KV cache, such as 2GiB or 500MB [default: none]
    #[arg(long, value_name = "BYTES")]
    pub memory_budget: Option<ByteSize>,
    /// SIMD level: scalar, avx2, avx512 [default: the best of this machine]
    #[arg(long, value_name = "LEVEL")]
    pub level: Option<Level>,
    /// Where to run: cpu, cuda or cuda:N
    #[arg(long, value_name = "D", default_value_t = Device::Cpu)]
    pub device: Device,
}

/// How a model is to be run.
pub struct Setup {
    strategy: Strategy,
    limits: LimitArgs,
    /// Threads of products and decoding together.
    pub threads: usize,
    /// Time when layers are computed with and their buffers filled.
    pub timeline: bool,
}

impl Setup {
    /// From the options of a command.
    ///
    /// # Errors
    /// As [`of`](Self::of).
    pub fn new(args: &EngineArgs) -> Result<Self> {
        Self::of(args.strategy, &args.limits, args.threads.unwrap_or_else(default_threads))
    }

    /// From its parts.
    ///
    /// # Errors
    /// Parts that do not fit each other.
    pub fn of(strategy: Strategy, limits: &LimitArgs, threads: usize) -> Result<Self> {
        if !limits.device.strategies().contains(&strategy) {
            return Err(Usage(OpenError::NeedsGpu.to_string()).into());
        }
        if let Some(level) = limits.level.filter(|_| limits.device != Device::Cpu) {
            return Err(Usage(format!("--level {level}: for the CPU only, not for {}", limits.device)).into());
        }
        Ok(Self { strategy, limits: limits.clone(), threads, timeline: false })
    }

    /// Where the model is to run.
    pub fn device(&self) -> Device {
        self.limits.device
    }

    /// The SIMD level.
    pub fn level(&self) -> Level {
        self.limits.level.unwrap_or_else(Level::best)
    }

    /// What the machine can do: from the user's cache, or measured now, which a person at a terminal is told, as it takes a few seconds.
    ///
    /// # Errors
    /// The measurement fails.
    pub fn profile(&self) -> Result<Arc<MachineProfile>> {
        let (directory, level) = (machine::cache_dir(), self.level());
        if let Some(profile) = MachineProfile::load(&directory, level, self.threads) {
            return Ok(Arc::new(profile));
        }
        if std::io::stderr().is_terminal() {
            eprintln!("measuring this machine once, for {} threads at {level}", self.threads);
        }
        // In a process of its own, since what an allocator keeps of the samples would count as the model's memory.
        let threads = self.threads.to_string();
        let child = machine::this_program().and_then(|(program, first)| {
            let arguments = ["info", "--json", "--threads", &threads, "--level", level.name()];
            Command::new(program).args(first).args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()
        });
        match MachineProfile::load(&directory, level, self.threads).filter(|_| child.is_ok()) {
            Some(profile) => Ok(Arc::new(profile)),
            None => Ok(Arc::new(MachineProfile::measure(level, self.threads)?)),
        }
    }
}

/// A directory whose configuration is known and whose weights are not loaded yet.
pub struct Opened {
    dir: ModelDir,
    path: PathBuf,
    /// The model without its matrices.
    pub model: Model,
    seconds: f64,
}

impl Opened {
    /// Opens a Tersor directory or an unquantized Hugging Face one.
    ///
    /// # Errors
    /// What is no model, or damaged.
    pub fn new(path: &Path) -> Result<Self> {
        let start = Instant::now();
        let dir = ModelDir::open(path)?;
        let model = Model::load(&dir)?;
        Ok(Self { dir, path: path.to_owned(), model, seconds: start.elapsed().as_secs_f64() })
    }

    /// The longest context: what the user asks for, else `wanted` as far as the model was made for it.
    ///
    /// # Errors
    /// More is asked for.
    pub fn context(&self, asked: Option<usize>, wanted: usize) -> Result<usize> {
        let most = self.model.config().context_max;
        match asked {
            Some(asked) if asked > most => {
                Err(Usage(format!("--context {asked}: {} was made for {most} tokens", self.path.display())).into())
            }
            Some(asked) => Ok(asked),
            None => Ok(wanted.min(most)),
        }
    }

    /// Bytes of all tensors, and bits per weight with everything counted.
    pub fn size(&self) -> (u64, f64) {
        let bytes: u64 = self.dir.tensors().map(|(_, tensor)| tensor.bytes()).sum();
        let weights: f64 = self.dir.tensors().map(|(_, tensor)| tensor.shape().iter().map(|&n| n as f64).product::<f64>()).sum();
        (bytes, bytes as f64 * 8.0 / weights.max(1.0))
    }

    /// Whether the model is coded, so that there are strategies and devices to choose from.
    pub fn is_coded(&self) -> bool {
        self.dir.is_tersor()
    }

    fn options(&self, setup: &Setup, context: usize, sequences: usize, profile: Option<Arc<MachineProfile>>) -> residency::Options {
        let mut options = residency::Options::new(setup.threads, setup.level());
        options.memory_budget = setup.limits.memory_budget.map(|size| size.0);
        options.kv_bytes = KvCache::bytes_for(self.model.config(), context, device::KV_PRECISION).saturating_mul(sequences as u64);
        options.model_bytes = self.model.bytes(SLICE_TOKENS_MAX.min(context.saturating_mul(sequences)));
        options.policy = setup.limits.lru_policy;
        options.profile = profile;
        options.cache_dir = Some(machine::cache_dir());
        options.timeline = setup.timeline;
        options
    }

    /// What the strategy would hold, and why. Nothing for an unquantized directory, which leaves no choice.
    ///
    /// # Errors
    /// As [`load`](Self::load), but for damage in the coded bytes.
    pub fn explain(&self, setup: &Setup, context: usize) -> Result<Option<Plan>> {
        if !self.dir.is_tersor() {
            return Ok(None);
        }
        let profile = if setup.device() == Device::Cpu { Some(setup.profile()?) } else { None };
        let options = self.options(setup, context, 1, profile);
        Ok(Some(device::explain(&self.dir, setup.device(), setup.strategy, &options)?))
    }

    /// Loads the weights. `measured` asks for a machine profile even where the strategy does not need one, so that the report can tell
    /// how much of the products is decoding.
    ///
    /// # Errors
    /// A damaged directory, a budget that is too small, a device that is absent or fails.
    pub fn load(self, setup: &Setup, context: usize, measured: bool) -> Result<Engine> {
        self.load_for(setup, context, 1, measured)
    }

    /// As [`load`](Self::load), for several sequences of `context` positions each.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_for(self, setup: &Setup, context: usize, sequences: usize, measured: bool) -> Result<Engine> {
        let measured = measured || setup.strategy == Strategy::Auto;
        let profile = if self.is_coded() && measured && setup.device() == Device::Cpu { Some(setup.profile()?) } else { None };
        let (opening_seconds, start) = (self.seconds, Instant::now());
        let runner = if self.is_coded() {
            let options = self.options(setup, context, sequences, profile);
            device::open(self.dir, self.model, setup.device(), setup.strategy, &options)?
        } else {
            self.load_uncoded(setup)?
        };
        let load_seconds = opening_seconds + start.elapsed().as_secs_f64();
        Ok(Engine { runner, context, load_seconds })
    }

    /// An unquantized model runs as it is, on the CPU, and stores keys and values exactly: it is the reference.
    fn load_uncoded(self, setup: &Setup) -> Result<Box<dyn Runner>> {
        let path = self.path.display();
        if setup.device() != Device::Cpu {
            bail!(Usage(format!("--device {}: {path} is not quantized and runs on the CPU only; quantize it first", setup.device())));
        }
        if setup.strategy != Strategy::Auto {
            bail!(Usage(format!("{path}: not quantized, so there is nothing to decode; leave --strategy out")));
        }
        if let Some(budget) = setup.limits.memory_budget {
            bail!(Usage(format!("--memory-budget {}: {path} is not quantized and is used where it lies; quantize it first", budget.0)));
        }
        let weights = Dense::new(&self.dir, self.model.config(), Arc::new(Pool::new(setup.threads)), setup.level())?;
        Ok(Box::new(CpuRunner::new(self.model, Box::new(weights), KvPrecision::F32)))
    }
}

/// A model that can run.
pub struct Engine {
    /// Model and weights.
    pub runner: Box<dyn Runner>,
    /// Positions of a KV cache.
    pub context: usize,
    /// From opening the directory to being ready to run.
    pub load_seconds: f64,
}
