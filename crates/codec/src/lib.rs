//! Entropy codecs for quantized weights: symbols to bytes and back.
#![forbid(unsafe_code)]

pub mod block_ans;
pub mod fixed;
pub mod huffman;
pub mod rans;

mod codec;
mod error;
mod escape;
mod histogram;
mod table;

pub use codec::{Codec, CodecKind};
pub use error::{DecodeError, EncodeError, ParamsError, TableError};
pub use escape::{FAR_BYTES, Far, FarList};
pub use histogram::Histogram;
pub use table::{Table, decode_chunk, decode_chunk_bytes, encode_chunk};

/// Symbol byte of the escape entry of a table.
pub const ESCAPE: u8 = 0;
/// Symbol byte = symbol + `SYMBOL_BIAS` for core symbols (-127..=127).
pub const SYMBOL_BIAS: i16 = 128;
/// Readable bytes that a SIMD decoder may touch beyond a chunk; whoever stores chunks provides them.
pub const PADDING_BYTES: usize = 64;
