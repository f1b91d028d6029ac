//! Quantized tensors to blobs and back.

use rayon::prelude::*;
use tersor_codec::{Codec, Histogram, PADDING_BYTES, Table, decode_chunk, encode_chunk};
use tersor_quant::{QuantizedTensor, ScaleVec, Scales};

use crate::bytes::Bytes;
use crate::error::{EncodeTensorError, TensorError};
use crate::header::{
    CHUNK_ALIGN, HEADER_BYTES, NARROW_MAX, NARROW_MIN, ScaleScheme, TILE_COLS, TILE_ROWS, TILE_SYMBOLS, TensorHeader, limit,
};
use crate::limits;
use crate::tensor::{CodedTensor, Dtype, RawTensor, chunk_checksum, side_checksum};

/// Symbols in a chunk unless the caller asks for another number.
pub const CHUNK_SYMBOLS_TARGET: u32 = 65_536;

/// Symbols that one task counts.
const HISTOGRAM_TASK_SYMBOLS: usize = 1 << 20;

/// A tensor encoded in memory: a blob with its scales and biases.
#[derive(Clone, Debug)]
pub struct EncodedTensor {
    coded: CodedTensor,
}

impl EncodedTensor {
    /// The tensor as a kernel sees it.
    pub fn tensor(&self) -> &CodedTensor {
        &self.coded
    }

    /// The blob's bytes.
    pub fn blob(&self) -> &[u8] {
        self.coded.blob()
    }

    /// The stored scales.
    pub fn scales(&self) -> &RawTensor {
        self.coded.scales().raw()
    }

    /// The stored biases, if the scheme has them.
    pub fn biases(&self) -> Option<&RawTensor> {
        self.coded.scales().raw_biases()
    }
}

/// Where row `row` of a chunk goes: the index of its column 0 among the chunk's symbols.
/// Column `col` is at `start + col / 4 * 64 + col % 4`.
fn row_start(row: usize, col_steps: usize) -> usize {
    row / TILE_ROWS * col_steps * TILE_SYMBOLS + row % TILE_ROWS * TILE_COLS
}

/// Encodes a tensor in chunks of about `chunk_symbols_target` symbols (whole row tiles, at least one), in parallel on
/// rayon's current pool. The bytes do not depend on the number of threads.
///
/// Memory beyond the input: the output twice, and a chunk of symbols for each thread.
///
/// # Errors
/// Inconsistent input, limits exceeded, or symbols that the codec cannot represent.
pub fn encode_tensor(tensor: &QuantizedTensor, codec: Codec, chunk_symbols_target: u32) -> Result<EncodedTensor, EncodeTensorError> {
    let &QuantizedTensor { rows, cols, .. } = tensor;
    for (what, value) in [("rows", rows), ("cols", cols)] {
        limit(what, value as u64, limits::DIM_MAX).map_err(EncodeTensorError::Format)?;
    }
    if rows * cols != tensor.symbols.len() || rows == 0 || cols == 0 {
        return Err(EncodeTensorError::SymbolCount { rows, cols, found: tensor.symbols.len() });
    }
    let (row_tiles, col_steps) = (rows.div_ceil(TILE_ROWS), cols.div_ceil(TILE_COLS));
    let row_tile_symbols = col_steps * TILE_SYMBOLS;
    let symbols = row_tiles * row_tile_symbols;
    limit("number of symbols", symbols as u64, limits::SYMBOLS_MAX).map_err(EncodeTensorError::Format)?;
    let parts = Parts::new(tensor)?;

    let chunk_symbols = (chunk_symbols_target as usize).min(limits::CHUNK_SYMBOLS_MAX as usize);
    let row_tiles_per_chunk = ((chunk_symbols + row_tile_symbols / 2) / row_tile_symbols)
        .min(limits::CHUNK_SYMBOLS_MAX as usize / row_tile_symbols)
        .clamp(1, row_tiles);
    let chunk_rows = row_tiles_per_chunk * TILE_ROWS;

    let histogram = histogram(&tensor.symbols, symbols);
    let table = Table::build(codec, &histogram).map_err(EncodeTensorError::Table)?;
    let chunks = tensor
        .symbols
        .par_chunks(chunk_rows * cols)
        .enumerate()
        .map_init(Vec::new, |tiled: &mut Vec<i16>, (chunk, symbols)| {
            tiled.clear();
            tiled.resize((symbols.len() / cols).div_ceil(TILE_ROWS) * row_tile_symbols, 0);
            for (row, symbols) in symbols.chunks_exact(cols).enumerate() {
                let start = row_start(row, col_steps);
                // Whole steps apart from the tail, so that the copy has a constant length.
                let (whole, tail) = symbols.as_chunks::<TILE_COLS>();
                for (step, symbols) in whole.iter().enumerate() {
                    tiled[start + step * TILE_SYMBOLS..][..TILE_COLS].copy_from_slice(symbols);
                }
                if !tail.is_empty() {
                    tiled[start + whole.len() * TILE_SYMBOLS..][..tail.len()].copy_from_slice(tail);
                }
            }
            let mut bytes = Vec::new();
            match encode_chunk(&table, tiled, &mut bytes) {
                Ok(()) => Ok(bytes),
                Err(cause) => Err(EncodeTensorError::Chunk { chunk, cause }),
            }
        })
        .collect::<Result<Vec<_>, _>>()?;

    let mut table_bytes = Vec::new();
    table.write(&mut table_bytes);
    let payload_bytes = chunks.iter().fold(0, |end: u64, chunk| end.next_multiple_of(CHUNK_ALIGN as u64) + chunk.len() as u64);
    let wide = |symbol: i16| !(i16::from(NARROW_MIN)..=i16::from(NARROW_MAX)).contains(&symbol);
    let clamp = |symbol: Option<i16>| symbol.unwrap_or(0).clamp(i16::from(i8::MIN), i16::from(i8::MAX)) as i8;
    let mut header = TensorHeader {
        scheme: parts.scheme,
        codec,
        rows: rows as u32,
        cols: cols as u32,
        group_size: parts.group_size,
        row_tiles_per_chunk: row_tiles_per_chunk as u32,
        chunk_count: chunks.len() as u32,
        table_bytes: table_bytes.len() as u32,
        payload_bytes,
        wide_count: histogram.iter().filter(|&(symbol, _)| wide(symbol)).map(|(_, n)| n as u32).sum(),
        symbol_min: clamp(histogram.min()),
        symbol_max: clamp(histogram.max()),
        scale_exponent: parts.scale_exponent,
        checksum: 0,
    };

    let blob_bytes = header.blob_bytes() as usize;
    let mut blob = Vec::with_capacity(blob_bytes);
    blob.extend_from_slice(&header.write());
    blob.extend_from_slice(&table_bytes);
    for chunk in &chunks {
        // A chunk holds at most 2^28 symbols and no codec needs 16 bytes for one.
        blob.extend_from_slice(&u32::try_from(chunk.len()).expect("chunk below 4 GiB").to_le_bytes());
        blob.extend_from_slice(&chunk_checksum(chunk).to_le_bytes());
    }
    for chunk in chunks {
        blob.resize(blob.len().next_multiple_of(CHUNK_ALIGN), 0);
        blob.extend_from_slice(&chunk);
    }
    debug_assert!(blob.len() + PADDING_BYTES <= blob_bytes);
    blob.resize(blob_bytes, 0);
    header.checksum = side_checksum(&header, &blob);
    blob[..HEADER_BYTES].copy_from_slice(&header.write());

    // Opening what was just built holds the writer to the reader's rules.
    let coded = CodedTensor::open(Bytes::from(blob), parts.scales, parts.biases).map_err(EncodeTensorError::Format)?;
    Ok(EncodedTensor { coded })
}

/// Counts of `symbols` and of the zeros that fill them up to `padded` symbols.
fn histogram(symbols: &[i16], padded: usize) -> Histogram {
    let mut histogram = symbols
        .par_chunks(HISTOGRAM_TASK_SYMBOLS)
        .fold(Histogram::new, |mut histogram, symbols| {
            histogram.add(symbols);
            histogram
        })
        .reduce(Histogram::new, |mut a, b| {
            a.merge(&b);
            a
        });
    const ZEROS: [i16; 4096] = [0; 4096];
    let mut padding = padded - symbols.len();
    while padding > 0 {
        let count = padding.min(ZEROS.len());
        histogram.add(&ZEROS[..count]);
        padding -= count;
    }
    histogram
}

/// Scales and biases as the file stores them.
struct Parts {
    scheme: ScaleScheme,
    group_size: u32,
    scale_exponent: i8,
    scales: RawTensor,
    biases: Option<RawTensor>,
}

impl Parts {
    fn new(tensor: &QuantizedTensor) -> Result<Self, EncodeTensorError> {
        let &QuantizedTensor { rows, cols, .. } = tensor;
        let raw = |part: &'static str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>| {
            let (expected, found) = (shape.iter().product(), bytes.len() / dtype.bytes());
            RawTensor::new(dtype, shape.to_vec(), Bytes::from(bytes)).map_err(|_| EncodeTensorError::ScaleCount { part, expected, found })
        };
        let halves = |scales: &[u16]| scales.iter().flat_map(|s| s.to_le_bytes()).collect::<Vec<u8>>();
        let parts = match &tensor.scales {
            &Scales::Tensor { scale, scale_exponent } => Self {
                scheme: ScaleScheme::Tensor,
                group_size: 0,
                scale_exponent,
                scales: raw("scales", Dtype::F16, &[1], halves(&[scale]))?,
                biases: None,
            },
            Scales::Row { scales, scale_exponent } => Self {
                scheme: ScaleScheme::Row,
                group_size: 0,
                scale_exponent: *scale_exponent,
                scales: raw("scales", Dtype::F16, &[rows], halves(scales))?,
                biases: None,
            },
            Scales::Group { group_size, scales, biases } => {
                let shape = [rows, cols.div_ceil((*group_size).max(1) as usize)];
                let group = |part, values: &ScaleVec| raw(part, values.dtype().into(), &shape, values.to_le_bytes());
                Self {
                    scheme: if biases.is_some() { ScaleScheme::GroupAffine } else { ScaleScheme::GroupSymmetric },
                    group_size: *group_size,
                    scale_exponent: 0,
                    scales: group("scales", scales)?,
                    biases: biases.as_ref().map(|b| group("biases", b)).transpose()?,
                }
            }
        };
        for (part, tensor) in [("scale", Some(&parts.scales)), ("bias", parts.biases.as_ref())] {
            let values = tensor.map_or(Ok(Vec::new()), RawTensor::to_f32).map_err(EncodeTensorError::Format)?;
            if let Some(index) = values.iter().position(|v| !v.is_finite()) {
                return Err(EncodeTensorError::NotFinite { part, index });
            }
        }
        Ok(parts)
    }
}

/// Decodes a whole tensor with the codec's oracle, in parallel on rayon's current pool: symbols row-major, scales as stored.
///
/// # Errors
/// A chunk whose checksum does not match or that does not decode, or memory that cannot be had.
pub fn decode_tensor(tensor: &CodedTensor) -> Result<QuantizedTensor, TensorError> {
    let (rows, cols, col_steps) = (tensor.rows(), tensor.cols(), tensor.col_steps());
    let mut symbols: Vec<i16> = zeros(rows * cols)?;
    let chunk_rows = tensor.header().row_tiles_per_chunk as usize * TILE_ROWS;
    symbols.par_chunks_mut(chunk_rows * cols).enumerate().try_for_each_init(Vec::new, |tiled, (chunk, out)| {
        decode_checked(tensor, chunk, tiled)?;
        for (row, out) in out.chunks_exact_mut(cols).enumerate() {
            let start = row_start(row, col_steps);
            for (step, out) in out.chunks_mut(TILE_COLS).enumerate() {
                out.copy_from_slice(&tiled[start + step * TILE_SYMBOLS..][..out.len()]);
            }
        }
        Ok(())
    })?;
    Ok(QuantizedTensor { rows, cols, symbols, scales: tensor.scales().to_scales() })
}

/// Checks and decodes one chunk into `tiled`, which is resized: symbols in the order of the format, padding included.
pub(crate) fn decode_checked(tensor: &CodedTensor, chunk: usize, tiled: &mut Vec<i16>) -> Result<(), TensorError> {
    if !tensor.chunk_checksum_ok(chunk) {
        return Err(TensorError::ChunkChecksum { chunk });
    }
    let symbols = tensor.chunk_symbols(chunk);
    if tiled.len() < symbols {
        *tiled = zeros(symbols)?;
    }
    tiled.truncate(symbols);
    decode_chunk(tensor.table(), tensor.chunk(chunk), tiled).map_err(|cause| TensorError::Decode { chunk, cause })
}

/// A vector of zeros, or an error where there is no memory: the length comes from a file.
fn zeros(len: usize) -> Result<Vec<i16>, TensorError> {
    let mut zeros = Vec::new();
    let out_of_memory = |_| TensorError::OutOfMemory { bytes: len as u64 * size_of::<i16>() as u64 };
    zeros.try_reserve_exact(len).map_err(out_of_memory)?;
    zeros.resize(len, 0);
    Ok(zeros)
}
