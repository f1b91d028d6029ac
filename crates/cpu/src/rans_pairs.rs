//! Chunks of the codec `rans-pairs`: what the kernels of all levels share.
//!
//! A kernel (`isa/avx512_rans_pairs.rs`, `isa/avx2_rans_pairs.rs`) takes up to six chunks of equal size at
//! once, since one step of a chunk waits for the step before, and writes their next pair bytes, a tile of 64
//! for each step. It knows nothing of symbols. Three sinks of [`Chunks`] take the tiles: `decode` makes
//! symbol bytes of them, `dot` multiplies them with one token's activations, and for `decode_lines` they are what is
//! wanted, the lines of the decoded form, where window and form agree.
//!
//! The first two take up to [`BLOCK`] tiles of each chunk at a time, which the L2 cache holds. Multiplying
//! each tile at once would save its store and load, but the sums and the tables together do not fit the
//! registers.
//!
//! Needs: columns in whole pairs of column steps, and segments too, for products and lines; products of chunks with
//! far symbols, and whatever is corrupt, are left to the codec's decoder. Figures are with the kernels.
//!
//! Reads are optimistic, as in `isa/streams.rs`: what is stored or summed is nonsense if in the end the
//! streams are not where they must be, and then it is thrown away.

use std::iter::Peekable;
use std::ops::Range;

use tersor_codec::pairs::{LISTED_NIBBLE, Window};
use tersor_codec::rans_pairs::{Chunk, Table};
use tersor_codec::{ESCAPE, PADDING_BYTES, SYMBOL_BIAS, Table as AnyTable};
use tersor_format::CodedTensor;

use crate::buffer::AlignedBytes;
use crate::decoded::{LINES_AHEAD_BYTES, join_escaped, narrow, narrow_row_tile};
use crate::isa::{Isa, TileBytes, each_chunk, per_isa, prefetch};
#[cfg(target_arch = "x86_64")]
use crate::isa::{avx2_rans_pairs, avx512_rans_pairs};
use crate::matmul::{SegmentScales, finish_rows};
use crate::pairs::{Listed, PairBuffers, RawLines, by_raw_bits, nibble, put_listed, split};
use crate::scales::TileScales;
use crate::source::{FarAt, STREAMS_MAX, count_zeros, equal_chunks, take_far, with_padding};
use crate::{Activations, KernelScales, Level, TILE_COLS, TILE_ROWS, TILE_SYMBOLS, TokenBlock};

/// Tiles of pairs of a chunk that are decoded before they are used. At least those of the longest segment;
/// with a quarter of them the product takes 7 % longer.
const BLOCK: usize = 256;
/// Streams whose tiles are multiplied together: they share the activations and what a segment asks for.
const TOGETHER: usize = 2;
/// Tiles of pairs that are narrowed at once, by symbol bytes in the L1 cache if some are listed.
pub(crate) const PART: usize = 64;
/// Tiles of pairs that the buffer holds.
const BUFFER: usize = STREAMS_MAX * BLOCK;

/// A decoder of pair bytes at one level, with the tables of one tensor.
pub(crate) trait Kernel {
    /// Most chunks that it takes at once, at most [`STREAMS_MAX`].
    fn width(&self) -> usize;
    /// Decodes the next `steps` tiles of each of the streams. Tile `t` of stream `i` goes to
    /// `out[i * stride + t]`, with those of `shift` added to its nibbles, modulo 16.
    ///
    /// # Panics
    /// If there are no streams or more than the width, or `out` is too short.
    fn decode(&self, streams: &mut [Stream<'_>], steps: usize, shift: u8, out: &mut [TileBytes], stride: usize);
}

/// What chunks are multiplied with.
#[derive(Clone, Copy)]
struct Product<'a> {
    /// The symbol byte of the window's first symbol.
    base: u8,
    /// The row tile that the first stream's chunk begins with.
    first: usize,
    scales: &'a KernelScales,
    /// The only token.
    x: TokenBlock<'a>,
    /// Column steps of a segment.
    segment_steps: usize,
    /// Segments of a row.
    segments: usize,
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
    /// Where the kernel is to fetch a cache line for each step, and how many bytes behind it for the next one: a chunk that is
    /// decoded later. They need not be readable.
    pub ahead: *const u8,
    pub ahead_step: usize,
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
        if !raw.end_with(symbols / TILE_SYMBOLS) {
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
            ahead: bytes.as_ptr(),
            ahead_step: 0,
            chunk: parts,
            raw,
        })
    }

    /// Whether the chunk ended as its encoder began, and listed symbols have no raw bits.
    fn at_end(&self) -> bool {
        self.raw.spare(self.chunk.listed)
            && self.low == [0; TILE_SYMBOLS]
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

    /// The streams of at least one and at most [`STREAMS_MAX`] chunks, and copies of the last of them; `None`
    /// if one is corrupt.
    fn streams(&self, chunks: &Range<usize>) -> Option<[Stream<'a>; STREAMS_MAX]> {
        let last = Stream::new(self.table, self.tensor, chunks.end - 1)?;
        let mut streams = [const { None }; STREAMS_MAX];
        for (stream, chunk) in streams.iter_mut().zip(chunks.start..chunks.end - 1) {
            *stream = Some(Stream::new(self.table, self.tensor, chunk)?);
        }
        let mut streams = streams.map(|stream| stream.unwrap_or_else(|| last.clone()));
        self.announce(&mut streams[..chunks.len()], chunks);
        Some(streams)
    }

    /// Has the streams fetch the chunks behind these, line by line: their beginnings all at once stall, and raw lines while they are
    /// multiplied come too fast.
    fn announce(&self, streams: &mut [Stream<'_>], chunks: &Range<usize>) {
        let steps = self.tensor.chunk_symbols(chunks.start).div_ceil(2 * TILE_SYMBOLS);
        for (stream, chunk) in streams.iter_mut().zip(chunks.end..self.tensor.chunk_count()) {
            let bytes = self.tensor.chunk(chunk);
            (stream.ahead, stream.ahead_step) = (bytes.as_ptr(), bytes.len().div_ceil(steps));
        }
    }

    fn groups(&self, chunks: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<'a> {
        equal_chunks(self.tensor, chunks, self.kernel.get().width())
    }

    /// Decodes consecutive chunks to symbol bytes, one behind the other, and adds their far symbols to
    /// `far`.
    ///
    /// False if a chunk is corrupt: `out` and `far` are then of no use.
    pub(crate) fn decode(&self, chunks: Range<usize>, buffers: &mut PairBuffers, out: &mut [u8], far: &mut Vec<FarAt>) -> bool {
        let buffer = room(&mut buffers.0[0], BUFFER);
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
            self.kernel.get().decode(streams, end - start, 0, buffer, BLOCK);
            for ((stream, pairs), out) in streams.iter().zip(buffer.chunks(BLOCK)).zip(out.chunks_mut(tiles)) {
                let out = &mut out[2 * start..tiles.min(2 * end)];
                if !split(self.level, self.window.base(), stream.raw.skip(start), &pairs[..end - start], out) {
                    return false;
                }
            }
        }
        streams.iter().all(Stream::at_end)
    }

    /// Decodes consecutive chunks to lines of nibbles, `symbol byte = nibble + bias`. With `escapes` nibble 0 is an
    /// escape. As in the decoded form the escaped symbol bytes of a row tile follow each other in `escaped`, from its
    /// offset on; far symbols are added to `far`.
    ///
    /// `lines`: (row tiles, lines); `offsets`: (row tiles); `escaped`: 64 bytes more than there are symbols. Returns
    /// how many escaped bytes there are. `None` if the columns do not suit, a chunk is corrupt, or a symbol has no
    /// nibble and there are no escapes: all is then of no use.
    #[allow(clippy::too_many_arguments)] // The parts of the decoded form.
    pub(crate) fn decode_lines(
        &self,
        chunks: Range<usize>,
        buffers: &mut PairBuffers,
        bias: u8,
        escapes: bool,
        lines: &mut [TileBytes],
        offsets: &mut [u32],
        escaped: &mut [u8],
        far: &mut Vec<FarAt>,
    ) -> Option<usize> {
        let nibbles = Nibbles::new(self.window, bias, escapes);
        // Row tiles may not begin within a pair.
        if !self.tensor.col_steps().is_multiple_of(2) {
            return None;
        }
        let mut taken = 0;
        let (mut lines, mut offsets) = (lines, offsets);
        for group in self.groups(chunks) {
            let row_tiles = self.tensor.chunk_row_tiles(group.start).len();
            let steps = self.tensor.chunk_symbols(group.start) / (2 * TILE_SYMBOLS);
            let mut streams = self.streams(&group)?;
            let streams = &mut streams[..group.len()];
            let (own, rest) = lines.split_at_mut(group.len() * steps);
            let (own_offsets, rest_offsets) = offsets.split_at_mut(group.len() * row_tiles);
            (lines, offsets) = (rest, rest_offsets);
            let escaped = &mut escaped[taken..];
            let more = match nibbles.straight(self.window) {
                true => self.store_lines(nibbles, streams, own, own_offsets, escaped),
                false => self.narrow(nibbles, streams, buffers, own, own_offsets, escaped),
            }?;
            if !escapes && more > 0 {
                return None;
            }
            for offset in own_offsets {
                // At most 2^32 symbols, of which fewer are wide.
                *offset += taken as u32;
            }
            taken += more;
            for (chunk, stream) in group.zip(streams) {
                let mut zeros = stream.chunk.listed.iter().filter(|(_, byte)| *byte == ESCAPE).map(|(position, _)| position);
                let known = stream.chunk.far.iter().all(|f| zeros.next() == Some(f.position as usize));
                if !known || zeros.next().is_some() || !stream.at_end() {
                    return None;
                }
                far.extend(FarAt::of_chunk(self.tensor, chunk, stream.chunk.far));
            }
        }
        Some(taken)
    }

    /// As [`Chunks::decode_lines`], of streams whose pair bytes are lines, but for far symbols and the streams' ends.
    fn store_lines(
        &self,
        nibbles: Nibbles,
        streams: &mut [Stream<'_>],
        lines: &mut [TileBytes],
        offsets: &mut [u32],
        escaped: &mut [u8],
    ) -> Option<usize> {
        let coded = self.table.entries().iter().map(|&(pair, _)| pair).filter(|pair| *pair != ESCAPE);
        let clean = nibbles.clean(coded);
        let (steps, row_tiles) = (lines.len() / streams.len(), offsets.len() / streams.len());
        self.kernel.get().decode(streams, steps, nibbles.shift_byte(), lines, steps);
        let mut taken = 0;
        for ((stream, lines), offsets) in streams.iter().zip(lines.chunks_mut(steps)).zip(offsets.chunks_mut(row_tiles)) {
            let scan = !(clean && nibbles.clean(stream.chunk.escapes.iter().copied()));
            if scan && !nibbles.escapes {
                return None;
            }
            let mut listed = stream.chunk.listed.iter().peekable();
            for (row_tile, (lines, offset)) in lines.chunks_mut(steps / row_tiles).zip(offsets).enumerate() {
                *offset = taken as u32;
                if scan || listed.peek().is_some() {
                    taken += nibbles.finish(self.level, row_tile, lines, &mut listed, scan, &mut escaped[taken..])?;
                }
            }
        }
        Some(taken)
    }

    /// As [`Chunks::store_lines`], of any streams.
    fn narrow(
        &self,
        nibbles: Nibbles,
        streams: &mut [Stream<'_>],
        buffers: &mut PairBuffers,
        lines: &mut [TileBytes],
        offsets: &mut [u32],
        escaped: &mut [u8],
    ) -> Option<usize> {
        let [buffer, bytes, ..] = &mut buffers.0;
        let (buffer, bytes) = (room(buffer, BUFFER), room(bytes, 2 * PART).as_flattened_mut());
        let (steps, row_tiles) = (lines.len() / streams.len(), offsets.len() / streams.len());
        let (row_tile_steps, symbols) = (steps / row_tiles, steps * 2 * TILE_SYMBOLS);
        let mut listed: [_; STREAMS_MAX] = std::array::from_fn(|i| streams[i.min(streams.len() - 1)].chunk.listed.iter().peekable());
        // Of each stream, which writes where there is room for all its symbols.
        let mut taken = [0; STREAMS_MAX];
        for start in (0..steps).step_by(BLOCK) {
            let end = steps.min(start + BLOCK);
            self.kernel.get().decode(streams, end - start, 0, buffer, BLOCK);
            for (i, stream) in streams.iter().enumerate() {
                let mut step = start;
                while step < end {
                    let next = end.min(step + PART).min((step / row_tile_steps + 1) * row_tile_steps);
                    if step.is_multiple_of(row_tile_steps) {
                        offsets[i * row_tiles + step / row_tile_steps] = taken[i] as u32;
                    }
                    let pairs = &buffer[i * BLOCK..][step - start..next - start];
                    let lines = &mut lines[i * steps..][step..next];
                    let room = &mut escaped[i * symbols + taken[i]..];
                    taken[i] += nibbles.narrow(self.level, self.window, stream.raw, step, pairs, &mut listed[i], bytes, lines, room)?;
                    step = next;
                }
            }
        }
        Some(join_escaped(symbols, &taken[..streams.len()], offsets, escaped))
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
        let buffer = room(&mut buffers.0[0], BUFFER);
        let mut rest = sums;
        self.groups(chunks).all(|group| {
            let row_tiles = self.tensor.chunk_row_tiles(group.start);
            let (sums, after) = std::mem::take(&mut rest).split_at_mut(group.len() * row_tiles.len());
            rest = after;
            self.streams(&group).is_some_and(|mut streams| {
                let streams = &mut streams[..group.len()];
                streams.iter().all(|stream| stream.chunk.far.is_empty() && count_zeros(stream.chunk.listed.bytes()) == 0)
                    && self.multiply(streams, buffer, row_tiles.start, scales, x, sums)
            })
        })
    }

    /// As [`Chunks::dot`], of streams of which the first begins with the row tile `first`.
    fn multiply(
        &self,
        streams: &mut [Stream<'_>],
        buffer: &mut [TileBytes],
        first: usize,
        scales: &KernelScales,
        x: &Activations,
        sums: &mut [[f32; TILE_ROWS]],
    ) -> bool {
        let (segment_steps, segments) = (x.segment() / TILE_COLS, x.segments());
        let product = Product { base: self.window.base(), first, scales, x: x.only(), segment_steps, segments };
        let row_tiles = sums.len() / streams.len();
        let raw: [_; STREAMS_MAX] = std::array::from_fn(|i| streams[i.min(streams.len() - 1)].raw);
        let mut listed: [_; STREAMS_MAX] =
            std::array::from_fn(|i| Listed::new(streams[i.min(streams.len() - 1)].chunk.listed.iter(), self.window.listed_byte()));
        let listed = &mut listed[..streams.len()];
        sums.fill([0.0; TILE_ROWS]);
        let (mut place, mut step) = (Place::default(), 0);
        while place.row_tile < row_tiles {
            let (start, mut steps) = (place, 0);
            while place.row_tile < row_tiles && steps + place.steps(&product) <= BLOCK {
                steps += place.steps(&product);
                place = place.next(&product);
            }
            self.kernel.get().decode(streams, steps, 0, buffer, steps);
            multiply_blocks(self.level, product, Blocks { raw: &raw, pairs: buffer, start, step, steps }, listed, sums);
            step += steps;
        }
        listed.iter().all(Listed::valid) && streams.iter().all(Stream::at_end)
    }
}

/// Room for `tiles` tiles, with arbitrary contents.
pub(crate) fn room(buffer: &mut AlignedBytes, tiles: usize) -> &mut [TileBytes] {
    buffer.ensure(tiles * TILE_SYMBOLS);
    &mut buffer.as_chunks_mut().0[..tiles]
}

/// Lines of nibbles, as the decoded form has them.
#[derive(Clone, Copy)]
pub(crate) struct Nibbles {
    /// What the nibble of a symbol is more than that of its pair byte.
    shift: i16,
    /// The symbol byte of nibble 0.
    bias: u8,
    /// Whether nibble 0 is an escape.
    escapes: bool,
}

impl Nibbles {
    /// Of pair bytes in a window. `bias`: the symbol byte of nibble 0, an escape with `escapes`.
    pub(crate) fn new(window: Window, bias: u8, escapes: bool) -> Nibbles {
        Nibbles { shift: i16::from(window.base()) - i16::from(bias), bias, escapes }
    }

    /// Whether the pair bytes are lines but for a constant: with escapes if the window is -8..=7 or -7..=8, one symbol
    /// more than has a nibble.
    pub(crate) fn straight(self, window: Window) -> bool {
        window.raw_bits() == 0 && (!self.escapes || (0..=1).contains(&self.shift))
    }

    pub(crate) fn escapes(self) -> bool {
        self.escapes
    }

    /// What both nibbles of a line are more than those of the pair bytes, modulo 16.
    pub(crate) fn shift_byte(self) -> u8 {
        17 * (self.shift & 15) as u8
    }

    /// The symbol byte that nibble 0 escapes if it is not listed: the one symbol of the window that has no nibble.
    fn escaped(self) -> u8 {
        if self.shift == 0 { self.bias } else { self.bias + 16 }
    }

    /// Whether all symbols of these pairs have a nibble, and none an escape.
    pub(crate) fn clean(self, pairs: impl Iterator<Item = u8>) -> bool {
        let least = i16::from(self.escapes);
        pairs
            .map(i16::from)
            .fold(true, |clean, pair| clean & [pair % 16, pair / 16].iter().all(|nibble| (least..16).contains(&(nibble + self.shift))))
    }

    /// The nibble of a symbol, if it has one that is not an escape.
    fn of(self, byte: u8) -> Option<u8> {
        let nibble = byte.wrapping_sub(self.bias);
        (u8::from(self.escapes)..16).contains(&nibble).then_some(nibble)
    }

    /// Puts the listed symbols of the row tile `row_tile` of a chunk in their places, and the escaped bytes of the
    /// row tile into `out`; returns how many they are. `scan`: whether there may be escapes that are not listed.
    pub(crate) fn finish(
        self,
        level: Level,
        row_tile: usize,
        lines: &mut [TileBytes],
        listed: &mut Peekable<impl Iterator<Item = (usize, u8)>>,
        mut scan: bool,
        out: &mut [u8],
    ) -> Option<usize> {
        let symbols = 2 * TILE_SYMBOLS * lines.len();
        let start = row_tile * symbols;
        let mut wide = Vec::new();
        while let Some((position, byte)) = listed.next_if(|(position, _)| *position < start + symbols) {
            let position = position - start;
            let (step, lane) = (position / TILE_SYMBOLS, position % TILE_SYMBOLS);
            if i16::from(nibble(lines, step, lane)) != i16::from(LISTED_NIBBLE) + self.shift {
                return None;
            }
            let own = self.of(byte);
            if own.is_none() {
                wide.push((position, byte));
            }
            let place = &mut lines[step / 2][lane];
            *place = *place & (0xf0 >> (4 * (step % 2))) | own.unwrap_or(0) << (4 * (step % 2));
        }
        scan |= !wide.is_empty();
        match (scan, self.escapes) {
            (false, _) => Some(0),
            (true, true) => Some(take_escapes(level, lines, self.escaped(), &wide, out)),
            (true, false) => None,
        }
    }

    /// Lines of tiles of pairs of one row tile, of which the first is the `step`th of the chunk, and their escaped bytes into
    /// `out`; returns how many of the latter, or `None` if a listed symbol was not coded as such.
    ///
    /// `raw`: of the chunk; `bytes`: room for the tiles' symbol bytes; `out`: as for [`narrow_pairs`].
    #[allow(clippy::too_many_arguments)] // What a chunk decodes to, and where it goes.
    pub(crate) fn narrow(
        self,
        level: Level,
        window: Window,
        raw: RawLines<'_>,
        step: usize,
        pairs: &[TileBytes],
        listed: &mut Peekable<impl Iterator<Item = (usize, u8)>>,
        bytes: &mut [u8],
        lines: &mut [TileBytes],
        out: &mut [u8],
    ) -> Option<usize> {
        let raw = raw.skip(step);
        let (start, end) = (2 * step * TILE_SYMBOLS, 2 * (step + pairs.len()) * TILE_SYMBOLS);
        if listed.peek().is_none_or(|(position, _)| *position >= end) {
            return Some(narrow_pairs(level, window.base(), self, raw, pairs, lines, out));
        }
        let bytes = &mut bytes[..end - start];
        split(level, window.base(), raw, pairs, bytes.as_chunks_mut().0);
        let own = std::iter::from_fn(|| listed.next_if(|(position, _)| *position < end));
        if !put_listed(own.map(|(position, byte)| (position - start, byte)), window.listed_byte(), bytes) {
            return None;
        }
        Some(narrow_row_tile(level, bytes.as_chunks().0, self.bias, self.escapes.into(), lines, out))
    }
}

per_isa! {
    /// Lines of nibbles of tiles of pairs without listed symbols, and escaped bytes; returns how many of the latter.
    /// `base`: the symbol byte of the window's first symbol; `escaped`: room for as many bytes as there are symbols,
    /// and 64 more.
    fn narrow_pairs(
        isa;
        base: u8,
        nibbles: Nibbles,
        raw: RawLines<'_>,
        pairs: &[TileBytes],
        lines: &mut [TileBytes],
        escaped: &mut [u8],
    ) -> usize {
        by_raw_bits!(raw.bits(), narrow_raw(isa, base, nibbles, raw, pairs, lines, escaped))
    }
}

#[inline(always)]
fn narrow_raw<I: Isa, const R: u32>(
    isa: I,
    base: u8,
    nibbles: Nibbles,
    raw: RawLines<'_>,
    pairs: &[TileBytes],
    lines: &mut [TileBytes],
    escaped: &mut [u8],
) -> usize {
    assert!(escaped.len() >= (2 * pairs.len() + 1) * TILE_SYMBOLS);
    let form = [isa.splat(base), isa.splat(nibbles.bias), isa.splat(nibbles.escapes.into())];
    let mut next = escaped.as_mut_ptr();
    // As in the product, fours that begin with a raw line.
    let (fours, rest) = if raw.starts_line() { pairs.as_chunks::<4>() } else { (&[][..], pairs) };
    let (lines, last_lines) = lines.split_at_mut(4 * fours.len());
    // SAFETY: at most 64 bytes a tile of symbols are written before the 64 of a line's, so that these are left, as
    // just asserted.
    unsafe {
        for (i, (pairs, lines)) in fours.iter().zip(lines.as_chunks_mut::<4>().0).enumerate() {
            let symbols = raw.symbols_of_four::<I, R>(isa, i, pairs);
            for turn in 0..4 {
                narrow_line(isa, form, symbols[turn], &mut lines[turn], &mut next);
            }
        }
        let raw = raw.skip(4 * fours.len());
        for (i, (pairs, line)) in rest.iter().zip(last_lines).enumerate() {
            narrow_line(isa, form, raw.symbols::<I, R>(isa, i, isa.load(pairs)), line, &mut next);
        }
    }
    next.addr() - escaped.as_ptr().addr()
}

/// One line of nibbles. `form`: the symbol byte of the window's first symbol, that of nibble 0, and the least nibble
/// that is not an escape; `symbols`: counted from the window's first.
///
/// # Safety
/// As [`narrow`], for both symbols.
#[inline(always)]
unsafe fn narrow_line<I: Isa>(isa: I, form: [I::Tile; 3], symbols: (I::Tile, I::Tile), line: &mut TileBytes, next: &mut *mut u8) {
    let [base, bias, lowest] = form;
    // The memory under the lines is read before they are written.
    prefetch(line.as_ptr().wrapping_add(LINES_AHEAD_BYTES));
    // SAFETY: by the contract.
    unsafe {
        let low = narrow(isa, isa.add_bytes(symbols.0, base), bias, lowest, next);
        let high = narrow(isa, isa.add_bytes(symbols.1, base), bias, lowest, next);
        isa.store(isa.pair(low, high), line);
    }
}

per_isa! {
    /// The escaped bytes of a row tile; returns how many. `wide`: positions and bytes, ascending, of those that
    /// are not `usual`.
    fn take_escapes(isa; lines: &[TileBytes], usual: u8, wide: &[(usize, u8)], out: &mut [u8]) -> usize {
        let (mut wide, mut taken) = (wide.iter().peekable(), 0);
        for (i, line) in lines.iter().enumerate() {
            let zeros = isa.zero_nibbles(isa.load(line));
            if zeros == [0, 0] {
                continue;
            }
            for (half, mut lanes) in zeros.into_iter().enumerate() {
                while lanes != 0 {
                    let position = (2 * i + half) * TILE_SYMBOLS + lanes.trailing_zeros() as usize;
                    out[taken] = wide.next_if(|(own, _)| *own == position).map_or(usual, |(_, byte)| *byte);
                    taken += 1;
                    lanes &= lanes - 1;
                }
            }
        }
        taken
    }
}

/// A segment of a row tile of a chunk.
#[derive(Clone, Copy, Default)]
struct Place {
    row_tile: usize,
    segment: usize,
}

impl Place {
    /// Its tiles of pairs: those of the segment's columns.
    #[inline(always)]
    fn steps(self, product: &Product<'_>) -> usize {
        self.q(product).len() / 2
    }

    /// The activations of its steps.
    #[inline(always)]
    fn q<'a>(self, product: &Product<'a>) -> &'a [[i8; TILE_COLS]] {
        let (q, steps) = (product.x.q, product.segment_steps);
        &q[self.segment * steps..q.len().min((self.segment + 1) * steps)]
    }

    #[inline(always)]
    fn next(self, product: &Product<'_>) -> Place {
        let next = Place { segment: self.segment + 1, ..self };
        if next.segment < product.segments { next } else { Place { row_tile: self.row_tile + 1, segment: 0 } }
    }
}

/// Tiles of pairs of whole segments, of each stream as many.
#[derive(Clone, Copy)]
struct Blocks<'a> {
    /// Raw bits of the streams, from their beginnings on.
    raw: &'a [RawLines<'a>],
    /// (streams, steps)
    pairs: &'a [TileBytes],
    /// The first segment.
    start: Place,
    /// Tiles of a stream before these.
    step: usize,
    /// Tiles of a stream.
    steps: usize,
}

per_isa! {
    /// Adds the products of the blocks to their row tiles' sums, and scales those that are complete. `listed`: of each stream;
    /// `sums`: (streams, row tiles of a chunk).
    fn multiply_blocks(
        isa;
        product: Product<'_>,
        blocks: Blocks<'_>,
        listed: &mut [Listed<impl Iterator<Item = (usize, u8)>>],
        sums: &mut [[f32; TILE_ROWS]],
    ) {
        by_raw_bits!(blocks.raw[0].bits(), multiply_raw(isa, product, blocks, listed, sums))
    }
}

/// As [`multiply_blocks`], of symbols with `R` raw bits.
#[inline(always)]
fn multiply_raw<I: Isa, const R: u32>(
    isa: I,
    product: Product<'_>,
    blocks: Blocks<'_>,
    listed: &mut [Listed<impl Iterator<Item = (usize, u8)>>],
    sums: &mut [[f32; TILE_ROWS]],
) {
    let row_tiles = sums.len() / listed.len();
    let mut first = 0;
    for (listed, sums) in listed.chunks_mut(TOGETHER).zip(sums.chunks_mut(TOGETHER * row_tiles)) {
        match listed {
            [one] => multiply_streams::<I, R, 1>(isa, product, blocks, first, std::array::from_mut(one), sums),
            more => {
                let listed: &mut [_; TOGETHER] = more.try_into().expect("a group of streams");
                multiply_streams::<I, R, TOGETHER>(isa, product, blocks, first, listed, sums);
            }
        }
        first += TOGETHER;
    }
}

/// As [`multiply_raw`], of `N` streams from `first` on.
#[inline(always)]
fn multiply_streams<I: Isa, const R: u32, const N: usize>(
    isa: I,
    product: Product<'_>,
    blocks: Blocks<'_>,
    first: usize,
    listed: &mut [Listed<impl Iterator<Item = (usize, u8)>>; N],
    sums: &mut [[f32; TILE_ROWS]],
) {
    let row_tiles = sums.len() / N;
    let (mut place, mut step) = (blocks.start, 0);
    while step < blocks.steps {
        let row_tile = place.row_tile;
        let scales: [_; N] = std::array::from_fn(|i| product.scales.tile(product.first + (first + i) * row_tiles + row_tile));
        let mut acc: [_; N] = std::array::from_fn(|i| sums[i * row_tiles + row_tile]);
        while step < blocks.steps && place.row_tile == row_tile {
            let steps = place.steps(&product);
            let pairs = std::array::from_fn(|i| &blocks.pairs[(first + i) * blocks.steps + step..][..steps]);
            let raw = std::array::from_fn(|i| blocks.raw[first + i].skip(blocks.step + step));
            // What is compiled for scales of rows, the usual ones, asks no more about them.
            if let TileScales::Row(_) = scales[0] {
                multiply_segment::<I, R, N, true>(isa, product, pairs, raw, listed, place, scales, &mut acc);
            } else {
                multiply_segment::<I, R, N, false>(isa, product, pairs, raw, listed, place, scales, &mut acc);
            }
            (step, place) = (step + steps, place.next(&product));
        }
        for (i, mut acc) in acc.into_iter().enumerate() {
            if place.row_tile > row_tile {
                finish_rows(scales[i], &mut acc);
            }
            sums[i * row_tiles + row_tile] = acc;
        }
    }
}

/// As [`multiply_streams`], of one segment. `ROWS`: the scales are of rows.
#[inline(always)]
#[allow(clippy::too_many_arguments)] // What a segment is multiplied with, and where its sums go.
fn multiply_segment<I: Isa, const R: u32, const N: usize, const ROWS: bool>(
    isa: I,
    product: Product<'_>,
    pairs: [&[TileBytes]; N],
    raw: [RawLines<'_>; N],
    listed: &mut [Listed<impl Iterator<Item = (usize, u8)>>; N],
    place: Place,
    scales: [TileScales<'_>; N],
    acc: &mut [[f32; TILE_ROWS]; N],
) {
    let Product { base, x, .. } = product;
    let (q, xscale, xsum) = (place.q(&product), x.scales[place.segment], x.sums[place.segment]);
    // Two sums for either symbol, since a product waits four cycles for the one before.
    let mut dots = [[(isa.zero(), isa.zero()); 2]; N];
    // Fours that begin with a raw line have all of their lines' bits.
    let fours = if raw[0].starts_line() { q.len() / 8 } else { 0 };
    let (q_fours, q_rest) = q.split_at(8 * fours);
    for (four, q) in q_fours.as_chunks::<8>().0.iter().enumerate() {
        let of: [&[TileBytes; 4]; N] = std::array::from_fn(|i| &pairs[i].as_chunks().0[four]);
        let mut symbols = [[(isa.splat(0), isa.splat(0)); 4]; N];
        for i in 0..N {
            symbols[i] = raw[i].symbols_of_four::<I, R>(isa, four, of[i]);
        }
        for turn in 0..4 {
            let q: [&[i8; TILE_COLS]; 2] = [&q[2 * turn], &q[2 * turn + 1]];
            for i in 0..N {
                dots[i][turn % 2] = dot_pairs::<I, R>(isa, dots[i][turn % 2], isa.load(&of[i][turn]), symbols[i][turn], q);
            }
        }
    }
    for (step, q) in q_rest.as_chunks::<2>().0.iter().enumerate() {
        let step = 4 * fours + step;
        for i in 0..N {
            let tile = isa.load(&pairs[i][step]);
            let symbols = raw[i].symbols::<I, R>(isa, step, tile);
            dots[i][0] = dot_pairs::<I, R>(isa, dots[i][0], tile, symbols, [&q[0], &q[1]]);
        }
    }
    // With nibbles where they stand the bias is that of the window, else that of symbol bytes.
    let (q_sum, base) = if R == 0 { (0, i32::from(base) - i32::from(SYMBOL_BIAS)) } else { (xsum, base.into()) };
    let more = base * xsum;
    each_chunk!(N, |i| {
        let [one, two] = dots[i];
        let (first, second) = (isa.add(one.0, two.0), isa.add(one.1, two.1));
        let dots = if R == 0 { isa.join_nibbles(first, second) } else { isa.add(first, second) };
        let floats = if listed[i].any(pairs[i].len()) {
            isa.floats_of(&with_listed(isa.finish(dots, q_sum), more, &mut listed[i], pairs[i], q))
        } else {
            isa.finish_floats(dots, q_sum, more)
        };
        let scales = if ROWS { SegmentScales::Row } else { SegmentScales::of(scales[i], place.segment) };
        scales.add_floats(isa, &mut acc[i], floats, xscale, xsum);
    });
}

/// A segment's sums, `more` and what its listed symbols add. Not inlined: sums that are indexed would be kept in memory for all segments.
#[cold]
#[inline(never)]
fn with_listed(
    sums: [i32; TILE_ROWS],
    more: i32,
    listed: &mut Listed<impl Iterator<Item = (usize, u8)>>,
    pairs: &[TileBytes],
    q: &[[i8; TILE_COLS]],
) -> [i32; TILE_ROWS] {
    let mut sums = sums.map(|sum| sum + more);
    listed.add(pairs, q, &mut sums);
    sums
}

/// Adds the products of both symbols of a tile of pairs to their sums. Without raw bits nibbles are multiplied
/// where they stand.
#[inline(always)]
fn dot_pairs<I: Isa, const R: u32>(
    isa: I,
    sums: (I::Sums, I::Sums),
    pairs: I::Tile,
    symbols: (I::Tile, I::Tile),
    q: [&[i8; TILE_COLS]; 2],
) -> (I::Sums, I::Sums) {
    if R == 0 {
        (isa.dot_low(sums.0, pairs, q[0]), isa.dot_high(sums.1, pairs, q[1]))
    } else {
        (isa.dot(sums.0, symbols.0, q[0]), isa.dot(sums.1, symbols.1, q[1]))
    }
}

#[cfg(test)]
mod tests {
    use tersor_codec::Codec;
    use tersor_format::EncodedTensor;

    use super::*;
    use crate::source::{chunks_together, symbols_of};
    use crate::testing::{by_codec, gaussian, levels};

    /// Gaussian symbols about `mean`, one in a thousand far if `far`.
    fn tensor(rows: usize, cols: usize, deviation: f64, mean: f64, far: bool, chunk_symbols: u32) -> EncodedTensor {
        gaussian(Codec::RansPairs, rows, cols, deviation, mean, far, chunk_symbols)
    }

    /// The chunks at all levels with kernels, in the runs in which tasks take them.
    fn each_run(tensor: &CodedTensor, mut test: impl FnMut(Level, &Chunks<'_>, Range<usize>)) {
        for level in levels() {
            let Some(kernel) = Chunks::new(level, tensor) else {
                assert_eq!(level, Level::Scalar);
                continue;
            };
            let together = chunks_together(tensor.table());
            for start in (0..tensor.chunk_count()).step_by(together) {
                test(level, &kernel, start..tensor.chunk_count().min(start + together));
            }
        }
    }

    /// Deviations whose best windows have no, one and two raw bits.
    const DEVIATIONS: [(f64, u8); 5] = [(0.4, 0), (1.1, 0), (2.0, 0), (3.4, 1), (9.0, 2)];

    /// No kernel gives up, with one to six chunks at once and a shorter last one, and row tiles that begin within
    /// a pair.
    #[test]
    fn symbol_bytes_are_those_of_the_codec() {
        for (deviation, raw_bits) in DEVIATIONS {
            for (row_tiles, cols, far) in (1..=15).flat_map(|n| [(n, 128, false), (n, 36, true), (n, 4, true), (n, 1100, true)]) {
                let encoded = tensor(row_tiles * 16, cols, deviation, 0.0, far, 2 * 16 * cols as u32);
                let tensor = encoded.tensor();
                if cols == 1100 && row_tiles == 15 {
                    assert_eq!(Chunks::new(Level::best(), tensor).map_or(raw_bits, |kernel| kernel.window.raw_bits()), raw_bits);
                }
                each_run(tensor, |level, kernel, chunks| {
                    let (want, want_far) = by_codec(tensor, chunks.clone());
                    let (mut bytes, mut far) = (vec![0; symbols_of(tensor, &chunks)], Vec::new());
                    assert!(kernel.decode(chunks, &mut PairBuffers::default(), &mut bytes, &mut far));
                    assert!(bytes == want && far == want_far, "{level} {deviation} {row_tiles} {cols}");
                });
            }
        }
    }

    /// Lines of windows that agree with the form and of others, with and without escapes.
    #[test]
    fn lines_are_narrowed_symbol_bytes() {
        let mut straight = [0; 4];
        for (deviation, mean, far) in
            DEVIATIONS.iter().flat_map(|&(deviation, _)| [(deviation, 0.0, false), (deviation, 0.4, true), (deviation, -30.0, false)])
        {
            let encoded = tensor(11 * 16, 520, deviation, mean, far, 2 * 16 * 520);
            let tensor = encoded.tensor();
            let least = by_codec(tensor, 0..tensor.chunk_count()).0.into_iter().min().unwrap();
            each_run(tensor, |level, kernel, chunks| {
                for (bias, escapes) in [(120, true), (least, false), (least + 1, false)] {
                    let (bytes, want_far) = by_codec(tensor, chunks.clone());
                    let row_tiles = bytes.len() / TILE_SYMBOLS / tensor.col_steps();
                    let mut want = (vec![[0; TILE_SYMBOLS]; bytes.len() / 128], vec![0; row_tiles], vec![0; bytes.len() + 64]);
                    let mut got = want.clone();
                    let mut taken = 0;
                    let tiles = bytes.as_chunks().0.chunks(tensor.col_steps());
                    for ((tiles, lines), offset) in tiles.zip(want.0.chunks_mut(tensor.col_steps() / 2)).zip(&mut want.1) {
                        *offset = taken as u32;
                        taken += narrow_row_tile(Level::Scalar, tiles, bias, escapes.into(), lines, &mut want.2[taken..]);
                    }
                    let mut far = Vec::new();
                    let mut buffers = PairBuffers::default();
                    let found =
                        kernel.decode_lines(chunks.clone(), &mut buffers, bias, escapes, &mut got.0, &mut got.1, &mut got.2, &mut far);
                    let what = format!("{level} {deviation} {mean} {bias} {escapes}");
                    assert_eq!(found, (escapes || taken == 0).then_some(taken), "{what}");
                    if found.is_some() {
                        assert!(got.0 == want.0 && got.1 == want.1 && got.2[..taken] == want.2[..taken] && far == want_far, "{what}");
                        let shift = i16::from(kernel.window.base()) - i16::from(bias);
                        let way = usize::from(kernel.window.raw_bits() > 0) * 3 + usize::from(shift != 0) + usize::from(shift == 1);
                        straight[way.min(3)] += 1;
                    }
                }
            });
        }
        if levels().len() > 1 {
            assert!(straight.iter().all(|count| *count > 0), "all ways were tried: {straight:?}");
        }
    }

    /// Products that the fused kernel leaves to others, and those that it may not.
    #[test]
    fn products_are_given_up_for_a_reason_only() {
        for (cols, far, expected) in [(64, false, true), (520, false, true), (66, false, false), (36, false, false), (64, true, false)] {
            let encoded = tensor(5 * 16, cols, 3.4, 0.0, far, 16 * 70);
            let (tensor, scales) = (encoded.tensor(), KernelScales::from_coded(encoded.tensor()).unwrap());
            let x = Activations::quantize(Level::Scalar, &vec![1.0; cols], 1, cols, scales.segment());
            let mut done = true;
            each_run(tensor, |_, kernel, chunks| {
                let mut sums = vec![[0.0; TILE_ROWS]; symbols_of(tensor, &chunks) / TILE_SYMBOLS / tensor.col_steps()];
                done &= kernel.dot(chunks, &mut PairBuffers::default(), &scales, &x, &mut sums);
            });
            assert!(done == expected || levels().len() == 1, "{cols} columns, far {far}");
        }
    }
}
