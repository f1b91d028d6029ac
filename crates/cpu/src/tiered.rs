//! Chunks of the codec `tiered`, at every level.
//!
//! Computes: symbol bytes of a chunk, or its product with one token's activations.
//!
//! Layout: the codec's, as it lies in the file; see `tersor_codec::tiered`. Eight tiles are 2, 3 or 4
//! lines of 64 bytes. A line shifted into place is the index of a table lookup that ignores the bits
//! of other tiles; where the lookup gives 0, the next symbols of the tier behind are filled in. Those
//! were decoded before, by the same steps, into a buffer that stays in the L1 or L2 cache.
//!
//! Needs: 64 readable bytes behind the chunk. The product wants segments and row tiles of whole
//! eights of tiles, 32 columns, and no far symbols; otherwise the caller decodes and multiplies.
//!
//! Cost: for a tile of 64 symbols, at AVX-512, about one shift, and a permute, a test, a load, an
//! expand, and a dot product or a store; for the tiers behind the same for every 64 symbols of theirs.
//! No step waits for the one before but for a count, so a chunk alone fills the core.
//!
//! Measured (AMD EPYC, Zen 4, one of two shared and busy cores, `cargo run --release -p tersor-cpu
//! --example gemv -- avx512 48 tiered`), in G weights/s fused with the dot, from the cache and from
//! memory, beside the plain GEMV of nibbles: at 2.25 bits of entropy 39 and 35 (plain 105 and 66), at
//! 3.06 bits 40 and 32 (52 and 43), at 3.79 bits 34 and 22 (53 and 42); `rans` does 13 there. In bulk
//! 31 to 44 in cache. It loses at AVX2 where many symbols are escaped, since an expand is eight table
//! lookups there, and above 3.7 bits, where its codes are as long as nibbles with escapes. Tried
//! without gain: to keep the compiler from folding the load into the expand.

use std::ops::Range;

use tersor_codec::tiered::{Chunk, TIERS_MAX, Table, Tier};
use tersor_codec::{PADDING_BYTES, Table as AnyTable};
use tersor_format::CodedTensor;

use crate::buffer::AlignedBytes;
use crate::isa::{Isa, TileBytes, per_isa, prefetch};
use crate::matmul::{SegmentScales, finish_rows};
use crate::source::{FarAt, count_zeros, take_far, with_padding};
use crate::{Activations, KernelScales, Level, TILE_COLS, TILE_ROWS, TILE_SYMBOLS};

/// Tiles that are packed together.
const TILES: usize = 8;
const EIGHT_SYMBOLS: usize = TILES * TILE_SYMBOLS;

/// How far ahead of the lines the memory is told what comes. A chunk is read front to back, but
/// the processor's own prefetcher stops at the end of a page.
const PREFETCH_BYTES: usize = 4096;

/// Symbols of the tiers behind the first, on their way to it.
#[derive(Default)]
pub(crate) struct Buffers([AlignedBytes; TIERS_MAX - 1]);

/// Decodes a chunk. False if it is of another codec, or does not decode: `out` and `far` may then
/// have changed.
pub(crate) fn decode(
    level: Level,
    tensor: &CodedTensor,
    chunk: usize,
    buffers: &mut Buffers,
    out: &mut [u8],
    far: &mut Vec<FarAt>,
) -> bool {
    let Some((table, parts)) = parse(tensor, chunk) else {
        return false;
    };
    let Some(escaped) = inner(level, tensor, chunk, table, &parts, buffers) else {
        return false;
    };
    let known = far.len();
    let (tier, (symbols, fields)) = (&table.tiers()[0], parts.tiers[0]);
    let valid = expand(level, tier, symbols, fields.as_chunks().0, escaped, out.as_chunks_mut().0)
        && take_far(tensor, chunk, parts.far, parts.escapes, out, far);
    if !valid {
        far.truncate(known);
    }
    valid
}

/// Multiplies consecutive chunks with the only token of `x`. `sums`: (row tiles of the chunks, 16).
///
/// False if the codec is another one, a chunk is corrupt or has far symbols, or the shape does not
/// suit: `sums` are then of no use.
pub(crate) fn dot(
    level: Level,
    tensor: &CodedTensor,
    chunks: Range<usize>,
    buffers: &mut Buffers,
    scales: &KernelScales,
    x: &Activations,
    sums: &mut [[f32; TILE_ROWS]],
) -> bool {
    if !tensor.col_steps().is_multiple_of(TILES) || !(x.segment() / TILE_COLS).is_multiple_of(TILES) {
        return false;
    }
    let mut rest = sums;
    for chunk in chunks {
        let Some((table, parts)) = parse(tensor, chunk) else {
            return false;
        };
        if !parts.far.is_empty() || count_zeros(parts.escapes) > 0 {
            return false;
        }
        let Some(escaped) = inner(level, tensor, chunk, table, &parts, buffers) else {
            return false;
        };
        let row_tiles = tensor.chunk_row_tiles(chunk);
        let (sums, after) = rest.split_at_mut(row_tiles.len());
        rest = after;
        let lines = parts.tiers[0].1.as_chunks().0;
        if !dot_lines(level, &table.tiers()[0], lines, escaped, row_tiles.start, scales, x, sums) {
            return false;
        }
    }
    true
}

fn parse(tensor: &CodedTensor, chunk: usize) -> Option<(&Table, Chunk<'_>)> {
    let AnyTable::Tiered(table) = tensor.table() else {
        return None;
    };
    Some((table, Chunk::parse(table, tensor.chunk_symbols(chunk), tensor.chunk(chunk)).ok()?))
}

/// The symbols that the first tier escapes, with [`PADDING_BYTES`] behind them; `None` if the tiers
/// behind it are corrupt.
fn inner<'a>(
    level: Level,
    tensor: &'a CodedTensor,
    chunk: usize,
    table: &Table,
    parts: &Chunk<'a>,
    buffers: &'a mut Buffers,
) -> Option<&'a [u8]> {
    let mut escaped = with_padding(tensor.chunk_with_padding(chunk), parts.escapes);
    let behind = table.tiers().iter().zip(parts.tiers).skip(1);
    for ((tier, (symbols, fields)), buffer) in behind.rev().zip(&mut buffers.0) {
        buffer.ensure(symbols.next_multiple_of(TILE_SYMBOLS) + PADDING_BYTES);
        if !expand(level, tier, symbols, fields.as_chunks().0, escaped, buffer.as_chunks_mut().0) {
            return None;
        }
        escaped = &buffer[..symbols + PADDING_BYTES];
    }
    Some(escaped)
}

/// The fields of eight tiles of `B` bits, in the low bits of each byte; the bits above them are
/// anything. (No closures: the compiler would not inline intrinsics into them.)
#[inline(always)]
fn fields<I: Isa, const B: usize>(isa: I, lines: &[TileBytes; B]) -> [I::Tile; TILES] {
    let (a, b) = (isa.load(&lines[0]), isa.load(&lines[1]));
    if B == 2 {
        let (a1, a2, a3) = (isa.shift_right(a, 2), isa.shift_right(a, 4), isa.shift_right(a, 6));
        let (b1, b2, b3) = (isa.shift_right(b, 2), isa.shift_right(b, 4), isa.shift_right(b, 6));
        return [a, a1, a2, a3, b, b1, b2, b3];
    }
    let c = isa.load(&lines[2]);
    if B == 3 {
        let third = isa.splat(0b100);
        let sixth = isa.select_bits(third, isa.shift_right(b, 4), isa.shift_right(a, 6));
        let seventh = isa.select_bits(third, isa.shift_right(b, 5), isa.shift_right(c, 6));
        return [a, isa.shift_right(a, 3), b, isa.shift_right(b, 3), c, isa.shift_right(c, 3), sixth, seventh];
    }
    let d = isa.load(&lines[3]);
    [a, isa.shift_right(a, 4), b, isa.shift_right(b, 4), c, isa.shift_right(c, 4), d, isa.shift_right(d, 4)]
}

/// A table of `2^bits` bytes again and again, as [`Isa::lookup`] wants it.
fn repeated(bits: u8, byte_of: impl Fn(usize) -> u8) -> TileBytes {
    std::array::from_fn(|i| byte_of(i % (1 << bits)))
}

/// Reads of one tier's escaped symbols.
struct Escaped<'a> {
    bytes: &'a [u8],
    /// [`PADDING_BYTES`] before the end of `bytes`.
    end: usize,
    taken: usize,
}

impl<'a> Escaped<'a> {
    fn new(bytes: &'a [u8]) -> Escaped<'a> {
        Escaped { bytes, end: bytes.len() - PADDING_BYTES, taken: 0 }
    }

    /// Replaces the bytes of 0 by the next symbols, or by anything beyond their end.
    #[inline(always)]
    fn fill<I: Isa>(&mut self, isa: I, tile: I::Tile, zero: I::Tile) -> I::Tile {
        // SAFETY: the read begins at `end` at most, behind which 64 bytes follow.
        let (tile, more) = unsafe { isa.unescape(tile, zero, self.bytes.as_ptr().add(self.taken.min(self.end))) };
        self.taken += more;
        tile
    }

    fn used_up(&self) -> bool {
        self.taken == self.end
    }
}

per_isa! {
    /// Symbol bytes of one tier, whose fields lie in `lines`. `escaped`: the symbols of the tier
    /// behind, with [`PADDING_BYTES`] after them. `out`: room for all tiles. False if a field beyond
    /// the last symbol is not 0, or escaped symbols are left or missing.
    fn expand(isa; tier: &Tier, symbols: usize, lines: &[TileBytes], escaped: &[u8], out: &mut [TileBytes]) -> bool {
        match tier.bits() {
            2 => expand_bits::<_, 2>(isa, tier, symbols, lines, escaped, out),
            3 => expand_bits::<_, 3>(isa, tier, symbols, lines, escaped, out),
            _ => expand_bits::<_, 4>(isa, tier, symbols, lines, escaped, out),
        }
    }
}

#[inline(always)]
fn expand_bits<I: Isa, const B: usize>(
    isa: I,
    tier: &Tier,
    symbols: usize,
    lines: &[TileBytes],
    escaped: &[u8],
    out: &mut [TileBytes],
) -> bool {
    let table = isa.load(&repeated(tier.bits(), |field| tier.symbol_bytes()[field]));
    let zero = isa.splat(0);
    let mut escaped = Escaped::new(escaped);
    let whole = symbols / EIGHT_SYMBOLS;
    let (eights, last) = lines.split_at(whole * B);
    let (out, out_last) = out.split_at_mut(whole * TILES);
    for (lines, out) in eights.as_chunks::<B>().0.iter().zip(out.as_chunks_mut::<TILES>().0) {
        for line in lines {
            prefetch(line.as_ptr().wrapping_add(PREFETCH_BYTES));
        }
        let tiles = fields(isa, lines);
        for i in 0..TILES {
            let tile = isa.lookup(table, tiles[i]);
            isa.store(escaped.fill(isa, tile, zero), &mut out[i]);
        }
    }
    if !last.is_empty() {
        let mut lines = [[0; TILE_SYMBOLS]; B];
        lines[..last.len()].copy_from_slice(last);
        let itself = isa.load(&repeated(tier.bits(), |field| field as u8));
        let mut own = [[0; TILE_SYMBOLS]; TILES];
        for (own, tile) in own.iter_mut().zip(fields(isa, &lines)) {
            isa.store(isa.lookup(itself, tile), own);
        }
        let count = symbols % EIGHT_SYMBOLS;
        let unused = &mut own.as_flattened_mut()[count..];
        if unused.iter().fold(0, |any, field| any | field) != 0 {
            return false;
        }
        // Any field that is no escape, so that the last tile takes no more than its own.
        unused.fill(1);
        for (own, out) in own[..count.div_ceil(TILE_SYMBOLS)].iter().zip(out_last) {
            let tile = isa.lookup(table, isa.load(own));
            isa.store(escaped.fill(isa, tile, zero), out);
        }
    }
    escaped.used_up()
}

per_isa! {
    /// The product of a chunk's row tiles, of which `first` is the first. `lines` are the whole of
    /// its first tier, `escaped` as for [`expand`]. False if escaped symbols are left or missing.
    fn dot_lines(
        isa;
        tier: &Tier,
        lines: &[TileBytes],
        escaped: &[u8],
        first: usize,
        scales: &KernelScales,
        x: &Activations,
        sums: &mut [[f32; TILE_ROWS]],
    ) -> bool {
        match tier.bits() {
            2 => dot_bits::<_, 2>(isa, tier, lines, escaped, first, scales, x, sums),
            3 => dot_bits::<_, 3>(isa, tier, lines, escaped, first, scales, x, sums),
            _ => dot_bits::<_, 4>(isa, tier, lines, escaped, first, scales, x, sums),
        }
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)] // Those of `dot_lines`.
fn dot_bits<I: Isa, const B: usize>(
    isa: I,
    tier: &Tier,
    lines: &[TileBytes],
    escaped: &[u8],
    first: usize,
    scales: &KernelScales,
    x: &Activations,
    sums: &mut [[f32; TILE_ROWS]],
) -> bool {
    let table = isa.load(&repeated(tier.bits(), |field| tier.symbol_bytes()[field]));
    let zero = isa.splat(0);
    let mut escaped = Escaped::new(escaped);
    let q: &[[i8; TILE_COLS]] = x.q(0).as_chunks().0;
    let (xscales, xsums) = (x.scales(0), x.sums(0));
    let mut eights = lines.as_chunks::<B>().0.iter();
    for (i, acc) in sums.iter_mut().enumerate() {
        let tile_scales = scales.tile(first + i);
        *acc = [0.0; TILE_ROWS];
        for (segment, q) in q.chunks(x.segment() / TILE_COLS).enumerate() {
            let mut dots = [isa.zero(); 2];
            for (q, lines) in q.as_chunks::<TILES>().0.iter().zip(&mut eights) {
                for line in lines {
                    prefetch(line.as_ptr().wrapping_add(PREFETCH_BYTES));
                }
                let tiles = fields(isa, lines);
                for i in 0..TILES {
                    let tile = isa.lookup(table, tiles[i]);
                    dots[i % 2] = isa.dot(dots[i % 2], escaped.fill(isa, tile, zero), &q[i]);
                }
            }
            let isum = isa.finish(isa.add(dots[0], dots[1]), xsums[segment]);
            SegmentScales::of(tile_scales, segment).add(isa, acc, &isum, xscales[segment], xsums[segment]);
        }
        finish_rows(tile_scales, acc);
    }
    escaped.used_up()
}
