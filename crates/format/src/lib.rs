//! Model directories: an ordinary Hugging Face layout whose linear layers are entropy coded. FORMAT.md, in the repository's
//! root, documents it to the byte.

mod bytes;
mod dir;
mod encode;
mod error;
mod header;
pub mod limits;
mod manifest;
mod safetensors;
mod tensor;
mod verify;
mod writer;

pub use bytes::Bytes;
pub use dir::ModelDir;
pub use encode::{CHUNK_SYMBOLS_TARGET, EncodedTensor, decode_tensor, encode_tensor};
pub use error::{EncodeTensorError, ErrorKind, FileError, FormatError, Place, TensorError};
pub use header::{
    BLOB_ALIGN, CHUNK_ALIGN, DecodedForm, FIELDS, Field, HEADER_BYTES, INDEX_ENTRY_BYTES, MAGIC,
    NARROW_MAX, NARROW_MIN, ScaleScheme, TILE_COLS, TILE_ROWS, TILE_SYMBOLS, TensorHeader, VERSION,
};
pub use tensor::{CodedTensor, Dtype, RawRows, RawTensor, ScalesView, Tensor};
pub use verify::{VerifyProgress, VerifyReport, verify};
pub use writer::DirWriter;
