//! Interleaved rANS.

use crate::error::{DecodeError, ParamsError};
use crate::{FarList, Histogram};

/// Parameters of `rans`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Params {
    /// 16 or 32.
    pub state_bits: u8,
    /// 8 with 16-bit states, 16 with 32-bit states.
    pub word_bits: u8,
    /// Frequencies sum to `2^prob_bits`: 1..=8 with 16-bit states, 1..=12 with 32-bit states.
    pub prob_bits: u8,
    /// Interleaved states, 1..=64.
    pub lanes: u8,
}

impl Params {
    /// 16-bit states, tables of 128 slots: decodes in registers.
    pub const DEFAULT: Self = Self { state_bits: 16, word_bits: 8, prob_bits: 7, lanes: 64 };
    /// 32-bit states, tables of 4096 slots: within 0.01 bit of the entropy.
    pub const PRECISE: Self = Self { state_bits: 32, word_bits: 16, prob_bits: 12, lanes: 64 };

    /// Refuses what the layout cannot hold.
    pub fn validate(&self) -> Result<(), ParamsError> {
        todo!()
    }
    /// Lowest state after a symbol: `2^(state_bits - word_bits)`.
    pub fn state_min(&self) -> u32 {
        1 << (self.state_bits - self.word_bits)
    }
    /// Bytes of all initial states.
    pub fn states_bytes(&self) -> usize {
        usize::from(self.lanes) * usize::from(self.state_bits / 8)
    }
}

/// What a decoder looks up by slot (`state & (2^prob_bits - 1)`); all of `2^prob_bits` entries.
#[derive(Clone, Copy, Debug)]
pub struct Slots<'a> {
    /// Frequency of the slot's entry; at most 255 with 16-bit states unless it is 256 (a lone entry is capped, see Table).
    pub freq: &'a [u16],
    /// Slot minus the entry's cumulative frequency.
    pub offset: &'a [u16],
    /// The entry's symbol byte; 0 is [`crate::ESCAPE`].
    pub symbol_byte: &'a [u8],
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
    #[allow(dead_code)]
    fn build(_: Params, _: &Histogram) -> Self {
        todo!()
    }
}

/// The parts of a chunk.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// Initial states.
    pub states: &'a [u8],
    /// Words, read forward.
    pub words: &'a [u8],
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
