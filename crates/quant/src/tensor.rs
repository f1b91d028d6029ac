//! The result: symbols and scales.

use crate::Dtype;
use half::{bf16, f16};

/// Scales (or biases) in the float type they are stored in.
#[derive(Clone, PartialEq, Debug)]
pub enum ScaleVec {
    /// Bits of IEEE binary16.
    F16(Vec<u16>),
    /// Bits of bfloat16.
    Bf16(Vec<u16>),
    /// Binary32: only `affine4` over f32 weights, where MLX keeps 32-bit scales.
    F32(Vec<f32>),
}

impl ScaleVec {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            ScaleVec::F16(v) | ScaleVec::Bf16(v) => v.len(),
            ScaleVec::F32(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        match self {
            ScaleVec::F16(_) => Dtype::F16,
            ScaleVec::Bf16(_) => Dtype::Bf16,
            ScaleVec::F32(_) => Dtype::F32,
        }
    }

    /// Element `index` as f32, exactly.
    ///
    /// # Panics
    /// If `index` is not below `len()`.
    pub fn get(&self, index: usize) -> f32 {
        match self {
            ScaleVec::F16(v) => f16::from_bits(v[index]).to_f32(),
            ScaleVec::Bf16(v) => bf16::from_bits(v[index]).to_f32(),
            ScaleVec::F32(v) => v[index],
        }
    }

    /// The elements as little-endian bytes, `len() * dtype().bytes()` of them: what a safetensors file holds.
    pub fn to_le_bytes(&self) -> Vec<u8> {
        match self {
            ScaleVec::F16(v) | ScaleVec::Bf16(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            ScaleVec::F32(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
        }
    }

    /// The inverse of [`to_le_bytes`](Self::to_le_bytes); `None` if the length is not a multiple of the element's.
    pub fn from_le_bytes(dtype: Dtype, bytes: &[u8]) -> Option<ScaleVec> {
        if !bytes.len().is_multiple_of(dtype.bytes()) {
            return None;
        }
        let halves = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
        Some(match dtype {
            Dtype::F16 => ScaleVec::F16(halves()),
            Dtype::Bf16 => ScaleVec::Bf16(halves()),
            Dtype::F32 => ScaleVec::F32(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()),
        })
    }
}

/// How symbols become weights.
#[derive(Clone, PartialEq, Debug)]
pub enum Scales {
    /// `w = scale * 2^scale_exponent * symbol` for the whole tensor.
    Tensor {
        /// Bits of IEEE binary16.
        scale: u16,
        /// Power of two that keeps fp16 scales out of the subnormal range; nearly always 0.
        scale_exponent: i8,
    },
    /// `w = scales[row] * 2^scale_exponent * symbol`.
    Row {
        /// Bits of IEEE binary16, one per row.
        scales: Vec<u16>,
        /// Power of two shared by all rows; nearly always 0.
        scale_exponent: i8,
    },
    /// `w = scale * symbol` without biases, `w = scale * (symbol + 8) + bias` with.
    Group {
        /// Columns that share a scale.
        group_size: u32,
        /// (rows, cols / group_size), row-major.
        scales: ScaleVec,
        /// As `scales`; `affine4` has them, `q4_0` does not.
        biases: Option<ScaleVec>,
    },
}

/// A quantized tensor.
#[derive(Clone, PartialEq, Debug)]
pub struct QuantizedTensor {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// (rows, cols), row-major.
    pub symbols: Vec<i16>,
    /// How symbols become weights.
    pub scales: Scales,
}

impl QuantizedTensor {
    /// Writes the weights that row `row` stands for to `out`, which has `cols` elements.
    ///
    /// # Panics
    /// If `row` or the length of `out` does not fit the tensor.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "row of {} columns", self.cols);
        let symbols = &self.symbols[row * self.cols..][..self.cols];
        match &self.scales {
            Scales::Tensor { scale, scale_exponent } => scaled(symbols, real_scale(*scale, *scale_exponent), out),
            Scales::Row { scales, scale_exponent } => scaled(symbols, real_scale(scales[row], *scale_exponent), out),
            Scales::Group { group_size, scales, biases } => {
                let group_size = *group_size as usize;
                let groups = self.cols.div_ceil(group_size);
                for (g, (symbols, out)) in symbols.chunks(group_size).zip(out.chunks_mut(group_size)).enumerate() {
                    let scale = scales.get(row * groups + g);
                    match biases {
                        None => scaled(symbols, scale, out),
                        Some(biases) => {
                            let bias = biases.get(row * groups + g);
                            for (w, &s) in out.iter_mut().zip(symbols) {
                                *w = scale * (i32::from(s) + 8) as f32 + bias;
                            }
                        }
                    }
                }
            }
        }
    }
}

/// `f16 * 2^exponent`, rounded once to f32 (exact unless the result is subnormal in f32).
pub(crate) fn real_scale(scale: u16, exponent: i8) -> f32 {
    (f16::from_bits(scale).to_f64() * 2f64.powi(i32::from(exponent))) as f32
}

fn scaled(symbols: &[i16], scale: f32, out: &mut [f32]) {
    for (w, &s) in out.iter_mut().zip(symbols) {
        *w = scale * f32::from(s);
    }
}
