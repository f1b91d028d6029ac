//! Matrices whose form is settled while loading and never changes: what `fused`, `cached` and a mixture of both (`auto`) share.

use super::cost::CostModel;
use super::engine::{Engine, Form, Operand, Price, corrupt};
use super::set::{Index, Linear, RawMatrix, Source, TensorSet, verify};
use super::{OpenError, Options, Strategy};
use crate::model::weights::{LinearId, ResidencyReport, RunError, Weights};
use std::collections::HashMap;
use std::sync::Mutex;
use tersor_cpu::{Decoded, KernelScales, Level, Pool, decode_into};
use tersor_format::{CodedTensor, ModelDir};

/// A matrix in the form in which it stays.
#[derive(Debug)]
struct Held {
    name: String,
    form: HeldForm,
    price: Price,
    /// Bytes of this form, without scales.
    bytes: u64,
    /// Bytes of the decoded form, if the matrix is coded in the file.
    decoded_bytes: u64,
    scale_bytes: u64,
}

#[derive(Debug)]
enum HeldForm {
    Coded { tensor: CodedTensor, scales: KernelScales },
    Decoded { decoded: Decoded, scales: KernelScales },
    Raw(RawMatrix),
}

impl Held {
    fn form(&self) -> Form<'_> {
        match &self.form {
            HeldForm::Coded { tensor, scales } => Form::Coded(tensor, scales),
            HeldForm::Decoded { decoded, scales } => Form::Decoded(decoded, scales),
            HeldForm::Raw(raw) => Form::Raw(raw.dense()),
        }
    }
}

/// Weights in forms that do not change.
#[derive(Debug)]
pub(super) struct HeldWeights {
    strategy: Strategy,
    detail: String,
    matrices: Vec<Held>,
    index: Index,
    engine: Engine,
    /// Sums over calls, in bytes of the decoded form.
    hit_bytes: u64,
    miss_bytes: u64,
    hits: u64,
    misses: u64,
}

impl HeldWeights {
    /// Verifies every tensor and, in the same sweep, decodes the matrices marked in `decoded`; the coded bytes of each are released
    /// as soon as it is decoded, and a file of which nothing is needed any more is unmapped when `dir` is dropped.
    pub fn load(dir: &ModelDir, set: TensorSet, decoded: &[bool], strategy: Strategy, options: &Options) -> Result<Self, OpenError> {
        let engine = Engine::new(options.threads, options.level);
        let mut forms = decode_marked(dir, &set, decoded, &engine)?;
        let model = options.profile.as_ref().map(|profile| CostModel::new(profile, options.threads, set.working_set_bytes()));
        let index = set.index;
        let mut matrices = Vec::with_capacity(set.linears.len());
        for (slot, linear) in set.linears.into_iter().enumerate() {
            let decoded = forms[slot].take();
            matrices.push(hold(linear, decoded, model.as_ref()));
        }
        let detail = detail(&matrices);
        Ok(Self { strategy, detail, matrices, index, engine, hit_bytes: 0, miss_bytes: 0, hits: 0, misses: 0 })
    }
}

fn hold(linear: Linear, decoded: Option<Decoded>, model: Option<&CostModel<'_>>) -> Held {
    let (cost, mapped_bytes) = (linear.cost(), linear.mapped_bytes() + linear.table_bytes());
    let (decoded_bytes, scale_bytes) = (linear.decoded_bytes(), linear.scale_bytes());
    let mut price = Price::default();
    let (form, bytes) = match (linear.source, decoded) {
        (Source::Coded { scales, .. }, Some(decoded)) => {
            let bytes = decoded.capacity_bytes();
            (HeldForm::Decoded { decoded, scales }, bytes)
        }
        (Source::Coded { tensor, scales }, None) => {
            if let (Some(model), Some(cost)) = (model, cost) {
                price = Price::of_fused(model, &cost);
            }
            (HeldForm::Coded { tensor, scales }, mapped_bytes)
        }
        (Source::Raw(raw), _) => (HeldForm::Raw(raw), mapped_bytes),
    };
    Held { name: linear.name, form, price, bytes, decoded_bytes, scale_bytes }
}

/// The sweep over the file: one tensor a thread, so that a tensor is verified and decoded from the same cache. Tensors that
/// alone are worth more than half a thread's share are decoded afterwards, by all threads together.
fn decode_marked(dir: &ModelDir, set: &TensorSet, marked: &[bool], engine: &Engine) -> Result<Vec<Option<Decoded>>, OpenError> {
    let wanted = |slot: &usize| marked[*slot] && set.linears[*slot].coded().is_some();
    let symbols = |slot: usize| set.linears[slot].coded().map_or(0, |tensor| tensor.header().symbols());
    let total: u64 = (0..marked.len()).filter(wanted).map(symbols).sum();
    let large = |slot: usize| symbols(slot) > total / (2 * engine.pool.threads() as u64);
    let by_name: HashMap<&str, usize> = (0..marked.len()).filter(wanted).map(|slot| (set.linears[slot].name.as_str(), slot)).collect();
    let forms: Vec<Mutex<Option<Decoded>>> = marked.iter().map(|_| Mutex::new(None)).collect();
    let decode = |slot: usize, pool: Option<&Pool>| {
        let linear = &set.linears[slot];
        let Some(tensor) = linear.coded() else { return Ok(()) };
        let mut decoded = Decoded::default();
        decode_into(engine.level, tensor, &mut decoded, pool).map_err(|error| OpenError::Decode {
            file: dir.place(&linear.name).file.unwrap_or_default(),
            cause: corrupt(&linear.name, &error),
        })?;
        dir.release(&linear.name);
        *forms[slot].lock().unwrap_or_else(|e| e.into_inner()) = Some(decoded);
        Ok(())
    };
    verify(dir, &engine.pool, &|name| match by_name.get(name) {
        Some(&slot) if !large(slot) => decode(slot, None),
        _ => Ok(()),
    })?;
    for slot in (0..marked.len()).filter(wanted).filter(|&slot| large(slot)) {
        decode(slot, Some(&engine.pool))?;
    }
    Ok(forms.into_iter().map(|form| form.into_inner().unwrap_or_else(|e| e.into_inner())).collect())
}

fn detail(matrices: &[Held]) -> String {
    let count = |wanted: fn(&HeldForm) -> bool| matrices.iter().filter(|held| wanted(&held.form)).count();
    let coded = count(|form| matches!(form, HeldForm::Coded { .. }));
    let decoded = count(|form| matches!(form, HeldForm::Decoded { .. }));
    let raw = count(|form| matches!(form, HeldForm::Raw(_)));
    let parts = [(decoded, "held decoded"), (coded, "decoded inside each product"), (raw, "not coded")];
    let parts: Vec<String> = parts.into_iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} matrices {what}")).collect();
    parts.join(", ")
}

impl Weights for HeldWeights {
    fn enter_layer(&mut self, _layer: usize) -> Result<(), RunError> {
        Ok(())
    }

    fn linear(&mut self, x: &[f32], tokens: usize, jobs: &mut [(LinearId, &mut [f32])]) -> Result<(), RunError> {
        let mut operands = Vec::with_capacity(jobs.len());
        for (id, out) in jobs.iter_mut() {
            let held = self.index.of(*id).and_then(|slot| self.matrices.get(slot));
            let held = held.ok_or(RunError::NoWeights { id: *id })?;
            match held.form {
                HeldForm::Decoded { .. } => (self.hits, self.hit_bytes) = (self.hits + 1, self.hit_bytes + held.decoded_bytes),
                HeldForm::Coded { .. } => {
                    (self.misses, self.miss_bytes) = (self.misses + 1, self.miss_bytes + held.decoded_bytes);
                }
                HeldForm::Raw(_) => {}
            }
            operands.push(Operand { name: &held.name, form: held.form(), price: held.price, out });
        }
        self.engine.multiply(x, tokens, &mut operands)
    }

    fn embed(&mut self, tokens: &[u32], out: &mut [f32]) -> Result<(), RunError> {
        let held = &self.matrices[0];
        self.engine.rows(&held.name, held.form(), tokens, out)
    }

    fn report(&self) -> ResidencyReport {
        ResidencyReport {
            strategy: self.strategy.to_string(),
            detail: self.detail.clone(),
            resident_bytes: self.matrices.iter().map(|held| held.bytes + held.scale_bytes).sum(),
            hits: self.hits,
            misses: self.misses,
            hit_bytes: self.hit_bytes,
            miss_bytes: self.miss_bytes,
            decode_fused_ns: self.engine.decode_fused_ns as u64,
            linear_ns: self.engine.linear_ns,
            ..ResidencyReport::default()
        }
    }

    fn pool(&self) -> &Pool {
        &self.engine.pool
    }

    fn level(&self) -> Level {
        self.engine.level
    }
}
