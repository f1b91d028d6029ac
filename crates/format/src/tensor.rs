//! Tensors of an open directory: raw bytes with a dtype, or coded symbols with their scales.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use tersor_codec::{Codec, PADDING_BYTES, Table};
use tersor_quant::{ScaleVec, Scales};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::bytes::Bytes;
use crate::error::TensorError;
use crate::header::{CHUNK_ALIGN, DecodedForm, HEADER_BYTES, INDEX_ENTRY_BYTES, ScaleScheme, TILE_SYMBOLS, TensorHeader};

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
        let expected = shape.iter().try_fold(dtype.bytes() as u64, |n, &d| n.checked_mul(d as u64)).unwrap_or(u64::MAX);
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
            other => {
                return Err(TensorError::NotFloat { dtype: other.name() });
            }
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
        let mut scales = self.scales.to_f32()?;
        if self.exponent != 0 {
            // One rounding, in f64 as `tersor_quant` does it: the product is exact unless subnormal in f32.
            let factor = 2f64.powi(i32::from(self.exponent));
            for scale in &mut scales {
                *scale = (f64::from(*scale) * factor) as f32;
            }
        }
        finite("scale", &scales)?;
        Ok(scales)
    }

    /// The real biases (rows * groups), for [`ScaleScheme::GroupAffine`].
    ///
    /// # Errors
    /// A bias that is not finite.
    pub fn biases_to_f32(&self) -> Result<Option<Vec<f32>>, TensorError> {
        let Some(biases) = &self.biases else {
            return Ok(None);
        };
        let biases = biases.to_f32()?;
        finite("bias", &biases)?;
        Ok(Some(biases))
    }

    /// Scales and biases as the quantizer made them.
    pub fn to_scales(&self) -> Scales {
        let scale_exponent = self.exponent;
        let halves = || self.scales.bytes().as_chunks().0.iter().map(|b| u16::from_le_bytes(*b));
        match self.scheme {
            ScaleScheme::Tensor => Scales::Tensor { scale: halves().next().expect("shape checked when opened"), scale_exponent },
            ScaleScheme::Row => Scales::Row { scales: halves().collect(), scale_exponent },
            ScaleScheme::GroupAffine | ScaleScheme::GroupSymmetric => {
                Scales::Group { group_size: self.group_size, scales: scale_vec(&self.scales), biases: self.biases.as_ref().map(scale_vec) }
            }
        }
    }

    /// Checks dtypes and shapes against the header.
    fn new(header: &TensorHeader, scales: RawTensor, biases: Option<RawTensor>) -> Result<Self, TensorError> {
        let rows = header.rows as usize;
        let (shape, dtypes): (Vec<usize>, &[Dtype]) = match header.scheme {
            ScaleScheme::Tensor => (vec![1], &[Dtype::F16]),
            ScaleScheme::Row => (vec![rows], &[Dtype::F16]),
            _ => (vec![rows, header.groups()], &[Dtype::F16, Dtype::Bf16, Dtype::F32]),
        };
        let expect = |part, tensor: &RawTensor, dtypes: &[Dtype]| {
            if tensor.shape() == shape && dtypes.contains(&tensor.dtype()) {
                return Ok(());
            }
            let names: Vec<_> = dtypes.iter().map(|d| d.name()).collect();
            Err(TensorError::PartShape {
                part,
                found: format!("{} {:?}", tensor.dtype(), tensor.shape()),
                expected: format!("{} {shape:?}", names.join("/")),
            })
        };
        expect("scales", &scales, dtypes)?;
        match (&biases, header.scheme == ScaleScheme::GroupAffine) {
            (Some(biases), true) => expect("biases", biases, &[scales.dtype()])?,
            (None, true) => {
                return Err(TensorError::MissingPart { part: "biases".to_owned() });
            }
            (Some(_), false) => {
                return Err(TensorError::UnexpectedPart { part: "biases".to_owned() });
            }
            (None, false) => {}
        }
        let TensorHeader { scheme, group_size, scale_exponent: exponent, .. } = *header;
        Ok(Self { scheme, group_size, exponent, scales, biases })
    }
}

/// A float tensor in the quantizer's type; anything but F16 and BF16 must be F32.
pub(crate) fn scale_vec(tensor: &RawTensor) -> ScaleVec {
    let dtype = match tensor.dtype() {
        Dtype::F16 => tersor_quant::Dtype::F16,
        Dtype::Bf16 => tersor_quant::Dtype::Bf16,
        _ => tersor_quant::Dtype::F32,
    };
    ScaleVec::from_le_bytes(dtype, tensor.bytes()).expect("whole elements, checked when opened")
}

fn finite(part: &'static str, values: &[f32]) -> Result<(), TensorError> {
    match values.iter().position(|v| !v.is_finite()) {
        Some(index) => Err(TensorError::NotFinite { part, index }),
        None => Ok(()),
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
        let header = TensorHeader::parse(&blob)?;
        Self::open_parsed(header, blob, |header| ScalesView::new(header, scales, biases))
    }

    /// Opens a blob that travels without its scales: the symbols are the weights, whatever scheme the blob's header names. The header of
    /// the opened tensor says so (scheme `tensor`, scale 1). Checks what [`open`](Self::open) checks.
    ///
    /// # Errors
    /// Everything that contradicts FORMAT.md.
    pub fn open_symbols(blob: Bytes) -> Result<Self, TensorError> {
        let header = TensorHeader::parse(&blob)?;
        Self::open_parsed(header, blob, |header| {
            (header.scheme, header.group_size, header.scale_exponent) = (ScaleScheme::Tensor, 0, 0);
            let one = Bytes::from(f16::ONE.to_le_bytes().to_vec());
            ScalesView::new(header, RawTensor::new(Dtype::F16, vec![1], one)?, None)
        })
    }

    fn open_parsed(
        mut header: TensorHeader,
        blob: Bytes,
        scales: impl FnOnce(&mut TensorHeader) -> Result<ScalesView, TensorError>,
    ) -> Result<Self, TensorError> {
        let (expected, found) = (header.blob_bytes(), blob.len() as u64);
        if found < expected {
            return Err(TensorError::Truncated { needed: expected, available: found });
        }
        if found > expected {
            return Err(TensorError::Length { expected, found });
        }
        // From here on every offset that follows from the header lies inside the blob, and fits usize as its length does.
        if side_checksum(&header, &blob) != header.checksum {
            return Err(TensorError::Checksum { part: "header, table and index" });
        }
        let index_start = header.index_start() as usize;
        let table = Table::read(header.codec, &blob[HEADER_BYTES..index_start]).map_err(|cause| TensorError::Table { cause })?;
        let starts = chunk_starts(&header, &blob)?;
        let scales = scales(&mut header)?;
        Ok(Self { inner: Arc::new(Inner { header, table, blob, starts, scales }) })
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
        &self.inner.blob[self.chunk_range(chunk)]
    }

    /// Bytes of chunk `chunk` and the [`PADDING_BYTES`] readable bytes that follow it (of the next chunk, or zeros):
    /// the chunk is all but the last `PADDING_BYTES` of the slice.
    pub fn chunk_with_padding(&self, chunk: usize) -> &[u8] {
        let range = self.chunk_range(chunk);
        &self.inner.blob[range.start..range.end + PADDING_BYTES]
    }

    /// As [`CodedTensor::chunk_with_padding`], of consecutive chunks and the zeros between them.
    pub fn chunks_with_padding(&self, chunks: Range<usize>) -> &[u8] {
        let (first, last) = (self.chunk_range(chunks.start), self.chunk_range(chunks.end - 1));
        &self.inner.blob[first.start..last.end + PADDING_BYTES]
    }

    /// Where chunk `chunk` lies in the blob.
    fn chunk_range(&self, chunk: usize) -> Range<usize> {
        let start = self.inner.starts[chunk] as usize;
        let (bytes, _) = index_entry(&self.inner.header, &self.inner.blob, chunk);
        start..start + bytes as usize
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
        let (_, stored) = index_entry(&self.inner.header, &self.inner.blob, chunk);
        chunk_checksum(self.chunk(chunk)) == stored
    }

    /// Checks that every byte outside header, table, index and chunks is zero.
    pub(crate) fn check_padding(&self) -> Result<(), TensorError> {
        let header = &self.inner.header;
        let mut end = (header.index_start() + self.chunk_count() as u64 * INDEX_ENTRY_BYTES as u64) as usize;
        let chunks = (0..self.chunk_count()).map(|chunk| self.chunk_range(chunk));
        let tail = std::iter::once(self.inner.blob.len()..self.inner.blob.len());
        for range in chunks.chain(tail) {
            if let Some(i) = self.inner.blob[end..range.start].iter().position(|&b| b != 0) {
                return Err(TensorError::Padding { offset: (end + i) as u64 });
            }
            end = range.end;
        }
        Ok(())
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
    ///
    /// # Errors
    /// madvise fails.
    pub fn release(&self) -> io::Result<()> {
        self.inner.blob.release()
    }
}

/// xxh3-64 of what the header's checksum covers: the header up to the checksum itself, table and index. The blob must
/// have the length that the header says.
pub(crate) fn side_checksum(header: &TensorHeader, blob: &[u8]) -> u64 {
    let index_end = header.index_start() as usize + header.chunk_count as usize * INDEX_ENTRY_BYTES;
    let mut hash = Xxh3::new();
    hash.update(&blob[..HEADER_BYTES - size_of::<u64>()]);
    hash.update(&blob[HEADER_BYTES..index_end]);
    hash.digest()
}

/// The checksum of a chunk as the index stores it: the low half of its xxh3-64.
pub(crate) fn chunk_checksum(chunk: &[u8]) -> u32 {
    xxh3_64(chunk) as u32
}

/// Length and checksum of a chunk, from the index.
fn index_entry(header: &TensorHeader, blob: &[u8], chunk: usize) -> (u32, u32) {
    let start = header.index_start() as usize + chunk * INDEX_ENTRY_BYTES;
    let u32_at = |at: usize| u32::from_le_bytes([blob[at], blob[at + 1], blob[at + 2], blob[at + 3]]);
    (u32_at(start), u32_at(start + 4))
}

/// Where each chunk starts. The lengths in the index must fill the payload exactly.
fn chunk_starts(header: &TensorHeader, blob: &[u8]) -> Result<Vec<u64>, TensorError> {
    let payload_start = header.payload_start();
    let payload_end = payload_start + header.payload_bytes;
    let mut starts = Vec::with_capacity(header.chunk_count as usize);
    let mut end = payload_start;
    for chunk in 0..header.chunk_count as usize {
        let start = end.next_multiple_of(CHUNK_ALIGN as u64);
        let (bytes, _) = index_entry(header, blob, chunk);
        end = start + u64::from(bytes);
        if bytes == 0 || end > payload_end {
            let message = "a chunk is empty or ends after the payload";
            return Err(TensorError::Field { field: "chunk_bytes", value: u64::from(bytes), message });
        }
        starts.push(start);
    }
    if end != payload_end {
        let message = "the chunks do not fill the payload";
        return Err(TensorError::Field { field: "payload_bytes", value: header.payload_bytes, message });
    }
    Ok(starts)
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
