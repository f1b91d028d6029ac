//! The arithmetic that all strategies share: activations to int8, then `tersor_cpu::matmul` over whatever forms the matrices have.
//!
//! A strategy changes where the symbols of a matrix come from and nothing else, so its logits cannot differ from those of another.

use super::cost::{CostModel, MatrixCost};
use super::set::{Linear, Source};
use crate::model::llama::SLICE_TOKENS_MAX;
use crate::model::weights::RunError;
use std::sync::Mutex;
use std::time::Instant;
use tersor_cpu::{Activations, Decoded, Dense, Job, KernelError, KernelScales, Level, Matrix, Pool, dense_matmul, matmul, read_row};
use tersor_format::CodedTensor;

/// Threads, SIMD level and scratch of one strategy.
#[derive(Debug)]
pub(super) struct Engine {
    pub pool: Pool,
    pub level: Level,
    /// One for each activation segment that the matrices of a call differ in; nearly always one.
    activations: Vec<Activations>,
    /// Time in products, nanoseconds.
    pub linear_ns: u64,
    /// The part of it that decoding inside of fused products took, by the prices of the profile.
    pub decode_fused_ns: f64,
}

/// One matrix of a call, in the form it is held in.
pub(super) struct Operand<'a> {
    pub name: &'a str,
    pub form: Form<'a>,
    pub price: Price,
    /// (tokens, rows)
    pub out: &'a mut [f32],
}

/// Where the symbols come from.
#[derive(Clone, Copy)]
pub(super) enum Form<'a> {
    Coded(&'a CodedTensor, &'a KernelScales),
    Decoded(&'a Decoded, &'a KernelScales),
    Raw(Dense<'a>),
}

impl<'a> Form<'a> {
    /// The form of a matrix that is held as it is stored.
    pub fn stored(linear: &'a Linear) -> Self {
        match &linear.source {
            Source::Coded { tensor, scales } => Form::Coded(tensor, scales),
            Source::Raw(raw) => Form::Raw(raw.dense()),
        }
    }

    fn kernel(self) -> Option<(Matrix<'a>, &'a KernelScales)> {
        match self {
            Form::Coded(tensor, scales) => Some((Matrix::Coded(tensor), scales)),
            Form::Decoded(decoded, scales) => Some((Matrix::Decoded(decoded), scales)),
            Form::Raw(_) => None,
        }
    }
}

/// What a fused product is predicted to cost, split into decoding and multiplying; zeros where nothing is known or nothing decoded.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub(super) struct Price {
    /// Seconds of decoding, beyond the product with the decoded form.
    decode: f64,
    /// Seconds of the product with the decoded form for one token.
    first: f64,
    /// Seconds of each further token.
    more: f64,
}

impl Price {
    pub fn of_fused(model: &CostModel<'_>, cost: &MatrixCost) -> Self {
        let first = model.decoded(cost, 1);
        let decode = (model.fused(cost, 1) - first).max(0.0);
        let more = (model.fused(cost, SLICE_TOKENS_MAX) - model.fused(cost, 1)) / (SLICE_TOKENS_MAX - 1) as f64;
        Self { decode, first, more }
    }

    fn multiply(&self, tokens: usize) -> f64 {
        self.first + self.more * (tokens.max(1) - 1) as f64
    }
}

impl Engine {
    pub fn new(threads: usize, level: Level) -> Self {
        Self { pool: Pool::new(threads), level, activations: Vec::new(), linear_ns: 0, decode_fused_ns: 0.0 }
    }

    /// Multiplies `x`, (tokens, cols), by every operand.
    pub fn multiply(&mut self, x: &[f32], tokens: usize, operands: &mut [Operand<'_>]) -> Result<(), RunError> {
        let start = Instant::now();
        let decode: f64 = operands.iter().map(|operand| operand.price.decode).sum();
        let multiply: f64 = operands.iter().map(|operand| operand.price.multiply(tokens)).sum();
        let result = self.multiply_all(x, tokens, operands);
        let spent_ns = start.elapsed().as_nanos() as u64;
        self.linear_ns += spent_ns;
        if decode > 0.0 {
            self.decode_fused_ns += spent_ns as f64 * decode / (decode + multiply);
        }
        result
    }

    fn multiply_all(&mut self, x: &[f32], tokens: usize, operands: &mut [Operand<'_>]) -> Result<(), RunError> {
        for operand in operands.iter_mut() {
            if let Form::Raw(raw) = operand.form {
                dense_matmul(&self.pool, self.level, raw, x, tokens, operand.out);
            }
        }
        // Quantize the activations once for each segment length.
        let mut segments: Vec<usize> = Vec::with_capacity(1);
        for operand in operands.iter() {
            let Some((_, scales)) = operand.form.kernel() else { continue };
            if segments.contains(&scales.segment()) {
                continue;
            }
            if self.activations.len() == segments.len() {
                self.activations.push(Activations::default());
            }
            self.activations[segments.len()].requantize(self.level, x, tokens, scales.cols(), scales.segment());
            segments.push(scales.segment());
        }
        let activations = &self.activations;
        let mut names = Vec::with_capacity(operands.len());
        let mut jobs: Vec<Job<'_>> = Vec::with_capacity(operands.len());
        for operand in operands.iter_mut() {
            let Some((matrix, scales)) = operand.form.kernel() else { continue };
            let quantized = segments.iter().position(|&segment| segment == scales.segment());
            let x = &activations[quantized.expect("quantized for every segment above")];
            names.push(operand.name);
            jobs.push(Job { matrix, scales, x, out: &mut *operand.out });
        }
        if jobs.is_empty() {
            return Ok(());
        }
        matmul(&self.pool, self.level, &mut jobs).map_err(|error| corrupt(names[job_of(&error)], &error))
    }

    /// Rows of a matrix as weights: `out[i, ..] = matrix[tokens[i], ..]`.
    pub fn rows(&self, name: &str, form: Form<'_>, tokens: &[u32], out: &mut [f32]) -> Result<(), RunError> {
        if tokens.is_empty() {
            return Ok(());
        }
        let cols = out.len() / tokens.len();
        if let Form::Raw(raw) = form {
            for (&token, out) in tokens.iter().zip(out.chunks_exact_mut(cols)) {
                raw.read_row(self.level, token as usize, out);
            }
            return Ok(());
        }
        let (matrix, scales) = form.kernel().expect("raw matrices were handled above");
        // A row of a coded matrix costs the decoding of its chunk: worth a thread each.
        let rows: Vec<Mutex<&mut [f32]>> = out.chunks_exact_mut(cols).map(Mutex::new).collect();
        let failure: Mutex<Option<(usize, KernelError)>> = Mutex::new(None);
        self.pool.run(tokens.len(), &|task| {
            let mut row = rows[task].lock().unwrap_or_else(|e| e.into_inner());
            if let Err(error) = read_row(self.level, matrix, scales, tokens[task] as usize, &mut row) {
                let mut failure = failure.lock().unwrap_or_else(|e| e.into_inner());
                if failure.as_ref().is_none_or(|(first, _)| task < *first) {
                    *failure = Some((task, error));
                }
            }
        });
        match failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
            Some((_, error)) => Err(corrupt(name, &error)),
            None => Ok(()),
        }
    }
}

/// The kernel's error with the tensor's name.
pub(super) fn corrupt(name: &str, error: &KernelError) -> RunError {
    match error {
        KernelError::Corrupt { chunk, source, .. } => {
            RunError::Corrupt { tensor: name.to_owned(), chunk: *chunk, cause: source.to_string() }
        }
        other => RunError::Decode { tensor: name.to_owned(), cause: other.to_string() },
    }
}

/// Which job of a call an error is about.
fn job_of(error: &KernelError) -> usize {
    match error {
        KernelError::Corrupt { job, .. } | KernelError::Shape { job, .. } => *job,
        _ => 0,
    }
}
