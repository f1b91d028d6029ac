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
//! expand and a store, two masks of nibbles and two dot products, with raw bits a shift, an addition and two selections more; for the tiers behind the same for every 64
//! pairs of theirs, without the products. A listed symbol costs some ten cycles. No step waits for the one
//! before but for a count, so a chunk alone fills the core. On Zen 4 the bound is one pair of pipes, which
//! the test, the expand and the products keep busy for 4.5 cycles a tile of pairs; 9 are seen.
//!
//! Measured (AMD EPYC, Zen 4, one of two cores, `tersor kernels --codec tiered --level avx512 --threads 1 --seconds 0.12 --entropy H`, medians of
//! five runs in turns with the kernel that fetched 4 KiB ahead, in brackets), in G weights/s at 2.25, 3.0 and 3.7 bits of entropy (none, none and two raw
//! bits): fused with the dot from the cache 44, 45 and 28, from memory 35.8, 32.6 and 25.1 (33.2, 30.0, 18.3), which is 0.95, 0.88 and 0.69 of the plain GEMV of
//! nibbles (0.88, 0.82, 0.51); `rans` does 13. To the decoded form from the cache 59, 40 and 17, from memory 22, 18 and 12.
//!
//! On Zen 5 (one of two cores, read bandwidth 30 GB/s) at 2.25 and 3.7 bits fused from the cache 72 and 49, from memory 51 to 56 and 35 to 37; to the decoded form
//! 94 and 36, from memory 32 and 19. Fetching 4,096 or 2,048 bytes ahead makes 54 to 60 and 33 to 34 of it, 128 KiB 54 and 36, 32 KiB the same; with coded bytes in
//! pages of 2 MiB it is the same at 2.25 bits and a fifth faster at 3.7.
//!
//! Tried without gain, a *tail* bit behind the codes of a tier's rarer pairs, one bit stream a tier, spread over the lanes by `pdep`: 2.31, 3.15 and 3.84 bits a weight
//! where this takes 2.45, 3.25 and 3.92, but 27, 24 and 21 G weights/s from the cache, hardly more than `rans-pairs`, which is smaller; with a second tail bit 2.30, 3.11
//! and 3.78, and 13 to 17. A lane mask costs Zen 4 two cycles on its way to an integer register, and each tail needs one for every tile.
//!
//! Tried without gain: two accumulators for each product; to call for listed symbols out of line (6 bits: 38).
//! The store of every tile looks wasteful, but without it the compiler moves and spills what it kept in
//! registers: 21 instead of 48. With raw bits it does so nevertheless, and pairs that come back from memory are faster: at
//! 3.06 bits with one raw bit 39 instead of 32; without raw bits they are slower, 43 instead of 49. Single symbols instead of pairs, one expand for each tile, made 40.

use std::ops::Range;

use tersor_codec::tiered::{Chunk, Table, Tier};
use tersor_codec::{ESCAPE, PADDING_BYTES, SYMBOL_BIAS, Table as AnyTable};
use tersor_format::CodedTensor;

use crate::buffer::AlignedBytes;
use crate::isa::{Isa, TileBytes, per_isa, prefetch, prefetch_far};
use crate::matmul::{SegmentScales, finish_rows};
use crate::pairs::{Listed, PairBuffers, RawLines, by_raw_bits, put_listed, split};
use crate::rans_pairs::{Nibbles, PART, room};
use crate::source::{FarAt, count_zeros, take_far, with_padding};
use crate::{Activations, KernelScales, Level, TILE_COLS, TILE_ROWS, TILE_SYMBOLS, TokenBlock};

/// Tiles of pairs that are packed together.
const TILES: usize = 8;
const EIGHT_PAIRS: usize = TILES * TILE_SYMBOLS;

/// How far ahead of the lines the memory is told what comes: two chunks or three, for a chunk's parts do not lie in the order in which they are read.
const PREFETCH_BYTES: usize = 65_536;

/// Lines at the beginning of each part that are fetched before any part is read.
const ANNOUNCED_LINES: usize = 32;

/// Lines of nibbles for each listed symbol from which on it pays to put these into the lines one by one: that takes
/// 9 ns, where a line takes 2 ns more by way of symbol bytes.
const LINES_PER_LISTED: usize = 4;

/// One chunk.
struct Parts<'a> {
    table: &'a Table,
    chunk: Chunk<'a>,
    raw: RawLines<'a>,
    /// The pairs that no tier has, with [`PADDING_BYTES`] behind them.
    escapes: &'a [u8],
}

impl<'a> Parts<'a> {
    /// `None` if the codec is another one, or the chunk corrupt.
    fn new(tensor: &'a CodedTensor, chunk: usize) -> Option<Parts<'a>> {
        let AnyTable::Tiered(table) = tensor.table() else {
            return None;
        };
        let symbols = tensor.chunk_symbols(chunk);
        let parts = Chunk::parse(table, symbols, tensor.chunk(chunk)).ok()?;
        let raw = RawLines::new(table.window().raw_bits(), parts.raw_lines);
        if !raw.end_with(symbols / TILE_SYMBOLS) {
            return None;
        }
        for part in parts.tiers.iter().map(|(_, fields)| *fields).chain([parts.raw_lines]) {
            for line in part.chunks(TILE_SYMBOLS).take(ANNOUNCED_LINES) {
                prefetch(line.as_ptr());
            }
        }
        let escapes = with_padding(tensor.chunk_with_padding(chunk), parts.escapes);
        Some(Parts { table, chunk: parts, raw, escapes })
    }

    /// The pairs that the first tier escapes, with [`PADDING_BYTES`] behind them; `None` if the tiers
    /// behind it are corrupt. `escapes`: those of the last tier, likewise. To the nibbles of all others `shift` is added.
    fn inner<'b>(&self, level: Level, shift: u8, escapes: &'b [u8], buffers: &'b mut [AlignedBytes]) -> Option<&'b [u8]> {
        let mut escaped = escapes;
        let behind = self.table.tiers().iter().zip(self.chunk.tiers).skip(1);
        for ((tier, (pairs, fields)), buffer) in behind.rev().zip(buffers) {
            buffer.ensure(pairs.next_multiple_of(TILE_SYMBOLS) + PADDING_BYTES);
            if !expand(level, tier, shift, pairs, fields.as_chunks().0, escaped, buffer.as_chunks_mut().0) {
                return None;
            }
            escaped = &buffer[..pairs + PADDING_BYTES];
        }
        Some(escaped)
    }

    /// All pair bytes, and a buffer that is no longer needed; `None` if the tiers are corrupt.
    fn pairs<'b>(&'b self, level: Level, buffers: &'b mut PairBuffers) -> Option<(&'b [TileBytes], &'b mut AlignedBytes)> {
        let [behind @ .., pairs] = &mut buffers.0;
        let Some(tier) = self.table.tiers().first() else {
            return Some((self.chunk.escapes.as_chunks().0, pairs));
        };
        let (count, fields) = self.chunk.tiers[0];
        let pairs = room(pairs, count.div_ceil(TILE_SYMBOLS));
        let escaped = self.inner(level, 0, self.escapes, behind)?;
        expand(level, tier, 0, count, fields.as_chunks().0, escaped, pairs).then_some((pairs, &mut behind[0]))
    }

    /// As [`decode_lines`], of one chunk whose pair bytes are lines, but for far symbols. `clean`: whether
    /// none of the pairs of the tiers has a symbol without a nibble.
    #[allow(clippy::too_many_arguments)] // Of the chunk, and the parts of the decoded form.
    fn store_lines(
        &self,
        level: Level,
        nibbles: Nibbles,
        clean: bool,
        buffers: &mut PairBuffers,
        lines: &mut [TileBytes],
        offsets: &mut [u32],
        out: &mut [u8],
    ) -> Option<usize> {
        let scan = !(clean && nibbles.clean(self.chunk.escapes.iter().copied()));
        if scan && !nibbles.escapes() {
            return None;
        }
        let shift = nibbles.shift_byte();
        let [behind @ .., buffer] = &mut buffers.0;
        match self.table.tiers().first() {
            None => {
                lines.copy_from_slice(self.chunk.escapes.as_chunks().0);
                shift_nibbles(level, shift, lines);
            }
            Some(tier) => {
                let mut escapes = self.escapes;
                if shift != 0 {
                    let own = room(buffer, escapes.len().div_ceil(TILE_SYMBOLS));
                    own.as_flattened_mut()[..escapes.len()].copy_from_slice(escapes);
                    shift_nibbles(level, shift, own);
                    escapes = &own.as_flattened()[..escapes.len()];
                }
                let escaped = self.inner(level, shift, escapes, behind)?;
                let (count, fields) = self.chunk.tiers[0];
                if !expand(level, tier, shift, count, fields.as_chunks().0, escaped, lines) {
                    return None;
                }
            }
        }
        let (row_tile_lines, mut taken) = (lines.len() / offsets.len(), 0);
        let mut listed = self.chunk.listed.iter().peekable();
        for (row_tile, (lines, offset)) in lines.chunks_mut(row_tile_lines).zip(offsets).enumerate() {
            *offset = taken as u32;
            if scan || listed.peek().is_some() {
                taken += nibbles.finish(level, row_tile, lines, &mut listed, scan, &mut out[taken..])?;
            }
        }
        Some(taken)
    }

    /// As [`Parts::store_lines`], of any chunk.
    fn narrow(
        &self,
        level: Level,
        nibbles: Nibbles,
        buffers: &mut PairBuffers,
        lines: &mut [TileBytes],
        offsets: &mut [u32],
        out: &mut [u8],
    ) -> Option<usize> {
        let (pairs, bytes) = self.pairs(level, buffers)?;
        let bytes = room(bytes, 2 * PART).as_flattened_mut();
        let (row_tile_lines, mut taken) = (lines.len() / offsets.len(), 0);
        let mut listed = self.chunk.listed.iter().peekable();
        let row_tiles = lines.chunks_mut(row_tile_lines).zip(pairs.chunks(row_tile_lines)).zip(offsets);
        for (row_tile, ((lines, pairs), offset)) in row_tiles.enumerate() {
            *offset = taken as u32;
            for (part, (lines, pairs)) in lines.chunks_mut(PART).zip(pairs.chunks(PART)).enumerate() {
                let step = row_tile * row_tile_lines + part * PART;
                let out = &mut out[taken..];
                taken += nibbles.narrow(level, self.table.window(), self.raw, step, pairs, &mut listed, bytes, lines, out)?;
            }
        }
        Some(taken)
    }
}

/// Decodes a chunk. False if it is of another codec, or does not decode: `out` and `far` may then
/// have changed.
pub(crate) fn decode(
    level: Level,
    tensor: &CodedTensor,
    chunk: usize,
    buffers: &mut PairBuffers,
    out: &mut [u8],
    far: &mut Vec<FarAt>,
) -> bool {
    let Some(parts) = Parts::new(tensor, chunk) else {
        return false;
    };
    let Some((pairs, _)) = parts.pairs(level, buffers) else {
        return false;
    };
    let (window, listed) = (parts.table.window(), parts.chunk.listed);
    if !split(level, window.base(), parts.raw, pairs, out.as_chunks_mut().0) || !put_listed(listed.iter(), window.listed_byte(), out) {
        return false;
    }
    let known = far.len();
    let valid = parts.raw.spare(listed) && take_far(tensor, chunk, parts.chunk.far, listed.bytes(), out, far);
    if !valid {
        far.truncate(known);
    }
    valid
}

/// Decodes consecutive chunks to lines of nibbles, as `rans_pairs::Chunks::decode_lines` does. `None` also if the codec is
/// another one.
#[allow(clippy::too_many_arguments)] // The parts of the decoded form.
pub(crate) fn decode_lines(
    level: Level,
    tensor: &CodedTensor,
    chunks: Range<usize>,
    buffers: &mut PairBuffers,
    bias: u8,
    escapes: bool,
    mut lines: &mut [TileBytes],
    mut offsets: &mut [u32],
    escaped: &mut [u8],
    far: &mut Vec<FarAt>,
) -> Option<usize> {
    let AnyTable::Tiered(table) = tensor.table() else {
        return None;
    };
    // Row tiles may not begin within a pair.
    if !tensor.col_steps().is_multiple_of(2) {
        return None;
    }
    let nibbles = Nibbles::new(table.window(), bias, escapes);
    let straight = nibbles.straight(table.window());
    let clean = nibbles.clean(table.tiers().iter().flat_map(|tier| &tier.pair_bytes()[1..1 << tier.bits()]).copied());
    let mut taken = 0;
    for chunk in chunks {
        let parts = Parts::new(tensor, chunk)?;
        let (own, rest) = lines.split_at_mut(tensor.chunk_symbols(chunk) / (2 * TILE_SYMBOLS));
        let (own_offsets, rest_offsets) = offsets.split_at_mut(tensor.chunk_row_tiles(chunk).len());
        (lines, offsets) = (rest, rest_offsets);
        let out = &mut escaped[taken..];
        let few = parts.chunk.listed.bytes().len() <= own.len() / LINES_PER_LISTED;
        let more = match straight && few {
            true => parts.store_lines(level, nibbles, clean, buffers, own, own_offsets, out),
            false => parts.narrow(level, nibbles, buffers, own, own_offsets, out),
        }?;
        if !escapes && more > 0 {
            return None;
        }
        for offset in own_offsets {
            // At most 2^32 symbols, of which fewer are wide.
            *offset += taken as u32;
        }
        taken += more;
        let zeros = parts.chunk.listed.iter().filter(|(_, byte)| *byte == ESCAPE).map(|(position, _)| position);
        if !zeros.eq(parts.chunk.far.iter().map(|far| far.position as usize)) || !parts.raw.spare(parts.chunk.listed) {
            return None;
        }
        far.extend(FarAt::of_chunk(tensor, chunk, parts.chunk.far));
    }
    Some(taken)
}

/// Multiplies consecutive chunks with the only token of `x`. `sums`: (row tiles of the chunks, 16).
///
/// False if the codec is another one, a chunk is corrupt or has far symbols, or the shape does not
/// suit: `sums` are then of no use.
pub(crate) fn dot(
    level: Level,
    tensor: &CodedTensor,
    chunks: Range<usize>,
    buffers: &mut PairBuffers,
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
        let Some(parts) = Parts::new(tensor, chunk) else {
            return false;
        };
        if !parts.chunk.far.is_empty() || count_zeros(parts.chunk.listed.bytes()) > 0 {
            return false;
        }
        let [behind @ .., _] = &mut buffers.0;
        let Some(escaped) = parts.inner(level, 0, parts.escapes, behind) else {
            return false;
        };
        let row_tiles = tensor.chunk_row_tiles(chunk);
        let (sums, after) = rest.split_at_mut(row_tiles.len());
        rest = after;
        if !dot_lines(level, &parts, escaped, row_tiles.start, scales, x, sums) || !parts.raw.spare(parts.chunk.listed) {
            return false;
        }
    }
    true
}

per_isa! {
    /// Adds the nibbles of `shift` to those of all bytes, modulo 16.
    fn shift_nibbles(isa; shift: u8, tiles: &mut [TileBytes]) {
        for tile in tiles {
            isa.store(shifted(isa, isa.load(tile), shift), tile);
        }
    }
}

/// As [`shift_nibbles`], of one tile.
#[inline(always)]
fn shifted<I: Isa>(isa: I, tile: I::Tile, shift: u8) -> I::Tile {
    // The sum of the high nibbles alone has no carry from the low ones.
    let (both, high) = (isa.add_bytes(tile, isa.splat(shift)), isa.add_bytes(tile, isa.splat(shift & 0xf0)));
    isa.select_bits(isa.splat(15), both, high)
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

    /// Replaces the bytes that equal `escape` by the next pairs, or by anything beyond their end.
    #[inline(always)]
    fn fill<I: Isa>(&mut self, isa: I, tile: I::Tile, escape: I::Tile) -> I::Tile {
        // SAFETY: the read begins at `end` at most, behind which 64 bytes follow.
        let (tile, more) = unsafe { isa.unescape(tile, escape, self.bytes.as_ptr().add(self.taken.min(self.end))) };
        self.taken += more;
        tile
    }

    fn used_up(&self) -> bool {
        self.taken == self.end
    }
}

per_isa! {
    /// Pair bytes of one tier, whose fields lie in `lines`, with `shift` added to their nibbles modulo 16. `escaped`: the pairs
    /// of the tier behind, shifted, with [`PADDING_BYTES`] after them. `out`: room for all tiles. False if a field beyond the last
    /// pair is not 0, or escaped pairs are left or missing.
    fn expand(isa; tier: &Tier, shift: u8, pairs: usize, lines: &[TileBytes], escaped: &[u8], out: &mut [TileBytes]) -> bool {
        match tier.bits() {
            3 => expand_bits::<_, 3>(isa, tier, shift, pairs, lines, escaped, out),
            4 => expand_bits::<_, 4>(isa, tier, shift, pairs, lines, escaped, out),
            5 => expand_bits::<_, 5>(isa, tier, shift, pairs, lines, escaped, out),
            _ => expand_bits::<_, 6>(isa, tier, shift, pairs, lines, escaped, out),
        }
    }
}

#[inline(always)]
fn expand_bits<I: Isa, const B: usize>(
    isa: I,
    tier: &Tier,
    shift: u8,
    pairs: usize,
    lines: &[TileBytes],
    escaped: &[u8],
    out: &mut [TileBytes],
) -> bool {
    let mut pair_bytes = [0; TILE_SYMBOLS];
    isa.store(shifted(isa, isa.load(tier.pair_bytes()), shift), &mut pair_bytes);
    // No other pair is shifted to what ESCAPE is.
    let (table, escape) = (isa.table(&pair_bytes), isa.splat(pair_bytes[0]));
    let mut escaped = Escaped::new(escaped);
    let whole = pairs / EIGHT_PAIRS;
    let (eights, last) = lines.split_at(whole * B);
    let (out, out_last) = out.split_at_mut(whole * TILES);
    for (lines, out) in eights.as_chunks::<B>().0.iter().zip(out.as_chunks_mut::<TILES>().0) {
        for line in lines {
            prefetch_far(line.as_ptr().wrapping_add(PREFETCH_BYTES));
        }
        let tiles = fields(isa, lines);
        for i in 0..TILES {
            let tile = isa.lookup(table, tiles[i]);
            isa.store(escaped.fill(isa, tile, escape), &mut out[i]);
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
            isa.store(escaped.fill(isa, tile, escape), out);
        }
    }
    escaped.used_up()
}

per_isa! {
    /// The product of a chunk's row tiles, of which `first` is the first. `escaped` as for [`expand`].
    /// False if escaped pairs are left or missing.
    fn dot_lines(
        isa;
        parts: &Parts<'_>,
        escaped: &[u8],
        first: usize,
        scales: &KernelScales,
        x: &Activations,
        sums: &mut [[f32; TILE_ROWS]],
    ) -> bool {
        by_raw_bits!(parts.raw.bits(), dot_raw(isa, parts, escaped, first, scales, x, sums))
    }
}

/// As [`dot_lines`], with `R` raw bits.
#[inline(always)]
fn dot_raw<I: Isa, const R: u32>(
    isa: I,
    parts: &Parts<'_>,
    escaped: &[u8],
    first: usize,
    scales: &KernelScales,
    x: &Activations,
    sums: &mut [[f32; TILE_ROWS]],
) -> bool {
    match parts.table.tiers().first().map_or(8, Tier::bits) {
        3 => dot_bits::<_, R, 3>(isa, parts, escaped, first, scales, x, sums),
        4 => dot_bits::<_, R, 4>(isa, parts, escaped, first, scales, x, sums),
        5 => dot_bits::<_, R, 5>(isa, parts, escaped, first, scales, x, sums),
        6 => dot_bits::<_, R, 6>(isa, parts, escaped, first, scales, x, sums),
        _ => dot_bits::<_, R, 8>(isa, parts, escaped, first, scales, x, sums),
    }
}

/// As [`dot_raw`], with `B` bits in the first tier.
#[inline(always)]
fn dot_bits<I: Isa, const R: u32, const B: usize>(
    isa: I,
    parts: &Parts<'_>,
    escaped: &[u8],
    first: usize,
    scales: &KernelScales,
    x: &Activations,
    sums: &mut [[f32; TILE_ROWS]],
) -> bool {
    // Without a tier pairs are bytes, and nothing is looked up or escaped.
    let bytes = B == 8;
    let lookup = isa.table(parts.table.tiers().first().map_or(&[0; TILE_SYMBOLS], Tier::pair_bytes));
    let zero = isa.splat(0);
    let mut escaped = Escaped::new(escaped);
    let window = parts.table.window();
    let base = i32::from(window.base()) - i32::from(SYMBOL_BIAS);
    let TokenBlock { q, scales: xscales, sums: xsums, .. } = x.only();
    let lines: &[TileBytes] = if bytes { parts.chunk.escapes } else { parts.chunk.tiers[0].1 }.as_chunks().0;
    let mut eights = lines.as_chunks::<B>().0.iter();
    // Eight tiles of pairs have two raw lines for each raw bit.
    let mut raw_lines: &[TileBytes] = parts.chunk.raw_lines.as_chunks().0;
    let mut listed = Listed::new(parts.chunk.listed.iter(), window.listed_byte());
    let mut pairs = [[0; TILE_SYMBOLS]; TILES];
    for (i, acc) in sums.iter_mut().enumerate() {
        let tile_scales = scales.tile(first + i);
        *acc = [0.0; TILE_ROWS];
        for (segment, q) in q.chunks(x.segment() / TILE_COLS).enumerate() {
            let (mut low, mut high) = (isa.zero(), isa.zero());
            let mut beside = [0; TILE_ROWS];
            for (q, lines) in q.as_chunks::<{ 2 * TILES }>().0.iter().zip(&mut eights) {
                let (raw, rest) = raw_lines.split_at(2 * R as usize);
                raw_lines = rest;
                for line in lines {
                    prefetch_far(line.as_ptr().wrapping_add(PREFETCH_BYTES));
                }
                for line in raw {
                    prefetch_far(line.as_ptr().wrapping_add(PREFETCH_BYTES));
                }
                let tiles = fields(isa, lines);
                for i in 0..TILES {
                    let tile = if bytes { tiles[i] } else { escaped.fill(isa, isa.lookup(lookup, tiles[i]), zero) };
                    isa.store(tile, &mut pairs[i]);
                }
                // The compiler would move all products behind all expands, and has no registers for what is then alive.
                if R > 0 {
                    std::hint::black_box(&mut pairs);
                }
                for i in 0..TILES {
                    let tile = isa.load(&pairs[i]);
                    match 4usize.checked_div(R as usize) {
                        None => {
                            low = isa.dot_low(low, tile, &q[2 * i]);
                            high = isa.dot_high(high, tile, &q[2 * i + 1]);
                        }
                        Some(per_line) => {
                            let line = isa.load(&raw[i / per_line]);
                            (low, high) = isa.dot_symbols::<R>((low, high), tile, line, i % per_line, [&q[2 * i], &q[2 * i + 1]]);
                        }
                    }
                }
                listed.add(&pairs, q, &mut beside);
            }
            let joined = if R == 0 { isa.join_nibbles(low, high) } else { isa.join_symbols::<R>(low, high) };
            let mut isum = isa.finish(joined, 0);
            for (sum, beside) in isum.iter_mut().zip(beside) {
                *sum += base * xsums[segment] + beside;
            }
            SegmentScales::of(tile_scales, segment).add(isa, acc, &isum, xscales[segment], xsums[segment]);
        }
        finish_rows(tile_scales, acc);
    }
    (bytes || escaped.used_up()) && listed.valid()
}

#[cfg(test)]
mod tests {
    use tersor_codec::Codec;
    use tersor_format::EncodedTensor;

    use super::*;
    use crate::decoded::narrow_row_tile;
    use crate::testing::{by_codec, gaussian, levels};

    /// Gaussian symbols about `mean`, one in a thousand far if `far`.
    fn tensor(rows: usize, cols: usize, deviation: f64, mean: f64, far: bool, chunk_symbols: u32) -> EncodedTensor {
        gaussian(Codec::Tiered, rows, cols, deviation, mean, far, chunk_symbols)
    }

    fn window(tensor: &CodedTensor) -> tersor_codec::pairs::Window {
        match tensor.table() {
            AnyTable::Tiered(table) => table.window(),
            _ => unreachable!("it was coded so"),
        }
    }

    /// Deviations whose tables have no, one and two raw bits, and one for which none have all symbols of a window.
    const DEVIATIONS: [(f64, u8); 6] = [(0.9, 0), (1.4, 0), (2.0, 0), (2.8, 1), (5.0, 2), (30.0, 2)];

    /// No kernel gives up, with row tiles that begin within a pair too.
    #[test]
    fn symbol_bytes_are_those_of_the_codec() {
        for (deviation, raw_bits) in DEVIATIONS {
            for (row_tiles, cols, far) in (1..=5).flat_map(|n| [(n, 128, false), (n, 36, true), (n, 4, true), (n, 1100, true)]) {
                let encoded = tensor(row_tiles * 16, cols, deviation, 0.0, far, 2 * 16 * cols as u32);
                let tensor = encoded.tensor();
                assert!(window(tensor).raw_bits() == raw_bits || cols * row_tiles < 1100, "deviation {deviation}");
                for (level, chunk) in levels().into_iter().flat_map(|level| (0..tensor.chunk_count()).map(move |chunk| (level, chunk))) {
                    let (want, want_far) = by_codec(tensor, chunk..chunk + 1);
                    let (mut bytes, mut far) = (vec![0; want.len()], Vec::new());
                    assert!(decode(level, tensor, chunk, &mut PairBuffers::default(), &mut bytes, &mut far));
                    assert!(bytes == want && far == want_far, "{level} {deviation} {row_tiles} {cols}");
                }
            }
        }
    }

    /// Lines of windows that agree with the form and of others, with and without escapes.
    #[test]
    fn lines_are_narrowed_symbol_bytes() {
        let mut ways = [0; 3];
        for (deviation, mean, far) in DEVIATIONS.iter().flat_map(|&(deviation, _)| {
            [(deviation, 0.0, false), (deviation, 0.4, true), (deviation, 0.9, false), (deviation, -30.0, false)]
        }) {
            let encoded = tensor(5 * 16, 520, deviation, mean, far, 2 * 16 * 520);
            let (tensor, window) = (encoded.tensor(), window(encoded.tensor()));
            let chunks = 0..tensor.chunk_count();
            let (bytes, want_far) = by_codec(tensor, chunks.clone());
            let least = *bytes.iter().min().unwrap();
            let forms = [(120, true), (least, false), (least + 1, false)];
            for (level, (bias, escapes)) in levels().into_iter().flat_map(|level| forms.map(|form| (level, form))) {
                let mut want = (vec![[0; TILE_SYMBOLS]; bytes.len() / 128], vec![0; 5], vec![0; bytes.len() + 64]);
                let mut got = want.clone();
                let mut taken = 0;
                let tiles = bytes.as_chunks().0.chunks(tensor.col_steps());
                for ((tiles, lines), offset) in tiles.zip(want.0.chunks_mut(tensor.col_steps() / 2)).zip(&mut want.1) {
                    *offset = taken as u32;
                    taken += narrow_row_tile(Level::Scalar, tiles, bias, escapes.into(), lines, &mut want.2[taken..]);
                }
                let (mut far, mut buffers) = (Vec::new(), PairBuffers::default());
                let (lines, offsets, out) = (&mut got.0, &mut got.1, &mut got.2);
                let found = decode_lines(level, tensor, chunks.clone(), &mut buffers, bias, escapes, lines, offsets, out, &mut far);
                let what = format!("{level} {deviation} {mean} {bias} {escapes}");
                assert_eq!(found, (escapes || taken == 0).then_some(taken), "{what}");
                if found.is_some() {
                    assert!(got.0 == want.0 && got.1 == want.1 && got.2[..taken] == want.2[..taken] && far == want_far, "{what}");
                    let nibbles = Nibbles::new(window, bias, escapes);
                    ways[usize::from(nibbles.straight(window)) + usize::from(nibbles.straight(window) && nibbles.shift_byte() != 0)] += 1;
                }
            }
        }
        assert!(ways.iter().all(|count| *count > 0), "all ways were tried: {ways:?}");
    }

    /// Products that the fused kernel leaves to others, and those that it may not.
    #[test]
    fn products_are_given_up_for_a_reason_only() {
        for (deviation, _) in DEVIATIONS {
            for (cols, far, expected) in [(64, false, true), (576, false, true), (520, false, false), (36, false, false), (64, true, false)]
            {
                let encoded = tensor(20 * 16, cols, deviation, 0.0, far, 16 * 16 * 64);
                let (tensor, scales) = (encoded.tensor(), KernelScales::from_coded(encoded.tensor()).unwrap());
                let values: Vec<f32> = (0..cols).map(|i| (i * 37 % 101) as f32 - 50.0).collect();
                let x = Activations::quantize(Level::Scalar, &values, 1, cols, scales.segment());
                let mut want = None;
                for level in levels() {
                    let mut sums = vec![[0.0; TILE_ROWS]; 20];
                    let done = dot(level, tensor, 0..tensor.chunk_count(), &mut PairBuffers::default(), &scales, &x, &mut sums);
                    assert_eq!(done, expected, "{level}: deviation {deviation}, {cols} columns, far {far}");
                    assert_eq!(&sums, want.get_or_insert(sums.clone()), "{level}: deviation {deviation}, {cols} columns");
                }
            }
        }
    }
}
