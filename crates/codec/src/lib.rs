//! Entropy codecs for quantized weights: symbols to bytes and back. The specification and the
//! oracle of every other decoder.
//!
//! A *symbol* is an `i16`. A [`Histogram`] of a tensor's symbols gives a [`Table`], static for the
//! tensor; a *chunk* is a run of symbols coded together by [`encode_chunk`], self-contained but for
//! the table and the number of symbols. This crate knows no tensor, file, thread, instruction set
//! or GPU: which symbols form a chunk, and where a chunk lies, is its caller's matter.
//!
//! | codec | module | what it is for |
//! |---|---|---|
//! | `rans` | [`mod@rans`] | the best ratio; decodes in SIMD registers |
//! | `block-ans` | [`block_ans`] | thousands of independent blocks |
//! | `huffman` | [`huffman`], [`mod@planes`] | no arithmetic: table lookups, or merges of bytes |
//! | `rans-pairs` | [`rans_pairs`] | pairs of symbols at the ratio of `rans`: half as many steps |
//! | `tiered` | [`tiered`] | fields with escapes in tiers: decodes almost as fast as plain fields |
//! | `fixed` | [`fixed`] | no entropy coding: the baseline and the decoded form |
//!
//! Each module explains its method, its bytes, why they are laid out so, how a decoder proves a
//! chunk valid, and what it costs. What they have in common:
//!
//! - **symbol bytes**: a core symbol (-127..=127) is handled as the byte symbol + 128, 1..=255;
//!   byte 0 is [`ESCAPE`]. Core symbols without an entry in the table, and far symbols (all
//!   others), are escaped, see [`FarList`];
//! - **no errors inside the loop**: decoders run on, whatever the bytes, and prove at the end that
//!   all went as the encoder meant it. No bytes make them panic, or allocate more than the caller's
//!   buffer. The proof is no checksum: changed bytes may decode to other symbols;
//! - **determinism**: tables and chunks are the same bytes on every machine.
//!
//! [`reference`](mod@reference) has the slow decoder that follows the layouts word by word; the
//! fast ones are tested equal to it.
#![forbid(unsafe_code)]

pub mod block_ans;
pub mod fixed;
pub mod huffman;
pub mod pairs;
pub mod planes;
pub mod rans;
pub mod rans_pairs;
pub mod reference;
pub mod tiered;

mod ans;
mod codec;
mod error;
mod escape;
mod frequencies;
mod histogram;
mod lanes;
mod log2;
mod table;
mod trial;

pub use codec::{Codec, CodecKind};
pub use error::{DecodeError, EncodeError, ParamsError, TableError};
pub use escape::{FAR_BYTES, Far, FarList};
pub use histogram::Histogram;
pub use table::{Table, decode_chunk, decode_chunk_bytes, encode_chunk};

/// Symbol byte of the escape entry of a table.
pub const ESCAPE: u8 = 0;

/// Symbol byte = symbol + `SYMBOL_BIAS` for core symbols (-127..=127).
pub const SYMBOL_BIAS: i16 = 128;

/// Readable bytes that a SIMD decoder may touch beyond a chunk; whoever stores chunks provides
/// them. The decoders of this crate touch none.
pub const PADDING_BYTES: usize = 64;

/// Most symbols in a chunk: positions and the lengths of all parts then fit 32 bits.
pub const CHUNK_SYMBOLS_MAX: usize = 1 << 28;
