//! `rans` chunks side by side: what the kernels of all levels share.
//!
//! A kernel takes up to six chunks of equal size at once, since one step of a chunk waits for the
//! step before, and gives their tiles to one of three sinks: [`decode`] stores them, [`decode_lines`] packs them to
//! the nibbles of the decoded form, and [`dot`] multiplies them with one token's activations; what the
//! last two take never reaches memory.
//!
//! Reads are optimistic: pointers run on, loads are clamped to the end of their stream, and only at
//! the end of the chunk are the pointers compared with where they must be and the states with
//! STATE_MIN. What is stored or summed before is nonsense if that fails, and then it is thrown
//! away.

use std::mem::MaybeUninit;
use std::ops::Range;

use tersor_codec::{PADDING_BYTES, rans};
use tersor_format::CodedTensor;

use super::{Isa, TileBytes, Tiles, each_chunk, prefetch_far};
use crate::decoded::{join_escaped, narrow_tiles};
use crate::matmul::{SegmentScales, finish_rows};
use crate::scales::TileScales;
use crate::source::{FarAt, count_zeros, equal_chunks, take_far, with_padding};
use crate::{Activations, KernelScales, TILE_COLS, TILE_ROWS, TILE_SYMBOLS, TokenBlock};

/// How far ahead of the words the memory is told what comes: some 50 steps. The processor's own
/// prefetcher stops at the end of a page, and here the next state waits for the bytes.
pub(super) const PREFETCH_BYTES: usize = 1024;

/// One chunk's parts, as pointers into the chunk with its padding.
pub(super) struct Stream<'a> {
    pub states: &'a [u8],
    /// The words, and as for the escapes the 64 bytes behind them, are readable for `'a`.
    pub words: Range<*const u8>,
    pub escapes: Range<*const u8>,
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
        Some(Stream { states: parts.states, words: range(parts.words), escapes: range(parts.escapes), chunk: parts })
    }

    /// Whether there are far symbols, or bytes that stand for them.
    fn has_far(&self) -> bool {
        !self.chunk.far.is_empty() || count_zeros(self.chunk.escapes) > 0
    }
}

/// A reader of one part of `N` chunks.
pub(super) struct Cursors<const N: usize> {
    next: [*const u8; N],
    end: [*const u8; N],
}

impl<const N: usize> Cursors<N> {
    /// `parts`: with 64 readable bytes behind each, for as long as the cursors are used.
    pub(super) fn new(parts: [&Range<*const u8>; N]) -> Cursors<N> {
        Cursors { next: parts.map(|part| part.start), end: parts.map(|part| part.end) }
    }

    pub(super) fn words(streams: &[Stream<'_>; N]) -> Cursors<N> {
        Cursors::new(streams.each_ref().map(|stream| &stream.words))
    }

    pub(super) fn escapes(streams: &[Stream<'_>; N]) -> Cursors<N> {
        Cursors::new(streams.each_ref().map(|stream| &stream.escapes))
    }

    /// What is left of part `i`; it begins behind its end if too much was taken.
    pub(super) fn rest(&self, i: usize) -> Range<*const u8> {
        self.next[i]..self.end[i]
    }

    /// Where 64 bytes are readable: the next byte, or the end if that is behind us.
    #[inline(always)]
    pub(super) fn readable(&self, i: usize) -> *const u8 {
        self.next[i].min(self.end[i])
    }

    #[inline(always)]
    pub(super) fn advance(&mut self, i: usize, bytes: usize) {
        self.next[i] = self.next[i].wrapping_add(bytes);
    }

    /// A place to prefetch: not necessarily a readable one.
    #[inline(always)]
    pub(super) fn ahead(&self, i: usize) -> *const u8 {
        self.next[i].wrapping_add(PREFETCH_BYTES)
    }

    pub(super) fn at_end(&self) -> bool {
        self.next == self.end
    }
}

/// `N` chunks in flight at one level.
pub(super) trait Decoder<const N: usize>: Sized {
    type Isa: Isa;
    type Tables;

    /// # Safety
    /// The features of `Isa`, here and below.
    unsafe fn new(tables: &Self::Tables, streams: &[Stream<'_>; N]) -> Self;
    /// Stores the next 64 symbol bytes of chunk `i` to `out`, which is writable. `spare`: whether the byte
    /// behind may be overwritten as well.
    unsafe fn store(&mut self, isa: Self::Isa, i: usize, out: *mut TileBytes, spare: bool);
    /// Adds the products of the next tiles of every chunk with `q` to the chunks' sums.
    unsafe fn dot(&mut self, isa: Self::Isa, sums: &mut [<Self::Isa as Isa>::Sums; N], q: &[[i8; TILE_COLS]]);
    /// Whether all chunks ended as their encoder began.
    unsafe fn valid(&self) -> bool;
}

/// Chunks of equal size.
#[derive(Clone, Copy)]
pub(crate) struct Group<'a> {
    params: rans::Params,
    tensor: &'a CodedTensor,
    first: usize,
    /// At least 1, at most the kernel's width.
    pub chunks: usize,
}

impl<'a> Group<'a> {
    /// The streams of the group's `N` chunks.
    fn streams<const N: usize>(&self) -> Option<[Stream<'a>; N]> {
        assert_eq!(self.chunks, N);
        let mut streams = [const { None }; N];
        for (i, stream) in streams.iter_mut().enumerate() {
            *stream = Some(Stream::new(self.params, self.tensor, self.first + i)?);
        }
        Some(streams.map(|s| s.expect("filled above")))
    }
}

/// What the chunks behind a group begin with, and their escapes, if they are like those of the group: fetched line by line while it
/// is decoded, for all at once the fetches stall, and so do all streams if these come from memory.
struct Ahead<const N: usize> {
    parts: [[*const u8; 2]; N],
}

impl<const N: usize> Ahead<N> {
    fn new(group: Group<'_>, streams: &[Stream<'_>; N]) -> Ahead<N> {
        let parts = std::array::from_fn(|i| {
            let chunk = (group.first + N + i).min(group.tensor.chunk_count() - 1);
            let bytes = group.tensor.chunk(chunk).as_ptr_range();
            let escapes = streams[i].escapes.end.addr() - streams[i].escapes.start.addr();
            [bytes.start, bytes.end.wrapping_sub(escapes)]
        });
        Ahead { parts }
    }

    /// Fetches the next line of each.
    #[inline(always)]
    fn fetch(&mut self) {
        for place in self.parts.as_flattened_mut() {
            prefetch_far(*place);
            *place = place.wrapping_add(64);
        }
    }
}

/// What a group of chunks is multiplied with.
#[derive(Clone, Copy)]
pub(crate) struct Factor<'a> {
    scales: &'a KernelScales,
    x: &'a Activations,
}

/// Where a group's lines of nibbles go, `symbol byte = nibble + bias`.
pub(crate) struct Lines<'a> {
    /// The symbol byte of nibble 0.
    pub bias: u8,
    /// Whether nibble 0 is an escape.
    pub escapes: bool,
    /// (row tiles, lines)
    pub lines: &'a mut [TileBytes],
    /// (row tiles): where each one's escaped bytes begin.
    pub offsets: &'a mut [u32],
    /// 64 bytes more than there are symbols.
    pub escaped: &'a mut [u8],
}

/// A kernel, with the tables of one tensor.
pub(crate) trait Kernel {
    /// Parameters of the table.
    fn params(&self) -> rans::Params;
    /// Chunks it takes at once.
    fn width(&self) -> usize;
    /// As [`store_group`].
    fn store(&self, group: Group<'_>, out: &mut [u8], far: &mut Vec<FarAt>) -> bool;
    /// As [`lines_group`].
    fn lines(&self, group: Group<'_>, out: Lines<'_>) -> Option<usize>;
    /// As [`dot_group`].
    fn dot(&self, group: Group<'_>, factor: Factor<'_>, sums: &mut [[f32; TILE_ROWS]]) -> bool;
}

/// Chunks in groups that decode side by side.
fn groups<'a>(kernel: &dyn Kernel, tensor: &'a CodedTensor, chunks: Range<usize>) -> impl Iterator<Item = Group<'a>> + use<'a> {
    let params = kernel.params();
    let groups = equal_chunks(tensor, chunks, kernel.width());
    groups.map(move |group| Group { params, tensor, first: group.start, chunks: group.len() })
}

/// Decodes consecutive chunks to symbol bytes, one behind the other, and adds their
/// far symbols to `far`.
///
/// False if a chunk is corrupt: `out` and `far` are then of no use.
pub(crate) fn decode(kernel: &dyn Kernel, tensor: &CodedTensor, chunks: Range<usize>, out: &mut [u8], far: &mut Vec<FarAt>) -> bool {
    let mut rest = out;
    groups(kernel, tensor, chunks).all(|group| {
        let (out, after) = std::mem::take(&mut rest).split_at_mut(group.chunks * tensor.chunk_symbols(group.first));
        rest = after;
        kernel.store(group, out, far)
    })
}

/// Decodes consecutive chunks to lines of nibbles. As in the decoded form the symbol bytes without a nibble of a row
/// tile follow each other in `escaped`, from its offset on. Returns how many there are.
///
/// `None` if a chunk has far symbols or is corrupt, or a symbol has no nibble and there are no escapes: all is then of
/// no use.
pub(crate) fn decode_lines(kernel: &dyn Kernel, tensor: &CodedTensor, chunks: Range<usize>, out: Lines<'_>) -> Option<usize> {
    let Lines { bias, escapes, mut lines, mut offsets, escaped } = out;
    let mut taken = 0;
    for group in groups(kernel, tensor, chunks) {
        let row_tiles = group.chunks * tensor.chunk_row_tiles(group.first).len();
        let (own, rest) = lines.split_at_mut(row_tiles * tensor.col_steps().div_ceil(2));
        let (own_offsets, rest_offsets) = offsets.split_at_mut(row_tiles);
        (lines, offsets) = (rest, rest_offsets);
        let more = kernel.lines(group, Lines { bias, escapes, lines: own, offsets: own_offsets, escaped: &mut escaped[taken..] })?;
        if !escapes && more > 0 {
            return None;
        }
        for offset in own_offsets {
            // At most 2^32 symbols, of which fewer are wide.
            *offset += taken as u32;
        }
        taken += more;
    }
    Some(taken)
}

/// Multiplies consecutive chunks with the only token of `x`. `sums`: (row tiles of
/// the chunks, 16).
///
/// False if a chunk has far symbols or is corrupt: `sums` are then of no use.
pub(crate) fn dot(
    kernel: &dyn Kernel,
    tensor: &CodedTensor,
    chunks: Range<usize>,
    scales: &KernelScales,
    x: &Activations,
    sums: &mut [[f32; TILE_ROWS]],
) -> bool {
    let mut rest = sums;
    groups(kernel, tensor, chunks).all(|group| {
        let (sums, after) = std::mem::take(&mut rest).split_at_mut(group.chunks * tensor.chunk_row_tiles(group.first).len());
        rest = after;
        kernel.dot(group, Factor { scales, x }, sums)
    })
}

/// The methods of [`Decoder`] that take tiles, for a decoder whose method `next` has them in registers.
macro_rules! tiles_in_registers {
    ($n:ident) => {
        #[inline(always)]
        unsafe fn store(&mut self, isa: Self::Isa, i: usize, out: *mut $crate::isa::TileBytes, _spare: bool) {
            // SAFETY: by the contract.
            unsafe { $crate::isa::Isa::store(isa, self.next(i), &mut *out) };
        }

        #[inline(always)]
        unsafe fn dot(&mut self, isa: Self::Isa, sums: &mut [<Self::Isa as $crate::isa::Isa>::Sums; $n], q: &[[i8; $crate::TILE_COLS]]) {
            for q in q {
                $crate::isa::each_chunk!($n, |i| {
                    // SAFETY: by the contract.
                    let tile = unsafe { self.next(i) };
                    sums[i] = $crate::isa::Isa::dot(isa, sums[i], tile, q);
                });
            }
        }
    };
}

pub(super) use tiles_in_registers;

/// The sink that stores.
///
/// # Safety
/// To be inlined below the features of `D`'s level, which `isa` proves.
#[inline(always)]
pub(super) unsafe fn store_group<D: Decoder<N>, const N: usize>(
    isa: D::Isa,
    tables: &D::Tables,
    group: Group<'_>,
    out: &mut [u8],
    far: &mut Vec<FarAt>,
) -> bool {
    let Some(streams) = group.streams::<N>() else {
        return false;
    };
    let symbols = group.tensor.chunk_symbols(group.first);
    let steps = symbols / TILE_SYMBOLS;
    let tiles: &mut [TileBytes] = out.as_chunks_mut().0;
    assert_eq!(tiles.len(), N * steps);
    let mut ahead = Ahead::new(group, &streams);
    // SAFETY: by the contract.
    let valid = unsafe {
        let mut decoder = D::new(tables, &streams);
        for step in 0..steps {
            if step.is_multiple_of(NARROWED_TILES) {
                ahead.fetch();
            }
            each_chunk!(N, |i| {
                // The tile behind is written later, but for that of the next chunk.
                decoder.store(isa, i, tiles.as_mut_ptr().add(i * steps + step), step + 1 < steps);
            });
        }
        decoder.valid()
    };
    valid
        && (group.first..)
            .zip(streams.iter().map(|s| &s.chunk).zip(out.chunks_exact(symbols)))
            .all(|(chunk, (parts, bytes))| take_far(group.tensor, chunk, parts.far, parts.escapes, bytes, far))
}

/// Tiles of a chunk that are decoded before they are narrowed: few, so that they stay in the L1 cache, and that the memory
/// takes lines all the time and not only between chunks.
const NARROWED_TILES: usize = 32;

/// The sink that narrows. Returns how many symbols have no nibble.
///
/// # Safety
/// As for [`store_group`].
#[inline(always)]
pub(super) unsafe fn lines_group<D: Decoder<N>, const N: usize>(
    isa: D::Isa,
    tables: &D::Tables,
    group: Group<'_>,
    out: Lines<'_>,
) -> Option<usize> {
    let streams = group.streams::<N>()?;
    if streams.iter().any(Stream::has_far) {
        return None;
    }
    let Lines { bias, escapes, lines, offsets, escaped } = out;
    let (symbols, col_steps) = (group.tensor.chunk_symbols(group.first), group.tensor.col_steps());
    let (row_tile_lines, row_tiles) = (col_steps.div_ceil(2), symbols / (col_steps * TILE_SYMBOLS));
    assert!(lines.len() == N * row_tiles * row_tile_lines && offsets.len() == N * row_tiles);
    // One more, whose first byte is spare.
    let mut tiles = [const { MaybeUninit::<Tiles<{ NARROWED_TILES + 1 }>>::uninit() }; N];
    // Of each chunk, which writes where there is room for all its symbols.
    let mut taken = [0; N];
    let mut ahead = Ahead::new(group, &streams);
    // SAFETY: by the contract, and for the tiles as in the comments below.
    let valid = unsafe {
        let mut decoder = D::new(tables, &streams);
        for row_tile in 0..row_tiles {
            for i in 0..N {
                // At most 2^32 symbols, of which fewer are wide.
                offsets[i * row_tiles + row_tile] = taken[i] as u32;
            }
            for start in (0..col_steps).step_by(NARROWED_TILES) {
                ahead.fetch();
                let count = NARROWED_TILES.min(col_steps - start);
                for step in 0..count {
                    each_chunk!(N, |i| {
                        // Behind the tile there is another.
                        decoder.store(isa, i, tiles[i].as_mut_ptr().cast::<TileBytes>().add(step), true);
                    });
                }
                for i in 0..N {
                    // As many were just stored.
                    let tiles = std::slice::from_raw_parts(tiles[i].as_ptr().cast(), count);
                    let lines = &mut lines[(i * row_tiles + row_tile) * row_tile_lines + start / 2..][..count.div_ceil(2)];
                    taken[i] += narrow_tiles(isa, tiles, bias, escapes.into(), lines, &mut escaped[i * symbols + taken[i]..]);
                }
            }
        }
        decoder.valid()
    };
    valid.then(|| join_escaped(symbols, &taken, offsets, escaped))
}

/// The sink that multiplies.
///
/// # Safety
/// As for [`store_group`].
#[inline(always)]
pub(super) unsafe fn dot_group<D: Decoder<N>, const N: usize>(
    isa: D::Isa,
    tables: &D::Tables,
    group: Group<'_>,
    factor: Factor<'_>,
    sums: &mut [[f32; TILE_ROWS]],
) -> bool {
    // Asked once: of each segment and chunk it would cost more than the sums do.
    // SAFETY: by the contract.
    unsafe {
        match factor.scales.tile(0) {
            TileScales::Row(_) => dot_group_scaled::<D, N, true>(isa, tables, group, factor, sums),
            TileScales::Group { .. } => dot_group_scaled::<D, N, false>(isa, tables, group, factor, sums),
        }
    }
}

/// As [`dot_group`]. `ROWS`: the scales are of rows.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn dot_group_scaled<D: Decoder<N>, const N: usize, const ROWS: bool>(
    isa: D::Isa,
    tables: &D::Tables,
    group: Group<'_>,
    factor: Factor<'_>,
    sums: &mut [[f32; TILE_ROWS]],
) -> bool {
    let Some(streams) = group.streams::<N>() else {
        return false;
    };
    if streams.iter().any(Stream::has_far) {
        return false;
    }
    let Factor { scales, x } = factor;
    let row_tiles = group.tensor.chunk_row_tiles(group.first);
    let TokenBlock { q, scales: xscales, sums: xsums, .. } = x.only();
    assert_eq!(q.len(), group.tensor.col_steps());
    assert_eq!(sums.len(), N * row_tiles.len());
    let mut ahead = Ahead::new(group, &streams);
    // SAFETY: by the contract.
    unsafe {
        let mut decoder = D::new(tables, &streams);
        for tile in 0..row_tiles.len() {
            let tile_scales: [TileScales<'_>; N] = std::array::from_fn(|i| scales.tile(row_tiles.start + i * row_tiles.len() + tile));
            let mut acc = [[0.0; TILE_ROWS]; N];
            for (segment, q) in q.chunks(x.segment() / TILE_COLS).enumerate() {
                ahead.fetch();
                let (xscale, xsum) = (xscales[segment], xsums[segment]);
                let mut dots = [isa.zero(); N];
                decoder.dot(isa, &mut dots, q);
                each_chunk!(N, |i| {
                    let scales = if ROWS { SegmentScales::Row } else { SegmentScales::of(tile_scales[i], segment) };
                    scales.add_floats(isa, &mut acc[i], isa.finish_floats(dots[i], xsum, 0), xscale, xsum);
                });
            }
            for i in 0..N {
                finish_rows(tile_scales[i], &mut acc[i]);
                sums[i * row_tiles.len() + tile] = acc[i];
            }
        }
        decoder.valid()
    }
}
