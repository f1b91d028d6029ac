//! Names and parameters of the schemes.

use std::fmt;
use std::str::FromStr;

/// A quantization scheme as the user names it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[non_exhaustive]
pub enum Scheme {
    /// Entropy-coded scalar quantization: unbounded integers on a uniform grid. `ecsq`
    Ecsq,
    /// MLX's 4-bit affine quantization. `affine4` (group 64) or `affine4-g32`, `affine4-g64`, `affine4-g128`
    Affine4 {
        /// Weights that share a scale and a bias: 32, 64 or 128.
        group_size: u32,
    },
    /// GGML's `Q4_0`. `q4_0`
    Q4_0,
    /// Symmetric absmax int4, one scale per row. `int4-row`
    Int4Row,
    /// Symmetric absmax int4, one scale per tensor. `int4-tensor`
    Int4Tensor,
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Scheme::Ecsq => f.write_str("ecsq"),
            Scheme::Affine4 { group_size } => write!(f, "affine4-g{group_size}"),
            Scheme::Q4_0 => f.write_str("q4_0"),
            Scheme::Int4Row => f.write_str("int4-row"),
            Scheme::Int4Tensor => f.write_str("int4-tensor"),
        }
    }
}

/// The name is not that of a scheme.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown scheme {name:?}: ecsq, affine4, affine4-g32, affine4-g64, affine4-g128, q4_0, int4-row, int4-tensor")]
pub struct UnknownScheme {
    /// The name given.
    pub name: String,
}

impl FromStr for Scheme {
    type Err = UnknownScheme;

    fn from_str(name: &str) -> Result<Self, UnknownScheme> {
        Ok(match name {
            "ecsq" => Scheme::Ecsq,
            "affine4" | "affine4-g64" => Scheme::Affine4 { group_size: 64 },
            "affine4-g32" => Scheme::Affine4 { group_size: 32 },
            "affine4-g128" => Scheme::Affine4 { group_size: 128 },
            "q4_0" => Scheme::Q4_0,
            "int4-row" => Scheme::Int4Row,
            "int4-tensor" => Scheme::Int4Tensor,
            _ => {
                return Err(UnknownScheme { name: name.to_owned() });
            }
        })
    }
}

/// What `ecsq`'s step is relative to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Grid {
    /// One step per row: relative step x rms of the row.
    Row,
    /// One step for the tensor: relative step x rms of the tensor.
    Tensor,
}

/// Offset of `ecsq`'s rounding when nothing else is asked for; 0.5 is rounding to nearest.
pub const DEFAULT_ROUNDING: f32 = 0.5;

/// Parameters of `ecsq` for one tensor, normally from [`solve_step`](crate::solve_step).
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct EcsqParams {
    /// What the step is relative to.
    pub grid: Grid,
    /// Step in units of the rms of the row or tensor; positive and finite.
    pub relative_step: f32,
    /// `symbol = sign(w) * floor(|w| / step + rounding)`: 0.5 rounds to nearest, less widens the zone that becomes 0. In 0.0..=0.5.
    pub rounding: f32,
}

/// A scheme with everything it needs to quantize a tensor.
#[derive(Clone, Copy, PartialEq, Debug)]
#[non_exhaustive]
pub enum Plan {
    /// See [`Scheme::Ecsq`].
    Ecsq(EcsqParams),
    /// See [`Scheme::Affine4`].
    Affine4 {
        /// Weights that share a scale and a bias: 32, 64 or 128.
        group_size: u32,
    },
    /// See [`Scheme::Q4_0`].
    Q4_0,
    /// See [`Scheme::Int4Row`].
    Int4Row,
    /// See [`Scheme::Int4Tensor`].
    Int4Tensor,
}

impl Plan {
    /// The scheme's name.
    pub fn scheme(&self) -> Scheme {
        match *self {
            Plan::Ecsq(_) => Scheme::Ecsq,
            Plan::Affine4 { group_size } => Scheme::Affine4 { group_size },
            Plan::Q4_0 => Scheme::Q4_0,
            Plan::Int4Row => Scheme::Int4Row,
            Plan::Int4Tensor => Scheme::Int4Tensor,
        }
    }
}
