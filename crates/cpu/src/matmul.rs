//! Products of coded or decoded matrices with int8 activations.
//!
//! The arithmetic is the same everywhere. Per row, and per segment of columns in order, `isum = Σ
//! symbol * q`, an exact i32. Then, in f32, every operation rounded by itself: row and tensor
//! scales: `acc += isum * xscale[segment]`, and in the end `y = acc * rowscale`; group scales: `acc
//! += (isum * gscale) * xscale[segment]`, for affine scales followed by `acc += (bias + 8 * gscale)
//! * (xsum[segment] * xscale[segment])`, and `y = acc`.
//!
//! One token: symbols go from the stream to the sums without touching memory where a kernel for the
//! codec and level exists (`isa/streams.rs` for `rans`, `rans_pairs.rs`, `tiered.rs`, `planes.rs`). More tokens of a decoded matrix: each of its lines is read, and
//! made symbol bytes, once for up to eight tokens ([`dot_few`]). More tokens of a coded one, and all other cases: a task decodes its chunks to symbol
//! bytes in the L2 cache once, and multiplies them with all tokens, eight at a time. What eight tokens have of a column step lies together
//! ([`TokenBlock`]): eight addresses would not fit the registers.
//!
//! Measured (AMD EPYC, Zen 5, one of two shared cores, `cargo run --release -p tersor-cpu --example
//! gemv`), in G weights/s from the cache: plain GEMV of nibbles 130 to 160 at AVX-512 and 50 at
//! AVX2, with escapes 87 to 92 and 12 to 42; from memory 54 to 77, which is what memory gives. 64
//! tokens: 290 G weights/s times tokens at AVX-512, 85 at AVX2. A few tokens, 16 MB of nibbles (example `batch`, 1 thread, AVX-512, G weights/s times tokens, with blocks
//! of tokens and lines multiplied as they are read, for 1, 2, 4, 8 and 64 tokens): decoded without escapes 125, 250, 330, 335, 335 where it was 131, 94, 147, 202, 252,
//! with them 91, 150, 225, 270, 280 where it was 96, 89, 135, 181, 241; `rans` coded 31, 50, 89, 142, 275, `rans-pairs` 44, 58, 100, 157, 280 where it was 45, 58, 98, 152, 254;
//! at AVX2 without escapes 96, 68, 74, 89, 87. It loses where symbols are decoded
//! by the codec's scalar decoder: rans-precise and block-ans at AVX2, huffman in lanes and block-ans
//! with 32-bit states at every level (0.4 to 1.1 G weights/s); and at AVX2 with many escapes. There, on Zen 4,
//! 64 without, 38 with one in ten thousand and 16 with 17 in a thousand symbols wide, from memory 36, 26 and 14. Tried
//! without gain: the places of all escapes noted first and each added to the sums of its row (14 and 12 with many).

use std::mem::MaybeUninit;
use std::ops::Range;

use tersor_codec::SYMBOL_BIAS;
use tersor_format::CodedTensor;

use crate::activations::{BLOCK_TOKENS, TokenBlock};
use crate::decoded::{Decoded, Form, RowTile, expand, unescape};
use crate::error::FirstError;
#[cfg(target_arch = "x86_64")]
use crate::isa::streams;
use crate::isa::{Isa, PLAIN_AHEAD_BYTES, TileBytes, Tiles, patch, per_isa, prefetch};
use crate::pairs::PairBuffers;
use crate::scales::TileScales;
#[cfg(target_arch = "x86_64")]
use crate::source::RansKernel;
use crate::source::{FarAt, Scratch, chunks_together, decode_chunks, far_of, symbols_of, with_scratch};
use crate::{
    Activations, KernelError, KernelScales, Level, Pool, SEGMENT_COLS_MAX, SharedOut, TILE_COLS, TILE_ROWS, TILE_SYMBOLS, planes,
    rans_pairs, tiered,
};

/// A matrix, in the form it is held in.
#[derive(Clone, Copy, Debug)]
pub enum Matrix<'a> {
    /// Decoded while it is multiplied.
    Coded(&'a CodedTensor),
    /// Decoded before.
    Decoded(&'a Decoded),
}

impl Matrix<'_> {
    /// Rows.
    pub fn rows(&self) -> usize {
        match self {
            Matrix::Coded(m) => m.rows(),
            Matrix::Decoded(m) => m.rows(),
        }
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        match self {
            Matrix::Coded(m) => m.cols(),
            Matrix::Decoded(m) => m.cols(),
        }
    }
}

/// One product `out = x W^T`.
#[derive(Debug)]
pub struct Job<'a> {
    /// W: (rows, cols)
    pub matrix: Matrix<'a>,
    /// Scales of W.
    pub scales: &'a KernelScales,
    /// (tokens, cols), quantized with the segment that the scales ask for.
    pub x: &'a Activations,
    /// (tokens, rows)
    pub out: &'a mut [f32],
}

/// Work of one job: `units` (chunks, or row tiles) in `tasks` about equal runs.
struct Plan {
    units: usize,
    tasks: usize,
}

impl Plan {
    fn run(&self, task: usize) -> Range<usize> {
        self.units * task / self.tasks..self.units * (task + 1) / self.tasks
    }
}

/// Runs the jobs together, as one parallel region.
///
/// # Errors
/// Wrong shapes, before anything is computed; corrupt chunks, of which the first by job and chunk
/// is named. After an error the outputs are of no use.
pub fn matmul(pool: &Pool, level: Level, jobs: &mut [Job<'_>]) -> Result<(), KernelError> {
    for (index, job) in jobs.iter().enumerate() {
        check(index, job)?;
    }
    let plans = plan(jobs, pool.threads());
    let tasks = plans.iter().map(|p| p.tasks).sum();
    struct Shared<'a> {
        matrix: Matrix<'a>,
        scales: &'a KernelScales,
        x: &'a Activations,
        out: SharedOut<'a, f32>,
    }
    let shared: Vec<Shared<'_>> =
        jobs.iter_mut().map(|j| Shared { matrix: j.matrix, scales: j.scales, x: j.x, out: SharedOut::new(j.out) }).collect();
    let errors = FirstError::default();
    pool.run(tasks, &|mut task| {
        let mut index = 0;
        while task >= plans[index].tasks {
            task -= plans[index].tasks;
            index += 1;
        }
        let (job, units) = (&shared[index], plans[index].run(task));
        let dot = Dot { level, scales: job.scales, x: job.x, rows: job.matrix.rows(), out: job.out };
        match job.matrix {
            Matrix::Coded(tensor) => {
                if let Err((chunk, source)) = dot.coded(tensor, units) {
                    errors.report(KernelError::Corrupt { job: index, chunk, source });
                }
            }
            Matrix::Decoded(matrix) => dot.decoded(matrix, units),
        }
    });
    errors.into_result()
}

fn check(index: usize, job: &Job<'_>) -> Result<(), KernelError> {
    let (rows, cols, tokens) = (job.matrix.rows(), job.matrix.cols(), job.x.tokens());
    let equal = |what, expected, found| {
        if expected == found { Ok(()) } else { Err(KernelError::Shape { job: index, what, expected, found }) }
    };
    if tokens == 0 {
        return Err(KernelError::Shape { job: index, what: "the number of tokens", expected: 1, found: 0 });
    }
    equal("the number of columns of x", cols, job.x.cols())?;
    equal("the segment of x", job.scales.segment(), job.x.segment())?;
    equal("the number of rows with scales", rows, job.scales.rows())?;
    equal("the number of columns with scales", cols, job.scales.cols())?;
    equal("the length of out", tokens * rows, job.out.len())
}

/// Splits jobs into tasks. Chunks go together up to [`chunks_together`], but fewer where that would
/// leave a thread without work; row tiles in runs long enough to be worth claiming and short enough
/// that threads finish together.
fn plan(jobs: &[Job<'_>], threads: usize) -> Vec<Plan> {
    let row_tiles = |j: &Job<'_>| match j.matrix {
        Matrix::Decoded(m) => m.row_tiles(),
        Matrix::Coded(_) => 0,
    };
    let row_tiles_all: usize = jobs.iter().map(row_tiles).sum();
    let mut plans: Vec<Plan> = jobs
        .iter()
        .map(|j| match j.matrix {
            Matrix::Coded(m) => Plan { units: m.chunk_count(), tasks: m.chunk_count().div_ceil(chunks_together(m.table())) },
            Matrix::Decoded(m) => {
                // About 8 tasks a thread in all, none with less than 16 KiB of fields.
                let line_bytes = m.col_steps() * TILE_SYMBOLS / 2;
                let most = (m.row_tiles() * line_bytes / 16_384).max(1);
                let share = if threads == 1 { 1 } else { (8 * threads * m.row_tiles()).div_ceil(row_tiles_all.max(1)) };
                Plan { units: m.row_tiles(), tasks: share.clamp(1, most).min(m.row_tiles()) }
            }
        })
        .collect();
    let mut total: usize = plans.iter().map(|p| p.tasks).sum();
    while !total.is_multiple_of(threads) && total < 4 * threads {
        let Some(longest) = plans.iter_mut().filter(|p| p.tasks < p.units).max_by_key(|p| p.units / p.tasks) else {
            break;
        };
        longest.tasks += 1;
        total += 1;
    }
    plans
}

/// The sink that multiplies: symbols of row tiles become outputs of 16 rows.
struct Dot<'a> {
    level: Level,
    scales: &'a KernelScales,
    x: &'a Activations,
    rows: usize,
    out: SharedOut<'a, f32>,
}

impl Dot<'_> {
    fn coded(&self, tensor: &CodedTensor, chunks: Range<usize>) -> Result<(), (usize, tersor_codec::DecodeError)> {
        with_scratch(|scratch| {
            let symbols = symbols_of(tensor, &chunks);
            let first = tensor.chunk_row_tiles(chunks.start).start;
            if self.x.tokens() == 1 {
                let Scratch { pairs, sums, .. } = scratch;
                sums.resize(symbols / (tensor.col_steps() * TILE_SYMBOLS), [0.0; TILE_ROWS]);
                if self.fused(tensor, chunks.clone(), pairs, sums) {
                    for (i, sums) in sums.iter().enumerate() {
                        self.write(first + i, std::slice::from_ref(sums));
                    }
                    return Ok(());
                }
            }
            scratch.bytes.ensure(symbols);
            decode_chunks(self.level, tensor, chunks, &mut scratch.pairs, &mut scratch.bytes[..symbols], &mut scratch.far)?;
            let Scratch { bytes, far, sums, .. } = scratch;
            let tiles: &[TileBytes] = bytes[..symbols].as_chunks().0;
            for (i, tiles) in tiles.chunks_exact(tensor.col_steps()).enumerate() {
                self.bytes(first + i, tiles, far_of(far, first + i), sums);
            }
            Ok(())
        })
    }

    /// Multiplies chunks with the only token while they are decoded. False if there is no kernel for
    /// that, or it gave up: `sums` are then of no use.
    fn fused(&self, tensor: &CodedTensor, chunks: Range<usize>, pairs: &mut PairBuffers, sums: &mut [[f32; TILE_ROWS]]) -> bool {
        if let Some(table) = planes::table(tensor.table()) {
            return planes::dot(self.level, table, tensor, chunks, self.scales, self.x, sums);
        }
        #[cfg(target_arch = "x86_64")]
        if let Some(kernel) = RansKernel::new(self.level, tensor.table()) {
            return streams::dot(kernel.get(), tensor, chunks, self.scales, self.x, sums);
        }
        if let Some(kernel) = rans_pairs::Chunks::new(self.level, tensor) {
            return kernel.dot(chunks, pairs, self.scales, self.x, sums);
        }
        tiered::dot(self.level, tensor, chunks, pairs, self.scales, self.x, sums)
    }

    fn decoded(&self, matrix: &Decoded, row_tiles: Range<usize>) {
        with_scratch(|scratch| {
            for index in row_tiles {
                let tile = matrix.row_tile(index);
                // A line holds two column steps: they must be of one segment.
                let pairs = (self.x.segment() / TILE_COLS).is_multiple_of(2);
                match tile.form {
                    Form::Bytes => self.bytes(index, tile.lines, tile.far, &mut scratch.sums),
                    Form::Nibbles { bias, escapes } if pairs && self.nibbles(&tile, bias, escapes, index, &mut scratch.sums) => {}
                    Form::Nibbles { .. } => {
                        let symbols = matrix.col_steps() * TILE_SYMBOLS;
                        scratch.bytes.ensure(symbols);
                        let tiles = scratch.bytes[..symbols].as_chunks_mut().0;
                        expand(self.level, &tile, tiles);
                        self.bytes(index, tiles, tile.far, &mut scratch.sums);
                    }
                }
            }
        });
    }

    /// One row tile as symbol bytes, (steps), with all tokens.
    fn bytes(&self, row_tile: usize, tiles: &[TileBytes], far: &[FarAt], sums: &mut Vec<[f32; TILE_ROWS]>) {
        sums.clear();
        sums.resize(self.x.tokens(), [0.0; TILE_ROWS]);
        dot_bytes(self.level, tiles, far, self.scales.tile(row_tile), self.x, sums);
        self.write(row_tile, sums);
    }

    /// One row tile as nibbles. False if symbol bytes are to be preferred.
    fn nibbles(&self, tile: &RowTile<'_>, bias: u8, escapes: bool, row_tile: usize, sums: &mut Vec<[f32; TILE_ROWS]>) -> bool {
        let scales = self.scales.tile(row_tile);
        if self.x.tokens() == 1 {
            let mut sums = [0.0; TILE_ROWS];
            dot_nibbles(self.level, tile, bias, escapes, scales, self.x, &mut sums);
            self.write(row_tile, &[sums]);
            return true;
        }
        sums.clear();
        sums.resize(self.x.tokens(), [0.0; TILE_ROWS]);
        let done = dot_nibbles_together(self.level, tile, bias, escapes, scales, self.x, sums);
        if done {
            self.write(row_tile, sums);
        }
        done
    }

    /// `sums`: (tokens, 16); rows beyond the matrix are dropped.
    fn write(&self, row_tile: usize, sums: &[[f32; TILE_ROWS]]) {
        let row = row_tile * TILE_ROWS;
        let rows = TILE_ROWS.min(self.rows - row);
        for (token, sums) in sums.iter().enumerate() {
            // SAFETY: every row tile is in one task only, and its rows are nobody else's.
            let out = unsafe { self.out.slice(token * self.rows + row, rows) };
            out.copy_from_slice(&sums[..rows]);
        }
    }
}

/// Adds what far symbols are above -128, the symbol that their byte 0 stands for, to a segment's
/// sums. `steps`: the segment's; `q`: the token's, by step.
#[inline(always)]
pub(crate) fn patch_far<'q>(isum: &mut [i32; TILE_ROWS], far: &[FarAt], steps: &Range<usize>, q: impl Fn(usize) -> &'q [i8; TILE_COLS]) {
    for f in far {
        let (step, lane) = (f.position as usize / TILE_SYMBOLS, f.position as usize % TILE_SYMBOLS);
        if steps.contains(&step) {
            isum[lane / TILE_COLS] += (i32::from(f.symbol) + 128) * i32::from(q(step)[lane % TILE_COLS]);
        }
    }
}

/// A segment's sums as floats, `more` and far symbols added.
#[inline(always)]
fn finish_far<I: Isa>(
    isa: I,
    dots: I::Sums,
    xsum: i32,
    more: i32,
    far: &[FarAt],
    steps: &Range<usize>,
    q: &[[i8; TILE_COLS]],
) -> I::Floats {
    if far.is_empty() {
        return isa.finish_floats(dots, xsum, more);
    }
    let mut isum = isa.finish(dots, xsum).map(|sum| sum + more);
    patch_far(&mut isum, far, steps, |step| &q[step]);
    isa.floats_of(&isum)
}

/// The real scales of one segment of a row tile.
#[derive(Clone, Copy)]
pub(crate) enum SegmentScales {
    Row,
    Group([f32; TILE_ROWS]),
    Affine([f32; TILE_ROWS], [f32; TILE_ROWS]),
}

impl SegmentScales {
    #[inline(always)]
    pub(crate) fn of(scales: TileScales<'_>, segment: usize) -> SegmentScales {
        match scales {
            TileScales::Row(_) => SegmentScales::Row,
            TileScales::Group { scales, biases } => {
                let scale = scales.group(segment);
                match biases {
                    None => SegmentScales::Group(scale),
                    Some(biases) => {
                        let mut bias = biases.group(segment);
                        for j in 0..TILE_ROWS {
                            bias[j] += 8.0 * scale[j];
                        }
                        SegmentScales::Affine(scale, bias)
                    }
                }
            }
        }
    }

    /// Adds one segment's integer sums to the rows' results. Spelt in registers: left to the compiler,
    /// this took a fifth of the time of the fastest kernels.
    #[inline(always)]
    pub(crate) fn add<I: Isa>(&self, isa: I, acc: &mut [f32; TILE_ROWS], isum: &[i32; TILE_ROWS], xscale: f32, xsum: i32) {
        self.add_floats(isa, acc, isa.floats_of(isum), xscale, xsum);
    }

    /// As [`SegmentScales::add`], of sums that are already rounded to floats.
    #[inline(always)]
    pub(crate) fn add_floats<I: Isa>(&self, isa: I, acc: &mut [f32; TILE_ROWS], sums: I::Floats, xscale: f32, xsum: i32) {
        let factor = isa.splat_float(xscale);
        let mut out = isa.floats(acc);
        match self {
            SegmentScales::Row => out = isa.multiply_add(out, sums, factor),
            SegmentScales::Group(scale) => out = isa.multiply_add(out, isa.multiply(sums, isa.floats(scale)), factor),
            SegmentScales::Affine(scale, bias) => {
                out = isa.multiply_add(out, isa.multiply(sums, isa.floats(scale)), factor);
                out = isa.multiply_add(out, isa.floats(bias), isa.splat_float(xsum as f32 * xscale));
            }
        }
        isa.store_floats(out, acc);
    }
}

/// Applies row scales to the finished sums.
#[inline(always)]
pub(crate) fn finish_rows(scales: TileScales<'_>, acc: &mut [f32; TILE_ROWS]) {
    if let TileScales::Row(row) = scales {
        for j in 0..TILE_ROWS {
            acc[j] *= row[j];
        }
    }
}

/// Tokens up to which escapes are spread anew for each block of tokens: with more it is dearer than symbol bytes in the cache.
const SPREAD_TOKENS_MAX: usize = 32;

/// Calls `$f::<_, T, ..>(...)` for a number of tokens, up to [`BLOCK_TOKENS`].
macro_rules! by_tokens {
    ($tokens:expr, $f:ident::<_ $(, $generic:literal)?>($($arg:expr),*)) => {
        match $tokens {
            1 => $f::<_, 1 $(, $generic)?>($($arg),*),
            2 => $f::<_, 2 $(, $generic)?>($($arg),*),
            3 => $f::<_, 3 $(, $generic)?>($($arg),*),
            4 => $f::<_, 4 $(, $generic)?>($($arg),*),
            5 => $f::<_, 5 $(, $generic)?>($($arg),*),
            6 => $f::<_, 6 $(, $generic)?>($($arg),*),
            7 => $f::<_, 7 $(, $generic)?>($($arg),*),
            _ => $f::<_, 8 $(, $generic)?>($($arg),*),
        }
    };
}

per_isa! {
    /// `sums[token] = ` the outputs of one row tile.
    ///
    /// `tiles`: (steps) of symbol bytes; `sums`: (tokens, 16), zero when it comes in. Cost per step
    /// and eight tokens: one load of weights, and eight dot products that broadcast a dword of `q`.
    fn dot_bytes(isa; tiles: &[TileBytes], far: &[FarAt], scales: TileScales<'_>, x: &Activations, sums: &mut [[f32; TILE_ROWS]]) {
        for (block, sums) in x.blocks().zip(sums.chunks_mut(BLOCK_TOKENS)) {
            by_tokens!(block.tokens, block_of_tokens::<_>(isa, tiles, far, scales, block, x.segment(), sums));
        }
    }
}

/// As [`dot_bytes`], of a block of `T` tokens. `segment`: columns of one.
#[inline(always)]
fn block_of_tokens<I: Isa, const T: usize>(
    isa: I,
    tiles: &[TileBytes],
    far: &[FarAt],
    scales: TileScales<'_>,
    x: TokenBlock<'_>,
    segment: usize,
    acc: &mut [[f32; TILE_ROWS]],
) {
    let steps = segment / TILE_COLS;
    let q: &[[[i8; TILE_COLS]; T]] = x.q.as_chunks().0;
    for (segment, (tiles, q)) in tiles.chunks(steps).zip(q.chunks(steps)).enumerate() {
        let mut dots = [isa.zero(); T];
        for (tile, q) in tiles.iter().zip(q) {
            let tile = isa.load(tile);
            for t in 0..T {
                dots[t] = isa.dot(dots[t], tile, &q[t]);
            }
        }
        finish_block(isa, dots, segment, steps, far, scales, x, acc);
    }
    for acc in &mut acc[..T] {
        finish_rows(scales, acc);
    }
}

/// Adds the sums of the segment `segment`, of `steps` column steps, to the results of `T` tokens.
#[inline(always)]
#[allow(clippy::too_many_arguments)] // What a segment is multiplied with, and where its sums go.
fn finish_block<I: Isa, const T: usize>(
    isa: I,
    dots: [I::Sums; T],
    segment: usize,
    steps: usize,
    far: &[FarAt],
    scales: TileScales<'_>,
    x: TokenBlock<'_>,
    acc: &mut [[f32; TILE_ROWS]],
) {
    let (xscales, xsums) = (&x.scales.as_chunks::<T>().0[segment], &x.sums.as_chunks::<T>().0[segment]);
    let segment_scales = SegmentScales::of(scales, segment);
    let acc: &mut [[f32; TILE_ROWS]; T] = acc.first_chunk_mut().expect("a result for each token");
    for t in 0..T {
        let sums = if far.is_empty() {
            isa.finish_floats(dots[t], xsums[t], 0)
        } else {
            let mut isum = isa.finish(dots[t], xsums[t]);
            patch_far(&mut isum, far, &(segment * steps..(segment + 1) * steps), |step| &x.q[step * T + t]);
            isa.floats_of(&isum)
        };
        segment_scales.add_floats(isa, &mut acc[t], sums, xscales[t], xsums[t]);
    }
}

per_isa! {
    /// The outputs of one row tile of nibbles for one token: the plain GEMV.
    ///
    /// A segment is a whole number of lines. Cost per line of 128 symbols: one load, a mask and a product for either
    /// half, and with escapes what [`dot_spread`] or [`Patched`] take. Bound by reading the lines from memory, which are asked for
    /// well ahead: of the 1.1 B model at 3.25 bpw that takes steps of `cached` from 51 and 52 to 66 and 69 tok/s on a Zen 5 with one
    /// thread (by turns), for the processor's own prefetcher stops at the ends of pages. G weights/s from memory at 3.79 bits, asked for 0, 1, 2, 4, 8 KiB
    /// ahead: 61, 58, 58, 65, 76; to the L2 cache 16 and 64 KiB: 69, 74.
    fn dot_nibbles(isa; tile: &RowTile<'_>, bias: u8, has_escapes: bool, scales: TileScales<'_>, x: &Activations, acc: &mut [f32; TILE_ROWS]) {
        if has_escapes && I::SPREADS {
            dot_spread(isa, tile, bias, scales, x, acc);
        } else {
            dot_in_place(isa, tile, bias, has_escapes, scales, x, acc);
        }
    }
}

per_isa! {
    /// `sums[token] = ` the outputs of one row tile of nibbles. False, with nothing done, where escapes would cost more than symbol bytes.
    ///
    /// `sums`: (tokens, 16), zero when it comes in. Apart from [`dot_nibbles`], whose loops the compiler spoils where these stand beside them (3 % with escapes).
    fn dot_nibbles_together(
        isa;
        tile: &RowTile<'_>,
        bias: u8,
        has_escapes: bool,
        scales: TileScales<'_>,
        x: &Activations,
        sums: &mut [[f32; TILE_ROWS]],
    ) -> bool {
        if has_escapes && (!I::SPREADS || sums.len() > SPREAD_TOKENS_MAX) {
            return false;
        }
        for (block, sums) in x.blocks().zip(sums.chunks_mut(BLOCK_TOKENS)) {
            match has_escapes {
                true => by_tokens!(block.tokens, dot_few::<_, true>(isa, tile, bias, scales, block, x.segment(), sums)),
                false => by_tokens!(block.tokens, dot_few::<_, false>(isa, tile, bias, scales, block, x.segment(), sums)),
            }
        }
        true
    }
}

/// As [`dot_nibbles_together`], of a block of `T` tokens, for which each line is read and made symbol bytes once. `ESCAPES`: whether there may be any; `segment`: columns
/// of one.
#[inline(always)]
fn dot_few<I: Isa, const T: usize, const ESCAPES: bool>(
    isa: I,
    tile: &RowTile<'_>,
    bias: u8,
    scales: TileScales<'_>,
    x: TokenBlock<'_>,
    segment: usize,
    acc: &mut [[f32; TILE_ROWS]],
) {
    // Few sums would wait for each other, many would not fit the registers.
    let second = usize::from(T <= 4);
    let (bias, mut next) = (isa.splat(bias), tile.escapes.as_ptr());
    let steps = segment / TILE_COLS;
    let q: &[[[i8; TILE_COLS]; T]] = x.q.as_chunks().0;
    for (segment, (lines, q)) in tile.lines.chunks(steps / 2).zip(q.chunks(steps)).enumerate() {
        let (pairs, single) = q.as_chunks::<2>();
        let mut dots = [[isa.zero(); 2]; T];
        for (line, q) in lines.iter().zip(pairs) {
            prefetch(line.as_ptr().wrapping_add(PLAIN_AHEAD_BYTES));
            let line = isa.load(line);
            let (mut low, mut high) = (isa.low(line, bias), isa.high(line, bias));
            if ESCAPES {
                // SAFETY: `next` came from the row tile and takes one byte for each field of 0.
                (low, high) = unsafe { (unescape(isa, low, bias, &mut next), unescape(isa, high, bias, &mut next)) };
            }
            for t in 0..T {
                dots[t][0] = isa.dot(dots[t][0], low, &q[0][t]);
            }
            for t in 0..T {
                dots[t][second] = isa.dot(dots[t][second], high, &q[1][t]);
            }
        }
        if let (Some(q), Some(line)) = (single.first(), lines.last()) {
            let mut low = isa.low(isa.load(line), bias);
            if ESCAPES {
                // SAFETY: as above.
                low = unsafe { unescape(isa, low, bias, &mut next) };
            }
            for t in 0..T {
                dots[t][0] = isa.dot(dots[t][0], low, &q[t]);
            }
        }
        let mut sums = [isa.zero(); T];
        for t in 0..T {
            sums[t] = isa.add(dots[t][0], dots[t][1]);
        }
        finish_block(isa, sums, segment, steps, tile.far, scales, x, acc);
    }
    for acc in &mut acc[..T] {
        finish_rows(scales, acc);
    }
}

/// As [`dot_nibbles`], with escapes, which go to their lanes before the product: per half a comparison, a load and an expand.
#[inline(always)]
fn dot_spread<I: Isa>(isa: I, tile: &RowTile<'_>, bias: u8, scales: TileScales<'_>, x: &Activations, acc: &mut [f32; TILE_ROWS]) {
    let (bias, mut next) = (isa.splat(bias), tile.escapes.as_ptr());
    let TokenBlock { q, scales: xscales, sums: xsums, .. } = x.only();
    let steps = x.segment() / TILE_COLS;
    for ((segment, lines), part) in tile.lines.chunks(steps / 2).enumerate().zip(q.chunks(steps)) {
        let mut dots = [isa.zero(); 2];
        let (pairs, single) = part.as_chunks::<2>();
        for (line, q) in lines.iter().zip(pairs) {
            prefetch(line.as_ptr().wrapping_add(PLAIN_AHEAD_BYTES));
            let line = isa.load(line);
            // SAFETY: `next` came from the row tile and takes one byte for each field of 0.
            let (low, high) =
                unsafe { (unescape(isa, isa.low(line, bias), bias, &mut next), unescape(isa, isa.high(line, bias), bias, &mut next)) };
            dots[0] = isa.dot(dots[0], low, &q[0]);
            dots[1] = isa.dot(dots[1], high, &q[1]);
        }
        if let (Some(q), Some(line)) = (single.first(), lines.last()) {
            // SAFETY: as above.
            let low = unsafe { unescape(isa, isa.low(isa.load(line), bias), bias, &mut next) };
            dots[0] = isa.dot(dots[0], low, q);
        }
        let range = segment * steps..segment * steps + part.len();
        let sums = finish_far(isa, isa.add(dots[0], dots[1]), xsums[segment], 0, tile.far, &range, q);
        SegmentScales::of(scales, segment).add_floats(isa, acc, sums, xscales[segment], xsums[segment]);
    }
    finish_rows(scales, acc);
}

/// As [`dot_nibbles`], of nibbles as they stand, but for segments with escapes.
#[inline(always)]
fn dot_in_place<I: Isa>(
    isa: I,
    tile: &RowTile<'_>,
    bias: u8,
    has_escapes: bool,
    scales: TileScales<'_>,
    x: &Activations,
    acc: &mut [f32; TILE_ROWS],
) {
    let TokenBlock { q, scales: xscales, sums: xsums, .. } = x.only();
    let steps = x.segment() / TILE_COLS;
    let range = |segment: usize| segment * steps..q.len().min((segment + 1) * steps);
    let lines = |segment: usize| &tile.lines[segment * steps / 2..tile.lines.len().min((segment + 1) * steps / 2)];
    // A segment with escapes is multiplied when the one behind it is patched: vectors that are loaded soon after bytes
    // were stored there wait for them.
    let mut patched = [const { Patched::new() }; 2];
    let (mut next, mut many) = (tile.escapes.as_ptr(), false);
    for turn in 0..=xscales.len() {
        let [own, before] = match &mut patched {
            [own, before] if turn % 2 == 0 => [own, before],
            [before, own] => [own, before],
        };
        if has_escapes && turn < xscales.len() {
            // SAFETY: `next` came from the row tile, whose lines are taken in order.
            unsafe { own.fill(isa, bias, lines(turn), range(turn).len(), &mut next, &mut many) };
        }
        let Some(segment) = turn.checked_sub(1) else {
            continue;
        };
        let (range, xsum) = (range(segment), xsums[segment]);
        let part = &q[range.clone()];
        let sums = match before.tiles() {
            Some(tiles) => {
                let dots = tiles.iter().zip(part).fold(isa.zero(), |dots, (tile, q)| isa.dot(dots, isa.load(tile), q));
                finish_far(isa, dots, xsum, 0, tile.far, &range, q)
            }
            None => {
                let (dots, more) = (dot_lines(isa, lines(segment), part), (i32::from(bias) - i32::from(SYMBOL_BIAS)) * xsum);
                match before.few() {
                    [] => finish_far(isa, dots, 0, more, tile.far, &range, q),
                    few => {
                        let mut isum = isa.finish(dots, 0).map(|sum| sum + more);
                        for &(step, lane, byte) in few {
                            let (row, col) = (usize::from(lane) / TILE_COLS, usize::from(lane) % TILE_COLS);
                            isum[row] += (i32::from(byte) - i32::from(bias)) * i32::from(part[usize::from(step)][col]);
                        }
                        patch_far(&mut isum, tile.far, &range, |step| &q[step]);
                        isa.floats_of(&isum)
                    }
                }
            }
        };
        SegmentScales::of(scales, segment).add_floats(isa, acc, sums, xscales[segment], xsum);
    }
    finish_rows(scales, acc);
}

/// Products of nibbles as they stand. `q`: of the lines' steps.
#[inline(always)]
fn dot_lines<I: Isa>(isa: I, lines: &[TileBytes], q: &[[i8; TILE_COLS]]) -> I::Sums {
    let (pairs, single) = q.as_chunks::<2>();
    let sums = isa.dot_lines(isa.zero(), lines, pairs);
    match single.first() {
        // The high half of an odd last line is not part of the matrix.
        Some(q) => isa.dot_lines(sums, &lines[pairs.len()..], &[[*q, [0; TILE_COLS]]]),
        None => sums,
    }
}

/// Escapes of a tile up to which no branch depends on them.
const ESCAPES_FEW: usize = 3;
/// Tiles of the longest segment, and one more, whose first byte is spare.
const PATCHED_TILES: usize = SEGMENT_COLS_MAX / TILE_COLS + 1;

/// Escapes of a segment that are added to its sums one by one.
const ADDED: usize = 6;

/// A segment of nibbles on its way through a product at a level where nothing spreads escapes: if it has more than a few they
/// are written byte by byte over its symbol bytes, which lie in the L1 cache.
struct Patched {
    /// The first `count` are symbol bytes.
    tiles: MaybeUninit<Tiles<PATCHED_TILES>>,
    count: usize,
    /// Step of the segment, lane and symbol byte of the first `few_count` escapes.
    few: [(u8, u8, u8); ADDED],
    few_count: usize,
}

impl Patched {
    const fn new() -> Patched {
        Patched { tiles: MaybeUninit::uninit(), count: 0, few: [(0, 0, 0); ADDED], few_count: 0 }
    }

    /// Takes the next segment's lines, of `steps` steps, if they have escapes. `many`: whether the last segment that had any
    /// had more than [`ADDED`]; looking for a few is then in vain mostly, and expensive, as it branches.
    ///
    /// # Safety
    /// `next` must come from [`RowTile::escapes`], and all lines of that row tile be taken in order: then as many bytes as
    /// are taken, and 64 more, are readable.
    #[inline(always)]
    unsafe fn fill<I: Isa>(&mut self, isa: I, bias: u8, lines: &[TileBytes], steps: usize, next: &mut *const u8, many: &mut bool) {
        assert!(steps < PATCHED_TILES);
        (self.count, self.few_count) = (0, 0);
        // Beside escapes it is the high half of an odd last line, which is not part of the matrix.
        if !isa.any_zero_nibble(lines) {
            return;
        }
        if !*many {
            // SAFETY: by the contract.
            if unsafe { self.take_few(isa, lines, steps, *next) } {
                // SAFETY: as above.
                *next = unsafe { next.add(self.few_count) };
                return;
            }
            self.few_count = 0;
        }
        let start = *next;
        let bias = isa.splat(bias);
        for (i, line) in lines.iter().enumerate() {
            let line = isa.load(line);
            let (zeros, tiles) = (isa.zero_nibbles(line), [isa.low(line, bias), isa.high(line, bias)]);
            for half in 0..2 {
                if 2 * i + half == steps {
                    break;
                }
                // SAFETY: as asserted there is a tile behind this one, which is stored later or spare. Escapes are read by
                // the contract.
                unsafe {
                    let out = self.tiles.as_mut_ptr().cast::<TileBytes>().add(2 * i + half);
                    isa.store(tiles[half], &mut *out);
                    patch::<ESCAPES_FEW>(out.cast(), zeros[half], *next, true);
                    *next = next.add(zeros[half].count_ones() as usize);
                }
            }
        }
        *many = next.addr() - start.addr() > ADDED;
        self.count = steps;
    }

    /// Takes the escapes if they are at most [`ADDED`]; if not, false.
    ///
    /// # Safety
    /// As [`Patched::fill`], whose `next` is `escapes`.
    #[inline(always)]
    unsafe fn take_few<I: Isa>(&mut self, isa: I, lines: &[TileBytes], steps: usize, escapes: *const u8) -> bool {
        for (i, line) in lines.iter().enumerate() {
            let zeros = isa.zero_nibbles(isa.load(line));
            for (half, mut lanes) in zeros.into_iter().enumerate().take(steps - 2 * i) {
                while lanes != 0 {
                    if self.few_count == ADDED {
                        return false;
                    }
                    // SAFETY: by the contract.
                    let byte = unsafe { *escapes.add(self.few_count) };
                    // Steps of a segment are at most 128, lanes 64.
                    self.few[self.few_count] = ((2 * i + half) as u8, lanes.trailing_zeros() as u8, byte);
                    self.few_count += 1;
                    lanes &= lanes - 1;
                }
            }
        }
        true
    }

    /// The escapes of the segment, if there are a few.
    #[inline(always)]
    fn few(&self) -> &[(u8, u8, u8)] {
        &self.few[..self.few_count]
    }

    /// The symbol bytes of the segment, if it has more than a few.
    #[inline(always)]
    fn tiles(&self) -> Option<&[TileBytes]> {
        // SAFETY: so many were stored.
        (self.count > 0).then(|| unsafe { std::slice::from_raw_parts(self.tiles.as_ptr().cast(), self.count) })
    }
}

/// One row of the matrix as reals, for an embedding: `out[c] = scale * symbol`, and for affine
/// scales `scale * (symbol + 8) + bias`.
///
/// `out`: (cols).
///
/// # Errors
/// A row or a length outside the matrix; a corrupt chunk.
pub fn read_row(level: Level, matrix: Matrix<'_>, scales: &KernelScales, row: usize, out: &mut [f32]) -> Result<(), KernelError> {
    let shape = |what, expected, found| {
        if expected == found { Ok(()) } else { Err(KernelError::Shape { job: 0, what, expected, found }) }
    };
    shape("the length of out", matrix.cols(), out.len())?;
    shape("the number of rows with scales", matrix.rows(), scales.rows())?;
    shape("the number of columns with scales", matrix.cols(), scales.cols())?;
    if row >= matrix.rows() {
        return Err(KernelError::Shape { job: 0, what: "the row, counted from 1,", expected: matrix.rows(), found: row + 1 });
    }
    let (row_tile, lane, scale) = (row / TILE_ROWS, row % TILE_ROWS * TILE_COLS, scales.of_row(row));
    let weight = |col: usize, symbol: i16| match scale {
        Some(scale) => scale * f32::from(symbol),
        None => scales.weight(row, col, symbol),
    };
    // Symbol bytes from a column on, of which the last may be beyond the row. By `weight` for both it would take twice as long: no vectors.
    let put = |out: &mut [f32], col: usize, bytes: &[u8]| match scale {
        Some(scale) => bytes.iter().zip(&mut out[col..]).for_each(|(&byte, out)| *out = scale * f32::from(i16::from(byte) - 128)),
        None => bytes.iter().zip(col..).zip(&mut out[col..]).for_each(|((&byte, col), out)| *out = weight(col, i16::from(byte) - 128)),
    };
    with_scratch(|scratch| {
        let Scratch { bytes, pairs, far, .. } = scratch;
        let (tiles, far): (&[TileBytes], &[FarAt]) = match matrix {
            Matrix::Coded(tensor) => {
                let per_chunk = tensor.chunk_row_tiles(0).len();
                let chunk = row_tile / per_chunk;
                let symbols = tensor.chunk_symbols(chunk);
                bytes.ensure(symbols);
                decode_chunks(level, tensor, chunk..chunk + 1, pairs, &mut bytes[..symbols], far).map_err(KernelError::corrupt)?;
                let tiles = bytes[..symbols].as_chunks().0;
                (&tiles[row_tile % per_chunk * tensor.col_steps()..][..tensor.col_steps()], far_of(far, row_tile))
            }
            Matrix::Decoded(decoded) => {
                let tile = decoded.row_tile(row_tile);
                match tile.form {
                    Form::Bytes => (tile.lines, tile.far),
                    // Where no field is an escape, other rows need not be looked at.
                    Form::Nibbles { bias, escapes: false } => {
                        let symbols = tile.lines.len() * 2 * TILE_COLS;
                        bytes.ensure(symbols);
                        for (line, pair) in tile.lines.iter().zip(bytes.as_chunks_mut::<{ 2 * TILE_COLS }>().0) {
                            let fields: &[u8; TILE_COLS] = line[lane..].first_chunk().expect("a row's fields");
                            *pair = std::array::from_fn(|i| (fields[i % TILE_COLS] >> (i / TILE_COLS * 4) & 15).wrapping_add(bias));
                        }
                        put(out, 0, &bytes[..symbols]);
                        (&[], tile.far)
                    }
                    Form::Nibbles { .. } => {
                        let symbols = decoded.col_steps() * TILE_SYMBOLS;
                        bytes.ensure(symbols);
                        let tiles = bytes[..symbols].as_chunks_mut().0;
                        expand(level, &tile, tiles);
                        (tiles, tile.far)
                    }
                }
            }
        };
        for (step, tile) in tiles.iter().enumerate() {
            put(out, step * TILE_COLS, &tile[lane..lane + TILE_COLS]);
        }
        for f in far {
            let (step, position) = (f.position as usize / TILE_SYMBOLS, f.position as usize % TILE_SYMBOLS);
            if let Some(i) = position.checked_sub(lane).filter(|&i| i < TILE_COLS)
                && let Some(out) = out.get_mut(step * TILE_COLS + i)
            {
                *out = weight(step * TILE_COLS + i, f.symbol);
            }
        }
        Ok(())
    })
}
