//! Plain arrays: what the other levels are compared with.

use super::{Isa, TileBytes};
use crate::ops::{LANES, fold};
use crate::{TILE_COLS, TILE_ROWS, TILE_SYMBOLS};

/// Needs nothing.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

impl Isa for Scalar {
    type Tile = TileBytes;
    type Sums = [i32; TILE_ROWS];
    type Floats = [f32; LANES];
    type Table = TileBytes;
    const SPREADS: bool = true;

    #[inline(always)]
    fn load(self, tile: &TileBytes) -> TileBytes {
        *tile
    }

    #[inline(always)]
    fn store(self, tile: TileBytes, out: &mut TileBytes) {
        *out = tile;
    }

    #[inline(always)]
    fn splat(self, b: u8) -> TileBytes {
        [b; TILE_SYMBOLS]
    }

    #[inline(always)]
    fn low(self, line: TileBytes, bias: TileBytes) -> TileBytes {
        std::array::from_fn(|i| (line[i] & 15).wrapping_add(bias[i]))
    }

    #[inline(always)]
    fn high(self, line: TileBytes, bias: TileBytes) -> TileBytes {
        std::array::from_fn(|i| (line[i] >> 4).wrapping_add(bias[i]))
    }

    #[inline(always)]
    fn shift_right(self, tile: TileBytes, bits: u32) -> TileBytes {
        tile.map(|b| b >> bits)
    }

    #[inline(always)]
    fn add_bytes(self, a: TileBytes, b: TileBytes) -> TileBytes {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }

    #[inline(always)]
    fn select_bits(self, mask: TileBytes, a: TileBytes, b: TileBytes) -> TileBytes {
        std::array::from_fn(|i| a[i] & mask[i] | b[i] & !mask[i])
    }

    #[inline(always)]
    fn table(self, bytes: &TileBytes) -> TileBytes {
        *bytes
    }

    #[inline(always)]
    fn lookup(self, table: TileBytes, index: TileBytes) -> TileBytes {
        index.map(|i| table[usize::from(i % 64)])
    }

    #[inline(always)]
    unsafe fn unescape(self, mut tile: TileBytes, escape: TileBytes, escapes: *const u8) -> (TileBytes, usize) {
        let mut taken = 0;
        for (b, e) in tile.iter_mut().zip(escape) {
            if *b == e {
                // SAFETY: at most 64 lanes, and 64 bytes are readable.
                *b = unsafe { *escapes.add(taken) };
                taken += 1;
            }
        }
        (tile, taken)
    }

    #[inline(always)]
    fn select(self, mask: u64, zeros: TileBytes, ones: TileBytes) -> TileBytes {
        std::array::from_fn(|i| if mask >> i & 1 == 1 { ones[i] } else { zeros[i] })
    }

    #[inline(always)]
    unsafe fn expand(self, mask: u64, mut zeros: TileBytes, mut ones: *const u8) -> TileBytes {
        for (i, b) in zeros.iter_mut().enumerate() {
            let one = mask >> i & 1;
            // SAFETY: before lane `i` at most `i` bytes were taken, and 64 are readable.
            unsafe {
                let candidates = [*b, *ones];
                *b = candidates[one as usize];
                ones = ones.add(one as usize);
            }
        }
        zeros
    }

    #[inline(always)]
    unsafe fn merge(self, mask: u64, mut zeros: *const u8, mut ones: *const u8) -> TileBytes {
        let mut tile = [0; TILE_SYMBOLS];
        for (i, b) in tile.iter_mut().enumerate() {
            let one = (mask >> i & 1) as usize;
            // SAFETY: as above.
            unsafe {
                let candidates = [*zeros, *ones];
                *b = candidates[one];
                zeros = zeros.add(1 - one);
                ones = ones.add(one);
            }
        }
        tile
    }

    #[inline(always)]
    fn narrow(self, tile: TileBytes, bias: TileBytes, lowest: TileBytes) -> (TileBytes, u64) {
        let mut mask = 0;
        let fields = std::array::from_fn(|i| {
            let field = tile[i].wrapping_sub(bias[i]);
            let fits = (lowest[i]..=15).contains(&field);
            mask |= u64::from(!fits) << i;
            if fits { field } else { 0 }
        });
        (fields, mask)
    }

    #[inline(always)]
    fn pair(self, low: TileBytes, high: TileBytes) -> TileBytes {
        std::array::from_fn(|i| low[i] | high[i] << 4)
    }

    #[inline(always)]
    fn zero_nibbles(self, line: TileBytes) -> [u64; 2] {
        [15, 15 << 4].map(|nibble| (0..TILE_SYMBOLS).filter(|i| line[*i] & nibble == 0).fold(0, |mask, i| mask | 1 << i))
    }

    #[inline(always)]
    unsafe fn compress(self, tile: TileBytes, mut mask: u64, mut out: *mut u8) {
        while mask != 0 {
            // SAFETY: a 64-bit mask has at most 64 ones.
            unsafe {
                *out = tile[mask.trailing_zeros() as usize];
                out = out.add(1);
            }
            mask &= mask - 1;
        }
    }

    #[inline(always)]
    fn zero(self) -> [i32; TILE_ROWS] {
        [0; TILE_ROWS]
    }

    #[inline(always)]
    fn dot(self, mut sums: [i32; TILE_ROWS], tile: TileBytes, q: &[i8; TILE_COLS]) -> [i32; TILE_ROWS] {
        for (sum, row) in sums.iter_mut().zip(tile.as_chunks::<TILE_COLS>().0) {
            for (b, q) in row.iter().zip(q) {
                *sum += (i32::from(*b) - 128) * i32::from(*q);
            }
        }
        sums
    }

    #[inline(always)]
    fn dot_low(self, sums: [i32; TILE_ROWS], tile: TileBytes, q: &[i8; TILE_COLS]) -> [i32; TILE_ROWS] {
        self.dot_small(sums, tile.map(|b| b % 16), q)
    }

    #[inline(always)]
    fn dot_small(self, mut sums: [i32; TILE_ROWS], tile: TileBytes, q: &[i8; TILE_COLS]) -> [i32; TILE_ROWS] {
        for (sum, row) in sums.iter_mut().zip(tile.as_chunks::<TILE_COLS>().0) {
            for (b, q) in row.iter().zip(q) {
                *sum += i32::from(*b) * i32::from(*q);
            }
        }
        sums
    }

    #[inline(always)]
    fn dot_high(self, sums: [i32; TILE_ROWS], tile: TileBytes, q: &[i8; TILE_COLS]) -> [i32; TILE_ROWS] {
        self.dot_low(sums, self.shift_right(tile, 4), q)
    }

    #[inline(always)]
    fn join_nibbles(self, low: [i32; TILE_ROWS], high: [i32; TILE_ROWS]) -> [i32; TILE_ROWS] {
        self.add(low, high)
    }

    #[inline(always)]
    fn add(self, a: [i32; TILE_ROWS], b: [i32; TILE_ROWS]) -> [i32; TILE_ROWS] {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn finish(self, sums: [i32; TILE_ROWS], _q_sum: i32) -> [i32; TILE_ROWS] {
        sums
    }

    #[inline(always)]
    fn finish_floats(self, sums: [i32; TILE_ROWS], _q_sum: i32, more: i32) -> [f32; LANES] {
        sums.map(|sum| (sum + more) as f32)
    }

    #[inline(always)]
    fn floats(self, x: &[f32; LANES]) -> [f32; LANES] {
        *x
    }

    #[inline(always)]
    fn store_floats(self, x: [f32; LANES], out: &mut [f32; LANES]) {
        *out = x;
    }

    #[inline(always)]
    fn splat_float(self, x: f32) -> [f32; LANES] {
        [x; LANES]
    }

    #[inline(always)]
    fn floats_of(self, x: &[i32; LANES]) -> [f32; LANES] {
        x.map(|x| x as f32)
    }

    #[inline(always)]
    fn multiply(self, a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|j| a[j] * b[j])
    }

    #[inline(always)]
    fn multiply_add(self, mut acc: [f32; LANES], a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        for j in 0..LANES {
            acc[j] += a[j] * b[j];
        }
        acc
    }

    #[inline(always)]
    fn fold(self, x: [f32; LANES]) -> f32 {
        fold(x)
    }
}
