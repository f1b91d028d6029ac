//! The steps that every kernel is made of, once per level: a tile of 64 symbol bytes in registers,
//! and 16 integer sums, one a row of the tile.
//!
//! A new level (NEON) is one more implementation of [`Isa`], and an arm in `per_isa`.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2_rans;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2_rans_pairs;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512_block_ans;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512_rans;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512_rans_pairs;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512_rans_precise;
#[cfg(target_arch = "x86_64")]
mod avx512_wide;
mod scalar;
#[cfg(target_arch = "x86_64")]
pub(crate) mod streams;

pub(crate) use scalar::Scalar;

use crate::ops::LANES;
use crate::{TILE_COLS, TILE_ROWS, TILE_SYMBOLS};

/// 64 symbol bytes in memory.
pub(crate) type TileBytes = [u8; TILE_SYMBOLS];

/// Tiles on a stack, each in one cache line: those that lie across two cost decoding a fifth.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Tiles<const N: usize>(pub(crate) [TileBytes; N]);

/// How far ahead of the plain GEMV's lines the memory is told what comes.
pub(crate) const PLAIN_AHEAD_BYTES: usize = 8192;

/// One level's steps, all of which are to be called from functions that are always inlined (not
/// from closures) below a function that enables the level's features. A value of the type proves
/// that the machine has what the steps need.
pub(crate) trait Isa: Copy {
    /// 64 bytes: lane `row * 4 + col`.
    type Tile: Copy;
    /// 16 i32 sums, one a row, in whatever form the level adds best.
    type Sums: Copy;
    /// 16 f32 lanes.
    type Floats: Copy;
    /// 64 bytes to look up.
    type Table: Copy;
    /// Whether bytes are spread over lanes by one operation, so that [`Isa::unescape`] costs about what a product does.
    const SPREADS: bool;

    fn load(self, tile: &TileBytes) -> Self::Tile;
    fn store(self, tile: Self::Tile, out: &mut TileBytes);
    /// Every byte `b`.
    fn splat(self, b: u8) -> Self::Tile;
    /// Low nibble of each byte, plus `bias`.
    fn low(self, line: Self::Tile, bias: Self::Tile) -> Self::Tile;
    /// High nibble of each byte, plus `bias`.
    fn high(self, line: Self::Tile, bias: Self::Tile) -> Self::Tile;
    /// Each byte shifted right by `bits`; the highest `bits` bits of each are then anything.
    fn shift_right(self, tile: Self::Tile, bits: u32) -> Self::Tile;
    /// By byte, the sum without its carry.
    fn add_bytes(self, a: Self::Tile, b: Self::Tile) -> Self::Tile;
    /// The bits of `a` where `mask` has ones, those of `b` elsewhere.
    fn select_bits(self, mask: Self::Tile, a: Self::Tile, b: Self::Tile) -> Self::Tile;
    /// A table of 64 bytes, as [`Isa::lookup`] wants it.
    fn table(self, bytes: &TileBytes) -> Self::Table;
    /// By byte, `table[index % 64]`.
    fn lookup(self, table: Self::Table, index: Self::Tile) -> Self::Tile;
    /// Replaces the bytes of `tile` that equal `escape` by the next bytes at `escapes`, in lane
    /// order; returns how many.
    ///
    /// # Safety
    /// 64 bytes at `escapes` are readable.
    unsafe fn unescape(self, tile: Self::Tile, escape: Self::Tile, escapes: *const u8) -> (Self::Tile, usize);
    /// `ones` in the lanes of `mask`, `zeros` in the others.
    fn select(self, mask: u64, zeros: Self::Tile, ones: Self::Tile) -> Self::Tile;
    /// The next bytes at `ones`, in lane order, in the lanes of `mask`; `zeros` in the others.
    ///
    /// # Safety
    /// 64 bytes at `ones` are readable.
    unsafe fn expand(self, mask: u64, zeros: Self::Tile, ones: *const u8) -> Self::Tile;
    /// The next bytes at `ones` in the lanes of `mask`, the next bytes at `zeros` in the others.
    ///
    /// # Safety
    /// 64 bytes at both are readable.
    unsafe fn merge(self, mask: u64, zeros: *const u8, ones: *const u8) -> Self::Tile;
    /// Fields of a tile of symbol bytes: `byte - bias` where that lies in `lowest..=15`, else 0,
    /// and the mask of the lanes where it does not.
    fn narrow(self, tile: Self::Tile, bias: Self::Tile, lowest: Self::Tile) -> (Self::Tile, u64);
    /// `low | high << 4`, of fields.
    fn pair(self, low: Self::Tile, high: Self::Tile) -> Self::Tile;
    /// The symbols of pairs of nibbles, low and high, with `R` raw bits below each: bits `2 * R * turn`
    /// and up of `line`, first those of the low nibble.
    #[inline(always)]
    fn symbols<const R: u32>(self, pairs: Self::Tile, line: Self::Tile, turn: usize) -> (Self::Tile, Self::Tile) {
        let (field, bits, zero) = (self.splat(15 << R), self.splat((1 << R) - 1), self.splat(0));
        let raw = self.shift_right(line, 2 * R * turn as u32);
        let low = self.shift_right(self.pair(zero, pairs), 4 - R);
        let high = self.shift_right(pairs, 4 - R);
        let (first, second) = (self.select_bits(bits, raw, zero), self.select_bits(bits, self.shift_right(raw, R), zero));
        (self.select_bits(field, low, first), self.select_bits(field, high, second))
    }
    /// The lanes whose low nibble is 0, and those whose high nibble is.
    fn zero_nibbles(self, line: Self::Tile) -> [u64; 2];
    /// Whether any nibble of the lines is 0.
    #[inline(always)]
    fn any_zero_nibble(self, lines: &[TileBytes]) -> bool {
        lines.iter().any(|line| self.zero_nibbles(self.load(line)) != [0, 0])
    }
    /// Writes the bytes of the lanes in `mask` to the front of `out`, in lane order, and anything
    /// to the bytes behind them.
    ///
    /// # Safety
    /// 64 bytes are writable at `out`.
    unsafe fn compress(self, tile: Self::Tile, mask: u64, out: *mut u8);
    fn zero(self) -> Self::Sums;
    /// Adds each row's four products with `q`.
    fn dot(self, sums: Self::Sums, tile: Self::Tile, q: &[i8; TILE_COLS]) -> Self::Sums;
    /// Adds each row's four products of low nibbles with `q`.
    fn dot_low(self, sums: Self::Sums, tile: Self::Tile, q: &[i8; TILE_COLS]) -> Self::Sums;
    /// Adds each row's four products of high nibbles with `q`, to sums of their own.
    fn dot_high(self, sums: Self::Sums, tile: Self::Tile, q: &[i8; TILE_COLS]) -> Self::Sums;
    /// Adds the products of the nibbles of lines, low and high, with the `q` of either; what is left for
    /// [`Isa::finish`] is a `q_sum` of 0.
    #[inline(always)]
    fn dot_lines(self, sums: Self::Sums, lines: &[TileBytes], q: &[[[i8; TILE_COLS]; 2]]) -> Self::Sums {
        let (mut low, mut high) = (self.zero(), self.zero());
        for (line, q) in lines.iter().zip(q) {
            prefetch(line.as_ptr().wrapping_add(PLAIN_AHEAD_BYTES));
            let line = self.load(line);
            (low, high) = (self.dot_low(low, line, &q[0]), self.dot_high(high, line, &q[1]));
        }
        self.add(sums, self.join_nibbles(low, high))
    }
    /// Adds each row's four products of bytes below 64 with `q`, for [`Isa::finish`] with a `q_sum` of 0.
    fn dot_small(self, sums: Self::Sums, tile: Self::Tile, q: &[i8; TILE_COLS]) -> Self::Sums;
    /// Adds each row's four products of the symbols that [`Isa::symbols`] finds with `q`, those of first and second symbols to
    /// sums of their own, for [`Isa::join_symbols`].
    #[inline(always)]
    fn dot_symbols<const R: u32>(
        self,
        sums: (Self::Sums, Self::Sums),
        pairs: Self::Tile,
        line: Self::Tile,
        turn: usize,
        q: [&[i8; TILE_COLS]; 2],
    ) -> (Self::Sums, Self::Sums) {
        let (first, second) = self.symbols::<R>(pairs, line, turn);
        (self.dot_small(sums.0, first, q[0]), self.dot_small(sums.1, second, q[1]))
    }
    /// The sums of both, as [`Isa::join_nibbles`].
    #[inline(always)]
    fn join_symbols<const R: u32>(self, first: Self::Sums, second: Self::Sums) -> Self::Sums {
        self.add(first, second)
    }
    /// The sums of both, as of one product: what is left for [`Isa::finish`] is a `q_sum` of 0.
    fn join_nibbles(self, low: Self::Sums, high: Self::Sums) -> Self::Sums;
    /// Sums of two halves of a segment.
    fn add(self, a: Self::Sums, b: Self::Sums) -> Self::Sums;
    /// The rows' sums of `symbol * q`, where `symbol = byte - 128`; `q_sum` is the sum of all `q`
    /// that went in.
    fn finish(self, sums: Self::Sums, q_sum: i32) -> [i32; TILE_ROWS];
    /// As [`Isa::finish`], with `more` added to every row, each rounded to the nearest float. They stay in registers: a
    /// store of sums that a wider load follows keeps all that comes behind it waiting.
    fn finish_floats(self, sums: Self::Sums, q_sum: i32, more: i32) -> Self::Floats;

    fn floats(self, x: &[f32; LANES]) -> Self::Floats;
    fn store_floats(self, x: Self::Floats, out: &mut [f32; LANES]);
    fn splat_float(self, x: f32) -> Self::Floats;
    /// Each integer rounded to the nearest float.
    fn floats_of(self, x: &[i32; LANES]) -> Self::Floats;
    fn multiply(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `acc + a * b` by lane, the product and the sum rounded one by one.
    fn multiply_add(self, acc: Self::Floats, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// The sum of all lanes, as [`crate::ops::fold`] adds them.
    fn fold(self, x: Self::Floats) -> f32;
}

/// Tells the memory that the cache line at `place` will be wanted; it need not be readable.
#[inline(always)]
pub(crate) fn prefetch(place: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, whatever the address; SSE is part of the architecture.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(place.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// As [`prefetch`], not before long: as far as the L2 cache.
#[inline(always)]
pub(crate) fn prefetch_far(place: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as for `prefetch`.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(place.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// Writes the next bytes over the lanes of `mask` of a tile that was just stored. Where there are up to `FEW` they cost a few
/// instructions and no branch that depends on how many, but a vector that is loaded from the tile before long waits for
/// them. With `spare` the byte behind the tile may be overwritten; without it there is such a branch.
///
/// # Safety
/// 64 bytes at `tile` are writable, with `spare` 65; 64 bytes at `bytes` are readable.
#[inline(always)]
pub(crate) unsafe fn patch<const FEW: usize>(tile: *mut u8, mut mask: u64, mut bytes: *const u8, spare: bool) {
    // SAFETY: there are at most 64 lanes; when none is left the place is the 65th.
    unsafe {
        if spare {
            for _ in 0..FEW {
                *tile.add(mask.trailing_zeros() as usize) = *bytes;
                bytes = bytes.add(1);
                mask &= mask.wrapping_sub(1);
            }
        }
        while mask != 0 {
            *tile.add(mask.trailing_zeros() as usize) = *bytes;
            bytes = bytes.add(1);
            mask &= mask - 1;
        }
    }
}

/// `body` for the chunks 0..N of at most eight. Not a loop: the compiler leaves loops of so long a
/// body as they are, and then keeps all states in memory.
macro_rules! each_chunk {
    ($n:ident, |$i:ident| $body:expr) => {
        $crate::isa::each_chunk!(@ $n $i $body, 0 1 2 3 4 5 6 7)
    };
    (@ $n:ident $i:ident $body:expr, $($value:literal)*) => {
        $(if $value < $n {
            let $i = $value;
            $body
        })*
    };
}

pub(crate) use each_chunk;

/// Defines a function whose body is compiled once for every level, with the level's [`Isa`] as its
/// first argument.
macro_rules! per_isa {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($isa:ident; $($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(level: $crate::Level, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body<I: $crate::isa::Isa>($isa: I, $($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,f16c,bmi1,bmi2,popcnt")]
            #[allow(clippy::too_many_arguments)]
            fn avx2(token: $crate::Avx2, $($arg: $ty),*) $(-> $ret)? { body(token, $($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,gfni,avx2,f16c,bmi1,bmi2,popcnt")]
            #[allow(clippy::too_many_arguments)]
            fn avx512(token: $crate::Avx512, $($arg: $ty),*) $(-> $ret)? { body(token, $($arg),*) }
            match level {
                // SAFETY: the token proves the features that the wrapper enables.
                #[cfg(target_arch = "x86_64")]
                $crate::Level::Avx2(token) => unsafe { avx2(token, $($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::Level::Avx512(token) => unsafe { avx512(token, $($arg),*) },
                _ => body($crate::isa::Scalar, $($arg),*),
            }
        }
    };
}
pub(crate) use per_isa;
