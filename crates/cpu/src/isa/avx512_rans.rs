//! `rans` with 16-bit states, 8-bit words, 6 to 8 bits of probability and 64 lanes, for AVX-512.
//!
//! Computes: symbol bytes of up to four chunks, either stored ([`decode`]) or multiplied with one
//! token's activations at once ([`dot`]).
//!
//! Layout: a chunk's 64 states are two registers, one of low and one of high bytes, so that one
//! step yields the 64 symbols of a tile in tile order. The tables (frequency, offset in the entry,
//! symbol byte) of 64, 128 or 256 slots are one, two or four registers each and are looked up with
//! byte permutes. A step multiplies as 16-bit words (even and odd lanes apart), and lanes that fell
//! below STATE_MIN take the stream's next bytes in lane order with one byte expand; escapes are
//! filled in by a second one.
//!
//! Needs: VBMI for the permutes, VBMI2 for the expands, VNNI for the dot. Frequencies below 256,
//! far symbols only in [`decode`], 64 readable bytes behind each chunk.
//!
//! Cost: about 30 instructions for 64 symbols, but one step of a stream waits some 40 cycles for
//! the one before. Four streams side by side hide that.
//!
//! Reads are optimistic: pointers run on, loads are clamped to the end of their stream, and only at
//! the end of the chunk are the pointers compared with where they must be and the states with
//! STATE_MIN. What is stored or summed before is nonsense if that fails, and then it is thrown
//! away.
//!
//! Measured (AMD EPYC, Zen 5, one of two shared cores, `cargo run --release -p tersor-cpu --example
//! gemv`): 25.5 to 27 G weights/s fused with the dot with 64 and 128 slots, 19 with 256, at every
//! entropy from 1.5 to 3.8 bits; in bulk 25 to 27, with 256 slots 23; from memory 20 to 22 (before
//! the software prefetch 9 to 17). With two or three streams it loses a third or more, so matrices
//! of fewer chunks than threads times four do not reach these figures.

use std::arch::x86_64::*;
use std::ops::Range;

use tersor_codec::{PADDING_BYTES, Table, rans};
use tersor_format::CodedTensor;

use crate::scales::TileScales;
use crate::source::{CHUNKS_TOGETHER, FarAt, count_zeros, take_far, with_padding};
use crate::{Activations, Avx512, KernelScales, TILE_COLS, TILE_ROWS, TILE_SYMBOLS};

const LANES: usize = 64;
const SLOTS_MAX: usize = 256;

/// How far ahead of the words the memory is told what comes: some 50 steps. The processor's own
/// prefetcher stops at the end of a page, and here the next state waits for the bytes.
const PREFETCH_BYTES: usize = 1024;

/// The slots as bytes, ready to be loaded into registers; those beyond `2^prob_bits` are 0 and
/// never looked up.
struct Tables {
    prob_bits: u8,
    freq: [u8; SLOTS_MAX],
    offset: [u8; SLOTS_MAX],
    symbol: [u8; SLOTS_MAX],
}

impl Tables {
    /// `None` if this kernel was not made for the table.
    fn new(table: &Table) -> Option<Tables> {
        let Table::Rans(table) = table else {
            return None;
        };
        let rans::Params { state_bits: 16, word_bits: 8, prob_bits: prob_bits @ 6..=8, lanes: 64 } = table.params() else {
            return None;
        };
        let slots = table.slots();
        let mut tables = Tables { prob_bits, freq: [0; SLOTS_MAX], offset: [0; SLOTS_MAX], symbol: [0; SLOTS_MAX] };
        for (slot, (freq, offset)) in slots.freq.iter().zip(slots.offset).enumerate() {
            // A lone entry of 8 bits has the frequency 256.
            tables.freq[slot] = u8::try_from(*freq).ok()?;
            tables.offset[slot] = u8::try_from(*offset).ok()?;
        }
        tables.symbol[..slots.symbol_byte.len()].copy_from_slice(slots.symbol_byte);
        Some(tables)
    }
}

/// One chunk's parts, as pointers into the chunk with its padding.
struct Stream<'a> {
    states: &'a [u8; 2 * LANES],
    /// The words, and as for the escapes the 64 bytes behind them, are readable for `'a`.
    words: Range<*const u8>,
    escapes: Range<*const u8>,
    chunk: rans::Chunk<'a>,
}

impl<'a> Stream<'a> {
    /// `None` if the chunk is corrupt.
    fn new(params: rans::Params, tensor: &'a CodedTensor, chunk: usize) -> Option<Stream<'a>> {
        let padded = tensor.chunk_with_padding(chunk);
        let bytes = &padded[..padded.len() - PADDING_BYTES];
        let parts = rans::Chunk::parse(params, tensor.chunk_symbols(chunk), bytes).ok()?;
        // Pointers that reach beyond the part come from a slice that does.
        let range = |part: &[u8]| {
            let wide = with_padding(padded, part);
            wide.as_ptr()..wide[part.len()..].as_ptr()
        };
        Some(Stream { states: parts.states.try_into().ok()?, words: range(parts.words), escapes: range(parts.escapes), chunk: parts })
    }
}

/// `N` streams in flight.
struct Streams<const P: u32, const N: usize> {
    freq: [__m512i; 4],
    offset: [__m512i; 4],
    symbol: [__m512i; 4],
    low: [__m512i; N],
    high: [__m512i; N],
    word: [*const u8; N],
    words_end: [*const u8; N],
    escape: [*const u8; N],
    escapes_end: [*const u8; N],
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
    #[inline(always)]
    unsafe fn new(tables: &Tables, streams: &[Stream<'_>; N]) -> Streams<P, N> {
        // SAFETY: all loads are of whole arrays.
        unsafe {
            let load = |table: &[u8; SLOTS_MAX]| std::array::from_fn(|i| _mm512_loadu_si512(table[64 * i..].as_ptr().cast()));
            Streams {
                freq: load(&tables.freq),
                offset: load(&tables.offset),
                symbol: load(&tables.symbol),
                low: std::array::from_fn(|i| _mm512_loadu_si512(streams[i].states.as_ptr().cast())),
                high: std::array::from_fn(|i| _mm512_loadu_si512(streams[i].states[LANES..].as_ptr().cast())),
                word: std::array::from_fn(|i| streams[i].words.start),
                words_end: std::array::from_fn(|i| streams[i].words.end),
                escape: std::array::from_fn(|i| streams[i].escapes.start),
                escapes_end: std::array::from_fn(|i| streams[i].escapes.end),
            }
        }
    }

    /// The next 64 symbol bytes of stream `i`.
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
            let y_low = _mm512_ternarylogic_epi32::<0xca>(even, y_even, _mm512_slli_epi16::<8>(y_odd));
            let y_high = _mm512_ternarylogic_epi32::<0xca>(even, _mm512_srli_epi16::<8>(y_even), y_odd);
            // Below STATE_MIN = 256: the state moves up by a byte and takes a word.
            let hungry = _mm512_testn_epi8_mask(y_high, y_high);
            let words = _mm512_loadu_si512(self.word[i].min(self.words_end[i]).cast());
            self.high[i] = _mm512_mask_mov_epi8(y_high, hungry, y_low);
            self.low[i] = _mm512_mask_expand_epi8(y_low, hungry, words);
            self.word[i] = self.word[i].wrapping_add(hungry.count_ones() as usize);
            _mm_prefetch::<_MM_HINT_T0>(self.word[i].wrapping_add(PREFETCH_BYTES).cast());
            let escaped = _mm512_testn_epi8_mask(symbol, symbol);
            let escapes = _mm512_loadu_si512(self.escape[i].min(self.escapes_end[i]).cast());
            self.escape[i] = self.escape[i].wrapping_add(escaped.count_ones() as usize);
            _mm512_mask_expand_epi8(symbol, escaped, escapes)
        }
    }

    /// Whether all streams ended as their encoder began.
    #[inline(always)]
    unsafe fn valid(&self) -> bool {
        // SAFETY: registers only.
        (0..N).all(|i| unsafe {
            self.word[i] == self.words_end[i]
                && self.escape[i] == self.escapes_end[i]
                && _mm512_test_epi8_mask(self.low[i], self.low[i]) == 0
                && _mm512_cmpneq_epi8_mask(self.high[i], _mm512_set1_epi8(1)) == 0
        })
    }
}

/// Chunks in groups that decode side by side: equal sizes, so all but a shorter last one.
fn groups(tensor: &CodedTensor, chunks: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    debug_assert!(chunks.len() <= CHUNKS_TOGETHER);
    let equal = match chunks.clone().next_back() {
        Some(last) if tensor.chunk_symbols(last) != tensor.chunk_symbols(chunks.start) => last,
        _ => chunks.end,
    };
    [chunks.start..equal, equal..chunks.end].into_iter().filter(|g| !g.is_empty())
}

/// The streams of `N` chunks from `first` on.
fn streams<const N: usize>(params: rans::Params, tensor: &CodedTensor, first: usize) -> Option<[Stream<'_>; N]> {
    let mut streams = [const { None }; N];
    for (i, stream) in streams.iter_mut().enumerate() {
        *stream = Some(Stream::new(params, tensor, first + i)?);
    }
    Some(streams.map(|s| s.expect("filled above")))
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

/// Decodes at most [`CHUNKS_TOGETHER`] chunks to symbol bytes, one behind the other, and adds their
/// far symbols to `far`.
///
/// False if the kernel was not made for the table, or a chunk is corrupt: `out` and `far` are then
/// of no use.
pub(crate) fn decode(_token: Avx512, tensor: &CodedTensor, chunks: Range<usize>, out: &mut [u8], far: &mut Vec<FarAt>) -> bool {
    let (Some(tables), Table::Rans(table)) = (Tables::new(tensor.table()), tensor.table()) else {
        return false;
    };
    let params = table.params();
    let mut rest = out;
    for group in groups(tensor, chunks) {
        let (out, after) = rest.split_at_mut(group.len() * tensor.chunk_symbols(group.start));
        rest = after;
        // SAFETY: the token proves the features that the function enables.
        if !unsafe { by_shape!(tables.prob_bits, group.len(), decode_group(&tables, params, tensor, group.start, out, far)) } {
            return false;
        }
    }
    true
}

/// # Safety
/// Only for the target features.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,popcnt,bmi2")]
unsafe fn decode_group<const P: u32, const N: usize>(
    tables: &Tables,
    params: rans::Params,
    tensor: &CodedTensor,
    first: usize,
    out: &mut [u8],
    far: &mut Vec<FarAt>,
) -> bool {
    let Some(streams) = streams::<N>(params, tensor, first) else {
        return false;
    };
    let symbols = tensor.chunk_symbols(first);
    let steps = symbols / TILE_SYMBOLS;
    assert_eq!(out.len(), N * steps * TILE_SYMBOLS);
    // SAFETY: the features are enabled, and each store is to a whole tile of `out`.
    let valid = unsafe {
        let mut s = Streams::<P, N>::new(tables, &streams);
        for step in 0..steps {
            for i in 0..N {
                let tile = s.next(i);
                _mm512_storeu_si512(out.as_mut_ptr().add((i * steps + step) * TILE_SYMBOLS).cast(), tile);
            }
        }
        s.valid()
    };
    if !valid {
        return false;
    }
    let parts = streams.iter().map(|s| &s.chunk);
    (first..)
        .zip(parts.zip(out.chunks_exact(symbols)))
        .all(|(chunk, (parts, bytes))| take_far(tensor, chunk, parts.far, parts.escapes, bytes, far))
}

/// Multiplies at most [`CHUNKS_TOGETHER`] chunks with the only token of `x`. `sums`: (row tiles of
/// the chunks, 16).
///
/// False if the kernel was not made for the table or for far symbols, or a chunk is corrupt: `sums`
/// are then of no use.
pub(crate) fn dot(
    _token: Avx512,
    tensor: &CodedTensor,
    chunks: Range<usize>,
    scales: &KernelScales,
    x: &Activations,
    sums: &mut [[f32; TILE_ROWS]],
) -> bool {
    let (Some(tables), Table::Rans(table)) = (Tables::new(tensor.table()), tensor.table()) else {
        return false;
    };
    let params = table.params();
    let mut rest = sums;
    for group in groups(tensor, chunks) {
        let (sums, after) = rest.split_at_mut(group.len() * tensor.chunk_row_tiles(group.start).len());
        rest = after;
        // SAFETY: the token proves the features that the function enables.
        if !unsafe { by_shape!(tables.prob_bits, group.len(), dot_group(&tables, params, tensor, group.start, scales, x, sums)) } {
            return false;
        }
    }
    true
}

/// # Safety
/// Only for the target features.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,f16c,popcnt,bmi2")]
unsafe fn dot_group<const P: u32, const N: usize>(
    tables: &Tables,
    params: rans::Params,
    tensor: &CodedTensor,
    first: usize,
    scales: &KernelScales,
    x: &Activations,
    sums: &mut [[f32; TILE_ROWS]],
) -> bool {
    let Some(streams) = streams::<N>(params, tensor, first) else {
        return false;
    };
    if streams.iter().any(|s| !s.chunk.far.is_empty() || count_zeros(s.chunk.escapes) > 0) {
        return false;
    }
    let row_tiles = tensor.chunk_row_tiles(first);
    let q: &[[i8; TILE_COLS]] = x.q(0).as_chunks().0;
    assert_eq!(q.len(), tensor.col_steps());
    assert_eq!(sums.len(), N * row_tiles.len());
    let (xscales, xsums) = (x.scales(0), x.sums(0));
    // SAFETY: the features are enabled.
    unsafe {
        let mut s = Streams::<P, N>::new(tables, &streams);
        for tile in 0..row_tiles.len() {
            let tile_scales: [TileScales<'_>; N] = std::array::from_fn(|i| scales.tile(row_tiles.start + i * row_tiles.len() + tile));
            let mut acc = [_mm512_setzero_ps(); N];
            for (segment, q) in q.chunks(x.segment() / TILE_COLS).enumerate() {
                let mut dots = [_mm512_setzero_si512(); N];
                for q in q {
                    let q = _mm512_set1_epi32(i32::from_le_bytes(q.map(|q| q as u8)));
                    for (i, dot) in dots.iter_mut().enumerate() {
                        let tile = s.next(i);
                        *dot = _mm512_dpbusd_epi32(*dot, tile, q);
                    }
                }
                let bias = _mm512_set1_epi32(128 * xsums[segment]);
                for i in 0..N {
                    let isum = _mm512_cvtepi32_ps(_mm512_sub_epi32(dots[i], bias));
                    acc[i] = add_segment(acc[i], isum, tile_scales[i], segment, xscales[segment], xsums[segment]);
                }
            }
            for i in 0..N {
                let mut y = acc[i];
                if let TileScales::Row(row) = tile_scales[i] {
                    y = _mm512_mul_ps(y, _mm512_loadu_ps(row.as_ptr()));
                }
                _mm512_storeu_ps(sums[i * row_tiles.len() + tile].as_mut_ptr(), y);
            }
        }
        s.valid()
    }
}

/// `SegmentScales::add` in one register.
#[inline(always)]
unsafe fn add_segment(acc: __m512, isum: __m512, scales: TileScales<'_>, segment: usize, xscale: f32, xsum: i32) -> __m512 {
    // SAFETY: the loads are of whole arrays.
    unsafe {
        let factor = _mm512_set1_ps(xscale);
        match scales {
            TileScales::Row(_) => _mm512_add_ps(acc, _mm512_mul_ps(isum, factor)),
            TileScales::Group { scales, biases, brain } => {
                let widen = |bits: &[u16; TILE_ROWS]| {
                    let bits = _mm256_loadu_si256(bits.as_ptr().cast());
                    if brain { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits))) } else { _mm512_cvtph_ps(bits) }
                };
                let scale = widen(&scales[segment]);
                let acc = _mm512_add_ps(acc, _mm512_mul_ps(_mm512_mul_ps(isum, scale), factor));
                let Some(biases) = biases else { return acc };
                let bias = _mm512_add_ps(widen(&biases[segment]), _mm512_mul_ps(_mm512_set1_ps(8.0), scale));
                let shift = _mm512_set1_ps(xsum as f32 * xscale);
                _mm512_add_ps(acc, _mm512_mul_ps(bias, shift))
            }
        }
    }
}
