//! Keys and values of the positions seen so far.

use super::config::Config;
use super::weights::RunError;
use half::f16;
use std::any::Any;
use std::fmt;
use tersor_cpu::ops::{KvElement, KvView, store_kv};

/// How keys and values are stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KvPrecision {
    /// Two bytes each; for coded models.
    F16,
    /// Four bytes each; for the unquantized reference.
    F32,
}

impl KvPrecision {
    const fn bytes(self) -> u64 {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

/// Keys and values of one sequence, for all layers. All memory is allocated at once, so that a budget set at the start holds.
///
/// They lie where the forward pass runs: in host memory, or in a form of a device's own ([`DeviceKv`]).
///
/// Attention windows do not shorten it: positions outside a window are masked, not dropped.
#[derive(Debug)]
pub struct KvCache {
    storage: Storage,
    capacity: usize,
    len: usize,
}

#[derive(Debug)]
enum Storage {
    Host(HostKv),
    Device(Box<dyn DeviceKv>),
}

/// Keys and values in the memory of a device; only its backend knows their form.
pub trait DeviceKv: Any + Send + fmt::Debug {
    /// Bytes allocated.
    fn bytes(&self) -> u64;
}

/// Keys and values in host memory.
#[derive(Debug)]
pub(super) struct HostKv {
    /// Each (layers, kv_heads, capacity, head_dim).
    elements: Elements,
    layer_elements: usize,
    head_dim: usize,
    capacity: usize,
}

#[derive(Debug)]
enum Elements {
    F16 { keys: Vec<f16>, values: Vec<f16> },
    F32 { keys: Vec<f32>, values: Vec<f32> },
}

/// The part of a cache that one layer's attention reads.
#[derive(Clone, Copy, Debug)]
pub(super) enum LayerView<'a> {
    F16(KvView<'a, f16>),
    F32(KvView<'a, f32>),
}

impl KvCache {
    /// An empty cache for `capacity` positions in host memory.
    ///
    /// # Errors
    /// [`RunError::KvTooLarge`] if the memory cannot be had.
    pub fn new(config: &Config, capacity: usize, precision: KvPrecision) -> Result<Self, RunError> {
        let bytes = Self::bytes_for(config, capacity, precision);
        let too_large = || RunError::KvTooLarge { capacity, bytes };
        let count = usize::try_from(bytes / (2 * precision.bytes())).map_err(|_| too_large())?;
        let elements = match precision {
            KvPrecision::F16 => Elements::F16 { keys: zeros(count).ok_or_else(too_large)?, values: zeros(count).ok_or_else(too_large)? },
            KvPrecision::F32 => Elements::F32 { keys: zeros(count).ok_or_else(too_large)?, values: zeros(count).ok_or_else(too_large)? },
        };
        let host = HostKv { elements, layer_elements: count / config.layers, head_dim: config.head_dim, capacity };
        Ok(Self { storage: Storage::Host(host), capacity, len: 0 })
    }

    /// An empty cache for `capacity` positions in the memory of a device, for its backend.
    #[must_use]
    pub fn on_device(storage: Box<dyn DeviceKv>, capacity: usize) -> Self {
        Self { storage: Storage::Device(storage), capacity, len: 0 }
    }

    /// Bytes of a cache for `capacity` positions: what it adds to a memory budget. Saturates.
    #[must_use]
    pub fn bytes_for(config: &Config, capacity: usize, precision: KvPrecision) -> u64 {
        [config.layers, config.kv_heads, config.head_dim, capacity]
            .iter()
            .fold(2 * precision.bytes(), |bytes, &factor| bytes.saturating_mul(factor as u64))
    }

    /// Bytes allocated.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match &self.storage {
            Storage::Host(host) => host.bytes(),
            Storage::Device(device) => device.bytes(),
        }
    }

    /// Positions that are filled.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// No position is filled.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions there is room for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets the positions from `len` on, so that the next tokens continue there. Does nothing if there are fewer.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Counts `tokens` positions as filled, after all layers have stored theirs: for backends.
    ///
    /// # Panics
    /// If there is no room for them: a backend checks that first ([`Continuation::check`](super::llama::Continuation::check)).
    pub fn advance(&mut self, tokens: usize) {
        assert!(self.len + tokens <= self.capacity, "positions are checked before they are stored");
        self.len += tokens;
    }

    /// The storage in host memory.
    ///
    /// # Errors
    /// [`RunError::ForeignKv`] if the cache lies on a device.
    pub(super) fn host(&mut self) -> Result<&mut HostKv, RunError> {
        match &mut self.storage {
            Storage::Host(host) => Ok(host),
            Storage::Device(_) => Err(RunError::ForeignKv),
        }
    }

    /// The storage of the backend whose storage is a `T`.
    ///
    /// # Errors
    /// [`RunError::ForeignKv`] if the cache lies in host memory or is another backend's.
    pub fn device<T: DeviceKv>(&mut self) -> Result<&mut T, RunError> {
        match &mut self.storage {
            Storage::Host(_) => Err(RunError::ForeignKv),
            Storage::Device(device) => (device.as_mut() as &mut dyn Any).downcast_mut().ok_or(RunError::ForeignKv),
        }
    }
}

impl HostKv {
    fn bytes(&self) -> u64 {
        match &self.elements {
            Elements::F16 { keys, .. } => keys.len() as u64 * 4,
            Elements::F32 { keys, .. } => keys.len() as u64 * 8,
        }
    }

    /// Stores keys and values, (tokens, kv_heads, head_dim) each, from position `position` on.
    pub(super) fn store(&mut self, layer: usize, position: usize, keys: &[f32], values: &[f32]) {
        let (layer_elements, head_dim, capacity) = (self.layer_elements, self.head_dim, self.capacity);
        let slots = Slots { first: layer * layer_elements, layer_elements, head_dim, capacity, position };
        match &mut self.elements {
            Elements::F16 { keys: k, values: v } => {
                slots.fill(keys, k);
                slots.fill(values, v);
            }
            Elements::F32 { keys: k, values: v } => {
                slots.fill(keys, k);
                slots.fill(values, v);
            }
        }
    }

    pub(super) fn layer(&self, layer: usize) -> LayerView<'_> {
        let range = layer * self.layer_elements..(layer + 1) * self.layer_elements;
        let capacity = self.capacity;
        match &self.elements {
            Elements::F16 { keys, values } => LayerView::F16(KvView { keys: &keys[range.clone()], values: &values[range], capacity }),
            Elements::F32 { keys, values } => LayerView::F32(KvView { keys: &keys[range.clone()], values: &values[range], capacity }),
        }
    }
}

/// Where the vectors of new tokens go.
struct Slots {
    /// First element of the layer.
    first: usize,
    layer_elements: usize,
    head_dim: usize,
    capacity: usize,
    position: usize,
}

impl Slots {
    /// `from` is (tokens, kv_heads, head_dim), `to` (layers, kv_heads, capacity, head_dim).
    fn fill<E: KvElement>(&self, from: &[f32], to: &mut [E]) {
        let head_elements = self.capacity * self.head_dim;
        let row = self.layer_elements / self.capacity;
        for (token, heads) in from.chunks_exact(row).enumerate() {
            for (head, vector) in heads.chunks_exact(self.head_dim).enumerate() {
                let at = self.first + head * head_elements + (self.position + token) * self.head_dim;
                store_kv(vector, &mut to[at..at + self.head_dim]);
            }
        }
    }
}

/// Zeros, or `None` if the memory cannot be had.
fn zeros<E: KvElement>(count: usize) -> Option<Vec<E>> {
    let mut elements = Vec::new();
    elements.try_reserve_exact(count).ok()?;
    elements.resize(count, E::default());
    Some(elements)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Pages(u64);

    impl DeviceKv for Pages {
        fn bytes(&self) -> u64 {
            self.0
        }
    }

    #[derive(Debug)]
    struct OtherPages;

    impl DeviceKv for OtherPages {
        fn bytes(&self) -> u64 {
            0
        }
    }

    #[test]
    fn a_device_cache_counts_positions_and_opens_to_its_backend_only() {
        let mut cache = KvCache::on_device(Box::new(Pages(4096)), 10);
        assert_eq!((cache.bytes(), cache.capacity(), cache.len()), (4096, 10, 0));
        cache.advance(7);
        cache.truncate(5);
        assert_eq!(cache.len(), 5);
        cache.device::<Pages>().unwrap().0 = 1;
        assert_eq!(cache.bytes(), 1);
        assert!(matches!(cache.device::<OtherPages>(), Err(RunError::ForeignKv)));
        assert!(matches!(cache.host(), Err(RunError::ForeignKv)));
    }
}
