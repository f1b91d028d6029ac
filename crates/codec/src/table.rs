//! Static tables and the three operations on chunks.

use crate::error::{DecodeError, EncodeError, TableError};
use crate::{Codec, FarList, Histogram, block_ans, fixed, huffman, rans};

/// The static table of one tensor.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Table {
    /// See [`fixed`].
    Fixed(fixed::Table),
    /// See [`huffman`].
    Huffman(huffman::Table),
    /// See [`rans`].
    Rans(rans::Table),
    /// See [`block_ans`].
    BlockAns(block_ans::Table),
}

impl Table {
    /// The best table of `codec` for symbols distributed as `histogram`.
    pub fn build(codec: Codec, histogram: &Histogram) -> Result<Self, TableError> {
        let _ = (codec, histogram);
        todo!()
    }
    /// Appends the bytes that [`Table::read`] reads.
    pub fn write(&self, out: &mut Vec<u8>) {
        let _ = out;
        todo!()
    }
    /// Reads all of `bytes`; anything but a valid table is refused.
    pub fn read(codec: Codec, bytes: &[u8]) -> Result<Self, TableError> {
        let _ = (codec, bytes);
        todo!()
    }
    /// The codec with its parameters.
    pub fn codec(&self) -> Codec {
        todo!()
    }
    /// Expected bits for symbols distributed as `histogram`: codes, escapes, far entries; no per-chunk side data.
    pub fn payload_bits(&self, histogram: &Histogram) -> f64 {
        let _ = histogram;
        todo!()
    }
}

/// Appends one chunk with all of `symbols`.
pub fn encode_chunk(table: &Table, symbols: &[i16], out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let _ = (table, symbols, out);
    todo!()
}

/// Decodes a chunk of `out.len()` symbols.
pub fn decode_chunk(table: &Table, chunk: &[u8], out: &mut [i16]) -> Result<(), DecodeError> {
    let _ = (table, chunk, out);
    todo!()
}

/// Decodes a chunk of `out.len()` symbols to symbol bytes (far = 0), and the far list that goes with them.
pub fn decode_chunk_bytes<'a>(table: &Table, chunk: &'a [u8], out: &mut [u8]) -> Result<FarList<'a>, DecodeError> {
    let _ = (table, chunk, out);
    todo!()
}
