//! What can go wrong with a model directory. Every error prints as one line that names the file, the tensor and the cause.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use tersor_codec::{DecodeError, EncodeError, TableError};

/// What a caller can do about an error.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The bytes contradict the format or their checksums: fetch or build the file again.
    Corrupt,
    /// The bytes may be fine, but this version cannot use them.
    Unsupported,
    /// The operating system refused: missing file, permission, full disk.
    Io,
    /// A documented limit would be exceeded, or the request itself is not allowed.
    Limit,
}

/// Where an error was found: a file, a tensor in it, or neither for tensors held in memory.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Place {
    /// The file, when there is one.
    pub file: Option<PathBuf>,
    /// The tensor's name as stored in the file, when one is concerned.
    pub tensor: Option<String>,
}

impl Place {
    /// A file as a whole.
    pub fn file(path: &Path) -> Self {
        Self { file: Some(path.to_owned()), tensor: None }
    }

    /// A tensor of a file.
    pub fn tensor(path: &Path, name: &str) -> Self {
        Self { file: Some(path.to_owned()), tensor: Some(name.to_owned()) }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Debug formatting of the name escapes line breaks, so that a hostile name cannot forge a second line.
        match (&self.file, &self.tensor) {
            (Some(file), Some(tensor)) => write!(f, "{}: tensor {tensor:?}", file.display()),
            (Some(file), None) => write!(f, "{}", file.display()),
            (None, Some(tensor)) => write!(f, "tensor {tensor:?}"),
            (None, None) => f.write_str("tensor in memory"),
        }
    }
}

/// Why a safetensors file is refused before any tensor is looked at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The file is too short for its 8-byte length field or for the header that it announces.
    #[error("truncated: {needed} bytes needed, the file has {available}")]
    Truncated {
        /// Bytes that the header needs.
        needed: u64,
        /// Bytes in the file.
        available: u64,
    },
    /// The JSON header is longer than [`crate::limits::HEADER_BYTES_MAX`].
    #[error("JSON header of {bytes} bytes; the limit is {limit}")]
    HeaderTooLong {
        /// Announced length.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The JSON header is not what safetensors prescribes (includes duplicate names).
    #[error("JSON header: {message}")]
    Json {
        /// The parser's message, on one line.
        message: String,
    },
    /// The tensors do not cover the data section exactly, in order, without holes or overlaps.
    #[error("data of tensor {name:?} begins at {found}; {expected} was expected (tensors must leave no hole and not overlap)")]
    Offsets {
        /// The tensor that breaks the sequence.
        name: String,
        /// Its first offset, bytes from the start of the data section.
        found: u64,
        /// The end of the tensor before it.
        expected: u64,
    },
    /// The tensors end before or after the file does.
    #[error("the tensors need {tensors} bytes of data, the file has {available}")]
    DataLength {
        /// End of the last tensor, bytes from the start of the data section.
        tensors: u64,
        /// Bytes in the file after the header.
        available: u64,
    },
    /// A tensor's shape and dtype do not give the length of its data, or overflow.
    #[error("tensor {name:?}: shape {shape:?} of {dtype} does not fit its {bytes} bytes")]
    Shape {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<u64>,
        /// Its dtype as written.
        dtype: &'static str,
        /// Length of its data.
        bytes: u64,
    },
    /// A dtype that safetensors may define but this version does not know.
    #[error("tensor {name:?}: unsupported dtype {dtype:?}")]
    Dtype {
        /// The tensor.
        name: String,
        /// The dtype as written.
        dtype: String,
    },
    /// A coded tensor that does not start at a multiple of 64.
    #[error("tensor {name:?} starts at byte {offset} of the file, not at a multiple of 64")]
    Alignment {
        /// The tensor.
        name: String,
        /// Bytes from the start of the file.
        offset: u64,
    },
    /// The file says it is ours and lacks the checksum of a tensor, or has one too many or a malformed one.
    #[error("metadata: {message}")]
    Metadata {
        /// What is wrong.
        message: String,
    },
}

impl FileError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::HeaderTooLong { .. } => ErrorKind::Limit,
            Self::Dtype { .. } => ErrorKind::Unsupported,
            _ => ErrorKind::Corrupt,
        }
    }
}

/// Why one tensor is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TensorError {
    /// The blob ends before what its header announces.
    #[error("truncated: {needed} bytes needed, {available} there")]
    Truncated {
        /// Bytes needed.
        needed: u64,
        /// Bytes there.
        available: u64,
    },
    /// The blob is longer than its header says.
    #[error("{found} bytes where {expected} were expected")]
    Length {
        /// Length that follows from the header.
        expected: u64,
        /// Length found.
        found: u64,
    },
    /// The blob does not start with "TRSR".
    #[error("bad magic {found:#010x}")]
    Magic {
        /// The first four bytes, little-endian.
        found: u32,
    },
    /// A version that this library does not know.
    #[error("unsupported blob version {found} (this library reads version {known})")]
    Version {
        /// Version found.
        found: u16,
        /// Version known.
        known: u16,
    },
    /// A scheme id that this version does not know.
    #[error("unsupported quantization scheme id {found}")]
    Scheme {
        /// Id found.
        found: u8,
    },
    /// A codec id that this version does not know.
    #[error("unsupported codec id {found}")]
    Codec {
        /// Id found.
        found: u8,
    },
    /// Codec parameters outside what the codec supports.
    #[error("unsupported parameters of codec {codec}: {message}")]
    CodecParams {
        /// The codec's name.
        codec: &'static str,
        /// What is wrong.
        message: String,
    },
    /// A header field holds a value that the format does not allow.
    #[error("header field {field} = {value}: {message}")]
    Field {
        /// Name of the field as in FORMAT.md.
        field: &'static str,
        /// Value found.
        value: u64,
        /// The rule that it breaks.
        message: &'static str,
    },
    /// A documented limit is exceeded.
    #[error("{what} is {value}; the limit is {limit}")]
    Limit {
        /// What is limited.
        what: &'static str,
        /// Value found.
        value: u64,
        /// The limit.
        limit: u64,
    },
    /// A stored checksum differs from the one computed.
    #[error("checksum of the {part} does not match")]
    Checksum {
        /// Which part.
        part: &'static str,
    },
    /// A chunk's checksum differs from the one computed.
    #[error("checksum of chunk {chunk} does not match")]
    ChunkChecksum {
        /// Index of the chunk.
        chunk: usize,
    },
    /// A byte that must be zero is not.
    #[error("padding byte at {offset} is not zero")]
    Padding {
        /// Bytes from the start of the tensor.
        offset: u64,
    },
    /// The frequency or code table is refused by the codec.
    #[error("table: {cause}")]
    Table {
        /// The codec's reason.
        cause: TableError,
    },
    /// A chunk does not decode.
    #[error("chunk {chunk}: {cause}")]
    Decode {
        /// Index of the chunk.
        chunk: usize,
        /// The codec's reason.
        cause: DecodeError,
    },
    /// A statistic in the header is not that of the decoded symbols.
    #[error("header says {field} = {stored}; the symbols give {found}")]
    Statistic {
        /// Name of the field.
        field: &'static str,
        /// Value in the header.
        stored: i64,
        /// Value of the symbols.
        found: i64,
    },
    /// A symbol that only fills a tile up is not 0.
    #[error("padding symbol at row {row}, column {col} is not 0")]
    PaddingSymbol {
        /// Row.
        row: usize,
        /// Column.
        col: usize,
    },
    /// A coded tensor lacks one of its companions.
    #[error("{part} missing")]
    MissingPart {
        /// Name of the missing tensor.
        part: String,
    },
    /// A tensor that must not be there.
    #[error("{part} must not exist beside a coded tensor of this scheme")]
    UnexpectedPart {
        /// Name of the tensor.
        part: String,
    },
    /// Shape or dtype of scales or biases do not fit the blob.
    #[error("{part} is {found}, {expected} was expected")]
    PartShape {
        /// `scales` or `biases`.
        part: &'static str,
        /// dtype and shape found.
        found: String,
        /// dtype and shape expected.
        expected: String,
    },
    /// A scale or bias is infinite or not a number.
    #[error("{part} {index} is not finite")]
    NotFinite {
        /// `scale` or `bias`.
        part: &'static str,
        /// Index in row-major order.
        index: usize,
    },
    /// A conversion that this dtype does not have.
    #[error("dtype {dtype} cannot be used as weights (F32, BF16 and F16 can)")]
    NotFloat {
        /// The dtype.
        dtype: &'static str,
    },
    /// Memory for the decoded tensor could not be had.
    #[error("cannot allocate {bytes} bytes")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: u64,
    },
}

impl TensorError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Version { .. } | Self::Scheme { .. } | Self::Codec { .. } | Self::CodecParams { .. } | Self::NotFloat { .. } => {
                ErrorKind::Unsupported
            }
            Self::Limit { .. } | Self::OutOfMemory { .. } => ErrorKind::Limit,
            _ => ErrorKind::Corrupt,
        }
    }
}

/// Errors of opening, reading, verifying and writing model directories.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The operating system refused.
    #[error("{}: cannot {action}: {cause}", path.display())]
    Io {
        /// What was attempted, as a verb.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        cause: io::Error,
    },
    /// A safetensors file is refused as a whole.
    #[error("{}: {cause}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: FileError,
    },
    /// One tensor is refused.
    #[error("{place}: {cause}")]
    Tensor {
        /// File and tensor.
        place: Place,
        /// Why.
        cause: TensorError,
    },
    /// A JSON document beside the tensors is malformed.
    #[error("{}: {message}", path.display())]
    Json {
        /// The document.
        path: PathBuf,
        /// What is wrong, on one line.
        message: String,
    },
    /// A JSON document or manifest is larger than allowed.
    #[error("{}: {bytes} bytes; the limit is {limit}", path.display())]
    TooLarge {
        /// The document.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The index names a shard that is not there.
    #[error("{}: shard {shard:?} is missing (it holds tensor {tensor:?} and maybe others)", path.display())]
    MissingShard {
        /// The directory.
        path: PathBuf,
        /// File name of the shard.
        shard: String,
        /// A tensor that it should hold.
        tensor: String,
    },
    /// The same tensor is stored twice.
    #[error("{place}: stored twice")]
    DuplicateTensor {
        /// The second occurrence.
        place: Place,
    },
    /// The directory was written by a version that this library does not know.
    #[error("{}: unsupported tersor format version {found} (this library reads version {known})", path.display())]
    Version {
        /// The configuration file.
        path: PathBuf,
        /// Version found.
        found: String,
        /// Version known.
        known: u64,
    },
    /// config.json and the tensor files disagree on whether this is a tersor directory.
    #[error("{}: {message}", path.display())]
    Mixed {
        /// The directory.
        path: PathBuf,
        /// What disagrees.
        message: String,
    },
    /// A tensor that was asked for does not exist.
    #[error("{}: no tensor {name:?}", path.display())]
    NoTensor {
        /// The directory.
        path: PathBuf,
        /// The name asked for.
        name: String,
    },
    /// A file differs from what the manifest says.
    #[error("{}: {message}", path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What differs.
        message: String,
    },
    /// The caller's callback asked to stop.
    #[error("{}: stopped before it was complete", path.display())]
    Stopped {
        /// The directory that was being written.
        path: PathBuf,
    },
    /// What was asked for is not allowed (an existing destination, a name written twice, ...).
    #[error("{}: {message}", path.display())]
    Usage {
        /// The file or directory concerned.
        path: PathBuf,
        /// Why not.
        message: String,
    },
}

impl FormatError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { .. } | Self::MissingShard { .. } => ErrorKind::Io,
            Self::File { cause, .. } => cause.kind(),
            Self::Tensor { cause, .. } => cause.kind(),
            Self::Version { .. } => ErrorKind::Unsupported,
            Self::TooLarge { .. } | Self::Usage { .. } | Self::NoTensor { .. } | Self::Stopped { .. } => ErrorKind::Limit,
            Self::Json { .. } | Self::DuplicateTensor { .. } | Self::Mixed { .. } | Self::Manifest { .. } => ErrorKind::Corrupt,
        }
    }

    pub(crate) fn io(action: &'static str, path: &Path, cause: io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), cause }
    }

    pub(crate) fn file(path: &Path, cause: FileError) -> Self {
        Self::File { path: path.to_owned(), cause }
    }
}

/// Why a quantized tensor cannot be encoded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeTensorError {
    /// Rows and columns do not give the number of symbols.
    #[error("{rows} x {cols} needs {} symbols, {found} given", rows * cols)]
    SymbolCount {
        /// Rows.
        rows: usize,
        /// Columns.
        cols: usize,
        /// Symbols given.
        found: usize,
    },
    /// The scales do not fit rows, columns and group size.
    #[error("{part}: {expected} needed, {found} given")]
    ScaleCount {
        /// `scales` or `biases`.
        part: &'static str,
        /// How many the shape needs.
        expected: usize,
        /// How many were given.
        found: usize,
    },
    /// A scale or bias is infinite or not a number.
    #[error("{part} {index} is not finite")]
    NotFinite {
        /// `scale` or `bias`.
        part: &'static str,
        /// Index in row-major order.
        index: usize,
    },
    /// A documented limit is exceeded, or a value is not allowed by the format.
    #[error(transparent)]
    Format(TensorError),
    /// No table can be built.
    #[error("table: {0}")]
    Table(TableError),
    /// A chunk cannot be encoded.
    #[error("chunk {chunk}: {cause}")]
    Chunk {
        /// Index of the chunk.
        chunk: usize,
        /// The codec's reason.
        cause: EncodeError,
    },
}
