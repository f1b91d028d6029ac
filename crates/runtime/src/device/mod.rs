//! Where a model runs, and the seam to the backends: everything that depends on the device is decided here.
//!
//! On the CPU a strategy is a [`Weights`](crate::model::weights::Weights) under the common forward pass. Another backend runs the whole pass itself:
//! it is a [`Runner`] of its own, which takes norms and biases from the [`Model`].

mod cuda;
mod kernels;

pub use kernels::{KernelReport, KernelRequest, KernelRow, kernels};

use crate::model::kv::KvPrecision;
use crate::model::{CpuRunner, Model, Runner};
use crate::residency::{self, OpenError, Options, Plan, Strategy};
use serde::{Serialize, Serializer};
use std::fmt;
use std::str::FromStr;
use tersor_format::ModelDir;
use thiserror::Error;

/// How coded models store keys and values, on every device.
pub const KV_PRECISION: KvPrecision = KvPrecision::F16;

/// Where a model runs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[non_exhaustive]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// An NVIDIA GPU, by the driver's number for it.
    Cuda(usize),
}

impl Device {
    /// The strategies that run on it, in the order of the documentation.
    #[must_use]
    pub const fn strategies(self) -> &'static [Strategy] {
        match self {
            Self::Cpu => &Strategy::CPU,
            Self::Cuda(_) => &Strategy::CUDA,
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.pad("cpu"),
            Self::Cuda(index) => f.pad(&format!("cuda:{index}")),
        }
    }
}

impl FromStr for Device {
    type Err = UnknownDevice;

    /// `cpu`, `cuda` (the first one) or `cuda:N`.
    fn from_str(name: &str) -> Result<Self, UnknownDevice> {
        let unknown = || UnknownDevice { name: name.to_owned() };
        match name {
            "cpu" => return Ok(Self::Cpu),
            "cuda" => return Ok(Self::Cuda(0)),
            _ => {}
        }
        let index = name.strip_prefix("cuda:").filter(|index| index.bytes().all(|byte| byte.is_ascii_digit()));
        index.and_then(|index| index.parse().ok()).map(Self::Cuda).ok_or_else(unknown)
    }
}

impl Serialize for Device {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A device of an unknown name.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("unknown device {name:?}: cpu, cuda or cuda:N")]
pub struct UnknownDevice {
    name: String,
}

/// A device beside the CPU.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// As [`Device`] is written.
    pub device: Device,
    /// The maker's name for it.
    pub name: String,
    /// Its memory, bytes.
    pub memory_bytes: u64,
}

/// The devices of this machine beside the CPU; none where there is no driver.
#[must_use]
pub fn list() -> Vec<DeviceInfo> {
    let gpu = |(index, name, memory_bytes)| DeviceInfo { device: Device::Cuda(index), name, memory_bytes };
    cuda::list().into_iter().map(gpu).collect()
}

/// What is known of a GPU.
///
/// # Errors
/// [`OpenError::Device`] if it cannot be used, with the reason.
pub fn info(index: usize) -> Result<DeviceInfo, OpenError> {
    let (name, memory_bytes) = cuda::info(index)?;
    Ok(DeviceInfo { device: Device::Cuda(index), name, memory_bytes })
}

/// Opens a coded model under a strategy on a device. Compares every checksum first.
///
/// Takes the directory, so that its files are unmapped as soon as no matrix needs them; `model` is what [`Model::load`] read from it.
///
/// # Errors
/// As [`residency::open`], and a device that is absent or too small.
pub fn open(dir: ModelDir, model: Model, device: Device, strategy: Strategy, options: &Options) -> Result<Box<dyn Runner>, OpenError> {
    match device {
        Device::Cpu => Ok(Box::new(CpuRunner::new(model, residency::open(dir, strategy, options)?, KV_PRECISION))),
        Device::Cuda(index) => cuda::open(&dir, &model, index, strategy, options),
    }
}

/// What [`open`] would hold, matrix kind by matrix kind, with predicted times and reasons. Reads headers and scales only.
///
/// # Errors
/// As [`open`], but for damage in the coded bytes.
pub fn explain(dir: &ModelDir, device: Device, strategy: Strategy, options: &Options) -> Result<Plan, OpenError> {
    match device {
        Device::Cpu => residency::explain(dir, strategy, options),
        Device::Cuda(_) => Err(OpenError::Device {
            cause: format!("{device}: plans are explained for the CPU only; what a GPU holds is reported once the model is loaded"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for device in [Device::Cpu, Device::Cuda(0), Device::Cuda(12)] {
            assert_eq!(device.to_string().parse(), Ok(device));
            assert_eq!(serde_json::to_value(device).unwrap(), device.to_string());
        }
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        for bad in ["", "gpu", "CPU", "cpu:0", "cuda:", "cuda:-1", "cuda:+1", "cuda: 1", "cuda:1x", "cuda:99999999999999999999"] {
            let error = bad.parse::<Device>().unwrap_err();
            assert_eq!(error.to_string(), format!("unknown device {bad:?}: cpu, cuda or cuda:N"));
        }
    }

    #[test]
    fn only_gpus_decode_on_a_second_stream() {
        assert!(!Device::Cpu.strategies().contains(&Strategy::GpuAsync));
        assert_eq!(Device::Cuda(0).strategies(), Strategy::ALL);
    }
}
