//! From chunks to symbol bytes, by the fastest way there is for a codec and level, with the codec's own decoder behind all of them.
//!
//! A fast way may give up on a chunk (far symbols, a shape it was not made for, bytes that do not decode) and say no more than that: the chunk then goes to the codec's decoder,
//! which knows the exact error. So there is one authority on what is valid.

use std::ops::Range;

use tersor_codec::{DecodeError, Far, decode_chunk_bytes};
use tersor_format::CodedTensor;

use crate::buffer::AlignedBytes;
#[cfg(target_arch = "x86_64")]
use crate::isa::avx512_rans;
use crate::{Level, TILE_ROWS, TILE_SYMBOLS};

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
    /// `first`: the row tile in which the chunk begins.
    pub(crate) fn new(first: usize, row_tile_symbols: usize, far: Far) -> FarAt {
        let position = far.position as usize;
        // Row tiles are at most 2^20 and a row tile has at most 2^28 symbols: the format's limits.
        FarAt { row_tile: (first + position / row_tile_symbols) as u32, position: (position % row_tile_symbols) as u32, symbol: far.symbol }
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

/// Chunks that one task decodes together at most: what hides the latency of one stream behind the others.
pub(crate) const CHUNKS_TOGETHER: usize = 4;

/// Symbols of consecutive chunks.
pub(crate) fn symbols_of(tensor: &CodedTensor, chunks: &Range<usize>) -> usize {
    chunks.clone().map(|c| tensor.chunk_symbols(c)).sum()
}

/// Decodes at most [`CHUNKS_TOGETHER`] consecutive chunks to symbol bytes, one chunk behind the other in `out`, and their far symbols, sorted.
///
/// The error names the first chunk that does not decode.
pub(crate) fn decode_chunks(level: Level, tensor: &CodedTensor, chunks: Range<usize>, out: &mut [u8], far: &mut Vec<FarAt>) -> Result<(), (usize, DecodeError)> {
    far.clear();
    #[cfg(target_arch = "x86_64")]
    if let Level::Avx512(token) = level {
        if avx512_rans::decode(token, tensor, chunks.clone(), out, far) {
            return Ok(());
        }
        far.clear();
    }
    let mut rest = out;
    for chunk in chunks {
        let (bytes, after) = rest.split_at_mut(tensor.chunk_symbols(chunk));
        decode_by_codec(tensor, chunk, bytes, far).map_err(|e| (chunk, e))?;
        rest = after;
    }
    Ok(())
}

fn decode_by_codec(tensor: &CodedTensor, chunk: usize, out: &mut [u8], far: &mut Vec<FarAt>) -> Result<(), DecodeError> {
    let list = decode_chunk_bytes(tensor.table(), tensor.chunk(chunk), out)?;
    let first = tensor.chunk_row_tiles(chunk).start;
    let row_tile_symbols = tensor.col_steps() * TILE_SYMBOLS;
    far.extend(list.iter().map(|f| FarAt::new(first, row_tile_symbols, f)));
    Ok(())
}
