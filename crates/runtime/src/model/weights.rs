//! The seam between the forward pass and the strategies.

use serde::{Deserialize, Serialize};
use tersor_cpu::{Level, Pool};
use thiserror::Error;

/// What a matrix does in the model. The order of the variants is the order of use in a forward pass.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum LinearKind {
    /// Token embedding, `(vocab, hidden)`. Read by row, never multiplied unless the head is tied to it.
    Embed,
    /// Query projection, `(heads * head_dim, hidden)`.
    Q,
    /// Key projection, `(kv_heads * head_dim, hidden)`.
    K,
    /// Value projection, `(kv_heads * head_dim, hidden)`.
    V,
    /// Attention output projection, `(hidden, heads * head_dim)`.
    O,
    /// Gate projection of the feed-forward block, `(ffn, hidden)`.
    Gate,
    /// Up projection of the feed-forward block, `(ffn, hidden)`.
    Up,
    /// Down projection of the feed-forward block, `(hidden, ffn)`.
    Down,
    /// Language-model head, `(vocab, hidden)`. Where the config ties it, the same tensor as [`LinearKind::Embed`].
    Head,
}

impl LinearKind {
    /// The matrices of one decoder layer, in the order in which the forward pass multiplies by them.
    pub const IN_LAYER: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];
}

/// Names one matrix of the model.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LinearId {
    /// Decoder layer, from 0. Always 0 for [`LinearKind::Embed`] and [`LinearKind::Head`].
    pub layer: u16,
    /// Which matrix.
    pub kind: LinearKind,
}

impl LinearId {
    /// The token embedding.
    pub const EMBED: Self = Self { layer: 0, kind: LinearKind::Embed };
    /// The language-model head.
    pub const HEAD: Self = Self { layer: 0, kind: LinearKind::Head };

    /// Matrix `kind` of decoder layer `layer`.
    #[must_use]
    pub const fn new(layer: u16, kind: LinearKind) -> Self {
        Self { layer, kind }
    }
}

/// A piece of a pass over the layers, on a device whose second stream fills layer buffers while the first computes.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Span {
    /// Number of the layer, among those that pass through the buffers.
    pub layer: usize,
    /// Computing with the layer, or filling a buffer with it: decoding, or copying from the host.
    pub computing: bool,
    /// Microseconds from the start of the pass.
    pub from_us: f64,
    /// Likewise.
    pub until_us: f64,
}

/// What a strategy holds in memory and what it has done so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ResidencyReport {
    /// Name of the strategy as the command line spells it, for example `prefetch`.
    pub strategy: String,
    /// One line for people: what was chosen and why. May be empty.
    pub detail: String,
    /// Bytes of weights in any form, with tables, scales and decode buffers. The KV cache is not included.
    pub resident_bytes: u64,
    /// Matrix uses that found the decoded form in memory.
    pub hits: u64,
    /// Matrix uses that had to decode first.
    pub misses: u64,
    /// Bytes of the decoded forms of all `hits`.
    pub hit_bytes: u64,
    /// Bytes of the decoded forms of all `misses`.
    pub miss_bytes: u64,
    /// Time spent decoding while the model was computing something else, in nanoseconds.
    pub decode_hidden_ns: u64,
    /// Time that the model waited for decoding, in nanoseconds.
    pub decode_exposed_ns: u64,
    /// The part of `linear_ns` that decoding inside of products took, in nanoseconds: an estimate from the rates of the machine
    /// profile; 0 without one.
    pub decode_fused_ns: u64,
    /// Time spent in products, in nanoseconds, without the waits in `decode_exposed_ns`.
    pub linear_ns: u64,
    /// What the layers of the last pass took, and the filling of their buffers; empty unless it was asked for (`Options::timeline`).
    pub timeline: Vec<Span>,
}

/// Why a forward pass stopped.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RunError {
    /// Coded bytes that no encoder wrote were met while decoding.
    #[error("tensor {tensor}: chunk {chunk} is corrupt: {cause}")]
    Corrupt {
        /// Name of the tensor in the model directory.
        tensor: String,
        /// Index of the chunk in the tensor.
        chunk: usize,
        /// What was wrong.
        cause: String,
    },
    /// The weights do not contain this matrix. Only a mistake in a strategy causes it: loading checks completeness.
    #[error("no weights for {id:?}")]
    NoWeights {
        /// The matrix asked for.
        id: LinearId,
    },
    /// A token id outside the vocabulary.
    #[error("token {token} is outside the vocabulary of {vocab} tokens")]
    TokenOutOfRange {
        /// The token id.
        token: u32,
        /// Number of tokens in the vocabulary.
        vocab: usize,
    },
    /// The KV cache has no room for the tokens.
    #[error("context is full: {needed} positions are needed, {capacity} are available")]
    ContextFull {
        /// Positions needed, counted from the start of the sequence.
        needed: usize,
        /// Positions that the KV cache holds.
        capacity: usize,
    },
    /// A forward pass over no tokens was asked for.
    #[error("no tokens to run")]
    NoTokens,
    /// The memory for a KV cache cannot be had.
    #[error("no memory for a KV cache of {capacity} positions ({bytes} bytes)")]
    KvTooLarge {
        /// Positions asked for.
        capacity: usize,
        /// Bytes needed.
        bytes: u64,
    },
    /// Logits that are NaN or infinite: the weights of the model are.
    #[error("logits at position {position} are not finite: the checkpoint holds NaN, infinite or absurdly large weights")]
    NotFinite {
        /// Position in the sequence.
        position: usize,
    },
    /// Coded bytes do not decode to what the tensor's header says.
    #[error("tensor {tensor}: {cause}")]
    Decode {
        /// Name of the tensor in the model directory.
        tensor: String,
        /// What was wrong.
        cause: String,
    },
    /// A KV cache was handed to a backend that cannot read it: one in host memory to a device, or the reverse. Only a mistake of the caller
    /// causes it: a cache is for the runner that made it.
    #[error("the KV cache was made by another backend")]
    ForeignKv,
    /// The device or its driver failed.
    #[error("device: {cause}")]
    Device {
        /// What it said, in one line.
        cause: String,
    },
    /// A helper thread of the strategy failed.
    #[error("decode worker failed: {cause}")]
    Worker {
        /// What it said.
        cause: String,
    },
}

/// Gives the forward pass its matrix products, in whatever form the weights are held.
///
/// Every implementation over the same coded weights gives the same bits for the same arguments, whatever the number of
/// threads, the SIMD level, and however many tokens share a call.
pub trait Weights: Send {
    /// Announces that the matrices of `layer` are used next. Called before a layer's first [`linear`](Self::linear), in
    /// ascending order within one forward pass. Before the head's it is called with the number of layers; a pass that
    /// wants no logits (all but the last slice of a prompt) ends after the last layer and starts again at layer 0.
    ///
    /// # Errors
    /// [`RunError`] if preparing the layer fails.
    fn enter_layer(&mut self, layer: usize) -> Result<(), RunError>;

    /// Multiplies: for each job, `out[t, r] = sum over c of weight[r, c] * x[t, c]`, without bias.
    ///
    /// `x` is `(tokens, cols)`; all jobs share it, so all their matrices have the same number of columns. Each `out` is
    /// `(tokens, rows)` of its matrix. Old contents of `out` are ignored.
    ///
    /// # Errors
    /// [`RunError`] if weights cannot be decoded.
    ///
    /// # Panics
    /// May panic if a slice has another length than stated.
    fn linear(&mut self, x: &[f32], tokens: usize, jobs: &mut [(LinearId, &mut [f32])]) -> Result<(), RunError>;

    /// Looks up embedding rows: `out[i, ..] = embedding[tokens[i], ..]`; `out` is `(tokens.len(), hidden)`.
    ///
    /// The caller has checked that every token is inside the vocabulary.
    ///
    /// # Errors
    /// [`RunError`] if weights cannot be decoded.
    fn embed(&mut self, tokens: &[u32], out: &mut [f32]) -> Result<(), RunError>;

    /// What is held in memory now, and the counts since construction.
    fn report(&self) -> ResidencyReport;

    /// The threads that the forward pass shares with the weights.
    fn pool(&self) -> &Pool;

    /// The SIMD level of all arithmetic.
    fn level(&self) -> Level;
}
