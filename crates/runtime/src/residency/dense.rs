//! `dense`: an unquantized checkpoint run as it is, the reference that coded models are measured against.
//!
//! Weights stay in the memory map as the f32, bf16 or f16 that they are, and are widened to f32 when they are
//! multiplied. Activations are f32.

use crate::model::config::Config;
use crate::model::weights::{LinearId, LinearKind, ResidencyReport, RunError, Weights};
use crate::model::{self, ModelError, names};
use std::collections::HashMap;
use std::sync::Arc;
use tersor_cpu::{DenseType, Level, Pool, dense_matmul};
use tersor_format::{Dtype, ModelDir, RawTensor, Tensor};

/// The matrices of an unquantized model directory.
#[derive(Debug)]
pub struct Dense {
    pool: Arc<Pool>,
    level: Level,
    matrices: HashMap<LinearId, (DenseType, RawTensor)>,
    tied: bool,
    bytes: u64,
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
            let name = linear.name.as_str();
            let form = |found: String| model::wrong_form(dir, name, "F32, BF16 or F16", found);
            let Tensor::Raw(raw) = model::find(dir, name, &[linear.rows, linear.cols])? else {
                return Err(form("entropy coded".to_owned()));
            };
            let dtype = match raw.dtype() {
                Dtype::F32 => DenseType::F32,
                Dtype::Bf16 => DenseType::Bf16,
                Dtype::F16 => DenseType::F16,
                other => return Err(form(other.to_string())),
            };
            bytes += raw.bytes().len() as u64;
            matrices.insert(linear.id, (dtype, raw.clone()));
        }
        Ok(Self { pool, level, matrices, tied: config.tied, bytes })
    }

    fn matrix(&self, id: LinearId) -> Result<tersor_cpu::Dense<'_>, RunError> {
        let stored = if self.tied && id.kind == LinearKind::Head { LinearId::EMBED } else { id };
        let (dtype, raw) = self.matrices.get(&stored).ok_or(RunError::NoWeights { id })?;
        Ok(tersor_cpu::Dense::new(*dtype, raw.shape()[0], raw.shape()[1], raw.bytes()))
    }
}

impl Weights for Dense {
    fn enter_layer(&mut self, _layer: usize) -> Result<(), RunError> {
        Ok(())
    }

    fn linear(&mut self, x: &[f32], tokens: usize, jobs: &mut [(LinearId, &mut [f32])]) -> Result<(), RunError> {
        for (id, out) in jobs {
            dense_matmul(&self.pool, self.level, self.matrix(*id)?, x, tokens, out);
        }
        Ok(())
    }

    fn embed(&mut self, tokens: &[u32], out: &mut [f32]) -> Result<(), RunError> {
        let matrix = self.matrix(LinearId::EMBED)?;
        for (token, out) in tokens.iter().zip(out.chunks_exact_mut(matrix.cols())) {
            matrix.read_row(self.level, *token as usize, out);
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
