//! From logits to a token.

use std::cmp::Ordering;
use tersor_cpu::{Level, ops};
use thiserror::Error;

/// Candidates that are sorted for a start.
const SORTED_FIRST: usize = 256;

/// How the next token is chosen. The steps are those of transformers, in its order: repetition penalty, temperature, top-k,
/// top-p, min-p, draw.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divisor of the logits; 0: always the most likely token, and of equals the one with the least id.
    pub temperature: f32,
    /// Keep this many of the most likely tokens; 0: all.
    pub top_k: usize,
    /// Keep the fewest most likely tokens that together reach this probability; 1: all.
    pub top_p: f32,
    /// Keep tokens that are at least this many times as likely as the most likely one; 0: all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens that have occurred, prompt included; 1: nothing.
    pub repetition_penalty: f32,
    /// Start of the random numbers. Equal seeds give equal tokens.
    pub seed: u64,
}

impl Default for Sampling {
    /// Greedy.
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

/// A sampling parameter outside its range.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
#[error("{name} {value} is outside {range}")]
pub struct SamplingError {
    /// Name of the parameter.
    pub name: &'static str,
    /// Its value.
    pub value: f32,
    /// Values that are allowed.
    pub range: &'static str,
}

impl Sampling {
    /// Whether every parameter lies in its range.
    ///
    /// # Errors
    /// [`SamplingError`] for the first that does not.
    pub fn check(&self) -> Result<(), SamplingError> {
        let checks = [
            ("temperature", self.temperature, (0.0..=100.0).contains(&self.temperature), "0..=100"),
            ("top-p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0 up to 1"),
            ("min-p", self.min_p, (0.0..=1.0).contains(&self.min_p), "0..=1"),
            ("repetition-penalty", self.repetition_penalty, (0.01..=100.0).contains(&self.repetition_penalty), "0.01..=100"),
        ];
        match checks.iter().find(|check| !check.2) {
            Some(&(name, value, _, range)) => Err(SamplingError { name, value, range }),
            None => Ok(()),
        }
    }
}

/// Chooses tokens by a [`Sampling`].
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    level: Level,
    random: SplitMix64,
    /// (logit, then weight; token)
    candidates: Vec<(f32, u32)>,
    /// Candidates that stand in their order, before all others.
    sorted: usize,
    seen: Vec<bool>,
}

impl Sampler {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`SamplingError`] for the first parameter outside its range.
    pub fn new(sampling: Sampling) -> Result<Self, SamplingError> {
        sampling.check()?;
        let random = SplitMix64 { state: sampling.seed };
        Ok(Self { sampling, level: Level::best(), random, candidates: Vec::new(), sorted: 0, seen: Vec::new() })
    }

    /// Chooses the token that follows `history` (prompt and generated tokens), given its logits (vocab,); `None` if one of them is not finite, or
    /// there are none.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Option<u32> {
        let greatest = ops::greatest_if_finite(self.level, logits)?;
        if self.is_greatest() {
            return Some(greatest as u32);
        }
        Some(self.draw(logits, history))
    }

    /// Whether [`sample`](Self::sample) chooses the greatest logit, whatever came before.
    pub(super) fn is_greatest(&self) -> bool {
        self.sampling.temperature == 0.0 && self.sampling.repetition_penalty == 1.0
    }

    fn draw(&mut self, logits: &[f32], history: &[u32]) -> u32 {
        self.candidates.clear();
        self.candidates.extend(logits.iter().copied().zip(0..));
        self.sorted = 0;
        self.penalize(history);
        let best = *self.candidates.iter().min_by(|a, b| most_likely(a, b)).expect("a vocabulary has tokens");
        if self.sampling.temperature == 0.0 {
            return best.1;
        }
        let top_k = self.sampling.top_k;
        if top_k > 0 && top_k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(top_k, most_likely);
            self.candidates.truncate(top_k);
        }
        // From logits to weights relative to the best, which gets 1.
        for candidate in &mut self.candidates {
            candidate.0 = ops::exp((candidate.0 - best.0) / self.sampling.temperature);
        }
        let (kept, total) = self.kept();
        let mut rest = self.random.uniform() * total;
        for place in 0..kept {
            let (weight, token) = self.candidate(place);
            rest -= f64::from(weight);
            if rest < 0.0 {
                return token;
            }
        }
        // Rounding can leave a rest of a few parts in 10^16 after the last one.
        self.candidate(kept - 1).1
    }

    /// The candidate at a place in the order of likelihood. Only as many are sorted as are looked at, in growing runs: most draws end among the first.
    fn candidate(&mut self, place: usize) -> (f32, u32) {
        while place >= self.sorted {
            let unsorted = &mut self.candidates[self.sorted..];
            let run = (SORTED_FIRST + 7 * self.sorted).min(unsorted.len());
            if run < unsorted.len() {
                unsorted.select_nth_unstable_by(run, most_likely);
            }
            unsorted[..run].sort_unstable_by(most_likely);
            self.sorted += run;
        }
        self.candidates[place]
    }

    fn penalize(&mut self, history: &[u32]) {
        let penalty = self.sampling.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        self.seen.clear();
        self.seen.resize(self.candidates.len(), false);
        for &token in history {
            let Some(seen) = self.seen.get_mut(token as usize) else { continue };
            if !std::mem::replace(seen, true) {
                let logit = &mut self.candidates[token as usize].0;
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
    }

    /// How many of the likeliest candidates top-p and min-p leave, at least 1, and the sum of their weights.
    fn kept(&mut self) -> (usize, f64) {
        let total: f64 = self.candidates.iter().map(|c| f64::from(c.0)).sum();
        let Sampling { top_p, min_p, .. } = self.sampling;
        if top_p == 1.0 && min_p == 0.0 {
            return (self.candidates.len(), total);
        }
        let enough = if top_p < 1.0 { f64::from(top_p) * total } else { f64::INFINITY };
        let (mut kept, mut sum) = (0, 0.0);
        while kept < self.candidates.len() && sum < enough {
            let (weight, _) = self.candidate(kept);
            if weight < min_p && kept > 0 {
                break;
            }
            sum += f64::from(weight);
            kept += 1;
        }
        (kept, sum)
    }
}

/// The order of candidates: by logit or weight, of equals the one with the least id first.
fn most_likely(a: &(f32, u32), b: &(f32, u32)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// SplitMix64 by Sebastiano Vigna (<https://prng.di.unimi.it/splitmix64.c>, public domain): a counter and a mixer. One number
/// a token is drawn, so its period of 2^64 is plenty.
#[derive(Clone, Debug)]
struct SplitMix64 {
    state: u64,
}

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In `0.0..1.0`, a multiple of 2^-53.
    fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(sampling: Sampling, logits: &[f32], draws: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(sampling).unwrap();
        let mut counts = vec![0; logits.len()];
        for _ in 0..draws {
            counts[sampler.sample(logits, &[]).unwrap() as usize] += 1;
        }
        counts
    }

    #[test]
    fn split_mix_matches_the_published_sequence() {
        // From the reference implementation, seed 1234567.
        let mut random = SplitMix64 { state: 1_234_567 };
        assert_eq!(random.next(), 6_457_827_717_110_365_317);
        assert_eq!(random.next(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        let mut sampler = Sampler::new(Sampling::default()).unwrap();
        assert_eq!(sampler.sample(&[0.0, 3.0, 1.0, 3.0], &[]), Some(1));
        assert_eq!(sampler.sample(&[0.0, f32::NAN, 1.0, 3.0], &[]), None);
    }

    #[test]
    fn penalty_reaches_prompt_tokens_once_and_both_signs() {
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        let mut sampler = Sampler::new(sampling).unwrap();
        assert_eq!(sampler.sample(&[1.9, 3.0, -5.0], &[1, 1, 1]), Some(0), "3.0 becomes 1.5 however often it occurred");
        assert_eq!(sampler.sample(&[-3.0, -1.6, -3.1], &[1]), Some(0), "-1.6 becomes -3.2");
        assert_eq!(sampler.sample(&[1.0, 0.5, 0.0], &[7]), Some(0), "ids outside the vocabulary are ignored");
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        // Probabilities 1/2, 1/4, 1/4 at temperature 2: logits 2 ln(2), 0, 0.
        let logits = [2.0 * 2f32.ln(), 0.0, 0.0];
        let counts = draw(Sampling { temperature: 2.0, seed: 7, ..Sampling::default() }, &logits, 40_000);
        for (count, expected) in counts.iter().zip([20_000, 10_000, 10_000]) {
            assert!(count.abs_diff(expected) < 500, "{counts:?}");
        }
    }

    #[test]
    fn filters_keep_what_they_say() {
        let logits: Vec<f32> = [0.1f32, 0.4, 0.3, 0.2].iter().map(|p| p.ln()).collect();
        let base = Sampling { temperature: 1.0, seed: 3, ..Sampling::default() };
        let kept = |sampling| draw(sampling, &logits, 2000).iter().map(|&n| n > 0).collect::<Vec<_>>();
        assert_eq!(kept(base.clone()), [true, true, true, true]);
        assert_eq!(kept(Sampling { top_k: 2, ..base.clone() }), [false, true, true, false]);
        assert_eq!(kept(Sampling { top_k: 9, ..base.clone() }), [true, true, true, true]);
        assert_eq!(kept(Sampling { top_p: 0.65, ..base.clone() }), [false, true, true, false]);
        assert_eq!(kept(Sampling { top_p: 0.75, ..base.clone() }), [false, true, true, true]);
        assert_eq!(kept(Sampling { min_p: 0.45, ..base.clone() }), [false, true, true, true]);
        assert_eq!(kept(Sampling { top_p: 1e-6, min_p: 1.0, ..base }), [false, true, false, false]);
    }

    /// However few candidates are sorted for it.
    #[test]
    fn draws_are_those_of_a_full_sort() {
        let mut random = SplitMix64 { state: 5 };
        let logits: Vec<f32> = (0..5000).map(|_| (random.uniform() * 6.0) as f32).collect();
        let base = Sampling { temperature: 1.5, seed: 11, ..Sampling::default() };
        let mut late = 0;
        for (top_k, top_p, min_p) in [(0, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.4), (3000, 0.9, 0.1), (100, 1.0, 0.0)] {
            let sampling = Sampling { top_k, top_p, min_p, ..base.clone() };
            let mut sorted: Vec<(f32, u32)> = logits.iter().copied().zip(0..).collect();
            sorted.sort_by(most_likely);
            sorted.truncate(if top_k > 0 { top_k } else { usize::MAX });
            let best = sorted[0].0;
            let weights: Vec<f64> = sorted.iter().map(|c| f64::from(ops::exp((c.0 - best) / 1.5))).collect();
            let enough = f64::from(top_p) * weights.iter().sum::<f64>();
            let (mut kept, mut sum) = (0, 0.0);
            while kept < weights.len() && (top_p == 1.0 || sum < enough) && weights[kept] as f32 >= min_p {
                sum += weights[kept];
                kept += 1;
            }
            let mut sampler = Sampler::new(sampling).unwrap();
            let mut random = SplitMix64 { state: 11 };
            for _ in 0..200 {
                let mut rest = random.uniform() * sum;
                let place = weights[..kept].iter().position(|weight| {
                    rest -= weight;
                    rest < 0.0
                });
                let place = place.unwrap_or(kept - 1);
                assert_eq!(sampler.sample(&logits, &[]), Some(sorted[place].1), "{top_k} {top_p} {min_p}");
                late += usize::from(place > SORTED_FIRST);
            }
        }
        assert!(late > 100, "draws reach beyond what is sorted first: {late}");
    }

    #[test]
    fn seeds_decide_everything() {
        let logits: Vec<f32> = (0..50).map(|i| (i % 7) as f32 * 0.1).collect();
        let run = |seed| {
            let mut sampler = Sampler::new(Sampling { temperature: 1.0, seed, ..Sampling::default() }).unwrap();
            (0..40).map(|_| sampler.sample(&logits, &[])).collect::<Vec<_>>()
        };
        assert_eq!(run(5), run(5));
        assert_ne!(run(5), run(6));
    }

    #[test]
    fn parameters_outside_their_range_are_refused_by_name() {
        let refused = |sampling| Sampler::new(sampling).unwrap_err().name;
        assert_eq!(refused(Sampling { temperature: f32::NAN, ..Sampling::default() }), "temperature");
        assert_eq!(refused(Sampling { temperature: -0.1, ..Sampling::default() }), "temperature");
        assert_eq!(refused(Sampling { top_p: 0.0, ..Sampling::default() }), "top-p");
        assert_eq!(refused(Sampling { min_p: 1.1, ..Sampling::default() }), "min-p");
        assert_eq!(refused(Sampling { repetition_penalty: 0.0, ..Sampling::default() }), "repetition-penalty");
    }
}
