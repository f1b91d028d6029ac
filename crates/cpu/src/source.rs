//! From chunks to symbol bytes, by the fastest way there is for a codec and level, with the codec's
//! own decoder behind all of them.
//!
//! A fast way may give up on a chunk (far symbols, a shape it was not made for, bytes that do not
//! decode) and say no more than that: the chunk then goes to the codec's decoder, which knows the
//! exact error. So there is one authority on what is valid.

use std::ops::Range;

use tersor_codec::{DecodeError, FarList, PADDING_BYTES, Table, decode_chunk_bytes, fixed, rans};
use tersor_format::CodedTensor;

use crate::buffer::AlignedBytes;
use crate::isa::{Isa, TileBytes, per_isa, prefetch_far};
#[cfg(target_arch = "x86_64")]
use crate::isa::{avx2_rans, avx512_block_ans, avx512_rans, avx512_rans_precise, streams, streams::Kernel};
use crate::pairs::PairBuffers;
use crate::{Level, TILE_ROWS, TILE_SYMBOLS, planes, rans_pairs, tiered};

/// A far symbol: its byte is 0, which the kernels read as the symbol -128.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct FarAt {
    /// Row tile in the tensor.
    pub row_tile: u32,
    /// Position in the row tile: `step * 64 + lane`.
    pub position: u32,
    pub symbol: i16,
}

impl FarAt {
    /// The far symbols of a chunk.
    pub(crate) fn of_chunk<'a>(tensor: &CodedTensor, chunk: usize, list: FarList<'a>) -> impl Iterator<Item = FarAt> + use<'a> {
        let (first, row_tile_symbols) = (tensor.chunk_row_tiles(chunk).start, tensor.col_steps() * TILE_SYMBOLS);
        list.iter().map(move |far| {
            let position = far.position as usize;
            // Row tiles are at most 2^20 and a row tile has at most 2^28 symbols: the format's limits.
            FarAt {
                row_tile: (first + position / row_tile_symbols) as u32,
                position: (position % row_tile_symbols) as u32,
                symbol: far.symbol,
            }
        })
    }
}

/// The far symbols of one row tile, of a list sorted by row tile.
pub(crate) fn far_of(far: &[FarAt], row_tile: usize) -> &[FarAt] {
    if far.is_empty() {
        return far;
    }
    let start = far.partition_point(|f| (f.row_tile as usize) < row_tile);
    let end = far.partition_point(|f| f.row_tile as usize <= row_tile);
    &far[start..end]
}

/// Buffers that a thread keeps between tasks.
#[derive(Default)]
pub(crate) struct Scratch {
    /// Symbol bytes of the task's chunks, or of one row tile.
    pub bytes: AlignedBytes,
    /// Escape bytes of the task's chunks on their way to the decoded form.
    pub escapes: AlignedBytes,
    pub pairs: PairBuffers,
    pub far: Vec<FarAt>,
    /// (tokens, 16): results of one row tile.
    pub sums: Vec<[f32; TILE_ROWS]>,
}

thread_local! {
    static SCRATCH: std::cell::RefCell<Scratch> = std::cell::RefCell::default();
}

/// Lends the thread's scratch buffers. Tasks do not nest, so they are never lent twice at once.
pub(crate) fn with_scratch<R>(f: impl FnOnce(&mut Scratch) -> R) -> R {
    SCRATCH.with_borrow_mut(f)
}

/// Most chunks that a kernel takes side by side.
pub(crate) const STREAMS_MAX: usize = 6;

/// Chunks that one task decodes together at most, what hides the latency of one stream behind the others: as many as the widest kernel for
/// the table takes at once.
pub(crate) fn chunks_together(table: &Table) -> usize {
    match table {
        Table::Rans(table) if matches!(table.params(), rans::Params { state_bits: 16, prob_bits: 6..=7, .. }) => STREAMS_MAX,
        Table::RansPairs(_) => STREAMS_MAX,
        _ => 4,
    }
}

/// Symbols of consecutive chunks.
pub(crate) fn symbols_of(tensor: &CodedTensor, chunks: &Range<usize>) -> usize {
    chunks.clone().map(|c| tensor.chunk_symbols(c)).sum()
}

/// Consecutive chunks in groups of at most `width` and of equal size: all but a shorter last one go together.
pub(crate) fn equal_chunks(tensor: &CodedTensor, chunks: Range<usize>, width: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let equal = match chunks.clone().next_back() {
        Some(last) if tensor.chunk_symbols(last) != tensor.chunk_symbols(chunks.start) => last,
        _ => chunks.end,
    };
    let mut first = chunks.start;
    std::iter::from_fn(move || {
        let end = if first < equal { equal.min(first + width) } else { chunks.end };
        let group = first..end;
        first = end;
        (!group.is_empty()).then_some(group)
    })
}

/// Decodes at most [`chunks_together`] consecutive chunks to symbol bytes, one chunk behind the
/// other in `out`, and their far symbols, sorted.
///
/// The error names the first chunk that does not decode.
pub(crate) fn decode_chunks(
    level: Level,
    tensor: &CodedTensor,
    chunks: Range<usize>,
    buffers: &mut PairBuffers,
    out: &mut [u8],
    far: &mut Vec<FarAt>,
) -> Result<(), (usize, DecodeError)> {
    far.clear();
    #[cfg(target_arch = "x86_64")]
    if let (Level::Avx512(token), Table::BlockAns(table)) = (level, tensor.table())
        && let Some(kernel) = avx512_block_ans::Tables::new(token, table)
    {
        if kernel.decode(tensor, chunks.clone(), out, far) {
            return Ok(());
        }
        far.clear();
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(kernel) = RansKernel::new(level, tensor.table()) {
        if streams::decode(kernel.get(), tensor, chunks.clone(), out, far) {
            return Ok(());
        }
        far.clear();
    }
    if let Some(pairs) = rans_pairs::Chunks::new(level, tensor) {
        if pairs.decode(chunks.clone(), buffers, out, far) {
            return Ok(());
        }
        far.clear();
    }
    let mut rest = out;
    for chunk in chunks {
        let (bytes, after) = rest.split_at_mut(tensor.chunk_symbols(chunk));
        let known = far.len();
        if !decode_fast(level, tensor, chunk, buffers, bytes, far) {
            far.truncate(known);
            decode_by_codec(tensor, chunk, bytes, far).map_err(|e| (chunk, e))?;
        }
        rest = after;
    }
    Ok(())
}

/// A kernel for `rans`, with a table's slots as it wants them.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::large_enum_variant)] // One lives on the stack while chunks are decoded; a box would allocate in every task.
pub(crate) enum RansKernel {
    Avx2(avx2_rans::Tables),
    Avx512(avx512_rans::Tables),
    Avx512Precise(avx512_rans_precise::Tables),
}

#[cfg(target_arch = "x86_64")]
impl RansKernel {
    /// `None` if none was made for the level and table.
    pub(crate) fn new(level: Level, table: &Table) -> Option<RansKernel> {
        let Table::Rans(table) = table else {
            return None;
        };
        match level {
            Level::Avx2(token) => avx2_rans::Tables::new(token, table).map(RansKernel::Avx2),
            Level::Avx512(token) if table.params().state_bits == 16 => avx512_rans::Tables::new(token, table).map(RansKernel::Avx512),
            Level::Avx512(token) => avx512_rans_precise::Tables::new(token, table).map(RansKernel::Avx512Precise),
            Level::Scalar => None,
        }
    }

    pub(crate) fn get(&self) -> &dyn Kernel {
        match self {
            RansKernel::Avx2(tables) => tables,
            RansKernel::Avx512(tables) => tables,
            RansKernel::Avx512Precise(tables) => tables,
        }
    }
}

/// A part of a chunk together with the [`PADDING_BYTES`] readable bytes behind it. `padded`: the
/// chunk and the bytes behind it.
pub(crate) fn with_padding<'a>(padded: &'a [u8], part: &[u8]) -> &'a [u8] {
    let start = part.as_ptr().addr() - padded.as_ptr().addr();
    &padded[start..start + part.len() + PADDING_BYTES]
}

/// Adds a chunk's far symbols to `far`. False if they do not fit its symbol bytes: each far symbol
/// has a byte 0 at its position, and `escapes` have no others.
pub(crate) fn take_far(tensor: &CodedTensor, chunk: usize, list: FarList<'_>, escapes: &[u8], bytes: &[u8], far: &mut Vec<FarAt>) -> bool {
    far.extend(FarAt::of_chunk(tensor, chunk, list));
    count_zeros(escapes) == list.len() && list.iter().all(|f| bytes[f.position as usize] == 0)
}

/// Escape bytes of far symbols.
pub(crate) fn count_zeros(escapes: &[u8]) -> usize {
    escapes.iter().filter(|b| **b == 0).count()
}

/// Decodes a chunk for which there is a kernel that takes one at a time. False if there is none, or it does not decode: `out` and
/// `far` may then have changed.
fn decode_fast(level: Level, tensor: &CodedTensor, chunk: usize, buffers: &mut PairBuffers, out: &mut [u8], far: &mut Vec<FarAt>) -> bool {
    match tensor.table() {
        Table::Fixed(table) => decode_nibbles(level, table, tensor, chunk, out, far),
        Table::Tiered(_) => tiered::decode(level, tensor, chunk, buffers, out, far),
        table => planes::table(table).is_some_and(|table| planes::decode(level, table, tensor, chunk, out, far)),
    }
}

/// As [`decode_fast`], of `fixed/b4`.
///
/// Lines fetched 64 KiB ahead make the product from memory 1.2 to 1.7 times as fast on Zen 5 (26 G weights/s for 22 at 2.25 bits of
/// entropy, 24 for 14 at 3.7), but at 2.25 bits 6 % slower from the cache.
fn decode_nibbles(level: Level, table: &fixed::Table, tensor: &CodedTensor, chunk: usize, out: &mut [u8], far: &mut Vec<FarAt>) -> bool {
    let params = table.params();
    let padded = tensor.chunk_with_padding(chunk);
    let bytes = &padded[..padded.len() - PADDING_BYTES];
    let Ok(parts) = fixed::Chunk::parse(params, out.len(), bytes) else {
        return false;
    };
    if params.bits != 4 {
        return false;
    }
    let bias = (table.base() + 128 - i16::from(table.has_escape())) as u8;
    let escapes = with_padding(padded, parts.escapes);
    let (lines, tiles) = (parts.fields.as_chunks().0, out.as_chunks_mut().0);
    unpack_nibbles(level, lines, bias, table.has_escape(), escapes, tiles) && take_far(tensor, chunk, parts.far, parts.escapes, out, far)
}

/// How far ahead of the lines of a chunk of nibbles the memory is told what comes: two chunks, for their symbols are used in between.
const LINES_AHEAD_BYTES: usize = 65_536;

per_isa! {
    /// Symbol bytes of a chunk of nibbles. `escapes`: with [`PADDING_BYTES`] behind them. False if
    /// escapes are left or missing, or nibbles beyond the last tile are not 0.
    fn unpack_nibbles(isa; lines: &[TileBytes], bias: u8, has_escapes: bool, escapes: &[u8], out: &mut [TileBytes]) -> bool {
        let bias = isa.splat(bias);
        let end = escapes.len() - PADDING_BYTES;
        let mut taken = 0;
        for (line, pair) in lines.iter().zip(out.chunks_mut(2)) {
            if pair.len() == 1 && line.iter().any(|b| b >> 4 != 0) {
                return false;
            }
            prefetch_far(line.as_ptr().wrapping_add(LINES_AHEAD_BYTES));
            let line = isa.load(line);
            let (mut low, mut high) = (isa.low(line, bias), isa.high(line, bias));
            if has_escapes {
                // SAFETY: reads begin at the end of the escapes at most, behind which 64 bytes are
                // readable.
                low = unsafe { unescape(isa, low, bias, escapes, end, &mut taken) };
            }
            isa.store(low, &mut pair[0]);
            if let Some(out) = pair.get_mut(1) {
                if has_escapes {
                    // SAFETY: as above.
                    high = unsafe { unescape(isa, high, bias, escapes, end, &mut taken) };
                }
                isa.store(high, out);
            }
        }
        taken == end
    }
}

/// Replaces the fields of 0 of a tile by escapes from `taken` on, or by anything beyond their end.
///
/// # Safety
/// `escapes` has 64 bytes from `end` on.
#[inline(always)]
unsafe fn unescape<I: Isa>(isa: I, tile: I::Tile, bias: I::Tile, escapes: &[u8], end: usize, taken: &mut usize) -> I::Tile {
    // SAFETY: by the contract.
    let (tile, more) = unsafe { isa.unescape(tile, bias, escapes.as_ptr().add((*taken).min(end))) };
    *taken += more;
    tile
}

fn decode_by_codec(tensor: &CodedTensor, chunk: usize, out: &mut [u8], far: &mut Vec<FarAt>) -> Result<(), DecodeError> {
    let list = decode_chunk_bytes(tensor.table(), tensor.chunk(chunk), out)?;
    far.extend(FarAt::of_chunk(tensor, chunk, list));
    Ok(())
}
