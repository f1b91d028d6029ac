//! What can go wrong in a kernel.

use tersor_codec::DecodeError;

/// Why a kernel refused its input. Whatever the bytes, a kernel returns one of these or the right result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// A chunk that does not decode.
    #[error("chunk {chunk} is corrupt: {source}")]
    Corrupt {
        /// Index in the jobs of the call; 0 where there is only one.
        job: usize,
        /// Index in the tensor.
        chunk: usize,
        /// What the codec says.
        source: DecodeError,
    },
    /// A chunk decodes to symbols that the tensor's header excludes, so that they do not fit the
    /// decoded form.
    #[error("chunk {chunk} is corrupt: {found} symbols are outside of the range that the header gives")]
    OutOfRange {
        /// Index in the tensor.
        chunk: usize,
        /// Symbols outside.
        found: usize,
    },
    /// The tensor has more or fewer wide symbols than its header says.
    #[error("the header counts {expected} wide symbols, {at_least} or more are there")]
    WideSymbolsExceed {
        /// As the header has it.
        expected: usize,
        /// Found before giving up.
        at_least: usize,
    },
    /// The tensor has fewer wide symbols than its header says.
    #[error("the header counts {expected} wide symbols, {found} are there")]
    WideSymbolsMissing {
        /// As the header has it.
        expected: usize,
        /// As decoded.
        found: usize,
    },
    /// Symbols that four bits cannot hold, in a tensor asked for in such a layout.
    #[error("symbols from {min} to {max} do not fit 4 bits, which hold -8 to 7")]
    NotNibbles {
        /// Least symbol by the header, clamped to -128.
        min: i8,
        /// Greatest symbol by the header, clamped to 127.
        max: i8,
    },
    /// Input or output of a wrong shape: the caller's mistake.
    #[error("job {job}: {what} is {found}, must be {expected}")]
    Shape {
        /// Index in the jobs of the call.
        job: usize,
        /// What has the wrong size.
        what: &'static str,
        /// What it must be.
        expected: usize,
        /// What it is.
        found: usize,
    },
}

impl KernelError {
    /// A chunk of the only job that does not decode.
    pub(crate) fn corrupt((chunk, source): (usize, DecodeError)) -> KernelError {
        KernelError::Corrupt { job: 0, chunk, source }
    }

    /// Order in which errors of parallel tasks are reported, so that the same input gives the same
    /// error: by job, then by chunk.
    pub(crate) fn place(&self) -> (usize, usize) {
        match *self {
            KernelError::Corrupt { job, chunk, .. } => (job, chunk),
            KernelError::OutOfRange { chunk, .. } => (0, chunk),
            KernelError::Shape { job, .. } => (job, 0),
            KernelError::WideSymbolsExceed { .. } | KernelError::WideSymbolsMissing { .. } | KernelError::NotNibbles { .. } => {
                (usize::MAX, 0)
            }
        }
    }
}

/// The first error by place of those that parallel tasks report.
#[derive(Default)]
pub(crate) struct FirstError(std::sync::Mutex<Option<KernelError>>);

impl FirstError {
    pub(crate) fn report(&self, error: KernelError) {
        let mut first = self.0.lock().unwrap_or_else(|e| e.into_inner());
        if first.as_ref().is_none_or(|f| error.place() < f.place()) {
            *first = Some(error);
        }
    }

    pub(crate) fn into_result(self) -> Result<(), KernelError> {
        self.0.into_inner().unwrap_or_else(|e| e.into_inner()).map_or(Ok(()), Err)
    }
}
