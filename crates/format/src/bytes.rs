//! Shared, immutable bytes: a mapped file or an owned buffer. All unsafe code of this crate is in this file.
#![allow(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::sync::Arc;

use memmap2::Mmap;

enum Buffer {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl Buffer {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }
}

/// A range of a mapped file or of an owned buffer. Cheap to clone; the last clone unmaps or frees.
#[derive(Clone)]
pub struct Bytes {
    buffer: Arc<Buffer>,
    range: Range<usize>,
}

impl Bytes {
    /// Maps a whole file, read-only. Nothing is read yet.
    ///
    /// The file must not be changed or truncated while it is mapped: a truncated file raises SIGBUS when touched, and
    /// changed bytes escape the checks made before. `DirWriter` replaces files by renaming and never writes to one in place.
    pub(crate) fn map(file: &File) -> io::Result<Self> {
        // mmap refuses a length of zero.
        if file.metadata()?.len() == 0 {
            return Ok(Self::from(Vec::new()));
        }
        // SAFETY: the map is read-only and private to this process, and the only access is through `&[u8]`. That nobody
        // changes the file meanwhile cannot be enforced on Unix; it is the documented condition of opening a directory, as
        // for every memory-mapping loader.
        let map = unsafe { Mmap::map(file)? };
        let range = 0..map.len();
        Ok(Self { buffer: Arc::new(Buffer::Mapped(map)), range })
    }

    /// A part of these bytes. `None` if the range does not lie inside.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        if range.start > range.end || range.end > self.range.len() {
            return None;
        }
        let range = self.range.start + range.start..self.range.start + range.end;
        Some(Self { buffer: Arc::clone(&self.buffer), range })
    }

    /// Tells the system that these bytes are needed soon, so that it reads them in large pieces before they are touched. Nothing happens to
    /// owned bytes, and on systems other than Unix.
    ///
    /// # Errors
    /// madvise fails.
    pub fn fetch(&self) -> io::Result<()> {
        #[cfg(unix)]
        if let Buffer::Mapped(map) = &*self.buffer
            && !self.range.is_empty()
        {
            map.advise_range(memmap2::Advice::WillNeed, self.range.start, self.range.len())?;
        }
        Ok(())
    }

    /// Tells the system that these bytes are not needed for now, so that they no longer count as resident. They stay
    /// valid: the next access reads the file again. Nothing happens to owned bytes, and on systems other than Unix.
    ///
    /// # Errors
    /// madvise fails.
    pub fn release(&self) -> io::Result<()> {
        #[cfg(unix)]
        if let Buffer::Mapped(map) = &*self.buffer
            && !self.range.is_empty()
        {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: DONTNEED on a read-only, file-backed mapping discards no data: later reads fault the same bytes in
            // from the file. Pages shared with neighbouring tensors (memmap2 rounds outward to whole pages) are refilled
            // likewise.
            unsafe { map.unchecked_advise_range(advice, self.range.start, self.range.len())? };
        }
        Ok(())
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self { buffer: Arc::new(Buffer::Owned(bytes)), range }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer.as_slice()[self.range.clone()]
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({})", self.len())
    }
}
