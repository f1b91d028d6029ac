//! Counts of the symbols and quads of a matrix: what its parameters and its book are chosen from.

use tersor_codec::Histogram;

use super::fragment::ZERO_QUAD;
use super::source::RowTiles;
use super::{Geometry, LOW_BITS_MAX, Source, TILE_ROWS, parallel};

/// Weights that a sample holds at most (one row tile at least). The codes of some thousand quads, built from a million, cost about
/// 0.0005 bits per weight more than those of the true frequencies.
const SAMPLE_WEIGHTS_MAX: usize = 1 << 22;

/// Counts of (a sample of) a matrix, padding included.
#[derive(Debug, Clone)]
pub struct Statistics {
    symbols: Histogram,
    /// by low_bits: (65536,) count of each quad
    quads: [Vec<u64>; LOW_BITS_MAX as usize + 1],
}

impl Statistics {
    /// Counts row tiles spread evenly over the matrix, some four million weights, on up to `threads` threads.
    pub fn sample(source: &dyn Source, geometry: Geometry, threads: usize) -> Self {
        let row_tile_weights = TILE_ROWS * geometry.padded_cols();
        let stride = (geometry.row_tiles() * row_tile_weights).div_ceil(SAMPLE_WEIGHTS_MAX);
        let samples = geometry.row_tiles().div_ceil(stride);
        let workers = threads.clamp(1, samples);
        let count = |worker: usize| {
            let mut statistics = Self { symbols: Histogram::new(), quads: [0; 3].map(|_| vec![0; 1 << 16]) };
            let mut tiles = RowTiles::new(source, geometry);
            for sample in (worker..samples).step_by(workers) {
                statistics.add(tiles.read((sample * stride + stride / 2).min(geometry.row_tiles() - 1)));
            }
            statistics
        };
        let mut parts = parallel::map(workers, threads, || (), |(), worker| count(worker)).into_iter();
        let mut sum = parts.next().expect("there is at least one worker");
        for part in parts {
            sum.merge(&part);
        }
        sum
    }

    /// Adds the counts of `other`, for a book that serves several matrices.
    pub fn merge(&mut self, other: &Self) {
        self.symbols.merge(&other.symbols);
        for (sum, part) in self.quads.iter_mut().zip(&other.quads) {
            sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
    }

    /// Counts of the symbols.
    pub fn symbols(&self) -> &Histogram {
        &self.symbols
    }

    fn add(&mut self, symbols: &[i16]) {
        self.symbols.add(symbols);
        for (low_bits, counts) in self.quads.iter_mut().enumerate() {
            for quad in symbols.chunks_exact(4) {
                let nibble = |i: usize| ((quad[i] >> low_bits).clamp(-8, 7) + 8) as usize;
                counts[nibble(0) | nibble(1) << 4 | nibble(2) << 8 | nibble(3) << 12] += 1;
            }
        }
    }

    /// The quads with `low_bits` raw bits split off, likeliest first.
    pub(super) fn ranking(&self, low_bits: u32) -> Ranking {
        let counts = &self.quads[low_bits as usize];
        let mut ranked: Vec<(u64, u16)> = (0..=u16::MAX)
            .filter(|&quad| quad != ZERO_QUAD && counts[usize::from(quad)] > 0)
            .map(|quad| (counts[usize::from(quad)], quad))
            .collect();
        ranked.sort_unstable_by_key(|&(count, quad)| (u64::MAX - count, quad));
        Ranking { zero_count: counts[usize::from(ZERO_QUAD)], total: counts.iter().sum(), ranked }
    }
}

/// Quads by frequency.
pub(super) struct Ranking {
    /// Count of the quad of zeros.
    pub zero_count: u64,
    /// Count of all quads.
    pub total: u64,
    /// (count, quad) of all others that occur, likeliest first.
    pub ranked: Vec<(u64, u16)>,
}
