//! A whole step of one token in one kernel (`kernels/step.cu`), for models whose matrices are all decoded and stay where they are.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::CudaError;
use crate::abi;
use crate::driver::{Buffer, Device, Event, Function, Pinned, Shape, Stream};
use crate::kernels::{Heads, Kernels, Queue};
use crate::layout::{
    ATTENTION_SPLITS, ATTENTION_WARPS, Geometry, LANES, STEP_HIDDEN_MAX, STEP_PACE, STEP_SLOT, STEP_WARPS, SUPERSTEP_COLS, TILE_ROWS,
};
use crate::matrix::Form;

/// Matrices of a layer: q, k and v; o; gate and up; down.
const PRODUCTS: usize = 4;
/// Fewest slots of a warp's ring that hide the memory's latency, and the most that are of use.
const SLOTS_MIN: usize = 3;
const SLOTS_MAX: usize = 6;
// The feeding warp sees an arrival late by at most STEP_PACE slots: no barrier's parity may have turned twice meanwhile.
const _: () = assert!(STEP_PACE < SLOTS_MIN);
/// What the arrivals at a sum add up to, in step.cu.
const COMPLETE: usize = 128;
/// Words of a step's input besides embedding and angles: the place, and gaps before the parts.
const INPUT_ROOM: usize = 256;
/// How often the host looks for an answer before it asks the driver whether the kernel has failed.
const LOOKS: usize = 10_000;

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

/// Where a step finds its token: the embedding, (hidden), from the start of the host's memory; behind it angles
/// ([`AttentionAt::turn`](crate::AttentionAt::turn)), at a multiple of 4 bytes, and [`Place`](crate::Place), at a multiple of 16. And where it leaves the logits.
#[derive(Clone, Copy, Debug)]
pub struct StepInput<'a> {
    /// What the step reads while it runs.
    pub input: &'a Pinned,
    /// Of the angles.
    pub turn: usize,
    /// Of the place, behind them.
    pub place: usize,
    /// (vocab)
    pub logits: &'a Buffer,
}

/// What a step of a model needs besides its weights. The model's buffers must outlive its steps and stay where they are.
#[derive(Debug)]
pub struct Step {
    args: abi::Step,
    function: Function,
    shared_bytes: usize,
    /// Matrices and vectors of the layers as the kernel reads them, how many warps add to their rows.
    _layers: Buffer,
    _arrivals: Buffer,
    /// Whether something did not fit; sums, the token's input, and what attention and silu leave: all of which a step finds cleared.
    cleared: Buffer,
    /// Words of the input.
    input_words: usize,
    /// The greatest logit's rank of each block, by the kernel; 0 before it is known.
    answers: Pinned,
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
    /// Prepares steps of a model; `None` where this kernel was not made for it: a GPU older than Hopper, a matrix that is coded or has raw low bits,
    /// activations beyond a multiprocessor's shared memory, a residual stream of more than 8192 columns, heads that are too long, layers that differ in shape.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(kernels: &Kernels, model: &StepModel<'_>) -> Result<Option<Self>, CudaError> {
        let matrices: Vec<&StepMatrix<'_>> = model.layers.iter().flat_map(|layer| &layer.matrices).chain([&model.head]).collect();
        if matrices.iter().any(|m| !matches!(m.form, Form::Plain(_)) || m.form.low_bits() > 0) {
            return Ok(None);
        }
        let (Some(functions), Ok(kernel)) = (&kernels.step, model.heads.kernel()) else { return Ok(None) };
        let function = functions[kernel];
        let padded_hidden = model.head.form.geometry().padded_cols();
        let frag_bytes = matrices.iter().map(|m| m.form.geometry().padded_cols()).max().unwrap_or(0);
        let device = kernels.device();
        let blocks = device.properties().multiprocessors as usize;
        let parts_max = parts_max(&model.layers, &model.head, blocks);
        let plan = plan(&model.layers, &model.head, blocks);
        let room = |slots| Room::new(slots, 64 << kernel, padded_hidden, frag_bytes, matrices.len(), parts_max, plan[PRODUCTS + 1]);
        let fit =
            (SLOTS_MIN..=SLOTS_MAX).rev().map(|slots| (slots, room(slots))).find(|(_, room)| room.bytes <= function.shared_bytes as usize);
        let (Some((slots, room)), true) = (fit, padded_hidden <= STEP_HIDDEN_MAX) else { return Ok(None) };
        // A warp's share is computed once for all layers.
        let geometry = |index: usize| matrices[index].form.geometry();
        if (0..matrices.len() - 1).any(|index| geometry(index) != geometry(index % PRODUCTS)) {
            return Ok(None);
        }
        // How many warps add to the rows of o and of down, whose columns are shared out; of the other matrices a block has rows of its own.
        let mut arrivals: Vec<u8> = Vec::new();
        let mut arrivals_at = [0; PRODUCTS];
        for index in (0..PRODUCTS).filter(|&index| adds(index) && !model.layers.is_empty()) {
            let counts = warps_of_rows(geometry(index), blocks);
            if counts.iter().any(|&warps| warps > COMPLETE) {
                return Ok(None);
            }
            arrivals_at[index] = arrivals.len() as u64;
            arrivals.extend(counts.iter().map(|&warps| (COMPLETE + 1 - warps) as u8));
        }
        let arrivals = device.upload(&arrivals, "a step's arrivals")?;
        let (layer_count, heads) = (model.layers.len(), model.heads.heads);
        let mut places = Places::default();
        let unfit = places.place(size_of::<u32>());
        let input_words = model.hidden + model.heads.head_dim + INPUT_ROOM;
        let input = places.place(input_words * size_of::<u32>());
        let sums: Vec<u64> = matrices
            .iter()
            .enumerate()
            .map(|(index, m)| match index + 1 < matrices.len() && adds(index % PRODUCTS) {
                true => places.place(m.form.geometry().padded_rows() * size_of::<i64>()),
                false => 0,
            })
            .collect();
        let crews = heads * ATTENTION_SPLITS;
        let mut long_words = |count: usize| places.place(count * size_of::<u64>());
        let (parts, stats) = (long_words(crews * model.heads.head_dim), long_words(layer_count * crews));
        let mut words = |per_layer: usize| places.place(layer_count * per_layer * size_of::<u32>());
        let rows_of_qkv = model.layers.first().map_or(0, |_| geometry(0).padded_rows());
        let (qkv, mixed, active) = (words(rows_of_qkv), words(heads * model.heads.head_dim), words(model.intermediate));
        let cleared = device.allocate(places.0, "a step's sums")?;
        let answers = device.pin(blocks * size_of::<u64>())?;

        let product = |index: usize| {
            let m = matrices[index];
            let Form::Plain(plain) = m.form else { unreachable!("checked above") };
            abi::StepProduct {
                matrix: plain.args(1),
                scale: m.scale.address(),
                bias: m.bias.map_or(0, Buffer::address),
                sums: cleared.address() + sums[index],
                arrivals: arrivals.address() + arrivals_at[index % PRODUCTS],
            }
        };
        let layers: Vec<u8> = (0..layer_count)
            .flat_map(|layer| {
                let of = &model.layers[layer];
                layer_bytes(&abi::StepLayer {
                    products: std::array::from_fn(|index| product(layer * PRODUCTS + index)),
                    input_norm: of.input_norm.address(),
                    post_norm: of.post_norm.address(),
                    q_norm: of.head_norms.map_or(0, |norms| norms[0].address()),
                    k_norm: of.head_norms.map_or(0, |norms| norms[1].address()),
                    window: of.window.map_or(0, |w| w.min(i32::MAX as usize) as i32),
                    unused: 0,
                })
            })
            .collect();
        let layers = device.upload(&layers, "a model's layers")?;
        let args = abi::Step {
            layers: layers.address(),
            head: product(matrices.len() - 1),
            final_norm: model.final_norm.address(),
            given: 0,
            input: cleared.address() + input,
            parts: cleared.address() + parts,
            stats: cleared.address() + stats,
            qkv: cleared.address() + qkv,
            mixed: cleared.address() + mixed,
            active: cleared.address() + active,
            logits: 0,
            unfit: cleared.address() + unfit,
            answers: answers.device_address(),
            eps: model.eps,
            scale: 1.0 / (model.heads.head_dim as f32).sqrt(),
            layer_count: layer_count as i32,
            hidden: model.hidden as i32,
            padded_hidden: padded_hidden as i32,
            intermediate: model.intermediate as i32,
            heads: heads as i32,
            kv_heads: model.heads.kv_heads as i32,
            head_dim: model.heads.head_dim as i32,
            k_row: model.heads.k_row as i32,
            v_row: model.heads.v_row as i32,
            up_row: model.up_row as i32,
            vocab: model.vocab as i32,
            turn_at: 0,
            place_at: 0,
            slots: slots as i32,
            parts_max: parts_max as i32,
            per_dim: 1.0 / model.heads.head_dim as f32,
            per_column: 1.0 / model.hidden as f32,
            group: abi::Divisor::new((heads / model.heads.kv_heads) as u32),
            at: room.at,
            plan: plan.map(|words| words as i32),
        };
        let step = Self { args, function, shared_bytes: room.bytes, _layers: layers, _arrivals: arrivals, cleared, input_words, answers };
        step.clear()?;
        Ok(Some(step))
    }

    /// Waits for the token of the greatest logit, in the order of `f32::total_cmp`, the first of equals. `None` if a logit is not finite or activations left
    /// the range of the step's numbers: then all logits are NaN, and launches can tell. `done`: recorded behind the step.
    ///
    /// # Errors
    /// The kernel's.
    pub fn greatest(&self, done: &Event) -> Result<Option<u32>, CudaError> {
        let mut greatest = 0;
        for answer in self.answers.words() {
            greatest = greatest.max(self.answer(answer, done)?);
        }
        Ok((greatest != u64::MAX).then_some(!(greatest as u32)))
    }

    /// Waits for a block's answer.
    fn answer(&self, answer: &AtomicU64, done: &Event) -> Result<u64, CudaError> {
        loop {
            for _ in 0..LOOKS {
                match answer.load(Ordering::Acquire) {
                    0 => std::hint::spin_loop(),
                    rank => return Ok(rank),
                }
            }
            if done.passed()? && answer.load(Ordering::Acquire) == 0 {
                return Err(CudaError::Call { call: self.function.name, cause: "a block ended without an answer".into() });
            }
        }
    }

    /// Clears what a step leaves behind: before the next one, and best while the host looks at the logits of this one.
    ///
    /// # Errors
    /// The driver's.
    pub fn clear(&self) -> Result<(), CudaError> {
        self.cleared.fill_range(0, self.cleared.bytes(), 0, Stream::Compute)
    }
}

impl Queue<'_> {
    /// A step of one token. [`Step::clear`] must have followed the one before, and that one must have ended: its answer is forgotten.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If a buffer has too little room.
    pub fn step(&mut self, step: &Step, at: &StepInput<'_>) -> Result<(), CudaError> {
        let mut args = step.args;
        let (word, end) = (size_of::<f32>(), at.place + size_of::<crate::Place>());
        assert!(end <= at.input.bytes().len() && end <= step.input_words * word, "the token lies in its memory");
        assert!(at.turn >= args.hidden as usize * word && at.place >= at.turn + args.head_dim as usize * word, "in order");
        assert!(at.turn.is_multiple_of(word) && at.place.is_multiple_of(4 * word), "words, and fours of them");
        assert!(args.vocab as usize * word <= at.logits.bytes(), "room for the logits");
        (args.given, args.logits) = (at.input.device_address(), at.logits.address());
        (args.turn_at, args.place_at) = ((at.turn / word) as i32, (at.place / word) as i32);
        step.answers.words().iter().for_each(|answer| answer.store(0, Ordering::Release));
        self.launch_step(&step.function, step.shared_bytes, args)
    }
}

/// Shape of the launch on a device.
pub(crate) fn shape(device: &Arc<Device>, shared_bytes: usize) -> Shape {
    Shape {
        grid: (device.properties().multiprocessors, 1),
        threads: ((STEP_WARPS + 1) * LANES) as u32,
        shared_bytes: shared_bytes as u32,
        cluster: 1,
        programmatic: false,
        cooperative: true,
    }
}

/// Whether the columns of a layer's matrix are shared out, so that blocks add to one another's sums: those of o and down, whose input is of other blocks.
fn adds(index: usize) -> bool {
    matches!(index, 1 | 3)
}

/// How many warps add to the sums of each row tile, when `blocks` blocks of [`STEP_WARPS`] warps share the slots of a matrix (`share_out` in step.cu).
fn warps_of_rows(g: &Geometry, blocks: usize) -> Vec<usize> {
    let slots = g.supersteps().div_ceil(STEP_SLOT);
    let total = g.tiles() * slots;
    let mut counts = vec![0; g.row_tiles()];
    for block in 0..blocks {
        let (first, end) = (total * block / blocks, total * (block + 1) / blocks);
        for warp in 0..STEP_WARPS {
            let at = |part: usize| first + (end - first) * part / STEP_WARPS;
            let (at, end) = (at(warp), at(warp + 1));
            if at < end {
                for tile in at / slots..=(end - 1) / slots {
                    counts[tile % g.row_tiles()] += 1;
                }
            }
        }
    }
    counts
}

/// Most row tiles of a block, of a matrix of which it has whole rows: the `index`-th of a layer, or the head.
fn row_tiles_of_block(index: usize, row_tiles: usize, blocks: usize) -> usize {
    match index {
        // A row tile of gate comes with one of up.
        2 => 2 * row_tiles.div_ceil(2 * blocks),
        _ => row_tiles.div_ceil(blocks),
    }
}

/// Most parts of sums that a block's warps leave each other: a row tile more or a warp more each.
fn parts_max(layers: &[StepLayer<'_>], head: &StepMatrix<'_>, blocks: usize) -> usize {
    let of_block = |index: usize, m: &StepMatrix<'_>| row_tiles_of_block(index, m.form.geometry().row_tiles(), blocks);
    let of_layer = layers.first().map_or(0, |layer| of_block(0, &layer.matrices[0]).max(of_block(2, &layer.matrices[2])));
    of_layer.max(of_block(PRODUCTS, head)) + STEP_WARPS
}

/// Where the slots of each kind of product begin in the plan of a warp, and how many there are: those of the head, which are the last, end with them.
fn plan(layers: &[StepLayer<'_>], head: &StepMatrix<'_>, blocks: usize) -> [usize; PRODUCTS + 2] {
    let of_warp = |index: usize, m: &StepMatrix<'_>| {
        let g = m.form.geometry();
        let of_tile = g.supersteps().div_ceil(STEP_SLOT);
        let of_block = match adds(index) {
            true => (g.tiles() * of_tile).div_ceil(blocks),
            false => row_tiles_of_block(index, g.row_tiles(), blocks) * g.segs() * of_tile,
        };
        of_block.div_ceil(STEP_WARPS)
    };
    let mut begins = [0; PRODUCTS + 2];
    for index in 0..=PRODUCTS {
        let matrix = if index == PRODUCTS { Some(head) } else { layers.first().map(|layer| &layer.matrices[index]) };
        begins[index + 1] = begins[index] + matrix.map_or(0, |m| of_warp(index, m));
    }
    begins
}

/// Bytes of `AttendRoom` in transformer.cuh, for heads of `dim` numbers; step.cu asserts the same.
const fn attend_room_bytes(dim: usize) -> usize {
    (2 * ATTENTION_WARPS + ATTENTION_WARPS * dim + 8 + dim) * size_of::<f32>()
}

/// A block's shared memory: `Room` in step.cu.
struct Room {
    /// Where the parts begin whose size varies.
    at: abi::Places,
    bytes: usize,
}

impl Room {
    /// For heads of at most `dim` numbers.
    fn new(slots: usize, dim: usize, padded_hidden: usize, frag_bytes: usize, products: usize, parts_max: usize, planned: usize) -> Self {
        let fixed = [
            2 * attend_room_bytes(dim),
            STEP_WARPS * TILE_ROWS * 8,
            2 * (STEP_HIDDEN_MAX / TILE_ROWS),
            STEP_HIDDEN_MAX / SUPERSTEP_COLS * 8,
            2 * size_of::<abi::StepLayer>(),
            size_of::<abi::StepProduct>(),
            dim * size_of::<f32>(),
            (PRODUCTS + 1) * STEP_WARPS * 24,
            (PRODUCTS + 1) * 60,
            STEP_WARPS * 4,
        ];
        let mut bytes = 0;
        let mut place = |size: usize| {
            let at = bytes;
            bytes += size.next_multiple_of(128);
            at as i32
        };
        for size in fixed {
            place(size);
        }
        let slot = STEP_SLOT * SUPERSTEP_COLS * TILE_ROWS / 2;
        let at = abi::Places {
            ring: place(STEP_WARPS * slots * slot),
            bars: place(STEP_WARPS * slots * 8),
            x: place(padded_hidden * size_of::<f32>()),
            frag: place(frag_bytes),
            info: place(frag_bytes / SUPERSTEP_COLS * 8),
            parts: place(parts_max * TILE_ROWS * 8),
            warps: place(3 * parts_max * 4),
            nibbles: place(products * 8),
            plan: place(STEP_WARPS * planned * 4),
        };
        Self { at, bytes }
    }
}

/// The bytes of a layer's arguments, field by field.
fn layer_bytes(layer: &abi::StepLayer) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size_of::<abi::StepLayer>());
    for product in &layer.products {
        let m = &product.matrix;
        bytes.extend([m.nibbles, m.planes, m.far_off, m.far].iter().flat_map(|v| v.to_le_bytes()));
        bytes.extend([m.row_tiles, m.segs, m.tc, m.n, m.k, m.split].iter().flat_map(|v| v.to_le_bytes()));
        bytes.extend([product.scale, product.bias, product.sums, product.arrivals].iter().flat_map(|v| v.to_le_bytes()));
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
        let product = abi::StepProduct { matrix: plain, scale: 11, bias: 12, sums: 13, arrivals: 14 };
        let layer = abi::StepLayer { products: [product; 4], input_norm: 15, post_norm: 16, q_norm: 17, k_norm: 18, window: 19, unused: 0 };
        let bytes = layer_bytes(&layer);
        assert_eq!(bytes.len(), size_of::<abi::StepLayer>());
        assert_eq!(bytes[size_of::<abi::StepProduct>() - 8..][..8], 14u64.to_le_bytes());
    }

    #[test]
    fn row_tiles_of_block_by_hand() {
        // An 8 B-shaped model on 132 multiprocessors: 6,144 rows of q, k and v, 14,336 of gate and as many of up, 128,256 of the head.
        assert_eq!(
            [(0, 384), (2, 1792), (PRODUCTS, 8016)].map(|(index, row_tiles)| row_tiles_of_block(index, row_tiles, 132)),
            [3, 14, 61]
        );
    }

    #[test]
    fn a_large_model_fits_a_hopper() {
        // 70 B: 8192 columns, 28,672 in the middle, 80 layers, heads of 128, 220 slots of a warp; 227 KiB a block.
        assert!(Room::new(SLOTS_MIN, 128, 8192, 28_672, 321, 61 + STEP_WARPS, 220).bytes <= 227 * 1024);
    }

    #[test]
    fn warps_of_rows_by_hand() {
        // Two row tiles of one tile of 4 supersteps each: 4 slots for 16 warps of one block, so one for every fourth warp.
        let g = Geometry::new(32, 512).unwrap();
        assert_eq!(warps_of_rows(&g, 1), [2, 2]);
        // 64 supersteps a tile: a warp has 4 of the first tile or 4 of the second.
        let g = Geometry::with_supersteps_max(32, 4096, 32).unwrap();
        assert_eq!(warps_of_rows(&g, 1), [8, 8]);
        // Two column segments: each row tile is met twice.
        let g = Geometry::with_supersteps_max(16, 4096, 16).unwrap();
        assert_eq!((g.segs(), warps_of_rows(&g, 1)), (2, vec![16]));
        // A slot for every eighth warp of a large grid: more than arrivals can count.
        let g = Geometry::new(16, 1 << 16).unwrap();
        assert_eq!(warps_of_rows(&g, 132), [256]);
    }
}
