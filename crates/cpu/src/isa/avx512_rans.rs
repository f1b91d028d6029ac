//! `rans` with 16-bit states, 8-bit words, 6 to 8 bits of probability and 64 lanes, for AVX-512.
//!
//! Computes: tiles of up to six chunks side by side, with 256 slots of four, for the sinks of `streams.rs`.
//!
//! Layout: a chunk's 64 states are two registers, one of low and one of high bytes, so that one
//! step yields the 64 symbols of a tile in tile order. The tables (frequency, offset in the entry,
//! symbol byte) of 64, 128 or 256 slots are one, two or four registers each and are looked up with
//! byte permutes. A step multiplies as 16-bit words (even and odd lanes apart), and lanes that fell
//! below STATE_MIN take the stream's next bytes in lane order with one byte expand; escapes are
//! filled in by a second one. With 64 or 128 slots a step is spelt in assembler, as in `avx512_rans_pairs.rs`: states, tables and sums of six
//! streams are 31 of the 32 registers.
//!
//! Needs: VBMI for the permutes, VBMI2 for the expands, VNNI for the dot. Frequencies below 256,
//! far symbols only where tiles are stored, 64 readable bytes behind each chunk.
//!
//! Cost: about 28 instructions for 64 symbols, but one step of a stream waits some 40 cycles for
//! the one before. On Zen 5 a step takes 12.7 cycles with three streams, 10.1 with four, 8.7 with five, 8.4 with six, 8.5 with seven, in a loop of
//! its own; its pipes need 6.8.
//!
//! Measured (AMD EPYC, Zen 5, 4.3 GHz, one of two cores, example `gemv`): at every entropy from 1.5 to 3.8 bits 31.4 to 31.8 G weights/s
//! fused from the cache and 29.8 to 31.1 from memory, 21 and 19 to the decoded form. Groups of four, which matrices of eight chunks make: 26.
//! Tried without gain in that loop: the product by `vpmaddubsw` of the high byte and doubled frequencies, with the low byte's part by a masked
//! addition (8.3 cycles with six streams, 10.4 with four).
//!
//! Before, with four streams and the compiler's order of operations (AMD EPYC, Zen 5, one of two shared cores, `cargo run --release -p tersor-cpu --example
//! gemv`): 25.5 to 27 G weights/s fused with the dot with 64 and 128 slots, 22.5 with 256, at every
//! entropy from 1.5 to 3.8 bits; in bulk 25 to 27, with 256 slots 23; from memory 20 to 22 (before
//! the software prefetch 9 to 17). With two or three streams it loses a third or more, so matrices
//! of fewer chunks than threads times four do not reach these figures. Tried without gain: words by unpacking and
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

use super::avx512_rans_pairs::{Table, byte_indices, load};
use super::streams::{Cursors, Decoder, Factor, Group, Kernel, Lines, Stream, dot_group, lines_group, store_group};
use super::{Isa, TileBytes, each_chunk};
use crate::source::{FarAt, STREAMS_MAX};
use crate::{Avx512, TILE_COLS, TILE_ROWS};

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
        // Twice, so that the lookup of 128 slots, which sees seven bits of a state, serves 64 as well.
        if params.prob_bits == 6 {
            for table in [&mut tables.freq, &mut tables.offset, &mut tables.symbol] {
                table.copy_within(..64, 64);
            }
        }
        Some(tables)
    }
}

/// `N` streams in flight.
struct Streams<const P: u32, const N: usize> {
    freq: Table,
    offset: Table,
    symbol: Table,
    byte: __m512i,
    bytes: [__m512i; 2],
    low: [__m512i; N],
    high: [__m512i; N],
    words: Cursors<N>,
    escapes: Cursors<N>,
}

/// A step of stream `$i` with 64 or 128 slots, whose symbol bytes are `$tile`; then `$tail` with its operands.
macro_rules! step {
    ($self:ident, $i:ident, $tile:ident, [$($tail:literal),*], $($operand:tt)*) => {{
        let (hungry, escaped): (u64, u64);
        let (mut _freq, mut _offset, mut _even): (__m512i, __m512i, __m512i);
        std::arch::asm!(
            "vmovdqa64 {freq}, {f0}",
            "vpermt2b {freq}, {low}, {f1}",
            "vmovdqa64 {offset}, {o0}",
            "vpermt2b {offset}, {low}, {o1}",
            "vmovdqa64 {tile}, {s0}",
            "vpermt2b {tile}, {low}, {s1}",
            // States of even and odd lanes as 16-bit words, without their slots.
            "vpsllw {even}, {high}, 8",
            "vpternlogd {even}, {low}, {byte}, 0xf8",
            "vpsrlw {low}, {low}, 8",
            "vpternlogd {low}, {high}, {byte}, 0xf4",
            "vpsrlw {even}, {even}, {prob_bits}",
            "vpsrlw {low}, {low}, {prob_bits}",
            // x = freq * (x >> P) + offset, at most 16 bits.
            "vpandq {high}, {freq}, {byte}",
            "vpmullw {even}, {even}, {high}",
            "vpsrlw {freq}, {freq}, 8",
            "vpmullw {freq}, {freq}, {low}",
            "vpandq {high}, {offset}, {byte}",
            "vpaddw {even}, {even}, {high}",
            "vpsrlw {offset}, {offset}, 8",
            "vpaddw {freq}, {freq}, {offset}",
            "vmovdqa64 {high}, {even}",
            "vpermt2b {high}, {highs}, {freq}",
            "vmovdqa64 {low}, {even}",
            "vpermt2b {low}, {lows}, {freq}",
            // Below STATE_MIN = 256: the state moves up by a byte and takes a word.
            "vptestnmb {k}, {high}, {high}",
            "kmovq {hungry}, {k}",
            "vmovdqu8 {high}{{{k}}}, {low}",
            "vpexpandb {low}{{{k}}}, zmmword ptr [{words}]",
            "vptestnmb {e}, {tile}, {tile}",
            "kmovq {escaped}, {e}",
            "vpexpandb {tile}{{{e}}}, zmmword ptr [{escapes}]",
            $($tail,)*
            low = inout(zmm_reg) $self.low[$i],
            high = inout(zmm_reg) $self.high[$i],
            freq = out(zmm_reg) _freq,
            offset = out(zmm_reg) _offset,
            even = out(zmm_reg) _even,
            tile = out(zmm_reg) $tile,
            f0 = in(zmm_reg) $self.freq[0],
            f1 = in(zmm_reg) $self.freq[1],
            o0 = in(zmm_reg) $self.offset[0],
            o1 = in(zmm_reg) $self.offset[1],
            s0 = in(zmm_reg) $self.symbol[0],
            s1 = in(zmm_reg) $self.symbol[1],
            byte = in(zmm_reg) $self.byte,
            lows = in(zmm_reg) $self.bytes[0],
            highs = in(zmm_reg) $self.bytes[1],
            k = out(kreg) _,
            e = out(kreg) _,
            words = in(reg) $self.words.readable($i),
            escapes = in(reg) $self.escapes.readable($i),
            hungry = out(reg) hungry,
            escaped = out(reg) escaped,
            prob_bits = const P,
            $($operand)*
            options(pure, readonly, nostack, preserves_flags)
        );
        $self.words.advance($i, hungry.count_ones() as usize);
        _mm_prefetch::<_MM_HINT_T0>($self.words.ahead($i).cast());
        $self.escapes.advance($i, escaped.count_ones() as usize);
    }};
}

/// Looks up 64 slots. `upper`: those from 128 on.
///
/// # Safety
/// Features of [`Avx512`], here and below.
#[inline(always)]
unsafe fn lookup(table: &Table, slots: __m512i, upper: __mmask64) -> __m512i {
    // SAFETY: registers only. The permutes take the low seven bits of a slot.
    unsafe {
        let low = _mm512_permutex2var_epi8(table[0], slots, table[1]);
        let high = _mm512_permutex2var_epi8(table[2], slots, table[3]);
        _mm512_mask_mov_epi8(low, upper, high)
    }
}

impl<const P: u32, const N: usize> Streams<P, N> {
    /// The next 64 symbol bytes of chunk `i`.
    ///
    /// # Safety
    /// 64 readable bytes from where the streams are.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2")]
    unsafe fn next(&mut self, i: usize) -> __m512i {
        if P == 8 {
            // SAFETY: by the contract.
            return unsafe { self.next_wide(i) };
        }
        let tile: __m512i;
        // SAFETY: the two loads begin at or before the end of their part of the chunk, behind which 64 bytes are readable.
        unsafe { step!(self, i, tile, [],) };
        tile
    }

    /// Adds the products of the next 64 symbol bytes of chunk `i` with `q` to `sums`.
    ///
    /// # Safety
    /// As [`Streams::next`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2,avx512vnni")]
    unsafe fn next_dot(&mut self, isa: Avx512, i: usize, mut sums: __m512i, q: &[i8; TILE_COLS]) -> __m512i {
        if P == 8 {
            // SAFETY: by the contract.
            return isa.dot(sums, unsafe { self.next_wide(i) }, q);
        }
        let mut _tile: __m512i;
        // SAFETY: as above.
        unsafe {
            step!(
                self,
                i,
                _tile,
                ["vpdpbusd {sums}, {tile}, dword ptr [{q}]{{1to16}}"],
                sums = inout(zmm_reg) sums,
                q = in(reg) q.as_ptr(),
            );
        }
        sums
    }

    /// As [`Streams::next`], with 256 slots: twice as many registers for the tables, so that these are the compiler's to keep.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    unsafe fn next_wide(&mut self, i: usize) -> __m512i {
        // SAFETY: the two loads begin at or before the end of their part of the chunk, behind which
        // 64 bytes are readable.
        unsafe {
            let (low, high) = (self.low[i], self.high[i]);
            let (byte, upper) = (self.byte, _mm512_movepi8_mask(low));
            let freq = lookup(&self.freq, low, upper);
            let offset = lookup(&self.offset, low, upper);
            let symbol = lookup(&self.symbol, low, upper);
            // x = freq * (x >> 8) + offset, at most 16 bits: the high byte is the other factor.
            let y_even = _mm512_add_epi16(
                _mm512_mullo_epi16(_mm512_and_si512(freq, byte), _mm512_and_si512(high, byte)),
                _mm512_and_si512(offset, byte),
            );
            let y_odd = _mm512_add_epi16(
                _mm512_mullo_epi16(_mm512_srli_epi16::<8>(freq), _mm512_srli_epi16::<8>(high)),
                _mm512_srli_epi16::<8>(offset),
            );
            let y_low = _mm512_permutex2var_epi8(y_even, self.bytes[0], y_odd);
            let y_high = _mm512_permutex2var_epi8(y_even, self.bytes[1], y_odd);
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
            Streams {
                freq: load(&tables.freq),
                offset: load(&tables.offset),
                symbol: load(&tables.symbol),
                byte: _mm512_set1_epi16(0xff),
                bytes: byte_indices(),
                low: std::array::from_fn(|i| _mm512_loadu_si512(streams[i].states[..LANES].as_ptr().cast())),
                high: std::array::from_fn(|i| _mm512_loadu_si512(streams[i].states[LANES..2 * LANES].as_ptr().cast())),
                words: Cursors::words(streams),
                escapes: Cursors::escapes(streams),
            }
        }
    }

    #[inline(always)]
    unsafe fn store(&mut self, isa: Avx512, i: usize, out: *mut TileBytes, _spare: bool) {
        // SAFETY: by the contract.
        unsafe { isa.store(self.next(i), &mut *out) };
    }

    #[inline(always)]
    unsafe fn dot(&mut self, isa: Avx512, sums: &mut [__m512i; N], q: &[[i8; TILE_COLS]]) {
        for q in q {
            // SAFETY: by the contract.
            each_chunk!(N, |i| unsafe { sums[i] = self.next_dot(isa, i, sums[i], q) });
        }
    }

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
                    4 => $f::<$p, 4>($($arg),*),
                    5 => $f::<$p, 5>($($arg),*),
                    _ => $f::<$p, 6>($($arg),*),
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
        if self.params.prob_bits == 8 { 4 } else { STREAMS_MAX }
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
