//! How a matrix is cut into tiles.

use super::{LayoutError, SUPERSTEP_COLS, SUPERSTEPS_MAX, TILE_ROWS, WEIGHTS_MAX};

/// The shape of a matrix on the device, from which all array sizes follow.
///
/// ```
/// # use tersor_cuda::layout::Geometry;
/// let geometry = Geometry::new(100, 5632)?;
/// assert_eq!((geometry.row_tiles(), geometry.segs(), geometry.tile_cols()), (7, 2, 2816));
/// # Ok::<(), tersor_cuda::layout::LayoutError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    rows: usize,
    cols: usize,
    segs: usize,
    tile_cols: usize,
}

impl Geometry {
    /// `rows` × `cols` weights in as few column segments as tiles of at most 4096 columns allow:
    /// segs = ⌈⌈cols / 128⌉ / 32⌉, tile_cols = ⌈⌈cols / 128⌉ / segs⌉ · 128.
    ///
    /// # Errors
    /// [`LayoutError::Shape`] if the matrix is empty or has more than [`WEIGHTS_MAX`] weights.
    pub fn new(rows: usize, cols: usize) -> Result<Self, LayoutError> {
        Self::with_supersteps_max(rows, cols, SUPERSTEPS_MAX)
    }

    /// Like [`Self::new`], with tiles of at most `supersteps_max` · 128 columns (clamped to 1..=32). Narrower tiles keep more warps busy
    /// and let rows differ more in entropy; they cost half a word per stream and tile.
    ///
    /// # Errors
    /// Those of [`Self::new`].
    pub fn with_supersteps_max(rows: usize, cols: usize, supersteps_max: usize) -> Result<Self, LayoutError> {
        let supersteps = cols.div_ceil(SUPERSTEP_COLS);
        let segs = supersteps.div_ceil(supersteps_max.clamp(1, SUPERSTEPS_MAX)).max(1);
        let geometry = Self { rows, cols, segs, tile_cols: supersteps.div_ceil(segs) * SUPERSTEP_COLS };
        let padded_rows = rows.checked_next_multiple_of(TILE_ROWS);
        let weights = padded_rows.and_then(|rows| segs.checked_mul(geometry.tile_cols)?.checked_mul(rows));
        match weights {
            Some(1..=WEIGHTS_MAX) => Ok(geometry),
            _ => Err(LayoutError::Shape { rows, cols }),
        }
    }

    /// Rows of the matrix, those that pad the parts of a [`Stack`](super::Stack) included, those that pad its end not.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the matrix, padding not included.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Column segments, the tiles of a row tile.
    pub fn segs(&self) -> usize {
        self.segs
    }

    /// Columns of a tile, a multiple of 128.
    pub fn tile_cols(&self) -> usize {
        self.tile_cols
    }

    /// Tiles in a column.
    pub fn row_tiles(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    /// Rows with padding: 16 · row tiles.
    pub fn padded_rows(&self) -> usize {
        self.row_tiles() * TILE_ROWS
    }

    /// Columns with padding: segs · tile_cols.
    pub fn padded_cols(&self) -> usize {
        self.segs * self.tile_cols
    }

    /// Tiles; tile = segment · row_tiles + row tile.
    pub fn tiles(&self) -> usize {
        self.row_tiles() * self.segs
    }

    /// Supersteps of a tile, 1..=32.
    pub fn supersteps(&self) -> usize {
        self.tile_cols / SUPERSTEP_COLS
    }

    /// Weights, padding not included.
    pub fn weights(&self) -> usize {
        self.rows * self.cols
    }

    /// Weights of a tile.
    pub fn tile_weights(&self) -> usize {
        TILE_ROWS * self.tile_cols
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(rows: usize, cols: usize) -> (usize, usize, usize) {
        let g = Geometry::new(rows, cols).unwrap();
        (g.row_tiles(), g.segs(), g.tile_cols())
    }

    #[test]
    fn columns_are_shared_out_evenly() {
        assert_eq!(shape(1, 1), (1, 1, 128));
        assert_eq!(shape(16, 4096), (1, 1, 4096));
        assert_eq!(shape(17, 4097), (2, 2, 2176));
        assert_eq!(shape(8192, 28672), (512, 7, 4096));
        assert_eq!(shape(4096, 14336), (256, 4, 3584));
        assert_eq!(shape(48, 5632), (3, 2, 2816));
    }

    #[test]
    fn narrower_tiles() {
        let g = Geometry::with_supersteps_max(16, 4096, 8).unwrap();
        assert_eq!((g.segs(), g.tile_cols(), g.supersteps()), (4, 1024, 8));
        assert_eq!(Geometry::with_supersteps_max(16, 300, 0).unwrap().tile_cols(), 128);
    }

    #[test]
    fn impossible_shapes_are_refused() {
        for (rows, cols) in [(0, 5), (5, 0), (usize::MAX, 1), (1, usize::MAX), (1 << 20, 1 << 12), (usize::MAX - 3, usize::MAX - 3)] {
            assert_eq!(Geometry::new(rows, cols), Err(LayoutError::Shape { rows, cols }));
        }
    }
}
