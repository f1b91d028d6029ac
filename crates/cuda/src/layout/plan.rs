//! The choice of parameters and of the tile width.

use super::book::Book;
use super::plain::{FAR_PRICE_BITS, far_count};
use super::source::RowTiles;
use super::tile::TileEncoder;
use super::{CODE_BITS_MAX, Geometry, LOW_BITS_MAX, LayoutError, Source, Statistics, parallel};

/// Smallest window that is worth a thought: a table of 1 KiB.
const WINDOW_BITS_MIN: u32 = 8;
/// Most copies of the table, as a power of two. More did not pay on an H200.
const COPIES_LOG2_MAX: u32 = 2;
/// Narrowest tiles that are tried, in supersteps: below, streams would not fill the 16 words that each has.
const FIT_SUPERSTEPS_MIN: usize = 8;
/// Row tiles that are encoded to choose the width.
const FIT_ROW_TILES: usize = 8;

/// Parameters of the `quad` layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuadParams {
    /// Raw low bits of a symbol, 0, 1 or 2.
    pub low_bits: u32,
    /// Longest code, 1..=14 bits; the table has 2^window_bits entries of 4 bytes.
    pub window_bits: u32,
    /// Copies of each table entry, as a power of two: neighbours in shared memory, against bank conflicts. 2 · window_bits + copies_log2 is at most 30, the
    /// copies at most 32.
    pub copies_log2: u32,
}

impl QuadParams {
    /// The cheapest parameters for a matrix like the one counted.
    ///
    /// Priced are codes, patches, low bits, far symbols ([`FAR_PRICE_BITS`]) and the table. The smallest window within 0.2 % of the least price is taken,
    /// for the sake of the time in which a block loads the table; the table is copied, up to four times, while it stays below 64 KiB and 0.1 % of the whole.
    /// For Gaussian symbols of entropy H this amounts to H − low_bits in about 1.6..2.6, and a window of 14 bits for large matrices.
    pub fn choose(statistics: &Statistics, geometry: &Geometry, threads: usize) -> Self {
        let weights = geometry.tiles() as f64 * geometry.tile_weights() as f64;
        let counted = statistics.symbols().total() as f64;
        let far_price = |low_bits: u32| far_count(statistics.symbols(), low_bits) as f64 / counted * FAR_PRICE_BITS as f64;
        let rankings = [0, 1, 2].map(|low_bits| statistics.ranking(low_bits));
        let price = |low_bits: u32, window_bits: u32| {
            let codes = Book::new(&rankings[low_bits as usize], window_bits).cost_bits() as f64 / counted;
            (codes + f64::from(low_bits) + far_price(low_bits)) * weights + f64::from(32u32 << window_bits)
        };
        let candidates: Vec<(u32, u32)> = (0..=LOW_BITS_MAX)
            .flat_map(|low_bits| (WINDOW_BITS_MIN..=CODE_BITS_MAX).map(move |window_bits| (low_bits, window_bits)))
            .collect();
        let prices = parallel::map(candidates.len(), threads, || (), |(), i| price(candidates[i].0, candidates[i].1));
        let best = (0..candidates.len()).min_by(|&a, &b| prices[a].total_cmp(&prices[b])).expect("there are candidates");
        let least = prices[best];
        let nearly_best = (0..=best).find(|&i| candidates[i].0 == candidates[best].0 && prices[i] <= least * 1.002);
        let (low_bits, window_bits) = candidates[nearly_best.unwrap_or(best)];
        let table_bits = f64::from(32u32 << window_bits);
        let copies_log2 = (0..=COPIES_LOG2_MAX.min(CODE_BITS_MAX - window_bits))
            .rev()
            .find(|&copies_log2| table_bits * f64::from((1u32 << copies_log2) - 1) <= least / 1024.0)
            .unwrap_or(0);
        Self { low_bits, window_bits, copies_log2 }
    }

    /// Bits before the first code of a stream: the window then is the byte address of a table entry, below which 2 + copies_log2 bits choose the copy
    /// and the byte.
    pub fn junk_bits(&self) -> u32 {
        2 + self.copies_log2
    }

    /// Bytes of the table, copies included.
    pub fn table_bytes(&self) -> usize {
        4 << (self.window_bits + self.copies_log2)
    }

    pub(super) fn check(&self) -> Result<(), LayoutError> {
        super::plain::check_low_bits(self.low_bits)?;
        if !(1..=CODE_BITS_MAX).contains(&self.window_bits) {
            return Err(LayoutError::Parameter { parameter: "window_bits", value: self.window_bits, allowed: "1..=14" });
        }
        if self.copies_log2 > 5 || self.junk_bits() + 2 * self.window_bits > 32 {
            return Err(LayoutError::Parameter {
                parameter: "copies_log2",
                value: self.copies_log2,
                allowed: "0..=5, and at most 30 - 2 * window_bits",
            });
        }
        Ok(())
    }
}

/// The widest tiles, at most those of `geometry`, whose size is within 1 % of the least: where rows differ in entropy, the streams of a wide tile drift
/// apart, which costs padding and patches.
pub(super) fn fit_geometry(source: &dyn Source, geometry: Geometry, params: QuadParams, book: &Book, threads: usize) -> Geometry {
    let narrower = |supersteps: usize| Geometry::with_supersteps_max(geometry.rows(), geometry.cols(), supersteps).ok();
    let widths =
        std::iter::successors(Some(geometry.supersteps()), |supersteps| Some(supersteps / 2)).take_while(|&s| s >= FIT_SUPERSTEPS_MIN);
    let mut candidates = vec![geometry];
    candidates.extend(widths.skip(1).filter_map(narrower));
    if candidates.len() == 1 {
        return geometry;
    }
    let samples = geometry.row_tiles().min(FIT_ROW_TILES);
    let sizes = parallel::map(
        candidates.len() * samples,
        threads,
        || (),
        |(), i| {
            let (geometry, row_tile) = (candidates[i / samples], i % samples * geometry.row_tiles() / samples);
            let mut tiles = RowTiles::new(source, geometry);
            let rows = tiles.read(row_tile);
            let mut encoder = TileEncoder::new(book, params, geometry.tile_cols());
            let tile_bytes = |seg: usize| encoder.encode(rows, geometry.padded_cols(), seg * geometry.tile_cols()).map(|tile| tile.bytes());
            (0..geometry.segs()).map(tile_bytes).sum::<Option<usize>>()
        },
    );
    let sizes: Vec<Option<usize>> = sizes.chunks(samples).map(|sizes| sizes.iter().copied().sum()).collect();
    let least = sizes.iter().flatten().min().copied().unwrap_or(0);
    let widest = sizes.iter().position(|size| size.is_some_and(|size| size <= least + least / 100)).unwrap_or(0);
    candidates[widest]
}
