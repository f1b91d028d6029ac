//! The source of weights, read row by row.

/// Element type of the source weights; group scales of `affine4` take the same type, as in MLX.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Dtype {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }
}

/// Source weights, converted row by row so that no f32 copy of a whole tensor exists.
///
/// Rows are read from several threads at once, in any order and more than once.
pub trait Rows: Sync {
    /// Number of rows (output features).
    fn rows(&self) -> usize;
    /// Number of columns (input features).
    fn cols(&self) -> usize;
    /// Element type the weights are stored in; reading converts them to f32 without loss.
    fn dtype(&self) -> Dtype;
    /// Writes row `row` to `out`, which has exactly `cols()` elements.
    fn read(&self, row: usize, out: &mut [f32]);
}

/// Weights held as a row-major f32 slice.
#[derive(Clone, Copy, Debug)]
pub struct SliceRows<'a> {
    weights: &'a [f32],
    cols: usize,
    dtype: Dtype,
}

impl<'a> SliceRows<'a> {
    /// A tensor of `weights.len() / cols` rows whose values stem from `dtype`.
    ///
    /// # Panics
    /// If `cols` is 0 or does not divide the length.
    pub fn new(weights: &'a [f32], cols: usize, dtype: Dtype) -> Self {
        assert!(cols > 0 && weights.len().is_multiple_of(cols), "{} weights in rows of {cols}", weights.len());
        SliceRows { weights, cols, dtype }
    }
}

impl Rows for SliceRows<'_> {
    fn rows(&self) -> usize {
        self.weights.len() / self.cols
    }
    fn cols(&self) -> usize {
        self.cols
    }
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn read(&self, row: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.weights[row * self.cols..][..self.cols]);
    }
}
