//! Scales of a coded linear, laid out for the kernels.

use tersor_format::{CodedTensor, Dtype, RawTensor, ScaleScheme};

use crate::activations::{SEGMENT_COLS, SEGMENT_COLS_MAX};
use crate::ops::f16_to_f32;
use crate::{TILE_COLS, TILE_ROWS, round_up};

/// Scales that the kernels cannot use.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ScalesError {
    /// Not one of F16, BF16 and F32.
    #[error("scales of type {} are not supported, only F16, BF16 and F32", found.name())]
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

/// Scales of one matrix. Group scales keep the type they are stored in (most have 16 bits) and are
/// transposed, so that a kernel loads those of a row tile at once.
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
    /// (row tile, group, 16)
    scales: Values,
    /// (row tile, group, 16), for affine scales.
    biases: Option<Values>,
}

/// Finite reals in the type they are stored in.
#[derive(Clone, Debug, PartialEq)]
enum Values {
    F16(Vec<u16>),
    Bf16(Vec<u16>),
    F32(Vec<f32>),
}

impl Values {
    fn bytes(&self) -> usize {
        match self {
            Values::F16(bits) | Values::Bf16(bits) => size_of_val(&bits[..]),
            Values::F32(reals) => size_of_val(&reals[..]),
        }
    }

    /// `groups` times 16 of them, of the row tile `tile`.
    fn tile(&self, tile: usize, groups: usize) -> TileValues<'_> {
        fn part<T>(all: &[T], tile: usize, groups: usize) -> &[[T; TILE_ROWS]] {
            &all.as_chunks().0[tile * groups..][..groups]
        }
        match self {
            Values::F16(bits) => TileValues::F16(part(bits, tile, groups)),
            Values::Bf16(bits) => TileValues::Bf16(part(bits, tile, groups)),
            Values::F32(reals) => TileValues::F32(part(reals, tile, groups)),
        }
    }
}

/// The scales of one row tile.
#[derive(Clone, Copy)]
pub(crate) enum TileScales<'a> {
    /// (16)
    Row(&'a [f32; TILE_ROWS]),
    Group {
        scales: TileValues<'a>,
        biases: Option<TileValues<'a>>,
    },
}

/// Scales or biases of one row tile: (group, 16)
#[derive(Clone, Copy)]
pub(crate) enum TileValues<'a> {
    F16(&'a [[u16; TILE_ROWS]]),
    Bf16(&'a [[u16; TILE_ROWS]]),
    F32(&'a [[f32; TILE_ROWS]]),
}

impl TileValues<'_> {
    /// Those of a group.
    #[inline(always)]
    pub(crate) fn group(self, group: usize) -> [f32; TILE_ROWS] {
        match self {
            TileValues::F16(bits) => bits[group].map(f16_to_f32),
            TileValues::Bf16(bits) => bits[group].map(bf16_to_f32),
            TileValues::F32(reals) => reals[group],
        }
    }
}

#[inline(always)]
fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
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
                if view.scheme() == ScaleScheme::GroupAffine && view.raw_biases().is_none() {
                    return Err(ScalesError::Count { expected: rows * cols.div_ceil(group_size.max(1)), found: 0 });
                }
                return KernelScales::from_groups(rows, cols, group_size, view.raw(), view.raw_biases());
            }
        };
        Ok(KernelScales { rows, cols, kind })
    }

    /// Scales, and for affine weights biases, of groups of `group_size` columns: each (rows, groups), for a matrix whose blob came without
    /// them.
    ///
    /// # Errors
    /// As [`from_coded`](Self::from_coded).
    pub fn from_groups(
        rows: usize,
        cols: usize,
        group_size: usize,
        scales: &RawTensor,
        biases: Option<&RawTensor>,
    ) -> Result<KernelScales, ScalesError> {
        if group_size == 0 || !group_size.is_multiple_of(TILE_COLS) || group_size > SEGMENT_COLS_MAX {
            return Err(ScalesError::GroupSize { group_size });
        }
        let groups = cols.div_ceil(group_size);
        let biases = biases.map(|raw| transposed(raw, rows, groups)).transpose()?;
        Ok(KernelScales { rows, cols, kind: Kind::Group(Groups { group_size, groups, scales: transposed(scales, rows, groups)?, biases }) })
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
            Kind::Group(g) => g.scales.bytes() + g.biases.as_ref().map_or(0, Values::bytes),
        };
        bytes as u64
    }

    pub(crate) fn tile(&self, tile: usize) -> TileScales<'_> {
        match &self.kind {
            Kind::Row(scales) => TileScales::Row(&scales.as_chunks().0[tile]),
            Kind::Group(g) => {
                TileScales::Group { scales: g.scales.tile(tile, g.groups), biases: g.biases.as_ref().map(|b| b.tile(tile, g.groups)) }
            }
        }
    }

    /// The scale of all weights of a row, if it is one number.
    pub(crate) fn of_row(&self, row: usize) -> Option<f32> {
        match self.tile(row / TILE_ROWS) {
            TileScales::Row(scales) => Some(scales[row % TILE_ROWS]),
            TileScales::Group { .. } => None,
        }
    }

    /// The real weight of a symbol, by the formulas of `tersor_quant`: `scale * symbol`, or `scale
    /// * (symbol + 8) + bias`.
    pub(crate) fn weight(&self, row: usize, col: usize, symbol: i16) -> f32 {
        match (self.tile(row / TILE_ROWS), row % TILE_ROWS) {
            (TileScales::Row(scales), lane) => scales[lane] * f32::from(symbol),
            (TileScales::Group { scales, biases }, lane) => {
                let group = col / self.segment();
                let scale = scales.group(group)[lane];
                match biases {
                    None => scale * f32::from(symbol),
                    Some(biases) => scale * (i32::from(symbol) + 8) as f32 + biases.group(group)[lane],
                }
            }
        }
    }
}

/// The elements of a raw tensor, all finite.
fn values(raw: &RawTensor, expected: usize) -> Result<Vec<f32>, ScalesError> {
    let halves = || raw.bytes().as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b));
    let reals: Vec<f32> = match raw.dtype() {
        Dtype::F16 => halves().map(f16_to_f32).collect(),
        Dtype::Bf16 => halves().map(bf16_to_f32).collect(),
        Dtype::F32 => raw.bytes().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        found => return Err(ScalesError::Dtype { found }),
    };
    if reals.len() != expected {
        return Err(ScalesError::Count { expected, found: reals.len() });
    }
    match reals.iter().position(|r| !r.is_finite()) {
        Some(index) => Err(ScalesError::NotFinite { index }),
        None => Ok(reals),
    }
}

/// (rows, groups) to (row tile, group, 16); padding rows are 0.
fn transposed(raw: &RawTensor, rows: usize, groups: usize) -> Result<Values, ScalesError> {
    fn transpose<T: Copy + Default>(all: impl Iterator<Item = T>, rows: usize, groups: usize) -> Vec<T> {
        let mut out = vec![T::default(); round_up(rows, TILE_ROWS) * groups];
        for (i, value) in all.enumerate() {
            let (row, group) = (i / groups, i % groups);
            out[(row / TILE_ROWS * groups + group) * TILE_ROWS + row % TILE_ROWS] = value;
        }
        out
    }
    let reals = values(raw, rows * groups)?;
    let halves = || raw.bytes().as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b));
    Ok(match raw.dtype() {
        Dtype::F16 => Values::F16(transpose(halves(), rows, groups)),
        Dtype::Bf16 => Values::Bf16(transpose(halves(), rows, groups)),
        _ => Values::F32(transpose(reals.into_iter(), rows, groups)),
    })
}
