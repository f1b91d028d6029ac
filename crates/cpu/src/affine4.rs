//! Decoding to MLX's packed nibbles: the layout in which `mx.quantized_matmul` wants 4-bit weights.
//!
//! ```text
//! word (row, w) holds the columns 8w to 8w + 7, lowest bits first: nibble i is symbol(row, 8w + i) + 8
//!
//! symbol bytes of a row tile             words of the row tile
//!   step 2w:     row 0 | row 1 | ...       row 0:  ... w ...
//!   step 2w + 1: row 0 | row 1 | ...       row 1:  ... w ...
//! ```
//!
//! A tile has four consecutive columns of 16 rows, so two tiles make one word in each of 16 rows: sixteen 32-bit lanes squeeze their
//! bytes to nibbles at once, and sixteen such words for a row are written together.

use std::ops::Range;

use crate::error::FirstError;
use crate::isa::TileBytes;
use crate::level::per_level;
use crate::source::{chunks_together, decode_chunks, symbols_of, with_scratch};
use crate::{KernelError, Level, Pool, SharedOut, TILE_ROWS, TILE_SYMBOLS};
use tersor_format::{CodedTensor, NARROW_MAX};

/// Columns of a word.
const PER_WORD: usize = 8;
/// Symbol byte of the field 0, the symbol -8.
const FIELD_BIAS: u8 = 120;

/// Decodes rows of a tensor to MLX's packed nibbles.
///
/// `out`: (rows.len(), cols / 8), row-major. Only the chunks that hold these rows are decoded.
///
/// # Errors
/// Symbols outside of -8..=7, columns that are not a multiple of 8, rows beyond the tensor's, a wrong length of `out`; corrupt chunks.
/// After an error `out` is of no use.
pub fn decode_affine4(
    level: Level,
    tensor: &CodedTensor,
    rows: Range<usize>,
    out: &mut [u32],
    pool: Option<&Pool>,
) -> Result<(), KernelError> {
    let shape = |what, expected, found| Err(KernelError::Shape { job: 0, what, expected, found });
    let (min, max) = (tensor.header().symbol_min, tensor.header().symbol_max);
    if min < -8 || max > NARROW_MAX {
        return Err(KernelError::NotNibbles { min, max });
    }
    if !tensor.cols().is_multiple_of(PER_WORD) {
        return shape("the number of columns", tensor.cols().next_multiple_of(PER_WORD), tensor.cols());
    }
    if rows.start > rows.end || rows.end > tensor.rows() {
        return shape("the end of the rows", tensor.rows(), rows.end);
    }
    let words = tensor.cols() / PER_WORD;
    if out.len() != rows.len() * words {
        return shape("the length of out", rows.len() * words, out.len());
    }
    if rows.is_empty() {
        return Ok(());
    }
    let chunk_of = |row: usize| row / TILE_ROWS / tensor.chunk_row_tiles(0).len();
    let chunks = chunk_of(rows.start)..chunk_of(rows.end - 1) + 1;
    let together = chunks_together(tensor.table());
    let tasks = chunks.len().div_ceil(together);
    let shared = SharedOut::new(out);
    let errors = FirstError::default();
    let task = |task: usize| {
        let first = chunks.start + task * together;
        let chunks = first..chunks.end.min(first + together);
        let row_tiles = tensor.chunk_row_tiles(first).start..tensor.chunk_row_tiles(chunks.end - 1).end;
        let wanted = rows.start.max(row_tiles.start * TILE_ROWS)..rows.end.min(row_tiles.end * TILE_ROWS);
        // SAFETY: chunks are disjoint runs of rows, and each task has its own chunks.
        let out = unsafe { shared.slice((wanted.start - rows.start) * words, wanted.len() * words) };
        if let Err(e) = decode_run(level, tensor, chunks, row_tiles, wanted, out) {
            errors.report(e);
        }
    };
    match pool {
        Some(pool) => pool.run(tasks, &task),
        None => (0..tasks).for_each(task),
    }
    errors.into_result()
}

/// Decodes consecutive chunks, which hold `row_tiles`, and packs the rows `wanted` of them.
fn decode_run(
    level: Level,
    tensor: &CodedTensor,
    chunks: Range<usize>,
    row_tiles: Range<usize>,
    wanted: Range<usize>,
    out: &mut [u32],
) -> Result<(), KernelError> {
    let words = tensor.cols() / PER_WORD;
    let symbols = symbols_of(tensor, &chunks);
    with_scratch(|scratch| {
        scratch.bytes.ensure(symbols);
        let bytes = &mut scratch.bytes[..symbols];
        decode_chunks(level, tensor, chunks.clone(), &mut scratch.pairs, bytes, &mut scratch.far).map_err(KernelError::corrupt)?;
        let tiles: &[TileBytes] = bytes.as_chunks().0;
        let mut rest = out;
        for (row_tile, tiles) in row_tiles.zip(tiles.chunks_exact(tensor.col_steps())) {
            let first = row_tile * TILE_ROWS;
            let lanes = wanted.start.max(first)..wanted.end.min(first + TILE_ROWS);
            if lanes.is_empty() {
                continue;
            }
            let (part, after) = rest.split_at_mut(lanes.len() * words);
            rest = after;
            if !pack_row_tile(level, tiles, lanes.start - first, words, part) {
                // The header excludes them, so it and the chunk contradict each other. A far symbol is such a byte, too: 0.
                let outside = |byte: &&u8| byte.wrapping_sub(FIELD_BIAS) > 15;
                return Err(KernelError::OutOfRange { chunk: chunks.start, found: bytes.iter().filter(outside).count() });
            }
        }
        Ok(())
    })
}

per_level! {
    /// Packs lanes of one row tile: `out.len() / words` of them, from `first_lane` on. `tiles`: (steps); `out`: (lanes, words).
    /// False if a symbol is not in -8..=7; `out` is then of no use.
    fn pack_row_tile(tiles: &[TileBytes], first_lane: usize, words: usize, out: &mut [u32]) -> bool {
        let mut outside = 0u8;
        let (pairs, _) = tiles.as_chunks::<2>();
        // Sixteen words of every row: a cache line each.
        for (block, pairs) in pairs.chunks(16).enumerate() {
            let mut packed = [[0u32; TILE_ROWS]; 16];
            for ([low, high], packed) in pairs.iter().zip(&mut packed) {
                let (low, high) = (halves(low, &mut outside), halves(high, &mut outside));
                for lane in 0..TILE_ROWS {
                    packed[lane] = low[lane] | high[lane] << 16;
                }
            }
            for (row, out) in out.chunks_exact_mut(words).enumerate() {
                for (word, packed) in out[block * 16..][..pairs.len()].iter_mut().zip(&packed) {
                    *word = packed[first_lane + row];
                }
            }
        }
        outside == 0
    }
}

/// Four nibbles of each of 16 rows, in the low halves. Bits of bytes that are no nibbles are added to `outside`.
#[inline(always)]
fn halves(tile: &TileBytes, outside: &mut u8) -> [u32; TILE_ROWS] {
    let mut fields = [0u8; TILE_SYMBOLS];
    let mut high_bits = 0;
    for (field, byte) in fields.iter_mut().zip(tile) {
        *field = byte.wrapping_sub(FIELD_BIAS);
        high_bits |= *field & 0xf0;
    }
    *outside |= high_bits;
    let (lanes, _) = fields.as_chunks::<4>();
    std::array::from_fn(|lane| {
        let four = u32::from_le_bytes(lanes[lane]);
        let two = (four | four >> 4) & 0x00ff_00ff;
        (two | two >> 8) & 0xffff
    })
}
