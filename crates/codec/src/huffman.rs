//! Canonical Huffman codes.

use crate::FarList;
use crate::error::{DecodeError, ParamsError};

/// Parameters of `huffman`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Params {
    /// Longest code, 1..=12 bits.
    pub code_bits_max: u8,
    /// Interleaved bit streams, 1..=64.
    pub lanes: u8,
}

impl Params {
    /// The default.
    pub const DEFAULT: Self = Self { code_bits_max: 12, lanes: 4 };

    /// Refuses what the layout cannot hold.
    pub fn validate(&self) -> Result<(), ParamsError> {
        todo!()
    }
}

/// Static code lengths.
#[derive(Clone, Debug)]
pub struct Table {
    params: Params,
}

impl Table {
    /// Parameters.
    pub fn params(&self) -> Params {
        self.params
    }
    /// `2^code_bits_max` entries by the next bits of the stream: `symbol byte << 8 | code bits`.
    pub fn lookup(&self) -> &[u16] {
        todo!()
    }
    /// Entries (symbol byte, code bits), ascending.
    pub fn entries(&self) -> &[(u8, u8)] {
        todo!()
    }
    /// Whether ESCAPE has an entry.
    pub fn has_escape(&self) -> bool {
        todo!()
    }
}

/// The parts of a chunk.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// `u32` length of every lane's stream, bytes.
    pub lane_bytes: &'a [u8],
    /// The lanes' streams, one after the other.
    pub streams: &'a [u8],
    /// Escape bytes in symbol order.
    pub escapes: &'a [u8],
    /// Far symbols.
    pub far: FarList<'a>,
}

impl<'a> Chunk<'a> {
    /// Splits a chunk of `symbols` symbols into its parts; every length and the far list are checked.
    pub fn parse(params: Params, symbols: usize, chunk: &'a [u8]) -> Result<Self, DecodeError> {
        let _ = (params, symbols, chunk);
        todo!()
    }
}
