//! `rans-precise` (32-bit states, 16-bit words, 12 bits of probability, 32 lanes) for AVX-512.
//!
//! Computes: tiles of up to four chunks side by side, for the sinks of `streams.rs`.
//!
//! Layout: a tile is two steps of 32 lanes (`avx512_wide.rs`). After each, the lanes below STATE_MIN
//! move their low half up and take the next words in lane order with one word expand. The entries of
//! both steps become one register of bytes, which one permute makes symbols.
//!
//! Needs: VBMI, VBMI2, and what `avx512_wide.rs` asks of the table; far symbols only where tiles are
//! stored; 64 readable bytes behind each chunk.
//!
//! Cost: about 60 vector instructions for 64 symbols with up to two borders in a bucket, and 8 more
//! for every two beyond. A half tile waits some 60 cycles for the one before, of which the mask for
//! the expand takes 20: four streams do not hide all of it.
//!
//! Measured (AMD EPYC, Zen 5, one of two shared cores, `cargo run --release -p tersor-cpu --example
//! gemv avx512 8 rans/s32`), fused with the dot, in G weights/s from the cache: 7.7, 6.8, 5.5 and 5.5
//! at 1.51, 2.25, 3.06 and 3.79 bits of entropy; in bulk the same. The codec's scalar decoder does
//! 0.65. It loses to `rans` by a factor of four, since it takes twice the steps, of words instead of
//! bytes; with 64 lanes, and at AVX2, chunks go to the codec's decoder.

use std::arch::x86_64::*;

use tersor_codec::rans;

use super::avx512_wide::{self, Registers, Step};
use super::streams::{Cursors, Decoder, Factor, Group, Kernel, Lines, Stream, dot_group, lines_group, store_group, tiles_in_registers};
use crate::source::FarAt;
use crate::{Avx512, TILE_ROWS};

const LANES: usize = 32;

/// A tensor's table.
pub(crate) struct Tables {
    token: Avx512,
    params: rans::Params,
    wide: avx512_wide::Tables,
}

impl Tables {
    /// `None` if this kernel was not made for the table.
    pub(crate) fn new(token: Avx512, table: &rans::Table) -> Option<Tables> {
        let params = table.params();
        (params == rans::Params::PRECISE).then_some(())?;
        Some(Tables { token, params, wide: avx512_wide::Tables::new(table.entries())? })
    }
}

/// `N` streams in flight, of a table with at most `2 * B` borders in a bucket.
struct Streams<const B: usize, const N: usize> {
    table: Registers<B>,
    low: [__m512i; N],
    high: [__m512i; N],
    words: Cursors<N>,
    escapes: Cursors<N>,
}

impl<const B: usize, const N: usize> Streams<B, N> {
    /// The next 64 symbol bytes of chunk `i`.
    ///
    /// # Safety
    /// Features of [`Avx512`].
    #[inline(always)]
    unsafe fn next(&mut self, i: usize) -> __m512i {
        // SAFETY: the loads begin at or before the end of their part of the chunk, behind which 64
        // bytes are readable.
        unsafe {
            let entries = [self.half(i), self.half(i)];
            _mm_prefetch::<_MM_HINT_T0>(self.words.ahead(i).cast());
            let even = _mm512_loadu_si512(EVEN.as_ptr().cast());
            let symbol = self.table.symbols(_mm512_permutex2var_epi8(entries[0], even, entries[1]));
            let escaped = _mm512_testn_epi8_mask(symbol, symbol);
            let escapes = _mm512_loadu_si512(self.escapes.readable(i).cast());
            self.escapes.advance(i, escaped.count_ones() as usize);
            _mm512_mask_expand_epi8(symbol, escaped, escapes)
        }
    }
}

impl<const B: usize, const N: usize> Decoder<N> for Streams<B, N> {
    type Isa = Avx512;
    type Tables = Tables;

    #[inline(always)]
    unsafe fn new(tables: &Tables, streams: &[Stream<'_>; N]) -> Self {
        // SAFETY: all loads are of whole arrays.
        unsafe {
            let mut s = Streams {
                table: Registers::new(&tables.wide),
                low: [_mm512_setzero_si512(); N],
                high: [_mm512_setzero_si512(); N],
                words: Cursors::words(streams),
                escapes: Cursors::escapes(streams),
            };
            for (i, stream) in streams.iter().enumerate() {
                let states = stream.states.as_chunks::<4>().0;
                let (mut low, mut high) = ([0u16; LANES], [0u16; LANES]);
                for (lane, state) in states[..LANES].iter().enumerate() {
                    let state = u32::from_le_bytes(*state);
                    (low[lane], high[lane]) = (state as u16, (state >> 16) as u16);
                }
                s.low[i] = _mm512_loadu_si512(low.as_ptr().cast());
                s.high[i] = _mm512_loadu_si512(high.as_ptr().cast());
            }
            s
        }
    }

    tiles_in_registers!(N);

    #[inline(always)]
    unsafe fn valid(&self) -> bool {
        // SAFETY: registers only.
        (0..N).all(|i| unsafe {
            _mm512_test_epi16_mask(self.low[i], self.low[i]) == 0 && _mm512_cmpneq_epi16_mask(self.high[i], _mm512_set1_epi16(1)) == 0
        }) && self.words.at_end()
            && self.escapes.at_end()
    }
}

impl<const B: usize, const N: usize> Streams<B, N> {
    /// The entries, (32) u16, of the next half tile of chunk `i`.
    #[inline(always)]
    unsafe fn half(&mut self, i: usize) -> __m512i {
        // SAFETY: as in `next`.
        unsafe {
            let Step { entry, low, high, hungry } = self.table.step(self.low[i], self.high[i]);
            let words = _mm512_loadu_si512(self.words.readable(i).cast());
            self.high[i] = _mm512_mask_mov_epi16(high, hungry, low);
            self.low[i] = _mm512_mask_expand_epi16(low, hungry, words);
            self.words.advance(i, 2 * hungry.count_ones() as usize);
            entry
        }
    }
}

/// The even bytes of two registers.
static EVEN: [u8; 64] = {
    let mut table = [0; 64];
    let mut i = 0;
    while i < 64 {
        table[i] = 2 * i as u8;
        i += 1;
    }
    table
};

/// Calls `$f::<B, N>(...)` with the least `B` that will do for the tables.
macro_rules! by_shape {
    ($borders:expr, $n:expr, $f:ident($($arg:expr),*)) => {{
        macro_rules! by_n {
            ($b:literal) => {
                match $n {
                    1 => $f::<$b, 1>($($arg),*),
                    2 => $f::<$b, 2>($($arg),*),
                    3 => $f::<$b, 3>($($arg),*),
                    _ => $f::<$b, 4>($($arg),*),
                }
            };
        }
        match $borders {
            ..=2 => by_n!(1),
            ..=4 => by_n!(2),
            _ => by_n!(4),
        }
    }};
}

impl Kernel for Tables {
    fn params(&self) -> rans::Params {
        self.params
    }

    fn width(&self) -> usize {
        4
    }

    fn store(&self, group: Group<'_>, out: &mut [u8], far: &mut Vec<FarAt>) -> bool {
        // SAFETY: the token proves the features that the function enables.
        unsafe { by_shape!(self.wide.borders, group.chunks, store(self, group, out, far)) }
    }

    fn lines(&self, group: Group<'_>, out: Lines<'_>) -> Option<usize> {
        // SAFETY: as above.
        unsafe { by_shape!(self.wide.borders, group.chunks, lines(self, group, out)) }
    }

    fn dot(&self, group: Group<'_>, factor: Factor<'_>, sums: &mut [[f32; TILE_ROWS]]) -> bool {
        // SAFETY: as above.
        unsafe { by_shape!(self.wide.borders, group.chunks, dot(self, group, factor, sums)) }
    }
}

/// # Safety
/// Only for the target features.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx2,f16c,popcnt,bmi2")]
unsafe fn store<const B: usize, const N: usize>(tables: &Tables, group: Group<'_>, out: &mut [u8], far: &mut Vec<FarAt>) -> bool {
    // SAFETY: the features are enabled.
    unsafe { store_group::<Streams<B, N>, N>(tables.token, tables, group, out, far) }
}

/// # Safety
/// Only for the target features.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx2,f16c,popcnt,bmi2")]
unsafe fn lines<const B: usize, const N: usize>(tables: &Tables, group: Group<'_>, out: Lines<'_>) -> Option<usize> {
    // SAFETY: the features are enabled.
    unsafe { lines_group::<Streams<B, N>, N>(tables.token, tables, group, out) }
}

/// # Safety
/// Only for the target features.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx2,f16c,popcnt,bmi2")]
unsafe fn dot<const B: usize, const N: usize>(
    tables: &Tables,
    group: Group<'_>,
    factor: Factor<'_>,
    sums: &mut [[f32; TILE_ROWS]],
) -> bool {
    // SAFETY: the features are enabled.
    unsafe { dot_group::<Streams<B, N>, N>(tables.token, tables, group, factor, sums) }
}
