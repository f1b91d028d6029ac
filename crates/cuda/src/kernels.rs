//! The kernels of a device and their launches: shapes, shared memory, order.

use std::path::Path;
use std::sync::Arc;

use crate::abi::{self, Place};
use crate::compile::{self, SOURCES};
use crate::driver::{Buffer, Device, Function, Module, Shape, Stream};
use crate::layout::{self, ATTENTION_SPLITS, ATTENTION_WARPS, LANES, SUPERSTEP_COLS};
use crate::matrix::{Form, PlainAt, QuadAt};
use crate::{CudaError, layout::Geometry, step};

/// Warps of a block of `quad`: its launch bound.
const QUAD_WARPS_MAX: usize = 28;
/// Warps of a block of `plain`.
const PLAIN_WARPS: usize = 4;
/// Warps on a multiprocessor that keep its memory busy in `plain`.
const PLAIN_WARPS_WANTED: usize = 16;
/// Fewest supersteps of a run of columns when tiles of `plain` are split.
const SPLIT_SUPERSTEPS_MIN: usize = 4;
/// Threads of the large kernels between products.
const OPS_THREADS: usize = 512;
/// Threads of `attention` and `attend`.
const ATTENTION_THREADS: usize = ATTENTION_WARPS * LANES;
/// Blocks of a cluster that take a token together in `prepare`, from compute capability 9.0 on: the largest that every GPU allows.
const CLUSTER: usize = 8;
/// Largest head that `attention` was made for.
pub const HEAD_DIM_MAX: usize = 256;

/// All kernels, loaded.
#[derive(Debug)]
pub struct Kernels {
    device: Arc<Device>,
    /// The kernels know clusters and programmatic launches: what `HOPPER` is to them.
    hopper: bool,
    _modules: [Module; 6],
    /// (low bits, batch of 1, 8, 16)
    quad: [[Function; 3]; 3],
    quad_store: Function,
    /// (low bits, batch of 1, 8, 16, 32)
    plain: [[Function; 4]; 3],
    pub(crate) rans_decode: Function,
    pub(crate) rans_pairs_decode: Function,
    prepare_norm: Function,
    prepare_copy: Function,
    prepare_silu: Function,
    prepare_mix: Function,
    rope: Function,
    attention: [Function; 3],
    attend: [Function; 3],
    logits: Function,
    read_all: Function,
    /// For heads of at most 64, 128 and 256 numbers, where `hopper`.
    pub(crate) step: Option<[Function; 3]>,
}

impl Kernels {
    /// Compiles and loads all kernels; machine code is kept in `cache`.
    ///
    /// # Errors
    /// Kernels that do not compile or load.
    pub fn load(device: &Arc<Device>, cache: Option<&Path>) -> Result<Self, CudaError> {
        // The compiler takes seconds for each file, on one core.
        let modules = std::thread::scope(|scope| {
            let workers = SOURCES.each_ref().map(|source| scope.spawn(move || compile::load(device, source, cache)));
            workers.map(|worker| {
                worker.join().unwrap_or(Err(CudaError::Call { call: "compiling", cause: "the compiler's thread panicked".into() }))
            })
        })
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
        let native = modules.iter().all(|(_, native)| *native);
        let modules: [Module; 6] =
            modules.into_iter().map(|(module, _)| module).collect::<Vec<_>>().try_into().expect("one for each source");
        Self::of(device, modules, native)
    }

    /// Loads the PTX that comes with the crate, as [`load`](Self::load) does where no compiler is found: the driver translates it.
    ///
    /// # Errors
    /// Kernels that do not load.
    pub fn load_ptx(device: &Arc<Device>) -> Result<Self, CudaError> {
        let modules = SOURCES.iter().map(|source| compile::load_ptx(device, source)).collect::<Result<Vec<_>, _>>()?;
        Self::of(device, modules.try_into().expect("one for each source"), false)
    }

    /// `native`: compiled for the GPU's own architecture.
    fn of(device: &Arc<Device>, modules: [Module; 6], native: bool) -> Result<Self, CudaError> {
        let [quad, plain, rans, rans_pairs, ops, step] = &modules;
        let hopper = native && device.properties().capability.0 >= 9;
        Ok(Self {
            quad: functions(
                quad,
                [
                    ["quad_r0_t1", "quad_r0_t8", "quad_r0_t16"],
                    ["quad_r1_t1", "quad_r1_t8", "quad_r1_t16"],
                    ["quad_r2_t1", "quad_r2_t8", "quad_r2_t16"],
                ],
            )?,
            quad_store: quad.function("quad_store")?,
            plain: functions(
                plain,
                [
                    ["plain_r0_t1", "plain_r0_t8", "plain_r0_t16", "plain_r0_t32"],
                    ["plain_r1_t1", "plain_r1_t8", "plain_r1_t16", "plain_r1_t32"],
                    ["plain_r2_t1", "plain_r2_t8", "plain_r2_t16", "plain_r2_t32"],
                ],
            )?,
            rans_decode: rans.function("rans_decode")?,
            rans_pairs_decode: rans_pairs.function("rans_pairs_decode")?,
            prepare_norm: ops.function("prepare_norm")?,
            prepare_copy: ops.function("prepare_copy")?,
            prepare_silu: ops.function("prepare_silu")?,
            prepare_mix: ops.function("prepare_mix")?,
            rope: ops.function("rope")?,
            attention: [ops.function("attention_64")?, ops.function("attention_128")?, ops.function("attention_256")?],
            attend: [ops.function("attend_64")?, ops.function("attend_128")?, ops.function("attend_256")?],
            logits: ops.function("logits")?,
            read_all: ops.function("read_all")?,
            step: match hopper {
                true => Some([step.function("step_64")?, step.function("step_128")?, step.function("step_256")?]),
                false => None,
            },
            device: Arc::clone(device),
            hopper,
            _modules: modules,
        })
    }

    /// The GPU.
    #[must_use]
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The widest tiles that still give every multiprocessor enough warps, for a matrix that is to be multiplied on this device. Tiles of fewer than 8
    /// supersteps would leave streams of the quad layout shorter than the ring's first groups.
    ///
    /// # Errors
    /// [`CudaError::Unsupported`] for an empty or too large matrix.
    pub fn geometry(&self, rows: usize, cols: usize) -> Result<Geometry, CudaError> {
        let wanted = self.device.properties().multiprocessors as usize * QUAD_WARPS_MAX / 2;
        let of = |supersteps: usize| {
            Geometry::with_supersteps_max(rows, cols, supersteps).map_err(|e| CudaError::Unsupported { what: e.to_string() })
        };
        let mut geometry = of(layout::SUPERSTEPS_MAX)?;
        let mut supersteps = geometry.supersteps();
        while geometry.tiles() < wanted && supersteps >= 16 {
            supersteps = supersteps.div_ceil(2);
            geometry = of(supersteps)?;
        }
        Ok(geometry)
    }
}

/// The kernels of a module, in the order of their names.
fn functions<const N: usize>(module: &Module, names: [[&'static str; N]; 3]) -> Result<[[Function; N]; 3], CudaError> {
    let found = names.as_flattened().iter().map(|name| module.function(name)).collect::<Result<Vec<_>, _>>()?;
    let mut found = found.into_iter();
    Ok(names.map(|row| row.map(|_| found.next().expect("one for each name"))))
}

/// Sums that a product leaves: (tokens, n) exact integers, which the next kernel makes numbers.
#[derive(Clone, Copy, Debug)]
pub struct SumsAt<'a> {
    /// The sums.
    pub sum: &'a Buffer,
    /// Units of the activations, (tokens).
    pub unit: &'a Buffer,
    /// Scales of the rows, (n).
    pub scale: &'a Buffer,
    /// Biases of the rows, (n).
    pub bias: Option<&'a Buffer>,
    /// Rows of the matrix, padded.
    pub n: usize,
}

impl SumsAt<'_> {
    fn args(&self) -> abi::Sums {
        abi::Sums {
            sum: self.sum.address(),
            unit: self.unit.address(),
            scale: self.scale.address(),
            bias: self.bias.map_or(0, Buffer::address),
            n: self.n as i32,
            unused: 0,
        }
    }
}

const NO_SUMS: abi::Sums = abi::Sums { sum: 0, unit: 0, scale: 0, bias: 0, n: 0, unused: 0 };

/// Room for the activations of a matrix's products, as the kernels read them.
#[derive(Debug)]
pub struct Activations {
    frag: Buffer,
    q: Buffer,
    info: Buffer,
    unit: Buffer,
    tokens_max: usize,
    cols_max: usize,
}

impl Activations {
    /// For `tokens` tokens (rounded up to 32) of `cols` padded columns.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(device: &Arc<Device>, tokens: usize, cols: usize) -> Result<Self, CudaError> {
        let tokens = if tokens > 1 { tokens.next_multiple_of(32) } else { 1 };
        let room = |bytes| device.allocate(bytes, "activations");
        Ok(Self {
            frag: room(2 * tokens * cols)?,
            q: room(tokens * cols)?,
            info: room(tokens * cols / SUPERSTEP_COLS * 8)?,
            unit: room(tokens * 4)?,
            tokens_max: tokens,
            cols_max: cols,
        })
    }

    /// What was prepared for `tokens` tokens of `cols` padded columns, for checks.
    ///
    /// # Errors
    /// The driver's.
    pub fn download(&self, tokens: usize, cols: usize) -> Result<Prepared, CudaError> {
        let info: Vec<i32> = self.info.read(0, tokens * cols / SUPERSTEP_COLS * 2)?;
        Ok(Prepared { q: self.q.read(0, tokens * cols)?, info: info.as_chunks().0.to_vec(), unit: self.unit.read(0, tokens)? })
    }

    /// Units of the tokens.
    #[must_use]
    pub fn unit(&self) -> &Buffer {
        &self.unit
    }

    /// Bytes on the device.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.frag.bytes() + self.q.bytes() + self.info.bytes() + self.unit.bytes()
    }
}

/// Activations as a product reads them: column c of a token is about `q[c] * info[c / 128][0] * unit`.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    /// (tokens, cols)
    pub q: Vec<i8>,
    /// (tokens, cols / 128): multiple of the unit, 128 * sum of the even columns' q.
    pub info: Vec<[i32; 2]>,
    /// (tokens)
    pub unit: Vec<f32>,
}

/// What `prepare` makes int8 activations of.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// The RMS norm of the residual stream `x`, (tokens, cols), after `add` was added to it. `rows`: which rows of `x` and `add` are the tokens.
    Norm {
        /// Residual stream.
        x: &'a Buffer,
        /// Weight of the norm, (cols).
        weight: &'a Buffer,
        /// Epsilon of the norm.
        eps: f32,
        /// What a product adds to the stream.
        add: Option<SumsAt<'a>>,
        /// (tokens) u32
        rows: Option<&'a Buffer>,
    },
    /// Floats, (tokens, cols).
    Copy(&'a Buffer),
    /// What attention left.
    Mix(&'a Mixed, Heads),
    /// silu(gate) * up; rows of up begin at `up_row`.
    Silu {
        /// Sums of gate and up.
        sums: SumsAt<'a>,
        /// First row of up.
        up_row: usize,
    },
}

/// Heads of an attention layer.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Length of a head, even.
    pub head_dim: usize,
    /// First row of k among the stacked rows of q, k and v.
    pub k_row: usize,
    /// First row of v.
    pub v_row: usize,
}

impl Heads {
    /// Which of the kernels for heads of at most 64, 128 and 256 numbers.
    pub(crate) fn kernel(&self) -> Result<usize, CudaError> {
        let dim = self.head_dim;
        let index = [64, 128, HEAD_DIM_MAX].iter().position(|&most| dim <= most);
        index.ok_or_else(|| CudaError::Unsupported { what: format!("a head of {dim} numbers") })
    }
}

/// Room for what attention leaves: for each token, head and part of its positions a weighted sum of values, and what it takes to put the parts together.
#[derive(Debug)]
pub struct Mixed {
    out: Buffer,
    stats: Buffer,
}

impl Mixed {
    /// For `tokens` tokens of `heads` heads of `head_dim` numbers.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(device: &Arc<Device>, tokens: usize, heads: usize, head_dim: usize) -> Result<Self, CudaError> {
        let parts = tokens * heads * ATTENTION_SPLITS;
        Ok(Self {
            out: device.allocate(parts * head_dim * size_of::<f32>(), "attention")?,
            stats: device.allocate(parts * 2 * size_of::<f32>(), "attention")?,
        })
    }

    /// Bytes on the device for a token.
    #[must_use]
    pub const fn bytes_for(heads: usize, head_dim: usize) -> usize {
        heads * ATTENTION_SPLITS * (head_dim + 2) * size_of::<f32>()
    }

    /// The weighted sums, (tokens, heads, parts, head_dim), and pairs of highest score times log2(e) and sum of weights, (tokens, heads, parts), of `tokens`
    /// tokens, for checks. A part without positions has the sum 0, and anything for its weighted sum.
    ///
    /// # Errors
    /// The driver's.
    pub fn download(&self, tokens: usize, heads: usize, head_dim: usize) -> Result<(Vec<f32>, Vec<[f32; 2]>), CudaError> {
        let parts = tokens * heads * ATTENTION_SPLITS;
        let stats: Vec<f32> = self.stats.read(0, 2 * parts)?;
        Ok((self.out.read(0, parts * head_dim)?, stats.as_chunks().0.to_vec()))
    }
}

/// Attention of a layer: what it reads and writes.
#[derive(Clone, Copy, Debug)]
pub struct AttentionAt<'a> {
    /// q, k and v of the tokens, stacked.
    pub sums: SumsAt<'a>,
    /// Norms of the heads of q and k, (head_dim) each.
    pub norms: Option<[&'a Buffer; 2]>,
    /// Epsilon of these norms.
    pub eps: f32,
    /// Shapes.
    pub heads: Heads,
    /// Number of the layer.
    pub layer: usize,
    /// Positions that a token sees, its own included.
    pub window: Option<usize>,
    /// Cosines and sines, (tokens, head_dim), from a byte of a buffer on.
    pub turn: (&'a Buffer, usize),
    /// Where the tokens' keys and values are: [`Place`], (tokens).
    pub places: (&'a Buffer, usize),
    /// Room for the turned queries, (tokens, heads, head_dim).
    pub q: &'a Buffer,
    /// The result.
    pub out: &'a Mixed,
}

impl AttentionAt<'_> {
    fn check(&self, tokens: usize) {
        let numbers = tokens * self.heads.heads * self.heads.head_dim;
        assert!(
            self.places.1 + tokens * size_of::<Place>() <= self.places.0.bytes()
                && self.q.bytes() >= numbers * size_of::<f32>()
                && self.out.out.bytes() >= numbers * ATTENTION_SPLITS * size_of::<f32>(),
            "room for the tokens"
        );
    }

    fn rope(&self) -> abi::Rope {
        abi::Rope {
            sums: self.sums.args(),
            q_norm: self.norms.map_or(0, |n| n[0].address()),
            k_norm: self.norms.map_or(0, |n| n[1].address()),
            turn: self.turn.0.address() + self.turn.1 as u64,
            places: self.places.0.address() + self.places.1 as u64,
            q: self.q.address(),
            eps: self.eps,
            per_dim: 1.0 / self.heads.head_dim as f32,
            layer: self.layer as i32,
            heads: self.heads.heads as i32,
            kv_heads: self.heads.kv_heads as i32,
            head_dim: self.heads.head_dim as i32,
            k_row: self.heads.k_row as i32,
            v_row: self.heads.v_row as i32,
        }
    }

    fn attention(&self) -> abi::Attention {
        abi::Attention {
            q: self.q.address(),
            places: self.places.0.address() + self.places.1 as u64,
            out: self.out.out.address(),
            stats: self.out.stats.address(),
            scale: 1.0 / (self.heads.head_dim as f32).sqrt(),
            layer: self.layer as i32,
            heads: self.heads.heads as i32,
            kv_heads: self.heads.kv_heads as i32,
            head_dim: self.heads.head_dim as i32,
            window: self.window.map_or(0, |w| w.min(i32::MAX as usize) as i32),
        }
    }

    fn kernel(&self) -> Result<usize, CudaError> {
        self.heads.kernel()
    }
}

/// Launches kernels of one forward pass on the compute stream, each allowed to begin while the one before it ends.
#[derive(Debug)]
pub struct Queue<'a> {
    kernels: &'a Kernels,
    /// The last thing on the stream is a kernel of this queue.
    after_kernel: bool,
}

macro_rules! launch {
    ($queue:expr, $function:expr, $shape:expr, $stream:expr, $($arg:expr),+) => {{
        let mut args = [$((&raw mut $arg).cast()),+];
        // SAFETY: the arguments are those of the kernel (abi.rs), and the shapes were computed for the buffers they point to.
        unsafe { $queue.kernels.device.launch($function, $shape, $stream, &mut args) }
    }};
}

impl<'a> Queue<'a> {
    /// A queue after work of other kinds.
    #[must_use]
    pub fn new(kernels: &'a Kernels) -> Self {
        Self { kernels, after_kernel: false }
    }

    /// Says that something else was put on the stream: the next kernel begins after all of it.
    pub fn interrupted(&mut self) {
        self.after_kernel = false;
    }

    fn shape(&mut self, grid: (usize, usize), threads: usize, shared_bytes: usize, cluster: usize) -> Shape {
        let programmatic = self.after_kernel && self.kernels.hopper;
        self.after_kernel = true;
        Shape {
            grid: (grid.0 as u32, grid.1 as u32),
            threads: threads as u32,
            shared_bytes: shared_bytes as u32,
            cluster: cluster as u32,
            programmatic,
            cooperative: false,
        }
    }

    /// int8 activations of `tokens` tokens, of `cols` columns, for products with `form`; clears `sums` for them.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If `out` or `sums` have too little room.
    pub fn prepare(
        &mut self,
        input: Input<'_>,
        out: &Activations,
        tokens: usize,
        cols: usize,
        form: &Form<'_>,
        sums: &Buffer,
    ) -> Result<(), CudaError> {
        let (k, nt, n) = (form.geometry().padded_cols(), form.batch(tokens), form.geometry().padded_rows());
        let padded_tokens = tokens.next_multiple_of(nt);
        assert!(padded_tokens <= out.tokens_max && k <= out.cols_max && cols <= k, "room for the activations");
        assert!(padded_tokens * n * size_of::<i64>() <= sums.bytes(), "room for the sums");
        let supersteps = k / SUPERSTEP_COLS;
        let cluster = if self.kernels.hopper { CLUSTER.min(supersteps) } else { 1 };
        let block_cols = supersteps.div_ceil(cluster) * SUPERSTEP_COLS;
        // A warp takes a superstep.
        let threads = (block_cols / SUPERSTEP_COLS * LANES).min(OPS_THREADS);
        let mut args = abi::Prepare {
            x: 0,
            stats: 0,
            weight: 0,
            rows: 0,
            add: NO_SUMS,
            frag: out.frag.address(),
            q: out.q.address(),
            info: out.info.address(),
            unit: out.unit.address(),
            clear: sums.address(),
            eps: 0.0,
            cols: cols as i32,
            k: k as i32,
            tokens: tokens as i32,
            nt: nt as i32,
            up_row: 0,
            clear_n: n as i32,
            head_dim: 0,
        };
        let function = match input {
            Input::Norm { x, weight, eps, add, rows } => {
                (args.x, args.weight, args.eps) = (x.address(), weight.address(), eps);
                args.add = add.map_or(NO_SUMS, |add| add.args());
                args.rows = rows.map_or(0, Buffer::address);
                &self.kernels.prepare_norm
            }
            Input::Copy(x) => {
                args.x = x.address();
                &self.kernels.prepare_copy
            }
            Input::Mix(mixed, heads) => {
                (args.x, args.stats, args.head_dim) = (mixed.out.address(), mixed.stats.address(), heads.head_dim as i32);
                &self.kernels.prepare_mix
            }
            Input::Silu { sums, up_row } => {
                (args.add, args.up_row) = (sums.args(), up_row as i32);
                &self.kernels.prepare_silu
            }
        };
        // A superstep's numbers, and its sum and maximum.
        let shared = block_cols * size_of::<f32>() + block_cols / SUPERSTEP_COLS * 8;
        if shared > function.shared_bytes as usize || !cols.is_multiple_of(4) {
            return Err(CudaError::Unsupported { what: format!("a matrix of {cols} columns") });
        }
        let shape = self.shape((cluster, padded_tokens), threads, shared, cluster);
        launch!(self, function, shape, Stream::Compute, args)
    }

    /// Multiplies a matrix by `tokens` prepared tokens; the results are added to `sums`, (tokens, n), which were cleared with the preparation.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If `sums` have too little room.
    pub fn product(&mut self, form: &Form<'_>, activations: &Activations, tokens: usize, sums: &Buffer) -> Result<(), CudaError> {
        let g = form.geometry();
        let nt = form.batch(tokens);
        let batches = tokens.div_ceil(nt);
        let stride = nt * g.padded_rows() * size_of::<i64>();
        assert!(batches * stride <= sums.bytes(), "room for the sums");
        let r = form.low_bits() as usize;
        for batch in 0..batches {
            let first = batch * nt;
            let mut act = abi::Act {
                frag: activations.frag.address() + (first * g.padded_cols() * if nt == 1 { 2 } else { 1 }) as u64,
                q: activations.q.address() + (first * g.padded_cols()) as u64,
                info: activations.info.address() + (first * g.padded_cols() / SUPERSTEP_COLS * 8) as u64,
            };
            let mut out = sums.address() + (batch * stride) as u64;
            match form {
                Form::Quad(quad) => {
                    let index = [1, 8, 16].iter().position(|&n| n == nt).expect("a batch of this form");
                    let function = &self.kernels.quad[r][index];
                    let (blocks, warps, block_segs, shared) = quad_shape(self.kernels, quad, nt, function.shared_bytes as usize)?;
                    let mut args = quad.args(block_segs);
                    let shape = self.shape((blocks, 1), warps * 32, shared, 1);
                    launch!(self, function, shape, Stream::Compute, args, act, out)?;
                }
                Form::Plain(plain) => {
                    let index = [1, 8, 16, 32].iter().position(|&n| n == nt).expect("a batch of this form");
                    let split = plain_split(self.kernels.device.properties().multiprocessors as usize, g, tokens);
                    let mut args = plain.args(split);
                    let shape = self.shape(((g.tiles() * split).div_ceil(PLAIN_WARPS), 1), PLAIN_WARPS * 32, 0, 1);
                    launch!(self, &self.kernels.plain[r][index], shape, Stream::Compute, args, act, out)?;
                }
            }
        }
        Ok(())
    }

    /// Decodes a coded matrix to nibbles, on either stream.
    ///
    /// # Errors
    /// The driver's.
    pub fn decode(&mut self, quad: &QuadAt<'_>, to: &PlainAt<'_>, stream: Stream) -> Result<(), CudaError> {
        let function = &self.kernels.quad_store;
        let (blocks, warps, block_segs, shared) = store_shape(self.kernels, quad, function.shared_bytes as usize)?;
        let mut args = quad.args(block_segs);
        let mut out = to.nibbles();
        let mut shape = Shape {
            grid: (blocks as u32, 1),
            threads: warps as u32 * 32,
            shared_bytes: shared as u32,
            cluster: 1,
            programmatic: false,
            cooperative: false,
        };
        if stream == Stream::Compute {
            shape = self.shape((blocks, 1), warps * 32, shared, 1);
        }
        launch!(self, function, shape, stream, args, out)?;
        // Products read weights before they wait for the kernel before them: what follows begins only when all of this is written.
        self.interrupted();
        Ok(())
    }

    /// Attention of `tokens` tokens, from the sums of q, k and v.
    ///
    /// # Errors
    /// The driver's; heads that are too long.
    ///
    /// # Panics
    /// If a buffer has too little room.
    pub fn attend(&mut self, at: &AttentionAt<'_>, tokens: usize) -> Result<(), CudaError> {
        if tokens > 1 {
            self.rope(at, tokens)?;
            return self.attention(at, tokens);
        }
        at.check(1);
        let function = &self.kernels.attend[at.kernel()?];
        let mut args = abi::Attend { rope: at.rope(), attention: at.attention() };
        let shape = self.shape((at.heads.heads * ATTENTION_SPLITS, 1), ATTENTION_THREADS, 0, 1);
        launch!(self, function, shape, Stream::Compute, args)
    }

    /// Norms and turns q and k of `tokens` tokens, and keeps k and v.
    ///
    /// # Errors
    /// The driver's.
    pub fn rope(&mut self, at: &AttentionAt<'_>, tokens: usize) -> Result<(), CudaError> {
        at.check(tokens);
        let mut args = at.rope();
        let Heads { heads, kv_heads, head_dim, .. } = at.heads;
        let shape = self.shape((heads + 2 * kv_heads, tokens), (head_dim / 2).next_multiple_of(32), 0, 1);
        launch!(self, &self.kernels.rope, shape, Stream::Compute, args)
    }

    /// Attention of `tokens` tokens, whose q, k and v [`rope`](Self::rope) has turned.
    ///
    /// # Errors
    /// The driver's; heads that are too long.
    pub fn attention(&mut self, at: &AttentionAt<'_>, tokens: usize) -> Result<(), CudaError> {
        at.check(tokens);
        let function = &self.kernels.attention[at.kernel()?];
        let mut args = at.attention();
        let shape = self.shape((at.heads.heads * ATTENTION_SPLITS, tokens), ATTENTION_THREADS, 0, 1);
        launch!(self, function, shape, Stream::Compute, args)
    }

    pub(crate) fn launch_step(&mut self, function: &Function, shared_bytes: usize, mut args: abi::Step) -> Result<(), CudaError> {
        self.after_kernel = true;
        let shape = step::shape(&self.kernels.device, shared_bytes);
        launch!(self, function, shape, Stream::Compute, args)
    }

    /// Reads a buffer and keeps nothing, as a measure of bandwidth. `out`: 4 bytes.
    ///
    /// # Errors
    /// The driver's.
    pub fn read(&mut self, buffer: &Buffer, out: &Buffer) -> Result<(), CudaError> {
        let (mut from, mut count, mut to) = (buffer.address(), (buffer.bytes() / 16) as u64, out.address());
        let blocks = self.kernels.device.properties().multiprocessors as usize * 8;
        let shape = self.shape((blocks, 1), OPS_THREADS, 0, 1);
        launch!(self, &self.kernels.read_all, shape, Stream::Compute, from, count, to)
    }

    /// The first `rows` rows of sums as numbers, (tokens, rows).
    ///
    /// # Errors
    /// The driver's.
    pub fn logits(&mut self, sums: SumsAt<'_>, tokens: usize, rows: usize, out: &Buffer) -> Result<(), CudaError> {
        assert!(out.bytes() >= tokens * rows * 4, "room for the logits");
        let (mut args, mut address, mut count) = (sums.args(), out.address(), rows as i32);
        let shape = self.shape((rows.div_ceil(256), tokens), 256, 0, 1);
        launch!(self, &self.kernels.logits, shape, Stream::Compute, args, address, count)
    }
}

/// Into how many runs of columns a tile is split: the fewest that give every multiprocessor enough warps. Many tokens make work enough.
fn plain_split(multiprocessors: usize, g: &Geometry, tokens: usize) -> usize {
    if tokens > 8 {
        return 1;
    }
    let supersteps = g.supersteps();
    let divisors = (1..=supersteps).filter(|d| supersteps.is_multiple_of(*d) && (*d == 1 || supersteps / d >= SPLIT_SUPERSTEPS_MIN));
    let mut best = 1;
    for split in divisors {
        best = split;
        if g.tiles() * split >= multiprocessors * PLAIN_WARPS_WANTED {
            break;
        }
    }
    best
}

/// Blocks, warps of a block, column segments of a block, shared memory of `quad_r*_t{nt}`.
fn quad_shape(kernels: &Kernels, quad: &QuadAt<'_>, nt: usize, shared_max: usize) -> Result<(usize, usize, usize, usize), CudaError> {
    let g = quad.places.geometry();
    let multiprocessors = kernels.device.properties().multiprocessors as usize;
    let rings = |warps: usize| 128 + (warps * 64).next_multiple_of(128) + warps * ring_bytes();
    let table = quad.args(1).table_bytes as usize;
    let x = |segs: usize| g.tile_cols() * if nt == 1 { 2 } else { nt } * segs + (g.supersteps() * 8 * nt * segs).next_multiple_of(128);
    let segs_of = |warps: usize| {
        let rt = g.row_tiles();
        if nt > 1 || rt.is_multiple_of(warps) { 1 } else { g.segs().min((warps + rt - 2) / rt + 1) }
    };
    let shared = |warps: usize| table + x(segs_of(warps)) + rings(warps);
    let fit = (1..=QUAD_WARPS_MAX).rev().find(|&warps| shared(warps) <= shared_max);
    let Some(most) = fit else {
        return Err(CudaError::Unsupported { what: format!("a coding table of {table} bytes in {shared_max} bytes of shared memory") });
    };
    let tasks = if nt == 1 { g.tiles() } else { g.row_tiles() };
    let lanes_of_blocks = if nt == 1 { multiprocessors } else { multiprocessors.div_ceil(g.segs()) };
    let waves = tasks.div_ceil(most * lanes_of_blocks);
    let even = tasks.div_ceil(waves * lanes_of_blocks).clamp(1, most);
    // Rounding may touch one segment more than the largest block did.
    let warps = (1..=even).rev().find(|&warps| shared(warps) <= shared_max).unwrap_or(1);
    let blocks = if nt == 1 { tasks.div_ceil(warps) } else { g.segs() * tasks.div_ceil(warps) };
    Ok((blocks, warps, segs_of(warps), shared(warps)))
}

/// As [`quad_shape`], for `quad_store`, which needs no activations.
fn store_shape(kernels: &Kernels, quad: &QuadAt<'_>, shared_max: usize) -> Result<(usize, usize, usize, usize), CudaError> {
    let g = quad.places.geometry();
    let table = quad.args(1).table_bytes as usize;
    let shared = |warps: usize| table + 128 + (warps * 64).next_multiple_of(128) + warps * ring_bytes();
    let Some(most) = (1..=QUAD_WARPS_MAX).rev().find(|&warps| shared(warps) <= shared_max) else {
        return Err(CudaError::Unsupported { what: format!("a coding table of {table} bytes in {shared_max} bytes of shared memory") });
    };
    let multiprocessors = kernels.device.properties().multiprocessors as usize;
    let waves = g.tiles().div_ceil(most * multiprocessors);
    let warps = g.tiles().div_ceil(waves * multiprocessors).clamp(1, most);
    Ok((g.tiles().div_ceil(warps), warps, 1, shared(warps)))
}

/// Bytes of a warp's ring, as `layout::header()` tells the kernels.
fn ring_bytes() -> usize {
    (layout::RING_GROUPS + 1) * layout::GROUP_WORDS * layout::STREAMS * size_of::<u32>()
}
