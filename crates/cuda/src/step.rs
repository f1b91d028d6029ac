//! A whole step of one token in one kernel (`kernels/step.cu`), for models whose matrices are all decoded and stay where they are.

use std::sync::Arc;

use crate::abi;
use crate::driver::{Buffer, Device, Shape, Stream};
use crate::kernels::{Heads, Kernels, Queue};
use crate::layout::{STEP_HIDDEN_MAX, STEP_RING, STEP_WARPS, SUPERSTEP_COLS, TILE_ROWS};
use crate::matrix::Form;
use crate::{CudaError, Mixed};

/// Matrices of a layer: q, k and v; o; gate and up; down.
const PRODUCTS: usize = 4;
/// Warps of a crew of attention, as `ATTENTION_WARPS` in transformer.cuh.
const ATTENTION_WARPS: usize = 8;

/// A matrix of a step.
#[derive(Clone, Copy, Debug)]
pub struct StepMatrix<'a> {
    /// Its form.
    pub form: Form<'a>,
    /// Scales of the rows, (padded rows).
    pub scale: &'a Buffer,
    /// Biases of the rows, likewise.
    pub bias: Option<&'a Buffer>,
}

/// A layer of a step.
#[derive(Clone, Copy, Debug)]
pub struct StepLayer<'a> {
    /// q, k and v; o; gate and up; down.
    pub matrices: [StepMatrix<'a>; PRODUCTS],
    /// Weight of the norm before attention, (hidden).
    pub input_norm: &'a Buffer,
    /// Weight of the norm behind it.
    pub post_norm: &'a Buffer,
    /// Norms of the heads of q and k, (head_dim) each.
    pub head_norms: Option<[&'a Buffer; 2]>,
    /// Positions that a token sees, its own included.
    pub window: Option<usize>,
}

/// A model, as a step needs it.
#[derive(Clone, Debug)]
pub struct StepModel<'a> {
    /// Layers in order.
    pub layers: Vec<StepLayer<'a>>,
    /// The head.
    pub head: StepMatrix<'a>,
    /// Weight of the norm before the head, (hidden).
    pub final_norm: &'a Buffer,
    /// Epsilon of all norms.
    pub eps: f32,
    /// Shapes of attention.
    pub heads: Heads,
    /// Columns of q.
    pub hidden: usize,
    /// Columns of down.
    pub intermediate: usize,
    /// First row of up in gate and up.
    pub up_row: usize,
    /// Logits.
    pub vocab: usize,
}

/// Where a step finds its token: embedding, angles ([`AttentionAt::turn`](crate::AttentionAt::turn)) and [`Place`](crate::Place), at bytes of a buffer;
/// and where it leaves the logits.
#[derive(Clone, Copy, Debug)]
pub struct StepInput<'a> {
    /// The buffer.
    pub input: &'a Buffer,
    /// Of the embedding, (hidden).
    pub x: usize,
    /// Of the angles.
    pub turn: usize,
    /// Of the place.
    pub place: usize,
    /// (vocab)
    pub logits: &'a Buffer,
}

/// What a step of a model needs besides its weights. The model's buffers must outlive its steps and stay where they are.
#[derive(Debug)]
pub struct Step {
    args: abi::Step,
    heads: Heads,
    shared_bytes: usize,
    /// Matrices and vectors of the layers, as the kernel reads them.
    _layers: Buffer,
    /// Residual streams, sums, what attention and silu leave.
    _work: Buffer,
    _mixed: Mixed,
    control: Buffer,
}

/// Places of parts of a buffer, in bytes.
#[derive(Default)]
struct Places(usize);

impl Places {
    fn place(&mut self, bytes: usize) -> u64 {
        let at = self.0;
        self.0 += bytes.next_multiple_of(256);
        at as u64
    }
}

impl Step {
    /// Prepares steps of a model; `None` where this kernel was not made for it: a matrix that is coded or has raw low bits, activations beyond a
    /// multiprocessor's shared memory, a residual stream of more than 8192 columns, heads that are too long.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(kernels: &Kernels, model: &StepModel<'_>) -> Result<Option<Self>, CudaError> {
        let matrices = || model.layers.iter().flat_map(|layer| &layer.matrices).chain([&model.head]);
        if matrices().any(|m| !matches!(m.form, Form::Plain(_)) || m.form.low_bits() > 0) {
            return Ok(None);
        }
        let Ok(kernel) = model.heads.kernel() else { return Ok(None) };
        let padded_hidden = model.head.form.geometry().padded_cols();
        let frag_bytes = matrices().map(|m| m.form.geometry().padded_cols()).max().unwrap_or(0);
        let shared_bytes = shared_bytes(64 << kernel, frag_bytes, PRODUCTS * model.layers.len() + 1);
        if shared_bytes > kernels.step[kernel].shared_bytes as usize || padded_hidden > STEP_HIDDEN_MAX {
            return Ok(None);
        }
        let device = kernels.device();
        let layers: Vec<u8> = model.layers.iter().flat_map(|layer| layer_bytes(&layer_args(layer))).collect();
        let layers = device.upload(&layers, "a model's layers")?;
        let rows = |index: usize| model.layers.iter().map(|layer| layer.matrices[index].form.geometry().padded_rows()).max().unwrap_or(0);
        let cols = |index: usize| model.layers.iter().map(|layer| layer.matrices[index].form.geometry().padded_cols()).max().unwrap_or(0);
        let mut places = Places::default();
        let sums =
            [rows(0), rows(1), rows(2), rows(3), model.head.form.geometry().padded_rows()].map(|n| places.place(n * size_of::<i64>()));
        let stream = [(); 2].map(|()| places.place(padded_hidden * size_of::<f32>()));
        let (mixed, active) = (places.place(cols(1) * size_of::<f32>()), places.place(cols(3) * size_of::<f32>()));
        let work = device.allocate(places.0, "a step's sums")?;
        // The sums begin at 0 and so does every step leave them; and what pads vectors is 0.
        work.fill_range(0, work.bytes(), 0, Stream::Compute)?;
        let room = Mixed::new(device, 1, model.heads.heads, model.heads.head_dim)?;
        let (parts, stats) = room.addresses();
        let control = device.allocate((1 + model.heads.heads + 2 * model.layers.len()) * size_of::<u32>(), "a step's barriers")?;
        let of_work = |at: u64| work.address() + at;
        let args = abi::Step {
            layers: layers.address(),
            head: product_args(&model.head),
            final_norm: model.final_norm.address(),
            x: 0,
            stream: stream.map(of_work),
            turn: 0,
            place: 0,
            sums: sums.map(of_work),
            parts,
            stats,
            mixed: of_work(mixed),
            active: of_work(active),
            control: control.address(),
            logits: 0,
            eps: model.eps,
            scale: 1.0 / (model.heads.head_dim as f32).sqrt(),
            layer_count: model.layers.len() as i32,
            hidden: model.hidden as i32,
            padded_hidden: padded_hidden as i32,
            intermediate: model.intermediate as i32,
            heads: model.heads.heads as i32,
            kv_heads: model.heads.kv_heads as i32,
            head_dim: model.heads.head_dim as i32,
            k_row: model.heads.k_row as i32,
            v_row: model.heads.v_row as i32,
            up_row: model.up_row as i32,
            vocab: model.vocab as i32,
            frag_bytes: frag_bytes as i32,
            unused: 0,
        };
        Ok(Some(Self { args, heads: model.heads, shared_bytes, _layers: layers, _work: work, _mixed: room, control }))
    }
}

impl Queue<'_> {
    /// A step of one token.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If a buffer has too little room.
    pub fn step(&mut self, step: &Step, at: &StepInput<'_>) -> Result<(), CudaError> {
        let mut args = step.args;
        let ends = [
            at.x + args.hidden as usize * size_of::<f32>(),
            at.turn + args.head_dim as usize * size_of::<f32>(),
            at.place + size_of::<crate::Place>(),
        ];
        assert!(ends.iter().all(|&end| end <= at.input.bytes()), "the token lies in its buffer");
        assert!(args.vocab as usize * size_of::<f32>() <= at.logits.bytes(), "room for the logits");
        let address = |offset: usize| at.input.address() + offset as u64;
        (args.x, args.turn, args.place, args.logits) = (address(at.x), address(at.turn), address(at.place), at.logits.address());
        step.control.fill_range(0, step.control.bytes(), 0, Stream::Compute)?;
        self.launch_step(step.heads.kernel()?, step.shared_bytes, args)
    }
}

/// Shape of the launch on a device.
pub(crate) fn shape(device: &Arc<Device>, shared_bytes: usize) -> Shape {
    Shape {
        grid: (device.properties().multiprocessors, 1),
        threads: STEP_WARPS as u32 * 32,
        shared_bytes: shared_bytes as u32,
        cluster: 1,
        programmatic: false,
        cooperative: true,
    }
}

/// Bytes of `AttendRoom` in transformer.cuh, for heads of `dim` numbers.
const fn attend_room_bytes(dim: usize) -> usize {
    (2 * ATTENTION_WARPS + ATTENTION_WARPS * dim + 8 + dim) * size_of::<f32>()
}

/// What `Room` in step.cu takes, for heads of at most `dim` numbers.
fn shared_bytes(dim: usize, frag_bytes: usize, products: usize) -> usize {
    let ring = STEP_WARPS * STEP_RING * SUPERSTEP_COLS * TILE_ROWS / 2;
    let parts = [
        ring,
        STEP_WARPS * STEP_RING * 8,
        2 * attend_room_bytes(dim),
        frag_bytes,
        frag_bytes / SUPERSTEP_COLS * 8,
        STEP_WARPS * TILE_ROWS * 8,
        STEP_HIDDEN_MAX / SUPERSTEP_COLS * 8,
        2 * size_of::<abi::StepLayer>(),
        products * 16,
    ];
    parts.iter().map(|bytes| bytes.next_multiple_of(128)).sum()
}

fn product_args(m: &StepMatrix<'_>) -> abi::StepProduct {
    let Form::Plain(plain) = m.form else { unreachable!("Step::new takes plain matrices only") };
    abi::StepProduct { matrix: plain.args(1), scale: m.scale.address(), bias: m.bias.map_or(0, Buffer::address) }
}

fn layer_args(layer: &StepLayer<'_>) -> abi::StepLayer {
    abi::StepLayer {
        products: [0, 1, 2, 3].map(|index| product_args(&layer.matrices[index])),
        input_norm: layer.input_norm.address(),
        post_norm: layer.post_norm.address(),
        q_norm: layer.head_norms.map_or(0, |norms| norms[0].address()),
        k_norm: layer.head_norms.map_or(0, |norms| norms[1].address()),
        window: layer.window.map_or(0, |w| w.min(i32::MAX as usize) as i32),
        unused: 0,
    }
}

/// The bytes of a layer's arguments, field by field.
fn layer_bytes(layer: &abi::StepLayer) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size_of::<abi::StepLayer>());
    for product in &layer.products {
        let m = &product.matrix;
        bytes.extend([m.nibbles, m.planes, m.far_off, m.far].iter().flat_map(|v| v.to_le_bytes()));
        bytes.extend([m.row_tiles, m.segs, m.tc, m.n, m.k, m.split].iter().flat_map(|v| v.to_le_bytes()));
        bytes.extend([product.scale, product.bias].iter().flat_map(|v| v.to_le_bytes()));
    }
    bytes.extend([layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm].iter().flat_map(|v| v.to_le_bytes()));
    bytes.extend([layer.window, layer.unused].iter().flat_map(|v| v.to_le_bytes()));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_as_long_as_its_structure() {
        let plain = abi::Plain { nibbles: 1, planes: 2, far_off: 3, far: 4, row_tiles: 5, segs: 6, tc: 7, n: 8, k: 9, split: 10 };
        let product = abi::StepProduct { matrix: plain, scale: 11, bias: 12 };
        let layer = abi::StepLayer { products: [product; 4], input_norm: 13, post_norm: 14, q_norm: 15, k_norm: 16, window: 17, unused: 0 };
        let bytes = layer_bytes(&layer);
        assert_eq!(bytes.len(), size_of::<abi::StepLayer>());
        assert_eq!(bytes[size_of::<abi::StepProduct>() - 8..][..8], 12u64.to_le_bytes());
    }

    #[test]
    fn a_large_model_fits_a_hopper() {
        // 70 B: 8192 columns, 28,672 in the middle, 80 layers, heads of 128; 227 KiB a block.
        assert!(shared_bytes(128, 28_672, 321) <= 227 * 1024);
    }
}
