//! `rans-pairs` for AVX-512.
//!
//! Computes: pair bytes of up to four chunks side by side, for the sinks of `rans_pairs.rs`.
//!
//! Layout: as in `avx512_rans.rs` a chunk's 64 states are a register of low and one of high bytes. The low
//! bytes are the slots: three tables of 256 bytes, four registers each, are looked up with two byte
//! permutes and a blend by their highest bit. The high bytes are the factor of the frequencies, which
//! are below 128: `vpmaddubsw` by the frequencies of the even lanes alone, and of the odd lanes alone,
//! gives products of 16 bits where nothing had to be shifted or unpacked. Two permutes of both sums are
//! again low and high bytes; lanes below STATE_MIN take the next words by one byte expand. ESCAPE has
//! the first slots, so a comparison of the slots finds the lanes that a second expand gives their pair.
//!
//! Needs: VBMI for the permutes, VBMI2 for the expands, 64 readable bytes behind each chunk.
//!
//! Cost: for 128 symbols 9 permutes and shifts, 2 products, 3 masks, 2 expands and 9 operations that run
//! anywhere; on Zen 4, where a 512-bit operation takes two passes and all but the last run on one half of
//! the pipes, 14 cycles at least. A step waits some 37 cycles for the one before; four streams hide that.
//!
//! Measured (AMD EPYC, Zen 4, 3.69 GHz, one of two cores, `cargo run --release -p tersor-cpu --example gemv --
//! avx512 100 rans-pairs`, 1 thread): fused with the dot at 1.51, 2.25, 3.06 and 3.79 bits of entropy 22.2, 22.1,
//! 21.8 and 20.3 G weights/s from the cache, where `rans` does 13.7, and 20.3, 20.1, 19.2 and 16.5 from memory; in
//! bulk to the decoded form 24.8, 24.5, 21.2 and 13.0, and 21.3, 21.0, 16.8 and 10.6. From memory the plain GEMV of
//! nibbles does 64, 68, 43 and 46 in the same run, `tiered` up to 3 bits 29 to 34 in another. A prototype of this loop alone:
//! 16 cycles a tile with four streams, 18 with three, 22 with two, 37 with one, so matrices of fewer chunks than
//! threads times four do not reach these figures; with five to eight streams 16.5 to 18.6, as the registers are used up.
//!
//! On Zen 5 (4.1 GHz, one of two cores, read bandwidth 30 GB/s; `tersor kernels --codec rans-pairs --level avx512 --threads 1`, medians in turns
//! with the kernel before, in brackets) at 2.25, 3.0 and 3.7 bits of entropy: fused from the cache 34.5, 34.8 and 32.5, from memory 31.9, 31.0 and
//! 28.3 (29.9, 29.1, 23.0); to the decoded form from the cache 41, 32 and 24, from memory 29, 25 and 17.7. The gain: a line of the chunk that comes four later is fetched
//! to the L2 cache with each step, all of it and evenly. Before, 128 lines of the next chunks' beginnings were fetched at once (a tenth of the time), raw lines
//! while they were multiplied (which doubled the time of that), and listed symbols looked up in raw lines before these had come. Tried without gain: words 512, 4,096, 65,536 and
//! 98,304 bytes ahead instead of 1,024 (29, 26, 24 and 29 of 31 at 3.0 bits); raw lines 65,536 ahead of their use (24.2 of 24.9 at 3.7); beginnings of 256 or 512 bytes;
//! blocks of 128 and 64 tiles (30 of 32 from the cache, no more from memory); coded bytes in pages of 2 MiB (no difference, for `rans` neither); six chunks
//! at once (35.0, 34.6 and 32.2 from the cache, 28.8, 27.9 and 25.5 from memory, 20 % less to the decoded form). Frequencies all even, looked up in twos by one
//! permute: 36.7, 34.9 and 35.4 from the cache, 34.5, 30.0 and 30.4 from memory, for 0.02, 0.036 and 0.035 bit a weight, so neither permutes nor waiting bind.
//!
//! Tried without gain in that prototype, cycles a tile: two or four streams instruction by instruction (16.3, 17.7);
//! slots to entries and then three smaller tables (17.2); a blend by a vector of bits instead of a mask (18.3); the
//! offsets of odd lanes by a product instead of a shift (16.8); a branch over steps without escapes (16.2);
//! multiplying tiles at once instead of in blocks (1 cycle more than both apart). Frequencies all even, so that slots are looked up in twos, with
//! one permute instead of two and a blend: 14.1 cycles, with five and six streams 14.5 and 14.1, but in the kernel no more than 23.2 G weights/s
//! fused where it did 22.5, for 0.01 to 0.04 bit a weight. (Cycles an operation: moving a mask to an integer register 2, expands 1.3, permutes,
//! shifts, products and comparisons 1, a load across two lines 1.5, a store 2, the rest 0.5.) From memory, in the kernel: words fetched
//! 256 to 4,096 bytes ahead, escapes and raw lines fetched while tiles are decoded (15.9 to 16.3 G weights/s whatever they are,
//! at 3.7 bits; raw lines far ahead cost), coded bytes in memory for which large pages were asked (no more than 3 %).

use std::arch::x86_64::*;

use tersor_codec::rans_pairs::Slots;

use super::TileBytes;
use super::streams::{Cursors, each_chunk};
use crate::Avx512;
use crate::rans_pairs::{Kernel, Stream};

/// Chunks side by side.
const WIDTH: usize = 4;

/// The kernel for the slots of one tensor.
pub(crate) struct Tables<'a> {
    slots: &'a Slots,
}

impl<'a> Tables<'a> {
    pub(crate) fn new(_: Avx512, slots: &'a Slots) -> Tables<'a> {
        Tables { slots }
    }
}

impl Kernel for Tables<'_> {
    fn width(&self) -> usize {
        WIDTH
    }

    fn decode(&self, streams: &mut [Stream<'_>], steps: usize, shift: u8, out: &mut [TileBytes], stride: usize) {
        // SAFETY: the token given to `new` proves the features that the function enables.
        unsafe {
            macro_rules! by_shift {
                ($n:literal) => {
                    match shift {
                        0 => decode::<$n, false>(self.slots, streams, steps, shift, out, stride),
                        _ => decode::<$n, true>(self.slots, streams, steps, shift, out, stride),
                    }
                };
            }
            match streams.len() {
                1 => by_shift!(1),
                2 => by_shift!(2),
                3 => by_shift!(3),
                _ => by_shift!(4),
            }
        }
    }
}

/// A table of 256 bytes.
type Table = [__m512i; 4];

/// # Safety
/// Features of [`Avx512`], here and below.
#[inline(always)]
unsafe fn load(table: &[u8; 256]) -> Table {
    // SAFETY: four times 64 readable bytes.
    unsafe { std::array::from_fn(|i| _mm512_loadu_si512(table.as_ptr().add(64 * i).cast())) }
}

/// By byte, `table[slot]`. `upper`: the slots from 128 on.
#[inline(always)]
unsafe fn lookup(table: &Table, slots: __m512i, upper: __mmask64) -> __m512i {
    // SAFETY: registers only. The permutes take the low seven bits of a slot.
    unsafe {
        let low = _mm512_permutex2var_epi8(table[0], slots, table[1]);
        let high = _mm512_permutex2var_epi8(table[2], slots, table[3]);
        _mm512_mask_mov_epi8(low, upper, high)
    }
}

/// By nibble, the sum modulo 16.
#[inline(always)]
unsafe fn add_nibbles(a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: registers only. The upper bits of the nibbles, 0x88, are added without their carries.
    unsafe {
        let lower = _mm512_set1_epi8(0x77);
        let sum = _mm512_add_epi8(_mm512_and_si512(a, lower), _mm512_and_si512(b, lower));
        _mm512_xor_si512(sum, _mm512_andnot_si512(lower, _mm512_xor_si512(a, b)))
    }
}

/// The low or the high bytes of words, from one register of even and one of odd lanes.
pub(super) static BYTES: [TileBytes; 2] = {
    let mut indices = [[0; 64]; 2];
    let mut lane = 0;
    while lane < 64 {
        let low = lane as u8 / 2 * 2 + lane as u8 % 2 * 64;
        (indices[0][lane], indices[1][lane]) = (low, low + 1);
        lane += 1;
    }
    indices
};

/// As [`Kernel::decode`], which shifts only with `SHIFT`.
///
/// # Safety
/// Only for the target features.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx2,f16c,popcnt,bmi2")]
unsafe fn decode<const N: usize, const SHIFT: bool>(
    slots: &Slots,
    streams: &mut [Stream<'_>],
    steps: usize,
    shift: u8,
    out: &mut [TileBytes],
    stride: usize,
) {
    let streams: &mut [Stream<'_>; N] = streams.try_into().expect("as many as the caller counted");
    assert!(steps <= stride && (N - 1) * stride + steps <= out.len());
    // SAFETY: loads are of whole arrays, or begin at or before the end of their part of the chunk, behind
    // which 64 bytes are readable. Stores are within `out`, as just asserted.
    unsafe {
        let (freqs, offsets, pair_bytes) = (load(&slots.freq), load(&slots.offset), load(&slots.pair_byte));
        let escape_end = _mm512_set1_epi8(slots.freq[0] as i8);
        let (even, shift) = (_mm512_set1_epi16(0xff), _mm512_set1_epi8(shift as i8));
        let [low_bytes, high_bytes] = [&BYTES[0], &BYTES[1]].map(|indices| _mm512_loadu_si512(indices.as_ptr().cast()));
        let mut low: [__m512i; N] = std::array::from_fn(|i| _mm512_loadu_si512(streams[i].low.as_ptr().cast()));
        let mut high: [__m512i; N] = std::array::from_fn(|i| _mm512_loadu_si512(streams[i].high.as_ptr().cast()));
        let mut words = Cursors::new(streams.each_ref().map(|stream| &stream.words));
        let mut escapes = Cursors::new(streams.each_ref().map(|stream| &stream.escapes));
        let (ahead, ahead_step) = (streams.each_ref().map(|stream| stream.ahead), streams[0].ahead_step);
        for step in 0..steps {
            each_chunk!(N, |i| {
                let upper = _mm512_movepi8_mask(low[i]);
                let escaped = _mm512_cmplt_epu8_mask(low[i], escape_end);
                let freq = lookup(&freqs, low[i], upper);
                let offset = lookup(&offsets, low[i], upper);
                let pair = lookup(&pair_bytes, low[i], upper);
                // x = freq * (x >> 8) + offset, at most 15 bits.
                let y_even = _mm512_add_epi16(_mm512_maddubs_epi16(high[i], _mm512_and_si512(freq, even)), _mm512_and_si512(offset, even));
                let y_odd =
                    _mm512_add_epi16(_mm512_maddubs_epi16(high[i], _mm512_andnot_si512(even, freq)), _mm512_srli_epi16::<8>(offset));
                let y_high = _mm512_permutex2var_epi8(y_even, high_bytes, y_odd);
                let y_low = _mm512_permutex2var_epi8(y_even, low_bytes, y_odd);
                // Below STATE_MIN = 256: the state moves up by a byte and takes a word.
                let hungry = _mm512_testn_epi8_mask(y_high, y_high);
                let next = _mm512_loadu_si512(words.readable(i).cast());
                low[i] = _mm512_mask_expand_epi8(y_low, hungry, next);
                high[i] = _mm512_mask_mov_epi8(y_high, hungry, y_low);
                words.advance(i, hungry.count_ones() as usize);
                _mm_prefetch::<_MM_HINT_T0>(words.ahead(i).cast());
                _mm_prefetch::<_MM_HINT_T1>(ahead[i].wrapping_add(step * ahead_step).cast());
                let next = _mm512_loadu_si512(escapes.readable(i).cast());
                escapes.advance(i, escaped.count_ones() as usize);
                let mut pair = _mm512_mask_expand_epi8(pair, escaped, next);
                if SHIFT {
                    pair = add_nibbles(pair, shift);
                }
                let tile = out.get_unchecked_mut(i * stride + step);
                _mm512_storeu_si512(tile.as_mut_ptr().cast(), pair);
            });
        }
        for (i, stream) in streams.iter_mut().enumerate() {
            _mm512_storeu_si512(stream.low.as_mut_ptr().cast(), low[i]);
            _mm512_storeu_si512(stream.high.as_mut_ptr().cast(), high[i]);
            (stream.words, stream.escapes) = (words.rest(i), escapes.rest(i));
            stream.ahead = ahead[i].wrapping_add(steps * ahead_step);
        }
    }
}
