//! `gpu-async`: all groups stay coded on the device; a kernel on the second stream decodes the layers ahead into two layer buffers while the compute
//! stream multiplies by the decoded form.
//!
//! At one token the decoder moves more bytes than it saves (coded bytes read, decoded bytes written and read back): `fused` is faster. It pays where
//! a product does more work than its bytes: batches and prefill. The head is larger than a layer and is decoded inside its product.

use super::groups::{Groups, Loader, PER_LAYER};
use super::residency::{Held, Residency, Resident};
use super::slots::Slots;
use crate::model::weights::Span;
use crate::residency::OpenError;
use std::sync::Arc;
use tersor_cuda::{Buffer, CudaError, Device, Form, QuadAt, Queue, Stream, nibble_bytes};

/// Layer buffers.
pub(super) const BUFFERS: usize = 2;

pub(super) struct GpuAsync {
    layers: Layers,
    slots: Slots,
}

/// The weights, and the buffers that they are decoded into.
struct Layers {
    device: Arc<Device>,
    /// All groups in the quad layout.
    groups: Vec<Resident>,
    count: usize,
    buffers: Vec<Buffer>,
    /// Where each group's nibbles begin in its layer's buffer.
    places: Vec<usize>,
}

impl GpuAsync {
    pub fn open(loader: &Loader<'_>, timed: bool) -> Result<Self, OpenError> {
        let all = loader.groups.all.len();
        let count = loader.groups.layers;
        let groups = Resident::quads(loader, &Vec::from_iter(0..all))?;
        let (places, largest) = nibble_places(&groups, count);
        let buffers = (0..BUFFERS.min(count)).map(|_| loader.device().allocate(largest, "layer buffers")).collect::<Result<Vec<_>, _>>()?;
        let slots = Slots::new(loader.device(), buffers.len(), count, timed)?;
        let layers = Layers { device: Arc::clone(loader.device()), groups, count, buffers, places };
        let mut queue = Queue::new(loader.kernels);
        for layer in 0..layers.buffers.len() {
            layers.decode(&mut queue, layer, layer)?;
        }
        layers.device.synchronize()?;
        Ok(Self { layers, slots })
    }
}

/// Where the nibbles of each group begin in its layer's buffer, and the size of the largest layer.
pub(super) fn nibble_places(groups: &[Resident], layers: usize) -> (Vec<usize>, usize) {
    let (mut places, mut largest) = (vec![0; groups.len()], 0);
    for layer in 0..layers {
        let mut end = 0;
        for index in Groups::of_layer(layer) {
            places[index] = end;
            end += nibble_bytes(groups[index].form().geometry()).next_multiple_of(256);
        }
        largest = largest.max(end);
    }
    (places, largest)
}

impl Layers {
    fn quad(&self, group: usize) -> QuadAt<'_> {
        let Form::Quad(quad) = self.groups[group].form() else { unreachable!("all groups are coded") };
        quad
    }

    fn decode(&self, queue: &mut Queue<'_>, layer: usize, buffer: usize) -> Result<(), CudaError> {
        Groups::of_layer(layer).try_for_each(|group| {
            let quad = self.quad(group);
            queue.decode(&quad, &quad.decoded(&self.buffers[buffer], self.places[group]), Stream::Side)
        })
    }
}

impl Residency for GpuAsync {
    fn begin(&mut self, _queue: &mut Queue<'_>) -> Result<(), CudaError> {
        self.slots.begin(&self.layers.device)
    }

    fn enter(&mut self, queue: &mut Queue<'_>, layer: usize) -> Result<(), CudaError> {
        self.slots.enter(&self.layers.device, queue, layer)
    }

    fn leave(&mut self, queue: &mut Queue<'_>, layer: usize) -> Result<(), CudaError> {
        let layers = &self.layers;
        self.slots.leave(&layers.device, queue, layer, |queue, next, buffer| layers.decode(queue, next, buffer))
    }

    fn end(&mut self, queue: &mut Queue<'_>) -> Result<(), CudaError> {
        self.slots.end(&self.layers.device, queue)
    }

    fn form(&self, group: usize) -> Form<'_> {
        let layer = group / PER_LAYER;
        if layer >= self.layers.count {
            return self.layers.groups[group].form();
        }
        let buffer = &self.layers.buffers[self.slots.buffer(layer)];
        Form::Plain(self.layers.quad(group).decoded(buffer, self.layers.places[group]))
    }

    fn repeats(&self) -> bool {
        !self.slots.timed()
    }

    fn timeline(&self) -> Result<Vec<Span>, CudaError> {
        self.slots.timeline()
    }

    fn held(&self) -> Held {
        Held {
            detail: format!("{} layer buffers", self.layers.buffers.len()),
            coded_bytes: self.layers.groups.iter().map(Resident::bytes).sum(),
            buffer_bytes: self.layers.buffers.iter().map(|buffer| buffer.bytes() as u64).sum(),
            ..Held::default()
        }
    }
}
