//! One tile of the `quad` layout, encoded.

use super::book::Book;
use super::fragment::{DEVICE_FLIP, Fragment, SUPERSTEP_QUADS, ZERO_QUAD, lane_quad, stream_quads};
use super::ring::{self, Overrun};
use super::{CODE_BITS_MAX, GROUP_WORDS, LANES, QuadParams, STREAM_WORDS_MIN, STREAMS, SUPERSTEP_COLS};

/// Most words by which a stream may be longer than the whole rows of its tile: lengths are nibbles.
const EXTRA_WORDS_MAX: usize = 15;
/// Tiles take whole units of 8 words, 32 bytes.
pub(super) const UNIT_WORDS: usize = 8;

/// An encoded tile.
#[derive(Debug)]
pub(super) struct Tile {
    /// Words of all streams, row by row: whole rows of 64, then of each row the words that exist; padded to 32 bytes.
    pub words: Vec<u32>,
    /// Rows that all streams have, a multiple of 4.
    pub whole_rows: usize,
    /// (64,) nibbles: words of each stream beyond the whole rows.
    pub lens: [u64; 4],
    /// Two bits for each superstep, see [`ring`].
    pub schedule: u64,
    /// Quads without a code: nibbles | lane quad << 16 | lane << 25.
    pub patches: Vec<u32>,
    /// Raw low bits.
    pub planes: Vec<u8>,
    /// Far symbols.
    pub far: Vec<[i32; 2]>,
}

/// Encodes tile after tile; holds what they share and the memory to work in.
pub(super) struct TileEncoder<'a> {
    book: &'a Book,
    params: QuadParams,
    tile_cols: usize,
    fragment: Fragment,
    /// (64, stream_words)
    words: Vec<u32>,
    stream_words: usize,
    /// (64,) words of each stream
    lens: [u16; STREAMS],
    /// (supersteps + 1,) rows that each stream has loaded
    loaded: Vec<[u16; STREAMS]>,
}

impl<'a> TileEncoder<'a> {
    pub(super) fn new(book: &'a Book, params: QuadParams, tile_cols: usize) -> Self {
        let bits_max = stream_quads(tile_cols) * CODE_BITS_MAX as usize + params.junk_bits() as usize;
        let stream_words = bits_max.div_ceil(32) + 1;
        Self {
            book,
            params,
            tile_cols,
            fragment: Fragment::default(),
            words: vec![0; STREAMS * stream_words],
            stream_words,
            lens: [0; STREAMS],
            loaded: vec![[ring::rows_loaded(0); STREAMS]; tile_cols / SUPERSTEP_COLS + 1],
        }
    }

    /// Encodes the columns `first_col ..` of `rows`, (16, `row_len`). `None` if the streams drift too far apart for the ring, whatever is patched;
    /// never so with a uniform book.
    pub(super) fn encode(&mut self, rows: &[i16], row_len: usize, first_col: usize) -> Option<Tile> {
        self.fragment.split(rows, row_len, first_col, self.tile_cols, self.params.low_bits);
        let mut patches = Vec::new();
        for stream in 0..STREAMS {
            self.patch_uncoded(stream, &mut patches);
            self.write_stream(stream);
        }
        let schedule = loop {
            match ring::schedule(&self.loaded, &self.lens) {
                Ok(schedule) => break schedule,
                Err(overrun) => self.hold_back(overrun, &mut patches)?,
            }
        };
        let (words, whole_rows, lens) = self.interleave();
        let (planes, far) = (self.fragment.planes.clone(), std::mem::take(&mut self.fragment.far));
        Some(Tile { words, whole_rows, lens, schedule, patches, planes, far })
    }

    /// Range of a stream's quads in the fragment.
    fn quads_of(&self, stream: usize) -> std::ops::Range<usize> {
        let quads = stream_quads(self.tile_cols);
        stream * quads..(stream + 1) * quads
    }

    /// Puts the quad of zeros in the place of all quads without a code.
    fn patch_uncoded(&mut self, stream: usize, patches: &mut Vec<u32>) {
        let range = self.quads_of(stream);
        for (z, quad) in self.fragment.quads[range].iter_mut().enumerate() {
            if self.book.code(*quad).1 == 0 {
                patches.push(patch(stream, z, std::mem::replace(quad, ZERO_QUAD)));
            }
        }
    }

    /// Writes the codes of a stream behind its junk bits.
    fn write_stream(&mut self, stream: usize) {
        let range = self.quads_of(stream);
        let junk_bits = self.params.junk_bits();
        let words = &mut self.words[stream * self.stream_words..][..self.stream_words];
        let (mut buffer, mut filled, mut at) = (0u64, junk_bits, 0);
        for (quads, loaded) in self.fragment.quads[range].chunks_exact(SUPERSTEP_QUADS).zip(&mut self.loaded[1..]) {
            for &quad in quads {
                let (code, length) = self.book.code(quad);
                buffer |= u64::from(code) << filled;
                filled += length;
                if filled >= 32 {
                    words[at] = buffer as u32;
                    at += 1;
                    buffer >>= 32;
                    filled -= 32;
                }
            }
            loaded[stream] = ring::rows_loaded(at * 32 + filled as usize - junk_bits as usize);
        }
        if filled > 0 {
            words[at] = buffer as u32;
            at += 1;
        }
        self.lens[stream] = at as u16;
    }

    /// Shortens the streams that run beyond the rows that can be there: their latest long codes become patches. `None` if that does not
    /// help.
    fn hold_back(&mut self, overrun: Overrun, patches: &mut Vec<u32>) -> Option<()> {
        let zero_bits = self.book.code(ZERO_QUAD).1;
        let before = (overrun.superstep + 1) * SUPERSTEP_QUADS;
        for stream in 0..STREAMS {
            let reach = self.loaded[overrun.superstep + 1][stream].min(self.lens[stream]);
            if usize::from(reach) <= overrun.rows {
                continue;
            }
            let range = self.quads_of(stream);
            let quads = &mut self.fragment.quads[range];
            let mut bits: usize = quads[..before].iter().map(|&quad| self.book.code(quad).1 as usize).sum();
            // the long codes first: each patch costs 32 bits, however much it saves
            for gain_min in [(CODE_BITS_MAX - zero_bits).div_ceil(2).max(1), 1] {
                for z in (0..before).rev() {
                    let gain = self.book.code(quads[z]).1.saturating_sub(zero_bits);
                    if usize::from(ring::rows_loaded(bits)) > overrun.rows && gain >= gain_min {
                        patches.push(patch(stream, z, std::mem::replace(&mut quads[z], ZERO_QUAD)));
                        bits -= gain as usize;
                    }
                }
            }
            if usize::from(ring::rows_loaded(bits)) > overrun.rows {
                return None;
            }
            self.write_stream(stream);
        }
        Some(())
    }

    /// The words of all streams row by row, the number of whole rows, and the lengths beyond those.
    fn interleave(&self) -> (Vec<u32>, usize, [u64; 4]) {
        let lens = self.lens.map(usize::from);
        let (shortest, longest) = lens.iter().fold((usize::MAX, 0), |(min, max), &len| (min.min(len), max.max(len)));
        let spread_min = longest.saturating_sub(EXTRA_WORDS_MAX).next_multiple_of(GROUP_WORDS);
        let whole_rows = (shortest / GROUP_WORDS * GROUP_WORDS).max(spread_min).max(STREAM_WORDS_MIN);
        let mut extra = [0u64; 4];
        for (stream, len) in lens.iter().enumerate() {
            extra[stream / 16] |= (len.saturating_sub(whole_rows) as u64) << (stream % 16 * 4);
        }
        let total = lens.iter().map(|&len| len.max(whole_rows)).sum::<usize>();
        let mut words = Vec::with_capacity(total.next_multiple_of(UNIT_WORDS));
        for row in 0..longest.max(whole_rows) {
            for (stream, &len) in lens.iter().enumerate() {
                if row < len {
                    words.push(self.words[stream * self.stream_words + row]);
                } else if row < whole_rows {
                    words.push(0);
                }
            }
        }
        words.resize(total.next_multiple_of(UNIT_WORDS), 0);
        (words, whole_rows, extra)
    }
}

/// The patch of the `z`-th quad of `stream`.
fn patch(stream: usize, z: usize, quad: u16) -> u32 {
    u32::from(quad ^ DEVICE_FLIP) | (lane_quad(stream, z) as u32) << 16 | ((stream % LANES) as u32) << 25
}

/// Inverse of [`patch`]: index of the quad among those of its tile, (64, quads of a stream), and the quad. `None` if it lies outside.
pub(super) fn patched(patch: u32, tile_cols: usize) -> Option<(usize, u16)> {
    let (lane, quad) = ((patch >> 25) as usize, (patch >> 16 & 511) as usize);
    let (stream, z) = (lane + quad / 2 % 2 * LANES, quad / 4 * 2 + quad % 2);
    (lane < LANES && z < stream_quads(tile_cols)).then(|| (stream * stream_quads(tile_cols) + z, patch as u16 ^ DEVICE_FLIP))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{Geometry, Stack, Statistics};

    /// FNV-1a of all arrays of a tile, in the order in which the lab's dump has them.
    fn fingerprint(tile: &Tile) -> u64 {
        let mut bytes = ((tile.whole_rows | tile.patches.len() << 16) as u32).to_le_bytes().to_vec();
        bytes.extend(tile.lens.iter().chain([&tile.schedule]).flat_map(|value| value.to_le_bytes()));
        for words in [&tile.words, &tile.patches] {
            bytes.extend((words.len() as u32).to_le_bytes());
            bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        }
        bytes.extend(&tile.planes);
        bytes.extend((tile.far.len() as u32).to_le_bytes());
        bytes.extend(tile.far.as_flattened().iter().flat_map(|value| value.to_le_bytes()));
        bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
    }

    /// The expected values were made by `encode_tile` of bench/cuda/lab/quadlut.cu, compiled for the CPU, from the same symbols and codes.
    #[test]
    fn tiles_are_those_of_the_lab_encoder() {
        for (low_bits, window_bits, copies_log2, coins, tile_cols, expected) in [
            (0, 14, 0, 5, 4096, 0x253d_fe9d_00ea_f3bau64),
            (0, 12, 2, 5, 2048, 0xffeb_3e7e_5b89_5f07),
            (1, 13, 1, 14, 1024, 0x2801_5a39_ac9a_a55e),
            (2, 14, 0, 39, 4096, 0x5d6a_31ee_09c3_ad29),
            (0, 8, 0, 12, 256, 0x8b69_012c_403f_cb39),
        ] {
            // binomial symbols of variance coins / 4, now and then a hundred times as large
            let mut state = 1u64;
            let symbols: Vec<i16> = (0..16 * tile_cols)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let heads = (state >> (64 - coins)).count_ones() as i16 - coins as i16 / 2;
                    if state >> 12 & 1023 == 0 { heads * 100 } else { heads }
                })
                .collect();
            let stack = Stack::new(tile_cols, &[&symbols]).unwrap();
            let statistics = Statistics::sample(&stack, Geometry::new(16, tile_cols).unwrap(), 1);
            let book = Book::new(&statistics.ranking(low_bits), window_bits);
            let params = QuadParams { low_bits, window_bits, copies_log2 };
            let tile = TileEncoder::new(&book, params, tile_cols).encode(&symbols, tile_cols, 0).unwrap();
            assert_eq!(fingerprint(&tile), expected, "{params:?}, {tile_cols} columns");
        }
    }
}
