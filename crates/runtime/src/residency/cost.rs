//! The price of holding a matrix coded or decoded, and the best choice under a budget.
//!
//! Prices are a roofline: a product takes as long as the slowest of moving its bytes, producing its weights and multiplying them,
//!
//! `seconds = max(bytes / bandwidth, weights / rate, weights * tokens / dot rate)`,
//!
//! with the rates of a [`MachineProfile`]. A small model stays in the caches from step to step, where decoding costs more than the bytes that it
//! saves; a large one comes from memory, where it may not. So bandwidth and rates are those of the model's working set, between the rates measured in
//! the caches and in memory. The bandwidth is no less than what products with decoded matrices were seen to read, and products with coded matrices take a fifth
//! longer than their rate says ([`FUSED_IN_STEPS`]). Only the ratios of prices matter to a choice, and both sides of each were measured in the same run.

use super::profile::MachineProfile;
use tersor_codec::Codec;

/// How much longer products with coded matrices take within a step than alone, where their rates are measured, beside those with decoded ones. A 1.1 B model
/// coded by `tiered`, G weights/s, coded and decoded: two cores of Zen 4 alone 64 and 62 to 65, in steps 58 and 66; one of Zen 5 alone 54 to 64 and 56 to 62,
/// in steps 50 to 52 and 57 to 58; two of Zen 5, whose host decides from hour to hour, alone 57 to 88 and 61 to 92,
/// in steps 54 to 80 and 62 to 92.
const FUSED_IN_STEPS: f64 = 1.2;

/// What the price of a matrix depends on.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct MatrixCost {
    /// How it is coded.
    pub codec: Codec,
    /// Weights, padding included.
    pub weights: u64,
    /// Bytes of the coded form, tables included.
    pub coded_bytes: u64,
    /// Bytes of the decoded form.
    pub decoded_bytes: u64,
    /// Bits of a field of the decoded form: 4 or 8.
    pub decoded_bits: u8,
}

/// Prices in seconds on one machine.
#[derive(Clone, Copy, Debug)]
pub struct CostModel<'a> {
    profile: &'a MachineProfile,
    threads: usize,
    bytes_per_second: f64,
    /// 0 if the working set stays in the caches, 1 if it comes from memory.
    memory_share: f64,
}

impl<'a> CostModel<'a> {
    /// Prices for `threads` threads and a model of which a step reads `working_set_bytes`. The profile may have been measured with another
    /// number of threads: compute rates are taken as proportional to it, bandwidth is interpolated.
    #[must_use]
    pub fn new(profile: &'a MachineProfile, threads: usize, working_set_bytes: u64) -> Self {
        let threads = threads.max(1);
        let bytes_per_second =
            profile.read_bytes_per_second(threads) * profile.product_speedup() * profile.cache_speedup(working_set_bytes);
        Self { profile, threads, bytes_per_second, memory_share: profile.memory_share(working_set_bytes) }
    }

    /// Seconds a weight, from the rates in the caches and in memory.
    fn per_weight(&self, in_cache: f64, in_memory: f64) -> f64 {
        (1.0 - self.memory_share) / in_cache + self.memory_share / in_memory
    }

    /// The product with a matrix that stays coded, in seconds. Each chunk is decoded once, however many tokens share it.
    #[must_use]
    pub fn fused(&self, matrix: &MatrixCost, tokens: usize) -> f64 {
        let rate = self.profile.codec(matrix.codec);
        let more = tokens.max(1) as f64 - 1.0;
        let compute = FUSED_IN_STEPS
            * matrix.weights as f64
            * (self.per_weight(rate.fused_cache_weights_per_second, rate.fused_weights_per_second) + more / rate.macs_per_second);
        self.longest(matrix.coded_bytes, compute)
    }

    /// The product with a decoded matrix, in seconds.
    #[must_use]
    pub fn decoded(&self, matrix: &MatrixCost, tokens: usize) -> f64 {
        let rate = self.profile.plain(matrix.decoded_bits);
        let more = tokens.max(1) as f64 - 1.0;
        let compute =
            matrix.weights as f64 * (self.per_weight(rate.cache_weights_per_second, rate.weights_per_second) + more / rate.macs_per_second);
        self.longest(matrix.decoded_bytes, compute)
    }

    /// Decoding to memory, in seconds: reads the coded bytes and writes the decoded ones.
    #[must_use]
    pub fn decode(&self, matrix: &MatrixCost) -> f64 {
        let rate = self.profile.codec(matrix.codec);
        let compute = matrix.weights as f64 / rate.decode_weights_per_second;
        self.longest(matrix.coded_bytes.saturating_add(matrix.decoded_bytes), compute)
    }

    /// One row of a coded matrix: one chunk of `chunk_weights` weights is decoded, by one thread.
    #[must_use]
    pub fn coded_row(&self, codec: Codec, chunk_weights: u64) -> f64 {
        let rate = self.profile.codec(codec).decode_weights_per_second / self.profile.threads as f64;
        chunk_weights as f64 / rate
    }

    /// Reading `bytes` of the working set, in seconds.
    #[must_use]
    pub fn read(&self, bytes: u64) -> f64 {
        bytes as f64 / self.bytes_per_second
    }

    /// `compute` is in seconds with the profile's number of threads.
    fn longest(&self, bytes: u64, compute: f64) -> f64 {
        let share = self.profile.threads as f64 / self.threads as f64;
        (compute * share).max(self.read(bytes))
    }
}

/// One thing that may be bought with memory.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Offer {
    /// Bytes that it takes beyond those of not buying; negative if it frees some.
    pub extra_bytes: i64,
    /// Seconds that it saves per step; negative if it costs some.
    pub gain_seconds: f64,
}

/// Units into which a budget is divided for the exact search: a bought offer wastes less than one unit.
const UNITS_MAX: u64 = 16_384;

/// The offers whose total gain is greatest while their total extra bytes stay within `capacity_bytes` (no bound: `None`).
///
/// Offers that free memory without costing time are always taken. If `capacity_bytes` is negative, memory must first be freed:
/// then those that cost the least time per byte freed are taken until it suffices. The remainder is a knapsack: the better of an exact
/// search over sizes rounded up to `capacity / 16384` and a greedy one by gain per byte over exact sizes, which differ by
/// rounding only. Returns `None` if even freeing all that can be freed does not suffice.
#[must_use]
pub fn choose(offers: &[Offer], capacity_bytes: Option<i64>) -> Option<Vec<bool>> {
    let mut taken: Vec<bool> = offers.iter().map(|offer| offer.extra_bytes <= 0 && offer.gain_seconds >= 0.0).collect();
    let Some(capacity) = capacity_bytes else {
        for (taken, offer) in taken.iter_mut().zip(offers) {
            *taken |= offer.gain_seconds > 0.0;
        }
        return Some(taken);
    };
    let mut left = capacity.saturating_sub(spent(offers, &taken));
    // Frees memory at a loss only as far as it must.
    let mut freeing: Vec<usize> = (0..offers.len()).filter(|&i| !taken[i] && offers[i].extra_bytes < 0).collect();
    freeing.sort_by(|&a, &b| density(&offers[a]).total_cmp(&density(&offers[b])));
    for i in freeing {
        if left >= 0 {
            break;
        }
        taken[i] = true;
        left = left.saturating_sub(offers[i].extra_bytes);
    }
    let left = u64::try_from(left).ok()?;

    let candidates: Vec<usize> = (0..offers.len())
        .filter(|&i| !taken[i] && offers[i].gain_seconds > 0.0)
        .filter(|&i| offers[i].extra_bytes.unsigned_abs() <= left)
        .collect();
    let greedy = by_density(offers, &candidates, left);
    let exact = by_units(offers, &candidates, left);
    let gain = |picked: &[usize]| picked.iter().map(|&i| offers[i].gain_seconds).sum::<f64>();
    for i in if gain(&exact) > gain(&greedy) { exact } else { greedy } {
        taken[i] = true;
    }
    Some(taken)
}

fn spent(offers: &[Offer], taken: &[bool]) -> i64 {
    let extras = offers.iter().zip(taken).filter(|(_, taken)| **taken).map(|(offer, _)| offer.extra_bytes);
    extras.fold(0, i64::saturating_add)
}

/// Seconds per byte, positive for an honest trade in either direction.
fn density(offer: &Offer) -> f64 {
    offer.gain_seconds / offer.extra_bytes as f64
}

/// Best gain per byte first; what does not fit any more is passed over.
fn by_density(offers: &[Offer], candidates: &[usize], capacity: u64) -> Vec<usize> {
    let mut order = candidates.to_vec();
    order.sort_by(|&a, &b| density(&offers[b]).total_cmp(&density(&offers[a])));
    let mut left = capacity;
    order.retain(|&i| match left.checked_sub(offers[i].extra_bytes.unsigned_abs()) {
        Some(rest) => {
            left = rest;
            true
        }
        None => false,
    });
    order
}

/// 0/1 knapsack by dynamic programming over rounded sizes.
fn by_units(offers: &[Offer], candidates: &[usize], capacity: u64) -> Vec<usize> {
    let total = candidates.iter().fold(0u64, |sum, &i| sum.saturating_add(offers[i].extra_bytes.unsigned_abs()));
    if total <= capacity {
        return candidates.to_vec();
    }
    let unit = capacity.div_ceil(UNITS_MAX).max(1);
    let units = (capacity / unit) as usize;
    // best[u]: greatest gain with at most u units; bought[n][u]: whether candidate n is part of it.
    let mut best = vec![0.0f64; units + 1];
    let mut bought = vec![vec![false; units + 1]; candidates.len()];
    for (n, &i) in candidates.iter().enumerate() {
        let size = offers[i].extra_bytes.unsigned_abs().div_ceil(unit) as usize;
        for u in (size..=units).rev() {
            let gain = best[u - size] + offers[i].gain_seconds;
            if gain > best[u] {
                best[u] = gain;
                bought[n][u] = true;
            }
        }
    }
    let mut picked = Vec::new();
    let mut u = units;
    for (n, &i) in candidates.iter().enumerate().rev() {
        if bought[n][u] {
            picked.push(i);
            u -= offers[i].extra_bytes.unsigned_abs().div_ceil(unit) as usize;
        }
    }
    picked
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn offer(extra_bytes: i64, gain_seconds: f64) -> Offer {
        Offer { extra_bytes, gain_seconds }
    }

    #[test]
    fn greedy_alone_would_miss_the_large_offer() {
        // By density the 10-byte offer comes first and leaves no room for the better one.
        let offers = [offer(10, 11.0), offer(100, 100.0)];
        assert_eq!(choose(&offers, Some(100)), Some(vec![false, true]));
        assert_eq!(choose(&offers, Some(110)), Some(vec![true, true]));
        assert_eq!(choose(&offers, Some(99)), Some(vec![true, false]));
        assert_eq!(choose(&offers, Some(0)), Some(vec![false, false]));
    }

    #[test]
    fn memory_is_freed_at_a_loss_only_when_it_must() {
        let offers = [offer(-10, -1.0), offer(-10, -0.1), offer(-5, 0.5), offer(3, 1.0)];
        assert_eq!(choose(&offers, Some(0)), Some(vec![false, false, true, true]));
        assert_eq!(choose(&offers, Some(-6)), Some(vec![false, true, true, true]), "the cheap one frees enough");
        assert_eq!(choose(&offers, Some(-25)), Some(vec![true, true, true, false]));
        assert_eq!(choose(&offers, Some(-26)), None);
        assert_eq!(choose(&offers, None), Some(vec![false, false, true, true]));
    }

    proptest! {
        #[test]
        fn never_over_capacity_and_as_good_as_the_best_subset(
            items in prop::collection::vec((1i64..5000, 0.0f64..10.0), 1..12),
            capacity in 0i64..16_000,
        ) {
            let offers: Vec<Offer> = items.iter().map(|&(bytes, gain)| offer(bytes, gain)).collect();
            let taken = choose(&offers, Some(capacity)).expect("nothing needs freeing");
            prop_assert!(spent(&offers, &taken) <= capacity);
            let gain = |mask: usize| {
                let picked = || offers.iter().enumerate().filter(move |(i, _)| mask >> i & 1 == 1).map(|(_, o)| o);
                let bytes: i64 = picked().map(|o| o.extra_bytes).sum();
                if bytes > capacity { 0.0 } else { picked().map(|o| o.gain_seconds).sum::<f64>() }
            };
            let best = (0..1usize << offers.len()).map(gain).fold(0.0, f64::max);
            let found: f64 = offers.iter().zip(&taken).filter(|(_, t)| **t).map(|(o, _)| o.gain_seconds).sum();
            // Below 16,384 bytes a unit is a byte, so the search is exact.
            prop_assert!(found >= best - 1e-9, "{found} of {best}");
        }
    }
}
