//! Rates of a device's kernels, for people who compare them with its bandwidth.

use crate::residency::OpenError;
use std::path::Path;
use tersor_format::CodedTensor;

/// What is to be measured.
#[derive(Clone, Copy, Debug)]
pub struct KernelRequest<'a> {
    /// A matrix for each codec. Every kernel reads as many copies of it as do not fit the device's caches.
    pub samples: &'a [CodedTensor],
    /// Least time for each row, seconds.
    pub seconds: f64,
    /// Where compiled kernels are kept between runs; `None`: nowhere.
    pub cache_dir: Option<&'a Path>,
}

/// What was measured.
#[derive(Clone, PartialEq, Debug)]
pub struct KernelReport {
    /// The maker's name of the device.
    pub name: String,
    /// Its instruction set, for example `sm_90`.
    pub level: String,
    /// Sequential read bandwidth of its memory in the same run, bytes per second.
    pub read_bytes_per_second: f64,
    /// Row by row.
    pub rows: Vec<KernelRow>,
}

/// The rate of one kernel.
#[derive(Clone, PartialEq, Debug)]
pub struct KernelRow {
    /// `decode`, `fused-gemv` or `gemv`; `/4` and `/16`: of as many tokens, whose products are counted; `copy`, `file-decode`, `copy+decode`: the
    /// coded bytes of the file sent to the device, decoded there, and both with the host's work.
    pub kernel: &'static str,
    /// Which of [`KernelRequest::samples`] it read.
    pub sample: usize,
    /// Weights per second, the median of several windows.
    pub weights_per_second: f64,
    /// Bytes of the matrix that the kernel reads for each weight, in the form that it reads.
    pub bytes_per_weight: f64,
}

/// Measures decoding, fused products and plain products on a GPU. Every kernel's answer is compared with the reference decoder's before it is timed.
///
/// # Errors
/// [`OpenError::Device`] if the GPU cannot be used or a kernel answers wrongly.
pub fn kernels(index: usize, request: &KernelRequest<'_>) -> Result<KernelReport, OpenError> {
    super::cuda::rates::measure(index, request)
}
