//! `prefetch`: while layer n computes, a worker thread decodes layer n + 1 into the spare of two layer buffers.
//!
//! The buffers change hands through channels: whoever holds a [`LayerBuffer`] owns it, so no lock is held while decoding or computing. After the
//! last layer comes layer 0 of the next forward pass, which decodes while the head computes. A model of at most two layers is decoded once.
//!
//! The head stays coded and is decoded inside its product: decoded, a head is often as large as several layers and would inflate both
//! buffers, and it has nothing to overlap with. So does an embedding, of which single rows are read.
//!
//! On one CPU the worker competes with the products for cores and for the cache: of `threads` threads, about half decode (see
//! [`split`]), and with one thread a second is started for decoding. It pays where decoding and computing use different resources, for
//! example where the coded bytes come from a disk.

use super::budget::Footprint;
use super::cost::CostModel;
use super::engine::{Engine, Form, Operand, Price, corrupt};
use super::profile::MachineProfile;
use super::set::{Index, Linear, Source, TensorSet, verify};
use super::{OpenError, Options, Strategy};
use crate::model::weights::{LinearId, LinearKind, ResidencyReport, RunError, Weights};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::Instant;
use tersor_cpu::{Decoded, Level, Pool, decode_into};
use tersor_format::ModelDir;

/// The coded size and two layer buffers, each with room for the largest matrix of every kind.
pub(super) fn footprint(set: &TensorSet, options: &Options) -> Footprint {
    Footprint { buffer_bytes: 2 * layer_bytes(set), ..set.footprint(options) }
}

/// Bytes of a layer buffer.
fn layer_bytes(set: &TensorSet) -> u64 {
    let layers = 0..set.index.layers;
    let largest = |position: usize| layers.clone().map(|l| set.linears[set.layer(l)][position].decoded_bytes()).max().unwrap_or(0);
    (0..Index::PER_LAYER).map(largest).sum()
}

/// How many of `options.threads` threads compute and how many decode: what makes the slower of the two fastest by the profile's prices,
/// half of them without a profile. Both are at least 1.
pub(super) fn split(set: &TensorSet, options: &Options) -> (usize, usize) {
    let threads = options.threads.max(2);
    let Some(profile) = &options.profile else { return (threads - threads / 2, threads / 2) };
    let seconds = |compute: usize| {
        let (products, decoding) = layer_seconds(set, profile, compute, threads - compute);
        products.max(decoding)
    };
    let compute = (1..threads).min_by(|&a, &b| seconds(a).total_cmp(&seconds(b))).unwrap_or(1);
    (compute, threads - compute)
}

/// Seconds of all layers of a step: products with the decoded matrices, and decoding.
fn layer_seconds(set: &TensorSet, profile: &MachineProfile, compute: usize, decode: usize) -> (f64, f64) {
    let [compute, decode] = [compute, decode].map(|threads| CostModel::new(profile, threads, set.working_set_bytes()));
    let layers = 1..1 + set.index.layers * Index::PER_LAYER;
    let costs = || set.linears[layers.clone()].iter().filter_map(Linear::cost);
    (costs().map(|cost| compute.decoded(&cost, 1)).sum(), costs().map(|cost| decode.decode(&cost)).sum())
}

/// Predicted seconds of a step in all matrices but the head.
pub(super) fn step_seconds(set: &TensorSet, options: &Options) -> f64 {
    let Some(profile) = &options.profile else { return f64::INFINITY };
    let (compute, decode) = split(set, options);
    let (products, decoding) = layer_seconds(set, profile, compute, decode);
    products.max(decoding)
}

/// Room for the decoded matrices of one layer.
#[derive(Debug, Default)]
struct LayerBuffer {
    /// The layer whose matrices it holds, complete and valid; `None` while it is filled, and after a failure.
    layer: Option<usize>,
    /// In the order of `LinearKind::IN_LAYER`; empty for matrices that are not coded.
    matrices: Vec<Decoded>,
}

/// Order to the worker: decode `layer` into `buffer`.
struct Request {
    layer: usize,
    buffer: LayerBuffer,
}

/// What became of a request.
struct Reply {
    buffer: LayerBuffer,
    decode_ns: u64,
    result: Result<(), RunError>,
}

/// Where the buffer is that is not being computed with.
#[derive(Debug)]
enum Spare {
    Here(LayerBuffer),
    /// With the worker.
    Away,
    /// Lost with the worker.
    Lost,
}

/// Weights of which two layers at a time are decoded.
#[derive(Debug)]
pub(super) struct PrefetchWeights {
    linears: Arc<Vec<Linear>>,
    index: Index,
    engine: Engine,
    head_price: Price,
    /// The layer that computes.
    current: LayerBuffer,
    spare: Spare,
    requests: Option<Sender<Request>>,
    replies: Receiver<Reply>,
    cancel: Arc<AtomicBool>,
    worker: Option<JoinHandle<()>>,
    buffer_bytes: u64,
    hits: u64,
    misses: u64,
    hit_bytes: u64,
    miss_bytes: u64,
    decode_ns: u64,
    exposed_ns: u64,
    strategy: Strategy,
    detail: String,
}

pub(super) fn open(dir: &ModelDir, set: TensorSet, strategy: Strategy, options: &Options) -> Result<PrefetchWeights, OpenError> {
    let (compute, decode) = split(&set, options);
    let engine = Engine::new(compute, options.level);
    verify(dir, &engine.pool, &|_| Ok(()))?;
    let new_buffer = || {
        let mut matrices: Vec<Decoded> = (0..Index::PER_LAYER).map(|_| Decoded::new()).collect();
        for layer in 0..set.index.layers {
            for (linear, decoded) in set.linears[set.layer(layer)].iter().zip(&mut matrices) {
                if let Some(tensor) = linear.coded() {
                    decoded.reserve(tensor);
                }
            }
        }
        LayerBuffer { layer: None, matrices }
    };
    let (current, spare) = (new_buffer(), new_buffer());
    let buffer_bytes = 2 * current.matrices.iter().map(Decoded::capacity_bytes).sum::<u64>();
    let head = set.index.of(LinearId::HEAD).and_then(|slot| set.linears[slot].cost());
    let head_price = match (&options.profile, head) {
        (Some(profile), Some(cost)) => Price::of_fused(&CostModel::new(profile, compute, set.working_set_bytes()), &cost),
        _ => Price::default(),
    };
    let linears = Arc::new(set.linears);
    let (requests, orders) = channel::<Request>();
    let (answers, replies) = channel::<Reply>();
    let cancel = Arc::new(AtomicBool::new(false));
    let worker = {
        let (linears, cancel, level) = (Arc::clone(&linears), Arc::clone(&cancel), options.level);
        let work = move || {
            let pool = Pool::new(decode);
            for Request { layer, mut buffer } in orders {
                let start = Instant::now();
                let result = fill(&mut buffer, layer, &linears, level, &pool, &cancel);
                let reply = Reply { buffer, decode_ns: start.elapsed().as_nanos() as u64, result };
                if answers.send(reply).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("tersor-prefetch".to_owned()).spawn(work);
        thread.map_err(|cause| OpenError::Thread { cause })?
    };
    let mut weights = PrefetchWeights {
        linears,
        index: set.index,
        engine,
        head_price,
        current,
        spare: Spare::Here(spare),
        requests: Some(requests),
        replies,
        cancel,
        worker: Some(worker),
        buffer_bytes,
        hits: 0,
        misses: 0,
        hit_bytes: 0,
        miss_bytes: 0,
        decode_ns: 0,
        exposed_ns: 0,
        strategy,
        detail: format!("{compute} threads compute, {decode} decode one layer ahead"),
    };
    weights.request_ahead(0);
    Ok(weights)
}

/// Decodes the matrices of `layer` into `buffer`. Gives up between two matrices when `cancel` is set.
fn fill(
    buffer: &mut LayerBuffer,
    layer: usize,
    linears: &[Linear],
    level: Level,
    pool: &Pool,
    cancel: &AtomicBool,
) -> Result<(), RunError> {
    buffer.layer = None;
    let start = 1 + layer * Index::PER_LAYER;
    for (linear, decoded) in linears[start..start + Index::PER_LAYER].iter().zip(&mut buffer.matrices) {
        if cancel.load(Ordering::Relaxed) {
            return Ok(());
        }
        if let Some(tensor) = linear.coded() {
            decode_into(level, tensor, decoded, Some(pool)).map_err(|error| corrupt(&linear.name, &error))?;
        }
    }
    buffer.layer = Some(layer);
    Ok(())
}

impl PrefetchWeights {
    /// Makes `layer` the current one, waiting for the worker if it has to.
    fn make_current(&mut self, layer: usize) -> Result<(), RunError> {
        if self.current.layer == Some(layer) {
            return Ok(());
        }
        let start = Instant::now();
        let was_ready = self.collect(false)?;
        let mut waited = !was_ready && self.collect(true)?;
        if !matches!(&self.spare, Spare::Here(buffer) if buffer.layer == Some(layer)) {
            // Not in sequence (a forward pass was given up, or began anew): nothing was decoded ahead.
            waited = true;
            self.request(layer)?;
            self.collect(true)?;
        }
        if waited {
            self.exposed_ns += start.elapsed().as_nanos() as u64;
        }
        let bytes: u64 = self.layer_linears(layer).iter().map(Linear::decoded_bytes).sum();
        let uses = self.layer_linears(layer).iter().filter(|linear| linear.coded().is_some()).count() as u64;
        if waited {
            (self.misses, self.miss_bytes) = (self.misses + uses, self.miss_bytes + bytes);
        } else {
            (self.hits, self.hit_bytes) = (self.hits + uses, self.hit_bytes + bytes);
        }
        match &mut self.spare {
            Spare::Here(buffer) => std::mem::swap(&mut self.current, buffer),
            Spare::Away | Spare::Lost => return Err(lost()),
        }
        self.request_ahead((layer + 1) % self.index.layers);
        Ok(())
    }

    fn layer_linears(&self, layer: usize) -> &[Linear] {
        let start = 1 + layer * Index::PER_LAYER;
        &self.linears[start..start + Index::PER_LAYER]
    }

    /// Has `layer` decoded into the spare buffer, unless one of the two holds it. A worker that is gone is noticed by the wait for its reply.
    fn request_ahead(&mut self, layer: usize) {
        let held = |buffer: &LayerBuffer| buffer.layer == Some(layer);
        if !held(&self.current) && matches!(&self.spare, Spare::Here(buffer) if !held(buffer)) {
            let _ = self.request(layer);
        }
    }

    /// Hands the spare buffer to the worker.
    fn request(&mut self, layer: usize) -> Result<(), RunError> {
        match (std::mem::replace(&mut self.spare, Spare::Lost), &self.requests) {
            (Spare::Here(buffer), Some(requests)) => {
                requests.send(Request { layer, buffer }).map_err(|_| lost())?;
                self.spare = Spare::Away;
                Ok(())
            }
            _ => Err(lost()),
        }
    }

    /// Takes the buffer back from the worker; with `wait`, waits until it is done. Whether the spare buffer is here afterwards.
    fn collect(&mut self, wait: bool) -> Result<bool, RunError> {
        match self.spare {
            Spare::Here(_) => return Ok(true),
            Spare::Lost => return Err(lost()),
            Spare::Away => {}
        }
        let reply = if wait {
            self.replies.recv().ok()
        } else {
            match self.replies.try_recv() {
                Ok(reply) => Some(reply),
                Err(TryRecvError::Empty) => return Ok(false),
                Err(TryRecvError::Disconnected) => None,
            }
        };
        let Some(reply) = reply else {
            self.spare = Spare::Lost;
            return Err(lost());
        };
        self.decode_ns += reply.decode_ns;
        self.spare = Spare::Here(reply.buffer);
        reply.result.map(|()| true)
    }
}

fn lost() -> RunError {
    RunError::Worker { cause: "the decoding thread ended early".to_owned() }
}

impl Drop for PrefetchWeights {
    fn drop(&mut self) {
        self.cancel.store(true, Ordering::Relaxed);
        // Ends the worker's loop.
        self.requests = None;
        if let Some(worker) = self.worker.take() {
            // A panic of the worker has been reported by the call that missed its reply.
            let _ = worker.join();
        }
    }
}

impl Weights for PrefetchWeights {
    fn enter_layer(&mut self, layer: usize) -> Result<(), RunError> {
        if layer < self.index.layers { self.make_current(layer) } else { Ok(()) }
    }

    fn linear(&mut self, x: &[f32], tokens: usize, jobs: &mut [(LinearId, &mut [f32])]) -> Result<(), RunError> {
        if let Some((id, _)) = jobs.iter().find(|(id, _)| !matches!(id.kind, LinearKind::Embed | LinearKind::Head)) {
            let layer = usize::from(id.layer);
            if layer >= self.index.layers {
                return Err(RunError::NoWeights { id: *id });
            }
            self.make_current(layer)?;
        }
        let mut operands = Vec::with_capacity(jobs.len());
        for (id, out) in jobs.iter_mut() {
            let no_weights = || RunError::NoWeights { id: *id };
            let slot = self.index.of(*id).ok_or_else(no_weights)?;
            let linear = &self.linears[slot];
            let in_layer = LinearKind::IN_LAYER.iter().position(|&kind| kind == id.kind);
            let (form, price) = match (&linear.source, in_layer) {
                (Source::Coded { scales, .. }, Some(position)) => {
                    if self.current.layer != Some(usize::from(id.layer)) {
                        return Err(no_weights());
                    }
                    (Form::Decoded(&self.current.matrices[position], scales), Price::default())
                }
                _ => (Form::stored(linear), self.head_price),
            };
            operands.push(Operand { name: &linear.name, form, price, out });
        }
        self.engine.multiply(x, tokens, &mut operands)
    }

    fn embed(&mut self, tokens: &[u32], out: &mut [f32]) -> Result<(), RunError> {
        self.engine.rows(&self.linears[0].name, Form::stored(&self.linears[0]), tokens, out)
    }

    fn report(&self) -> ResidencyReport {
        let stored: u64 = self.linears.iter().map(|l| l.mapped_bytes() + l.table_bytes() + l.scale_bytes()).sum();
        ResidencyReport {
            strategy: self.strategy.to_string(),
            detail: self.detail.clone(),
            resident_bytes: stored + self.buffer_bytes,
            hits: self.hits,
            misses: self.misses,
            hit_bytes: self.hit_bytes,
            miss_bytes: self.miss_bytes,
            decode_hidden_ns: self.decode_ns.saturating_sub(self.exposed_ns),
            decode_exposed_ns: self.exposed_ns,
            decode_fused_ns: self.engine.decode_fused_ns as u64,
            linear_ns: self.engine.linear_ns,
            timeline: Vec::new(),
        }
    }

    fn pool(&self) -> &Pool {
        &self.engine.pool
    }

    fn level(&self) -> Level {
        self.engine.level
    }
}
