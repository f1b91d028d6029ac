//! `prefetch`: for models larger than the card. Layers that do not fit lie coded in pinned host memory and are copied into layer buffers one layer
//! ahead, on the second stream; products decode them where they lie. So PCIe carries coded bytes, and a model streams faster than its decoded form
//! by the ratio of the two.
//!
//! Layers that fit the budget stay on the device, spread evenly, so that copies go on while they compute. Without a budget all layers are streamed.

use super::groups::{Groups, Loader, PER_LAYER};
use super::residency::{Held, Residency, Resident};
use super::slots::Slots;
use crate::model::weights::Span;
use crate::residency::OpenError;
use std::sync::Arc;
use tersor_cuda::layout::QuadMatrix;
use tersor_cuda::{Buffer, CudaError, Device, Form, Pinned, QuadAt, QuadPlaces, Queue, Stream};

/// Layer buffers: depth beyond one layer ahead brings nothing.
pub(super) const BUFFERS: usize = 2;

/// One layer's groups, one behind the other.
struct Layer {
    places: [(QuadPlaces, usize); PER_LAYER],
    home: Home,
}

enum Home {
    Device(Buffer),
    /// Bytes in host memory, and which of the streamed layers it is.
    Host(Pinned, usize),
}

pub(super) struct Prefetch {
    device: Arc<Device>,
    layers: Vec<Layer>,
    /// Streamed layers, in order.
    streamed: Vec<usize>,
    buffers: Vec<Buffer>,
    head: Resident,
    slots: Slots,
}

impl Prefetch {
    /// `available`: bytes for weights on the device; `None`: everything is streamed.
    pub fn open(loader: &Loader<'_>, available: Option<u64>, timed: bool) -> Result<Self, OpenError> {
        let count = loader.groups.layers;
        let device = Arc::clone(loader.device());
        let head = Resident::quad(loader, loader.groups.all.len() - 1, loader.pool.threads())?;
        let mut layers = Vec::with_capacity(count);
        let mut resident = 0;
        if count > 0 {
            let first = Packed::new(loader, 0, loader.pool.threads())?;
            // Layers have the same shape; a twentieth more covers what they differ in.
            let room = available.map_or(0, |bytes| bytes.saturating_sub(head.bytes()));
            let one = (first.bytes + first.bytes / 20) as u64;
            resident = if room >= one * count as u64 { count } else { ((room / one) as usize).saturating_sub(BUFFERS) };
            layers.push(first.place(loader, streamed_as(0, resident, count))?);
        }
        layers.extend(loader.each(count.saturating_sub(1), 0, |before, threads| {
            Packed::new(loader, before + 1, threads)?.place(loader, streamed_as(before + 1, resident, count))
        })?);
        let streamed: Vec<usize> = (0..count).filter(|&layer| matches!(layers[layer].home, Home::Host(..))).collect();
        let largest = streamed.iter().map(|&layer| layers[layer].bytes()).max().unwrap_or(0);
        let buffers = (0..BUFFERS.min(streamed.len())).map(|_| device.allocate(largest, "layer buffers")).collect::<Result<Vec<_>, _>>()?;
        let slots = Slots::new(&device, buffers.len(), streamed.len(), timed)?;
        let this = Self { device, layers, streamed, buffers, head, slots };
        for place in 0..this.buffers.len() {
            copy(&this.device, &this.layers, this.streamed[place], &this.buffers[place])?;
        }
        this.device.synchronize()?;
        Ok(this)
    }
}

/// Which of the streamed layers `layer` is, or `None` if it stays on the device: `resident` of `count` layers do, spread evenly.
fn streamed_as(layer: usize, resident: usize, count: usize) -> Option<usize> {
    let stay_before = |layer: usize| layer * resident / count;
    (stay_before(layer + 1) == stay_before(layer)).then(|| layer - stay_before(layer))
}

/// The groups of a layer in the quad layout, and where each begins in the layer's bytes.
struct Packed {
    groups: Vec<(QuadPlaces, usize, QuadMatrix)>,
    bytes: usize,
}

impl Packed {
    fn new(loader: &Loader<'_>, layer: usize, threads: usize) -> Result<Self, OpenError> {
        let mut packed = Self { groups: Vec::with_capacity(PER_LAYER), bytes: 0 };
        for index in Groups::of_layer(layer) {
            let (places, matrix) = loader.quad(index, threads)?;
            let at = packed.bytes;
            packed.bytes += places.bytes();
            packed.groups.push((places, at, matrix));
            loader.release(index);
        }
        Ok(packed)
    }

    /// Brings it to the device or, as the given one of the streamed layers, to pinned memory.
    fn place(self, loader: &Loader<'_>, streamed: Option<usize>) -> Result<Layer, OpenError> {
        let write = |bytes: &mut [u8]| self.groups.iter().for_each(|(places, at, matrix)| places.write(matrix, &mut bytes[*at..]));
        let home = match streamed {
            Some(index) => {
                let mut pinned = loader.device().pin(self.bytes)?;
                write(pinned.bytes_mut());
                Home::Host(pinned, index)
            }
            None => {
                let mut image = loader.zeroed(self.bytes);
                write(&mut image);
                let buffer = loader.device().upload(&image, "coded weights")?;
                loader.give_back(image);
                Home::Device(buffer)
            }
        };
        let places: Vec<(QuadPlaces, usize)> = self.groups.into_iter().map(|(places, at, _)| (places, at)).collect();
        let places = places.try_into().unwrap_or_else(|_| unreachable!("a layer has {PER_LAYER} groups"));
        Ok(Layer { places, home })
    }
}

impl Layer {
    fn bytes(&self) -> usize {
        let (places, at) = &self.places[PER_LAYER - 1];
        at + places.bytes()
    }
}

fn copy(device: &Device, layers: &[Layer], layer: usize, to: &Buffer) -> Result<(), CudaError> {
    let Home::Host(pinned, _) = &layers[layer].home else { unreachable!("only layers in host memory are streamed") };
    device.copy_in(to, 0, pinned, 0, layers[layer].bytes(), Stream::Side)
}

impl Residency for Prefetch {
    fn begin(&mut self, _queue: &mut Queue<'_>) -> Result<(), CudaError> {
        self.slots.begin(&self.device)
    }

    fn enter(&mut self, queue: &mut Queue<'_>, layer: usize) -> Result<(), CudaError> {
        match self.layers[layer].home {
            Home::Host(_, place) => self.slots.enter(&self.device, queue, place),
            Home::Device(_) => Ok(()),
        }
    }

    fn leave(&mut self, queue: &mut Queue<'_>, layer: usize) -> Result<(), CudaError> {
        let Home::Host(_, place) = self.layers[layer].home else { return Ok(()) };
        let (device, layers, streamed, buffers) = (&self.device, &self.layers, &self.streamed, &self.buffers);
        self.slots.leave(device, queue, place, |_, next, buffer| copy(device, layers, streamed[next], &buffers[buffer]))
    }

    fn end(&mut self, queue: &mut Queue<'_>) -> Result<(), CudaError> {
        self.slots.end(&self.device, queue)
    }

    fn form(&self, group: usize) -> Form<'_> {
        let Some(layer) = self.layers.get(group / PER_LAYER) else { return self.head.form() };
        let (places, at) = &layer.places[group % PER_LAYER];
        let buffer = match &layer.home {
            Home::Device(buffer) => buffer,
            Home::Host(_, place) => &self.buffers[self.slots.buffer(*place)],
        };
        Form::Quad(QuadAt { places, buffer, at: *at })
    }

    fn repeats(&self) -> bool {
        !self.slots.timed()
    }

    fn timeline(&self) -> Result<Vec<Span>, CudaError> {
        self.slots.timeline()
    }

    fn held(&self) -> Held {
        let bytes = |streamed: bool| {
            let of = |layer: &&Layer| matches!(layer.home, Home::Host(..)) == streamed;
            self.layers.iter().filter(of).map(|layer| layer.bytes() as u64).sum::<u64>()
        };
        Held {
            detail: format!("{} of {} layers streamed from host memory", self.streamed.len(), self.layers.len()),
            coded_bytes: bytes(false) + self.head.bytes(),
            buffer_bytes: self.buffers.iter().map(|buffer| buffer.bytes() as u64).sum(),
            host_bytes: bytes(true),
            ..Held::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_that_stay_are_spread_evenly() {
        let of = |resident| (0..5).map(|layer| streamed_as(layer, resident, 5)).collect::<Vec<_>>();
        assert_eq!(of(0), [Some(0), Some(1), Some(2), Some(3), Some(4)]);
        assert_eq!(of(2), [Some(0), Some(1), None, Some(2), None]);
        assert_eq!(of(5), [None; 5]);
    }
}
