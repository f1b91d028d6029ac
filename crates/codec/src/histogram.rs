//! Counts of symbols: what tables are built from.

use std::fmt;

use crate::log2::log2;
use crate::{ESCAPE, SYMBOL_BIAS};

/// How often each of the 65,536 possible symbols occurs.
///
/// ```
/// let mut histogram = tersor_codec::Histogram::new();
/// histogram.add(&[0, 0, 1, -300]);
/// assert_eq!(histogram.entropy_bits(), 1.5);
/// assert_eq!(histogram.iter().collect::<Vec<_>>(), [(-300, 1), (0, 2), (1, 1)]);
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Histogram {
    /// (65536,) count of symbol `index - 32768`
    counts: Vec<u64>,
}

impl Histogram {
    /// Counts of nothing.
    pub fn new() -> Self {
        Self { counts: vec![0; 1 << 16] }
    }

    /// Counts `symbols` in.
    pub fn add(&mut self, symbols: &[i16]) {
        // Equal neighbours would wait for each other's increment: four columns of counters keep
        // them apart, and u32 counters for the symbols that matter stay in L1. The slices are short
        // enough for u32 never to overflow.
        for symbols in symbols.chunks(1 << 30) {
            let mut core = [[0u32; 256]; 4];
            let mut quads = symbols.chunks_exact(4);
            for quad in &mut quads {
                for (column, &symbol) in core.iter_mut().zip(quad) {
                    self.add_one(column, symbol);
                }
            }
            for &symbol in quads.remainder() {
                self.add_one(&mut core[0], symbol);
            }
            for byte in 1..=255u8 {
                let count: u64 = core.iter().map(|column| u64::from(column[usize::from(byte)])).sum();
                self.counts[index(i16::from(byte) - SYMBOL_BIAS)] += count;
            }
        }
    }

    #[inline(always)]
    fn add_one(&mut self, core: &mut [u32; 256], symbol: i16) {
        match symbol_byte(symbol) {
            ESCAPE => self.counts[index(symbol)] += 1,
            byte => core[usize::from(byte)] += 1,
        }
    }

    /// Adds the counts of `other`.
    pub fn merge(&mut self, other: &Self) {
        for (count, other) in self.counts.iter_mut().zip(&other.counts) {
            *count += other;
        }
    }

    /// Empirical entropy in bits per symbol; 0 for an empty histogram.
    pub fn entropy_bits(&self) -> f64 {
        let total = self.total();
        if total == 0 {
            return 0.0;
        }
        let sum: f64 = self.iter().map(|(_, count)| count as f64 * (log2(total) - log2(count))).sum();
        sum / total as f64
    }

    /// Symbols counted.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// How often `symbol` occurs.
    pub fn count(&self, symbol: i16) -> u64 {
        self.counts[index(symbol)]
    }

    /// Symbols that occur, ascending, with their counts.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (i16, u64)> + '_ {
        let symbols = i16::MIN..=i16::MAX;
        symbols.zip(self.counts.iter().copied()).filter(|&(_, count)| count > 0)
    }

    /// The least symbol that occurs.
    pub fn min(&self) -> Option<i16> {
        self.iter().next().map(|(symbol, _)| symbol)
    }

    /// The greatest symbol that occurs.
    pub fn max(&self) -> Option<i16> {
        self.iter().next_back().map(|(symbol, _)| symbol)
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

fn index(symbol: i16) -> usize {
    // Flipping the sign bit adds 32768 modulo 2^16.
    usize::from(symbol as u16 ^ 0x8000)
}

/// `symbol + 128` of a core symbol, 0 of a far one.
#[inline(always)]
pub(crate) fn symbol_byte(symbol: i16) -> u8 {
    // Far symbols that wrap around land far from 1..=255: the sum is off by 2^16.
    let biased = symbol.wrapping_add(SYMBOL_BIAS) as u16;
    if biased <= 255 { biased as u8 } else { 0 }
}

/// The symbols of a histogram as a table sees them.
pub(crate) struct Population {
    /// Symbol byte and count of the core symbols that occur: frequent ones first, ties by ascending
    /// byte.
    pub(crate) core: Vec<(u8, u64)>,
    /// Core symbols counted.
    pub(crate) core_total: u64,
    /// Far symbols counted.
    pub(crate) far_total: u64,
}

impl Population {
    pub(crate) fn new(histogram: &Histogram) -> Self {
        let (mut core, mut far_total) = (Vec::new(), 0);
        for (symbol, count) in histogram.iter() {
            match symbol_byte(symbol) {
                ESCAPE => far_total += count,
                byte => core.push((byte, count)),
            }
        }
        core.sort_by_key(|&(byte, count)| (std::cmp::Reverse(count), byte));
        let core_total = core.iter().map(|&(_, count)| count).sum();
        Self { core, core_total, far_total }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_all_symbols() {
        for symbol in i16::MIN..=i16::MAX {
            let expected = if (-127..=127).contains(&symbol) { (symbol + 128) as u8 } else { 0 };
            assert_eq!(symbol_byte(symbol), expected, "{symbol}");
        }
    }

    #[test]
    fn counts_every_symbol_and_merges() {
        let all: Vec<i16> = (i16::MIN..=i16::MAX).chain([5; 7]).collect();
        let mut histogram = Histogram::new();
        histogram.add(&all);
        assert_eq!((histogram.count(5), histogram.count(4), histogram.count(i16::MIN)), (8, 1, 1));
        assert_eq!((histogram.min(), histogram.max()), (Some(i16::MIN), Some(i16::MAX)));
        let mut twice = histogram.clone();
        twice.merge(&histogram);
        assert_eq!((twice.total(), twice.count(i16::MAX)), (2 * 65543, 2));
    }

    #[test]
    fn entropy_of_known_distributions() {
        let mut histogram = Histogram::new();
        assert_eq!(histogram.entropy_bits(), 0.0);
        assert_eq!((histogram.min(), histogram.max()), (None, None));
        histogram.add(&[3; 10]);
        assert_eq!(histogram.entropy_bits(), 0.0);
        let mut uniform = Histogram::new();
        uniform.add(&[-2, -1, 0, 1, 2, 3, 4, 500]);
        assert_eq!(uniform.entropy_bits(), 3.0);
    }

    #[test]
    fn population_ranks_the_core_and_counts_the_far() {
        let mut histogram = Histogram::new();
        histogram.add(&[0, 0, -1, 1, 1, 128, -128, 127, -127]);
        let population = Population::new(&histogram);
        assert_eq!(population.core, [(128, 2), (129, 2), (1, 1), (127, 1), (255, 1)]);
        assert_eq!((population.core_total, population.far_total), (7, 2));
    }
}
