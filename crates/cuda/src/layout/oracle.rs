//! The scalar decoder of the `quad` layout: what a kernel must do, step by step, and what it may rely on.

use super::far::csr;
use super::fragment::{self, DEVICE_FLIP, SUPERSTEP_QUADS, ZERO_QUAD, stream_quads};
use super::plain::check_len;
use super::quad::FIRST_WORDS;
use super::ring::{GROUPS_AT_START, rows_loaded};
use super::tile::{UNIT_WORDS, patched};
use super::{GROUP_WORDS, LayoutError, QuadMatrix, RING_GROUPS, STREAM_WORDS_MIN, STREAMS};

/// Where the streams of a tile lie.
struct Streams<'a> {
    /// The first 16 rows.
    first: &'a [u32],
    /// The rows after those.
    rest: &'a [u32],
    whole_rows: usize,
    /// (64,) words of each stream
    lens: [usize; STREAMS],
}

impl Streams<'_> {
    /// Word `row` of `stream`, if the stream is so long.
    fn word(&self, stream: usize, row: usize) -> Option<u32> {
        if row < STREAM_WORDS_MIN {
            return Some(self.first[row * STREAMS + stream]);
        }
        if row >= self.lens[stream] {
            return None;
        }
        let start = if row < self.whole_rows {
            (row - STREAM_WORDS_MIN) * STREAMS + stream
        } else {
            let earlier: usize = self.lens.iter().map(|&len| len.min(row)).sum();
            let before = self.lens[..stream].iter().filter(|&&len| len > row).count();
            earlier - STREAM_WORDS_MIN * STREAMS + before
        };
        Some(self.rest[start])
    }
}

/// What the ring holds.
struct Ring {
    asked: usize,
    arrived: usize,
}

/// The registers of a stream.
#[derive(Clone, Copy, Default)]
struct Window {
    /// The two words of the window and the next; `None` where the ring held another row, or none.
    words: [Option<u32>; 3],
    /// Rows loaded.
    loaded: usize,
    /// Bits consumed, junk not included.
    bits: usize,
}

impl Window {
    fn load(&mut self, streams: &Streams, stream: usize, ring: &Ring) {
        let group = self.loaded / GROUP_WORDS;
        let there = group < ring.arrived && group + RING_GROUPS >= ring.asked;
        let word = if there { streams.word(stream, self.loaded) } else { None };
        self.words = [self.words[1], self.words[2], word];
        self.loaded += 1;
    }
}

impl QuadMatrix {
    /// The symbols, (rows, cols) row-major: the oracle of the kernels. The ring is followed too: a word that a kernel would not find there is an error.
    ///
    /// # Errors
    /// Those of arrays that contradict each other, the geometry or the parameters.
    pub fn decode(&self) -> Result<Vec<i16>, LayoutError> {
        self.params.check()?;
        let (geometry, tiles) = (&self.geometry, self.geometry.tiles());
        check_len("head", self.head.len(), tiles)?;
        check_len("lens", self.lens.len(), tiles * 4)?;
        check_len("schedule", self.schedule.len(), tiles)?;
        check_len("table", self.table.len(), self.params.table_bytes() / 4)?;
        let plane_bytes = fragment::plane_bytes(geometry.tile_cols(), self.params.low_bits);
        check_len("planes", self.planes.len(), tiles * plane_bytes)?;
        if self.words.len() < tiles * FIRST_WORDS {
            return Err(LayoutError::ArrayLength { array: "words", len: self.words.len(), expected: tiles * FIRST_WORDS });
        }
        let mut symbols = vec![0; geometry.weights()];
        for tile in 0..tiles {
            let mut quads = self.decode_quads(tile)?;
            let patches = csr(&self.patch_offsets, &self.patches, tile, tiles, "patch offsets")?;
            if patches.len() != (self.head[tile][1] >> 16) as usize {
                return Err(LayoutError::Tile { tile, what: "head and offsets disagree on the number of patches" });
            }
            for &patch in patches {
                let (at, quad) =
                    patched(patch, geometry.tile_cols()).ok_or(LayoutError::Tile { tile, what: "a patch lies outside the tile" })?;
                if std::mem::replace(&mut quads[at], quad) != ZERO_QUAD {
                    return Err(LayoutError::Tile { tile, what: "a patch meets a quad that is not zero" });
                }
            }
            let planes = &self.planes[tile * plane_bytes..][..plane_bytes];
            fragment::join(&quads, planes, self.far.tile(tile, tiles)?, geometry, self.params.low_bits, tile, &mut symbols)?;
        }
        Ok(symbols)
    }

    fn streams(&self, tile: usize) -> Result<Streams<'_>, LayoutError> {
        let error = |what| LayoutError::Tile { tile, what };
        let [start, meta] = self.head[tile];
        let whole_rows = (meta & 0xffff) as usize;
        if !whole_rows.is_multiple_of(GROUP_WORDS) || whole_rows < STREAM_WORDS_MIN {
            return Err(error("whole rows are not a multiple of 4 from 16 on"));
        }
        let mut lens = [whole_rows; STREAMS];
        for (stream, len) in lens.iter_mut().enumerate() {
            *len += (self.lens[tile * 4 + stream / 16] >> (stream % 16 * 4) & 15) as usize;
        }
        let rest = lens.iter().sum::<usize>() - FIRST_WORDS;
        let start = start as usize * UNIT_WORDS;
        let rest = self.words.get(start..start + rest).ok_or(error("the streams reach beyond the words"))?;
        Ok(Streams { first: &self.words[tile * FIRST_WORDS..][..FIRST_WORDS], rest, whole_rows, lens })
    }

    /// The quads of a tile before patching, (64, quads of a stream), nibbles biased by 8.
    fn decode_quads(&self, tile: usize) -> Result<Vec<u16>, LayoutError> {
        let streams = self.streams(tile)?;
        let groups = streams.lens.iter().copied().max().unwrap_or(0).div_ceil(GROUP_WORDS);
        let mut ring = Ring { asked: RING_GROUPS, arrived: GROUPS_AT_START };
        let mut windows = [Window::default(); STREAMS];
        for (stream, window) in windows.iter_mut().enumerate() {
            (0..rows_loaded(0)).for_each(|_| window.load(&streams, stream, &ring));
        }
        let stream_quads = stream_quads(self.geometry.tile_cols());
        let mut quads = vec![0; STREAMS * stream_quads];
        for superstep in 0..self.geometry.supersteps() {
            let schedule = self.schedule[tile] >> (2 * superstep);
            ring.arrived += (schedule >> 1 & 1) as usize;
            if ring.arrived > ring.asked {
                return Err(LayoutError::Tile { tile, what: "the schedule waits for a group that was not asked for" });
            }
            ring.asked += (schedule & 1) as usize;
            if ring.asked > groups.max(RING_GROUPS) {
                return Err(LayoutError::Tile { tile, what: "the schedule asks for a group that does not exist" });
            }
            for (stream, window) in windows.iter_mut().enumerate() {
                for z in superstep * SUPERSTEP_QUADS..(superstep + 1) * SUPERSTEP_QUADS {
                    quads[stream * stream_quads + z] = self.decode_quad(tile, window)?;
                    if rows_loaded(window.bits) as usize > window.loaded {
                        window.load(&streams, stream, &ring);
                    }
                }
            }
        }
        for (stream, window) in windows.iter().enumerate() {
            let words = (window.bits + self.params.junk_bits() as usize).div_ceil(32);
            if streams.lens[stream] != words.max(streams.whole_rows) {
                return Err(LayoutError::Tile { tile, what: "a stream is longer than its codes" });
            }
        }
        Ok(quads)
    }

    /// One table lookup.
    fn decode_quad(&self, tile: usize, window: &mut Window) -> Result<u16, LayoutError> {
        let [low, high, _] = window.words.map(|word| u64::from(word.unwrap_or(0)));
        let offset = window.bits % 32 + self.params.junk_bits() as usize;
        let index = ((low | high << 32) >> offset) as usize & ((1 << self.params.window_bits) - 1);
        let entry = self.table[index << self.params.copies_log2];
        let length = (entry & 0xffff) as usize;
        if !(1..=self.params.window_bits as usize).contains(&length) {
            return Err(LayoutError::Tile { tile, what: "a table entry whose code is too long or empty" });
        }
        let (first, last) = (offset / 32, (offset + length - 1) / 32);
        if window.words[first..=last].contains(&None) {
            return Err(LayoutError::Tile { tile, what: "a code lies in a word that the ring does not hold" });
        }
        window.bits += length;
        Ok((entry >> 16) as u16 ^ DEVICE_FLIP)
    }
}
