//! Counts of symbols.

/// How often each i16 symbol occurs.
#[derive(Clone, PartialEq, Eq)]
pub struct Histogram {
    /// (65536,) count of symbol `i - 32768`
    counts: Vec<u64>,
}

impl Histogram {
    /// Counts of nothing.
    pub fn new() -> Self {
        Self { counts: vec![0; 1 << 16] }
    }
    /// Counts `symbols` in.
    pub fn add(&mut self, symbols: &[i16]) {
        let _ = symbols;
        todo!()
    }
    /// Adds the counts of `other`.
    pub fn merge(&mut self, other: &Self) {
        let _ = other;
        todo!()
    }
    /// Entropy in bits per symbol; 0 for an empty histogram.
    pub fn entropy_bits(&self) -> f64 {
        todo!()
    }
    /// Symbols counted.
    pub fn total(&self) -> u64 {
        todo!()
    }
    /// How often `symbol` occurs.
    pub fn count(&self, symbol: i16) -> u64 {
        self.counts[(i32::from(symbol) + 32768) as usize]
    }
    /// Symbols that occur, ascending, with their counts.
    pub fn iter(&self) -> impl Iterator<Item = (i16, u64)> + '_ {
        self.counts.iter().enumerate().filter(|(_, n)| **n > 0).map(|(i, &n)| ((i as i32 - 32768) as i16, n))
    }
    /// The least symbol that occurs.
    pub fn min(&self) -> Option<i16> {
        self.iter().next().map(|(symbol, _)| symbol)
    }
    /// The greatest symbol that occurs.
    pub fn max(&self) -> Option<i16> {
        todo!()
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}
