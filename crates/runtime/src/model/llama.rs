//! The forward pass.
//!
//! A decoder layer is, with `norm` an RMS norm:
//!
//! ```text
//! q, k, v = linear(norm(x))          + biases (Qwen2), norms on each head of q and k (Qwen3), rotation by position
//! x      += linear(attention(q, k, v))
//! x      += linear(silu(gate) * up)  where gate, up = linear(norm(x))
//! ```
//!
//! Every token's numbers depend on its own row and on the cached positions that it sees, never on which other tokens share
//! the call. So logits are the same to the bit however a prompt is sliced and however sequences are batched.

use super::config::Config;
use super::kv::{KvCache, LayerView};
use super::weights::{LinearId, LinearKind, RunError, Weights};
use super::{ModelError, names};
use serde_json::Value;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;
use tersor_cpu::{Level, ops};
use tersor_format::{ModelDir, Tensor};

/// Most tokens that pass through the layers together. Bounds the activations; large enough that decoding a matrix is
/// shared by many tokens.
pub const SLICE_TOKENS_MAX: usize = 256;

/// Most tokens whose logits are held at a time: vocabularies are large.
const HEAD_TOKENS_MAX: usize = 64;

/// Largest `generation_config.json` that is read.
const GENERATION_CONFIG_BYTES_MAX: u64 = 1 << 20;

/// For which tokens logits are computed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogitsOf {
    /// None: the tokens are context only.
    None,
    /// The last token given.
    Last,
    /// Every token given.
    All,
}

/// Tokens that continue one sequence, as a part of a batch.
#[derive(Debug)]
pub struct Continuation<'a> {
    /// The sequence so far; filled with the new positions.
    pub kv: &'a mut KvCache,
    /// The new tokens.
    pub tokens: &'a [u32],
    /// Which logits are wanted.
    pub want: LogitsOf,
}

impl Continuation<'_> {
    /// What every backend asks of a continuation before it computes anything.
    ///
    /// # Errors
    /// No tokens, a token that is none of the `vocab` ones, a cache without room for all of them.
    pub fn check(&self, vocab: usize) -> Result<(), RunError> {
        if self.tokens.is_empty() {
            return Err(RunError::NoTokens);
        }
        if let Some(&token) = self.tokens.iter().find(|&&token| token as usize >= vocab) {
            return Err(RunError::TokenOutOfRange { token, vocab });
        }
        let (needed, capacity) = (self.kv.len() + self.tokens.len(), self.kv.capacity());
        if needed > capacity { Err(RunError::ContextFull { needed, capacity }) } else { Ok(()) }
    }
}

/// A model less its matrices: configuration, norms and biases, and the buffers of a forward pass.
#[derive(Debug)]
pub struct Model {
    config: Config,
    layers: Vec<LayerVectors>,
    final_norm: Vec<f32>,
    /// Radians per position, (head_dim / 2,).
    frequencies: Vec<f64>,
    buffers: Buffers,
    /// What [`Model::forward`] returns.
    logits: Vec<f32>,
}

/// The vectors of one layer, in f32.
#[derive(Debug)]
pub(crate) struct LayerVectors {
    /// Before attention, (hidden,).
    pub input_norm: Vec<f32>,
    /// Before the feed-forward block, (hidden,).
    pub post_norm: Vec<f32>,
    /// q, k, v, o; empty where there is none.
    pub biases: [Vec<f32>; 4],
    /// q and k, (head_dim,) each.
    pub head_norms: Option<[Vec<f32>; 2]>,
}

/// Activations of one slice; `tokens` is the slice's.
#[derive(Debug, Default)]
struct Buffers {
    /// Residual stream, (tokens, hidden).
    x: Vec<f32>,
    /// Input of a matrix, (tokens, hidden).
    normed: Vec<f32>,
    /// (tokens, heads, head_dim)
    q: Vec<f32>,
    /// (tokens, kv_heads, head_dim)
    k: Vec<f32>,
    /// (tokens, kv_heads, head_dim)
    v: Vec<f32>,
    /// Output of attention, (tokens, heads, head_dim).
    mixed: Vec<f32>,
    /// (tokens, ffn)
    gate: Vec<f32>,
    /// (tokens, ffn)
    up: Vec<f32>,
    /// What a block adds to the residual stream, (tokens, hidden).
    delta: Vec<f32>,
    /// (tokens, head_dim / 2)
    cos: Vec<f32>,
    /// (tokens, head_dim / 2)
    sin: Vec<f32>,
    /// (wanted tokens, vocab)
    logits: Vec<f32>,
}

/// A run of tokens of one sequence inside a slice.
struct Piece {
    sequence: usize,
    /// Which of the sequence's new tokens.
    tokens: Range<usize>,
    /// Position of the first of them in the sequence.
    position: usize,
}

impl Model {
    /// Reads configuration, norms and biases, and checks that every matrix is there with the right shape.
    ///
    /// # Errors
    /// Whatever makes the directory unfit to run; see [`ModelError`].
    pub fn load(dir: &ModelDir) -> Result<Self, ModelError> {
        let generation = read_generation_config(dir.path())?;
        let config = Config::from_json(dir.path(), dir.config(), generation.as_ref())?;
        for linear in names::linears(&config) {
            super::find(dir, &linear.name, &[linear.rows, linear.cols])?;
        }
        let layers = (0..config.layers).map(|layer| LayerVectors::load(dir, &config, layer)).collect::<Result<_, _>>()?;
        let final_norm = vector(dir, names::FINAL_NORM, config.hidden)?;
        let frequencies = config.rope_frequencies();
        Ok(Self { config, layers, final_norm, frequencies, buffers: Buffers::default(), logits: Vec::new() })
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Norms and biases, layer by layer, for backends that keep their own.
    pub(crate) fn layers(&self) -> &[LayerVectors] {
        &self.layers
    }

    /// Weight of the norm before the head, (hidden,).
    pub(crate) fn final_norm(&self) -> &[f32] {
        &self.final_norm
    }

    /// Rotary frequencies, radians per position, (head_dim / 2,).
    pub(crate) fn frequencies(&self) -> &[f64] {
        &self.frequencies
    }

    /// Bytes of norms, biases and activation buffers for `tokens` tokens a pass: what the model itself adds to a memory
    /// budget.
    #[must_use]
    pub fn bytes(&self, tokens: usize) -> u64 {
        let c = &self.config;
        let tokens = tokens.min(SLICE_TOKENS_MAX);
        let (queries, keys) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let a_token = 3 * c.hidden + 2 * queries + 2 * keys + 2 * c.ffn + c.head_dim;
        let logits = tokens.min(HEAD_TOKENS_MAX) * c.vocab;
        let a_layer = |layer: &LayerVectors| {
            let biases = layer.biases.iter().map(Vec::len).sum::<usize>();
            2 * c.hidden + biases + layer.head_norms.as_ref().map_or(0, |_| 2 * c.head_dim)
        };
        let vectors = self.layers.iter().map(a_layer).sum::<usize>() + c.hidden;
        4 * (tokens * a_token + logits + vectors) as u64
    }

    /// Continues one sequence by `tokens` and returns logits: nothing, (vocab,) of the last token, or (tokens, vocab).
    ///
    /// All of `tokens` are checked before anything is computed. If an error comes later, the cache holds whole slices only
    /// and can be truncated and used again.
    ///
    /// # Errors
    /// No tokens, a token outside the vocabulary, a cache that is full or on a device, weights that cannot be decoded.
    pub fn forward(&mut self, weights: &mut dyn Weights, kv: &mut KvCache, tokens: &[u32], want: LogitsOf) -> Result<&[f32], RunError> {
        let mut logits = std::mem::take(&mut self.logits);
        logits.clear();
        let result = self.forward_batch(weights, &mut [Continuation { kv, tokens, want }], &mut |_, _, row| {
            logits.extend_from_slice(row);
        });
        self.logits = logits;
        result.map(|()| &self.logits[..])
    }

    /// Continues several sequences together, so that they share the reading and decoding of the weights.
    ///
    /// `sink` receives each wanted row of logits once: index of the sequence in the batch, index of the token among its new
    /// tokens, and the row (vocab,). Rows of one sequence come in order.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_batch(
        &mut self,
        weights: &mut dyn Weights,
        batch: &mut [Continuation<'_>],
        sink: &mut dyn FnMut(usize, usize, &[f32]),
    ) -> Result<(), RunError> {
        for sequence in batch.iter_mut() {
            sequence.check(self.config.vocab)?;
            sequence.kv.host()?;
        }
        let mut buffers = std::mem::take(&mut self.buffers);
        let result = slices(batch).into_iter().try_for_each(|slice| self.forward_slice(weights, batch, &slice, &mut buffers, sink));
        self.buffers = buffers;
        result
    }

    fn forward_slice(
        &self,
        weights: &mut dyn Weights,
        batch: &mut [Continuation<'_>],
        slice: &[Piece],
        b: &mut Buffers,
        sink: &mut dyn FnMut(usize, usize, &[f32]),
    ) -> Result<(), RunError> {
        let tokens: Vec<u32> = slice.iter().flat_map(|piece| &batch[piece.sequence].tokens[piece.tokens.clone()]).copied().collect();
        b.resize(&self.config, tokens.len());
        self.rotation(slice, &mut b.cos, &mut b.sin);
        weights.embed(&tokens, &mut b.x)?;
        for layer in 0..self.config.layers {
            weights.enter_layer(layer)?;
            self.attention(weights, batch, slice, layer, tokens.len(), b)?;
            self.feed_forward(weights, layer, tokens.len(), b)?;
        }
        for piece in slice {
            batch[piece.sequence].kv.advance(piece.tokens.len());
        }
        self.head(weights, batch, slice, b, sink)
    }

    /// Cosines and sines of every token's position, (tokens, head_dim / 2) each. Angles are computed in f64: at position
    /// 100,000 an angle in f32 is off by 0.004 rad.
    fn rotation(&self, slice: &[Piece], cos: &mut [f32], sin: &mut [f32]) {
        let half = self.frequencies.len();
        let positions = slice.iter().flat_map(|piece| (0..piece.tokens.len()).map(|i| piece.position + i));
        for ((position, cos), sin) in positions.zip(cos.chunks_exact_mut(half)).zip(sin.chunks_exact_mut(half)) {
            for ((frequency, cos), sin) in self.frequencies.iter().zip(cos).zip(sin) {
                let (s, c) = (position as f64 * frequency).sin_cos();
                (*cos, *sin) = (c as f32, s as f32);
            }
        }
    }

    fn attention(
        &self,
        weights: &mut dyn Weights,
        batch: &mut [Continuation<'_>],
        slice: &[Piece],
        layer: usize,
        tokens: usize,
        b: &mut Buffers,
    ) -> Result<(), RunError> {
        let c = &self.config;
        let vectors = &self.layers[layer];
        let level = weights.level();
        ops::rms_norm(level, &b.x, &vectors.input_norm, c.rms_eps, &mut b.normed);
        let mut jobs =
            [(id(layer, LinearKind::Q), &mut b.q[..]), (id(layer, LinearKind::K), &mut b.k[..]), (id(layer, LinearKind::V), &mut b.v[..])];
        weights.linear(&b.normed, tokens, &mut jobs)?;
        let [q_bias, k_bias, v_bias, o_bias] = &vectors.biases;
        for (x, bias) in [(&mut b.q, q_bias), (&mut b.k, k_bias), (&mut b.v, v_bias)] {
            add_bias(level, x, bias);
        }
        if let Some([q_norm, k_norm]) = &vectors.head_norms {
            ops::rms_norm_in_place(level, q_norm, c.rms_eps, &mut b.q);
            ops::rms_norm_in_place(level, k_norm, c.rms_eps, &mut b.k);
        }
        ops::rope(level, &mut b.q, tokens, c.heads, &b.cos, &b.sin);
        ops::rope(level, &mut b.k, tokens, c.kv_heads, &b.cos, &b.sin);
        let shape = ops::Attention {
            heads: c.heads,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            scale: 1.0 / (c.head_dim as f32).sqrt(),
            window: c.windows[layer],
        };
        let (q_row, k_row) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let mut first = 0;
        for piece in slice {
            let kv = batch[piece.sequence].kv.host()?;
            let rows = first..first + piece.tokens.len();
            first = rows.end;
            let (q, k) = (rows.start * q_row..rows.end * q_row, rows.start * k_row..rows.end * k_row);
            kv.store(layer, piece.position, &b.k[k.clone()], &b.v[k]);
            let out = &mut b.mixed[q.clone()];
            match kv.layer(layer) {
                LayerView::F16(view) => {
                    ops::attend(weights.pool(), level, shape, &b.q[q], rows.len(), piece.position, view, out);
                }
                LayerView::F32(view) => {
                    ops::attend(weights.pool(), level, shape, &b.q[q], rows.len(), piece.position, view, out);
                }
            }
        }
        weights.linear(&b.mixed, tokens, &mut [(id(layer, LinearKind::O), &mut b.delta[..])])?;
        add_bias(level, &mut b.delta, o_bias);
        ops::add(level, &mut b.x, &b.delta);
        Ok(())
    }

    fn feed_forward(&self, weights: &mut dyn Weights, layer: usize, tokens: usize, b: &mut Buffers) -> Result<(), RunError> {
        let level = weights.level();
        ops::rms_norm(level, &b.x, &self.layers[layer].post_norm, self.config.rms_eps, &mut b.normed);
        let mut jobs = [(id(layer, LinearKind::Gate), &mut b.gate[..]), (id(layer, LinearKind::Up), &mut b.up[..])];
        weights.linear(&b.normed, tokens, &mut jobs)?;
        ops::silu_mul(level, &mut b.gate, &b.up);
        weights.linear(&b.gate, tokens, &mut [(id(layer, LinearKind::Down), &mut b.delta[..])])?;
        ops::add(level, &mut b.x, &b.delta);
        Ok(())
    }

    fn head(
        &self,
        weights: &mut dyn Weights,
        batch: &[Continuation<'_>],
        slice: &[Piece],
        b: &mut Buffers,
        sink: &mut dyn FnMut(usize, usize, &[f32]),
    ) -> Result<(), RunError> {
        let Config { hidden, vocab, rms_eps, .. } = self.config;
        // (row of the slice, sequence, token)
        let mut wanted = Vec::new();
        let mut first = 0;
        for piece in slice {
            let sequence = &batch[piece.sequence];
            for token in piece.tokens.clone() {
                let last = token + 1 == sequence.tokens.len();
                if sequence.want == LogitsOf::All || (sequence.want == LogitsOf::Last && last) {
                    wanted.push((first + token - piece.tokens.start, piece.sequence, token));
                }
            }
            first += piece.tokens.len();
        }
        if wanted.is_empty() {
            return Ok(());
        }
        weights.enter_layer(self.config.layers)?;
        for part in wanted.chunks(HEAD_TOKENS_MAX) {
            b.normed.resize(part.len() * hidden, 0.0);
            for (&(row, ..), normed) in part.iter().zip(b.normed.chunks_exact_mut(hidden)) {
                ops::rms_norm(weights.level(), &b.x[row * hidden..][..hidden], &self.final_norm, rms_eps, normed);
            }
            b.logits.resize(part.len() * vocab, 0.0);
            weights.linear(&b.normed, part.len(), &mut [(LinearId::HEAD, &mut b.logits[..])])?;
            for (&(_, sequence, token), row) in part.iter().zip(b.logits.chunks_exact(vocab)) {
                sink(sequence, token, row);
            }
        }
        Ok(())
    }
}

impl LayerVectors {
    fn load(dir: &ModelDir, c: &Config, layer: usize) -> Result<Self, ModelError> {
        let read = |part: &str, len| vector(dir, &names::in_layer(layer, part), len);
        let (queries, keys) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let bias = |there: bool, part: &str, len| if there { read(part, len) } else { Ok(Vec::new()) };
        let head_norms = if c.qk_norm {
            Some([read("self_attn.q_norm.weight", c.head_dim)?, read("self_attn.k_norm.weight", c.head_dim)?])
        } else {
            None
        };
        Ok(Self {
            input_norm: read("input_layernorm.weight", c.hidden)?,
            post_norm: read("post_attention_layernorm.weight", c.hidden)?,
            biases: [
                bias(c.qkv_bias, "self_attn.q_proj.bias", queries)?,
                bias(c.qkv_bias, "self_attn.k_proj.bias", keys)?,
                bias(c.qkv_bias, "self_attn.v_proj.bias", keys)?,
                bias(c.o_bias, "self_attn.o_proj.bias", c.hidden)?,
            ],
            head_norms,
        })
    }
}

impl Buffers {
    fn resize(&mut self, c: &Config, tokens: usize) {
        let (queries, keys) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        for (buffer, row) in [
            (&mut self.x, c.hidden),
            (&mut self.normed, c.hidden),
            (&mut self.q, queries),
            (&mut self.k, keys),
            (&mut self.v, keys),
            (&mut self.mixed, queries),
            (&mut self.gate, c.ffn),
            (&mut self.up, c.ffn),
            (&mut self.delta, c.hidden),
            (&mut self.cos, c.head_dim / 2),
            (&mut self.sin, c.head_dim / 2),
        ] {
            buffer.resize(tokens * row, 0.0);
        }
    }
}

/// Cuts the new tokens of all sequences, one after the other, into slices of at most [`SLICE_TOKENS_MAX`].
fn slices(batch: &[Continuation<'_>]) -> Vec<Vec<Piece>> {
    let mut slices = Vec::new();
    let mut slice: Vec<Piece> = Vec::new();
    let mut room = SLICE_TOKENS_MAX;
    for (sequence, continuation) in batch.iter().enumerate() {
        let mut start = 0;
        while start < continuation.tokens.len() {
            let end = continuation.tokens.len().min(start + room);
            slice.push(Piece { sequence, tokens: start..end, position: continuation.kv.len() + start });
            room -= end - start;
            start = end;
            if room == 0 {
                slices.push(std::mem::take(&mut slice));
                room = SLICE_TOKENS_MAX;
            }
        }
    }
    if !slice.is_empty() {
        slices.push(slice);
    }
    slices
}

fn id(layer: usize, kind: LinearKind) -> LinearId {
    LinearId::new(u16::try_from(layer).expect("Config limits the number of layers"), kind)
}

fn add_bias(level: Level, x: &mut [f32], bias: &[f32]) {
    if !bias.is_empty() {
        ops::add(level, x, bias);
    }
}

/// A norm or bias, in f32.
fn vector(dir: &ModelDir, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
    let form = |found: String| super::wrong_form(dir, name, "F32, BF16 or F16, all finite,", found);
    let tensor = super::find(dir, name, &[len])?;
    let Tensor::Raw(raw) = tensor else { return Err(form("entropy coded".to_owned())) };
    let values = raw.to_f32().map_err(|_| form(raw.dtype().to_string()))?;
    match values.iter().position(|value| !value.is_finite()) {
        Some(at) => Err(form(format!("{} at index {at}", values[at]))),
        None => Ok(values),
    }
}

/// `generation_config.json`, if the directory has one.
fn read_generation_config(dir: &Path) -> Result<Option<Value>, ModelError> {
    let path = dir.join("generation_config.json");
    let failed = |cause: String| ModelError::File { file: path.clone(), cause };
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error.to_string())),
    };
    let mut bytes = Vec::new();
    file.take(GENERATION_CONFIG_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|error| failed(error.to_string()))?;
    if bytes.len() as u64 > GENERATION_CONFIG_BYTES_MAX {
        return Err(failed(format!("more than {GENERATION_CONFIG_BYTES_MAX} bytes")));
    }
    serde_json::from_slice(&bytes).map(Some).map_err(|error| failed(error.to_string()))
}
