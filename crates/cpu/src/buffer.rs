//! Bytes aligned to cache lines.

use std::alloc::{self, Layout};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Alignment in bytes: a cache line, and a whole AVX-512 register.
const ALIGN: usize = 64;

/// A byte buffer that starts on a cache line. It comes zeroed from the system, so that pages nobody
/// writes cost nothing.
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
        if self.len > 0 {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_zero_and_grow() {
        let mut b = AlignedBytes::default();
        assert!(b.is_empty());
        for len in [1, 64, 65, 4096] {
            b.ensure(len);
            assert_eq!(b.len(), len);
            assert_eq!(b.as_ptr().align_offset(ALIGN), 0);
            assert!(b.iter().all(|b| *b == 0));
            b.fill(7);
        }
        b.ensure(10);
        assert_eq!(b.len(), 4096, "a buffer never shrinks");
    }
}
