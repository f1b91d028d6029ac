//! What can go wrong with a GPU, in one line each.

use thiserror::Error;

/// Why something did not run on a GPU.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CudaError {
    /// `libcuda` cannot be loaded.
    #[error("no NVIDIA driver on this machine: libcuda cannot be loaded")]
    NoDriver,
    /// The driver has no function that is needed.
    #[error("the NVIDIA driver is too old: it supports CUDA {major}.{minor}, at least 12.0 is needed")]
    DriverTooOld {
        /// Of the CUDA version that the driver supports.
        major: i32,
        /// Likewise.
        minor: i32,
    },
    /// There is no such GPU.
    #[error("there is no GPU {ordinal}: this machine has {count}")]
    NoDevice {
        /// The GPU asked for.
        ordinal: usize,
        /// GPUs of this machine.
        count: usize,
    },
    /// The kernels need more than the GPU has.
    #[error("{name} has compute capability {major}.{minor}: at least 8.0 is needed")]
    DeviceTooOld {
        /// Name of the GPU.
        name: String,
        /// Of its compute capability.
        major: i32,
        /// Likewise.
        minor: i32,
    },
    /// A kernel does not compile.
    #[error("{kernel} does not compile for {arch}: {cause}")]
    Compile {
        /// File of the kernel.
        kernel: &'static str,
        /// What it was compiled for, such as `sm_90a`.
        arch: String,
        /// The compiler's first line.
        cause: String,
    },
    /// The GPU's memory is full.
    #[error(
        "out of GPU memory: {what} takes {bytes} bytes, {free} of {total} bytes are free; a smaller --memory-budget makes prefetch or auto fit"
    )]
    OutOfMemory {
        /// What the memory was for.
        what: &'static str,
        /// Bytes asked for.
        bytes: u64,
        /// Bytes free.
        free: u64,
        /// Bytes of the GPU.
        total: u64,
    },
    /// The host refuses memory that the GPU can read.
    #[error("cannot pin {bytes} bytes of host memory: {cause}")]
    Pin {
        /// Bytes asked for.
        bytes: u64,
        /// What the driver says.
        cause: String,
    },
    /// The driver refuses a call. After most errors of a kernel the GPU cannot be used any more by this process.
    #[error("{call}: {cause}")]
    Call {
        /// What was attempted.
        call: &'static str,
        /// What the driver says.
        cause: String,
    },
    /// A chunk did not decode.
    #[error("chunk {chunk} is corrupt: words, escapes and states do not meet")]
    Corrupt {
        /// Number of the chunk in its tensor.
        chunk: usize,
    },
    /// A matrix that the kernels were not made for.
    #[error("{what} is not supported on a GPU")]
    Unsupported {
        /// In words.
        what: String,
    },
}
