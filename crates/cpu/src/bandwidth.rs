//! Measured read bandwidth: the roof under which the kernels work.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::isa::{PLAIN_AHEAD_BYTES, prefetch};
use crate::level::per_level;
use crate::{Level, Pool};

/// Words of four lines.
const SUMS: usize = 32;

/// Bytes per second at which the pool's threads read `buffer`, the best of `passes` passes.
///
/// A buffer several times the size of the last-level cache measures memory, a small one the cache.
/// Each task reads one contiguous part, as the kernels do.
pub fn read_bandwidth(pool: &Pool, level: Level, buffer: &[u8], passes: u32) -> f64 {
    let parts = 8 * pool.threads();
    let part = buffer.len().div_ceil(parts).max(1);
    // Kept and printed to nobody: it makes the reads observable.
    let sum = AtomicU64::new(0);
    let mut best = 0f64;
    for _ in 0..passes {
        let start = Instant::now();
        pool.run(buffer.len().div_ceil(part), &|task| {
            let part = &buffer[task * part..buffer.len().min((task + 1) * part)];
            sum.fetch_xor(checksum(level, part), Ordering::Relaxed);
        });
        std::hint::black_box(sum.load(Ordering::Relaxed));
        best = best.max(buffer.len() as f64 / start.elapsed().as_secs_f64());
    }
    best
}

per_level! {
    /// The xor of all whole words. Four lines at once, so that sums do not wait for each other, and asked for as far ahead as the plain
    /// GEMV asks for its own: what it reads is no more than this.
    fn checksum(bytes: &[u8]) -> u64 {
        let (blocks, rest) = bytes.as_chunks::<{ 8 * SUMS }>();
        let mut sums = [0; SUMS];
        for block in blocks {
            for line in block.as_chunks::<64>().0 {
                prefetch(line.as_ptr().wrapping_add(PLAIN_AHEAD_BYTES));
            }
            for (sum, word) in sums.iter_mut().zip(block.as_chunks().0) {
                *sum ^= u64::from_le_bytes(*word);
            }
        }
        let rest = rest.as_chunks().0.iter().fold(0, |sum, word| sum ^ u64::from_le_bytes(*word));
        sums.iter().fold(rest, |all, sum| all ^ sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::levels;

    #[test]
    fn every_level_reads_every_word() {
        let mut bytes = vec![0u8; 4096 + 104];
        let mut want = 0u64;
        for (i, word) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *word = (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
            want ^= u64::from_le_bytes(*word);
        }
        for level in levels() {
            assert_eq!(checksum(level, &bytes), want, "{level}");
            assert!(read_bandwidth(&Pool::new(2), level, &bytes, 3) > 0.0);
        }
    }
}
