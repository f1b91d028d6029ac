//! Fixed-width fields.

use crate::FarList;
use crate::error::{DecodeError, ParamsError};

/// Parameters of `fixed`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Params {
    /// Bits of a field, 2..=8.
    pub bits: u8,
}

impl Params {
    /// Nibbles.
    pub const DEFAULT: Self = Self { bits: 4 };

    /// Refuses what the layout cannot hold.
    pub fn validate(&self) -> Result<(), ParamsError> {
        todo!()
    }
    /// Bytes of the fields of `symbols` symbols.
    pub fn field_bytes(&self, symbols: usize) -> usize {
        match self.bits {
            8 => symbols,
            4 => symbols.div_ceil(128) * 64,
            2 => symbols.div_ceil(256) * 64,
            bits => symbols.div_ceil(64) * 8 * usize::from(bits),
        }
    }
}

/// The window of symbols that have a field value of their own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Table {
    params: Params,
    base: i16,
    has_escape: bool,
}

impl Table {
    /// Parameters.
    pub fn params(&self) -> Params {
        self.params
    }
    /// First symbol of the window: that of field 1 with escape, of field 0 without.
    pub fn base(&self) -> i16 {
        self.base
    }
    /// Whether field 0 means an escaped symbol.
    pub fn has_escape(&self) -> bool {
        self.has_escape
    }
}

/// The parts of a chunk.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// Packed fields.
    pub fields: &'a [u8],
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
