//! Model directories: an ordinary Hugging Face layout whose linear layers are entropy coded. FORMAT.md, in the repository's
//! root, documents it to the byte.
//!
//! - [`ModelDir`] opens a directory, ours or a plain one, by mapping its files; [`Tensor`]s are views of the mapping.
//! - [`encode_tensor`] and [`decode_tensor`] turn quantized tensors into blobs and back.
//! - [`DirWriter`] writes a directory, all or nothing; [`verify`] checks one to the last symbol.
//! - [`MlxDir`] and [`to_mlx`] translate MLX's 4-bit directories without loss; [`restore_original`] gives the very files back.
//!
//! Whatever the bytes of a file are, the answer is a value or an error of one line that names file, tensor and cause.
#![deny(unsafe_code)] // but for the mapping: bytes.rs

mod bytes;
mod dir;
mod encode;
mod error;
mod header;
mod import_mlx;
pub mod limits;
mod manifest;
mod original;
mod safetensors;
mod tensor;
mod verify;
mod writer;

pub use bytes::Bytes;
pub use dir::{MODEL_FILE, ModelDir};
pub use encode::{CHUNK_SYMBOLS_TARGET, EncodedTensor, decode_tensor, encode_tensor};
pub use error::{EncodeTensorError, ErrorKind, FileError, FormatError, Place, TensorError};
pub use header::{
    BLOB_ALIGN, CHUNK_ALIGN, DecodedForm, FIELDS, Field, HEADER_BYTES, INDEX_ENTRY_BYTES, MAGIC, NARROW_MAX, NARROW_MIN, ScaleScheme,
    TILE_COLS, TILE_ROWS, TILE_SYMBOLS, TensorHeader, VERSION,
};
pub use import_mlx::{MlxDir, MlxParts, MlxQuantized, MlxTensor, to_mlx};
pub use original::{RestoreProgress, RestoreReport, restore_original};
pub use tensor::{CodedTensor, Dtype, RawRows, RawTensor, ScalesView, Tensor};
pub use verify::{VerifyProgress, VerifyReport, verify};
pub use writer::DirWriter;
