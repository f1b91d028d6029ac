//! The seam between sessions and whoever computes: a model that can continue sequences.
//!
//! On a CPU the forward pass of [`Model`] asks a [`Weights`] for its products. On a device the whole pass runs there, with caches in the device's
//! memory. Callers see neither: they hold a [`Runner`].

use super::config::Config;
use super::kv::{KvCache, KvPrecision};
use super::llama::{Continuation, LogitsOf, Model};
use super::weights::{ResidencyReport, RunError, Weights};
use std::fmt;
use tersor_cpu::{Level, ops};

/// A model with its weights, ready to continue sequences.
///
/// Every strategy of one device gives the same bits for the same tokens, however they are sliced and whichever sequences share a call.
pub trait Runner: Send {
    /// The model's configuration.
    fn config(&self) -> &Config;

    /// An empty cache for `capacity` positions, where this runner computes.
    ///
    /// # Errors
    /// [`RunError::KvTooLarge`] if the memory cannot be had.
    fn new_kv(&self, capacity: usize) -> Result<KvCache, RunError>;

    /// Continues several sequences together, so that they share the reading and decoding of the weights.
    ///
    /// `sink` receives each wanted row of logits once: index of the sequence in the batch, index of the token among its new tokens, and the row
    /// (vocab,). Rows of one sequence come in order.
    ///
    /// All sequences are checked (see [`Continuation::check`]) before anything is computed. If an error comes later, a cache holds whole slices
    /// only and can be truncated and used again.
    ///
    /// # Errors
    /// No tokens, a token outside the vocabulary, a full cache or one of another backend, weights that cannot be decoded, a device that fails.
    fn forward_batch(&mut self, batch: &mut [Continuation<'_>], sink: &mut dyn FnMut(usize, usize, &[f32])) -> Result<(), RunError>;

    /// Continues one sequence by a token; returns the token of the greatest logit in the order of `f32::total_cmp`, the least of equals, or `None` if a
    /// logit is not finite. Devices need not bring all logits to the host for it.
    ///
    /// # Errors
    /// As [`forward_batch`](Self::forward_batch).
    fn greatest(&mut self, kv: &mut KvCache, token: u32) -> Result<Option<u32>, RunError> {
        greatest_of_row(self, kv, token)
    }

    /// What the strategy holds in memory now, and the counts since construction.
    fn report(&self) -> ResidencyReport;

    /// Continues one sequence by `tokens`. `logits` becomes what is wanted: nothing, (vocab,) of the last token, or (tokens, vocab).
    ///
    /// # Errors
    /// As [`forward_batch`](Self::forward_batch).
    fn forward(&mut self, kv: &mut KvCache, tokens: &[u32], want: LogitsOf, logits: &mut Vec<f32>) -> Result<(), RunError> {
        logits.clear();
        self.forward_batch(&mut [Continuation { kv, tokens, want }], &mut |_, _, row| logits.extend_from_slice(row))
    }
}

/// [`Runner::greatest`] by way of all logits.
pub(crate) fn greatest_of_row<R: Runner + ?Sized>(runner: &mut R, kv: &mut KvCache, token: u32) -> Result<Option<u32>, RunError> {
    let mut greatest = None;
    runner.forward_batch(&mut [Continuation { kv, tokens: &[token], want: LogitsOf::Last }], &mut |_, _, row| {
        greatest = ops::greatest_if_finite(Level::best(), row).map(|index| index as u32);
    })?;
    Ok(greatest)
}

/// The forward pass on the CPU, over weights in whatever form.
pub struct CpuRunner {
    model: Model,
    weights: Box<dyn Weights>,
    kv_precision: KvPrecision,
}

impl CpuRunner {
    /// `weights` are those of `model`; caches store keys and values in `kv_precision`.
    #[must_use]
    pub fn new(model: Model, weights: Box<dyn Weights>, kv_precision: KvPrecision) -> Self {
        Self { model, weights, kv_precision }
    }
}

impl fmt::Debug for CpuRunner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("CpuRunner");
        f.field("config", self.model.config()).field("kv_precision", &self.kv_precision).finish_non_exhaustive()
    }
}

impl Runner for CpuRunner {
    fn config(&self) -> &Config {
        self.model.config()
    }

    fn new_kv(&self, capacity: usize) -> Result<KvCache, RunError> {
        KvCache::new(self.model.config(), capacity, self.kv_precision)
    }

    fn forward_batch(&mut self, batch: &mut [Continuation<'_>], sink: &mut dyn FnMut(usize, usize, &[f32])) -> Result<(), RunError> {
        self.model.forward_batch(self.weights.as_mut(), batch, sink)
    }

    fn report(&self) -> ResidencyReport {
        self.weights.report()
    }
}
