//! The coded layout: Huffman-coded quads of symbols, decoded inside the product.
//!
//! A *quad* is four consecutive columns of a row ([`fragment`]). The likeliest have a code of at most `window_bits` bits; one lookup gives
//! four weights, and two lookups fit a 32-bit window.
//!
//! # A tile's streams
//! Each lane has two streams of bits, one for each of its rows: two independent chains. A stream is words of 32 bits, LSB first; it begins with
//! 2 + `copies_log2` junk bits, so that a window, masked, is the byte address of its table entry. Word `w` of stream `s` lies in *row* `w`, of 64 words. All
//! streams have the whole rows of their tile, a multiple of 4 and at least 16; of later rows only those words exist that a stream has, up to 15, in stream
//! order. Tiles are padded to 32 bytes.
//!
//! # Arrays
//! - `words`: the first 16 rows of all tiles, tile · 1024 words apart, so that a warp can ask for them before it knows anything else; then the rest of each
//!   tile, where `head` says;
//! - `head`: per tile {start of the rest in units of 32 bytes, whole rows | patches << 16};
//! - `lens`: (tiles, 4) u64, 64 nibbles: words of each stream beyond the whole rows;
//! - `schedule`: per tile, two bits a superstep: when to wait for the ring's next group and when to ask for one (module `ring` simulates it);
//! - `patches`: quads without a code, which the stream gives as zeros: nibbles as in a table entry | lane quad << 16 | lane << 25, with offsets by tile;
//! - `far`, `planes`: as in [`plain`](super::plain);
//! - `table`: code length in bits 0..6, nibbles in bits 16..32; each entry 2^`copies_log2` times.
//!
//! # Rows of unlike entropy
//! The slowest stream holds the ring back for the others. A stream that runs ahead of what the ring can hold is held back: some of its long codes become
//! patches. Should even that not do, the matrix gets a book whose codes all have the same length, with which streams cannot drift, so any matrix can be
//! encoded. [`QuadMatrix::encode_auto`] takes narrower tiles before it comes to that.
//!
//! # Costs
//! Encoding: 320 M (two low bits) to 510 M (entropy 1.5) weights/s on one thread of a Zen 4 server, the search for the book included (`examples/encode_rate.rs`).
//! Size: 2.6 to 3.6 % above the entropy for large matrices of like rows (bench/cuda/lab/NOTES.md says where the bits are); rows whose scales differ by a tenth
//! (log-normal) cost another 1.5 %, by a fifth 4 %, by two fifths 13 %. Every stream has 16 words at least, which matrices of fewer than some 1000 columns
//! do not fill.

use super::book::Book;
use super::far::FarList;
use super::fragment;
use super::source::RowTiles;
use super::tile::{Tile, TileEncoder, UNIT_WORDS};
use super::{Geometry, LayoutError, QuadParams, STREAM_WORDS_MIN, STREAMS, Source, Statistics, parallel, plan};

/// Words of a tile that lie at a fixed stride.
pub(super) const FIRST_WORDS: usize = STREAM_WORDS_MIN * STREAMS;

/// A matrix in the coded layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuadMatrix {
    /// Its shape; tiles may be narrower than those of [`Geometry::new`].
    pub geometry: Geometry,
    /// How it is coded.
    pub params: QuadParams,
    /// The streams.
    pub words: Vec<u32>,
    /// (tiles,) {start of the rows after the first 16 in units of 32 bytes, whole rows | patches << 16}
    pub head: Vec<[u32; 2]>,
    /// (tiles, 4) nibbles: words of each stream beyond the whole rows
    pub lens: Vec<u64>,
    /// (tiles,) two bits for each superstep: 1 ask for a group, 2 wait for one
    pub schedule: Vec<u64>,
    /// (tiles + 1,) first patch of each tile
    pub patch_offsets: Vec<u32>,
    /// Quads without a code.
    pub patches: Vec<u32>,
    /// Symbols whose high part is not in −8..=7.
    pub far: FarList,
    /// (tiles, supersteps, 32, 8 · low_bits)
    pub planes: Vec<u8>,
    /// (2^window_bits, 2^copies_log2)
    pub table: Vec<u32>,
}

impl Tile {
    /// Size on the device, table apart.
    pub(super) fn bytes(&self) -> usize {
        let side = size_of::<[u32; 2]>() + size_of_val(&self.lens) + size_of_val(&self.schedule) + 2 * size_of::<u32>();
        size_of_val(&*self.words) + size_of_val(&*self.patches) + self.planes.len() + size_of_val(&*self.far) + side
    }
}

impl QuadMatrix {
    /// Encodes a matrix in the given geometry, on up to `threads` threads, with the book that suits `statistics`.
    ///
    /// # Errors
    /// [`LayoutError::Parameter`]; any symbols can be encoded.
    pub fn encode(
        source: &dyn Source,
        geometry: Geometry,
        params: QuadParams,
        statistics: &Statistics,
        threads: usize,
    ) -> Result<Self, LayoutError> {
        params.check()?;
        let ranking = statistics.ranking(params.low_bits);
        Ok(Self::encode_with(source, geometry, params, &Book::new(&ranking, params.window_bits), threads)
            .or_else(|| Self::encode_with(source, geometry, params, &Book::uniform(&ranking, params.window_bits), threads))
            .expect("streams of equal length never overrun the ring"))
    }

    /// Encodes a matrix with the parameters that suit it ([`QuadParams::choose`]), in `geometry` or in narrower tiles if those are smaller by more than 1 %.
    pub fn encode_auto(source: &dyn Source, geometry: Geometry, threads: usize) -> Result<Self, LayoutError> {
        let statistics = Statistics::sample(source, geometry, threads);
        let params = QuadParams::choose(&statistics, &geometry, threads);
        let book = Book::new(&statistics.ranking(params.low_bits), params.window_bits);
        let geometry = plan::fit_geometry(source, geometry, params, &book, threads);
        Self::encode(source, geometry, params, &statistics, threads)
    }

    /// `None` if a tile cannot be scheduled with this book.
    fn encode_with(source: &dyn Source, geometry: Geometry, params: QuadParams, book: &Book, threads: usize) -> Option<Self> {
        let state = || (RowTiles::new(source, geometry), TileEncoder::new(book, params, geometry.tile_cols()));
        let row_tiles: Vec<Option<Vec<Tile>>> = parallel::map(geometry.row_tiles(), threads, state, |(tiles, encoder), row_tile| {
            let rows = tiles.read(row_tile);
            (0..geometry.segs()).map(|seg| encoder.encode(rows, geometry.padded_cols(), seg * geometry.tile_cols())).collect()
        });
        let row_tiles: Vec<Vec<Tile>> = row_tiles.into_iter().collect::<Option<_>>()?;
        let tiles: Vec<&Tile> = (0..geometry.segs()).flat_map(|seg| row_tiles.iter().map(move |tiles| &tiles[seg])).collect();
        Some(Self::assemble(geometry, params, book, &tiles, threads))
    }

    fn assemble(geometry: Geometry, params: QuadParams, book: &Book, tiles: &[&Tile], threads: usize) -> Self {
        let mut at = FIRST_WORDS * tiles.len();
        let mut head = Vec::with_capacity(tiles.len());
        let (mut patch_offsets, mut patches) = (vec![0], Vec::new());
        for tile in tiles {
            head.push([(at / UNIT_WORDS) as u32, (tile.whole_rows | tile.patches.len() << 16) as u32]);
            at += tile.words.len() - FIRST_WORDS;
            patches.extend_from_slice(&tile.patches);
            patch_offsets.push(patches.len() as u32);
        }
        let plane_bytes = fragment::plane_bytes(geometry.tile_cols(), params.low_bits);
        let (mut words, mut planes) = (vec![0; at], vec![0; plane_bytes * tiles.len()]);

        let mut jobs = Vec::with_capacity(tiles.len());
        let (mut first_left, mut rest_left) = words.split_at_mut(FIRST_WORDS * tiles.len());
        let mut planes_left = &mut planes[..];
        for tile in tiles {
            let (first, first_rest) = first_left.split_at_mut(FIRST_WORDS);
            let (rest, rest_rest) = rest_left.split_at_mut(tile.words.len() - FIRST_WORDS);
            let (planes, planes_rest) = planes_left.split_at_mut(plane_bytes);
            jobs.push((*tile, first, rest, planes));
            (first_left, rest_left, planes_left) = (first_rest, rest_rest, planes_rest);
        }
        parallel::map_jobs(
            jobs,
            threads,
            || (),
            |(), _, (tile, first, rest, planes)| {
                first.copy_from_slice(&tile.words[..FIRST_WORDS]);
                rest.copy_from_slice(&tile.words[FIRST_WORDS..]);
                planes.copy_from_slice(&tile.planes);
            },
        );
        Self {
            geometry,
            params,
            words,
            head,
            lens: tiles.iter().flat_map(|tile| tile.lens).collect(),
            schedule: tiles.iter().map(|tile| tile.schedule).collect(),
            patch_offsets,
            patches,
            far: FarList::new(tiles.iter().map(|tile| &*tile.far)),
            planes,
            table: book.table(params.copies_log2),
        }
    }

    /// Size on the device, everything counted: streams, side arrays, lists, planes and the table with its copies.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.words)
            + size_of_val(&*self.head)
            + size_of_val(&*self.lens)
            + size_of_val(&*self.schedule)
            + size_of_val(&*self.patch_offsets)
            + size_of_val(&*self.patches)
            + self.far.bytes()
            + self.planes.len()
            + size_of_val(&*self.table)
    }
}
