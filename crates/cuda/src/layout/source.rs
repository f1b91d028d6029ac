//! Where the symbols of a matrix come from.

use super::{Geometry, LayoutError, TILE_ROWS};

/// A matrix that gives its symbols a row tile at a time, so that it need not lie in memory as a whole.
///
/// A closure `Fn(usize, &mut [i16]) + Sync` is one. Encoders may ask for a row tile several times and from several threads.
pub trait Source: Sync {
    /// Writes rows `row_tile` · 16 .. + 16 to `symbols`, (16, cols) row-major, which arrives zeroed; rows that do not exist stay zero.
    fn row_tile(&self, row_tile: usize, symbols: &mut [i16]);
}

impl<F: Fn(usize, &mut [i16]) + Sync> Source for F {
    fn row_tile(&self, row_tile: usize, symbols: &mut [i16]) {
        self(row_tile, symbols);
    }
}

/// Matrices with the same columns, one below the other, each beginning at a row tile.
#[derive(Debug, Clone)]
pub struct Stack<'a> {
    cols: usize,
    parts: Vec<&'a [i16]>,
    /// (parts + 1,) first row tile of each part
    starts: Vec<usize>,
}

impl<'a> Stack<'a> {
    /// `parts`, each (its rows, `cols`) row-major.
    ///
    /// # Errors
    /// [`LayoutError::PartialRow`] if a part is not a whole number of rows.
    pub fn new(cols: usize, parts: &[&'a [i16]]) -> Result<Self, LayoutError> {
        let mut starts = vec![0];
        for (part, symbols) in parts.iter().enumerate() {
            if cols == 0 || symbols.len() % cols != 0 {
                return Err(LayoutError::PartialRow { part, symbols: symbols.len(), cols });
            }
            starts.push(starts[part] + (symbols.len() / cols).div_ceil(TILE_ROWS));
        }
        Ok(Self { cols, parts: parts.to_vec(), starts })
    }

    /// The geometry of the whole, whose last part is not padded.
    ///
    /// # Errors
    /// Those of [`Geometry::new`].
    pub fn geometry(&self) -> Result<Geometry, LayoutError> {
        let last = self.parts.iter().rposition(|part| !part.is_empty());
        Geometry::new(last.map_or(0, |last| self.first_row(last) + self.parts[last].len() / self.cols), self.cols)
    }

    /// The row of the whole at which part `part` begins, a multiple of 16.
    ///
    /// # Panics
    /// If there is no such part.
    pub fn first_row(&self, part: usize) -> usize {
        self.starts[part] * TILE_ROWS
    }
}

impl Source for Stack<'_> {
    fn row_tile(&self, row_tile: usize, symbols: &mut [i16]) {
        let part = self.starts.partition_point(|&start| start <= row_tile) - 1;
        if let Some(rows) = self.parts.get(part) {
            let start = (row_tile - self.starts[part]) * TILE_ROWS * self.cols;
            let rows = &rows[start..rows.len().min(start + symbols.len())];
            symbols[..rows.len()].copy_from_slice(rows);
        }
    }
}

/// A reader of row tiles with its own buffer, which pads columns.
pub(super) struct RowTiles<'a> {
    source: &'a dyn Source,
    geometry: Geometry,
    /// (16, cols)
    symbols: Vec<i16>,
    /// (16, padded cols); empty where no column is padded
    padded: Vec<i16>,
}

impl<'a> RowTiles<'a> {
    pub(super) fn new(source: &'a dyn Source, geometry: Geometry) -> Self {
        let padded = if geometry.padded_cols() == geometry.cols() { 0 } else { TILE_ROWS * geometry.padded_cols() };
        Self { source, geometry, symbols: vec![0; TILE_ROWS * geometry.cols()], padded: vec![0; padded] }
    }

    /// Row tile `row_tile`, (16, padded cols).
    pub(super) fn read(&mut self, row_tile: usize) -> &[i16] {
        self.symbols.fill(0);
        self.source.row_tile(row_tile, &mut self.symbols);
        if self.padded.is_empty() {
            return &self.symbols;
        }
        let (cols, padded_cols) = (self.geometry.cols(), self.geometry.padded_cols());
        for (to, from) in self.padded.chunks_exact_mut(padded_cols).zip(self.symbols.chunks_exact(cols)) {
            to[..cols].copy_from_slice(from);
        }
        &self.padded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_begin_at_row_tiles() {
        let (a, b, c) = (vec![1i16; 17 * 3], vec![2i16; 2 * 3], vec![3i16; 16 * 3]);
        let stack = Stack::new(3, &[&a, &b, &c]).unwrap();
        assert_eq!([0, 1, 2].map(|part| stack.first_row(part)), [0, 32, 48]);
        let geometry = stack.geometry().unwrap();
        assert_eq!((geometry.rows(), geometry.row_tiles()), (64, 4));
        let sums = [0, 1, 2, 3].map(|row_tile| {
            let mut symbols = vec![0; 16 * 3];
            stack.row_tile(row_tile, &mut symbols);
            symbols.iter().sum::<i16>()
        });
        assert_eq!(sums, [48, 3, 12, 144]);
        assert_eq!(Stack::new(3, &[&a, &b]).unwrap().geometry().unwrap().rows(), 34);
    }

    #[test]
    fn columns_are_padded_with_zeros() {
        let symbols: Vec<i16> = (1..=10).collect();
        let stack = Stack::new(5, &[&symbols]).unwrap();
        let mut tiles = RowTiles::new(&stack, stack.geometry().unwrap());
        let tile = tiles.read(0);
        assert_eq!((tile.len(), &tile[..6], &tile[128..134]), (16 * 128, &[1, 2, 3, 4, 5, 0][..], &[6, 7, 8, 9, 10, 0][..]));
        assert!(tile[256..].iter().all(|&symbol| symbol == 0));
    }

    #[test]
    fn broken_parts_are_refused() {
        assert_eq!(Stack::new(3, &[&[0; 3], &[0; 4]]).err(), Some(LayoutError::PartialRow { part: 1, symbols: 4, cols: 3 }));
        assert_eq!(Stack::new(0, &[&[]]).err(), Some(LayoutError::PartialRow { part: 0, symbols: 0, cols: 0 }));
        assert_eq!(Stack::new(3, &[&[]]).unwrap().geometry(), Err(LayoutError::Shape { rows: 0, cols: 3 }));
    }
}
