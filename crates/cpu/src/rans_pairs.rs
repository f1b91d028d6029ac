//! Chunks of the codec `rans-pairs`: what the kernels of all levels share.
//!
//! A kernel (`isa/avx512_rans_pairs.rs`, `isa/avx2_rans_pairs.rs`) takes up to four chunks of equal size at
//! once, since one step of a chunk waits for the step before, and writes their next pair bytes, a tile of 64
//! for each step. It knows nothing of symbols. Three sinks take the tiles: [`decode`] makes symbol bytes of
//! them, [`dot`] multiplies them with one token's activations, and for [`decode_lines`] they are what is
//! wanted, the lines of the decoded form.
//!
//! The first two take up to [`BLOCK`] tiles of each chunk at a time, which the L1 cache holds. Multiplying
//! each tile at once would save its store and load, but the sums and the tables together do not fit the
//! registers.
//!
//! Reads are optimistic, as in `isa/streams.rs`: what is stored or summed is nonsense if in the end the
//! streams are not where they must be, and then it is thrown away.

use std::ops::Range;

use tersor_codec::pairs::Window;
use tersor_codec::rans_pairs::{Chunk, Table};
use tersor_codec::{PADDING_BYTES, SYMBOL_BIAS, Table as AnyTable};
use tersor_format::CodedTensor;

use crate::isa::{Isa, TileBytes, per_isa};
#[cfg(target_arch = "x86_64")]
use crate::isa::{avx2_rans_pairs, avx512_rans_pairs};
use crate::matmul::{SegmentScales, finish_rows};
use crate::pairs::{Listed, PairBuffers, RawLines, by_raw_bits, put_listed, split};
use crate::scales::TileScales;
use crate::source::{FarAt, count_zeros, equal_chunks, take_far, with_padding};
use crate::{Activations, KernelScales, Level, TILE_COLS, TILE_ROWS, TILE_SYMBOLS};

/// Most chunks that a kernel takes at once.
const WIDTH_MAX: usize = 4;
/// Tiles of pairs of a chunk that are decoded before they are used. At least those of the longest segment.
const BLOCK: usize = 64;
/// Tiles of pairs that the buffer holds.
const BUFFER: usize = WIDTH_MAX * BLOCK;

/// A decoder of pair bytes at one level, with the tables of one tensor.
pub(crate) trait Kernel {
    /// Most chunks that it takes at once, at most [`WIDTH_MAX`].
    fn width(&self) -> usize;
    /// Decodes the next `steps` tiles of each of the streams. Tile `t` of stream `i` goes to
    /// `out[i * stride + t]`.
    ///
    /// # Panics
    /// If there are no streams or more than the width, or `out` is too short.
    fn decode(&self, streams: &mut [Stream<'_>], steps: usize, out: &mut [TileBytes], stride: usize);
}

/// One chunk on its way.
#[derive(Clone)]
pub(crate) struct Stream<'a> {
    /// Low bytes of the states.
    pub low: TileBytes,
    /// High bytes of the states.
    pub high: TileBytes,
    /// The words that are left, as pointers into the chunk. As with the escapes the 64 bytes behind them
    /// are readable for `'a`. If too many were taken the range begins behind its end.
    pub words: Range<*const u8>,
    pub escapes: Range<*const u8>,
    chunk: Chunk<'a>,
    raw: RawLines<'a>,
}

impl<'a> Stream<'a> {
    /// `None` if the chunk is corrupt.
    fn new(table: &Table, tensor: &'a CodedTensor, chunk: usize) -> Option<Stream<'a>> {
        let padded = tensor.chunk_with_padding(chunk);
        let bytes = &padded[..padded.len() - PADDING_BYTES];
        let symbols = tensor.chunk_symbols(chunk);
        let parts = Chunk::parse(table, symbols, bytes).ok()?;
        let raw = RawLines::new(table.window().raw_bits(), parts.raw_lines);
        if !raw.end_with(symbols / TILE_SYMBOLS) || parts.listed.iter().any(|(position, _)| raw.of_symbol(position) != 0) {
            return None;
        }
        // Pointers that reach beyond the part come from a slice that does.
        let range = |part: &[u8]| {
            let wide = with_padding(padded, part);
            wide.as_ptr()..wide[part.len()..].as_ptr()
        };
        let (low, high) = parts.states.split_at(TILE_SYMBOLS);
        Some(Stream {
            low: low.try_into().ok()?,
            high: high.try_into().ok()?,
            words: range(parts.words),
            escapes: range(parts.escapes),
            chunk: parts,
            raw,
        })
    }

    /// Whether the chunk ended as its encoder began.
    fn at_end(&self) -> bool {
        self.low == [0; TILE_SYMBOLS]
            && self.high == [1; TILE_SYMBOLS]
            && [&self.words, &self.escapes].iter().all(|rest| rest.start == rest.end)
    }
}

/// The kernel of a level.
#[allow(clippy::large_enum_variant)] // One lives on the stack while chunks are decoded; a box would allocate in every task.
enum LevelKernel<'a> {
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2_rans_pairs::Tables),
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512_rans_pairs::Tables<'a>),
    /// Never made.
    #[allow(dead_code)]
    None(std::marker::PhantomData<&'a Table>, std::convert::Infallible),
}

impl<'a> LevelKernel<'a> {
    fn new(level: Level, table: &'a Table) -> Option<LevelKernel<'a>> {
        match level {
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(token) => Some(LevelKernel::Avx2(avx2_rans_pairs::Tables::new(token, table.slots()))),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(token) => Some(LevelKernel::Avx512(avx512_rans_pairs::Tables::new(token, table.slots()))),
            Level::Scalar => None,
        }
    }

    fn get(&self) -> &dyn Kernel {
        match self {
            #[cfg(target_arch = "x86_64")]
            LevelKernel::Avx2(tables) => tables,
            #[cfg(target_arch = "x86_64")]
            LevelKernel::Avx512(tables) => tables,
            LevelKernel::None(_, never) => match *never {},
        }
    }
}

/// The chunks of one tensor, at a level with a kernel.
pub(crate) struct Chunks<'a> {
    level: Level,
    kernel: LevelKernel<'a>,
    table: &'a Table,
    window: Window,
    tensor: &'a CodedTensor,
}

impl<'a> Chunks<'a> {
    /// `None` if the codec is another one, or there is no kernel for the level.
    pub(crate) fn new(level: Level, tensor: &'a CodedTensor) -> Option<Chunks<'a>> {
        let AnyTable::RansPairs(table) = tensor.table() else {
            return None;
        };
        Some(Chunks { level, kernel: LevelKernel::new(level, table)?, table, window: table.window(), tensor })
    }

    /// The streams of at least one and at most [`WIDTH_MAX`] chunks, and copies of the last of them; `None`
    /// if one is corrupt.
    fn streams(&self, chunks: &Range<usize>) -> Option<[Stream<'a>; WIDTH_MAX]> {
        let last = Stream::new(self.table, self.tensor, chunks.end - 1)?;
        let mut streams = [const { None }; WIDTH_MAX];
        for (stream, chunk) in streams.iter_mut().zip(chunks.start..chunks.end - 1) {
            *stream = Some(Stream::new(self.table, self.tensor, chunk)?);
        }
        Some(streams.map(|stream| stream.unwrap_or_else(|| last.clone())))
    }

    fn groups(&self, chunks: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<'a> {
        equal_chunks(self.tensor, chunks, self.kernel.get().width())
    }

    /// Decodes consecutive chunks to symbol bytes, one behind the other, and adds their far symbols to
    /// `far`.
    ///
    /// False if a chunk is corrupt: `out` and `far` are then of no use.
    pub(crate) fn decode(&self, chunks: Range<usize>, buffers: &mut PairBuffers, out: &mut [u8], far: &mut Vec<FarAt>) -> bool {
        let buffer = &mut buffers.0[0];
        buffer.ensure(BUFFER * TILE_SYMBOLS);
        let buffer = &mut buffer.as_chunks_mut().0[..BUFFER];
        let mut rest = out;
        self.groups(chunks).all(|group| {
            let symbols = self.tensor.chunk_symbols(group.start);
            let (out, after) = std::mem::take(&mut rest).split_at_mut(group.len() * symbols);
            rest = after;
            self.streams(&group).is_some_and(|mut streams| {
                let streams = &mut streams[..group.len()];
                self.store(streams, buffer, out.as_chunks_mut().0)
                    && group.zip(streams).zip(out.chunks_exact_mut(symbols)).all(|((chunk, stream), out)| {
                        put_listed(stream.chunk.listed.iter(), self.window.listed_byte(), out)
                            && take_far(self.tensor, chunk, stream.chunk.far, stream.chunk.listed.bytes(), out, far)
                    })
            })
        })
    }

    /// Symbol bytes of the streams, one behind the other, but for the listed symbols.
    fn store(&self, streams: &mut [Stream<'_>], buffer: &mut [TileBytes], out: &mut [TileBytes]) -> bool {
        let tiles = out.len() / streams.len();
        let steps = tiles.div_ceil(2);
        for start in (0..steps).step_by(BLOCK) {
            let end = steps.min(start + BLOCK);
            self.kernel.get().decode(streams, end - start, buffer, BLOCK);
            for ((stream, pairs), out) in streams.iter().zip(buffer.chunks(BLOCK)).zip(out.chunks_mut(tiles)) {
                let out = &mut out[2 * start..tiles.min(2 * end)];
                if !split(self.level, self.window.base(), stream.raw.skip(start), &pairs[..end - start], out) {
                    return false;
                }
            }
        }
        streams.iter().all(Stream::at_end)
    }

    /// Multiplies consecutive chunks with the only token of `x`. `sums`: (row tiles of the chunks, 16).
    ///
    /// False if a chunk is corrupt or has far symbols, or the shape does not suit: `sums` are then of no
    /// use.
    pub(crate) fn dot(
        &self,
        chunks: Range<usize>,
        buffers: &mut PairBuffers,
        scales: &KernelScales,
        x: &Activations,
        sums: &mut [[f32; TILE_ROWS]],
    ) -> bool {
        // Neither row tiles nor segments may begin within a pair.
        if !self.tensor.col_steps().is_multiple_of(2) || !(x.segment() / TILE_COLS).is_multiple_of(2) {
            return false;
        }
        let buffer = &mut buffers.0[0];
        buffer.ensure(BUFFER * TILE_SYMBOLS);
        let buffer = &mut buffer.as_chunks_mut().0[..BUFFER];
        let mut rest = sums;
        self.groups(chunks).all(|group| {
            let row_tiles = self.tensor.chunk_row_tiles(group.start);
            let (sums, after) = std::mem::take(&mut rest).split_at_mut(group.len() * row_tiles.len());
            rest = after;
            self.streams(&group).is_some_and(|mut streams| {
                let streams = &mut streams[..group.len()];
                streams.iter().all(|stream| stream.chunk.far.is_empty() && count_zeros(stream.chunk.listed.bytes()) == 0)
                    && self.multiply(streams, buffer, row_tiles, scales, x, sums)
            })
        })
    }

    /// As [`Chunks::dot`], of streams whose first has the row tiles `row_tiles`.
    fn multiply(
        &self,
        streams: &mut [Stream<'_>],
        buffer: &mut [TileBytes],
        row_tiles: Range<usize>,
        scales: &KernelScales,
        x: &Activations,
        sums: &mut [[f32; TILE_ROWS]],
    ) -> bool {
        let mut listed: [_; WIDTH_MAX] =
            std::array::from_fn(|i| Listed::new(streams[i.min(streams.len() - 1)].chunk.listed.iter(), self.window.listed_byte()));
        let q: &[[i8; TILE_COLS]] = x.q(0).as_chunks().0;
        let segment = x.segment() / TILE_COLS;
        let segments = 2 * BLOCK / segment;
        let mut step = 0;
        for row_tile in 0..row_tiles.len() {
            for (block, q) in q.chunks(segments * segment).enumerate() {
                let steps = q.len() / 2;
                self.kernel.get().decode(streams, steps, buffer, BLOCK);
                for (i, ((stream, pairs), listed)) in streams.iter().zip(buffer.chunks(BLOCK)).zip(&mut listed).enumerate() {
                    let own = i * row_tiles.len() + row_tile;
                    let scales = scales.tile(row_tiles.start + own);
                    let raw = stream.raw.skip(step);
                    let place = Place { q, segment: block * segments };
                    if block == 0 {
                        sums[own] = [0.0; TILE_ROWS];
                    }
                    multiply_block(self.level, self.window.base(), raw, &pairs[..steps], listed, x, place, scales, &mut sums[own]);
                }
                step += steps;
            }
            for i in 0..streams.len() {
                let own = i * row_tiles.len() + row_tile;
                finish_rows(scales.tile(row_tiles.start + own), &mut sums[own]);
            }
        }
        streams.iter().all(Stream::at_end) && listed.iter().take(streams.len()).all(Listed::valid)
    }
}

/// What a block of tiles of pairs is multiplied with.
#[derive(Clone, Copy)]
struct Place<'a> {
    /// The activations of its steps.
    q: &'a [[i8; TILE_COLS]],
    /// The segment that it begins with.
    segment: usize,
}

per_isa! {
    /// Adds the products of whole segments of a row tile to `acc`. `base`: the symbol byte of the window's
    /// first symbol.
    fn multiply_block(
        isa;
        base: u8,
        raw: RawLines<'_>,
        pairs: &[TileBytes],
        listed: &mut Listed<impl Iterator<Item = (usize, u8)>>,
        x: &Activations,
        place: Place<'_>,
        scales: TileScales<'_>,
        acc: &mut [f32; TILE_ROWS],
    ) {
        by_raw_bits!(raw.bits(), multiply_raw(isa, base, raw, pairs, listed, x, place, scales, acc))
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)] // Those of `multiply_block`.
fn multiply_raw<I: Isa, const R: u32>(
    isa: I,
    base: u8,
    raw: RawLines<'_>,
    pairs: &[TileBytes],
    listed: &mut Listed<impl Iterator<Item = (usize, u8)>>,
    x: &Activations,
    place: Place<'_>,
    scales: TileScales<'_>,
    acc: &mut [f32; TILE_ROWS],
) {
    let segment_steps = x.segment() / TILE_COLS;
    let (xscales, xsums) = (x.scales(0), x.sums(0));
    let parts = place.q.chunks(segment_steps).zip(pairs.chunks(segment_steps / 2));
    for (i, (q, pairs)) in parts.enumerate() {
        let segment = place.segment + i;
        let raw = raw.skip(i * segment_steps / 2);
        let (mut first, mut second) = (isa.zero(), isa.zero());
        for (step, (pairs, q)) in pairs.iter().zip(q.as_chunks::<2>().0).enumerate() {
            let tile = isa.load(pairs);
            if R == 0 {
                first = isa.dot_low(first, tile, &q[0]);
                second = isa.dot_high(second, tile, &q[1]);
            } else {
                let symbols = raw.symbols::<I, R>(isa, step, tile);
                first = isa.dot(first, symbols.0, &q[0]);
                second = isa.dot(second, symbols.1, &q[1]);
            }
        }
        let (mut isum, base) = if R == 0 {
            (isa.finish_nibbles(first, second), i32::from(base) - i32::from(SYMBOL_BIAS))
        } else {
            (isa.finish(isa.add(first, second), xsums[segment]), i32::from(base))
        };
        for sum in &mut isum {
            *sum += base * xsums[segment];
        }
        listed.add(pairs, q, &mut isum);
        SegmentScales::of(scales, segment).add(isa, acc, &isum, xscales[segment], xsums[segment]);
    }
}
