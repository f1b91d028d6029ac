//! `rans` with 16-bit states, 8-bit words, 6 to 8 bits of probability and 64 lanes, for AVX2.
//!
//! Computes: tiles of two chunks side by side, for the sinks of `streams.rs`.
//!
//! Layout: the states of 64 lanes are two registers of low and two of high bytes. AVX2 has no lookup
//! in 64 or more bytes, only `vpshufb` in 16, and no expand. So a slot is not looked up in the tables
//! of slots. It leads to its entry in two moves: its upper 4 bits choose one of 16 buckets, which
//! knows the entry of its first slot and after which slots the next few entries begin within it (rare
//! symbols, at both ends of the alphabet: 3 such borders suffice at 2.25 bits of entropy and 7 bits
//! of probability). Frequency, first slot and symbol are then lookups by entry, one shuffle for each
//! 16 entries. The lanes that fell below STATE_MIN take the next words by `avx2::expand`: eight
//! shuffles with controls by mask from a table of 2 KiB.
//!
//! Needs: AVX2 and POPCNT. At most 64 entries, all of frequencies below 256; far symbols only where
//! tiles are stored; 64 readable bytes behind each chunk.
//!
//! Cost: some 115 vector instructions for 64 symbols, 6 more for each border, and 14 for every 16
//! entries beyond the first 16. Two streams hide most of the latency: one reaches 4.5, two 6.9, four
//! 7.1 G weights/s in one run.
//!
//! Measured (AMD EPYC, Zen 5, one of two shared cores, `cargo run --release -p tersor-cpu --example
//! gemv avx2`), fused with the dot, in G weights/s from the cache: 7 bits of probability 7.0 at 1.5
//! and 2.25 bits of entropy, 5.5 at 3.06 and 5.3 at 3.79; 6 bits 5.8 to 6.3; 8 bits 5.9 up to 3.06
//! bits. The codec's scalar decoder does 0.65. Escapes are written
//! over the stored tile, up to two of them with no branch. Tables of more than 64 entries go to the codec's
//! decoder. On Zen 4 with one core, fused from the cache at 2.25, 3.0 and 3.7 bits of entropy: 5.2, 4.9 and 4.0.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use tersor_codec::rans;

use super::avx2::expand;
use super::streams::{Cursors, Decoder, Factor, Group, Kernel, Lines, Stream, dot_group, lines_group, store_group};
use super::{Isa, TileBytes, Tiles, each_chunk, patch};
use crate::source::FarAt;
use crate::{Avx2, TILE_COLS, TILE_ROWS};

const LANES: usize = 64;
/// Slots are divided into as many buckets as one byte shuffle can tell apart.
const BUCKETS: usize = 16;
/// Entries that one byte shuffle can tell apart.
const BLOCK: usize = 16;
const BLOCKS_MAX: usize = 4;
/// Entries that may begin within a bucket.
const BORDERS_MAX: usize = 15;
/// Tiles of a chunk that are decoded before they are multiplied: those of a usual segment.
const TILES: usize = 32;
/// Escapes of a tile up to which no branch depends on them.
const ESCAPES_FEW: usize = 2;

/// The table as byte shuffles want it.
pub(crate) struct Tables {
    token: Avx2,
    params: rans::Params,
    blocks: usize,
    borders: usize,
    /// By bucket: the entry of its first slot.
    first: [u8; BUCKETS],
    /// By bucket: what slots are above from the next entry within the bucket on, from the one after
    /// that on, and so forth; 127 if there is none. With 8 bits of probability slots and borders are
    /// shifted by 128, as bytes are compared with their signs.
    border: [[u8; BUCKETS]; BORDERS_MAX],
    /// By entry. All blocks but the first hold the difference to the block before.
    freq: [[u8; BLOCK]; BLOCKS_MAX],
    /// First slots.
    cum: [[u8; BLOCK]; BLOCKS_MAX],
    symbol: [[u8; BLOCK]; BLOCKS_MAX],
}

impl Tables {
    /// `None` if this kernel was not made for the table.
    pub(crate) fn new(token: Avx2, table: &rans::Table) -> Option<Tables> {
        let params @ rans::Params { state_bits: 16, word_bits: 8, prob_bits: prob_bits @ 6..=8, lanes: 64 } = table.params() else {
            return None;
        };
        let entries = table.entries();
        if entries.len() > BLOCKS_MAX * BLOCK {
            return None;
        }
        let mut tables = Tables {
            token,
            params,
            blocks: entries.len().div_ceil(BLOCK),
            borders: 0,
            first: [0; BUCKETS],
            border: [[127; BUCKETS]; BORDERS_MAX],
            freq: [[0; BLOCK]; BLOCKS_MAX],
            cum: [[0; BLOCK]; BLOCKS_MAX],
            symbol: [[0; BLOCK]; BLOCKS_MAX],
        };
        let bucket_slots = (1usize << prob_bits) / BUCKETS;
        let bias = if prob_bits == 8 { 128u8 } else { 0 };
        let mut borders = [0; BUCKETS];
        let mut cum = 0usize;
        for (entry, &(symbol, freq)) in entries.iter().enumerate() {
            // A lone entry of 8 bits has the frequency 256.
            tables.freq[entry / BLOCK][entry % BLOCK] = u8::try_from(freq).ok()?;
            tables.cum[entry / BLOCK][entry % BLOCK] = cum as u8;
            tables.symbol[entry / BLOCK][entry % BLOCK] = symbol;
            let bucket = cum / bucket_slots;
            if !cum.is_multiple_of(bucket_slots) {
                tables.border[borders[bucket]][bucket] = (cum as u8 - 1).wrapping_add(bias);
                borders[bucket] += 1;
            }
            cum += usize::from(freq);
            // Buckets that begin in this entry.
            for first in &mut tables.first[(cum - usize::from(freq)).div_ceil(bucket_slots)..cum.div_ceil(bucket_slots)] {
                *first = entry as u8;
            }
        }
        tables.borders = borders.into_iter().max().unwrap_or(0);
        for table in [&mut tables.freq, &mut tables.cum, &mut tables.symbol] {
            for block in (1..BLOCKS_MAX).rev() {
                let before = table[block - 1];
                table[block].iter_mut().zip(before).for_each(|(value, before)| *value ^= before);
            }
        }
        Some(tables)
    }
}

/// `N` streams in flight, of tables of `P` bits, at most `K` borders in a bucket and `16 * B`
/// entries.
struct Streams<const P: i32, const K: usize, const B: usize, const N: usize> {
    first: __m256i,
    border: [__m256i; K],
    freq: [__m256i; B],
    cum: [__m256i; B],
    symbol: [__m256i; B],
    low: [[__m256i; 2]; N],
    high: [[__m256i; 2]; N],
    words: Cursors<N>,
    escapes: Cursors<N>,
}

/// # Safety
/// AVX2, here and below.
#[inline(always)]
unsafe fn broadcast(table: &[u8; 16]) -> __m256i {
    // SAFETY: 16 readable bytes.
    unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast())) }
}

/// The values of entries.
#[inline(always)]
unsafe fn lookup<const B: usize>(table: &[__m256i; B], mut entry: __m256i) -> __m256i {
    // SAFETY: registers only. A shuffle takes the low four bits of an index, and gives 0 for one
    // below 0: block after block is added until the entry's own.
    unsafe {
        let mut value = _mm256_shuffle_epi8(table[0], entry);
        for block in &table[1..] {
            entry = _mm256_sub_epi8(entry, _mm256_set1_epi8(BLOCK as i8));
            value = _mm256_xor_si256(value, _mm256_shuffle_epi8(*block, entry));
        }
        value
    }
}

impl<const P: i32, const K: usize, const B: usize, const N: usize> Decoder<N> for Streams<P, K, B, N> {
    type Isa = Avx2;
    type Tables = Tables;

    #[inline(always)]
    unsafe fn new(tables: &Tables, streams: &[Stream<'_>; N]) -> Self {
        // SAFETY: all loads are of whole arrays, and of the 128 bytes of states.
        unsafe {
            let zero = _mm256_setzero_si256();
            let mut s = Streams {
                first: broadcast(&tables.first),
                border: [zero; K],
                freq: [zero; B],
                cum: [zero; B],
                symbol: [zero; B],
                low: [[zero; 2]; N],
                high: [[zero; 2]; N],
                words: Cursors::words(streams),
                escapes: Cursors::escapes(streams),
            };
            for k in 0..K {
                s.border[k] = broadcast(&tables.border[k]);
            }
            for b in 0..B {
                s.freq[b] = broadcast(&tables.freq[b]);
                s.cum[b] = broadcast(&tables.cum[b]);
                s.symbol[b] = broadcast(&tables.symbol[b]);
            }
            for (i, stream) in streams.iter().enumerate() {
                let states = &stream.states[..2 * LANES];
                for half in 0..2 {
                    s.low[i][half] = _mm256_loadu_si256(states[32 * half..].as_ptr().cast());
                    s.high[i][half] = _mm256_loadu_si256(states[LANES + 32 * half..].as_ptr().cast());
                }
            }
            s
        }
    }

    #[inline(always)]
    unsafe fn store(&mut self, isa: Avx2, i: usize, out: *mut TileBytes, spare: bool) {
        // SAFETY: the expand and the patch read 64 bytes from or before the end of their part of the
        // chunk, behind which 64 bytes are readable. The contract for `spare` is that of the patch.
        unsafe {
            let zero = _mm256_setzero_si256();
            let byte = _mm256_set1_epi16(0xff);
            let (mut symbol, mut y_low, mut y_high, mut below) = ([zero; 2], [zero; 2], [zero; 2], [zero; 2]);
            for half in 0..2 {
                let (low, high) = (self.low[i][half], self.high[i][half]);
                let shifted = match P {
                    6 => _mm256_srli_epi16::<2>(low),
                    7 => _mm256_srli_epi16::<3>(low),
                    _ => _mm256_srli_epi16::<4>(low),
                };
                let bucket = _mm256_and_si256(shifted, _mm256_set1_epi8(15));
                let slot = if P == 8 { low } else { _mm256_and_si256(low, _mm256_set1_epi8(((1u32 << P) - 1) as i8)) };
                let place = if P == 8 { _mm256_xor_si256(low, _mm256_set1_epi8(i8::MIN)) } else { slot };
                let mut entry = _mm256_shuffle_epi8(self.first, bucket);
                for border in &self.border {
                    entry = _mm256_sub_epi8(entry, _mm256_cmpgt_epi8(place, _mm256_shuffle_epi8(*border, bucket)));
                }
                let freq = lookup(&self.freq, entry);
                let offset = _mm256_sub_epi8(slot, lookup(&self.cum, entry));
                symbol[half] = lookup(&self.symbol, entry);
                // x = freq * (x >> P) + offset in words of 16 bits. Unpacking and packing undo each
                // other.
                let first = _mm256_add_epi16(
                    _mm256_mullo_epi16(_mm256_unpacklo_epi8(freq, zero), _mm256_srli_epi16::<P>(_mm256_unpacklo_epi8(low, high))),
                    _mm256_unpacklo_epi8(offset, zero),
                );
                let second = _mm256_add_epi16(
                    _mm256_mullo_epi16(_mm256_unpackhi_epi8(freq, zero), _mm256_srli_epi16::<P>(_mm256_unpackhi_epi8(low, high))),
                    _mm256_unpackhi_epi8(offset, zero),
                );
                y_low[half] = _mm256_packus_epi16(_mm256_and_si256(first, byte), _mm256_and_si256(second, byte));
                y_high[half] = _mm256_packus_epi16(_mm256_srli_epi16::<8>(first), _mm256_srli_epi16::<8>(second));
                below[half] = _mm256_cmpeq_epi8(y_high[half], zero);
            }
            // Below STATE_MIN = 256: the state moves up by a byte and takes a word.
            let hungry = movemask(below);
            let words = expand(self.words.readable(i), hungry);
            for half in 0..2 {
                self.high[i][half] = _mm256_or_si256(y_high[half], _mm256_and_si256(below[half], y_low[half]));
                self.low[i][half] = _mm256_or_si256(_mm256_andnot_si256(below[half], y_low[half]), words[half]);
            }
            self.words.advance(i, hungry.count_ones() as usize);
            _mm_prefetch::<_MM_HINT_T0>(self.words.ahead(i).cast());
            isa.store(symbol, &mut *out);
            let escaped = movemask([_mm256_cmpeq_epi8(symbol[0], zero), _mm256_cmpeq_epi8(symbol[1], zero)]);
            patch::<ESCAPES_FEW>(out.cast(), escaped, self.escapes.readable(i), spare);
            self.escapes.advance(i, escaped.count_ones() as usize);
        }
    }

    /// By way of memory, as a tile is to lie there some time before it is read.
    #[inline(always)]
    unsafe fn dot(&mut self, isa: Avx2, sums: &mut [[__m256i; 2]; N], q: &[[i8; TILE_COLS]]) {
        // One more, whose first byte is spare.
        let mut tiles = [const { MaybeUninit::<Tiles<{ TILES + 1 }>>::uninit() }; N];
        for q in q.chunks(TILES) {
            for step in 0..q.len() {
                each_chunk!(N, |i| {
                    // SAFETY: by the contract; behind the tile there is another.
                    unsafe { self.store(isa, i, tiles[i].as_mut_ptr().cast::<TileBytes>().add(step), true) };
                });
            }
            for (sum, tiles) in sums.iter_mut().zip(&tiles) {
                for (step, q) in q.iter().enumerate() {
                    // SAFETY: as many were just stored.
                    let tile = unsafe { &*tiles.as_ptr().cast::<TileBytes>().add(step) };
                    *sum = isa.dot(*sum, isa.load(tile), q);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn valid(&self) -> bool {
        // SAFETY: registers only.
        unsafe {
            let mut wrong = _mm256_setzero_si256();
            for (low, high) in self.low.iter().flatten().zip(self.high.iter().flatten()) {
                let high = _mm256_xor_si256(*high, _mm256_set1_epi8(1));
                wrong = _mm256_or_si256(wrong, _mm256_or_si256(*low, high));
            }
            _mm256_testz_si256(wrong, wrong) == 1 && self.words.at_end() && self.escapes.at_end()
        }
    }
}

#[inline(always)]
unsafe fn movemask(lanes: [__m256i; 2]) -> u64 {
    // SAFETY: registers only.
    unsafe { u64::from(_mm256_movemask_epi8(lanes[0]) as u32) | u64::from(_mm256_movemask_epi8(lanes[1]) as u32) << 32 }
}

/// Calls `$f::<P, K, B, N>(...)` with the least constants that will do for the tables.
macro_rules! by_shape {
    ($tables:expr, $n:expr, $f:ident($($arg:expr),*)) => {{
        macro_rules! by_n {
            ($p:literal, $k:literal, $b:literal) => {
                match $n {
                    1 => $f::<$p, $k, $b, 1>($($arg),*),
                    _ => $f::<$p, $k, $b, 2>($($arg),*),
                }
            };
        }
        match ($tables.params.prob_bits, $tables.borders, $tables.blocks) {
            (7, ..=3, 1) => by_n!(7, 3, 1),
            (7, ..=3, 2) => by_n!(7, 3, 2),
            (7, ..=4, 1) => by_n!(7, 4, 1),
            (7, ..=4, ..=2) => by_n!(7, 4, 2),
            (7, ..=5, ..=2) => by_n!(7, 5, 2),
            (7, _, ..=2) => by_n!(7, 7, 2),
            (7, _, _) => by_n!(7, 7, 4),
            (6, _, ..=2) => by_n!(6, 3, 2),
            (6, _, _) => by_n!(6, 3, 4),
            (_, ..=5, ..=2) => by_n!(8, 5, 2),
            (_, ..=8, ..=2) => by_n!(8, 8, 2),
            _ => by_n!(8, 15, 4),
        }
    }};
}

impl Kernel for Tables {
    fn params(&self) -> rans::Params {
        self.params
    }

    fn width(&self) -> usize {
        2
    }

    fn store(&self, group: Group<'_>, out: &mut [u8], far: &mut Vec<FarAt>) -> bool {
        // SAFETY: the token proves the features that the function enables.
        unsafe { by_shape!(self, group.chunks, store(self, group, out, far)) }
    }

    fn lines(&self, group: Group<'_>, out: Lines<'_>) -> Option<usize> {
        // SAFETY: as above.
        unsafe { by_shape!(self, group.chunks, lines(self, group, out)) }
    }

    fn dot(&self, group: Group<'_>, factor: Factor<'_>, sums: &mut [[f32; TILE_ROWS]]) -> bool {
        // SAFETY: as above.
        unsafe { by_shape!(self, group.chunks, dot(self, group, factor, sums)) }
    }
}

/// # Safety
/// Only for the target features.
#[target_feature(enable = "avx2,f16c,bmi1,bmi2,popcnt")]
unsafe fn store<const P: i32, const K: usize, const B: usize, const N: usize>(
    tables: &Tables,
    group: Group<'_>,
    out: &mut [u8],
    far: &mut Vec<FarAt>,
) -> bool {
    // SAFETY: the features are enabled.
    unsafe { store_group::<Streams<P, K, B, N>, N>(tables.token, tables, group, out, far) }
}

/// # Safety
/// Only for the target features.
#[target_feature(enable = "avx2,f16c,bmi1,bmi2,popcnt")]
unsafe fn lines<const P: i32, const K: usize, const B: usize, const N: usize>(
    tables: &Tables,
    group: Group<'_>,
    out: Lines<'_>,
) -> Option<usize> {
    // SAFETY: the features are enabled.
    unsafe { lines_group::<Streams<P, K, B, N>, N>(tables.token, tables, group, out) }
}

/// # Safety
/// Only for the target features.
#[target_feature(enable = "avx2,f16c,bmi1,bmi2,popcnt")]
unsafe fn dot<const P: i32, const K: usize, const B: usize, const N: usize>(
    tables: &Tables,
    group: Group<'_>,
    factor: Factor<'_>,
    sums: &mut [[f32; TILE_ROWS]],
) -> bool {
    // SAFETY: the features are enabled.
    unsafe { dot_group::<Streams<P, K, B, N>, N>(tables.token, tables, group, factor, sums) }
}
