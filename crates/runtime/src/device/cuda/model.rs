//! The forward pass on a GPU. A step of one token (or one token of each of several sequences) is recorded as a graph and replayed; what changes from step to
//! step (the token's embedding, its angles, its place in the cache) lies in device memory.
//!
//! A step of one token with all matrices decoded for good is one kernel (`tersor_cuda::Step`), unless what attention or silu leaves is beyond the range of
//! that kernel's numbers, which shows when it is done. Else there are ten kernels a layer:
//! prepare (add, norm, quantize) | q, k, v | rope | attention | prepare | o | prepare | gate, up | prepare (silu, quantize) | down.
//! Products leave exact integer sums; the kernel behind them makes numbers of them. So every strategy gives the same bits.

use super::groups::{Groups, Kind};
use super::residency::Residency;
use crate::model::Runner;
use crate::model::config::Config;
use crate::model::kv::{DeviceKv, KvCache};
use crate::model::llama::{Continuation, LayerVectors, LogitsOf, Model};
use crate::model::runner::greatest_of_row;
use crate::model::weights::{ResidencyReport, RunError};
use crate::residency::OpenError;
use std::collections::HashMap;
use std::sync::Arc;
use tersor_cpu::{Decoded, KernelScales, Level, Matrix, decode_into, read_row};
use tersor_cuda::layout::ATTENTION_SPLITS;
use tersor_cuda::{
    Activations, AttentionAt, Buffer, CudaError, Device, Event, Form, Graph, HEAD_DIM_MAX, Heads, Input, Kernels, Mixed, Pinned, Place,
    Queue, Step, StepInput, StepLayer, StepMatrix, StepModel, Stream, SumsAt, nibble_bytes,
};
use tersor_format::CodedTensor;

/// Most tokens that pass through the layers together.
pub(super) const SLICE_TOKENS_MAX: usize = 128;
/// Most tokens whose logits are computed together: vocabularies are large.
const HEAD_TOKENS_MAX: usize = 32;
/// From this many tokens on, a coded group is decoded once for all of them instead of once for each batch.
const DECODE_TOKENS_MIN: usize = 17;

/// Keys and values of one sequence on the device.
#[derive(Debug)]
struct CudaKv {
    keys: Buffer,
    values: Buffer,
}

impl DeviceKv for CudaKv {
    fn bytes(&self) -> u64 {
        (self.keys.bytes() + self.values.bytes()) as u64
    }
}

/// The vectors of one layer on the device.
#[derive(Debug)]
struct Norms {
    input: Buffer,
    post: Buffer,
    heads: Option<[Buffer; 2]>,
}

/// The embedding stays on the host: a step reads one row of it.
#[derive(Debug)]
pub(super) struct Embedding {
    pub name: String,
    pub tensor: CodedTensor,
    pub scales: KernelScales,
    pub level: Level,
    /// Where steps are so short that decoding a chunk for a row would be a hundredth of one.
    pub decoded: Option<Decoded>,
}

impl Embedding {
    /// Decodes it. A corrupt chunk is left for whoever reads a row of it.
    fn decode(&mut self) {
        let mut decoded = Decoded::new();
        self.decoded = decode_into(self.level, &self.tensor, &mut decoded, None).is_ok().then_some(decoded);
    }

    fn read_row(&self, row: usize, out: &mut [f32]) -> Result<(), RunError> {
        let matrix = self.decoded.as_ref().map_or(Matrix::Coded(&self.tensor), Matrix::Decoded);
        read_row(self.level, matrix, &self.scales, row, out)
            .map_err(|e| RunError::Decode { tensor: self.name.clone(), cause: e.to_string() })
    }
}

/// Activation buffers.
#[derive(Debug)]
struct Scratch {
    /// [`InputParts`] of a slice.
    input: Buffer,
    staging: Pinned,
    /// By turns: a product's sums need the units of its activations while the next are prepared.
    activations: [Activations; 2],
    sums: [Buffer; 2],
    q: Buffer,
    mixed: Mixed,
    /// Rows of the slice whose logits are wanted.
    rows: Buffer,
    logits: Buffer,
    logits_host: Pinned,
    /// Nibbles of one coded group, for many tokens.
    decoded: Option<Buffer>,
}

/// Where the parts of a slice begin in the input: x (tokens, hidden) | angles (tokens, head_dim) | places (tokens). One copy brings all of it.
#[derive(Clone, Copy, Debug)]
struct InputParts {
    turn: usize,
    places: usize,
    bytes: usize,
}

impl InputParts {
    fn new(config: &Config, tokens: usize) -> Self {
        let turn = (tokens * config.hidden * size_of::<f32>()).next_multiple_of(256);
        let places = (turn + tokens * config.head_dim * size_of::<f32>()).next_multiple_of(256);
        Self { turn, places, bytes: places + tokens * size_of::<Place>() }
    }
}

/// A model on a GPU.
pub(super) struct CudaRunner {
    config: Config,
    kernels: Arc<Kernels>,
    groups: Groups,
    norms: Vec<Norms>,
    final_norm: Buffer,
    frequencies: Vec<f64>,
    embedding: Embedding,
    residency: Box<dyn Residency>,
    scratch: Scratch,
    /// Steps of one token, if they are one kernel.
    step: Option<Arc<Step>>,
    /// A step's logits have arrived; what is queued behind them need not be waited for.
    arrived: Event,
    /// Recorded steps by their number of tokens.
    graphs: HashMap<usize, Graph>,
    report: ResidencyReport,
    vector_bytes: u64,
}

/// Where a sequence's next token goes.
fn next_place(kv: &mut KvCache) -> Result<Place, RunError> {
    let capacity = u32::try_from(kv.capacity()).map_err(|_| RunError::ForeignKv)?;
    let position = kv.len() as u32;
    let CudaKv { keys, values } = kv.device::<CudaKv>()?;
    Ok(Place { keys: keys.address(), values: values.address(), position, capacity })
}

/// A token of a slice.
struct Token {
    sequence: usize,
    /// Which of the sequence's new tokens.
    index: usize,
    id: u32,
    place: Place,
    wanted: bool,
}

impl From<CudaError> for RunError {
    fn from(e: CudaError) -> Self {
        Self::Device { cause: e.to_string() }
    }
}

/// What a runner is made of, besides the model and its weights.
pub(super) struct Parts {
    pub kernels: Arc<Kernels>,
    pub groups: Groups,
    pub embedding: Embedding,
    pub strategy: String,
    pub detail: String,
}

impl CudaRunner {
    /// Bytes on the device besides weights and caches, for `tokens` tokens a slice.
    pub fn fixed_bytes(config: &Config, groups: &Groups) -> u64 {
        let t = SLICE_TOKENS_MAX as u64;
        let (hidden, queries) = (config.hidden as u64, (config.heads * config.head_dim) as u64);
        let input = t * (4 * hidden + 4 * config.head_dim as u64 + size_of::<Place>() as u64);
        let cols = groups.all.iter().map(|group| group.geometry.padded_cols() as u64).max().unwrap_or(0);
        let activations = 2 * t * (3 * cols + cols / 16 + 4);
        let sums = groups.all.iter().map(|group| sums_bytes(group) as u64).max().unwrap_or(0) * 2;
        let mixed = Mixed::bytes_for(config.heads, config.head_dim) as u64;
        let logits = (HEAD_TOKENS_MAX * config.vocab) as u64 * 4;
        let nibbles = groups.all[..groups.all.len() - 1].iter().map(|group| nibble_bytes(&group.geometry) as u64).max().unwrap_or(0);
        let norms = (2 * config.layers as u64 + 1) * hidden * 4;
        let stats = config.layers as u64 * 8 * (config.heads * ATTENTION_SPLITS) as u64;
        let step = 8 * (groups.all.iter().map(|group| group.n() as u64).sum::<u64>() + 2 * cols) + 2 * mixed + stats;
        input + activations + sums + t * queries * 4 + t * mixed + logits + nibbles + norms + step + groups.scale_bytes()
    }

    pub fn new(model: &Model, parts: Parts, residency: Box<dyn Residency>) -> Result<Self, OpenError> {
        let Parts { kernels, groups, mut embedding, strategy, detail } = parts;
        let config = model.config().clone();
        if config.head_dim > HEAD_DIM_MAX {
            return Err(OpenError::Device {
                cause: format!("heads of {} numbers are not supported on a GPU, at most {HEAD_DIM_MAX}", config.head_dim),
            });
        }
        let device = Arc::clone(kernels.device());
        let upload = |vector: &[f32]| device.upload(vector, "norms");
        let norms_of = |layer: &LayerVectors| -> Result<Norms, CudaError> {
            let heads = match &layer.head_norms {
                Some([q, k]) => Some([upload(q)?, upload(k)?]),
                None => None,
            };
            Ok(Norms { input: upload(&layer.input_norm)?, post: upload(&layer.post_norm)?, heads })
        };
        let norms = model.layers().iter().map(norms_of).collect::<Result<Vec<_>, _>>()?;
        let final_norm = upload(model.final_norm())?;
        let vector_bytes = norms.iter().map(|n| n.input.bytes() + n.post.bytes()).sum::<usize>() + final_norm.bytes();
        let scratch = Scratch::new(&kernels, &config, &groups, residency.as_ref())?;
        let step = match residency.stays() {
            true => Step::new(&kernels, &step_model(&config, &groups, &norms, &final_norm, residency.as_ref()))?.map(Arc::new),
            false => None,
        };
        if step.is_some() {
            embedding.decode();
        }
        let arrived = device.event(false)?;
        let report = ResidencyReport { strategy, detail, ..ResidencyReport::default() };
        Ok(Self {
            frequencies: model.frequencies().to_vec(),
            config,
            kernels,
            groups,
            norms,
            final_norm,
            embedding,
            residency,
            scratch,
            step,
            arrived,
            graphs: HashMap::new(),
            report,
            vector_bytes: vector_bytes as u64,
        })
    }

    fn device(&self) -> &Arc<Device> {
        self.kernels.device()
    }

    /// Writes embeddings, angles and places of a slice to the staging area.
    fn stage(&mut self, slice: &[Token]) -> Result<(), RunError> {
        let (hidden, half) = (self.config.hidden, self.config.head_dim / 2);
        let parts = InputParts::new(&self.config, slice.len());
        let mut row = vec![0f32; hidden];
        let bytes = self.scratch.staging.bytes_mut();
        for (t, token) in slice.iter().enumerate() {
            self.embedding.read_row(token.id as usize, &mut row)?;
            put(&mut bytes[t * hidden * 4..], row.iter().map(|x| x.to_le_bytes()));
            let angles = self.frequencies.iter().map(|frequency| (f64::from(token.place.position) * frequency).sin_cos());
            let (sines, cosines): (Vec<f64>, Vec<f64>) = angles.unzip();
            let turn = cosines.iter().chain(&sines).map(|&x| (x as f32).to_le_bytes());
            put(&mut bytes[parts.turn + t * 2 * half * 4..], turn);
            let place = &mut bytes[parts.places + t * size_of::<Place>()..];
            let Place { keys, values, position, capacity } = token.place;
            put(place, [keys, values].iter().map(|x| x.to_le_bytes()));
            put(&mut place[16..], [position, capacity].iter().map(|x| x.to_le_bytes()));
        }
        Ok(())
    }

    /// Copies the staged slice of `tokens` tokens to the device.
    fn send(&self, tokens: usize) -> Result<(), CudaError> {
        let (s, bytes) = (&self.scratch, InputParts::new(&self.config, tokens).bytes);
        self.device().copy_in(&s.input, 0, &s.staging, 0, bytes, Stream::Compute)
    }

    /// The layers, of a slice that was staged, and the logits of the wanted rows: all of them, or those in `scratch.rows`.
    fn pass(&mut self, tokens: usize, wanted: usize, chosen: bool) -> Result<(), CudaError> {
        self.send(tokens)?;
        let kernels = Arc::clone(&self.kernels);
        let mut queue = Queue::new(&kernels);
        self.residency.begin(&mut queue)?;
        queue.interrupted();
        for layer in 0..self.config.layers {
            self.residency.enter(&mut queue, layer)?;
            self.layer(&mut queue, layer, tokens)?;
            self.residency.leave(&mut queue, layer)?;
        }
        if wanted > 0 {
            self.head(&mut queue, wanted, chosen)?;
        }
        self.residency.end(&mut queue)?;
        match wanted {
            0 => Ok(()),
            _ => self.copy_logits(wanted),
        }
    }

    fn copy_logits(&mut self, rows: usize) -> Result<(), CudaError> {
        let s = &mut self.scratch;
        self.kernels.device().copy_out(&mut s.logits_host, &s.logits, rows * self.config.vocab * size_of::<f32>(), Stream::Compute)
    }

    /// A step of one token in one kernel, which reads the staged token where it lies.
    fn one_kernel(&mut self, step: &Step, logits: bool) -> Result<(), CudaError> {
        let (s, parts) = (&self.scratch, InputParts::new(&self.config, 1));
        let input = StepInput { input: &s.staging, turn: parts.turn, place: parts.places, logits: &s.logits };
        Queue::new(&self.kernels).step(step, &input)?;
        if logits {
            self.copy_logits(1)?;
        }
        self.device().record(&self.arrived, Stream::Compute)?;
        step.clear()
    }

    /// One layer. What the layer before it computed last is still to be added to the stream.
    fn layer(&self, queue: &mut Queue<'_>, layer: usize, tokens: usize) -> Result<(), CudaError> {
        let (c, s, norms) = (&self.config, &self.scratch, &self.norms[layer]);
        let parts = InputParts::new(c, tokens);
        let norm = |weight, add| Input::Norm { x: &s.input, weight, eps: c.rms_eps, add, rows: None };
        let index = |kind| self.groups.index(layer, kind);
        let (qkv, o, gate_up, down) = (index(Kind::Qkv), index(Kind::O), index(Kind::GateUp), index(Kind::Down));
        let add = (layer > 0).then(|| self.sums(self.groups.index(layer - 1, Kind::Down), 1));
        self.multiply(queue, norm(&norms.input, add), qkv, 0, tokens)?;
        let first_rows = &self.groups.all[qkv].first_rows;
        let at = AttentionAt {
            sums: self.sums(qkv, 0),
            norms: norms.heads.as_ref().map(|[q, k]| [q, k]),
            eps: c.rms_eps,
            heads: Heads { heads: c.heads, kv_heads: c.kv_heads, head_dim: c.head_dim, k_row: first_rows[1], v_row: first_rows[2] },
            layer,
            window: c.windows[layer],
            turn: (&s.input, parts.turn),
            places: (&s.input, parts.places),
            q: &s.q,
            out: &s.mixed,
        };
        queue.attend(&at, tokens)?;
        self.multiply(queue, Input::Mix(&s.mixed, at.heads), o, 1, tokens)?;
        self.multiply(queue, norm(&norms.post, Some(self.sums(o, 1))), gate_up, 0, tokens)?;
        let input = Input::Silu { sums: self.sums(gate_up, 0), up_row: self.groups.all[gate_up].first_rows[1] };
        self.multiply(queue, input, down, 1, tokens)
    }

    /// Logits of all tokens, or of those in `scratch.rows`.
    fn head(&self, queue: &mut Queue<'_>, wanted: usize, chosen: bool) -> Result<(), CudaError> {
        let (c, s) = (&self.config, &self.scratch);
        let add = (c.layers > 0).then(|| self.sums(self.groups.index(c.layers - 1, Kind::Down), 1));
        let head = self.groups.index(0, Kind::Head);
        let input = Input::Norm { x: &s.input, weight: &self.final_norm, eps: c.rms_eps, add, rows: chosen.then_some(&s.rows) };
        self.multiply(queue, input, head, 0, wanted)?;
        queue.logits(self.sums(head, 0), wanted, c.vocab, &s.logits)
    }

    /// Prepares activations and multiplies a group by them; sums go to `turn`'s buffers. What is coded is decoded first where there are many tokens.
    fn multiply(&self, queue: &mut Queue<'_>, input: Input<'_>, group: usize, turn: usize, tokens: usize) -> Result<(), CudaError> {
        let s = &self.scratch;
        let mut form = self.residency.form(group);
        if let (Form::Quad(quad), Some(decoded)) = (form, &s.decoded)
            && tokens >= DECODE_TOKENS_MIN
            && nibble_bytes(form.geometry()) <= decoded.bytes()
        {
            let plain = quad.decoded(decoded, 0);
            queue.decode(&quad, &plain, Stream::Compute)?;
            form = Form::Plain(plain);
        }
        queue.prepare(input, &s.activations[turn], tokens, self.groups.all[group].cols(), &form, &s.sums[turn])?;
        queue.product(&form, &s.activations[turn], tokens, &s.sums[turn])
    }

    fn sums(&self, group: usize, turn: usize) -> SumsAt<'_> {
        let g = &self.groups.all[group];
        SumsAt {
            sum: &self.scratch.sums[turn],
            unit: self.scratch.activations[turn].unit(),
            scale: &g.scale,
            bias: g.bias.as_ref(),
            n: g.n(),
        }
    }

    /// A pass in which every token's logits are wanted and there are few: recorded when it comes a second time.
    fn step(&mut self, tokens: usize) -> Result<(), CudaError> {
        if let (Some(step), 1) = (self.step.clone(), tokens) {
            return self.one_kernel(&step, true);
        }
        if let Some(graph) = self.graphs.get(&tokens) {
            graph.launch()?;
            self.residency.replayed();
        } else {
            self.pass(tokens, tokens, false)?;
            if self.residency.repeats() {
                // What was just run shows that all launches are accepted; the recording itself runs nothing.
                self.device().synchronize()?;
                let device = Arc::clone(self.device());
                let graph = device.capture(|| self.pass(tokens, tokens, false))?;
                self.graphs.insert(tokens, graph);
            }
        }
        self.device().record(&self.arrived, Stream::Compute)
    }

    /// The staged token once more, by launches, whose numbers have no range: where a step in one kernel gave no answer. Its logits are on the host.
    fn by_launches(&mut self) -> Result<(), CudaError> {
        self.pass(1, 1, false)?;
        self.device().synchronize_stream(Stream::Compute)
    }

    fn run_slice(&mut self, slice: &[Token], sink: &mut dyn FnMut(usize, usize, &[f32])) -> Result<(), RunError> {
        let vocab = self.config.vocab;
        self.stage(slice)?;
        let wanted: Vec<u32> = (0..).zip(slice).filter(|(_, token)| token.wanted).map(|(row, _)| row).collect();
        let is_step = wanted.len() == slice.len() && slice.len() <= HEAD_TOKENS_MAX;
        if is_step {
            self.step(slice.len())?;
        } else {
            let first = &wanted[..wanted.len().min(HEAD_TOKENS_MAX)];
            if !first.is_empty() {
                self.scratch.rows.write(0, first)?;
            }
            self.pass(slice.len(), first.len(), true)?;
        }
        let mut rows = &wanted[..];
        while !rows.is_empty() {
            let (now, later) = rows.split_at(rows.len().min(HEAD_TOKENS_MAX));
            match is_step {
                true => self.arrived.wait_on_host()?,
                false => self.device().synchronize_stream(Stream::Compute)?,
            }
            if self.step.is_some() && slice.len() == 1 && is_step && self.scratch.logits_host.floats(1)[0].is_nan() {
                self.by_launches()?;
            }
            let logits = self.scratch.logits_host.floats(now.len() * vocab);
            for (&row, logits) in now.iter().zip(logits.chunks_exact(vocab)) {
                let token = &slice[row as usize];
                sink(token.sequence, token.index, logits);
            }
            rows = later;
            if !rows.is_empty() {
                self.more_logits(&rows[..rows.len().min(HEAD_TOKENS_MAX)])?;
            }
        }
        if !is_step {
            self.device().synchronize_stream(Stream::Compute)?;
        }
        Ok(())
    }

    /// Logits of more rows of the slice that was just run, whose stream already holds the last layer's output.
    fn more_logits(&mut self, rows: &[u32]) -> Result<(), CudaError> {
        self.scratch.rows.write(0, rows)?;
        let kernels = Arc::clone(&self.kernels);
        let mut queue = Queue::new(&kernels);
        self.head(&mut queue, rows.len(), true)?;
        self.copy_logits(rows.len())
    }
}

/// What a step of one token needs to know of the model.
fn step_model<'a>(
    config: &Config,
    groups: &'a Groups,
    norms: &'a [Norms],
    final_norm: &'a Buffer,
    residency: &'a dyn Residency,
) -> StepModel<'a> {
    let matrix = |index: usize| {
        let group = &groups.all[index];
        StepMatrix { form: residency.form(index), scale: &group.scale, bias: group.bias.as_ref() }
    };
    let layer = |(layer, norms): (usize, &'a Norms)| StepLayer {
        matrices: [Kind::Qkv, Kind::O, Kind::GateUp, Kind::Down].map(|kind| matrix(groups.index(layer, kind))),
        input_norm: &norms.input,
        post_norm: &norms.post,
        head_norms: norms.heads.as_ref().map(|[q, k]| [q, k]),
        window: config.windows[layer],
    };
    let first_rows = |kind| groups.all[groups.index(0, kind)].first_rows.as_slice();
    let (qkv, gate_up) = (first_rows(Kind::Qkv), first_rows(Kind::GateUp));
    StepModel {
        layers: norms.iter().enumerate().map(layer).collect(),
        head: matrix(groups.index(0, Kind::Head)),
        final_norm,
        eps: config.rms_eps,
        heads: Heads { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim, k_row: qkv[1], v_row: qkv[2] },
        hidden: config.hidden,
        intermediate: config.ffn,
        up_row: gate_up[1],
        vocab: config.vocab,
    }
}

/// Bytes of the sums of a group's products.
fn sums_bytes(group: &super::groups::Group) -> usize {
    let tokens: usize = if group.kind == Kind::Head { HEAD_TOKENS_MAX } else { SLICE_TOKENS_MAX };
    // The largest batch of a product.
    tokens.next_multiple_of(32) * group.n() * 8
}

impl Scratch {
    fn new(kernels: &Kernels, config: &Config, groups: &Groups, residency: &dyn Residency) -> Result<Self, CudaError> {
        let device = kernels.device();
        let t = SLICE_TOKENS_MAX;
        let input_bytes = InputParts::new(config, t).bytes;
        let (mut cols, mut coded) = (0, 0);
        let mut sums = [0; 2];
        for (index, group) in groups.all.iter().enumerate() {
            let form = residency.form(index);
            cols = cols.max(form.geometry().padded_cols());
            if matches!(form, Form::Quad(_)) && group.kind != Kind::Head {
                coded = coded.max(nibble_bytes(form.geometry()));
            }
            let turn = usize::from(matches!(group.kind, Kind::O | Kind::Down));
            sums[turn] = sums[turn].max(sums_bytes(group));
        }
        let room = |bytes| device.allocate(bytes, "activations");
        let queries = config.heads * config.head_dim;
        Ok(Self {
            input: room(input_bytes)?,
            staging: device.pin(input_bytes)?,
            activations: [Activations::new(device, t, cols)?, Activations::new(device, t, cols)?],
            sums: [room(sums[0])?, room(sums[1])?],
            q: room(t * queries * 4)?,
            mixed: Mixed::new(device, t, config.heads, config.head_dim)?,
            rows: room(HEAD_TOKENS_MAX * 4)?,
            logits: device.allocate(HEAD_TOKENS_MAX * config.vocab * 4, "logits")?,
            logits_host: device.pin(HEAD_TOKENS_MAX * config.vocab * 4)?,
            decoded: (coded > 0).then(|| device.allocate(coded, "a decoded group")).transpose()?,
        })
    }
}

/// Writes arrays of bytes one behind the other.
fn put<const N: usize>(out: &mut [u8], values: impl Iterator<Item = [u8; N]>) {
    for (value, out) in values.zip(out.chunks_exact_mut(N)) {
        out.copy_from_slice(&value);
    }
}

impl Runner for CudaRunner {
    fn config(&self) -> &Config {
        &self.config
    }

    fn new_kv(&self, capacity: usize) -> Result<KvCache, RunError> {
        let c = &self.config;
        let bytes = [c.layers, c.kv_heads, c.head_dim, capacity, 2].iter().try_fold(1usize, |product, &n| product.checked_mul(n));
        let Some(bytes) = bytes.filter(|_| u32::try_from(capacity).is_ok()) else {
            return Err(RunError::KvTooLarge { capacity, bytes: u64::MAX });
        };
        let half = || self.device().allocate(bytes, "a KV cache");
        Ok(KvCache::on_device(Box::new(CudaKv { keys: half()?, values: half()? }), capacity))
    }

    fn forward_batch(&mut self, batch: &mut [Continuation<'_>], sink: &mut dyn FnMut(usize, usize, &[f32])) -> Result<(), RunError> {
        for sequence in batch.iter_mut() {
            sequence.check(self.config.vocab)?;
            sequence.kv.device::<CudaKv>()?;
        }
        // Slices of tokens of consecutive sequences; a slice may end inside a sequence.
        let mut slice: Vec<Token> = Vec::new();
        for (sequence, continuation) in batch.iter_mut().enumerate() {
            let (tokens, want) = (continuation.tokens, continuation.want);
            let next = next_place(continuation.kv)?;
            for (index, &id) in tokens.iter().enumerate() {
                let wanted = want == LogitsOf::All || (want == LogitsOf::Last && index + 1 == tokens.len());
                let place = Place { position: next.position + index as u32, ..next };
                slice.push(Token { sequence, index, id, place, wanted });
                if slice.len() == SLICE_TOKENS_MAX {
                    self.run_slice(&slice, sink)?;
                    slice.clear();
                }
            }
        }
        if !slice.is_empty() {
            self.run_slice(&slice, sink)?;
        }
        for sequence in batch.iter_mut() {
            sequence.kv.advance(sequence.tokens.len());
        }
        Ok(())
    }

    fn greatest(&mut self, kv: &mut KvCache, token: u32) -> Result<Option<u32>, RunError> {
        let Some(step) = self.step.clone() else { return greatest_of_row(self, kv, token) };
        let sequence = Continuation { kv, tokens: &[token], want: LogitsOf::Last };
        sequence.check(self.config.vocab)?;
        let place = next_place(sequence.kv)?;
        self.stage(&[Token { sequence: 0, index: 0, id: token, place, wanted: true }])?;
        self.one_kernel(&step, false)?;
        let greatest = step.greatest(&self.arrived)?;
        if greatest.is_none() {
            return greatest_of_row(self, sequence.kv, token); // of logits, where no answer ends in launches
        }
        sequence.kv.advance(1);
        Ok(greatest)
    }

    fn report(&self) -> ResidencyReport {
        let held = self.residency.held();
        let mut report = self.report.clone();
        let host = if held.host_bytes > 0 { format!(", {} bytes pinned on the host", held.host_bytes) } else { String::new() };
        let step = if self.step.is_some() { ", a step is one kernel" } else { "" };
        report.detail = format!("{}{}{step}{host}", self.report.detail, held.detail);
        report.resident_bytes = held.coded_bytes + held.decoded_bytes + held.buffer_bytes + self.groups.scale_bytes() + self.vector_bytes;
        report.timeline = self.residency.timeline().unwrap_or_default();
        (report.hits, report.misses) = (held.hits, held.misses);
        (report.hit_bytes, report.miss_bytes) = (held.hit_bytes, held.miss_bytes);
        report
    }
}
