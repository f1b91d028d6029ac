//! MLX's 4-bit directories, losslessly: packed words to symbols and back.
//!
//! MLX stores a quantized linear as `X.weight` (U32, (rows, cols / 8): eight nibbles a word, lowest first), `X.scales` and
//! `X.biases` ((rows, cols / group_size)), where `w = scale * nibble + bias`; `config.json` says
//! `"quantization": {"group_size": 64, "bits": 4}`, with entries of the same form for layers that differ.

use serde_json::Value;
use tersor_quant::{QuantizedTensor, affine4};

use crate::bytes::Bytes;
use crate::dir::{BIASES, CONFIG_FILE, ModelDir, SCALES, WEIGHT};
use crate::encode::decode_tensor;
use crate::error::{FormatError, TensorError};
use crate::header::ScaleScheme;
use crate::tensor::{CodedTensor, Dtype, RawTensor, Tensor, scale_vec};

/// Nibbles of a word.
const PER_WORD: usize = 8;

/// A directory quantized by MLX, seen as tensors to encode.
#[derive(Clone, Copy, Debug)]
pub struct MlxDir<'a> {
    dir: &'a ModelDir,
    quantization: &'a Value,
}

/// A tensor of an MLX directory.
#[derive(Clone, Copy, Debug)]
pub enum MlxTensor<'a> {
    /// Not quantized.
    Raw(&'a RawTensor),
    /// Quantized: `X.weight` with its scales and biases.
    Quantized(MlxQuantized<'a>),
}

/// A quantized tensor of an MLX directory, still packed.
#[derive(Clone, Copy, Debug)]
pub struct MlxQuantized<'a> {
    words: &'a RawTensor,
    scales: &'a RawTensor,
    biases: &'a RawTensor,
    rows: usize,
    cols: usize,
    group_size: u32,
}

/// A tensor as MLX stores it.
#[derive(Clone, Debug)]
pub struct MlxParts {
    /// `X.weight`: U32, (rows, cols / 8).
    pub words: RawTensor,
    /// `X.scales`: (rows, cols / group_size).
    pub scales: RawTensor,
    /// `X.biases`: as the scales.
    pub biases: RawTensor,
}

impl<'a> MlxDir<'a> {
    /// Sees `dir` as MLX's, or `None` if its configuration has no `quantization`.
    pub fn new(dir: &'a ModelDir) -> Option<Self> {
        let quantization = dir.config().get("quantization").filter(|q| q.is_object() && !dir.is_tersor())?;
        Some(Self { dir, quantization })
    }

    /// All tensors by the model's names, ascending; scales and biases come with their weights.
    ///
    /// # Errors
    /// A quantized tensor of other than 4 bits or another mode than affine (unsupported), or one whose parts do not fit
    /// each other.
    pub fn tensors(&self) -> Result<Vec<(&'a str, MlxTensor<'a>)>, FormatError> {
        let mut tensors = Vec::new();
        for (name, tensor) in self.dir.tensors() {
            let Tensor::Raw(raw) = tensor else { continue };
            if let Some(stem) = name.strip_suffix(WEIGHT)
                && raw.dtype() == Dtype::U32
            {
                let quantized = self.quantized(stem, raw);
                let quantized = quantized.map_err(|cause| FormatError::Tensor { place: self.dir.place(name), cause })?;
                tensors.push((name, MlxTensor::Quantized(quantized)));
            } else if !self.belongs_to_weight(name) {
                tensors.push((name, MlxTensor::Raw(raw)));
            }
        }
        Ok(tensors)
    }

    /// Whether `name` is scales or biases of a quantized weight.
    fn belongs_to_weight(&self, name: &str) -> bool {
        let stem = name.strip_suffix(SCALES).or_else(|| name.strip_suffix(BIASES));
        let weight = stem.and_then(|stem| self.dir.tensor(&format!("{stem}{WEIGHT}")));
        matches!(weight, Some(Tensor::Raw(raw)) if raw.dtype() == Dtype::U32)
    }

    fn quantized(&self, stem: &str, words: &'a RawTensor) -> Result<MlxQuantized<'a>, TensorError> {
        // A layer's own entry replaces the directory's.
        let settings = self.quantization.get(stem).filter(|own| own.is_object()).unwrap_or(self.quantization);
        let unsupported = |message: String| TensorError::CodecParams { codec: "mlx", message };
        let bits = settings.get("bits").and_then(Value::as_u64).unwrap_or(4);
        if bits != 4 {
            return Err(unsupported(format!("{bits} bits; only 4 are supported")));
        }
        if let Some(mode) = settings.get("mode").filter(|mode| *mode != "affine") {
            return Err(unsupported(format!("mode {mode}; only affine is supported")));
        }
        let group_size = settings.get("group_size").and_then(Value::as_u64).unwrap_or(64);
        let Some(group_size) = u32::try_from(group_size).ok().filter(|&size| size > 0) else {
            return Err(unsupported(format!("group size {group_size} in {CONFIG_FILE}")));
        };
        let part = |ending: &str| match self.dir.tensor(&format!("{stem}{ending}")) {
            Some(Tensor::Raw(raw)) => Ok(raw),
            _ => Err(TensorError::MissingPart { part: format!("{stem}{ending}") }),
        };
        let (scales, biases) = (part(SCALES)?, part(BIASES)?);
        let wrong = |part, found: &RawTensor, expected: String| TensorError::PartShape {
            part,
            found: format!("{} {:?}", found.dtype(), found.shape()),
            expected,
        };
        // A matrix without elements may claim any other dimension.
        let (rows, cols) = match *words.shape() {
            [rows, row_words] if rows > 0 && row_words > 0 => (rows, row_words.checked_mul(PER_WORD)),
            _ => (0, None),
        };
        let cols = cols.ok_or_else(|| wrong("weight", words, "a matrix".to_owned()))?;
        let groups = [rows, cols / group_size as usize];
        for (name, part) in [("scales", scales), ("biases", biases)] {
            let is_float = matches!(part.dtype(), Dtype::F16 | Dtype::Bf16 | Dtype::F32);
            if part.shape() != groups || !is_float || part.dtype() != scales.dtype() {
                return Err(wrong(name, part, format!("floats {groups:?} of one type")));
            }
        }
        Ok(MlxQuantized { words, scales, biases, rows, cols, group_size })
    }
}

impl MlxQuantized<'_> {
    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Columns that share a scale and a bias.
    pub fn group_size(&self) -> u32 {
        self.group_size
    }

    /// Symbols, scales and biases: nothing is lost, [`to_mlx`] gives the same bytes back.
    ///
    /// # Errors
    /// A shape or group size that the quantizer does not know.
    pub fn to_tensor(&self) -> Result<QuantizedTensor, TensorError> {
        let words: Vec<u32> = self.words.bytes().as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
        let (scales, biases) = (scale_vec(self.scales), scale_vec(self.biases));
        affine4::from_packed(self.rows, self.cols, self.group_size, &words, scales, biases)
            .map_err(|e| TensorError::CodecParams { codec: "mlx", message: e.to_string() })
    }
}

/// A coded tensor in MLX's layout.
///
/// # Errors
/// A tensor that is not group affine or whose symbols are not nibbles, or one that does not decode.
pub fn to_mlx(tensor: &CodedTensor) -> Result<MlxParts, TensorError> {
    let unsupported = |message: String| TensorError::CodecParams { codec: "mlx", message };
    let scales = tensor.scales();
    let (ScaleScheme::GroupAffine, Some(biases)) = (scales.scheme(), scales.raw_biases()) else {
        return Err(unsupported("only tensors with scales and biases for groups can be packed".to_owned()));
    };
    if !tensor.cols().is_multiple_of(PER_WORD) {
        return Err(unsupported(format!("{} columns are not a multiple of 8", tensor.cols())));
    }
    let words = affine4::pack(&decode_tensor(tensor)?.symbols).map_err(|e| unsupported(e.to_string()))?;
    let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    let shape = vec![tensor.rows(), tensor.cols() / PER_WORD];
    let words = RawTensor::new(Dtype::U32, shape, Bytes::from(bytes))?;
    Ok(MlxParts { words, scales: scales.raw().clone(), biases: biases.clone() })
}
