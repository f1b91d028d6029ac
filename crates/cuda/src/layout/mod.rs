//! Device layouts of a weight matrix, and their encoders: the host side, which needs no GPU.
//!
//! | layout | bits per weight | what it is for |
//! |---|---|---|
//! | [`quad`] | about entropy + 3 % | coded: the kernel decodes it inside the product |
//! | [`plain`] | 4, 5 or 6 | decoded: nibbles and up to two raw low bits |
//!
//! Both cut a matrix into *tiles* of 16 rows × `tile_cols` columns ([`Geometry`]), one warp each, in the fragment order of the tensor cores
//! (`mma.m16n8k32.s8`, see [`fragment`]); tile `t` = column segment · row tiles + row tile. Both split a symbol into
//! *high* = symbol >> `low_bits`, kept to −8..=7 so that it fits a nibble, and `low_bits` raw bits (0, 1 or 2), and list the symbols whose
//! high part does not fit, the *far* symbols, tile by tile ([`FarList`]). Hence any i16 can be held.
//!
//! Every encoder gives the same arrays for any number of threads, every layout has a scalar decoder, the oracle of the kernels, which
//! refuses damaged arrays, and the constants that kernels share come from here ([`header`]).
//!
//! # Padding
//! Rows are padded to whole row tiles and columns to whole tiles, with symbol 0. A *group* of matrices that meet the same activations
//! (q, k, v; gate, up) is one matrix whose parts each begin at a row tile ([`Stack`]).

pub mod fragment;
pub mod parallel;
pub mod plain;
pub mod quad;

mod book;
mod far;
mod geometry;
mod header;
mod oracle;
mod plan;
mod ring;
mod source;
mod statistics;
mod tile;

use thiserror::Error;

pub use book::Book;
pub use far::FarList;
pub use geometry::Geometry;
pub use header::header;
pub use plain::Plain;
pub use plan::QuadParams;
pub use quad::QuadMatrix;
pub use source::{Source, Stack};
pub use statistics::Statistics;

/// Rows of a tile: the rows of one `mma.m16n8k32` fragment.
pub const TILE_ROWS: usize = 16;
/// Columns of a superstep: the run between two looks at the ring, and the columns that share one activation scale.
pub const SUPERSTEP_COLS: usize = 128;
/// Most supersteps in a tile: their schedule, two bits each, fills a u64.
pub const SUPERSTEPS_MAX: usize = 32;
/// Most columns of a tile.
pub const TILE_COLS_MAX: usize = SUPERSTEP_COLS * SUPERSTEPS_MAX;
/// Threads of a warp.
pub const LANES: usize = 32;
/// Blocks that share the positions of a head in attention; their results meet where the next product's activations are prepared.
pub const ATTENTION_SPLITS: usize = 8;
/// Warps of a crew of attention.
pub const ATTENTION_WARPS: usize = 8;
/// Warps of a block of the kernel that computes a whole step.
pub const STEP_WARPS: usize = 16;
/// Widest residual stream that its registers hold, in columns.
pub const STEP_HIDDEN_MAX: usize = 8192;
/// Supersteps of weights, 1 KiB each, in a slot of a warp's ring.
pub const STEP_SLOT: usize = 2;
/// Slots that a warp has ahead before it asks for one only when the one before has come.
pub const STEP_PACE: usize = 2;
/// Slots of a warp that wait in the L2 cache behind its ring, and the cycles between two that are asked for.
pub const STEP_FETCHED: usize = 4;
/// See [`STEP_FETCHED`].
pub const STEP_FETCH_CYCLES: usize = 4000;
/// Bit streams of a tile: two per lane, one for each of its rows. Stream = lane + 32 · (row >= 8).
pub const STREAMS: usize = 2 * LANES;
/// Words of each stream in a group of the ring ("rows" of words).
pub const GROUP_WORDS: usize = 4;
/// Groups that the ring holds; the first is stored twice.
pub const RING_GROUPS: usize = 4;
/// Words that every stream has at least: they fill the ring before the header is known.
pub const STREAM_WORDS_MIN: usize = GROUP_WORDS * RING_GROUPS;
/// Most raw low bits of a symbol.
pub const LOW_BITS_MAX: u32 = 2;
/// Longest code, in bits: the decoder takes two codes from one 32-bit window.
pub const CODE_BITS_MAX: u32 = 14;
/// Largest matrix, in weights with padding: lists are indexed by u32.
pub const WEIGHTS_MAX: usize = u32::MAX as usize;

/// A request that no layout can meet, or arrays that describe no matrix.
#[derive(Error, Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayoutError {
    /// A matrix without rows or columns, or too large a one.
    #[error("a matrix of {rows} x {cols} weights; allowed are 1..={WEIGHTS_MAX}, padding included")]
    Shape {
        /// Rows.
        rows: usize,
        /// Columns.
        cols: usize,
    },
    /// Symbols that are no whole number of rows.
    #[error("part {part} has {symbols} symbols, not a whole number of rows of {cols}")]
    PartialRow {
        /// Index of the part in its stack.
        part: usize,
        /// Symbols given.
        symbols: usize,
        /// Columns of the stack.
        cols: usize,
    },
    /// A parameter outside its range.
    #[error("{parameter} is {value}, allowed is {allowed}")]
    Parameter {
        /// Its name.
        parameter: &'static str,
        /// Its value.
        value: u32,
        /// What would be allowed.
        allowed: &'static str,
    },
    /// An array that is shorter or longer than the geometry asks for.
    #[error("{array} has {len} elements, {expected} expected")]
    ArrayLength {
        /// Name of the array.
        array: &'static str,
        /// Its length, in elements.
        len: usize,
        /// The length that fits.
        expected: usize,
    },
    /// A tile whose contents contradict each other.
    #[error("tile {tile}: {what}")]
    Tile {
        /// Index of the tile.
        tile: usize,
        /// What is wrong.
        what: &'static str,
    },
}
