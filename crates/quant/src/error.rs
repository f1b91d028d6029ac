//! Errors: one enum per operation.

use thiserror::Error;

/// Why a tensor cannot be quantized (or measured).
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum QuantizeError {
    /// A weight is NaN or infinite. The first one in row-major order is named.
    #[error("weight at row {row}, column {col} is {value}, not a finite number")]
    NotFinite {
        /// Row of the weight, from 0.
        row: usize,
        /// Column of the weight, from 0.
        col: usize,
        /// The weight.
        value: f32,
    },
    /// The scheme shares one scale among `group_size` columns and refuses a short last group, as MLX and GGUF do.
    #[error("{cols} columns are not a multiple of the group size {group_size}, which this scheme needs")]
    ColumnsNotGrouped {
        /// Columns of the tensor.
        cols: usize,
        /// Weights in a group.
        group_size: usize,
    },
    /// A group size the scheme does not have.
    #[error("group size {group_size} is not one of 32, 64, 128")]
    UnsupportedGroupSize {
        /// The group size asked for.
        group_size: u32,
    },
    /// A tensor without rows or columns, or with more weights than can be addressed.
    #[error("a tensor of {rows} x {cols} weights cannot be quantized")]
    Shape {
        /// Rows of the tensor.
        rows: usize,
        /// Columns of the tensor.
        cols: usize,
    },
    /// The scale of a group does not fit its 16-bit (or 32-bit) float type.
    #[error("the scale of the group at row {row}, column {col} does not fit its float type")]
    ScaleOverflow {
        /// Row of the group.
        row: usize,
        /// First column of the group.
        col: usize,
    },
    /// A parameter of the `ecsq` scheme is out of its range.
    #[error("ecsq parameter {name} = {value} is out of range")]
    Parameter {
        /// Field of [`EcsqParams`](crate::EcsqParams).
        name: &'static str,
        /// Its value.
        value: f64,
    },
}

/// Why symbols cannot be converted to or from another program's packed layout.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PackError {
    /// A symbol outside the range the layout can hold.
    #[error("symbol {symbol} at index {index} is outside -8..=7")]
    SymbolRange {
        /// Row-major index of the symbol.
        index: usize,
        /// The symbol.
        symbol: i16,
    },
    /// A buffer whose length disagrees with the shape.
    #[error("{what}: {actual} elements, the shape needs {expected}")]
    Length {
        /// Which buffer.
        what: &'static str,
        /// Its length, in elements of its type.
        actual: usize,
        /// The length needed.
        expected: usize,
    },
    /// A shape that the layout does not have: empty, too large, or columns that are not a multiple of the group.
    #[error("{rows} x {cols} in groups of {group_size} is not a shape of this layout")]
    Shape {
        /// Rows of the tensor.
        rows: usize,
        /// Columns of the tensor.
        cols: usize,
        /// Weights in a group.
        group_size: usize,
    },
    /// The tensor's scales are not of the kind the layout stores.
    #[error("the tensor's scales are not of the kind this layout stores")]
    ScaleKind,
}

/// Why no step meets a target.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum SolveError {
    /// No tensor, or a tensor without weights.
    #[error("there are no weights to quantize")]
    NoWeights,
    /// The target is not reachable with any step in the range searched.
    #[error("{target_bpw} bits per weight are out of reach: this model can be between {least_bpw:.3} and {most_bpw:.3}")]
    OutOfReach {
        /// The target, bits per weight.
        target_bpw: f64,
        /// The size at the coarsest step, bits per weight.
        least_bpw: f64,
        /// The size at the finest step, bits per weight.
        most_bpw: f64,
    },
    /// A multiplier, the target or the rounding is not a usable number.
    #[error("{name} = {value} is out of range")]
    Parameter {
        /// Which one.
        name: &'static str,
        /// Its value.
        value: f64,
    },
}
