//! What the kernels of `tiered` and `rans-pairs` do with pair bytes once they have them.

use tersor_codec::pairs::LISTED_NIBBLE;
use tersor_codec::tiered::TIERS_MAX;

use crate::buffer::AlignedBytes;
use crate::isa::{Isa, TileBytes, per_isa, prefetch};
use crate::{TILE_COLS, TILE_ROWS, TILE_SYMBOLS};

/// Pair bytes that stay in the L1 or L2 cache on their way to a sink.
#[derive(Default)]
pub(crate) struct PairBuffers(pub(crate) [AlignedBytes; TIERS_MAX]);

/// How far ahead of a raw line the memory is told what comes: a block of tiles of pairs, which are read at once.
const PREFETCH_BYTES: usize = 1024;

/// The raw bits of consecutive tiles of pairs.
#[derive(Clone, Copy)]
pub(crate) struct RawLines<'a> {
    bits: u32,
    lines: &'a [TileBytes],
    /// The first tile of pairs, counted from that which `lines` begin with.
    step: usize,
}

impl<'a> RawLines<'a> {
    /// The lines of a chunk, whose symbols have `bits` raw bits each.
    pub(crate) fn new(bits: u8, lines: &'a [u8]) -> RawLines<'a> {
        RawLines { bits: bits.into(), lines: lines.as_chunks().0, step: 0 }
    }

    pub(crate) fn bits(&self) -> u32 {
        self.bits
    }

    /// Those behind the first `steps` tiles of pairs.
    #[inline(always)]
    pub(crate) fn skip(self, steps: usize) -> RawLines<'a> {
        RawLines { step: self.step + steps, ..self }
    }

    /// The raw bits of a symbol of the chunk.
    fn of_symbol(&self, position: usize) -> u8 {
        let Some(per_line) = 4usize.checked_div(self.bits as usize) else {
            return 0;
        };
        let (tile, lane) = (position / TILE_SYMBOLS, position % TILE_SYMBOLS);
        let line = self.lines[tile / (2 * per_line)];
        line[lane] >> (self.bits as usize * (tile % (2 * per_line))) & ((1 << self.bits) - 1)
    }

    /// Whether listed symbols have none. To be asked when the chunk is done: only then are their lines in the caches.
    pub(crate) fn spare(&self, listed: tersor_codec::pairs::Listed<'_>) -> bool {
        listed.iter().all(|(position, _)| self.of_symbol(position) == 0)
    }

    /// Whether the bits behind those of `tiles` tiles of symbols, with which the lines end, are 0.
    pub(crate) fn end_with(&self, tiles: usize) -> bool {
        let Some(per_line) = 8usize.checked_div(self.bits as usize) else {
            return true;
        };
        let used = self.bits as usize * (tiles % per_line);
        used == 0 || self.lines.last().is_none_or(|line| line.iter().all(|byte| byte >> used == 0))
    }

    /// Whether the first tile of pairs is the first of four.
    pub(crate) fn starts_line(&self) -> bool {
        self.step.is_multiple_of(4)
    }

    /// As [`RawLines::symbols`], of four tiles of pairs of which the first is the `4 * i`th and starts a line.
    #[inline(always)]
    pub(crate) fn symbols_of_four<I: Isa, const R: u32>(&self, isa: I, i: usize, pairs: &[TileBytes; 4]) -> [(I::Tile, I::Tile); 4] {
        let mut symbols = [(isa.splat(0), isa.splat(0)); 4];
        let lines = match R {
            0 => self.lines,
            _ => &self.lines[(self.step / 4 + i) * R as usize..][..R as usize],
        };
        for line in &lines[..R as usize] {
            prefetch(line.as_ptr().wrapping_add(PREFETCH_BYTES));
        }
        for turn in 0..4 {
            let tile = isa.load(&pairs[turn]);
            symbols[turn] = match 4u32.checked_div(R) {
                None => self.symbols::<I, R>(isa, turn, tile),
                Some(per_line) => {
                    let per_line = per_line as usize;
                    isa.symbols::<R>(tile, isa.load(&lines[turn / per_line]), turn % per_line)
                }
            };
        }
        symbols
    }

    /// The symbols of the `i`th tile of pairs, counted from the window's first. `R`: the raw bits, of
    /// which there must be lines enough.
    #[inline(always)]
    pub(crate) fn symbols<I: Isa, const R: u32>(&self, isa: I, i: usize, pairs: I::Tile) -> (I::Tile, I::Tile) {
        if R == 0 {
            let zero = isa.splat(0);
            return (isa.low(pairs, zero), isa.high(pairs, zero));
        }
        let per_line = (4 / R) as usize;
        let step = self.step + i;
        let line = &self.lines[step / per_line];
        prefetch(line.as_ptr().wrapping_add(PREFETCH_BYTES));
        isa.symbols::<R>(pairs, isa.load(line), step % per_line)
    }
}

/// Calls `$f::<_, R>(...)` for a number of raw bits.
macro_rules! by_raw_bits {
    ($bits:expr, $f:ident($($arg:expr),*)) => {
        match $bits {
            0 => $f::<_, 0>($($arg),*),
            1 => $f::<_, 1>($($arg),*),
            _ => $f::<_, 2>($($arg),*),
        }
    };
}
pub(crate) use by_raw_bits;

per_isa! {
    /// Symbol bytes of tiles of pairs, two tiles of each, of the last perhaps one. False if that one's
    /// partners are not 0. `base`: the symbol byte of the window's first symbol.
    pub(crate) fn split(isa; base: u8, raw: RawLines<'_>, pairs: &[TileBytes], out: &mut [TileBytes]) -> bool {
        by_raw_bits!(raw.bits(), split_raw(isa, base, raw, pairs, out))
    }
}

#[inline(always)]
fn split_raw<I: Isa, const R: u32>(isa: I, base: u8, raw: RawLines<'_>, pairs: &[TileBytes], out: &mut [TileBytes]) -> bool {
    let bias = isa.splat(base);
    for (i, (pairs, out)) in pairs.iter().zip(out.chunks_mut(2)).enumerate() {
        let tile = isa.load(pairs);
        let (first, second) = if R == 0 {
            (isa.low(tile, bias), isa.high(tile, bias))
        } else {
            let (first, second) = raw.symbols::<I, R>(isa, i, tile);
            (isa.add_bytes(first, bias), isa.add_bytes(second, bias))
        };
        isa.store(first, &mut out[0]);
        match out.get_mut(1) {
            Some(out) => isa.store(second, out),
            None if pairs.iter().any(|pair| pair >> 4 != 0) => return false,
            None => {}
        }
    }
    true
}

/// Puts listed symbols in their places. False if one was not coded as `coded`.
pub(crate) fn put_listed(listed: impl Iterator<Item = (usize, u8)>, coded: u8, out: &mut [u8]) -> bool {
    for (position, byte) in listed {
        if out[position] != coded {
            return false;
        }
        out[position] = byte;
    }
    true
}

/// The listed symbols of a chunk on their way through its product.
pub(crate) struct Listed<L> {
    rest: L,
    next: Option<(usize, u8)>,
    /// Symbols before the tiles at hand.
    start: usize,
    /// The symbol byte that stands in for them.
    coded: i32,
    /// Whether all had its nibble.
    valid: bool,
}

impl<L: Iterator<Item = (usize, u8)>> Listed<L> {
    /// `coded`: the symbol byte that stands in for the listed symbols, whose raw bits are right.
    pub(crate) fn new(mut rest: L, coded: u8) -> Listed<L> {
        let next = rest.next();
        Listed { rest, next, start: 0, coded: coded.into(), valid: true }
    }

    /// Whether the next `tiles` tiles of pairs have listed symbols; if not they are passed.
    #[inline(always)]
    pub(crate) fn any(&mut self, tiles: usize) -> bool {
        let end = self.start + 2 * TILE_SYMBOLS * tiles;
        let any = self.next.is_some_and(|(position, _)| position < end);
        if !any {
            self.start = end;
        }
        any
    }

    /// Adds what the listed symbols of the next tiles of pairs are more than what stands in for them.
    /// `q`: of their steps, two for each tile of pairs.
    #[inline(always)]
    pub(crate) fn add(&mut self, pairs: &[TileBytes], q: &[[i8; TILE_COLS]], sums: &mut [i32; TILE_ROWS]) {
        let end = self.start + 2 * TILE_SYMBOLS * pairs.len();
        while let Some((position, byte)) = self.next
            && position < end
        {
            let (step, lane) = ((position - self.start) / TILE_SYMBOLS, position % TILE_SYMBOLS);
            self.valid &= nibble(pairs, step, lane) == LISTED_NIBBLE;
            sums[lane / TILE_COLS] += (i32::from(byte) - self.coded) * i32::from(q[step][lane % TILE_COLS]);
            self.next = self.rest.next();
        }
        self.start = end;
    }

    /// Whether all listed symbols were met, and coded as such.
    pub(crate) fn valid(&self) -> bool {
        self.valid && self.next.is_none()
    }
}

/// The nibble of a symbol: `step` counts tiles of symbols.
#[inline(always)]
pub(crate) fn nibble(pairs: &[TileBytes], step: usize, lane: usize) -> u8 {
    pairs[step / 2][lane] >> (4 * (step % 2)) & 15
}
