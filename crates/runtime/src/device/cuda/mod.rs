//! Models on NVIDIA GPUs: the whole forward pass runs on the device, under the strategies of this folder, one file each.

mod auto;
mod cached;
mod fused;
mod gpu_async;
mod groups;
mod lru;
mod model;
mod prefetch;
mod profile;
pub(super) mod rates;
mod residency;
mod slots;

use crate::model::weights::LinearId;
use crate::model::{Model, Runner};
use crate::residency::set::{Source, TensorSet, verify};
use crate::residency::{Footprint, OpenError, Options, Strategy};
use groups::{Groups, Loader};
use model::{CudaRunner, Embedding, Parts};
use profile::DeviceProfile;
use residency::Residency;
use std::sync::Arc;
use tersor_cpu::Pool;
use tersor_cuda::{CudaError, Device, Kernels, nibble_bytes};
use tersor_format::ModelDir;

impl From<CudaError> for OpenError {
    fn from(e: CudaError) -> Self {
        Self::Device { cause: e.to_string() }
    }
}

/// Opens a coded model on GPU `index`.
pub(super) fn open(
    dir: &ModelDir,
    model: &Model,
    index: usize,
    strategy: Strategy,
    options: &Options,
) -> Result<Box<dyn Runner>, OpenError> {
    let device = Device::open(index)?;
    let kernels = Arc::new(Kernels::load(&device, options.cache_dir.as_deref())?);
    let set = TensorSet::open(dir)?;
    let pool = Pool::new(options.threads);
    verify(dir, &pool, &|_| Ok(()))?;
    let groups = Groups::new(dir, &set, model.config(), model.layers(), &kernels)?;
    let embedding = embedding(dir, &set, options)?;
    let fixed = CudaRunner::fixed_bytes(model.config(), &groups) + options.kv_bytes;
    // Without a budget the card's free memory is one, but for strategies whose size is not theirs to choose.
    let free = device.free_bytes()?;
    let budget = options.memory_budget.map_or(free, |bytes| bytes.min(free));
    let available = budget.saturating_sub(fixed);
    let given = options.memory_budget.map(|_| available);
    let mut detail = String::new();
    let residency: Box<dyn Residency> = {
        let mut loader = Loader::new(dir, &set, &groups, &kernels, &pool, options.level);
        check_budget(strategy, budget, &loader, fixed)?;
        match strategy {
            Strategy::Fused => Box::new(fused::open(&mut loader)?),
            Strategy::Cached => Box::new(cached::open(&mut loader)?),
            Strategy::Prefetch => Box::new(prefetch::Prefetch::open(&loader, given, options.timeline)?),
            Strategy::Lru => Box::new(lru::Lru::open(&loader, given, options.policy)?),
            Strategy::GpuAsync => Box::new(gpu_async::GpuAsync::open(&loader, options.timeline)?),
            Strategy::Auto => {
                let profile = DeviceProfile::load(&kernels, options.cache_dir.as_deref())?;
                detail = format!(
                    "plain {:.0} GB/s, coded {:.0} G weights/s on {}; ",
                    profile.plain_bytes_per_second / 1e9,
                    profile.quad_weights_per_second / 1e9,
                    profile.name
                );
                auto::open(&mut loader, Some(available), &profile)?
            }
        }
    };
    let parts = Parts { kernels, groups, embedding, strategy: strategy.name().to_owned(), detail };
    Ok(Box::new(CudaRunner::new(model, parts, residency)?))
}

/// The least that a strategy needs on the device; `fixed`: bytes besides weights.
fn least(strategy: Strategy, loader: &Loader<'_>, fixed: u64) -> Footprint {
    let groups = loader.groups;
    let coded = |index: usize| {
        let tensors = groups.all[index].slots.iter().filter_map(|&slot| loader.set.linears[slot].coded());
        tensors.map(|tensor| tensor.coded_bytes()).sum::<u64>()
    };
    let nibbles = |index: usize| nibble_bytes(&groups.all[index].geometry) as u64;
    let largest =
        |bytes: &dyn Fn(usize) -> u64| (0..groups.layers).map(|layer| Groups::of_layer(layer).map(bytes).sum()).max().unwrap_or(0);
    let all = (0..groups.all.len()).map(coded).sum();
    let scratch_bytes = fixed;
    match strategy {
        Strategy::Fused | Strategy::Lru => Footprint { mapped_bytes: all, scratch_bytes, ..Footprint::default() },
        Strategy::Cached => Footprint { decoded_bytes: cached::bytes(loader), scratch_bytes, ..Footprint::default() },
        Strategy::GpuAsync => Footprint {
            mapped_bytes: all,
            buffer_bytes: gpu_async::BUFFERS as u64 * largest(&nibbles),
            scratch_bytes,
            ..Footprint::default()
        },
        // The head stays, the layers pass through buffers.
        Strategy::Prefetch | Strategy::Auto => Footprint {
            mapped_bytes: coded(groups.all.len() - 1),
            buffer_bytes: prefetch::BUFFERS as u64 * largest(&coded),
            scratch_bytes,
            ..Footprint::default()
        },
    }
}

fn check_budget(strategy: Strategy, budget_bytes: u64, loader: &Loader<'_>, fixed: u64) -> Result<(), OpenError> {
    let needed = least(strategy, loader, fixed);
    if needed.total_bytes() <= budget_bytes {
        return Ok(());
    }
    let others = Strategy::CUDA.into_iter().map(|other| (other, least(other, loader, fixed).total_bytes()));
    let smaller = others.min_by_key(|(_, bytes)| *bytes).filter(|(_, bytes)| *bytes < needed.total_bytes());
    Err(OpenError::BudgetTooSmall { strategy, budget_bytes, least: Box::new(needed), smaller })
}

/// The embedding is read on the host, a row for each token.
fn embedding(dir: &ModelDir, set: &TensorSet, options: &Options) -> Result<Embedding, OpenError> {
    let slot = set.index.of(LinearId::EMBED).expect("every model has an embedding");
    let linear = &set.linears[slot];
    match &linear.source {
        Source::Coded { tensor, scales } => {
            Ok(Embedding { name: linear.name.clone(), tensor: tensor.clone(), scales: scales.clone(), level: options.level, decoded: None })
        }
        Source::Raw(_) => Err(OpenError::Device {
            cause: format!("{}: an embedding that is not coded is not supported on a GPU", dir.place(&linear.name)),
        }),
    }
}

/// Name and memory of a GPU.
///
/// # Errors
/// Why it cannot be used.
pub(super) fn info(index: usize) -> Result<(String, u64), OpenError> {
    let device = Device::open(index)?;
    Ok((device.properties().name.clone(), device.properties().memory_bytes))
}

/// Number, name and memory of every GPU; empty where there is no driver.
pub(super) fn list() -> Vec<(usize, String, u64)> {
    let count = tersor_cuda::device_count().unwrap_or(0);
    (0..count).filter_map(|index| info(index).ok().map(|(name, memory_bytes)| (index, name, memory_bytes))).collect()
}
