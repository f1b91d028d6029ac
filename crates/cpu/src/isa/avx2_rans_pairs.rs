//! `rans-pairs` for AVX2.
//!
//! Computes: pair bytes of up to two chunks side by side, for the sinks of `rans_pairs.rs`.
//!
//! Layout: as in `avx2_rans.rs` the states of 64 lanes are two registers of low and two of high bytes. 256
//! slots are too many for shuffles, and a gather takes a cycle for each lane. So every slot, a low byte,
//! goes to a general register and loads its entry, frequency, offset and pair byte in 4 bytes of a table
//! of 1 KiB, into its place in a vector. Frequency and offset lie side by side, as the high byte and a
//! 1 do after an unpack: one `vpmaddubsw` is the next state, in words of 16 bits.
//!
//! Needs: AVX2 and POPCNT, 64 readable bytes behind each chunk.
//!
//! Cost: some 420 instructions for 128 symbols, of which 64 loads into vectors, two a cycle, 140 to take
//! the slots apart, and 60 for the words: 77 cycles on Zen 4 with two streams, 85 with one.
//!
//! Measured (AMD EPYC, Zen 4, 3.69 GHz, one of two cores, `cargo run --release -p tersor-cpu --example gemv -- avx2
//! 100 rans-pairs`, 1 thread): fused with the dot at 1.51, 2.25, 3.06 and 3.79 bits of entropy 5.6, 5.5, 5.1 and 4.8
//! G weights/s from the cache, 5.4, 4.8, 4.6 and 4.0 from memory; in bulk to the decoded form 6.0, 5.8, 5.0 and 4.2
//! from the cache. `rans` does 4.9 to 3.9 there.
//! Escapes are written over the stored tile, up to four of them with no branch: at 3.7 bits 4.8 instead of 3.8 fused, where
//! branches are not learned by heart.
//!
//! Tried without gain in a prototype of this loop, cycles for 128 symbols: gathers (110); slots by way of memory
//! instead of general registers (85 to 117); entries by unpacks instead of inserts (105); states in words (89).

use std::arch::x86_64::*;

use tersor_codec::rans_pairs::Slots;

use super::avx2::expand;
use super::streams::Cursors;
use super::{TileBytes, each_chunk, patch};
use crate::Avx2;
use crate::rans_pairs::{Kernel, Stream};

/// Chunks side by side.
const WIDTH: usize = 2;
/// Escapes of a tile up to which no branch depends on them.
const ESCAPES_FEW: usize = 4;

pub(crate) struct Tables {
    /// By slot: frequency, offset, pair byte and 0, the frequency in the lowest byte.
    entries: [u32; 256],
    /// Shuffles of the entries of four lanes: frequencies and offsets to the low 8 bytes, pair bytes to the next 4
    /// or the last 4. Not constants, for which the compiler would find three shuffles each.
    apart: [[u8; 16]; 2],
}

impl Tables {
    pub(crate) fn new(_: Avx2, slots: &Slots) -> Tables {
        let entry = |slot: usize| u32::from_le_bytes([slots.freq[slot], slots.offset[slot], slots.pair_byte[slot], 0]);
        let apart = [[2, 6, 10, 14, 128, 128, 128, 128], [128, 128, 128, 128, 2, 6, 10, 14]];
        Tables {
            entries: std::array::from_fn(entry),
            apart: apart.map(|pairs| std::array::from_fn(|i| if i < 8 { (i / 2 * 4 + i % 2) as u8 } else { pairs[i - 8] })),
        }
    }

    /// The entries of eight lanes, four in a register.
    ///
    /// # Safety
    /// AVX2, here and below.
    #[inline(always)]
    unsafe fn lookup(&self, slots: u64) -> [__m128i; 2] {
        macro_rules! entry {
            ($lane:literal) => {
                self.entries[usize::from((slots >> (8 * $lane)) as u8)] as i32
            };
        }
        // SAFETY: registers only.
        unsafe { [_mm_setr_epi32(entry!(0), entry!(1), entry!(2), entry!(3)), _mm_setr_epi32(entry!(4), entry!(5), entry!(6), entry!(7))] }
    }
}

impl Kernel for Tables {
    fn width(&self) -> usize {
        WIDTH
    }

    fn decode(&self, streams: &mut [Stream<'_>], steps: usize, shift: u8, out: &mut [TileBytes], stride: usize) {
        // SAFETY: the token given to `new` proves the features that the function enables.
        unsafe {
            match (streams.len(), shift) {
                (1, 0) => decode::<1, false>(self, streams, steps, shift, out, stride),
                (1, _) => decode::<1, true>(self, streams, steps, shift, out, stride),
                (_, 0) => decode::<2, false>(self, streams, steps, shift, out, stride),
                _ => decode::<2, true>(self, streams, steps, shift, out, stride),
            }
        }
    }
}

/// 16 bytes in both halves.
#[inline(always)]
unsafe fn broadcast(bytes: &[u8; 16]) -> __m256i {
    // SAFETY: 16 readable bytes.
    unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes.as_ptr().cast())) }
}

/// The next states of 32 lanes before they take words, low and high bytes, and their pair bytes.
#[inline(always)]
unsafe fn step(tables: &Tables, apart: [__m256i; 2], low: __m256i, high: __m256i) -> [__m256i; 3] {
    // SAFETY: registers only.
    unsafe {
        let (ones, byte) = (_mm256_set1_epi8(1), _mm256_set1_epi16(0xff));
        // Unpacking and packing take the lanes of each half of a register in turn.
        let (a, b) = (tables.lookup(_mm256_extract_epi64::<0>(low) as u64), tables.lookup(_mm256_extract_epi64::<2>(low) as u64));
        let first = _mm256_shuffle_epi8(_mm256_set_m128i(b[0], a[0]), apart[0]);
        let second = _mm256_shuffle_epi8(_mm256_set_m128i(b[1], a[1]), apart[1]);
        let (a, b) = (tables.lookup(_mm256_extract_epi64::<1>(low) as u64), tables.lookup(_mm256_extract_epi64::<3>(low) as u64));
        let third = _mm256_shuffle_epi8(_mm256_set_m128i(b[0], a[0]), apart[0]);
        let fourth = _mm256_shuffle_epi8(_mm256_set_m128i(b[1], a[1]), apart[1]);
        let pair = _mm256_unpackhi_epi64(_mm256_or_si256(first, second), _mm256_or_si256(third, fourth));
        // x = freq * (x >> 8) + 1 * offset, at most 15 bits.
        let y0 = _mm256_maddubs_epi16(_mm256_unpacklo_epi8(high, ones), _mm256_unpacklo_epi64(first, second));
        let y1 = _mm256_maddubs_epi16(_mm256_unpackhi_epi8(high, ones), _mm256_unpacklo_epi64(third, fourth));
        let y_low = _mm256_packus_epi16(_mm256_and_si256(y0, byte), _mm256_and_si256(y1, byte));
        let y_high = _mm256_packus_epi16(_mm256_srli_epi16::<8>(y0), _mm256_srli_epi16::<8>(y1));
        [y_low, y_high, pair]
    }
}

/// By nibble, the sum modulo 16.
#[inline(always)]
unsafe fn add_nibbles(a: __m256i, b: __m256i) -> __m256i {
    // SAFETY: registers only. The upper bits of the nibbles, 0x88, are added without their carries.
    unsafe {
        let lower = _mm256_set1_epi8(0x77);
        let sum = _mm256_add_epi8(_mm256_and_si256(a, lower), _mm256_and_si256(b, lower));
        _mm256_xor_si256(sum, _mm256_andnot_si256(lower, _mm256_xor_si256(a, b)))
    }
}

/// The lanes that are 0.
#[inline(always)]
unsafe fn zeros(a: __m256i, b: __m256i) -> ([__m256i; 2], u64) {
    // SAFETY: registers only.
    unsafe {
        let zero = _mm256_setzero_si256();
        let zeros = [_mm256_cmpeq_epi8(a, zero), _mm256_cmpeq_epi8(b, zero)];
        let mask = u64::from(_mm256_movemask_epi8(zeros[0]) as u32) | u64::from(_mm256_movemask_epi8(zeros[1]) as u32) << 32;
        (zeros, mask)
    }
}

/// As [`Kernel::decode`].
///
/// # Safety
/// Only for the target features.
#[target_feature(enable = "avx2,f16c,bmi1,bmi2,popcnt")]
unsafe fn decode<const N: usize, const SHIFT: bool>(
    tables: &Tables,
    streams: &mut [Stream<'_>],
    steps: usize,
    shift: u8,
    out: &mut [TileBytes],
    stride: usize,
) {
    let streams: &mut [Stream<'_>; N] = streams.try_into().expect("as many as the caller counted");
    assert!(steps <= stride && (N - 1) * stride + steps <= out.len());
    // SAFETY: the loads of states are of whole arrays; the expands read 64 bytes from or before the end of
    // their part of the chunk, behind which 64 bytes are readable. Stores are within `out`, as just
    // asserted.
    unsafe {
        let shift = _mm256_set1_epi8(shift as i8);
        let [a, b] = &tables.apart;
        let apart = [broadcast(a), broadcast(b)];
        let half = |bytes: &TileBytes, half: usize| _mm256_loadu_si256(bytes.as_ptr().add(32 * half).cast());
        let mut low: [[__m256i; 2]; N] = std::array::from_fn(|i| [half(&streams[i].low, 0), half(&streams[i].low, 1)]);
        let mut high: [[__m256i; 2]; N] = std::array::from_fn(|i| [half(&streams[i].high, 0), half(&streams[i].high, 1)]);
        let mut words = Cursors::new(streams.each_ref().map(|stream| &stream.words));
        let mut escapes = Cursors::new(streams.each_ref().map(|stream| &stream.escapes));
        let (ahead, ahead_step) = (streams.each_ref().map(|stream| stream.ahead), streams[0].ahead_step);
        for at in 0..steps {
            each_chunk!(N, |i| {
                let [y_low0, y_high0, mut pair0] = step(tables, apart, low[i][0], high[i][0]);
                let [y_low1, y_high1, mut pair1] = step(tables, apart, low[i][1], high[i][1]);
                // Below STATE_MIN = 256: the state moves up by a byte and takes a word.
                let (below, hungry) = zeros(y_high0, y_high1);
                let next = expand(words.readable(i), hungry);
                words.advance(i, hungry.count_ones() as usize);
                _mm_prefetch::<_MM_HINT_T0>(words.ahead(i).cast());
                _mm_prefetch::<_MM_HINT_T1>(ahead[i].wrapping_add(at * ahead_step).cast());
                high[i] = [
                    _mm256_or_si256(y_high0, _mm256_and_si256(below[0], y_low0)),
                    _mm256_or_si256(y_high1, _mm256_and_si256(below[1], y_low1)),
                ];
                low[i] = [
                    _mm256_or_si256(_mm256_andnot_si256(below[0], y_low0), next[0]),
                    _mm256_or_si256(_mm256_andnot_si256(below[1], y_low1), next[1]),
                ];
                let tile = out.as_mut_ptr().add(i * stride + at).cast::<u8>();
                let (_, escaped) = zeros(pair0, pair1);
                if SHIFT {
                    (pair0, pair1) = (add_nibbles(pair0, shift), add_nibbles(pair1, shift));
                }
                _mm256_storeu_si256(tile.cast(), pair0);
                _mm256_storeu_si256(tile.add(32).cast(), pair1);
                let next = escapes.readable(i);
                // The tile behind is written later, but for that of the next chunk.
                if SHIFT && escaped != 0 {
                    let mut shifted: TileBytes = [0; 64];
                    for half in 0..2 {
                        let next = _mm256_loadu_si256(next.add(32 * half).cast());
                        _mm256_storeu_si256(shifted.as_mut_ptr().add(32 * half).cast(), add_nibbles(next, shift));
                    }
                    patch::<ESCAPES_FEW>(tile, escaped, shifted.as_ptr(), at + 1 < steps);
                } else {
                    patch::<ESCAPES_FEW>(tile, escaped, next, at + 1 < steps);
                }
                escapes.advance(i, escaped.count_ones() as usize);
            });
        }
        for (i, stream) in streams.iter_mut().enumerate() {
            for half in 0..2 {
                _mm256_storeu_si256(stream.low.as_mut_ptr().add(32 * half).cast(), low[i][half]);
                _mm256_storeu_si256(stream.high.as_mut_ptr().add(32 * half).cast(), high[i][half]);
            }
            (stream.words, stream.escapes) = (words.rest(i), escapes.rest(i));
            stream.ahead = ahead[i].wrapping_add(steps * ahead_step);
        }
    }
}
