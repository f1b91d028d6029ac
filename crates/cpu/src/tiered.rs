//! Chunks of the codec `tiered`, at every level.
//!
//! Computes: symbol bytes of a chunk, or its product with one token's activations.
//!
//! Layout: the codec's, as it lies in the file; see `tersor_codec::tiered`. Eight tiles of pairs are 3
//! to 6 lines of 64 bytes. A line shifted into place is the index of a table lookup that ignores the
//! bits of other tiles; where the lookup gives 0, the next pairs of the tier behind are filled in. Those
//! were decoded before, by the same steps, into a buffer that stays in the L1 or L2 cache.
//!
//! Needs: 64 readable bytes behind the chunk. The product wants segments and row tiles of whole
//! eights of tiles of pairs, 64 columns, and no far symbols; otherwise the caller decodes and multiplies.
//!
//! Cost: for a tile of 64 pairs, 128 symbols, at AVX-512 at most two shifts, a permute, a test, a load, an
//! expand and a store, two masks of nibbles and two dot products; for the tiers behind the same for every 64
//! pairs of theirs, without the products. A listed symbol costs some ten cycles. No step waits for the one
//! before but for a count, so a chunk alone fills the core. On Zen 4 the bound is one pair of pipes, which
//! the test, the expand and the products keep busy for 4.5 cycles a tile of pairs; 9 are seen.
//!
//! Measured (AMD EPYC, Zen 4, one of two shared and busy cores, `cargo run --release -p tersor-cpu
//! --example gemv -- avx512 48 tiered`), in G weights/s fused with the dot, from the cache and from
//! memory, beside the plain GEMV of nibbles: at 2.25 bits of entropy 50 and 43 (plain 100 and 62), at
//! 3.06 bits 48 and 45 (51 and 46); `rans` does 13 there. At AVX2 13 in the cache. In bulk to symbol bytes 34.
//! It loses above 3.3 bits, where too many symbols are listed: 15 and 12 at 3.79 bits (51 and 41).
//!
//! Tried without gain: two accumulators for each product; to call for listed symbols out of line (6 bits: 38).
//! The store of every tile looks wasteful, but without it the compiler moves and spills what it kept in
//! registers: 21 instead of 48. Single symbols instead of pairs, one expand for each tile, made 40.

use std::ops::Range;

use tersor_codec::pairs::LISTED_NIBBLE;
use tersor_codec::tiered::{Chunk, TIERS_MAX, Table, Tier};
use tersor_codec::{PADDING_BYTES, SYMBOL_BIAS, Table as AnyTable};
use tersor_format::CodedTensor;

use crate::buffer::AlignedBytes;
use crate::isa::{Isa, TileBytes, per_isa, prefetch};
use crate::matmul::{SegmentScales, finish_rows};
use crate::source::{FarAt, count_zeros, take_far, with_padding};
use crate::{Activations, KernelScales, Level, TILE_COLS, TILE_ROWS, TILE_SYMBOLS};

/// Tiles of pairs that are packed together.
const TILES: usize = 8;
const EIGHT_PAIRS: usize = TILES * TILE_SYMBOLS;

/// How far ahead of the lines the memory is told what comes. A chunk is read front to back, but
/// the processor's own prefetcher stops at the end of a page.
const PREFETCH_BYTES: usize = 4096;

/// Pair bytes of all tiers but the first for the product; the bulk decoder uses the last for the first tier's.
#[derive(Default)]
pub(crate) struct Buffers([AlignedBytes; TIERS_MAX]);

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
    let [behind @ .., pairs] = &mut buffers.0;
    let Some(escaped) = inner(level, tensor, chunk, table, &parts, behind) else {
        return false;
    };
    let pairs: &[TileBytes] = match table.tiers().first() {
        None => parts.escapes.as_chunks().0,
        Some(tier) => {
            let (count, fields) = parts.tiers[0];
            pairs.ensure(count);
            let pairs = &mut pairs.as_chunks_mut().0[..count.div_ceil(TILE_SYMBOLS)];
            if !expand(level, tier, count, fields.as_chunks().0, escaped, pairs) {
                return false;
            }
            pairs
        }
    };
    if !split(level, table.base(), pairs, out.as_chunks_mut().0) {
        return false;
    }
    for (position, byte) in parts.listed.iter() {
        if out[position] != table.base() + LISTED_NIBBLE {
            return false;
        }
        out[position] = byte;
    }
    let known = far.len();
    let valid = take_far(tensor, chunk, parts.far, parts.listed.bytes(), out, far);
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
    const STEPS: usize = 2 * TILES;
    if !tensor.col_steps().is_multiple_of(STEPS) || !(x.segment() / TILE_COLS).is_multiple_of(STEPS) {
        return false;
    }
    let mut rest = sums;
    for chunk in chunks {
        let Some((table, parts)) = parse(tensor, chunk) else {
            return false;
        };
        if !parts.far.is_empty() || count_zeros(parts.listed.bytes()) > 0 {
            return false;
        }
        let [behind @ .., _] = &mut buffers.0;
        let Some(escaped) = inner(level, tensor, chunk, table, &parts, behind) else {
            return false;
        };
        let row_tiles = tensor.chunk_row_tiles(chunk);
        let (sums, after) = rest.split_at_mut(row_tiles.len());
        rest = after;
        if !dot_lines(level, table, &parts, escaped, row_tiles.start, scales, x, sums) {
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

/// The pairs that the first tier escapes, with [`PADDING_BYTES`] behind them; `None` if the tiers
/// behind it are corrupt.
fn inner<'a>(
    level: Level,
    tensor: &'a CodedTensor,
    chunk: usize,
    table: &Table,
    parts: &Chunk<'a>,
    buffers: &'a mut [AlignedBytes],
) -> Option<&'a [u8]> {
    let mut escaped = with_padding(tensor.chunk_with_padding(chunk), parts.escapes);
    let behind = table.tiers().iter().zip(parts.tiers).skip(1);
    for ((tier, (pairs, fields)), buffer) in behind.rev().zip(buffers) {
        buffer.ensure(pairs.next_multiple_of(TILE_SYMBOLS) + PADDING_BYTES);
        if !expand(level, tier, pairs, fields.as_chunks().0, escaped, buffer.as_chunks_mut().0) {
            return None;
        }
        escaped = &buffer[..pairs + PADDING_BYTES];
    }
    Some(escaped)
}

/// The fields of eight tiles of `B` bits, in the low bits of each byte; the bits above them are
/// anything. With 8 bits, pair bytes. (No closures: the compiler would not inline intrinsics into them.)
#[inline(always)]
fn fields<I: Isa, const B: usize>(isa: I, lines: &[TileBytes; B]) -> [I::Tile; TILES] {
    let (a, b, c) = (isa.load(&lines[0]), isa.load(&lines[1]), isa.load(&lines[2]));
    if B == 3 {
        let third = isa.splat(0b100);
        let sixth = isa.select_bits(third, isa.shift_right(b, 4), isa.shift_right(a, 6));
        let seventh = isa.select_bits(third, isa.shift_right(b, 5), isa.shift_right(c, 6));
        return [a, isa.shift_right(a, 3), b, isa.shift_right(b, 3), c, isa.shift_right(c, 3), sixth, seventh];
    }
    let d = isa.load(&lines[3]);
    if B == 4 {
        return [a, isa.shift_right(a, 4), b, isa.shift_right(b, 4), c, isa.shift_right(c, 4), d, isa.shift_right(d, 4)];
    }
    let e = isa.load(&lines[4]);
    if B == 5 {
        let low = isa.splat(0b111);
        let fifth = isa.select_bits(low, isa.shift_right(a, 5), isa.shift_right(b, 3));
        let sixth = isa.select_bits(low, isa.shift_right(c, 5), isa.shift_right(d, 3));
        let high = isa.select_bits(isa.splat(0b1000), isa.shift_right(b, 2), isa.shift_right(d, 1));
        let seventh = isa.select_bits(low, isa.shift_right(e, 5), high);
        return [a, b, c, d, e, fifth, sixth, seventh];
    }
    let f = isa.load(&lines[5]);
    if B == 6 {
        return [a, b, c, third_of_six(isa, a, b, c), d, e, f, third_of_six(isa, d, e, f)];
    }
    [a, b, c, d, e, f, isa.load(&lines[6]), isa.load(&lines[7])]
}

/// The tile of 6 bits whose bits are the upper two of three lines.
#[inline(always)]
fn third_of_six<I: Isa>(isa: I, a: I::Tile, b: I::Tile, c: I::Tile) -> I::Tile {
    let high = isa.select_bits(isa.splat(0b1111), isa.shift_right(b, 4), isa.shift_right(c, 2));
    isa.select_bits(isa.splat(0b11), isa.shift_right(a, 6), high)
}

/// Reads of one tier's escaped pairs.
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

    /// Replaces the bytes of 0 by the next pairs, or by anything beyond their end.
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
    /// Pair bytes of one tier, whose fields lie in `lines`. `escaped`: the pairs of the tier behind,
    /// with [`PADDING_BYTES`] after them. `out`: room for all tiles. False if a field beyond the last
    /// pair is not 0, or escaped pairs are left or missing.
    fn expand(isa; tier: &Tier, pairs: usize, lines: &[TileBytes], escaped: &[u8], out: &mut [TileBytes]) -> bool {
        match tier.bits() {
            3 => expand_bits::<_, 3>(isa, tier, pairs, lines, escaped, out),
            4 => expand_bits::<_, 4>(isa, tier, pairs, lines, escaped, out),
            5 => expand_bits::<_, 5>(isa, tier, pairs, lines, escaped, out),
            _ => expand_bits::<_, 6>(isa, tier, pairs, lines, escaped, out),
        }
    }
}

#[inline(always)]
fn expand_bits<I: Isa, const B: usize>(
    isa: I,
    tier: &Tier,
    pairs: usize,
    lines: &[TileBytes],
    escaped: &[u8],
    out: &mut [TileBytes],
) -> bool {
    let table = isa.table(tier.pair_bytes());
    let zero = isa.splat(0);
    let mut escaped = Escaped::new(escaped);
    let whole = pairs / EIGHT_PAIRS;
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
        let itself = isa.table(&std::array::from_fn(|field| field as u8 % (1 << B)));
        let mut own = [[0; TILE_SYMBOLS]; TILES];
        for (own, tile) in own.iter_mut().zip(fields(isa, &lines)) {
            isa.store(isa.lookup(itself, tile), own);
        }
        let count = pairs % EIGHT_PAIRS;
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
    /// Symbol bytes of tiles of pairs, two tiles of each, of the last perhaps one. False if that one's
    /// partners are not 0.
    fn split(isa; base: u8, pairs: &[TileBytes], out: &mut [TileBytes]) -> bool {
        let base = isa.splat(base);
        for (pairs, out) in pairs.iter().zip(out.chunks_mut(2)) {
            let tile = isa.load(pairs);
            isa.store(isa.low(tile, base), &mut out[0]);
            match out.get_mut(1) {
                Some(out) => isa.store(isa.high(tile, base), out),
                None if pairs.iter().any(|pair| pair >> 4 != 0) => return false,
                None => {}
            }
        }
        true
    }
}

per_isa! {
    /// The product of a chunk's row tiles, of which `first` is the first. `escaped` as for [`expand`].
    /// False if escaped pairs are left or missing.
    fn dot_lines(
        isa;
        table: &Table,
        parts: &Chunk<'_>,
        escaped: &[u8],
        first: usize,
        scales: &KernelScales,
        x: &Activations,
        sums: &mut [[f32; TILE_ROWS]],
    ) -> bool {
        match table.tiers().first().map_or(8, Tier::bits) {
            3 => dot_bits::<_, 3>(isa, table, parts, escaped, first, scales, x, sums),
            4 => dot_bits::<_, 4>(isa, table, parts, escaped, first, scales, x, sums),
            5 => dot_bits::<_, 5>(isa, table, parts, escaped, first, scales, x, sums),
            6 => dot_bits::<_, 6>(isa, table, parts, escaped, first, scales, x, sums),
            _ => dot_bits::<_, 8>(isa, table, parts, escaped, first, scales, x, sums),
        }
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)] // Those of `dot_lines`.
fn dot_bits<I: Isa, const B: usize>(
    isa: I,
    table: &Table,
    parts: &Chunk<'_>,
    escaped: &[u8],
    first: usize,
    scales: &KernelScales,
    x: &Activations,
    sums: &mut [[f32; TILE_ROWS]],
) -> bool {
    // Without a tier pairs are bytes, and nothing is looked up or escaped.
    let bytes = B == 8;
    let lookup = isa.table(table.tiers().first().map_or(&[0; TILE_SYMBOLS], Tier::pair_bytes));
    let zero = isa.splat(0);
    let mut escaped = Escaped::new(escaped);
    let base = i32::from(table.base()) - i32::from(SYMBOL_BIAS);
    let q: &[[i8; TILE_COLS]] = x.q(0).as_chunks().0;
    let (xscales, xsums) = (x.scales(0), x.sums(0));
    let lines: &[TileBytes] = if bytes { parts.escapes } else { parts.tiers[0].1 }.as_chunks().0;
    let mut eights = lines.as_chunks::<B>().0.iter();
    let mut listed = Listed::new(parts.listed.iter(), base);
    let mut pairs = [[0; TILE_SYMBOLS]; TILES];
    for (i, acc) in sums.iter_mut().enumerate() {
        let tile_scales = scales.tile(first + i);
        *acc = [0.0; TILE_ROWS];
        for (segment, q) in q.chunks(x.segment() / TILE_COLS).enumerate() {
            let (mut low, mut high) = (isa.zero(), isa.zero());
            let mut beside = [0; TILE_ROWS];
            for (q, lines) in q.as_chunks::<{ 2 * TILES }>().0.iter().zip(&mut eights) {
                for line in lines {
                    prefetch(line.as_ptr().wrapping_add(PREFETCH_BYTES));
                }
                let tiles = fields(isa, lines);
                for i in 0..TILES {
                    let tile = if bytes { tiles[i] } else { escaped.fill(isa, isa.lookup(lookup, tiles[i]), zero) };
                    isa.store(tile, &mut pairs[i]);
                    low = isa.dot_low(low, tile, &q[2 * i]);
                    high = isa.dot_high(high, tile, &q[2 * i + 1]);
                }
                listed.add(&pairs, q, &mut beside);
            }
            let mut isum = isa.finish_nibbles(low, high);
            for (sum, beside) in isum.iter_mut().zip(beside) {
                *sum += base * xsums[segment] + beside;
            }
            SegmentScales::of(tile_scales, segment).add(isa, acc, &isum, xscales[segment], xsums[segment]);
        }
        finish_rows(tile_scales, acc);
    }
    (bytes || escaped.used_up()) && listed.valid
}

/// The listed symbols of a chunk on their way through its product.
struct Listed<L> {
    rest: L,
    next: Option<(usize, u8)>,
    /// Symbols before the eight tiles of pairs at hand.
    start: usize,
    /// The symbol that their nibble stands for.
    coded: i32,
    /// Whether all had that nibble.
    valid: bool,
}

impl<L: Iterator<Item = (usize, u8)>> Listed<L> {
    fn new(mut rest: L, base: i32) -> Listed<L> {
        let next = rest.next();
        Listed { rest, next, start: 0, coded: base + i32::from(LISTED_NIBBLE), valid: true }
    }

    /// Adds what the listed symbols of eight tiles of pairs are more than their nibbles. `q`: of their sixteen steps.
    #[inline(always)]
    fn add(&mut self, pairs: &[TileBytes; TILES], q: &[[i8; TILE_COLS]; 2 * TILES], sums: &mut [i32; TILE_ROWS]) {
        let end = self.start + 2 * EIGHT_PAIRS;
        while let Some((position, byte)) = self.next
            && position < end
        {
            let (step, lane) = ((position - self.start) / TILE_SYMBOLS, position % TILE_SYMBOLS);
            self.valid &= pairs[step / 2][lane] >> (4 * (step % 2)) & 15 == LISTED_NIBBLE;
            let more = i32::from(byte) - i32::from(SYMBOL_BIAS) - self.coded;
            sums[lane / TILE_COLS] += more * i32::from(q[step][lane % TILE_COLS]);
            self.next = self.rest.next();
        }
        self.start = end;
    }
}
