//! The decoded layout: nibbles, raw low bits and far symbols.
//!
//! Words: (tiles, 64-column blocks, 32 lanes, 4) u32, one 16-byte load of a lane for each block. The words of a lane g, c are row g, row
//! g + 8 of the first 32 columns, then of the next 32; a word is columns c·8 .. c·8 + 8, its even columns' nibbles biased by 8, its odd
//! columns' in two's complement. Planes and far symbols are those of [`fragment`](super::fragment) and [`FarList`].
//!
//! `low_bits` are chosen by price: 4 + low_bits + [`FAR_PRICE_BITS`] · (share of far symbols).

use tersor_codec::Histogram;

use super::far::FarList;
use super::fragment::{self, DEVICE_FLIP, Fragment};
use super::source::RowTiles;
use super::{Geometry, LANES, LOW_BITS_MAX, LayoutError, STREAMS, Source, parallel};

/// What a far symbol costs, in bits: 64 stored, and the time in which its warp, which takes far symbols one by one, would decode some 200
/// weights.
pub const FAR_PRICE_BITS: u64 = 512;

/// A matrix in the decoded layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plain {
    /// Its shape.
    pub geometry: Geometry,
    /// Raw low bits of a symbol, 0, 1 or 2.
    pub low_bits: u32,
    /// (tiles, tile_cols / 64, 32, 4)
    pub words: Vec<u32>,
    /// (tiles, supersteps, 32, 8 · low_bits)
    pub planes: Vec<u8>,
    /// Symbols whose high part is not in −8..=7.
    pub far: FarList,
}

/// How many of the counted symbols are far with `low_bits`.
pub(super) fn far_count(histogram: &Histogram, low_bits: u32) -> u64 {
    histogram.iter().filter(|&(symbol, _)| !(-8..8).contains(&(symbol >> low_bits))).map(|(_, count)| count).sum()
}

/// The cheapest number of low bits for symbols like these.
pub fn choose_low_bits(histogram: &Histogram) -> u32 {
    let price = |low_bits: &u32| {
        u128::from(*low_bits) * u128::from(histogram.total()) + u128::from(FAR_PRICE_BITS) * u128::from(far_count(histogram, *low_bits))
    };
    (0..=LOW_BITS_MAX).min_by_key(price).unwrap_or(0)
}

impl Plain {
    /// Packs a matrix, on up to `threads` threads.
    ///
    /// # Errors
    /// [`LayoutError::Parameter`] if `low_bits` is above 2.
    pub fn pack(source: &dyn Source, geometry: Geometry, low_bits: u32, threads: usize) -> Result<Self, LayoutError> {
        check_low_bits(low_bits)?;
        let (tile_cols, row_tiles) = (geometry.tile_cols(), geometry.row_tiles());
        let tile_words = geometry.tile_weights() / 8;
        let plane_bytes = fragment::plane_bytes(tile_cols, low_bits);
        let mut words = vec![0; geometry.tiles() * tile_words];
        let mut planes = vec![0; geometry.tiles() * plane_bytes];

        // what each row tile writes: its tiles of all segments
        let mut jobs: Vec<Vec<(&mut [u32], &mut [u8])>> = (0..row_tiles).map(|_| Vec::with_capacity(geometry.segs())).collect();
        let (mut words_left, mut planes_left) = (&mut words[..], &mut planes[..]);
        for tile in 0..geometry.tiles() {
            let (words, words_rest) = words_left.split_at_mut(tile_words);
            let (planes, planes_rest) = planes_left.split_at_mut(plane_bytes);
            jobs[tile % row_tiles].push((words, planes));
            (words_left, planes_left) = (words_rest, planes_rest);
        }
        let state = || (RowTiles::new(source, geometry), Fragment::default());
        let far = parallel::map_jobs(jobs, threads, state, |(tiles, fragment), row_tile, outputs| {
            let rows = tiles.read(row_tile);
            let pack = |(seg, (words, planes)): (usize, (&mut [u32], &mut [u8]))| {
                fragment.split(rows, geometry.padded_cols(), seg * tile_cols, tile_cols, low_bits);
                pack_words(&fragment.quads, words);
                planes.copy_from_slice(&fragment.planes);
                std::mem::take(&mut fragment.far)
            };
            outputs.into_iter().enumerate().map(pack).collect::<Vec<_>>()
        });
        let far = FarList::new((0..geometry.tiles()).map(|tile| &*far[tile % row_tiles][tile / row_tiles]));
        Ok(Self { geometry, low_bits, words, planes, far })
    }

    /// The symbols, (rows, cols) row-major: the oracle of the kernels.
    ///
    /// # Errors
    /// Those of arrays that contradict each other or the geometry.
    pub fn unpack(&self) -> Result<Vec<i16>, LayoutError> {
        check_low_bits(self.low_bits)?;
        let (geometry, tiles) = (&self.geometry, self.geometry.tiles());
        let tile_words = geometry.tile_weights() / 8;
        let plane_bytes = fragment::plane_bytes(geometry.tile_cols(), self.low_bits);
        check_len("words", self.words.len(), tiles * tile_words)?;
        check_len("planes", self.planes.len(), tiles * plane_bytes)?;
        let mut symbols = vec![0; geometry.weights()];
        let stream_quads = fragment::stream_quads(geometry.tile_cols());
        let mut quads = vec![0; stream_quads * STREAMS];
        for tile in 0..tiles {
            let words = &self.words[tile * tile_words..][..tile_words];
            for (i, quad) in quads.iter_mut().enumerate() {
                let (word, shift) = word_place(i / stream_quads, i % stream_quads);
                *quad = (words[word] >> shift) as u16 ^ DEVICE_FLIP;
            }
            let planes = &self.planes[tile * plane_bytes..][..plane_bytes];
            fragment::join(&quads, planes, self.far.tile(tile, tiles)?, geometry, self.low_bits, tile, &mut symbols)?;
        }
        Ok(symbols)
    }

    /// Size on the device, everything counted.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.words) + self.planes.len() + self.far.bytes()
    }
}

/// Index of the word in its tile, and the lowest bit in it, of the `z`-th quad of `stream`.
fn word_place(stream: usize, z: usize) -> (usize, u32) {
    let quad = fragment::lane_quad(stream, z);
    ((quad / 8 * LANES + stream % LANES) * 4 + quad % 8 / 2, quad as u32 % 2 * 16)
}

fn pack_words(quads: &[u16], words: &mut [u32]) {
    let stream_quads = quads.len() / STREAMS;
    for (stream, quads) in quads.chunks_exact(stream_quads).enumerate() {
        for (pair, quads) in quads.chunks_exact(2).enumerate() {
            let (word, _) = word_place(stream, pair * 2);
            words[word] = u32::from(quads[0] ^ DEVICE_FLIP) | u32::from(quads[1] ^ DEVICE_FLIP) << 16;
        }
    }
}

pub(super) fn check_low_bits(low_bits: u32) -> Result<(), LayoutError> {
    if low_bits > LOW_BITS_MAX {
        return Err(LayoutError::Parameter { parameter: "low_bits", value: low_bits, allowed: "0..=2" });
    }
    Ok(())
}

pub(super) fn check_len(array: &'static str, len: usize, expected: usize) -> Result<(), LayoutError> {
    if len == expected { Ok(()) } else { Err(LayoutError::ArrayLength { array, len, expected }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Stack;

    #[test]
    fn words_lie_where_the_kernel_loads_them() {
        // tile 1 (second row tile), row 9 = 8 + 1: g 1; column 64 + 32 + 16 + k: block 1, c 2, word 3 of lane 6
        let geometry = Geometry::new(32, 128).unwrap();
        let mut rows = vec![0i16; 32 * 128];
        for (k, symbol) in [-8, -7, -1, 0, 1, 2, 6, 7].into_iter().enumerate() {
            rows[(16 + 9) * 128 + 64 + 32 + 16 + k] = symbol;
        }
        let plain = Plain::pack(&Stack::new(128, &[&rows]).unwrap(), geometry, 0, 1).unwrap();
        let mut expected = vec![0x0808_0808u32; 32 * 128 / 8];
        expected[((2 + 1) * 32 + 6) * 4 + 3] = 0x7e29_0790;
        assert_eq!(plain.words, expected);
        assert_eq!((plain.far.entries.len(), plain.bytes()), (0, 32 * 64 + 3 * 4));
    }

    #[test]
    fn low_bits_by_price() {
        let of = |symbols: &[i16]| {
            let mut histogram = Histogram::new();
            histogram.add(symbols);
            choose_low_bits(&histogram)
        };
        assert_eq!(of(&[]), 0);
        assert_eq!(of(&[-8, 7, 0]), 0);
        assert_eq!(of(&[8, 7, 0]), 1);
        assert_eq!(of(&[-16, 15, 0]), 1);
        assert_eq!(of(&[-17, 15, 0]), 2);
        // one far symbol in a thousand is cheaper than a bit for each; one in a hundred is not
        assert_eq!(of(&[&[8][..], &[0; 999]].concat()), 0);
        assert_eq!(of(&[&[8][..], &[0; 99]].concat()), 1);
    }

    #[test]
    fn damage_is_refused() {
        let rows: Vec<i16> = (0..20 * 130).map(|i| (i % 41 - 20) as i16).collect();
        let stack = Stack::new(130, &[&rows]).unwrap();
        let geometry = stack.geometry().unwrap();
        let plain = Plain::pack(&stack, geometry, 1, 2).unwrap();
        assert_eq!(plain.unpack().unwrap(), rows);
        assert!(matches!(Plain::pack(&stack, geometry, 3, 1), Err(LayoutError::Parameter { .. })));
        let damaged = |damage: &dyn Fn(&mut Plain)| {
            let mut plain = plain.clone();
            damage(&mut plain);
            plain.unpack().unwrap_err()
        };
        assert!(matches!(damaged(&|p| p.low_bits = 9), LayoutError::Parameter { .. }));
        assert!(matches!(damaged(&|p| p.low_bits = 2), LayoutError::ArrayLength { array: "planes", .. }));
        assert!(matches!(damaged(&|p| p.words.truncate(1)), LayoutError::ArrayLength { array: "words", .. }));
        assert!(matches!(damaged(&|p| p.far.offsets.truncate(1)), LayoutError::ArrayLength { array: "far offsets", .. }));
        assert!(matches!(damaged(&|p| p.far.entries.truncate(1)), LayoutError::ArrayLength { array: "far offsets", .. }));
        assert!(matches!(damaged(&|p| p.far.offsets[1] = u32::MAX), LayoutError::Tile { tile: 0, .. }));
        assert!(matches!(damaged(&|p| p.far.entries[0][0] = i32::MAX), LayoutError::Tile { tile: 0, .. }));
        assert!(matches!(damaged(&|p| p.far.entries[0][0] = -1), LayoutError::Tile { tile: 0, .. }));
        assert!(matches!(damaged(&|p| p.far.entries[0][1] = i32::MAX), LayoutError::Tile { tile: 0, .. }));
    }
}
