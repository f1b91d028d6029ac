//! Keys and values of the positions seen so far.

use super::config::Config;
use super::weights::RunError;
use half::f16;
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
/// Attention windows do not shorten it: positions outside a window are masked, not dropped.
#[derive(Debug)]
pub struct KvCache {
    /// Each (layers, kv_heads, capacity, head_dim).
    elements: Elements,
    layer_elements: usize,
    head_dim: usize,
    capacity: usize,
    len: usize,
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
    /// An empty cache for `capacity` positions.
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
        Ok(Self { elements, layer_elements: count / config.layers, head_dim: config.head_dim, capacity, len: 0 })
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
        match &self.elements {
            Elements::F16 { keys, .. } => keys.len() as u64 * 4,
            Elements::F32 { keys, .. } => keys.len() as u64 * 8,
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

    /// Counts `tokens` positions as filled, after all layers have stored theirs.
    pub(super) fn advance(&mut self, tokens: usize) {
        assert!(self.len + tokens <= self.capacity, "positions are checked before they are stored");
        self.len += tokens;
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
