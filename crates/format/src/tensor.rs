//! Tensors of an open directory: raw bytes with a dtype, or coded symbols with their scales.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use tersor_codec::{Codec, PADDING_BYTES, Table};
use tersor_quant::{QuantizedTensor, ScaleVec, Scales};
use xxhash_rust::xxh3::xxh3_64;

use crate::bytes::Bytes;
use crate::error::TensorError;
use crate::header::{
    BLOB_ALIGN, CHUNK_ALIGN, DecodedForm, HEADER_BYTES, INDEX_ENTRY_BYTES, ScaleScheme, TILE_SYMBOLS, TensorHeader,
};

/// Element type of a raw tensor, by its safetensors name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[non_exhaustive]
#[allow(missing_docs)] // The names are the documentation.
pub enum Dtype {
    Bool,
    U8,
    I8,
    F8E4M3,
    F8E5M2,
    U16,
    I16,
    F16,
    Bf16,
    U32,
    I32,
    F32,
    U64,
    I64,
    F64,
}

impl Dtype {
    const ALL: [Self; 15] = [
        Self::Bool,
        Self::U8,
        Self::I8,
        Self::F8E4M3,
        Self::F8E5M2,
        Self::U16,
        Self::I16,
        Self::F16,
        Self::Bf16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    /// Bytes of an element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Bool | Self::U8 | Self::I8 | Self::F8E4M3 | Self::F8E5M2 => 1,
            Self::U16 | Self::I16 | Self::F16 | Self::Bf16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }

    /// Name in a safetensors header.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::U8 => "U8",
            Self::I8 => "I8",
            Self::F8E4M3 => "F8_E4M3",
            Self::F8E5M2 => "F8_E5M2",
            Self::U16 => "U16",
            Self::I16 => "I16",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::U32 => "U32",
            Self::I32 => "I32",
            Self::F32 => "F32",
            Self::U64 => "U64",
            Self::I64 => "I64",
            Self::F64 => "F64",
        }
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|d| d.name() == name)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl From<tersor_quant::Dtype> for Dtype {
    fn from(dtype: tersor_quant::Dtype) -> Self {
        match dtype {
            tersor_quant::Dtype::F32 => Self::F32,
            tersor_quant::Dtype::F16 => Self::F16,
            tersor_quant::Dtype::Bf16 => Self::Bf16,
        }
    }
}

/// A tensor stored as plain little-endian elements.
#[derive(Clone, Debug)]
pub struct RawTensor {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Bytes,
}

impl RawTensor {
    /// A tensor of `bytes`, row-major.
    ///
    /// # Errors
    /// The length does not fit the shape.
    pub fn new(dtype: Dtype, shape: Vec<usize>, bytes: Bytes) -> Result<Self, TensorError> {
        let expected = shape
            .iter()
            .try_fold(dtype.bytes() as u64, |n, &d| n.checked_mul(d as u64))
            .unwrap_or(u64::MAX);
        if expected != bytes.len() as u64 {
            return Err(TensorError::Length { expected, found: bytes.len() as u64 });
        }
        Ok(Self { dtype, shape, bytes })
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.dtype.bytes()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The elements, row-major, little-endian, with no promise of alignment.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// All elements as f32 (exact for all three float types).
    ///
    /// # Errors
    /// A dtype other than F32, BF16, F16.
    pub fn to_f32(&self) -> Result<Vec<f32>, TensorError> {
        let mut out = vec![0.0; self.len()];
        self.read_f32(0, &mut out)?;
        Ok(out)
    }

    /// Elements `start .. start + out.len()` as f32 (exact).
    ///
    /// # Errors
    /// A dtype other than F32, BF16, F16.
    ///
    /// # Panics
    /// If the range does not lie inside the tensor.
    pub fn read_f32(&self, start: usize, out: &mut [f32]) -> Result<(), TensorError> {
        let size = self.dtype.bytes();
        let bytes = &self.bytes[start * size..(start + out.len()) * size];
        match self.dtype {
            Dtype::F32 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *o = f32::from_le_bytes(*b);
                }
            }
            Dtype::F16 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *o = f16::from_le_bytes(*b).to_f32();
                }
            }
            Dtype::Bf16 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *o = bf16::from_le_bytes(*b).to_f32();
                }
            }
            other => return Err(TensorError::NotFloat { dtype: other.name() }),
        }
        Ok(())
    }

    /// This tensor as the weights of a linear layer, for `tersor_quant::quantize`. `None` unless it is a matrix of floats
    /// with at least one element.
    pub fn as_rows(&self) -> Option<RawRows<'_>> {
        let dtype = match self.dtype {
            Dtype::F32 => tersor_quant::Dtype::F32,
            Dtype::F16 => tersor_quant::Dtype::F16,
            Dtype::Bf16 => tersor_quant::Dtype::Bf16,
            _ => return None,
        };
        match self.shape[..] {
            [rows, cols] if rows > 0 && cols > 0 => Some(RawRows { tensor: self, dtype, rows, cols }),
            _ => None,
        }
    }
}

/// A raw float matrix as source weights.
#[derive(Clone, Copy, Debug)]
pub struct RawRows<'a> {
    tensor: &'a RawTensor,
    dtype: tersor_quant::Dtype,
    rows: usize,
    cols: usize,
}

impl tersor_quant::Rows for RawRows<'_> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn dtype(&self) -> tersor_quant::Dtype {
        self.dtype
    }

    fn read(&self, row: usize, out: &mut [f32]) {
        self.tensor.read_f32(row * self.cols, out).expect("as_rows admits float dtypes only");
    }
}

/// Scales (and biases) of a coded tensor, still as stored.
#[derive(Clone, Debug)]
pub struct ScalesView {
    scheme: ScaleScheme,
    group_size: u32,
    exponent: i8,
    scales: RawTensor,
    biases: Option<RawTensor>,
}

impl ScalesView {
    /// How symbols become weights.
    pub fn scheme(&self) -> ScaleScheme {
        self.scheme
    }

    /// Columns that share a scale; 0 for schemes without groups.
    pub fn group_size(&self) -> u32 {
        self.group_size
    }

    /// The stored scales: (1), (rows) or (rows, groups).
    pub fn raw(&self) -> &RawTensor {
        &self.scales
    }

    /// The stored biases of [`ScaleScheme::GroupAffine`]: (rows, groups).
    pub fn raw_biases(&self) -> Option<&RawTensor> {
        self.biases.as_ref()
    }

    /// Power of two that multiplies every stored scale; 0 for schemes with groups.
    pub fn exponent(&self) -> i8 {
        self.exponent
    }

    /// Bytes of scales and biases in the file.
    pub fn bytes(&self) -> u64 {
        let biases = self.biases.as_ref().map_or(0, |b| b.bytes().len());
        (self.scales.bytes().len() + biases) as u64
    }

    /// The real scales, exponent applied: 1, rows, or rows * groups values, row-major.
    ///
    /// # Errors
    /// A scale that is not finite.
    pub fn to_f32(&self) -> Result<Vec<f32>, TensorError> {
        todo!()
    }

    /// The real biases (rows * groups), for [`ScaleScheme::GroupAffine`].
    ///
    /// # Errors
    /// A bias that is not finite.
    pub fn biases_to_f32(&self) -> Result<Option<Vec<f32>>, TensorError> {
        todo!()
    }
}

/// A tensor of entropy-coded symbols. Cheap to clone; keeps the mapping (or the buffer) alive that it looks into.
#[derive(Clone, Debug)]
pub struct CodedTensor {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    header: TensorHeader,
    table: Table,
    blob: Bytes,
    /// Start of each chunk in the blob, bytes.
    starts: Vec<u64>,
    scales: ScalesView,
}

impl CodedTensor {
    /// Opens a blob together with its scales and biases. Checks header, table, index and shapes, and the checksum over
    /// them; reads no chunk.
    ///
    /// # Errors
    /// Everything that contradicts FORMAT.md.
    pub fn open(blob: Bytes, scales: RawTensor, biases: Option<RawTensor>) -> Result<Self, TensorError> {
        todo!()
    }

    /// The header.
    pub fn header(&self) -> &TensorHeader {
        &self.inner.header
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.inner.header.rows as usize
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.inner.header.cols as usize
    }

    /// Columns rounded up to whole tiles.
    pub fn cols_padded(&self) -> usize {
        self.col_steps() * crate::header::TILE_COLS
    }

    /// Row tiles (16 rows each, the last padded).
    pub fn row_tiles(&self) -> usize {
        self.inner.header.row_tiles()
    }

    /// Column steps (4 columns each, the last padded).
    pub fn col_steps(&self) -> usize {
        self.inner.header.col_steps()
    }

    /// The codec.
    pub fn codec(&self) -> Codec {
        self.inner.header.codec
    }

    /// The table that all chunks share.
    pub fn table(&self) -> &Table {
        &self.inner.table
    }

    /// Chunks.
    pub fn chunk_count(&self) -> usize {
        self.inner.starts.len()
    }

    /// Bytes of chunk `chunk`.
    ///
    /// # Panics
    /// If there is no such chunk, here and below.
    pub fn chunk(&self, chunk: usize) -> &[u8] {
        todo!()
    }

    /// Bytes of chunk `chunk` and the [`PADDING_BYTES`] readable bytes that follow it (of the next chunk, or zeros):
    /// the chunk is all but the last `PADDING_BYTES` of the slice.
    pub fn chunk_with_padding(&self, chunk: usize) -> &[u8] {
        todo!()
    }

    /// Row tiles of chunk `chunk`.
    pub fn chunk_row_tiles(&self, chunk: usize) -> Range<usize> {
        let per_chunk = self.inner.header.row_tiles_per_chunk as usize;
        assert!(chunk < self.chunk_count(), "chunk {chunk} of {}", self.chunk_count());
        chunk * per_chunk..((chunk + 1) * per_chunk).min(self.row_tiles())
    }

    /// Symbols of chunk `chunk`, padding included.
    pub fn chunk_symbols(&self, chunk: usize) -> usize {
        self.chunk_row_tiles(chunk).len() * self.col_steps() * TILE_SYMBOLS
    }

    /// Whether the chunk's bytes have the checksum that the index stores.
    pub fn chunk_checksum_ok(&self, chunk: usize) -> bool {
        todo!()
    }

    /// Scales and biases.
    pub fn scales(&self) -> &ScalesView {
        &self.inner.scales
    }

    /// Bytes of the blob: header, table, index, chunks, padding.
    pub fn coded_bytes(&self) -> u64 {
        self.inner.blob.len() as u64
    }

    /// The blob.
    pub fn blob(&self) -> &Bytes {
        &self.inner.blob
    }

    /// The form into which this tensor is decoded when it is kept decoded.
    pub fn decoded_form(&self) -> DecodedForm {
        DecodedForm::choose(&self.inner.header)
    }

    /// Bytes of the decoded form; see [`TensorHeader::decoded_bytes`].
    pub fn decoded_bytes(&self) -> u64 {
        self.inner.header.decoded_bytes()
    }

    /// Tells the system that the coded bytes are not needed for now; they stay valid.
    pub fn release(&self) -> io::Result<()> {
        self.inner.blob.release()
    }
}

/// A tensor of a directory.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Tensor {
    /// Stored as it is.
    Raw(RawTensor),
    /// Entropy coded.
    Coded(CodedTensor),
}

impl Tensor {
    /// Dimensions, outermost first.
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Self::Raw(raw) => raw.shape().to_vec(),
            Self::Coded(coded) => vec![coded.rows(), coded.cols()],
        }
    }

    /// Bytes in the file, with scales and biases.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.bytes().len() as u64,
            Self::Coded(coded) => coded.coded_bytes() + coded.scales().bytes(),
        }
    }
}
