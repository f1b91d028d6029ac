//! `lru`: all groups stay coded on the device; beside them, as many decoded layers as the budget allows, under an eviction policy.
//!
//! A pass sweeps the layers in a cycle, so that plain least-recently-used replacement hits nothing below full capacity; `pin` (default) keeps the first
//! layers that fit and decodes the others inside their products, the best that any policy can do. See the CPU's `residency/lru.rs`.

use super::gpu_async::nibble_places;
use super::groups::{Groups, Loader, PER_LAYER};
use super::residency::{Held, Residency, Resident};
use crate::residency::{OpenError, Policy};
use tersor_cuda::{Buffer, CudaError, Form, Queue, Stream};

pub(super) struct Lru {
    groups: Vec<Resident>,
    /// Where each group's nibbles begin in its layer's buffer.
    places: Vec<usize>,
    buffers: Vec<Buffer>,
    policy: Policy,
    /// Layer in each buffer, and when it was last used.
    holds: Vec<Option<(usize, u64)>>,
    /// Buffer of each layer.
    buffer_of: Vec<Option<usize>>,
    clock: u64,
    layer_bytes: u64,
    counts: [u64; 2],
}

impl Lru {
    /// `available`: bytes for weights on the device; `None`: all layers.
    pub fn open(loader: &Loader<'_>, available: Option<u64>, policy: Policy) -> Result<Self, OpenError> {
        let layers = loader.groups.layers;
        let groups = Resident::quads(loader, &Vec::from_iter(0..loader.groups.all.len()))?;
        let (places, layer_bytes) = nibble_places(&groups, layers);
        let coded: u64 = groups.iter().map(Resident::bytes).sum();
        let count =
            available.map_or(layers, |bytes| ((bytes.saturating_sub(coded)) / layer_bytes.max(1) as u64).min(layers as u64) as usize);
        let buffers = (0..count).map(|_| loader.device().allocate(layer_bytes, "decoded layers")).collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            groups,
            places,
            policy,
            holds: vec![None; buffers.len()],
            buffer_of: vec![None; layers],
            buffers,
            clock: 0,
            layer_bytes: layer_bytes as u64,
            counts: [0; 2],
        })
    }

    /// The buffer for a layer that is in none: an empty one, or by the policy.
    fn make_room(&mut self) -> Option<usize> {
        if let Some(empty) = self.holds.iter().position(Option::is_none) {
            return Some(empty);
        }
        let used = |buffer: &usize| self.holds[*buffer].map_or(0, |(_, at)| at);
        let victim = match self.policy {
            Policy::Lru => (0..self.holds.len()).min_by_key(used),
            Policy::Mru => (0..self.holds.len()).max_by_key(used),
            Policy::Pin => None,
        }?;
        if let Some((layer, _)) = self.holds[victim].take() {
            self.buffer_of[layer] = None;
        }
        Some(victim)
    }
}

impl Residency for Lru {
    fn enter(&mut self, queue: &mut Queue<'_>, layer: usize) -> Result<(), CudaError> {
        self.clock += 1;
        if let Some(buffer) = self.buffer_of[layer] {
            self.holds[buffer] = Some((layer, self.clock));
            self.counts[0] += PER_LAYER as u64;
            return Ok(());
        }
        self.counts[1] += PER_LAYER as u64;
        let Some(buffer) = self.make_room() else { return Ok(()) };
        for group in Groups::of_layer(layer) {
            let Form::Quad(quad) = self.groups[group].form() else { unreachable!("all groups are coded") };
            queue.decode(&quad, &quad.decoded(&self.buffers[buffer], self.places[group]), Stream::Compute)?;
        }
        self.holds[buffer] = Some((layer, self.clock));
        self.buffer_of[layer] = Some(buffer);
        Ok(())
    }

    fn form(&self, group: usize) -> Form<'_> {
        let form = self.groups[group].form();
        match (self.buffer_of.get(group / PER_LAYER).copied().flatten(), form) {
            (Some(buffer), Form::Quad(quad)) => Form::Plain(quad.decoded(&self.buffers[buffer], self.places[group])),
            (_, form) => form,
        }
    }

    fn replayed(&mut self) {
        for buffer in &self.buffer_of {
            self.counts[usize::from(buffer.is_none())] += PER_LAYER as u64;
        }
    }

    /// Once its buffers are full, `pin` does the same in every pass.
    fn repeats(&self) -> bool {
        self.policy == Policy::Pin && self.holds.iter().all(Option::is_some) || self.buffer_of.iter().all(Option::is_some)
    }

    fn held(&self) -> Held {
        Held {
            detail: format!("{}: room for {} of {} layers", self.policy, self.buffers.len(), self.buffer_of.len()),
            coded_bytes: self.groups.iter().map(Resident::bytes).sum(),
            decoded_bytes: self.buffers.iter().map(|buffer| buffer.bytes() as u64).sum(),
            hits: self.counts[0],
            misses: self.counts[1],
            hit_bytes: self.counts[0] / PER_LAYER as u64 * self.layer_bytes,
            miss_bytes: self.counts[1] / PER_LAYER as u64 * self.layer_bytes,
            ..Held::default()
        }
    }
}
