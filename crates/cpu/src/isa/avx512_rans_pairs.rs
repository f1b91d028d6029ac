//! `rans-pairs` for AVX-512.
//!
//! Computes: pair bytes of up to six chunks side by side, for the sinks of `rans_pairs.rs`.
//!
//! Layout: as in `avx512_rans.rs` a chunk's 64 states are a register of low and one of high bytes. The low
//! bytes are the slots: three tables of 256 bytes, four registers each, are looked up with two byte
//! permutes and a blend by their highest bit. The high bytes are the factor of the frequencies, which
//! are below 128: `vpmaddubsw` by the frequencies of the even lanes alone, and of the odd lanes alone,
//! gives products of 16 bits where nothing had to be shifted or unpacked. Two permutes of both sums are
//! again low and high bytes; lanes below STATE_MIN take the next words by one byte expand, and lanes whose pair byte is
//! ESCAPE, 0, theirs by a second.
//!
//! A step is spelt in assembler: the states of six streams, the tables and what a step needs besides are 31 of the 32 registers, and
//! the compiler, left to order the operations, keeps tables or states in memory (41 for 57 G weights/s decoded with six streams).
//!
//! Needs: VBMI for the permutes, VBMI2 for the expands, 64 readable bytes behind each chunk.
//!
//! Cost: for 128 symbols 9 permutes and shifts, 2 products, 3 masks, 2 expands and 9 operations that run
//! anywhere; on Zen 4, where a 512-bit operation takes two passes and all but the last run on one half of
//! the pipes, 14 cycles at least. On Zen 5 permutes, masks and expands (two operations each) share two pipes of four: 7.5 cycles.
//! A step waits 37 cycles for the one before (Zen 5: a mask from a comparison to an expand alone 15). So with four streams it takes
//! 10.6 cycles in a loop of its own there, with five 9.7, with six 9.4, with seven 9.7.
//!
//! Measured on Zen 5 (4.3 GHz, one of two cores; example `gemv`, 1 thread) at 1.51, 2.25, 3.06 and 3.79 bits of entropy: fused from the cache
//! 46.1, 46.3, 43.4 and 42.6 G weights/s, where `rans` does 31.4 to 31.8, from memory 44.4, 43.1, 40.9 and 39.3; to the decoded form
//! 45.1, 44.0, 39.1 and 28.5. Groups of four streams, which matrices of eight chunks make: 36 to 37.
//! Where the time goes, ns for 128 symbols from the cache at 2.25 bits: 2.85, of which decoding 2.1, starting streams 0.1, products 0.6.
//! Tried there without gain: tiles multiplied at once, in the loop that decodes, with four to six streams (12.1 to 12.5 cycles a
//! step, with the products' sums in registers), or segment by segment between the steps of one call (3.1 to 3.6 ns); states packed by shifts and
//! selections instead of permutes (the same with four streams, 10.1 for 9.4 cycles with six); two streams instruction by instruction
//! (11.3 for 10.6); blocks of 32 to 128 tiles (3.0 ns); three streams multiplied together instead of two (3 % faster without raw bits, 5 %
//! slower with one).
//! And in a prototype of the loop alone, six streams, 9.05 cycles a step: slots to entries and entries to three tables of half the size (10.0: two operations
//! fewer, five cycles more to wait), pair bytes as the index of the tables (9.5), lookups under masks instead of blends (10.3), operations in the order in
//! which they become ready, within a step of all streams or across steps (9.0 to 12.6), cursors without bounds, escapes read by 16 bytes, words from
//! aligned lines (no difference), products in the loop with their sums in memory (11.25; apart 9.05 and 2.2). Without escapes it would be 8.1, without blends 8.2.
//! Frequencies all even: 8.2 there, in the kernel no more than 3 %, for 1 % of size.
//!
//! Before, with four streams and the compiler's order. Measured (AMD EPYC, Zen 4, 3.69 GHz, one of two cores, `cargo run --release -p tersor-cpu --example gemv --
//! avx512 100 rans-pairs`, 1 thread): fused with the dot at 1.51, 2.25, 3.06 and 3.79 bits of entropy 22.2, 22.1,
//! 21.8 and 20.3 G weights/s from the cache, where `rans` does 13.7, and 20.3, 20.1, 19.2 and 16.5 from memory; in
//! bulk to the decoded form 24.8, 24.5, 21.2 and 13.0, and 21.3, 21.0, 16.8 and 10.6. From memory the plain GEMV of
//! nibbles does 64, 68, 43 and 46 in the same run, `tiered` up to 3 bits 29 to 34 in another. A prototype of this loop alone:
//! 16 cycles a tile with four streams, 18 with three, 22 with two, 37 with one, so matrices of fewer chunks than
//! threads times four do not reach these figures; with five to eight streams 16.5 to 18.6, as the registers are used up.
//!
//! And on Zen 5 (4.1 GHz, one of two cores, read bandwidth 30 GB/s; `tersor kernels --codec rans-pairs --level avx512 --threads 1`, medians in turns
//! with the kernel before, in brackets) at 2.25, 3.0 and 3.7 bits of entropy: fused from the cache 34.5, 34.8 and 32.5, from memory 31.9, 31.0 and
//! 28.3 (29.9, 29.1, 23.0); to the decoded form from the cache 41, 32 and 24, from memory 29, 25 and 17.7. The gain: a line of the chunk that comes four later is fetched
//! to the L2 cache with each step, all of it and evenly. Before, 128 lines of the next chunks' beginnings were fetched at once (a tenth of the time), raw lines
//! while they were multiplied (which doubled the time of that), and listed symbols looked up in raw lines before these had come. Tried without gain: words 512, 4,096, 65,536 and
//! 98,304 bytes ahead instead of 1,024 (29, 26, 24 and 29 of 31 at 3.0 bits); raw lines 65,536 ahead of their use (24.2 of 24.9 at 3.7); beginnings of 256 or 512 bytes;
//! blocks of 128 and 64 tiles (30 of 32 from the cache, no more from memory); coded bytes in pages of 2 MiB (no difference, for `rans` neither). Frequencies all even, looked up in twos by one
//! permute: 36.7, 34.9 and 35.4 from the cache, 34.5, 30.0 and 30.4 from memory, for 0.02, 0.036 and 0.035 bit a weight.
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

use super::streams::Cursors;
use super::{TileBytes, each_chunk};
use crate::Avx512;
use crate::rans_pairs::{Kernel, Stream};
use crate::source::STREAMS_MAX;

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
        STREAMS_MAX
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
                4 => by_shift!(4),
                5 => by_shift!(5),
                _ => by_shift!(6),
            }
        }
    }
}

/// A table of 256 bytes.
pub(super) type Table = [__m512i; 4];

/// # Safety
/// Features of [`Avx512`], here and below.
#[inline(always)]
pub(super) unsafe fn load(table: &[u8; 256]) -> Table {
    // SAFETY: four times 64 readable bytes.
    unsafe { std::array::from_fn(|i| _mm512_loadu_si512(table.as_ptr().add(64 * i).cast())) }
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
static BYTES: [TileBytes; 2] = {
    let mut indices = [[0; 64]; 2];
    let mut lane = 0;
    while lane < 64 {
        let low = lane as u8 / 2 * 2 + lane as u8 % 2 * 64;
        (indices[0][lane], indices[1][lane]) = (low, low + 1);
        lane += 1;
    }
    indices
};

/// [`BYTES`], in registers.
#[inline(always)]
pub(super) unsafe fn byte_indices() -> [__m512i; 2] {
    // SAFETY: 64 readable bytes each.
    unsafe { BYTES.each_ref().map(|indices| _mm512_loadu_si512(indices.as_ptr().cast())) }
}

/// `N` streams in flight.
struct Flight<const N: usize> {
    freqs: Table,
    offsets: Table,
    pair_bytes: Table,
    even: __m512i,
    bytes: [__m512i; 2],
    low: [__m512i; N],
    high: [__m512i; N],
    words: Cursors<N>,
    escapes: Cursors<N>,
    ahead: [*const u8; N],
    ahead_step: usize,
}

impl<const N: usize> Flight<N> {
    #[inline(always)]
    unsafe fn new(slots: &Slots, streams: &[Stream<'_>; N]) -> Flight<N> {
        // SAFETY: loads are of whole arrays.
        unsafe {
            Flight {
                freqs: load(&slots.freq),
                offsets: load(&slots.offset),
                pair_bytes: load(&slots.pair_byte),
                even: _mm512_set1_epi16(0xff),
                bytes: byte_indices(),
                low: std::array::from_fn(|i| _mm512_loadu_si512(streams[i].low.as_ptr().cast())),
                high: std::array::from_fn(|i| _mm512_loadu_si512(streams[i].high.as_ptr().cast())),
                words: Cursors::new(streams.each_ref().map(|stream| &stream.words)),
                escapes: Cursors::new(streams.each_ref().map(|stream| &stream.escapes)),
                ahead: streams.each_ref().map(|stream| stream.ahead),
                ahead_step: streams[0].ahead_step,
            }
        }
    }

    /// The next pair bytes of stream `i`, of which this is the `step`th step.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2")]
    unsafe fn next(&mut self, i: usize, step: usize) -> __m512i {
        let pair: __m512i;
        let (hungry, escaped): (u64, u64);
        let (mut _a, mut _b, mut _d): (__m512i, __m512i, __m512i);
        // SAFETY: the loads begin at or before the end of their part of the chunk, behind which 64 bytes are readable.
        unsafe {
            std::arch::asm!(
                // Frequencies in a, offsets in c: of the slots from 128 on from the upper halves of the tables.
                "vpmovb2m {k}, {low}",
                "vmovdqa64 {a}, {f0}",
                "vpermt2b {a}, {low}, {f1}",
                "vmovdqa64 {b}, {f2}",
                "vpermt2b {b}, {low}, {f3}",
                "vmovdqu8 {a}{{{k}}}, {b}",
                "vmovdqa64 {c}, {o0}",
                "vpermt2b {c}, {low}, {o1}",
                "vmovdqa64 {b}, {o2}",
                "vpermt2b {b}, {low}, {o3}",
                "vmovdqu8 {c}{{{k}}}, {b}",
                // x = freq * (x >> 8) + offset, at most 15 bits: of even lanes in b, of odd ones in a.
                "vpandq {b}, {a}, {even}",
                "vpandnq {a}, {even}, {a}",
                "vpmaddubsw {b}, {high}, {b}",
                "vpmaddubsw {a}, {high}, {a}",
                "vpandq {high}, {c}, {even}",
                "vpsrlw {c}, {c}, 8",
                "vpaddw {b}, {b}, {high}",
                "vpaddw {a}, {a}, {c}",
                // Pair bytes in c.
                "vmovdqa64 {c}, {p0}",
                "vpermt2b {c}, {low}, {p1}",
                "vmovdqa64 {d}, {p2}",
                "vpermt2b {d}, {low}, {p3}",
                "vmovdqu8 {c}{{{k}}}, {d}",
                "vmovdqa64 {high}, {b}",
                "vpermt2b {high}, {highs}, {a}",
                "vmovdqa64 {low}, {b}",
                "vpermt2b {low}, {lows}, {a}",
                // Below STATE_MIN = 256: the state moves up by a byte and takes a word.
                "vptestnmb {k}, {high}, {high}",
                "kmovq {hungry}, {k}",
                "vmovdqu8 {high}{{{k}}}, {low}",
                "vpexpandb {low}{{{k}}}, zmmword ptr [{words}]",
                "vptestnmb {e}, {c}, {c}",
                "kmovq {escaped}, {e}",
                "vpexpandb {c}{{{e}}}, zmmword ptr [{escapes}]",
                low = inout(zmm_reg) self.low[i],
                high = inout(zmm_reg) self.high[i],
                a = out(zmm_reg) _a,
                b = out(zmm_reg) _b,
                c = out(zmm_reg) pair,
                d = out(zmm_reg) _d,
                f0 = in(zmm_reg) self.freqs[0],
                f1 = in(zmm_reg) self.freqs[1],
                f2 = in(zmm_reg) self.freqs[2],
                f3 = in(zmm_reg) self.freqs[3],
                o0 = in(zmm_reg) self.offsets[0],
                o1 = in(zmm_reg) self.offsets[1],
                o2 = in(zmm_reg) self.offsets[2],
                o3 = in(zmm_reg) self.offsets[3],
                p0 = in(zmm_reg) self.pair_bytes[0],
                p1 = in(zmm_reg) self.pair_bytes[1],
                p2 = in(zmm_reg) self.pair_bytes[2],
                p3 = in(zmm_reg) self.pair_bytes[3],
                even = in(zmm_reg) self.even,
                lows = in(zmm_reg) self.bytes[0],
                highs = in(zmm_reg) self.bytes[1],
                k = out(kreg) _,
                e = out(kreg) _,
                words = in(reg) self.words.readable(i),
                escapes = in(reg) self.escapes.readable(i),
                hungry = out(reg) hungry,
                escaped = out(reg) escaped,
                options(pure, readonly, nostack, preserves_flags)
            );
            self.words.advance(i, hungry.count_ones() as usize);
            _mm_prefetch::<_MM_HINT_T0>(self.words.ahead(i).cast());
            _mm_prefetch::<_MM_HINT_T1>(self.ahead[i].wrapping_add(step * self.ahead_step).cast());
            self.escapes.advance(i, escaped.count_ones() as usize);
        }
        pair
    }

    /// Gives the streams back, `steps` steps on.
    #[inline(always)]
    unsafe fn land(self, streams: &mut [Stream<'_>; N], steps: usize) {
        // SAFETY: stores of whole arrays.
        unsafe {
            for (i, stream) in streams.iter_mut().enumerate() {
                _mm512_storeu_si512(stream.low.as_mut_ptr().cast(), self.low[i]);
                _mm512_storeu_si512(stream.high.as_mut_ptr().cast(), self.high[i]);
                (stream.words, stream.escapes) = (self.words.rest(i), self.escapes.rest(i));
                stream.ahead = self.ahead[i].wrapping_add(steps * self.ahead_step);
            }
        }
    }
}

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
    // SAFETY: stores are within `out`, as just asserted.
    unsafe {
        let mut flight = Flight::new(slots, streams);
        let shift = _mm512_set1_epi8(shift as i8);
        for step in 0..steps {
            each_chunk!(N, |i| {
                let mut pair = flight.next(i, step);
                if SHIFT {
                    pair = add_nibbles(pair, shift);
                }
                _mm512_storeu_si512(out.get_unchecked_mut(i * stride + step).as_mut_ptr().cast(), pair);
            });
        }
        flight.land(streams, steps);
    }
}
