//! `lru`: the coded bytes stay mapped; beside them, as many decoded matrices as a byte budget allows, under an eviction policy.
//!
//! A forward pass sweeps the matrices in a fixed cycle. Plain least-recently-used replacement is the worst policy for a cycle: with room
//! for less than all of them, every matrix is evicted just before its next use, and the hit rate is **0 %** however close the budget comes to the
//! whole. Hence the policies:
//!
//! - `pin` (default): the first matrices to come that fit stay for good, the others are decoded inside their products. The hit rate is the
//!   share of bytes that fit, the best that any policy can do on a cycle, and nothing is ever decoded twice.
//! - `mru`: evicts the matrix used most recently, the one whose next use is farthest. The same hit rate less about one matrix, but every miss
//!   decodes into memory: shown for comparison.
//! - `lru`: shown for comparison.
//!
//! A matrix that cannot be made room for (it is larger than the budget, or the other matrices of the same call fill it) is decoded inside
//! its product under every policy. Embedding lookups read single rows and never change what is held.

use super::budget::Footprint;
use super::cost::CostModel;
use super::engine::{Engine, Form, Operand, Price, corrupt};
use super::set::{Index, Linear, Source, TensorSet, verify};
use super::{OpenError, Options, Policy};
use crate::model::weights::{LinearId, ResidencyReport, RunError, Weights};
use std::time::Instant;
use tersor_cpu::{Decoded, Level, Pool, decode_into};
use tersor_format::ModelDir;

/// Nothing is held decoded: any budget beyond this is used for decoded matrices.
pub(super) fn least(set: &TensorSet, options: &Options) -> Footprint {
    set.footprint(options)
}

/// What is held once the cache has filled: at most the budget.
pub(super) fn footprint(set: &TensorSet, options: &Options) -> Footprint {
    let least = least(set, options);
    let capacity = capacity(&least, options);
    let all: u64 = (0..set.linears.len()).filter(|&slot| set.is_multiplied(slot)).map(|slot| set.linears[slot].decoded_bytes()).sum();
    Footprint { decoded_bytes: all.min(capacity), ..least }
}

/// Bytes that decoded matrices may take.
pub(super) fn capacity(least: &Footprint, options: &Options) -> u64 {
    options.memory_budget.map_or(u64::MAX, |budget| budget.saturating_sub(least.total_bytes()))
}

/// Which decoded matrices are held, by slot: bookkeeping only, apart from the bytes themselves.
#[derive(Debug)]
struct Cache {
    policy: Policy,
    capacity_bytes: u64,
    used_bytes: u64,
    /// Bytes of each matrix that is held.
    held_bytes: Vec<Option<u64>>,
    /// When each was last used.
    last_use: Vec<u64>,
    clock: u64,
}

impl Cache {
    fn new(policy: Policy, capacity_bytes: u64, slots: usize) -> Self {
        Self { policy, capacity_bytes, used_bytes: 0, held_bytes: vec![None; slots], last_use: vec![0; slots], clock: 0 }
    }

    /// Notes a use; whether the matrix is held.
    fn touch(&mut self, slot: usize) -> bool {
        self.clock += 1;
        self.last_use[slot] = self.clock;
        self.held_bytes[slot].is_some()
    }

    /// Makes room for `bytes` without touching the slots in `busy`. The slots to drop; `None` if there is no way, and then nothing changes.
    fn make_room(&mut self, bytes: u64, busy: &[usize]) -> Option<Vec<usize>> {
        let mut free = self.capacity_bytes - self.used_bytes;
        let mut victims = Vec::new();
        if free < bytes && self.policy != Policy::Pin {
            let mut candidates: Vec<usize> =
                (0..self.held_bytes.len()).filter(|slot| self.held_bytes[*slot].is_some() && !busy.contains(slot)).collect();
            candidates.sort_by_key(|&slot| self.last_use[slot]);
            if self.policy == Policy::Mru {
                candidates.reverse();
            }
            for slot in candidates {
                if free >= bytes {
                    break;
                }
                free += self.held_bytes[slot].unwrap_or(0);
                victims.push(slot);
            }
        }
        if free < bytes {
            return None;
        }
        for &slot in &victims {
            self.used_bytes -= self.held_bytes[slot].take().unwrap_or(0);
        }
        Some(victims)
    }

    fn insert(&mut self, slot: usize, bytes: u64) {
        self.used_bytes += bytes;
        self.held_bytes[slot] = Some(bytes);
    }
}

/// Weights with a bounded cache of decoded matrices.
#[derive(Debug)]
pub(super) struct LruWeights {
    linears: Vec<Linear>,
    prices: Vec<Price>,
    decoded: Vec<Option<Decoded>>,
    cache: Cache,
    index: Index,
    engine: Engine,
    hits: u64,
    misses: u64,
    hit_bytes: u64,
    miss_bytes: u64,
    decode_ns: u64,
}

pub(super) fn open(dir: &ModelDir, set: TensorSet, options: &Options) -> Result<LruWeights, OpenError> {
    let engine = Engine::new(options.threads, options.level);
    verify(dir, &engine.pool, &|_| Ok(()))?;
    let capacity = capacity(&least(&set, options), options);
    let model = options.profile.as_ref().map(|profile| CostModel::new(profile, options.threads, set.working_set_bytes()));
    let price = |linear: &Linear| match (&model, linear.cost()) {
        (Some(model), Some(cost)) => Price::of_fused(model, &cost),
        _ => Price::default(),
    };
    let slots = set.linears.len();
    Ok(LruWeights {
        prices: set.linears.iter().map(price).collect(),
        decoded: (0..slots).map(|_| None).collect(),
        cache: Cache::new(options.policy, capacity, slots),
        index: set.index,
        linears: set.linears,
        engine,
        hits: 0,
        misses: 0,
        hit_bytes: 0,
        miss_bytes: 0,
        decode_ns: 0,
    })
}

impl LruWeights {
    /// Counts the use of a matrix and decodes it into memory where the policy says so.
    fn prepare(&mut self, slot: usize, busy: &[usize]) -> Result<(), RunError> {
        let linear = &self.linears[slot];
        let Some(tensor) = linear.coded() else { return Ok(()) };
        let bytes = linear.decoded_bytes();
        if self.cache.touch(slot) {
            (self.hits, self.hit_bytes) = (self.hits + 1, self.hit_bytes + bytes);
            return Ok(());
        }
        (self.misses, self.miss_bytes) = (self.misses + 1, self.miss_bytes + bytes);
        let Some(victims) = self.cache.make_room(bytes, busy) else { return Ok(()) };
        let start = Instant::now();
        let mut decoded = Decoded::default();
        for victim in victims {
            self.decoded[victim] = None;
        }
        let result = decode_into(self.engine.level, tensor, &mut decoded, Some(&self.engine.pool));
        self.decode_ns += start.elapsed().as_nanos() as u64;
        result.map_err(|error| corrupt(&linear.name, &error))?;
        self.cache.insert(slot, bytes);
        self.decoded[slot] = Some(decoded);
        Ok(())
    }
}

fn form<'a>(linear: &'a Linear, decoded: Option<&'a Decoded>) -> Form<'a> {
    match (&linear.source, decoded) {
        (Source::Coded { scales, .. }, Some(decoded)) => Form::Decoded(decoded, scales),
        _ => Form::stored(linear),
    }
}

impl Weights for LruWeights {
    fn enter_layer(&mut self, _layer: usize) -> Result<(), RunError> {
        Ok(())
    }

    fn linear(&mut self, x: &[f32], tokens: usize, jobs: &mut [(LinearId, &mut [f32])]) -> Result<(), RunError> {
        let slots = jobs.iter().map(|(id, _)| self.index.of(*id).ok_or(RunError::NoWeights { id: *id }));
        let slots = slots.collect::<Result<Vec<_>, _>>()?;
        for &slot in &slots {
            self.prepare(slot, &slots)?;
        }
        let mut operands = Vec::with_capacity(jobs.len());
        for (&slot, (_, out)) in slots.iter().zip(jobs.iter_mut()) {
            let price = if self.decoded[slot].is_some() { Price::default() } else { self.prices[slot] };
            let form = form(&self.linears[slot], self.decoded[slot].as_ref());
            operands.push(Operand { name: &self.linears[slot].name, form, price, out });
        }
        self.engine.multiply(x, tokens, &mut operands)
    }

    fn embed(&mut self, tokens: &[u32], out: &mut [f32]) -> Result<(), RunError> {
        self.engine.rows(&self.linears[0].name, form(&self.linears[0], self.decoded[0].as_ref()), tokens, out)
    }

    fn report(&self) -> ResidencyReport {
        let stored: u64 = self.linears.iter().map(|l| l.mapped_bytes() + l.table_bytes() + l.scale_bytes()).sum();
        let decoded: u64 = self.decoded.iter().flatten().map(Decoded::capacity_bytes).sum();
        let held = self.decoded.iter().flatten().count();
        let policy = self.cache.policy;
        ResidencyReport {
            strategy: "lru".to_owned(),
            detail: format!("policy {policy}, {held} of {} matrices held decoded", self.linears.len()),
            resident_bytes: stored + decoded,
            hits: self.hits,
            misses: self.misses,
            hit_bytes: self.hit_bytes,
            miss_bytes: self.miss_bytes,
            decode_exposed_ns: self.decode_ns,
            decode_fused_ns: self.engine.decode_fused_ns as u64,
            linear_ns: self.engine.linear_ns,
            ..ResidencyReport::default()
        }
    }

    fn pool(&self) -> &Pool {
        &self.engine.pool
    }

    fn level(&self) -> Level {
        self.engine.level
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hits of the last of ten sweeps over `slots` matrices of 10 bytes, one a call.
    fn hits(policy: Policy, capacity_bytes: u64, slots: usize) -> usize {
        let mut cache = Cache::new(policy, capacity_bytes, slots);
        let mut hits = 0;
        for _ in 0..10 {
            hits = 0;
            for slot in 0..slots {
                if cache.touch(slot) {
                    hits += 1;
                } else if cache.make_room(10, &[slot]).is_some() {
                    cache.insert(slot, 10);
                }
                assert!(cache.used_bytes <= capacity_bytes);
                let held: u64 = cache.held_bytes.iter().flatten().sum();
                assert_eq!(held, cache.used_bytes);
            }
        }
        hits
    }

    #[test]
    fn a_cyclic_sweep_hits_as_documented() {
        assert_eq!(hits(Policy::Pin, 50, 10), 5);
        assert_eq!(hits(Policy::Lru, 50, 10), 0);
        assert_eq!(hits(Policy::Lru, 99, 10), 0, "one byte short of everything");
        assert_eq!(hits(Policy::Mru, 50, 10), 4, "one less than pin: the newest is always the next victim");
        for policy in [Policy::Pin, Policy::Lru, Policy::Mru] {
            assert_eq!(hits(policy, 100, 10), 10);
            assert_eq!(hits(policy, 9, 10), 0, "nothing fits");
        }
    }

    #[test]
    fn matrices_of_the_same_call_are_not_evicted_for_each_other() {
        let mut cache = Cache::new(Policy::Lru, 20, 3);
        for slot in [0, 1] {
            cache.touch(slot);
            assert_eq!(cache.make_room(10, &[0, 1, 2]), Some(vec![]));
            cache.insert(slot, 10);
        }
        cache.touch(2);
        assert_eq!(cache.make_room(10, &[0, 1, 2]), None);
        assert_eq!(cache.used_bytes, 20, "a refusal changes nothing");
        assert_eq!(cache.make_room(10, &[2]), Some(vec![0]), "the least recently used");
        assert_eq!(cache.make_room(21, &[]), None, "larger than everything");
    }
}
