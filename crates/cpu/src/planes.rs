//! `huffman` in planes, at every level: the sequences of a code tree's nodes merged from the leaves up.
//!
//! Computes: the symbol bytes of one chunk, stored or multiplied with one token; the root's merge ends in either sink, so that
//! fused symbols never reach memory.
//!
//! Layout: `tersor_codec::planes`. A merge takes 64 bits of a node's plane, and puts the next bytes of its right child into the
//! lanes of the ones and those of its left child into the lanes of the zeros. A leaf's bytes are all the same, so it needs no
//! sequence. In canonical codes a level's leaves come first: a node has two leaves, a leaf on the left, or none. The sequences
//! below the root lie in a thread's buffer, about 1.3 bytes for each symbol at 2.25 bits of entropy, which the L2 cache holds.
//!
//! Needs: 64 readable bytes behind each chunk; far symbols only where symbols are stored. Chunks of a lone symbol, which have no
//! planes, go to the codec's decoder.
//!
//! Cost: as many merges of 64 as the code has bits a symbol, over the 64 lanes. Nothing waits but the places in the sequences,
//! which popcounts advance. On Zen 4 an expand of 64 bytes takes 0.85 ns, so a merge of two inner nodes costs 1.7, one with a leaf 0.9,
//! two leaves 0.6; at AVX2 a merge is eight shuffles and costs 6.
//!
//! Measured (AMD EPYC, Zen 4, family 25 model 17, one of two shared cores, best of repeats, `cargo run --release -p tersor-cpu
//! --example gemv avx512 2 planes`), fused with the dot from the cache, G weights/s at 1.51, 2.25, 3.06 and 3.79 bits of entropy: 26.0,
//! 13.9, 6.3, 5.3 at AVX-512, where `rans` does 13.2 at each; 8.2, 5.4, 4.7, 3.8 at AVX2, where `rans` does 5.0, 4.9, 4.1, 3.9. The codec's
//! decoder of lanes does 0.9. It loses to `rans` at AVX-512 from about 2.3 bits on, since it pays for each bit, and everywhere in size.

use std::cell::RefCell;
use std::ops::Range;

use tersor_codec::planes::{self, Child, NODES_MAX, Plane};
use tersor_codec::{PADDING_BYTES, Table, huffman};
use tersor_format::CodedTensor;

use crate::buffer::AlignedBytes;
use crate::isa::{Isa, TileBytes, per_isa};
use crate::matmul::{SegmentScales, finish_rows};
use crate::source::{FarAt, count_zeros, take_far, with_padding};
use crate::{Activations, KernelScales, Level, TILE_COLS, TILE_ROWS, TILE_SYMBOLS, TokenBlock};

thread_local! {
    /// The sequences of the nodes below the root.
    static SEQUENCES: RefCell<AlignedBytes> = RefCell::default();
}

/// The table, if it codes in planes and these kernels were made for it.
pub(crate) fn table(table: &Table) -> Option<&huffman::Table> {
    match table {
        Table::Huffman(table) if table.params().has_planes() && !table.nodes().is_empty() => Some(table),
        _ => None,
    }
}

/// One chunk's parts, with the padding behind them.
struct Parts<'a> {
    table: &'a huffman::Table,
    symbols: usize,
    chunk: huffman::Chunk<'a>,
    planes: &'a [u8],
    escapes: &'a [u8],
}

impl<'a> Parts<'a> {
    /// `None` if the chunk is corrupt.
    fn new(table: &'a huffman::Table, tensor: &'a CodedTensor, chunk: usize) -> Option<Parts<'a>> {
        let padded = tensor.chunk_with_padding(chunk);
        let bytes = &padded[..padded.len() - PADDING_BYTES];
        let symbols = tensor.chunk_symbols(chunk);
        let chunk = huffman::Chunk::parse(table.params(), symbols, bytes).ok()?;
        let (planes, escapes) = (with_padding(padded, chunk.streams), with_padding(padded, chunk.escapes));
        Some(Parts { table, symbols, chunk, planes, escapes })
    }
}

/// Decodes a chunk to symbol bytes and adds its far symbols to `far`. False if it is corrupt: `out` and `far` may then have
/// changed.
pub(crate) fn decode(
    level: Level,
    table: &huffman::Table,
    tensor: &CodedTensor,
    chunk: usize,
    out: &mut [u8],
    far: &mut Vec<FarAt>,
) -> bool {
    let Some(parts) = Parts::new(table, tensor, chunk) else {
        return false;
    };
    SEQUENCES.with_borrow_mut(|sequences| store_chunk(level, &parts, sequences, out.as_chunks_mut().0))
        && take_far(tensor, chunk, parts.chunk.far, parts.chunk.escapes, out, far)
}

/// Multiplies consecutive chunks with the only token of `x`. `sums`: (row tiles of the chunks, 16).
///
/// False if a chunk has far symbols or is corrupt: `sums` are then of no use.
pub(crate) fn dot(
    level: Level,
    table: &huffman::Table,
    tensor: &CodedTensor,
    mut chunks: Range<usize>,
    scales: &KernelScales,
    x: &Activations,
    sums: &mut [[f32; TILE_ROWS]],
) -> bool {
    let mut rest = sums;
    chunks.all(|chunk| {
        let row_tiles = tensor.chunk_row_tiles(chunk);
        let (sums, after) = std::mem::take(&mut rest).split_at_mut(row_tiles.len());
        rest = after;
        let Some(parts) = Parts::new(table, tensor, chunk) else {
            return false;
        };
        parts.chunk.far.is_empty()
            && count_zeros(parts.chunk.escapes) == 0
            && SEQUENCES.with_borrow_mut(|sequences| dot_chunk(level, &parts, sequences, row_tiles.start, scales, x, sums))
    })
}

/// `$f::<_, INNER>(...)` for the number of inner nodes among a node's children.
macro_rules! by_inner {
    ($node:expr, $f:ident($($arg:expr),*)) => {
        match $node {
            [Child::Leaf(_), Child::Leaf(_)] => $f::<_, 0>($($arg),*),
            [Child::Leaf(_), Child::Inner(_)] => $f::<_, 1>($($arg),*),
            _ => $f::<_, 2>($($arg),*),
        }
    };
}

per_isa! {
    fn store_chunk(isa; parts: &Parts<'_>, sequences: &mut AlignedBytes, out: &mut [TileBytes]) -> bool {
        let Some(below) = Below::merge(isa, parts, sequences) else {
            return false;
        };
        by_inner!(parts.table.nodes()[0], store_root(isa, parts, &below, out))
    }
}

per_isa! {
    fn dot_chunk(isa; parts: &Parts<'_>, sequences: &mut AlignedBytes, row_tile: usize, scales: &KernelScales, x: &Activations, sums: &mut [[f32; TILE_ROWS]]) -> bool {
        let Some(below) = Below::merge(isa, parts, sequences) else {
            return false;
        };
        by_inner!(parts.table.nodes()[0], dot_root(isa, parts, &below, row_tile, scales, x, sums))
    }
}

#[inline(always)]
fn store_root<I: Isa, const INNER: usize>(isa: I, parts: &Parts<'_>, below: &Below<'_>, out: &mut [TileBytes]) -> bool {
    let mut root = Root::<I, INNER>::new(isa, parts, below);
    assert_eq!(out.len() * TILE_SYMBOLS, parts.symbols);
    for tile in out {
        // SAFETY: as many tiles as the chunk has.
        isa.store(unsafe { root.next() }, tile);
    }
    root.at_end()
}

#[inline(always)]
fn dot_root<I: Isa, const INNER: usize>(
    isa: I,
    parts: &Parts<'_>,
    below: &Below<'_>,
    row_tile: usize,
    scales: &KernelScales,
    x: &Activations,
    sums: &mut [[f32; TILE_ROWS]],
) -> bool {
    let mut root = Root::<I, INNER>::new(isa, parts, below);
    let TokenBlock { q, scales: xscales, sums: xsums, .. } = x.only();
    assert_eq!(sums.len() * q.len() * TILE_SYMBOLS, parts.symbols);
    for (i, acc) in sums.iter_mut().enumerate() {
        let tile_scales = scales.tile(row_tile + i);
        *acc = [0.0; TILE_ROWS];
        for (segment, q) in q.chunks(x.segment() / TILE_COLS).enumerate() {
            let mut dots = isa.zero();
            for q in q {
                // SAFETY: as many tiles as the chunk has.
                dots = isa.dot(dots, unsafe { root.next() }, q);
            }
            let sums = isa.finish_floats(dots, xsums[segment], 0);
            SegmentScales::of(tile_scales, segment).add_floats(isa, acc, sums, xscales[segment], xsums[segment]);
        }
        finish_rows(tile_scales, acc);
    }
    root.at_end()
}

/// Room between sequences: a merge of a last, partial tile writes up to 63 bytes more than its node has symbols, and reads 64
/// bytes from where a sequence ends.
const ROOM: usize = 2 * TILE_SYMBOLS;

/// The planes of a chunk, and the merged sequences of all nodes below the root.
struct Below<'a> {
    planes: [Plane; NODES_MAX],
    /// Where each sequence starts; of the root, and of leaves, nothing.
    starts: [usize; NODES_MAX],
    sequences: &'a [u8],
}

impl<'a> Below<'a> {
    /// `None` if the planes are corrupt.
    #[inline(always)]
    fn merge<I: Isa>(isa: I, parts: &Parts<'_>, sequences: &'a mut AlignedBytes) -> Option<Below<'a>> {
        let nodes = parts.table.nodes();
        let mut planes = [Plane::default(); NODES_MAX];
        planes::find(nodes, parts.symbols, parts.chunk.streams, &mut planes).ok()?;
        let mut starts = [0; NODES_MAX];
        let mut end = 0;
        for (start, plane) in starts.iter_mut().zip(&planes[..nodes.len()]).skip(1) {
            *start = end;
            end += plane.symbols.next_multiple_of(TILE_SYMBOLS) + ROOM;
        }
        // At most eight times the chunk's bytes, and the room.
        sequences.ensure(end);
        let buffer = sequences.as_mut_ptr();
        for (node, children) in nodes.iter().enumerate().skip(1).rev() {
            // SAFETY: children have greater indices, so their sequences are there; `ensure` gave each its room.
            unsafe {
                let out = buffer.add(starts[node]).cast::<TileBytes>();
                by_inner!(children, merge_node(isa, children, parts, planes[node], &starts, buffer, out));
            }
        }
        Some(Below { planes, starts, sequences })
    }
}

/// Merges the sequence of one node.
///
/// # Safety
/// `buffer` holds the children's sequences at their `starts`, with [`ROOM`] behind them; `out` has room for the node's symbols,
/// rounded up to tiles.
#[inline(always)]
unsafe fn merge_node<I: Isa, const INNER: usize>(
    isa: I,
    node: &planes::Node,
    parts: &Parts<'_>,
    plane: Plane,
    starts: &[usize; NODES_MAX],
    buffer: *const u8,
    out: *mut TileBytes,
) {
    // SAFETY: by the contract; a plane is inside the chunk, which has 64 readable bytes behind it.
    unsafe {
        let mut merge = Merge::<I, INNER>::new(isa, node, parts.planes.as_ptr().add(plane.start), starts, buffer);
        for tile in 0..plane.symbols.div_ceil(TILE_SYMBOLS) {
            isa.store(merge.next(), &mut *out.add(tile));
        }
    }
}

/// A node whose sequence is being merged.
struct Merge<I: Isa, const INNER: usize> {
    isa: I,
    /// The next bits.
    plane: *const u8,
    /// The bytes of children that are leaves.
    leaves: [I::Tile; 2],
    /// The next bytes of children that are not.
    next: [*const u8; 2],
}

impl<I: Isa, const INNER: usize> Merge<I, INNER> {
    /// # Safety
    /// As for [`merge_node`].
    #[inline(always)]
    unsafe fn new(isa: I, node: &planes::Node, plane: *const u8, starts: &[usize; NODES_MAX], buffer: *const u8) -> Self {
        let mut merge = Merge { isa, plane, leaves: [isa.splat(0); 2], next: [buffer; 2] };
        for (side, child) in node.iter().enumerate() {
            match *child {
                Child::Leaf(byte) => merge.leaves[side] = isa.splat(byte),
                // SAFETY: by the contract.
                Child::Inner(child) => merge.next[side] = unsafe { buffer.add(starts[usize::from(child)]) },
            }
        }
        merge
    }

    /// The next 64 symbols.
    ///
    /// # Safety
    /// Called at most once for each 64 symbols, or part of them, that reach the node.
    #[inline(always)]
    unsafe fn next(&mut self) -> I::Tile {
        // SAFETY: the plane has 8 bytes for each call, or the chunk's padding behind it. The ones before this call are symbols
        // of the right child and the zeros of the left one, so both places are at most at the end of a sequence.
        unsafe {
            let mask = u64::from_le_bytes(self.plane.cast::<[u8; 8]>().read());
            self.plane = self.plane.add(8);
            let ones = mask.count_ones() as usize;
            let tile = match INNER {
                0 => self.isa.select(mask, self.leaves[0], self.leaves[1]),
                1 => self.isa.expand(mask, self.leaves[0], self.next[1]),
                _ => self.isa.merge(mask, self.next[0], self.next[1]),
            };
            self.next[0] = self.next[0].wrapping_add(TILE_SYMBOLS - ones);
            self.next[1] = self.next[1].wrapping_add(ones);
            tile
        }
    }
}

/// The root, whose symbols are those of the chunk.
struct Root<'a, I: Isa, const INNER: usize> {
    merge: Merge<I, INNER>,
    escape: I::Tile,
    has_escapes: bool,
    /// With the padding behind them.
    escapes: &'a [u8],
    taken: usize,
}

impl<'a, I: Isa, const INNER: usize> Root<'a, I, INNER> {
    #[inline(always)]
    fn new(isa: I, parts: &Parts<'a>, below: &Below<'_>) -> Self {
        let plane = parts.planes[below.planes[0].start..].as_ptr();
        // SAFETY: `below` has the sequences of all children.
        let merge = unsafe { Merge::new(isa, &parts.table.nodes()[0], plane, &below.starts, below.sequences.as_ptr()) };
        Root { merge, escape: isa.splat(0), has_escapes: parts.table.has_escape(), escapes: parts.escapes, taken: 0 }
    }

    /// The next 64 symbol bytes.
    ///
    /// # Safety
    /// At most as many calls as the chunk has tiles, while the sequences below live.
    #[inline(always)]
    unsafe fn next(&mut self) -> I::Tile {
        // SAFETY: by the contract; escapes are read at their end at most, behind which 64 bytes are readable.
        unsafe {
            let tile = self.merge.next();
            if !self.has_escapes {
                return tile;
            }
            let at = self.taken.min(self.escapes.len() - PADDING_BYTES);
            let (tile, taken) = self.merge.isa.unescape(tile, self.escape, self.escapes.as_ptr().add(at));
            self.taken += taken;
            tile
        }
    }

    /// Whether all escapes are used and no more.
    fn at_end(&self) -> bool {
        self.taken == self.escapes.len() - PADDING_BYTES
    }
}
