//! `dense`: an unquantized checkpoint run as it is, the reference that coded models are measured against.
//!
//! Weights stay in the memory map as the f32, bf16 or f16 that they are, and each row is widened to f32 when it is
//! multiplied. Activations are f32. Built for trust, not for speed: one short kernel in safe Rust.

use crate::model::config::Config;
use crate::model::weights::{LinearId, LinearKind, ResidencyReport, RunError, Weights};
use crate::model::{ModelError, names};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use tersor_cpu::{Level, Pool};
use tersor_format::{Dtype, ModelDir, RawTensor, Tensor};

/// Lanes of a sum: products `j, j + 16, ...` are added in lane `j`, then the lanes by halves. The same on every machine.
const LANES: usize = 16;

/// Rows that one task multiplies.
const TASK_ROWS: usize = 32;

/// The matrices of an unquantized model directory.
#[derive(Debug)]
pub struct Dense {
    pool: Arc<Pool>,
    level: Level,
    matrices: HashMap<LinearId, RawTensor>,
    tied: bool,
    bytes: u64,
    /// Products of each task, (rows of the task, tokens), kept between calls. A task locks its own; nobody waits.
    results: Vec<Mutex<Vec<f32>>>,
}

impl Dense {
    /// Takes the matrices of `dir`, which stay in its memory map.
    ///
    /// # Errors
    /// A matrix that is missing, of another shape than `config` says, entropy coded, or not of floats.
    pub fn new(dir: &ModelDir, config: &Config, pool: Arc<Pool>, level: Level) -> Result<Self, ModelError> {
        let mut matrices = HashMap::new();
        let mut bytes = 0;
        for linear in names::linears(config) {
            let tensor = dir
                .tensor(&linear.name)
                .ok_or_else(|| ModelError::TensorMissing { dir: dir.path().to_owned(), tensor: linear.name.clone() })?;
            let form = |found: String| ModelError::TensorForm {
                dir: dir.path().to_owned(),
                tensor: linear.name.clone(),
                expected: "F32, BF16 or F16",
                found,
            };
            let raw = match tensor {
                Tensor::Raw(raw) => raw,
                Tensor::Coded(_) => return Err(form("entropy coded".to_owned())),
                _ => return Err(form("of an unknown kind".to_owned())),
            };
            if !matches!(raw.dtype(), Dtype::F32 | Dtype::Bf16 | Dtype::F16) {
                return Err(form(raw.dtype().to_string()));
            }
            if raw.shape() != [linear.rows, linear.cols] {
                return Err(ModelError::TensorShape {
                    dir: dir.path().to_owned(),
                    tensor: linear.name,
                    expected: vec![linear.rows, linear.cols],
                    found: raw.shape().to_vec(),
                });
            }
            bytes += raw.bytes().len() as u64;
            matrices.insert(linear.id, raw.clone());
        }
        Ok(Self { pool, level, matrices, tied: config.tied, bytes, results: Vec::new() })
    }

    fn matrix(&self, id: LinearId) -> Result<&RawTensor, RunError> {
        let stored = if self.tied && id.kind == LinearKind::Head { LinearId::EMBED } else { id };
        self.matrices.get(&stored).ok_or(RunError::NoWeights { id })
    }
}

/// The rows of one matrix that one task multiplies.
struct Task<'a> {
    job: usize,
    matrix: &'a RawTensor,
    first: usize,
    rows: usize,
}

impl Weights for Dense {
    fn enter_layer(&mut self, _layer: usize) -> Result<(), RunError> {
        Ok(())
    }

    fn linear(&mut self, x: &[f32], tokens: usize, jobs: &mut [(LinearId, &mut [f32])]) -> Result<(), RunError> {
        let mut results = std::mem::take(&mut self.results);
        let mut tasks = Vec::new();
        for (job, (id, _)) in jobs.iter().enumerate() {
            let matrix = self.matrix(*id)?;
            let rows = matrix.shape()[0];
            let task = |first| Task { job, matrix, first, rows: TASK_ROWS.min(rows - first) };
            tasks.extend((0..rows).step_by(TASK_ROWS).map(task));
        }
        results.resize_with(results.len().max(tasks.len()), Mutex::default);
        self.pool.run(tasks.len(), &|i| {
            let mut out = results[i].lock().unwrap_or_else(PoisonError::into_inner);
            tasks[i].run(x, tokens, &mut out);
        });
        for (task, products) in tasks.iter().zip(&mut results) {
            let products = products.get_mut().unwrap_or_else(PoisonError::into_inner);
            let rows = task.matrix.shape()[0];
            for (row, products) in products.chunks_exact(tokens).enumerate() {
                for (token, product) in products.iter().enumerate() {
                    jobs[task.job].1[token * rows + task.first + row] = *product;
                }
            }
        }
        self.results = results;
        Ok(())
    }

    fn embed(&mut self, tokens: &[u32], out: &mut [f32]) -> Result<(), RunError> {
        let matrix = self.matrix(LinearId::EMBED)?;
        let cols = matrix.shape()[1];
        for (token, out) in tokens.iter().zip(out.chunks_exact_mut(cols)) {
            read(matrix, *token as usize * cols, out);
        }
        Ok(())
    }

    fn report(&self) -> ResidencyReport {
        ResidencyReport {
            strategy: "dense".to_owned(),
            detail: "unquantized, in the memory map".to_owned(),
            resident_bytes: self.bytes,
            ..ResidencyReport::default()
        }
    }

    fn pool(&self) -> &Pool {
        &self.pool
    }

    fn level(&self) -> Level {
        self.level
    }
}

impl Task<'_> {
    /// `x` is (tokens, cols), `out` becomes (rows, tokens).
    fn run(&self, x: &[f32], tokens: usize, out: &mut Vec<f32>) {
        let cols = self.matrix.shape()[1];
        let mut row = vec![0.0; cols];
        out.clear();
        for r in self.first..self.first + self.rows {
            read(self.matrix, r * cols, &mut row);
            out.extend(x.chunks_exact(cols).take(tokens).map(|x| dot(&row, x)));
        }
    }
}

fn read(matrix: &RawTensor, start: usize, out: &mut [f32]) {
    matrix.read_f32(start, out).expect("only float matrices are taken");
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let (a_whole, a_rest) = a.as_chunks::<LANES>();
    let (b_whole, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_whole.iter().zip(b_whole) {
        for lane in 0..LANES {
            lanes[lane] += a[lane] * b[lane];
        }
    }
    for (lane, (a, b)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lane += a * b;
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}
