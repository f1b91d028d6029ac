//! `rans` with 16-bit states, 8-bit words, 6 to 8 bits of probability and 64 lanes, for AVX-512.
//!
//! Computes: tiles of up to four chunks side by side, for the sinks of `streams.rs`.
//!
//! Layout: a chunk's 64 states are two registers, one of low and one of high bytes, so that one
//! step yields the 64 symbols of a tile in tile order. The tables (frequency, offset in the entry,
//! symbol byte) of 64, 128 or 256 slots are one, two or four registers each and are looked up with
//! byte permutes. A step multiplies as 16-bit words (even and odd lanes apart), and lanes that fell
//! below STATE_MIN take the stream's next bytes in lane order with one byte expand; escapes are
//! filled in by a second one.
//!
//! Needs: VBMI for the permutes, VBMI2 for the expands, VNNI for the dot. Frequencies below 256,
//! far symbols only where tiles are stored, 64 readable bytes behind each chunk.
//!
//! Cost: about 28 instructions for 64 symbols, but one step of a stream waits some 40 cycles for
//! the one before. Four streams side by side hide that.
//!
//! Measured (AMD EPYC, Zen 5, one of two shared cores, `cargo run --release -p tersor-cpu --example
//! gemv`): 25.5 to 27 G weights/s fused with the dot with 64 and 128 slots, 22.5 with 256, at every
//! entropy from 1.5 to 3.8 bits; in bulk 25 to 27, with 256 slots 23; from memory 20 to 22 (before
//! the software prefetch 9 to 17). With two or three streams it loses a third or more, so matrices
//! of fewer chunks than threads times four do not reach these figures. Tried without gain: six or
//! eight streams (27, in bulk 30: the sums no longer fit the registers), and words by unpacking and
//! packing instead of shifts (26).
//!
//! Later on Zen 5, as `tersor kernels` measures it, at 2.25 and 3.7 bits: 25 and 25 from the cache, 22.6 and 22.8 from memory where
//! it was 19.1 before the next chunks were announced; to the decoded form 19 and 18.4, from memory 15.7 and 15.2 (13.0 and 12.8).
//! Words 4,096 and 65,536 bytes ahead, and 2,048 bytes of the beginnings at once, were slower than 1,024.
//!
//! On Zen 4, where a 512-bit operation takes two passes, 14.5, 13.7 and 10.9 G weights/s fused from the cache with 64, 128 and
//! 256 slots: some 17 cycles a tile. Tried there: the product as `freq * high` of bytes alone (`vpmullw`, and `vpmulhuw` for odd
//! lanes, so that no shift splits the state), and the low byte's part by masked additions: two operations fewer, yet no faster with
//! 128 slots and a quarter slower with 64, for each mask costs more than the shift it replaces. Codecs with fewer operations by
//! design are `tiered` and `rans-pairs`.

use std::arch::x86_64::*;

use tersor_codec::rans;

use super::streams::{
    Cursors, Decoder, Factor, Group, Kernel, Lines, Stream, dot_group, each_chunk, lines_group, store_group, tiles_in_registers,
};
use crate::source::FarAt;
use crate::{Avx512, TILE_ROWS};

const LANES: usize = 64;
const SLOTS_MAX: usize = 256;

/// The slots as bytes, ready to be loaded into registers; those beyond `2^prob_bits` are 0 and
/// never looked up.
pub(crate) struct Tables {
    token: Avx512,
    params: rans::Params,
    freq: [u8; SLOTS_MAX],
    offset: [u8; SLOTS_MAX],
    symbol: [u8; SLOTS_MAX],
}

impl Tables {
    /// `None` if this kernel was not made for the table.
    pub(crate) fn new(token: Avx512, table: &rans::Table) -> Option<Tables> {
        let params @ rans::Params { state_bits: 16, word_bits: 8, prob_bits: 6..=8, lanes: 64 } = table.params() else {
            return None;
        };
        let slots = table.slots();
        let mut tables = Tables { token, params, freq: [0; SLOTS_MAX], offset: [0; SLOTS_MAX], symbol: [0; SLOTS_MAX] };
        for (slot, (freq, offset)) in slots.freq.iter().zip(slots.offset).enumerate() {
            // A lone entry of 8 bits has the frequency 256.
            tables.freq[slot] = u8::try_from(*freq).ok()?;
            tables.offset[slot] = u8::try_from(*offset).ok()?;
        }
        tables.symbol[..slots.symbol_byte.len()].copy_from_slice(slots.symbol_byte);
        Some(tables)
    }
}

/// `N` streams in flight.
struct Streams<const P: u32, const N: usize> {
    freq: [__m512i; 4],
    offset: [__m512i; 4],
    symbol: [__m512i; 4],
    bytes: [__m512i; 2],
    low: [__m512i; N],
    high: [__m512i; N],
    words: Cursors<N>,
    escapes: Cursors<N>,
}

/// Looks up 64 slots, the low `P` bits of each byte.
///
/// # Safety
/// Features of [`Avx512`], here and below.
#[inline(always)]
unsafe fn lookup<const P: u32>(table: &[__m512i; 4], slots: __m512i) -> __m512i {
    // SAFETY: registers only. The permutes ignore the bits above those they need.
    unsafe {
        match P {
            6 => _mm512_permutexvar_epi8(slots, table[0]),
            7 => _mm512_permutex2var_epi8(table[0], slots, table[1]),
            _ => {
                let low = _mm512_permutex2var_epi8(table[0], slots, table[1]);
                let high = _mm512_permutex2var_epi8(table[2], slots, table[3]);
                _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(slots), high)
            }
        }
    }
}

impl<const P: u32, const N: usize> Streams<P, N> {
    /// The next 64 symbol bytes of chunk `i`.
    ///
    /// # Safety
    /// Features of [`Avx512`].
    #[inline(always)]
    unsafe fn next(&mut self, i: usize) -> __m512i {
        // SAFETY: the two loads begin at or before the end of their part of the chunk, behind which
        // 64 bytes are readable.
        unsafe {
            let (low, high) = (self.low[i], self.high[i]);
            let even = _mm512_set1_epi16(0xff);
            let freq = lookup::<P>(&self.freq, low);
            let offset = lookup::<P>(&self.offset, low);
            let symbol = lookup::<P>(&self.symbol, low);
            // States of even and odd lanes as 16-bit words; 0xca picks by the mask `even`.
            let x_even = _mm512_ternarylogic_epi32::<0xca>(even, low, _mm512_slli_epi16::<8>(high));
            let x_odd = _mm512_ternarylogic_epi32::<0xca>(even, _mm512_srli_epi16::<8>(low), high);
            // x = freq * (x >> P) + offset, at most 16 bits.
            let y_even = _mm512_add_epi16(
                _mm512_mullo_epi16(_mm512_and_si512(freq, even), _mm512_srli_epi16::<P>(x_even)),
                _mm512_and_si512(offset, even),
            );
            let y_odd = _mm512_add_epi16(
                _mm512_mullo_epi16(_mm512_srli_epi16::<8>(freq), _mm512_srli_epi16::<P>(x_odd)),
                _mm512_srli_epi16::<8>(offset),
            );
            let y_low = _mm512_permutex2var_epi8(y_even, self.bytes[0], y_odd);
            let y_high = _mm512_permutex2var_epi8(y_even, self.bytes[1], y_odd);
            // Below STATE_MIN = 256: the state moves up by a byte and takes a word.
            let hungry = _mm512_testn_epi8_mask(y_high, y_high);
            let words = _mm512_loadu_si512(self.words.readable(i).cast());
            self.high[i] = _mm512_mask_mov_epi8(y_high, hungry, y_low);
            self.low[i] = _mm512_mask_expand_epi8(y_low, hungry, words);
            self.words.advance(i, hungry.count_ones() as usize);
            _mm_prefetch::<_MM_HINT_T0>(self.words.ahead(i).cast());
            let escaped = _mm512_testn_epi8_mask(symbol, symbol);
            let escapes = _mm512_loadu_si512(self.escapes.readable(i).cast());
            self.escapes.advance(i, escaped.count_ones() as usize);
            _mm512_mask_expand_epi8(symbol, escaped, escapes)
        }
    }
}

impl<const P: u32, const N: usize> Decoder<N> for Streams<P, N> {
    type Isa = Avx512;
    type Tables = Tables;

    #[inline(always)]
    unsafe fn new(tables: &Tables, streams: &[Stream<'_>; N]) -> Self {
        // SAFETY: all loads are of whole arrays.
        unsafe {
            let load = |table: &[u8; SLOTS_MAX]| std::array::from_fn(|i| _mm512_loadu_si512(table[64 * i..].as_ptr().cast()));
            Streams {
                freq: load(&tables.freq),
                offset: load(&tables.offset),
                symbol: load(&tables.symbol),
                bytes: [
                    _mm512_loadu_si512(super::avx512_rans_pairs::BYTES[0].as_ptr().cast()),
                    _mm512_loadu_si512(super::avx512_rans_pairs::BYTES[1].as_ptr().cast()),
                ],
                low: std::array::from_fn(|i| _mm512_loadu_si512(streams[i].states[..LANES].as_ptr().cast())),
                high: std::array::from_fn(|i| _mm512_loadu_si512(streams[i].states[LANES..2 * LANES].as_ptr().cast())),
                words: Cursors::words(streams),
                escapes: Cursors::escapes(streams),
            }
        }
    }

    tiles_in_registers!(N);

    #[inline(always)]
    unsafe fn valid(&self) -> bool {
        // SAFETY: registers only.
        (0..N).all(|i| unsafe {
            _mm512_test_epi8_mask(self.low[i], self.low[i]) == 0 && _mm512_cmpneq_epi8_mask(self.high[i], _mm512_set1_epi8(1)) == 0
        }) && self.words.at_end()
            && self.escapes.at_end()
    }
}

/// Calls `$f::<P, N>(...)` for the table's precision and a group's number of chunks.
macro_rules! by_shape {
    ($prob_bits:expr, $n:expr, $f:ident($($arg:expr),*)) => {{
        macro_rules! by_n {
            ($p:literal) => {
                match $n {
                    1 => $f::<$p, 1>($($arg),*),
                    2 => $f::<$p, 2>($($arg),*),
                    3 => $f::<$p, 3>($($arg),*),
                    _ => $f::<$p, 4>($($arg),*),
                }
            };
        }
        match $prob_bits {
            6 => by_n!(6),
            7 => by_n!(7),
            _ => by_n!(8),
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
        unsafe { by_shape!(self.params.prob_bits, group.chunks, store(self, group, out, far)) }
    }

    fn lines(&self, group: Group<'_>, out: Lines<'_>) -> Option<usize> {
        // SAFETY: as above.
        unsafe { by_shape!(self.params.prob_bits, group.chunks, lines(self, group, out)) }
    }

    fn dot(&self, group: Group<'_>, factor: Factor<'_>, sums: &mut [[f32; TILE_ROWS]]) -> bool {
        // SAFETY: as above.
        unsafe { by_shape!(self.params.prob_bits, group.chunks, dot(self, group, factor, sums)) }
    }
}

/// # Safety
/// Only for the target features.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx2,f16c,popcnt,bmi2")]
unsafe fn store<const P: u32, const N: usize>(tables: &Tables, group: Group<'_>, out: &mut [u8], far: &mut Vec<FarAt>) -> bool {
    // SAFETY: the features are enabled.
    unsafe { store_group::<Streams<P, N>, N>(tables.token, tables, group, out, far) }
}

/// # Safety
/// Only for the target features.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx2,f16c,popcnt,bmi2")]
unsafe fn lines<const P: u32, const N: usize>(tables: &Tables, group: Group<'_>, out: Lines<'_>) -> Option<usize> {
    // SAFETY: the features are enabled.
    unsafe { lines_group::<Streams<P, N>, N>(tables.token, tables, group, out) }
}

/// # Safety
/// Only for the target features.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx2,f16c,popcnt,bmi2")]
unsafe fn dot<const P: u32, const N: usize>(tables: &Tables, group: Group<'_>, factor: Factor<'_>, sums: &mut [[f32; TILE_ROWS]]) -> bool {
    // SAFETY: the features are enabled.
    unsafe { dot_group::<Streams<P, N>, N>(tables.token, tables, group, factor, sums) }
}
