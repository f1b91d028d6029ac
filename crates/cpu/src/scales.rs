//! Scales of a coded linear, laid out for the kernels.

use tersor_format::{CodedTensor, Dtype, RawTensor, ScaleScheme};

use crate::activations::{SEGMENT_COLS, SEGMENT_COLS_MAX};
use crate::ops::f16_to_f32;
use crate::{TILE_COLS, TILE_ROWS, round_up};

/// Scales that the kernels cannot use.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ScalesError {
    /// Neither F16 nor BF16.
    #[error("scales of type {} are not supported, only F16 and BF16", found.name())]
    Dtype {
        /// The stored type.
        found: Dtype,
    },
    /// Groups the kernels have no segment for.
    #[error("groups of {group_size} columns are not supported: a group is a multiple of 4 columns up to {SEGMENT_COLS_MAX}")]
    GroupSize {
        /// Columns of a group.
        group_size: usize,
    },
    /// Fewer or more scales than the shape asks for.
    #[error("{found} scales or biases are stored, the shape asks for {expected}")]
    Count {
        /// As the shape has it.
        expected: usize,
        /// As stored.
        found: usize,
    },
    /// An infinity or a NaN.
    #[error("scale or bias {index} is not finite")]
    NotFinite {
        /// Index in the stored order.
        index: usize,
    },
}

/// Scales of one matrix. 16-bit group scales stay 16 bits wide and are transposed, so that a kernel
/// loads those of a row tile at once.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelScales {
    rows: usize,
    cols: usize,
    kind: Kind,
}

#[derive(Clone, Debug, PartialEq)]
enum Kind {
    /// (rows padded to 16); padding is 0.
    Row(Vec<f32>),
    Group(Groups),
}

#[derive(Clone, Debug, PartialEq)]
struct Groups {
    group_size: usize,
    groups: usize,
    brain: bool,
    /// (row tile, group, 16): bits of f16 or bf16.
    scales: Vec<u16>,
    /// (row tile, group, 16), for affine scales.
    biases: Option<Vec<u16>>,
}

/// The scales of one row tile.
#[derive(Clone, Copy)]
pub(crate) enum TileScales<'a> {
    /// (16)
    Row(&'a [f32; TILE_ROWS]),
    /// (group, 16); f16 bits, or bf16 bits if `brain`.
    Group { scales: &'a [[u16; TILE_ROWS]], biases: Option<&'a [[u16; TILE_ROWS]]>, brain: bool },
}

/// The value of a stored 16-bit scale.
#[inline(always)]
pub(crate) fn widen(bits: u16, brain: bool) -> f32 {
    if brain { f32::from_bits(u32::from(bits) << 16) } else { f16_to_f32(bits) }
}

impl KernelScales {
    /// The scales of a coded tensor.
    ///
    /// # Errors
    /// Types, group sizes or counts that the kernels cannot use, and scales that are not finite.
    pub fn from_coded(tensor: &CodedTensor) -> Result<KernelScales, ScalesError> {
        let (rows, cols, view) = (tensor.rows(), tensor.cols(), tensor.scales());
        let exponent = f32::exp2(f32::from(view.exponent()));
        let kind = match view.scheme() {
            ScaleScheme::Tensor => {
                let scale = values(view.raw(), 1)?[0] * exponent;
                let mut padded = vec![scale; rows];
                padded.resize(round_up(rows, TILE_ROWS), 0.0);
                Kind::Row(padded)
            }
            ScaleScheme::Row => {
                let mut padded: Vec<f32> = values(view.raw(), rows)?.into_iter().map(|s| s * exponent).collect();
                padded.resize(round_up(rows, TILE_ROWS), 0.0);
                Kind::Row(padded)
            }
            ScaleScheme::GroupAffine | ScaleScheme::GroupSymmetric => {
                let group_size = view.group_size() as usize;
                if group_size == 0 || !group_size.is_multiple_of(TILE_COLS) || group_size > SEGMENT_COLS_MAX {
                    return Err(ScalesError::GroupSize { group_size });
                }
                let groups = cols.div_ceil(group_size);
                let brain = view.raw().dtype() == Dtype::Bf16;
                // One flag serves both: biases of another type are converted, or refused where that
                // would lose bits.
                let biases = match view.raw_biases() {
                    Some(raw) if (raw.dtype() == Dtype::Bf16) != brain => {
                        return Err(ScalesError::Dtype { found: raw.dtype() });
                    }
                    Some(raw) => Some(transposed(raw, rows, groups)?),
                    None if view.scheme() == ScaleScheme::GroupAffine => {
                        return Err(ScalesError::Count { expected: rows * groups, found: 0 });
                    }
                    None => None,
                };
                Kind::Group(Groups { group_size, groups, brain, scales: transposed(view.raw(), rows, groups)?, biases })
            }
        };
        Ok(KernelScales { rows, cols, kind })
    }

    /// One f32 scale per row, for a matrix of `scales.len()` rows.
    pub fn from_rows(scales: &[f32], cols: usize) -> KernelScales {
        let mut padded = scales.to_vec();
        padded.resize(round_up(scales.len(), TILE_ROWS), 0.0);
        KernelScales { rows: scales.len(), cols, kind: Kind::Row(padded) }
    }

    /// Rows of the matrix.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the matrix.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Columns that share an activation scale: what
    /// [`Activations::quantize`](crate::Activations::quantize) wants for this matrix. The group
    /// size, or [`SEGMENT_COLS`].
    pub fn segment(&self) -> usize {
        match &self.kind {
            Kind::Row(_) => SEGMENT_COLS,
            Kind::Group(g) => g.group_size,
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        let bytes = match &self.kind {
            Kind::Row(scales) => size_of_val(&scales[..]),
            Kind::Group(g) => size_of_val(&g.scales[..]) + g.biases.as_ref().map_or(0, |b| size_of_val(&b[..])),
        };
        bytes as u64
    }

    pub(crate) fn tile(&self, tile: usize) -> TileScales<'_> {
        match &self.kind {
            Kind::Row(scales) => TileScales::Row(&scales.as_chunks().0[tile]),
            Kind::Group(g) => TileScales::Group {
                scales: &g.scales.as_chunks().0[tile * g.groups..][..g.groups],
                biases: g.biases.as_ref().map(|b| &b.as_chunks().0[tile * g.groups..][..g.groups]),
                brain: g.brain,
            },
        }
    }

    /// The real weight of a symbol, by the formulas of `tersor_quant`: `scale * symbol`, or `scale
    /// * (symbol + 8) + bias`.
    pub(crate) fn weight(&self, row: usize, col: usize, symbol: i16) -> f32 {
        match (self.tile(row / TILE_ROWS), row % TILE_ROWS) {
            (TileScales::Row(scales), lane) => scales[lane] * f32::from(symbol),
            (TileScales::Group { scales, biases, brain }, lane) => {
                let group = col / self.segment();
                let scale = widen(scales[group][lane], brain);
                match biases {
                    None => scale * f32::from(symbol),
                    Some(biases) => scale * (i32::from(symbol) + 8) as f32 + widen(biases[group][lane], brain),
                }
            }
        }
    }
}

/// The 16-bit elements of a raw tensor, all finite.
fn bits(raw: &RawTensor, expected: usize) -> Result<Vec<u16>, ScalesError> {
    if !matches!(raw.dtype(), Dtype::F16 | Dtype::Bf16) {
        return Err(ScalesError::Dtype { found: raw.dtype() });
    }
    let brain = raw.dtype() == Dtype::Bf16;
    let bits: Vec<u16> = raw.bytes().as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b)).collect();
    if bits.len() != expected {
        return Err(ScalesError::Count { expected, found: bits.len() });
    }
    match bits.iter().position(|b| !widen(*b, brain).is_finite()) {
        Some(index) => Err(ScalesError::NotFinite { index }),
        None => Ok(bits),
    }
}

fn values(raw: &RawTensor, expected: usize) -> Result<Vec<f32>, ScalesError> {
    let brain = raw.dtype() == Dtype::Bf16;
    Ok(bits(raw, expected)?.into_iter().map(|b| widen(b, brain)).collect())
}

/// (rows, groups) to (row tile, group, 16); padding rows are 0.
fn transposed(raw: &RawTensor, rows: usize, groups: usize) -> Result<Vec<u16>, ScalesError> {
    let bits = bits(raw, rows * groups)?;
    let mut out = vec![0u16; round_up(rows, TILE_ROWS) * groups];
    for (row, scales) in bits.chunks_exact(groups).enumerate() {
        for (group, s) in scales.iter().enumerate() {
            out[(row / TILE_ROWS * groups + group) * TILE_ROWS + row % TILE_ROWS] = *s;
        }
    }
    Ok(out)
}
