//! `block-ans` with 16-bit states, 8-bit words and 6 to 8 bits of probability, for AVX-512.
//!
//! Computes: the symbol bytes of blocks, 64 side by side, one a lane. There is no sink that multiplies: lanes are 64 places of the
//! matrix, and what is decoded reaches the dot through the cache.
//!
//! Layout: states and tables as in `avx512_rans.rs`, but each lane reads words of its own. Eight planes hold the next eight words of
//! every lane, the next one first; a lane that takes a word moves its bytes up by one plane. Eight steps take at most eight
//! words: then the planes are read anew, by gathers of eight bytes a lane, whose 8 x 8 bytes and 8 x 8 quadwords are transposed.
//! The symbols of 64 steps go the same way back, so that each lane's 64 leave as one store.
//!
//! Escapes lie at the end of a block and run backward: the 64 bytes before the place are turned round by a permute and expanded.
//!
//! Needs: VBMI for the permutes, VBMI2 for the expand. Blocks of whole tiles, frequencies below 256, 64 readable bytes behind each
//! chunk. Idle lanes of a last group do the work of its first one again.
//!
//! Cost: for 64 symbols about 40 instructions of the step and the moves, 11 of the transposes, and an eighth of eight gathers, 3.4 ns on
//! Zen 4. Two registers of lanes side by side gain 11 % over one.
//!
//! Measured (AMD EPYC, Zen 4, family 25 model 17, one of two shared cores, best of repeats, `cargo run --release -p tersor-cpu
//! --example gemv avx512 2 block-ans`), from the cache, at every entropy from 1.5 to 3.8 bits: 4.0 G weights/s fused and 4.2 in bulk
//! with 8 bits of probability, 4.4 and 4.6 with 7. The codec's decoder does 0.38 there. It loses to `rans` by a factor of three: that
//! has one stream for 64 lanes, so its words come with one load, and its symbols lie in tiles as they are.

use std::arch::x86_64::*;
use std::ops::Range;

use tersor_codec::{PADDING_BYTES, block_ans};
use tersor_format::CodedTensor;

use crate::source::{FarAt, take_far};
use crate::{Avx512, TILE_SYMBOLS};

const LANES: usize = 64;
const SLOTS_MAX: usize = 256;
/// Steps between two reads of words, and words that are read for a lane.
const STEPS: usize = 8;
const STATE_BYTES: u32 = 2;

/// The slots as bytes; those beyond `2^prob_bits` are 0 and never looked up.
pub(crate) struct Tables {
    /// Proves the features of [`group`].
    _token: Avx512,
    params: block_ans::Params,
    freq: [u8; SLOTS_MAX],
    offset: [u8; SLOTS_MAX],
    symbol: [u8; SLOTS_MAX],
}

/// Registers of lanes that decode side by side.
const REGISTERS_MAX: usize = 2;

/// Blocks of one length that decode side by side, in the order of the lanes.
struct Lanes {
    /// Lanes in use.
    count: usize,
    /// Tiles of each block.
    tiles: usize,
    /// First byte of each block, from the start of the first chunk.
    start: [u32; REGISTERS_MAX * LANES],
    /// The byte behind its last.
    end: [u32; REGISTERS_MAX * LANES],
    /// Where its symbols go, from the start of the output.
    out: [usize; REGISTERS_MAX * LANES],
}

impl Default for Lanes {
    fn default() -> Lanes {
        Lanes { count: 0, tiles: 0, start: [0; REGISTERS_MAX * LANES], end: [0; REGISTERS_MAX * LANES], out: [0; REGISTERS_MAX * LANES] }
    }
}

impl Tables {
    /// `None` if this kernel was not made for the table.
    pub(crate) fn new(token: Avx512, table: &block_ans::Table) -> Option<Tables> {
        let params @ block_ans::Params { state_bits: 16, word_bits: 8, prob_bits: 6..=8, block_symbols } = table.params() else {
            return None;
        };
        if !(block_symbols as usize).is_multiple_of(TILE_SYMBOLS) {
            return None;
        }
        let slots = table.slots();
        let mut tables = Tables { _token: token, params, freq: [0; SLOTS_MAX], offset: [0; SLOTS_MAX], symbol: [0; SLOTS_MAX] };
        for (slot, (freq, offset)) in slots.freq.iter().zip(slots.offset).enumerate() {
            // A lone entry of 8 bits has the frequency 256.
            tables.freq[slot] = u8::try_from(*freq).ok()?;
            tables.offset[slot] = u8::try_from(*offset).ok()?;
        }
        tables.symbol[..slots.symbol_byte.len()].copy_from_slice(slots.symbol_byte);
        Some(tables)
    }

    /// Decodes consecutive chunks to symbol bytes, one behind the other, and adds their far symbols to `far`.
    ///
    /// False if a chunk is corrupt, or the chunks take 2 GiB: `out` and `far` are then of no use.
    pub(crate) fn decode(&self, tensor: &CodedTensor, chunks: Range<usize>, out: &mut [u8], far: &mut Vec<FarAt>) -> bool {
        let bytes = tensor.chunks_with_padding(chunks.clone());
        // Gathers take signed offsets of 32 bits.
        if bytes.len() > i32::MAX as usize {
            return false;
        }
        let block_symbols = self.params.block_symbols as usize;
        let mut any_far = false;
        // Whole blocks first, then those that end a chunk: lanes must be of one length.
        for whole in [true, false] {
            let mut lanes = Lanes::default();
            let mut at = 0;
            for chunk in chunks.clone() {
                let symbols = tensor.chunk_symbols(chunk);
                let Ok(parts) = block_ans::Chunk::parse(self.params, symbols, tensor.chunk(chunk)) else {
                    return false;
                };
                let first = parts.blocks.as_ptr().addr() - bytes.as_ptr().addr();
                for (block, range) in parts.block_ranges().enumerate() {
                    let length = block_symbols.min(symbols - block * block_symbols);
                    if (length == block_symbols) != whole {
                        continue;
                    }
                    let tiles = length / TILE_SYMBOLS;
                    if lanes.count == lanes.start.len() || (lanes.count > 0 && tiles != lanes.tiles) {
                        match self.group(&mut lanes, bytes, out) {
                            Some(far) => any_far |= far,
                            None => return false,
                        }
                        lanes.count = 0;
                    }
                    lanes.tiles = tiles;
                    lanes.start[lanes.count] = (first + range.start) as u32;
                    lanes.end[lanes.count] = (first + range.end) as u32;
                    lanes.out[lanes.count] = at + block * block_symbols;
                    lanes.count += 1;
                }
                at += symbols;
            }
            if lanes.count > 0 {
                match self.group(&mut lanes, bytes, out) {
                    Some(far) => any_far |= far,
                    None => return false,
                }
            }
        }
        let mut rest = &out[..];
        chunks.into_iter().all(|chunk| {
            let (bytes, after) = rest.split_at(tensor.chunk_symbols(chunk));
            rest = after;
            let Ok(parts) = block_ans::Chunk::parse(self.params, bytes.len(), tensor.chunk(chunk)) else {
                return false;
            };
            if any_far { take_far(tensor, chunk, parts.far, bytes, bytes, far) } else { parts.far.is_empty() }
        })
    }

    /// Decodes a group of blocks. `bytes`: the chunks, with the padding behind them. Whether there are far symbols; `None` if a
    /// block is corrupt.
    fn group(&self, lanes: &mut Lanes, bytes: &[u8], out: &mut [u8]) -> Option<bool> {
        let registers = lanes.count.div_ceil(LANES);
        for lane in lanes.count..registers * LANES {
            (lanes.start[lane], lanes.end[lane], lanes.out[lane]) = (lanes.start[0], lanes.end[0], lanes.out[0]);
        }
        let used = ..registers * LANES;
        assert!(lanes.out[used].iter().all(|at| at + lanes.tiles * TILE_SYMBOLS <= out.len()));
        let inside = |(start, end): (&u32, &u32)| start + STATE_BYTES <= *end && *end as usize + PADDING_BYTES <= bytes.len();
        assert!(lanes.start[used].iter().zip(&lanes.end[used]).all(inside));
        macro_rules! by_registers {
            ($p:literal) => {
                match registers {
                    1 => group::<$p, 1>(self, lanes, bytes, out),
                    _ => group::<$p, REGISTERS_MAX>(self, lanes, bytes, out),
                }
            };
        }
        // SAFETY: the token proves the features that the function enables; the bounds are checked above.
        unsafe {
            match self.params.prob_bits {
                6 => by_registers!(6),
                7 => by_registers!(7),
                _ => by_registers!(8),
            }
        }
    }
}

/// The table in registers.
struct Registers<const P: u32> {
    freq: [__m512i; 4],
    offset: [__m512i; 4],
    symbol: [__m512i; 4],
}

/// 64 states and the next words of each.
#[derive(Clone, Copy)]
struct States {
    low: __m512i,
    high: __m512i,
    /// (8, 64): the word that comes next, the one after it, and so on.
    words: [__m512i; STEPS],
    /// Words that were taken since they were read.
    taken: __m512i,
}

/// # Safety
/// Only for the target features; the places of `64 * N` lanes are inside their slices, and `bytes` has [`PADDING_BYTES`] behind them.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx2,popcnt,bmi2")]
unsafe fn group<const P: u32, const N: usize>(tables: &Tables, lanes: &Lanes, bytes: &[u8], out: &mut [u8]) -> Option<bool> {
    // SAFETY: loads are of whole arrays; gathers begin before the padding; stores are inside `out` by the contract.
    unsafe {
        let load = |table: &[u8; SLOTS_MAX]| std::array::from_fn(|i| _mm512_loadu_si512(table[64 * i..].as_ptr().cast()));
        let table = Registers::<P> { freq: load(&tables.freq), offset: load(&tables.offset), symbol: load(&tables.symbol) };
        let zero = _mm512_setzero_si512();
        let mut states = [States { low: zero, high: zero, words: [zero; STEPS], taken: zero }; N];
        let (mut place, mut escapes) = (lanes.start, lanes.end);
        for (i, states) in states.iter_mut().enumerate() {
            let words = gather(bytes, &place[i * LANES..]);
            (states.low, states.high) = (words[0], words[1]);
            states.taken = _mm512_set1_epi8(STATE_BYTES as i8);
        }
        let mut symbols = [[[zero; STEPS]; TILE_SYMBOLS / STEPS]; N];
        let mut far = 0;
        for tile in 0..lanes.tiles {
            for part in 0..TILE_SYMBOLS / STEPS {
                for (i, states) in states.iter_mut().enumerate() {
                    let place = &mut place[i * LANES..][..LANES];
                    advance(place, states.taken);
                    states.taken = zero;
                    states.words = gather(bytes, place);
                }
                // All registers' steps side by side: one alone would wait for itself.
                macro_rules! step {
                    ($($step:literal)*) => {
                        $(for i in 0..N {
                            symbols[i][part][$step] = table.step::<{ STEPS - 1 - $step }>(&mut states[i]);
                        })*
                    };
                }
                step!(0 1 2 3 4 5 6 7);
                for symbols in &mut symbols {
                    let symbols = &mut symbols[part];
                    *symbols = transpose(symbols);
                    for eight in symbols {
                        *eight = transpose_bytes(*eight);
                    }
                }
            }
            for (i, symbols) in symbols.iter().enumerate() {
                // Of each eight lanes in turn: their 8 x 8 quadwords become eight registers, one a lane.
                for eight in 0..LANES / 8 {
                    let [a, b, c, d, e, f, g, h] = symbols;
                    let own = transpose(&[a[eight], b[eight], c[eight], d[eight], e[eight], f[eight], g[eight], h[eight]]);
                    for (j, own) in own.into_iter().enumerate() {
                        let lane = i * LANES + 8 * eight + j;
                        let (own, zeros) = unescape(own, bytes, &mut escapes[lane]);
                        far |= zeros;
                        _mm512_storeu_si512(out.as_mut_ptr().add(lanes.out[lane] + tile * TILE_SYMBOLS).cast(), own);
                    }
                }
            }
        }
        let mut wrong = zero;
        for (i, states) in states.iter().enumerate() {
            advance(&mut place[i * LANES..][..LANES], states.taken);
            let high = _mm512_xor_si512(states.high, _mm512_set1_epi8(1));
            wrong = _mm512_or_si512(wrong, _mm512_or_si512(states.low, high));
        }
        let valid = _mm512_test_epi8_mask(wrong, wrong) == 0 && place[..N * LANES] == escapes[..N * LANES];
        valid.then_some(far != 0)
    }
}

impl<const P: u32> Registers<P> {
    /// One symbol of every lane, escapes 0; and the words moved up as far as the `LEFT` steps after it may need them.
    #[inline(always)]
    unsafe fn step<const LEFT: usize>(&self, states: &mut States) -> __m512i {
        // SAFETY: registers only.
        unsafe {
            let (low, high) = (states.low, states.high);
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
            let y_low = _mm512_ternarylogic_epi32::<0xca>(even, y_even, _mm512_slli_epi16::<8>(y_odd));
            let y_high = _mm512_ternarylogic_epi32::<0xca>(even, _mm512_srli_epi16::<8>(y_even), y_odd);
            // Below STATE_MIN = 256: the state moves up by a byte and takes a word.
            let hungry = _mm512_testn_epi8_mask(y_high, y_high);
            states.high = _mm512_mask_mov_epi8(y_high, hungry, y_low);
            states.low = _mm512_mask_mov_epi8(y_low, hungry, states.words[0]);
            states.taken = _mm512_mask_sub_epi8(states.taken, hungry, states.taken, _mm512_set1_epi8(-1));
            macro_rules! move_up {
                ($($word:literal)*) => {
                    $(if $word < LEFT {
                        states.words[$word] = _mm512_mask_mov_epi8(states.words[$word], hungry, states.words[$word + 1]);
                    })*
                };
            }
            move_up!(0 1 2 3 4 5 6);
            symbol
        }
    }
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

/// The next eight bytes of every lane as eight planes, the next one first. `place`: (64).
#[inline(always)]
unsafe fn gather(bytes: &[u8], place: &[u32]) -> [__m512i; STEPS] {
    // SAFETY: places beyond the chunks, of a corrupt one, are moved to the padding's start.
    unsafe {
        let place = &place[..LANES];
        let limit = _mm256_set1_epi32((bytes.len() - PADDING_BYTES) as i32);
        let mut eights = [_mm512_setzero_si512(); STEPS];
        for (i, eight) in eights.iter_mut().enumerate() {
            let place = _mm256_min_epu32(_mm256_loadu_si256(place.as_ptr().add(8 * i).cast()), limit);
            *eight = transpose_bytes(_mm512_i32gather_epi64::<1>(place, bytes.as_ptr().cast()));
        }
        transpose(&eights)
    }
}

/// Adds a byte to each of 64 places.
#[inline(always)]
unsafe fn advance(place: &mut [u32], by: __m512i) {
    // SAFETY: whole arrays.
    unsafe {
        let mut taken = [0u8; LANES];
        _mm512_storeu_si512(taken.as_mut_ptr().cast(), by);
        for (place, taken) in place.chunks_exact_mut(16).zip(taken.chunks_exact(16)) {
            let taken = _mm512_cvtepu8_epi32(_mm_loadu_si128(taken.as_ptr().cast()));
            let sum = _mm512_add_epi32(_mm512_loadu_si512(place.as_ptr().cast()), taken);
            _mm512_storeu_si512(place.as_mut_ptr().cast(), sum);
        }
    }
}

/// Fills the zeros of a tile of one lane with the bytes before `end`, backward, and moves `end` before them. Returns the tile, and the
/// zeros that are left: far symbols.
#[inline(always)]
unsafe fn unescape(tile: __m512i, bytes: &[u8], end: &mut u32) -> (__m512i, u64) {
    // SAFETY: the load begins before the padding.
    unsafe {
        let escaped = _mm512_testn_epi8_mask(tile, tile);
        // One tile in ten, so that a branch mispredicted now and then is cheaper than a second expand.
        if escaped == 0 {
            return (tile, 0);
        }
        // A corrupt block's place may have wrapped around.
        let from = (*end as usize).min(bytes.len() - PADDING_BYTES).saturating_sub(LANES);
        let last = _mm512_set1_epi8((*end as usize).wrapping_sub(from).wrapping_sub(1) as i8);
        let backward = _mm512_sub_epi8(last, _mm512_loadu_si512(IOTA.as_ptr().cast()));
        let next = _mm512_permutexvar_epi8(backward, _mm512_loadu_si512(bytes.as_ptr().add(from).cast()));
        *end = end.wrapping_sub(escaped.count_ones());
        let tile = _mm512_mask_expand_epi8(tile, escaped, next);
        (tile, _mm512_testn_epi8_mask(tile, tile))
    }
}

static IOTA: [u8; 64] = {
    let mut table = [0; 64];
    let mut i = 0;
    while i < 64 {
        table[i] = i as u8;
        i += 1;
    }
    table
};

/// Where each byte of a matrix of 8 x 8 comes from when it is transposed.
static TRANSPOSED: [u8; 64] = {
    let mut table = [0; 64];
    let mut i = 0;
    while i < 64 {
        table[i] = (i % 8 * 8 + i / 8) as u8;
        i += 1;
    }
    table
};

/// A register as a matrix of 8 x 8 bytes, transposed.
#[inline(always)]
unsafe fn transpose_bytes(x: __m512i) -> __m512i {
    // SAFETY: 64 readable bytes.
    unsafe { _mm512_permutexvar_epi8(_mm512_loadu_si512(TRANSPOSED.as_ptr().cast()), x) }
}

/// Eight registers as a matrix of 8 x 8 quadwords, transposed.
#[inline(always)]
unsafe fn transpose(x: &[__m512i; 8]) -> [__m512i; 8] {
    // SAFETY: registers only. Pairs of rows, then of pairs, then of fours change places; 0x88 and 0xdd take the even and the odd
    // quarters of two registers.
    unsafe {
        let pairs = [
            _mm512_unpacklo_epi64(x[0], x[1]),
            _mm512_unpackhi_epi64(x[0], x[1]),
            _mm512_unpacklo_epi64(x[2], x[3]),
            _mm512_unpackhi_epi64(x[2], x[3]),
            _mm512_unpacklo_epi64(x[4], x[5]),
            _mm512_unpackhi_epi64(x[4], x[5]),
            _mm512_unpacklo_epi64(x[6], x[7]),
            _mm512_unpackhi_epi64(x[6], x[7]),
        ];
        // Macros, since a closure has not the features of the function around it.
        macro_rules! even {
            ($a:expr, $b:expr) => {
                _mm512_shuffle_i64x2::<0x88>($a, $b)
            };
        }
        macro_rules! odd {
            ($a:expr, $b:expr) => {
                _mm512_shuffle_i64x2::<0xdd>($a, $b)
            };
        }
        let fours = [
            even!(pairs[0], pairs[2]),
            even!(pairs[1], pairs[3]),
            odd!(pairs[0], pairs[2]),
            odd!(pairs[1], pairs[3]),
            even!(pairs[4], pairs[6]),
            even!(pairs[5], pairs[7]),
            odd!(pairs[4], pairs[6]),
            odd!(pairs[5], pairs[7]),
        ];
        [
            even!(fours[0], fours[4]),
            even!(fours[1], fours[5]),
            even!(fours[2], fours[6]),
            even!(fours[3], fours[7]),
            odd!(fours[0], fours[4]),
            odd!(fours[1], fours[5]),
            odd!(fours[2], fours[6]),
            odd!(fours[3], fours[7]),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposing_by_the_definition() {
        if !is_x86_feature_detected!("avx512vbmi") {
            eprintln!("skipped: AVX-512 VBMI is not available on this machine");
            return;
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
        unsafe fn run(x: &[[u64; 8]; 8], bytes: &[u8; 64]) -> ([[u64; 8]; 8], [u8; 64]) {
            let (mut out, mut out_bytes) = ([[0; 8]; 8], [0; 64]);
            // SAFETY: whole arrays.
            unsafe {
                let mut rows = [_mm512_setzero_si512(); 8];
                for (row, x) in rows.iter_mut().zip(x) {
                    *row = _mm512_loadu_si512(x.as_ptr().cast());
                }
                for (row, out) in transpose(&rows).into_iter().zip(&mut out) {
                    _mm512_storeu_si512(out.as_mut_ptr().cast(), row);
                }
                _mm512_storeu_si512(out_bytes.as_mut_ptr().cast(), transpose_bytes(_mm512_loadu_si512(bytes.as_ptr().cast())));
            }
            (out, out_bytes)
        }
        let x: [[u64; 8]; 8] = std::array::from_fn(|i| std::array::from_fn(|j| (8 * i + j) as u64));
        let bytes = std::array::from_fn(|i| i as u8);
        // SAFETY: detected above.
        let (out, out_bytes) = unsafe { run(&x, &bytes) };
        for i in 0..8 {
            for j in 0..8 {
                assert_eq!(out[i][j], x[j][i]);
                assert_eq!(out_bytes[8 * i + j], bytes[8 * j + i]);
            }
        }
    }
}
