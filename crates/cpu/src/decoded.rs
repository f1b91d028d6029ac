//! The decoded form: what `cached`, `prefetch` and `lru` keep.
//!
//! ```text
//! fields    a row tile's lines, 64 bytes each, one row tile behind the other.
//!           8 bits: line i holds column step i as symbol bytes.
//!           4 bits: line i holds step 2i in its low and step 2i + 1 in its high nibbles (0 beyond
//!           the last step).
//! escapes   only with 4 bits and escape (field 0; otherwise symbol = field - 8): the bytes of the
//!           symbols without a field value, in symbol order within a row tile. The row tiles of a
//!           chunk follow each other; chunks lie in the order in which threads finished them.
//! offsets   where each row tile's escapes begin.
//! far       symbols outside -127..=127, sorted; their symbol byte is 0.
//! ```

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use tersor_codec::PADDING_BYTES;
use tersor_format::{CodedTensor, DecodedForm};

use crate::buffer::AlignedBytes;
use crate::error::FirstError;
#[cfg(target_arch = "x86_64")]
use crate::isa::streams::{self, Lines};
use crate::isa::{Isa, TileBytes, per_isa, prefetch};
#[cfg(target_arch = "x86_64")]
use crate::source::RansKernel;
use crate::source::{FarAt, Scratch, chunks_together, decode_chunks, far_of, symbols_of, with_scratch};
use crate::{KernelError, Level, Pool, SharedOut, TILE_SYMBOLS, rans_pairs, tiered};

/// A decoded matrix, or a buffer for one. Only [`decode_into`] fills it, so its parts agree with
/// each other.
#[derive(Default)]
pub struct Decoded {
    rows: usize,
    cols: usize,
    row_tiles: usize,
    col_steps: usize,
    form: Form,
    fields: AlignedBytes,
    escapes: AlignedBytes,
    escape_count: usize,
    offsets: Vec<u32>,
    far: Vec<FarAt>,
}

/// How bytes of `fields` become symbol bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Form {
    /// Symbol bytes.
    #[default]
    Bytes,
    /// `symbol byte = field + bias`, and with `escapes` field 0 is an escape.
    Nibbles { bias: u8, escapes: bool },
}

/// Field 0 of the form with escapes is the symbol -8, so the symbol byte 120.
const ESCAPED_BIAS: u8 = 120;

impl Form {
    pub(crate) fn of(form: DecodedForm) -> Form {
        match form {
            DecodedForm { bits: 4, has_escape: true, .. } => Form::Nibbles { bias: ESCAPED_BIAS, escapes: true },
            // The smallest symbol is above -128 in this form, and the largest below 127.
            DecodedForm { bits: 4, base, .. } => Form::Nibbles { bias: (base + 128) as u8, escapes: false },
            _ => Form::Bytes,
        }
    }

    /// Lines of 64 bytes in a row tile.
    pub(crate) fn lines(self, col_steps: usize) -> usize {
        match self {
            Form::Bytes => col_steps,
            Form::Nibbles { .. } => col_steps.div_ceil(2),
        }
    }
}

/// What a kernel reads of one row tile. Only [`Decoded`] makes one, so that a kernel may trust its escapes.
#[derive(Clone, Copy)]
pub(crate) struct RowTile<'a> {
    pub form: Form,
    pub lines: &'a [TileBytes],
    pub far: &'a [FarAt],
    /// The row tile's escapes and all that follow: as many bytes as the row tile has fields of 0,
    /// and [`PADDING_BYTES`] more, are there, because [`decode_into`] wrote both.
    pub escapes: &'a [u8],
}

impl Decoded {
    /// An empty buffer; [`decode_into`] makes it as large as it must be.
    pub fn new() -> Decoded {
        Decoded::default()
    }

    /// Makes room for `tensor`, so that decoding it does not allocate (but for far symbols, which
    /// are rare). For a buffer that serves several tensors, call it with each.
    pub fn reserve(&mut self, tensor: &CodedTensor) {
        let form = Form::of(tensor.decoded_form());
        self.fields.ensure(tensor.row_tiles() * form.lines(tensor.col_steps()) * TILE_SYMBOLS);
        self.escapes.ensure(escape_capacity(tensor, form) + PADDING_BYTES);
        if let Some(more) = tensor.row_tiles().checked_sub(self.offsets.len()) {
            self.offsets.reserve(more);
        }
    }

    /// Rows; 0 if it holds no matrix.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns; 0 if it holds no matrix.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of the matrix it holds: fields, escapes, offsets, far symbols.
    pub fn bytes(&self) -> u64 {
        let fields = self.row_tiles * self.form.lines(self.col_steps) * TILE_SYMBOLS;
        (fields + self.escape_count + size_of_val(&self.offsets[..]) + size_of_val(&self.far[..])) as u64
    }

    /// Bytes of its buffers, whatever they hold.
    pub fn capacity_bytes(&self) -> u64 {
        let offsets = self.offsets.capacity() * size_of::<u32>();
        let far = self.far.capacity() * size_of::<FarAt>();
        (self.fields.len() + self.escapes.len() + offsets + far) as u64
    }

    pub(crate) fn row_tiles(&self) -> usize {
        self.row_tiles
    }

    pub(crate) fn col_steps(&self) -> usize {
        self.col_steps
    }

    pub(crate) fn row_tile(&self, row_tile: usize) -> RowTile<'_> {
        let lines = self.form.lines(self.col_steps);
        RowTile {
            form: self.form,
            lines: &self.fields.as_chunks().0[row_tile * lines..][..lines],
            far: far_of(&self.far, row_tile),
            escapes: &self.escapes[self.offsets[row_tile] as usize..],
        }
    }
}

impl std::fmt::Debug for Decoded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoded")
            .field("rows", &self.rows)
            .field("cols", &self.cols)
            .field("form", &self.form)
            .field("bytes", &self.bytes())
            .finish_non_exhaustive()
    }
}

/// Escape bytes that the tensor's header announces.
fn escape_capacity(tensor: &CodedTensor, form: Form) -> usize {
    match form {
        Form::Nibbles { escapes: true, .. } => tensor.header().wide_count as usize,
        _ => 0,
    }
}

/// Decodes a tensor into `out`, reusing its buffers.
///
/// # Errors
/// Corrupt chunks, and symbols that contradict the header. `out` then holds no matrix.
pub fn decode_into(level: Level, tensor: &CodedTensor, out: &mut Decoded, pool: Option<&Pool>) -> Result<(), KernelError> {
    out.reserve(tensor);
    let form = Form::of(tensor.decoded_form());
    (out.rows, out.cols, out.row_tiles, out.col_steps) = (0, 0, 0, 0);
    (out.form, out.escape_count) = (form, 0);
    out.far.clear();
    out.offsets.clear();
    out.offsets.resize(tensor.row_tiles(), 0);
    let store = Store {
        level,
        tensor,
        form,
        fields: SharedOut::new(&mut out.fields),
        escapes: SharedOut::new(&mut out.escapes),
        escape_capacity: escape_capacity(tensor, form),
        escapes_taken: AtomicUsize::new(0),
        offsets: SharedOut::new(&mut out.offsets),
        far: Mutex::new(&mut out.far),
    };
    let errors = FirstError::default();
    for_chunks(tensor, pool, &|chunks| {
        if let Err(e) = store.run(chunks) {
            errors.report(e);
        }
    });
    errors.into_result()?;
    let (expected, found) = (store.escape_capacity, store.escapes_taken.into_inner());
    if found != expected {
        return Err(KernelError::WideSymbolsMissing { expected, found });
    }
    out.escape_count = found;
    out.far.sort_unstable();
    (out.rows, out.cols, out.row_tiles, out.col_steps) = (tensor.rows(), tensor.cols(), tensor.row_tiles(), tensor.col_steps());
    Ok(())
}

/// Decodes a tensor to symbol bytes (symbol + 128; far symbols are 0), in the format's symbol
/// order: row tiles, column steps, lanes.
///
/// `out`: (row tiles, column steps, 64).
///
/// # Errors
/// A wrong length, or corrupt chunks.
pub fn decode_bytes(level: Level, tensor: &CodedTensor, out: &mut [u8], pool: Option<&Pool>) -> Result<(), KernelError> {
    let expected = tensor.row_tiles() * tensor.col_steps() * TILE_SYMBOLS;
    if out.len() != expected {
        return Err(KernelError::Shape { job: 0, what: "the length of out", expected, found: out.len() });
    }
    let out = SharedOut::new(out);
    let errors = FirstError::default();
    for_chunks(tensor, pool, &|chunks| {
        let row_tile_bytes = tensor.col_steps() * TILE_SYMBOLS;
        let first = tensor.chunk_row_tiles(chunks.start).start;
        with_scratch(|scratch| {
            // SAFETY: each task has its own chunks, and so its own part of the output.
            let out = unsafe { out.slice(first * row_tile_bytes, symbols_of(tensor, &chunks)) };
            if let Err(corrupt) = decode_chunks(level, tensor, chunks, &mut scratch.pairs, out, &mut scratch.far) {
                errors.report(KernelError::corrupt(corrupt));
            }
        });
    });
    errors.into_result()
}

/// Runs `body` over all chunks, in runs that one task decodes together.
fn for_chunks(tensor: &CodedTensor, pool: Option<&Pool>, body: &(dyn Fn(Range<usize>) + Sync)) {
    let together = chunks_together(tensor.table());
    let tasks = tensor.chunk_count().div_ceil(together);
    let task = |task: usize| body(task * together..tensor.chunk_count().min((task + 1) * together));
    match pool {
        Some(pool) => pool.run(tasks, &task),
        None => (0..tasks).for_each(task),
    }
}

/// The sink that keeps: symbol bytes go to the decoded form.
struct Store<'a> {
    level: Level,
    tensor: &'a CodedTensor,
    form: Form,
    fields: SharedOut<'a, u8>,
    escapes: SharedOut<'a, u8>,
    escape_capacity: usize,
    escapes_taken: AtomicUsize,
    offsets: SharedOut<'a, u32>,
    far: Mutex<&'a mut Vec<FarAt>>,
}

impl Store<'_> {
    fn run(&self, chunks: Range<usize>) -> Result<(), KernelError> {
        let steps = self.tensor.col_steps();
        let row_tile_bytes = self.form.lines(steps) * TILE_SYMBOLS;
        let symbols = symbols_of(self.tensor, &chunks);
        let row_tiles = self.tensor.chunk_row_tiles(chunks.start).start..self.tensor.chunk_row_tiles(chunks.end - 1).end;
        with_scratch(|scratch| {
            // SAFETY: each task has its own row tiles, and so its own part of the fields and of the
            // offsets.
            let (fields, offsets) = unsafe {
                (
                    self.fields.slice(row_tiles.start * row_tile_bytes, row_tiles.len() * row_tile_bytes),
                    self.offsets.slice(row_tiles.start, row_tiles.len()),
                )
            };
            let Form::Nibbles { bias, escapes } = self.form else {
                decode_chunks(self.level, self.tensor, chunks, &mut scratch.pairs, fields, &mut scratch.far)
                    .map_err(KernelError::corrupt)?;
                return self.keep_far(&scratch.far);
            };
            scratch.escapes.ensure(symbols + TILE_SYMBOLS);
            scratch.far.clear();
            let lines = fields.as_chunks_mut().0;
            let taken = match self.lines(chunks.clone(), bias, escapes, lines, offsets, scratch) {
                Some(taken) => taken,
                None => self.narrow(chunks, bias, escapes, lines, offsets, scratch)?,
            };
            let start = self.escapes_taken.fetch_add(taken, Ordering::Relaxed);
            if start + taken > self.escape_capacity {
                return Err(KernelError::WideSymbolsExceed { expected: self.escape_capacity, at_least: start + taken });
            }
            // SAFETY: the range was just taken from the counter, so no other task has it.
            unsafe { self.escapes.slice(start, taken) }.copy_from_slice(&scratch.escapes[..taken]);
            for offset in offsets {
                *offset += start as u32;
            }
            self.keep_far(&scratch.far)
        })
    }

    /// As [`Store::narrow`], by a kernel that writes lines. `None` if there is none or it gave up.
    fn lines(
        &self,
        chunks: Range<usize>,
        bias: u8,
        escapes: bool,
        lines: &mut [TileBytes],
        offsets: &mut [u32],
        scratch: &mut Scratch,
    ) -> Option<usize> {
        let Scratch { pairs, far, escapes: escaped, .. } = scratch;
        #[cfg(target_arch = "x86_64")]
        if let Some(kernel) = RansKernel::new(self.level, self.tensor.table()) {
            return streams::decode_lines(kernel.get(), self.tensor, chunks, Lines { bias, escapes, lines, offsets, escaped });
        }
        match rans_pairs::Chunks::new(self.level, self.tensor) {
            Some(kernel) => kernel.decode_lines(chunks, pairs, bias, escapes, lines, offsets, escaped, far),
            None => tiered::decode_lines(self.level, self.tensor, chunks, pairs, bias, escapes, lines, offsets, escaped, far),
        }
    }

    /// Decodes chunks to symbol bytes, and packs these; returns how many escapes there are, in `scratch`.
    fn narrow(
        &self,
        chunks: Range<usize>,
        bias: u8,
        escapes: bool,
        lines: &mut [TileBytes],
        offsets: &mut [u32],
        scratch: &mut Scratch,
    ) -> Result<usize, KernelError> {
        let Scratch { bytes, pairs, far, escapes: escaped, .. } = scratch;
        let (steps, symbols) = (self.tensor.col_steps(), symbols_of(self.tensor, &chunks));
        bytes.ensure(symbols);
        let bytes = &mut bytes[..symbols];
        decode_chunks(self.level, self.tensor, chunks.clone(), pairs, bytes, far).map_err(KernelError::corrupt)?;
        let mut taken = 0;
        let tiles: &[TileBytes] = bytes.as_chunks().0;
        let row_tiles = lines.chunks_exact_mut(self.form.lines(steps)).zip(offsets).zip(tiles.chunks_exact(steps));
        for (i, ((lines, offset), tiles)) in row_tiles.enumerate() {
            // At most 2^32 symbols, of which fewer are wide.
            *offset = taken as u32;
            taken += narrow_row_tile(self.level, tiles, bias, u8::from(escapes), lines, &mut escaped[taken..]);
            if !escapes && taken > 0 {
                let chunk = chunks.start + i / self.tensor.chunk_row_tiles(chunks.start).len();
                return Err(KernelError::OutOfRange { chunk, found: taken });
            }
        }
        Ok(taken)
    }

    fn keep_far(&self, far: &[FarAt]) -> Result<(), KernelError> {
        if !far.is_empty() {
            self.far.lock().unwrap_or_else(|e| e.into_inner()).extend_from_slice(far);
        }
        Ok(())
    }
}

/// How far ahead of the lines of nibbles the memory is told what will be written.
pub(crate) const LINES_AHEAD_BYTES: usize = 2048;

per_isa! {
    /// Packs one row tile's symbol bytes, (steps), into lines of fields and escape bytes; returns
    /// how many of the latter. `escapes` has room for as many as there are symbols, and 64 more.
    pub(crate) fn narrow_row_tile(isa; tiles: &[TileBytes], bias: u8, lowest: u8, lines: &mut [TileBytes], escapes: &mut [u8]) -> usize {
        narrow_tiles(isa, tiles, bias, lowest, lines, escapes)
    }
}

/// As [`narrow_row_tile`], of some tiles of a row tile, of which the first begins a line.
#[inline(always)]
pub(crate) fn narrow_tiles<I: Isa>(
    isa: I,
    tiles: &[TileBytes],
    bias: u8,
    lowest: u8,
    lines: &mut [TileBytes],
    escapes: &mut [u8],
) -> usize {
    assert!(escapes.len() >= (tiles.len() + 1) * TILE_SYMBOLS);
    let (bias, lowest, zero) = (isa.splat(bias), isa.splat(lowest), isa.splat(0));
    let mut next = escapes.as_mut_ptr();
    let (pairs, single) = tiles.as_chunks::<2>();
    for ([low, high], line) in pairs.iter().zip(lines.iter_mut()) {
        // The memory under the lines is read before they are written.
        prefetch(line.as_ptr().wrapping_add(LINES_AHEAD_BYTES));
        // SAFETY: at most 64 bytes a tile were written before, so that 64 bytes are left, as
        // just asserted.
        let (low, high) =
            unsafe { (narrow(isa, isa.load(low), bias, lowest, &mut next), narrow(isa, isa.load(high), bias, lowest, &mut next)) };
        isa.store(isa.pair(low, high), line);
    }
    if let (Some(tile), Some(line)) = (single.first(), lines.last_mut()) {
        // SAFETY: as above.
        let low = unsafe { narrow(isa, isa.load(tile), bias, lowest, &mut next) };
        isa.store(isa.pair(low, zero), line);
    }
    next.addr() - escapes.as_ptr().addr()
}

/// Brings the escape bytes of chunks of `symbols` symbols together, each of which wrote where there is room for all its
/// symbols; returns how many there are. `taken`: by chunk, how many; `offsets`: of all their row tiles, counted by chunk.
pub(crate) fn join_escaped(symbols: usize, taken: &[usize], offsets: &mut [u32], escaped: &mut [u8]) -> usize {
    let row_tiles = offsets.len() / taken.len();
    let mut all = 0;
    for (i, (taken, offsets)) in taken.iter().zip(offsets.chunks_mut(row_tiles)).enumerate() {
        escaped.copy_within(i * symbols..i * symbols + taken, all);
        for offset in offsets {
            *offset += all as u32;
        }
        all += taken;
    }
    all
}

/// The fields of a tile of symbol bytes; those without a field go to `next`, which moves on.
///
/// # Safety
/// 64 bytes are writable at `next`.
#[inline(always)]
pub(crate) unsafe fn narrow<I: Isa>(isa: I, tile: I::Tile, bias: I::Tile, lowest: I::Tile, next: &mut *mut u8) -> I::Tile {
    let (field, wide) = isa.narrow(tile, bias, lowest);
    // SAFETY: by the contract.
    unsafe {
        isa.compress(tile, wide, *next);
        *next = next.add(wide.count_ones() as usize);
    }
    field
}

per_isa! {
    /// Symbol bytes of one row tile of nibbles, (steps).
    fn expand_nibbles(isa; tile: &RowTile<'_>, bias: u8, has_escapes: bool, out: &mut [TileBytes]) {
        let bias = isa.splat(bias);
        let mut next = tile.escapes.as_ptr();
        for (line, pair) in tile.lines.iter().zip(out.chunks_mut(2)) {
            let line = isa.load(line);
            let (mut low, mut high) = (isa.low(line, bias), isa.high(line, bias));
            if has_escapes {
                // SAFETY: `next` came from the row tile and takes one byte for each field of 0.
                low = unsafe { unescape(isa, low, bias, &mut next) };
            }
            isa.store(low, &mut pair[0]);
            // The high half of an odd last line is not part of the matrix.
            if let Some(out) = pair.get_mut(1) {
                if has_escapes {
                    // SAFETY: as above.
                    high = unsafe { unescape(isa, high, bias, &mut next) };
                }
                isa.store(high, out);
            }
        }
    }
}

/// Replaces the fields of 0 of a tile by the next escapes. (Not a closure: the compiler would not
/// inline intrinsics into it.)
///
/// # Safety
/// `next` must come from [`RowTile::escapes`] and be passed on through all tiles of that row tile
/// in order: then as many bytes as are taken, and 64 more, are readable.
#[inline(always)]
pub(crate) unsafe fn unescape<I: Isa>(isa: I, tile: I::Tile, bias: I::Tile, next: &mut *const u8) -> I::Tile {
    // SAFETY: `decode_into` wrote one escape for each field of 0, and 64 bytes lie behind the last.
    unsafe {
        let (whole, taken) = isa.unescape(tile, bias, *next);
        *next = next.add(taken);
        whole
    }
}

/// Symbol bytes of one row tile, (steps); far symbols are 0.
pub(crate) fn expand(level: Level, tile: &RowTile<'_>, out: &mut [TileBytes]) {
    match tile.form {
        Form::Bytes => out.copy_from_slice(tile.lines),
        Form::Nibbles { bias, escapes } => expand_nibbles(level, tile, bias, escapes, out),
    }
}
