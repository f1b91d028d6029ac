//! Bytes aligned to cache lines.

use std::alloc::{self, Layout};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Alignment in bytes: a cache line, and a whole AVX-512 register.
const ALIGN: usize = 64;

/// A byte buffer that starts on a cache line, zeroed. Large ones are mapped in pages of 2 MiB where the system has them: the decoded form of
/// a 1.1 B model is 136,000 small pages, and faulting those in took more of a load than decoding did.
pub(crate) struct AlignedBytes {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: it owns its bytes, as a Box<[u8]> does.
unsafe impl Send for AlignedBytes {}
// SAFETY: as above.
unsafe impl Sync for AlignedBytes {}

impl AlignedBytes {
    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len, ALIGN).expect("a buffer of less than isize::MAX bytes")
    }

    /// `len` zero bytes.
    pub(crate) fn zeroed(len: usize) -> AlignedBytes {
        if len == 0 {
            return AlignedBytes::default();
        }
        if len >= huge::BYTES_MIN {
            let start = huge::map(len).unwrap_or_else(|| alloc::handle_alloc_error(AlignedBytes::layout(len)));
            return AlignedBytes { start, len };
        }
        let layout = AlignedBytes::layout(len);
        // SAFETY: the layout has a size above 0.
        let start = unsafe { alloc::alloc_zeroed(layout) };
        AlignedBytes { start: NonNull::new(start).unwrap_or_else(|| alloc::handle_alloc_error(layout)), len }
    }

    /// Makes it at least `len` bytes long; what it held is lost if it grows.
    pub(crate) fn ensure(&mut self, len: usize) {
        if self.len < len {
            // The old buffer goes first, so that both are never held at once.
            *self = AlignedBytes::default();
            *self = AlignedBytes::zeroed(len);
        }
    }
}

impl Default for AlignedBytes {
    fn default() -> AlignedBytes {
        AlignedBytes { start: NonNull::without_provenance(std::num::NonZero::new(ALIGN).expect("not 0")), len: 0 }
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        if self.len >= huge::BYTES_MIN {
            // SAFETY: mapped by `zeroed`, which falls back to the allocator for no such length.
            unsafe { huge::unmap(self.start, self.len) }
        } else if self.len > 0 {
            // SAFETY: allocated with this layout by `zeroed`.
            unsafe { alloc::dealloc(self.start.as_ptr(), AlignedBytes::layout(self.len)) }
        }
    }
}

impl Deref for AlignedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` initialized bytes that this owns; for 0 any aligned pointer will do.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

/// Anonymous memory in pages of 2 MiB, if the system grants them (`madvise`); in small pages if not.
#[cfg(target_os = "linux")]
mod huge {
    use std::ptr::{self, NonNull};

    const PAGE: usize = 2 << 20;
    /// From this length on, buffers are mapped.
    pub const BYTES_MIN: usize = PAGE;
    /// A multiple of every page size in use: the end is not rounded up to `PAGE`, so that nothing is held beyond what is counted.
    const GRAIN: usize = 64 << 10;

    /// Zeroed memory that starts on a page of 2 MiB; `None` if there is none.
    pub fn map(len: usize) -> Option<NonNull<u8>> {
        let len = len.checked_next_multiple_of(GRAIN)?;
        let reserved = len.checked_add(PAGE)?;
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, at an address that the system chooses.
        let base = unsafe { libc::mmap(ptr::null_mut(), reserved, access, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return None;
        }
        let head = base.align_offset(PAGE).min(PAGE);
        // SAFETY: `head + len` is at most `reserved`: all pointers lie in the new mapping, which nobody else knows, and the parts given back
        // are whole small pages (the base is one's start, `head` and `len` are multiples). The advice changes no contents.
        unsafe {
            let start = base.add(head);
            if head > 0 {
                libc::munmap(base, head);
            }
            if head < PAGE {
                libc::munmap(start.add(len), PAGE - head);
            }
            libc::madvise(start, len, libc::MADV_HUGEPAGE);
            NonNull::new(start.cast())
        }
    }

    /// # Safety
    /// `start` came from [`map`] with the same `len` and is not used again.
    pub unsafe fn unmap(start: NonNull<u8>, len: usize) {
        // SAFETY: the mapping that `map` left, whole.
        unsafe { libc::munmap(start.as_ptr().cast(), len.next_multiple_of(GRAIN)) };
    }
}

/// Elsewhere every buffer comes from the allocator.
#[cfg(not(target_os = "linux"))]
mod huge {
    use std::ptr::NonNull;

    pub const BYTES_MIN: usize = usize::MAX;

    pub fn map(_: usize) -> Option<NonNull<u8>> {
        None
    }

    pub unsafe fn unmap(_: NonNull<u8>, _: usize) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_zero_and_grow() {
        let mut b = AlignedBytes::default();
        assert!(b.is_empty());
        for len in [1, 64, 65, 4096, huge::BYTES_MIN.min(4 << 20), (5 << 20) + 3] {
            b.ensure(len);
            assert_eq!(b.len(), len);
            assert_eq!(b.as_ptr().align_offset(ALIGN), 0);
            assert!(b.iter().all(|b| *b == 0));
            b.fill(7);
        }
        b.ensure(10);
        assert_eq!(b.len(), (5 << 20) + 3, "a buffer never shrinks");
    }
}
