//! Layer buffers that are filled on the second stream while the compute stream uses the others: what `gpu-async` and `prefetch` share.
//!
//! Layer l (counted among those that pass through the buffers) uses buffer l % n. When it is left, its buffer is filled for layer l + n, or, if the
//! pass has no such layer, for the first layer of the next pass that uses this buffer. So the first layers of a pass are always there when it
//! begins, every pass does the same, and it can be recorded.

use tersor_cuda::{CudaError, Device, Event, Queue, Stream};

#[derive(Debug)]
pub(super) struct Slots {
    layers: usize,
    /// A buffer's layer has left it.
    free: Vec<Event>,
    /// A buffer is filled.
    ready: Vec<Event>,
    /// Filled in this pass, so that its `ready` belongs to it.
    filled: Vec<bool>,
    begin: Event,
    end: Event,
}

impl Slots {
    /// `buffers` buffers for `layers` layers.
    pub fn new(device: &Device, buffers: usize, layers: usize) -> Result<Self, CudaError> {
        let events = || (0..buffers).map(|_| device.event(false)).collect::<Result<Vec<_>, _>>();
        Ok(Self {
            layers,
            free: events()?,
            ready: events()?,
            filled: vec![false; buffers],
            begin: device.event(false)?,
            end: device.event(false)?,
        })
    }

    pub fn buffer(&self, layer: usize) -> usize {
        layer % self.free.len()
    }

    /// The second stream begins after what the compute stream has done so far.
    pub fn begin(&mut self, device: &Device) -> Result<(), CudaError> {
        self.filled.fill(false);
        device.record(&self.begin, Stream::Compute)?;
        device.wait(&self.begin, Stream::Side)
    }

    /// What was filled before this pass is there: the pass before waited for it.
    pub fn enter(&mut self, device: &Device, queue: &mut Queue<'_>, layer: usize) -> Result<(), CudaError> {
        let buffer = self.buffer(layer);
        if self.filled[buffer] {
            device.wait(&self.ready[buffer], Stream::Compute)?;
            queue.interrupted();
        }
        Ok(())
    }

    /// Frees the layer's buffer and lets `fill` put a layer's weights into it, on the second stream: (layer, buffer).
    pub fn leave(
        &mut self,
        device: &Device,
        queue: &mut Queue<'_>,
        layer: usize,
        fill: impl FnOnce(&mut Queue<'_>, usize, usize) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let (buffer, count) = (self.buffer(layer), self.free.len());
        let next = if layer + count < self.layers { layer + count } else { buffer };
        if next == layer {
            // The only layer of its buffer stays in it.
            return Ok(());
        }
        device.record(&self.free[buffer], Stream::Compute)?;
        queue.interrupted();
        device.wait(&self.free[buffer], Stream::Side)?;
        fill(queue, next, buffer)?;
        device.record(&self.ready[buffer], Stream::Side)?;
        self.filled[buffer] = true;
        Ok(())
    }

    /// The compute stream waits for the second one, so that the next pass finds its first layers.
    pub fn end(&mut self, device: &Device, queue: &mut Queue<'_>) -> Result<(), CudaError> {
        device.record(&self.end, Stream::Side)?;
        device.wait(&self.end, Stream::Compute)?;
        queue.interrupted();
        Ok(())
    }
}
