//! Layer buffers that are filled on the second stream while the compute stream uses the others: what `gpu-async` and `prefetch` share.
//!
//! Layer l (counted among those that pass through the buffers) uses buffer l % n. When it is left, its buffer is filled for layer l + n, or, if the
//! pass has no such layer, for the first layer of the next pass that uses this buffer. So the first layers of a pass are always there when it
//! begins, every pass does the same, and it can be recorded.

use crate::model::weights::Span;
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
    timeline: Option<Timeline>,
}

/// Events of the pass at hand.
#[derive(Debug, Default)]
struct Timeline {
    origin: Option<Event>,
    /// Layer, whether it is computed with, start, end.
    pieces: Vec<(usize, bool, Event, Event)>,
    entered: Option<Event>,
}

fn mark(device: &Device, stream: Stream) -> Result<Event, CudaError> {
    let event = device.event(true)?;
    device.record(&event, stream)?;
    Ok(event)
}

impl Slots {
    /// `buffers` buffers for `layers` layers. `timed`: passes leave a timeline, and must not be recorded.
    pub fn new(device: &Device, buffers: usize, layers: usize, timed: bool) -> Result<Self, CudaError> {
        let events = || (0..buffers).map(|_| device.event(false)).collect::<Result<Vec<_>, _>>();
        Ok(Self {
            layers,
            free: events()?,
            ready: events()?,
            filled: vec![false; buffers],
            begin: device.event(false)?,
            end: device.event(false)?,
            timeline: timed.then(Timeline::default),
        })
    }

    pub fn timed(&self) -> bool {
        self.timeline.is_some()
    }

    /// The last pass, which has ended.
    pub fn timeline(&self) -> Result<Vec<Span>, CudaError> {
        let Some(Timeline { origin: Some(origin), pieces, .. }) = &self.timeline else { return Ok(Vec::new()) };
        let span = |(layer, computing, from, until): &(usize, bool, Event, Event)| {
            let after = |event| origin.seconds_until(event).map(|seconds| seconds * 1e6);
            Ok(Span { layer: *layer, computing: *computing, from_us: after(from)?, until_us: after(until)? })
        };
        pieces.iter().map(span).collect()
    }

    pub fn buffer(&self, layer: usize) -> usize {
        layer % self.free.len()
    }

    /// The second stream begins after what the compute stream has done so far.
    pub fn begin(&mut self, device: &Device) -> Result<(), CudaError> {
        self.filled.fill(false);
        if let Some(timeline) = &mut self.timeline {
            *timeline = Timeline { origin: Some(mark(device, Stream::Compute)?), ..Timeline::default() };
        }
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
        if let Some(timeline) = &mut self.timeline {
            timeline.entered = Some(mark(device, Stream::Compute)?);
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
        if let Some(timeline) = &mut self.timeline
            && let Some(entered) = timeline.entered.take()
        {
            timeline.pieces.push((layer, true, entered, mark(device, Stream::Compute)?));
            queue.interrupted();
        }
        if next == layer {
            // The only layer of its buffer stays in it.
            return Ok(());
        }
        device.record(&self.free[buffer], Stream::Compute)?;
        queue.interrupted();
        device.wait(&self.free[buffer], Stream::Side)?;
        let start = self.timed().then(|| mark(device, Stream::Side)).transpose()?;
        fill(queue, next, buffer)?;
        if let (Some(timeline), Some(start)) = (&mut self.timeline, start) {
            timeline.pieces.push((next, false, start, mark(device, Stream::Side)?));
        }
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
