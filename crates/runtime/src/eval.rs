//! Perplexity, and divergence from a reference model.

use crate::model::kv::KvCache;
use crate::model::llama::{LogitsOf, SLICE_TOKENS_MAX};
use crate::model::runner::Runner;
use crate::model::weights::RunError;
use std::sync::atomic::{AtomicBool, Ordering};
use tersor_cpu::ops;
use thiserror::Error;

/// Logits that are held at a time, in floats: 32 MiB.
const LOGITS_MAX: usize = 8 << 20;

/// How well a model predicts a text.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Tokens of the text that were read.
    pub tokens: usize,
    /// Tokens that were predicted: all but the first of every window.
    pub predicted: usize,
    /// Mean negative log-likelihood of a predicted token, in nats.
    pub nll: f64,
    /// `e^nll`.
    pub perplexity: f64,
    /// Difference from the reference, if there is one.
    pub divergence: Option<Divergence>,
}

/// How far the predictions of a model are from those of its reference.
#[derive(Clone, Debug, PartialEq)]
pub struct Divergence {
    /// Mean of KL(reference || model) over the predicted tokens, in nats.
    pub kl_mean: f64,
    /// 99th percentile of the same (nearest rank), in nats.
    pub kl_p99: f64,
    /// Fraction of the predicted tokens for which both find the same token most likely.
    pub top1_agreement: f64,
    /// Perplexity of the reference.
    pub reference_perplexity: f64,
}

/// Why an evaluation was not made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum EvalError {
    /// A window predicts nothing.
    #[error("a context of {context} tokens predicts nothing: at least 2 are needed")]
    ContextTooShort {
        /// Tokens of a window.
        context: usize,
    },
    /// The text predicts nothing.
    #[error("the text has {tokens} tokens: at least 2 are needed")]
    TextTooShort {
        /// Tokens of the text.
        tokens: usize,
    },
    /// The two models speak of different tokens.
    #[error("the model has a vocabulary of {subject} tokens, the reference of {reference}")]
    VocabularyDiffers {
        /// Tokens of the model.
        subject: usize,
        /// Tokens of the reference.
        reference: usize,
    },
    /// The stop flag was set.
    #[error("interrupted")]
    Interrupted,
    /// A forward pass failed.
    #[error(transparent)]
    Run(#[from] RunError),
}

/// Evaluates a model on a text, in non-overlapping windows of `context` tokens. Every window begins with an empty cache and
/// predicts its tokens from the second on; a rest of one token is left out.
///
/// With a reference both models run side by side over the same windows, and logits are dropped as soon as they are compared.
/// `progress` is told how many tokens have been read. Sums are in f64.
///
/// # Errors
/// See [`EvalError`].
pub fn evaluate(
    text: &[u32],
    context: usize,
    subject: &mut dyn Runner,
    reference: Option<&mut dyn Runner>,
    interrupt: &AtomicBool,
    progress: &mut dyn FnMut(usize),
) -> Result<Report, EvalError> {
    if context < 2 {
        return Err(EvalError::ContextTooShort { context });
    }
    if text.len() < 2 {
        return Err(EvalError::TextTooShort { tokens: text.len() });
    }
    let vocab = subject.config().vocab;
    if let Some(reference) = &reference {
        let found = reference.config().vocab;
        if found != vocab {
            return Err(EvalError::VocabularyDiffers { subject: vocab, reference: found });
        }
    }
    let piece = (LOGITS_MAX / vocab).clamp(1, SLICE_TOKENS_MAX);
    let positions = context.min(text.len());
    let mut subject = Side::new(subject, positions)?;
    let mut reference = reference.map(|runner| Side::new(runner, positions)).transpose()?;
    let mut sums = Sums::default();
    let mut read = 0;
    for window in text.chunks(context).filter(|window| window.len() > 1) {
        subject.cache.truncate(0);
        if let Some(reference) = &mut reference {
            reference.cache.truncate(0);
        }
        // The last token predicts nothing inside the window.
        let (inputs, targets) = (&window[..window.len() - 1], &window[1..]);
        for (inputs, targets) in inputs.chunks(piece).zip(targets.chunks(piece)) {
            if interrupt.load(Ordering::Relaxed) {
                return Err(EvalError::Interrupted);
            }
            let logits = subject.logits_of(inputs)?;
            let reference_logits = reference.as_mut().map(|side| side.logits_of(inputs)).transpose()?;
            for (i, (row, &target)) in logits.chunks_exact(vocab).zip(targets).enumerate() {
                let reference_row = reference_logits.map(|logits| &logits[i * vocab..(i + 1) * vocab]);
                sums.add(row, reference_row, target as usize)?;
            }
            progress(read + inputs.len());
            read += inputs.len();
        }
        read += 1;
    }
    Ok(sums.report(read))
}

/// One of the models that read the text.
struct Side<'a> {
    runner: &'a mut dyn Runner,
    cache: KvCache,
    /// (tokens, vocab) of the last call.
    logits: Vec<f32>,
}

impl<'a> Side<'a> {
    fn new(runner: &'a mut dyn Runner, positions: usize) -> Result<Self, RunError> {
        let cache = runner.new_kv(positions)?;
        Ok(Self { runner, cache, logits: Vec::new() })
    }

    /// Logits of all `inputs`, (tokens, vocab).
    fn logits_of(&mut self, inputs: &[u32]) -> Result<&[f32], RunError> {
        let position = self.cache.len();
        self.runner.forward(&mut self.cache, inputs, LogitsOf::All, &mut self.logits)?;
        match self.logits.iter().position(|logit| !logit.is_finite()) {
            Some(at) => Err(RunError::NotFinite { position: position + at / self.runner.config().vocab }),
            None => Ok(&self.logits),
        }
    }
}

#[derive(Default)]
struct Sums {
    nll: f64,
    reference_nll: f64,
    agreed: usize,
    predicted: usize,
    /// KL of every predicted token; empty without a reference.
    kl: Vec<f64>,
}

impl Sums {
    fn add(&mut self, row: &[f32], reference: Option<&[f32]>, target: usize) -> Result<(), RunError> {
        let out_of_range = || RunError::TokenOutOfRange { token: u32::try_from(target).unwrap_or(u32::MAX), vocab: row.len() };
        let logit = f64::from(*row.get(target).ok_or_else(out_of_range)?);
        let norm = log_sum_exp(row);
        self.nll += norm - logit;
        self.predicted += 1;
        let Some(reference) = reference else { return Ok(()) };
        let reference_norm = log_sum_exp(reference);
        self.reference_nll += reference_norm - f64::from(reference[target]);
        // Sum of p ln(p / q) with ln p = r - reference_norm and ln q = x - norm.
        let kl = reference.iter().zip(row).map(|(&r, &x)| {
            let ln_p = f64::from(r) - reference_norm;
            ln_p.exp() * (ln_p - (f64::from(x) - norm))
        });
        self.kl.push(kl.sum());
        self.agreed += usize::from(ops::argmax(row) == ops::argmax(reference));
        Ok(())
    }

    fn report(mut self, tokens: usize) -> Report {
        let predicted = self.predicted as f64;
        let nll = self.nll / predicted;
        let divergence = (!self.kl.is_empty()).then(|| {
            self.kl.sort_unstable_by(f64::total_cmp);
            let rank = (self.kl.len() * 99).div_ceil(100);
            Divergence {
                kl_mean: self.kl.iter().sum::<f64>() / predicted,
                kl_p99: self.kl[rank - 1],
                top1_agreement: self.agreed as f64 / predicted,
                reference_perplexity: (self.reference_nll / predicted).exp(),
            }
        });
        Report { tokens, predicted: self.predicted, nll, perplexity: nll.exp(), divergence }
    }
}

/// `ln sum e^x`, in f64.
pub(crate) fn log_sum_exp(row: &[f32]) -> f64 {
    let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&x| f64::from(x - top).exp()).sum();
    sum.ln() + f64::from(top)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_match_hand_computed_values() {
        // p = (1/2, 1/4, 1/4) and q = (1/4, 1/2, 1/4): KL = 1/2 ln 2 - 1/4 ln 2.
        let ln2 = std::f64::consts::LN_2;
        let p = [0.0, -ln2 as f32, -ln2 as f32].map(|x| x + 5.0);
        let q = [-ln2 as f32, 0.0, -ln2 as f32];
        let mut sums = Sums::default();
        sums.add(&q, Some(&p), 1).unwrap();
        sums.add(&p, Some(&p), 2).unwrap();
        let report = sums.report(3);
        assert!((report.nll - (ln2 + 2.0 * ln2) / 2.0).abs() < 1e-6, "{report:?}");
        let divergence = report.divergence.unwrap();
        assert!((divergence.kl_mean - ln2 / 8.0).abs() < 1e-6, "{divergence:?}");
        assert!((divergence.kl_p99 - ln2 / 4.0).abs() < 1e-6, "{divergence:?}");
        assert_eq!(divergence.top1_agreement, 0.5);
        assert!((divergence.reference_perplexity - 4.0).abs() < 1e-5, "{divergence:?}");
    }

    #[test]
    fn a_target_outside_the_vocabulary_is_an_error() {
        let result = Sums::default().add(&[0.0, 0.0], None, 2);
        assert!(matches!(result, Err(RunError::TokenOutOfRange { token: 2, vocab: 2 })), "{result:?}");
    }
}
