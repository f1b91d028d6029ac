//! Coded matrices: encode, decode, multiply.

use numpy::{Element, PyArray1, PyArray2, PyArrayMethods, PyReadwriteArray2, PyUntypedArrayMethods, ToPyArray};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use tersor_codec::{Codec, Histogram};
use tersor_cpu::{Activations, Job, KernelScales, Matrix, decode_affine4, matmul};
use tersor_format::{CHUNK_SYMBOLS_TARGET, CodedTensor, TensorError, TensorHeader, decode_tensor, encode_tensor};
use tersor_quant::{QuantizedTensor, Scales, affine4};

use crate::errors::OrRaise;
use crate::{arrays, machine};

/// 1.0 in binary16.
const ONE: u16 = 0x3c00;

fn codec(id: &str) -> PyResult<Codec> {
    id.parse::<Codec>().or_raise()
}

/// A vector as a NumPy matrix.
fn matrix<T: Element>(py: Python<'_>, values: Vec<T>, rows: usize, cols: usize) -> PyResult<Bound<'_, PyArray2<T>>> {
    PyArray1::from_vec(py, values).reshape([rows, cols])
}

/// Codes symbols whose scales are not Tersor's business: the blob says scheme `tensor`, scale 1.
fn encode_symbols<'py>(py: Python<'py>, rows: usize, cols: usize, symbols: Vec<i16>, codec: Codec) -> PyResult<Bound<'py, PyArray1<u8>>> {
    let scales = Scales::Tensor { scale: ONE, scale_exponent: 0 };
    let tensor = QuantizedTensor { rows, cols, symbols, scales };
    let encoded = py.detach(|| encode_tensor(&tensor, codec, CHUNK_SYMBOLS_TARGET)).or_raise()?;
    Ok(encoded.blob().to_pyarray(py))
}

/// Codes symbols, (rows, cols), to a blob: (bytes). The blob says scheme ``tensor`` with scale 1: scales are the caller's business.
///
/// ``codec``: rans, rans-precise, huffman, block-ans, tiered, rans-pairs, fixed, or a full id such as ``rans/s16-w8-p7-l64``.
#[pyfunction]
#[pyo3(signature = (symbols, *, codec = "rans"))]
pub fn encode<'py>(py: Python<'py>, symbols: &Bound<'py, PyAny>, codec: &str) -> PyResult<Bound<'py, PyArray1<u8>>> {
    let codec = self::codec(codec)?;
    let arrays::Symbols { rows, cols, symbols } = arrays::symbols(symbols)?;
    encode_symbols(py, rows, cols, symbols, codec)
}

/// Codes 4-bit weights in MLX's layout, (rows, cols / 8), to the blob of their symbols, nibble - 8.
#[pyfunction]
#[pyo3(signature = (packed, *, codec = "rans"))]
pub fn encode_affine4<'py>(py: Python<'py>, packed: &Bound<'py, PyAny>, codec: &str) -> PyResult<Bound<'py, PyArray1<u8>>> {
    let codec = self::codec(codec)?;
    let (rows, row_words, words) = arrays::words(packed)?;
    let symbols = py.detach(|| affine4::unpack(&words));
    encode_symbols(py, rows, row_words * 8, symbols, codec)
}

/// Empirical entropy of symbols of any shape, bits per symbol.
#[pyfunction]
pub fn entropy(py: Python<'_>, symbols: &Bound<'_, PyAny>) -> PyResult<f64> {
    let symbols = arrays::symbols_any(symbols)?;
    Ok(py.detach(|| entropy_bits(&symbols)))
}

fn entropy_bits(symbols: &[i16]) -> f64 {
    let mut histogram = Histogram::new();
    histogram.add(symbols);
    histogram.entropy_bits()
}

/// A blob, opened: header, table, index and the checksums of all chunks are checked once.
///
/// A blob of any scheme will do, such as ``X.coded`` of a model directory: symbols are what comes out, scales are not applied.
#[pyclass(frozen, module = "tersor")]
pub struct Coded {
    tensor: CodedTensor,
    /// As stored, with the scheme and group size that [`CodedTensor::open_symbols`] puts aside.
    header: TensorHeader,
}

impl Coded {
    /// Opens a blob and compares every chunk with its checksum.
    fn open(py: Python<'_>, blob: &Bound<'_, PyAny>) -> PyResult<Self> {
        let blob = arrays::blob(blob)?;
        py.detach(|| {
            let header = TensorHeader::parse(&blob)?;
            let tensor = CodedTensor::open_symbols(blob.into())?;
            match (0..tensor.chunk_count()).find(|&chunk| !tensor.chunk_checksum_ok(chunk)) {
                Some(chunk) => Err(TensorError::ChunkChecksum { chunk }),
                None => Ok(Self { tensor, header }),
            }
        })
        .or_raise()
    }
}

#[pymethods]
impl Coded {
    #[new]
    fn new(py: Python<'_>, blob: &Bound<'_, PyAny>) -> PyResult<Self> {
        Self::open(py, blob)
    }

    #[getter]
    fn rows(&self) -> usize {
        self.tensor.rows()
    }

    #[getter]
    fn cols(&self) -> usize {
        self.tensor.cols()
    }

    #[getter]
    fn shape(&self) -> (usize, usize) {
        (self.tensor.rows(), self.tensor.cols())
    }

    /// The codec's full id.
    #[getter]
    fn codec(&self) -> String {
        self.tensor.codec().to_string()
    }

    /// How symbols become weights, by the header: tensor, row, group affine, group symmetric.
    #[getter]
    fn scheme(&self) -> &'static str {
        self.header.scheme.name()
    }

    /// Columns that share a scale, by the header; 0 for schemes without groups.
    #[getter]
    fn group_size(&self) -> u32 {
        self.header.group_size
    }

    /// Bytes of the blob.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.tensor.coded_bytes()
    }

    /// All bytes of the blob, in bits per weight.
    #[getter]
    fn bits_per_weight(&self) -> f64 {
        self.tensor.coded_bytes() as f64 * 8.0 / (self.tensor.rows() as f64 * self.tensor.cols() as f64)
    }

    /// Rows that are coded together: the least that decoding some rows takes.
    #[getter]
    fn rows_per_chunk(&self) -> usize {
        self.header.row_tiles_per_chunk as usize * tersor_format::TILE_ROWS
    }

    /// A copy of the blob.
    fn blob<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u8>> {
        self.tensor.blob().to_pyarray(py)
    }

    /// The symbols: (rows, cols).
    fn decode<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<i16>>> {
        let decoded = py.detach(|| decode_tensor(&self.tensor)).or_raise()?;
        matrix(py, decoded.symbols, decoded.rows, decoded.cols)
    }

    /// Empirical entropy of the symbols, bits per weight; decodes them.
    fn entropy(&self, py: Python<'_>) -> PyResult<f64> {
        let entropy = || decode_tensor(&self.tensor).map(|decoded| entropy_bits(&decoded.symbols));
        py.detach(entropy).or_raise()
    }

    /// See :func:`tersor.blob_info`.
    fn info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let info = PyDict::new(py);
        info.set_item("rows", self.rows())?;
        info.set_item("cols", self.cols())?;
        info.set_item("scheme", self.scheme())?;
        info.set_item("group_size", self.group_size())?;
        info.set_item("codec", self.codec())?;
        info.set_item("chunks", self.tensor.chunk_count())?;
        info.set_item("rows_per_chunk", self.rows_per_chunk())?;
        info.set_item("bytes", self.nbytes())?;
        info.set_item("bits_per_weight", self.bits_per_weight())?;
        info.set_item("entropy_bits", self.entropy(py)?)?;
        info.set_item("symbol_min", self.header.symbol_min)?;
        info.set_item("symbol_max", self.header.symbol_max)?;
        Ok(info)
    }

    /// Rows ``start`` to ``stop`` in MLX's layout: (stop - start, cols / 8). ``out``, C-contiguous, is filled and returned if given.
    #[pyo3(signature = (out = None, *, start = 0, stop = None))]
    fn decode_affine4<'py>(
        &self,
        py: Python<'py>,
        out: Option<&Bound<'py, PyAny>>,
        start: usize,
        stop: Option<usize>,
    ) -> PyResult<Bound<'py, PyArray2<u32>>> {
        let rows = start..stop.unwrap_or(self.tensor.rows());
        if rows.start > rows.end || rows.end > self.tensor.rows() {
            let text = format!("rows {} to {} do not lie in 0 to {}", rows.start, rows.end, self.tensor.rows());
            return Err(PyValueError::new_err(text));
        }
        let (pool, level) = machine();
        let words = self.tensor.cols() / 8;
        let decode = |out: &mut [u32]| py.detach(|| decode_affine4(*level, &self.tensor, rows.clone(), out, Some(pool))).or_raise();
        let Some(out) = out else {
            let mut decoded = vec![0; rows.len() * words];
            decode(&mut decoded)?;
            return matrix(py, decoded, rows.len(), words);
        };
        let wrong = || PyValueError::new_err(format!("out must be a writable, C-contiguous uint32 array ({}, {words})", rows.len()));
        let array = out.cast::<PyArray2<u32>>().map_err(|_| wrong())?;
        let mut writable: PyReadwriteArray2<'_, u32> = array.try_readwrite().map_err(|_| wrong())?;
        if writable.shape() != [rows.len(), words] || !writable.is_c_contiguous() {
            return Err(wrong());
        }
        decode(writable.as_slice_mut().map_err(|_| wrong())?)?;
        Ok(array.clone())
    }

    fn __repr__(&self) -> String {
        let (rows, cols) = self.shape();
        format!("Coded({rows} x {cols}, {}, {:.3} bits per weight)", self.codec(), self.bits_per_weight())
    }
}

/// A blob with its group scales, ready to be multiplied without being materialized.
///
/// ``scales``, ``biases``: (rows, cols / group_size), float16, float32, or bfloat16 (``ml_dtypes``, or its bits as uint16).
#[pyclass(frozen, module = "tersor")]
pub struct CodedLinear {
    tensor: CodedTensor,
    scales: KernelScales,
}

#[pymethods]
impl CodedLinear {
    #[new]
    #[pyo3(signature = (blob, scales, biases, group_size))]
    fn new(
        py: Python<'_>,
        blob: &Bound<'_, PyAny>,
        scales: &Bound<'_, PyAny>,
        biases: Option<&Bound<'_, PyAny>>,
        group_size: usize,
    ) -> PyResult<Self> {
        let tensor = match blob.cast::<Coded>() {
            Ok(coded) => coded.get().tensor.clone(),
            Err(_) => Coded::open(py, blob)?.tensor,
        };
        let scales = arrays::reals("scales", scales)?;
        let biases = biases.map(|biases| arrays::reals("biases", biases)).transpose()?;
        let (rows, cols) = (tensor.rows(), tensor.cols());
        let shape = [rows, cols.div_ceil(group_size.max(1))];
        for (what, part) in [("scales", Some(&scales)), ("biases", biases.as_ref())] {
            if let Some(part) = part.filter(|part| part.shape() != shape) {
                let text =
                    format!("{what} must be {shape:?} for a matrix {rows} x {cols} in groups of {group_size}, not {:?}", part.shape());
                return Err(PyValueError::new_err(text));
            }
        }
        let scales = py.detach(|| KernelScales::from_groups(rows, cols, group_size, &scales, biases.as_ref())).or_raise()?;
        Ok(Self { tensor, scales })
    }

    #[getter]
    fn shape(&self) -> (usize, usize) {
        (self.tensor.rows(), self.tensor.cols())
    }

    /// ``x``: (cols) or (tokens, cols). Returns (rows) or (tokens, rows). Activations are rounded to int8 with one scale for each group.
    fn __call__<'py>(&self, py: Python<'py>, x: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let (tokens, cols, values) = arrays::activations(x)?;
        let rows = self.tensor.rows();
        if cols != self.tensor.cols() {
            return Err(PyValueError::new_err(format!("x has {cols} columns, the matrix {}", self.tensor.cols())));
        }
        let (pool, level) = machine();
        let mut out = vec![0f32; tokens * rows];
        py.detach(|| {
            if tokens == 0 {
                return Ok(());
            }
            let x = Activations::quantize(*level, &values, tokens, cols, self.scales.segment());
            let matrix = Matrix::Coded(&self.tensor);
            matmul(pool, *level, &mut [Job { matrix, scales: &self.scales, x: &x, out: &mut out }])
        })
        .or_raise()?;
        let out = PyArray1::from_vec(py, out);
        if x.getattr("ndim")?.extract::<usize>()? == 1 { Ok(out.into_any()) } else { Ok(out.reshape([tokens, rows])?.into_any()) }
    }

    fn __repr__(&self) -> String {
        format!("CodedLinear({} x {}, {})", self.tensor.rows(), self.tensor.cols(), self.tensor.codec())
    }
}
