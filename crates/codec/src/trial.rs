//! The choice of static frequencies: which bytes get an entry, and how many slots each.
//!
//! The bits that a table costs, `sum count * (prob_bits - log2 freq)`, are a sum of convex functions of
//! the frequencies. For such a sum, a distribution of the `2^prob_bits` slots that no move of a single
//! slot improves is the best of all: slots are moved from where they are missed least to where they
//! help most until nothing improves. Which bytes deserve an entry is found by trying: the most frequent
//! one, the two most frequent, and so on, all others escaping at 8 bits more. Each trial starts from the
//! last one's frequencies and needs few moves.

use crate::escape::ESCAPED_BITS;
use crate::log2::log2;

/// What a table can hold, and costs.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    /// Sum of the frequencies.
    pub(crate) slots: u32,
    /// Largest frequency.
    pub(crate) freq_max: u32,
    /// Bits of a table entry in the file.
    pub(crate) entry_bits: f64,
    /// Whether ESCAPE has an entry even where no byte needs it.
    pub(crate) always_escape: bool,
}

/// The best frequencies for the `n` most frequent bytes and ESCAPE, for one `n` after the other.
pub(crate) struct Trial<'a> {
    limits: Limits,
    /// Bytes and their counts, frequent ones first.
    ranked: &'a [(u8, f64)],
    /// (slots + 1,) log2 of frequencies; [0] is unused
    log2: Vec<f64>,
    /// entry 0 is ESCAPE, entry i is that of `ranked[i - 1]`
    counts: Vec<f64>,
    freqs: Vec<u32>,
}

impl<'a> Trial<'a> {
    /// `total`: the counts of all bytes, those that are not `ranked` included.
    pub(crate) fn new(limits: Limits, ranked: &'a [(u8, f64)], total: f64) -> Self {
        let log2 = (0..=u64::from(limits.slots)).map(log2).collect();
        Self { limits, ranked, log2, counts: vec![total], freqs: vec![0] }
    }

    /// Gives entries to the `own` most frequent bytes; false if there are not enough slots.
    pub(crate) fn extend_to(&mut self, own: usize) -> bool {
        while self.counts.len() <= own {
            let (_, count) = self.ranked[self.counts.len() - 1];
            self.counts.push(count);
            self.freqs.push(1);
            // Exact for whole counts; others may leave less than nothing.
            self.counts[0] = (self.counts[0] - count).max(0.0);
        }
        let escapes = self.limits.always_escape || self.counts[0] > 0.0;
        if own + usize::from(escapes) > self.limits.slots as usize {
            return false;
        }
        self.freqs[0] = if escapes { self.freqs[0].max(1) } else { 0 };
        self.settle();
        true
    }

    /// Brings the sum to what is possible of `slots`, then moves slots while that saves bits.
    fn settle(&mut self) {
        let capacity = self.freqs.iter().filter(|&&freq| freq > 0).count() as u32 * self.limits.freq_max;
        let target = self.limits.slots.min(capacity);
        let mut sum: u32 = self.freqs.iter().sum();
        loop {
            let (gain_bits, grown) = self.best_to_grow();
            let (loss_bits, shrunk) = self.best_to_shrink();
            if sum < target {
                self.freqs[grown] += 1;
                sum += 1;
            } else if sum > target {
                self.freqs[shrunk] -= 1;
                sum -= 1;
            } else if gain_bits > loss_bits {
                // A strict gain, and the same expression gives gain and loss of a slot: no slot
                // goes back and forth.
                self.freqs[grown] += 1;
                self.freqs[shrunk] -= 1;
            } else {
                return;
            }
        }
    }

    /// Bits that the slot between frequencies `freq` and `freq + 1` of `entry` saves.
    fn slot_bits(&self, entry: usize, freq: u32) -> f64 {
        self.counts[entry] * (self.log2[freq as usize + 1] - self.log2[freq as usize])
    }

    fn best_to_grow(&self) -> (f64, usize) {
        let mut best = (f64::NEG_INFINITY, 0);
        for (entry, &freq) in self.freqs.iter().enumerate() {
            if (1..self.limits.freq_max).contains(&freq) {
                let bits = self.slot_bits(entry, freq);
                if bits > best.0 {
                    best = (bits, entry);
                }
            }
        }
        best
    }

    fn best_to_shrink(&self) -> (f64, usize) {
        let mut best = (f64::INFINITY, 0);
        for (entry, &freq) in self.freqs.iter().enumerate() {
            if freq > 1 {
                let bits = self.slot_bits(entry, freq - 1);
                if bits < best.0 {
                    best = (bits, entry);
                }
            }
        }
        best
    }

    /// Bits for all codes and the table itself, but for the far list, which no choice changes.
    pub(crate) fn cost_bits(&self) -> f64 {
        let (mut bits, mut entries) = (0.0, 0);
        for (&count, &freq) in self.counts.iter().zip(&self.freqs) {
            if freq > 0 {
                bits += count * (self.log2[self.limits.slots as usize] - self.log2[freq as usize]);
                entries += 1;
            }
        }
        bits + self.counts[0] * ESCAPED_BITS + f64::from(entries) * self.limits.entry_bits
    }

    /// By entry, ESCAPE first: the frequency, 0 for an ESCAPE that nothing needs. The sum is short of
    /// `slots` where the entries cannot take more.
    pub(crate) fn freqs(&self) -> &[u32] {
        &self.freqs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every split of the slots among three entries, against the moves of single slots. Starting
    /// from fewer entries, as `build` does, ESCAPE has slots to give up again.
    #[test]
    fn no_split_of_the_slots_is_better() {
        let limits = Limits { slots: 32, freq_max: 32, entry_bits: 24.0, always_escape: false };
        let samples = [[1u64, 1, 1], [100, 10, 1], [1000, 999, 1], [7, 3, 2], [1_000_000, 1, 1]];
        for (counts, first) in samples.into_iter().flat_map(|counts| [(counts, 0), (counts, 2)]) {
            let ranked: Vec<(u8, f64)> = (128..).zip(counts.map(|count| count as f64)).collect();
            for far_total in [0, 5, 2000] {
                let total = counts.iter().sum::<u64>() + far_total;
                let mut trial = Trial::new(limits, &ranked, total as f64);
                for entries in first..=2 {
                    assert!(trial.extend_to(entries));
                }
                let counts = [counts[0], counts[1], counts[2] + far_total];
                let cost = |freqs: [u32; 3]| -> f64 {
                    let bits = freqs.map(|freq| 5.0 - f64::from(freq).log2());
                    counts.iter().zip(bits).map(|(&count, bits)| count as f64 * bits).sum()
                };
                let found = cost([trial.freqs[1], trial.freqs[2], trial.freqs[0]]);
                for a in 1..=30 {
                    for b in 1..=31 - a {
                        assert!(found <= cost([a, b, 32 - a - b]) + 1e-9, "{counts:?}: {:?}", trial.freqs);
                    }
                }
            }
        }
    }
}
