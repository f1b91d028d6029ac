//! rANS in independent blocks.

use std::ops::Range;

use crate::FarList;
use crate::error::{DecodeError, ParamsError};
use crate::rans::Slots;

/// Parameters of `block-ans`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Params {
    /// 16 or 32.
    pub state_bits: u8,
    /// 8 with 16-bit states, 16 with 32-bit states.
    pub word_bits: u8,
    /// Frequencies sum to `2^prob_bits`: 1..=8 with 16-bit states, 1..=12 with 32-bit states.
    pub prob_bits: u8,
    /// Symbols in a block (the last may be shorter), 32..=16384.
    pub block_symbols: u32,
}

impl Params {
    /// The default.
    pub const DEFAULT: Self = Self { state_bits: 32, word_bits: 16, prob_bits: 12, block_symbols: 1024 };

    /// Refuses what the layout cannot hold.
    pub fn validate(&self) -> Result<(), ParamsError> {
        todo!()
    }
    /// Blocks in a chunk of `symbols` symbols.
    pub fn blocks(&self, symbols: usize) -> usize {
        symbols.div_ceil(self.block_symbols as usize)
    }
}

/// Static frequencies.
#[derive(Clone, Debug)]
pub struct Table {
    params: Params,
}

impl Table {
    /// Parameters.
    pub fn params(&self) -> Params {
        self.params
    }
    /// Decoding tables.
    pub fn slots(&self) -> Slots<'_> {
        todo!()
    }
    /// Entries (symbol byte, frequency), ascending.
    pub fn entries(&self) -> &[(u8, u16)] {
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
    /// `u16` length of every block, bytes.
    pub block_bytes: &'a [u8],
    /// All blocks, one after the other.
    pub blocks: &'a [u8],
    /// Far symbols (positions in the chunk).
    pub far: FarList<'a>,
}

impl<'a> Chunk<'a> {
    /// Splits a chunk of `symbols` symbols into its parts; every length and the far list are checked.
    pub fn parse(params: Params, symbols: usize, chunk: &'a [u8]) -> Result<Self, DecodeError> {
        let _ = (params, symbols, chunk);
        todo!()
    }
    /// Byte ranges of the blocks within `blocks`.
    pub fn block_ranges(&self) -> impl Iterator<Item = Range<usize>> + 'a {
        let mut start = 0;
        self.block_bytes.chunks_exact(2).map(move |length| {
            let range = start..start + usize::from(u16::from_le_bytes([length[0], length[1]]));
            start = range.end;
            range
        })
    }
}
