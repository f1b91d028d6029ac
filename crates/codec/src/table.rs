//! One type for the tables of all codecs, and the operations on chunks.

use crate::error::{DecodeError, EncodeError, TableError};
use crate::escape::widen;
use crate::{Codec, FarList, Histogram, block_ans, fixed, huffman, rans, rans_pairs, tiered};

/// The static table of one tensor: what encoder and decoder must share, with the codec's
/// parameters.
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
    /// See [`tiered`].
    Tiered(tiered::Table),
    /// See [`rans_pairs`].
    RansPairs(rans_pairs::Table),
}

impl Table {
    /// The table of `codec` that codes symbols distributed as `histogram` in the fewest bits,
    /// escapes and the table itself counted. The same on every machine. A symbol that is not in
    /// `histogram` may have no code.
    pub fn build(codec: Codec, histogram: &Histogram) -> Result<Self, TableError> {
        Ok(match codec {
            Codec::Fixed(params) => Self::Fixed(fixed::Table::build(params, histogram)?),
            Codec::Huffman(params) => Self::Huffman(huffman::Table::build(params, histogram)?),
            Codec::Rans(params) => Self::Rans(rans::Table::build(params, histogram)?),
            Codec::BlockAns(params) => Self::BlockAns(block_ans::Table::build(params, histogram)?),
            Codec::Tiered => Self::Tiered(tiered::Table::build(histogram)?),
            Codec::RansPairs => Self::RansPairs(rans_pairs::Table::build(histogram)?),
        })
    }

    /// Appends the bytes that [`Table::read`] reads; at most 770.
    pub fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::Fixed(table) => table.write(out),
            Self::Huffman(table) => table.write(out),
            Self::Rans(table) => table.frequencies().write(out),
            Self::BlockAns(table) => table.frequencies().write(out),
            Self::Tiered(table) => table.write(out),
            Self::RansPairs(table) => table.write(out),
        }
    }

    /// Takes all of `bytes` for a table of `codec`, if they are one.
    pub fn read(codec: Codec, bytes: &[u8]) -> Result<Self, TableError> {
        Ok(match codec {
            Codec::Fixed(params) => Self::Fixed(fixed::Table::read(params, bytes)?),
            Codec::Huffman(params) => Self::Huffman(huffman::Table::read(params, bytes)?),
            Codec::Rans(params) => Self::Rans(rans::Table::read(params, bytes)?),
            Codec::BlockAns(params) => Self::BlockAns(block_ans::Table::read(params, bytes)?),
            Codec::Tiered => Self::Tiered(tiered::Table::read(bytes)?),
            Codec::RansPairs => Self::RansPairs(rans_pairs::Table::read(bytes)?),
        })
    }

    /// The codec with its parameters.
    pub fn codec(&self) -> Codec {
        match self {
            Self::Fixed(table) => Codec::Fixed(table.params()),
            Self::Huffman(table) => Codec::Huffman(table.params()),
            Self::Rans(table) => Codec::Rans(table.params()),
            Self::BlockAns(table) => Codec::BlockAns(table.params()),
            Self::Tiered(_) => Codec::Tiered,
            Self::RansPairs(_) => Codec::RansPairs,
        }
    }

    /// Whether some symbols are coded as ESCAPE.
    pub fn has_escape(&self) -> bool {
        match self {
            Self::Fixed(table) => table.has_escape(),
            Self::Huffman(table) => table.has_escape(),
            Self::Rans(table) => table.has_escape(),
            Self::BlockAns(table) => table.has_escape(),
            Self::Tiered(_) | Self::RansPairs(_) => true,
        }
    }

    /// Expected bits of all symbols of `histogram`: codes, escape bytes and far entries, without
    /// what a chunk or block costs beside its symbols. Infinite if a symbol has no code.
    pub fn payload_bits(&self, histogram: &Histogram) -> f64 {
        match self {
            Self::Fixed(table) => table.payload_bits(histogram),
            Self::Huffman(table) => table.payload_bits(histogram),
            Self::Rans(table) => table.frequencies().payload_bits(histogram),
            Self::BlockAns(table) => table.frequencies().payload_bits(histogram),
            Self::Tiered(table) => table.payload_bits(histogram),
            Self::RansPairs(table) => table.payload_bits(histogram),
        }
    }
}

/// Appends one chunk with all of `symbols` to `out`. The bytes depend on nothing else, so chunks
/// may be encoded in parallel.
///
/// Chunks of no symbols are refused. After an error, `out` is as it was.
pub fn encode_chunk(table: &Table, symbols: &[i16], out: &mut Vec<u8>) -> Result<(), EncodeError> {
    match table {
        Table::Fixed(table) => fixed::encode(table, symbols, out),
        Table::Huffman(table) => huffman::encode(table, symbols, out),
        Table::Rans(table) => rans::encode(table, symbols, out),
        Table::BlockAns(table) => block_ans::encode(table, symbols, out),
        Table::Tiered(table) => tiered::encode(table, symbols, out),
        Table::RansPairs(table) => rans_pairs::encode(table, symbols, out),
    }
}

/// Decodes a chunk of `out.len()` symbols, all of `chunk`.
///
/// After an error, `out` holds nothing of use. Memory used beside `out` is one byte per symbol, and for planes one more per coded
/// bit.
///
/// ```
/// use tersor_codec::{Codec, Histogram, Table, decode_chunk, encode_chunk};
/// let symbols = [0, 1, -1, 0, 0, 2, -300, 0];
/// let mut histogram = Histogram::new();
/// histogram.add(&symbols);
/// let table = Table::build(Codec::default(), &histogram)?;
/// let mut chunk = Vec::new();
/// encode_chunk(&table, &symbols, &mut chunk)?;
/// let mut decoded = [0; 8];
/// decode_chunk(&table, &chunk, &mut decoded)?;
/// assert_eq!(decoded, symbols);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn decode_chunk(table: &Table, chunk: &[u8], out: &mut [i16]) -> Result<(), DecodeError> {
    let mut bytes = vec![0; out.len()];
    let far = decode_chunk_bytes(table, chunk, &mut bytes)?;
    widen(&bytes, far, out);
    Ok(())
}

/// Decodes a chunk of `out.len()` symbols to symbol bytes, 0 for far symbols, which the returned
/// list names: what SIMD kernels compute with, and are compared with.
///
/// After an error, `out` holds nothing of use.
pub fn decode_chunk_bytes<'a>(table: &Table, chunk: &'a [u8], out: &mut [u8]) -> Result<FarList<'a>, DecodeError> {
    match table {
        Table::Fixed(table) => fixed::decode(table, chunk, out),
        Table::Huffman(table) => huffman::decode(table, chunk, out),
        Table::Rans(table) => rans::decode(table, chunk, out),
        Table::BlockAns(table) => block_ans::decode(table, chunk, out),
        Table::Tiered(table) => tiered::decode(table, chunk, out),
        Table::RansPairs(table) => rans_pairs::decode(table, chunk, out),
    }
}
