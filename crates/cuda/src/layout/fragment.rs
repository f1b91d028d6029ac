//! A tile in the order in which a warp holds it: the A fragments of `mma.m16n8k32.s8`.
//!
//! Lane `l`, with g = l / 4 and c = l % 4, holds rows g and g + 8 and, of every 32 columns, columns c·8 .. c·8 + 8. Four consecutive
//! columns of a row are a *quad*: the high parts of four symbols, nibble `i` (bits 4i..) = high + 8. Quads of a lane are numbered
//!
//! ```text
//! quad = 64-column block · 8 + (second 32 columns) · 4 + (row g + 8) · 2 + (second four columns)      column = .. + c · 8 + ..
//! ```
//!
//! so that quads 2w and 2w + 1 are word `w` of a lane. Encoders walk the quads of one *stream*, those of one row of a lane:
//! stream = lane + 32 · (row >= 8), and its `z`-th quad is lane quad (z / 2) · 4 + (row >= 8) · 2 + z % 2.
//!
//! On the device a quad has its even nibbles biased by 8 and its odd ones in two's complement (`quad ^ 0x8080`): a word's low nibbles and its
//! whole bytes are then operands as they stand.
//!
//! # Raw low bits
//! The planes: (supersteps, 32 lanes, 8 · low_bits bytes). With b = 64-column block % 2, kb = second 32 columns, and j = byte `column % 8 / 2` of a dword:
//! 1 bit: dword b, bit (column % 2) · 2 + (row >= 8) + 4·kb of byte j. 2 bits: dword b · 2 + column % 2, bits (row >= 8) · 2 + 4·kb of byte j.

use super::{Geometry, LANES, LayoutError, STREAMS, SUPERSTEP_COLS, TILE_ROWS};

/// The quad of four zeros.
pub(super) const ZERO_QUAD: u16 = 0x8888;
/// What turns the bias of odd nibbles into two's complement, and back.
pub(super) const DEVICE_FLIP: u16 = 0x8080;
/// Quads of a stream in a superstep.
pub(super) const SUPERSTEP_QUADS: usize = SUPERSTEP_COLS * TILE_ROWS / 4 / STREAMS;

/// A tile split into nibbles, raw low bits and far symbols.
#[derive(Debug, Default)]
pub(super) struct Fragment {
    /// (64 streams, quads of a stream)
    pub quads: Vec<u16>,
    /// (supersteps, 32 lanes, 8 · low_bits)
    pub planes: Vec<u8>,
    /// `[lane | weight << 5, delta]`
    pub far: Vec<[i32; 2]>,
}

/// Quads of a stream in a tile of `tile_cols` columns.
pub(super) fn stream_quads(tile_cols: usize) -> usize {
    tile_cols * TILE_ROWS / 4 / STREAMS
}

/// Bytes of the planes of a tile.
pub(super) fn plane_bytes(tile_cols: usize, low_bits: u32) -> usize {
    tile_cols / SUPERSTEP_COLS * LANES * 8 * low_bits as usize
}

/// Index in its lane of the `z`-th quad of `stream`.
pub(super) fn lane_quad(stream: usize, z: usize) -> usize {
    z / 2 * 4 + stream / LANES * 2 + z % 2
}

/// Row of `stream` in its tile.
fn stream_row(stream: usize) -> usize {
    stream % LANES / 4 + stream / LANES * 8
}

/// First column of the `z`-th quad of `stream` in its tile.
fn quad_col(stream: usize, z: usize) -> usize {
    z / 2 * 32 + stream % 4 * 8 + z % 2 * 4
}

/// Index of the first byte of a quad's low bits in the planes of its tile, and the lowest bit in its bytes.
fn plane_place(stream: usize, z: usize, low_bits: u32) -> (usize, u32) {
    let (block, second_cols, second_row) = (z / 4, z / 2 % 2, stream / LANES);
    let dword = block % 2 * low_bits as usize;
    let byte = (block / 2 * LANES + stream % LANES) * 8 * low_bits as usize + dword * 4 + z % 2 * 2;
    (byte, second_row as u32 * low_bits + 4 * second_cols as u32)
}

impl Fragment {
    /// Splits a tile: the columns `first_col ..` of `rows`, (16, `row_len`).
    pub(super) fn split(&mut self, rows: &[i16], row_len: usize, first_col: usize, tile_cols: usize, low_bits: u32) {
        self.quads.clear();
        self.far.clear();
        self.planes.clear();
        self.planes.resize(plane_bytes(tile_cols, low_bits), 0);
        for stream in 0..STREAMS {
            let start = stream_row(stream) * row_len + first_col;
            let row = &rows[start..start + tile_cols];
            // the lane's eight columns of each 32
            for (pair, cols) in row.chunks_exact(32).enumerate() {
                let eight = &cols[stream % 4 * 8..][..8];
                for (half, symbols) in eight.chunks_exact(4).enumerate() {
                    let z = pair * 2 + half;
                    let symbols = [symbols[0], symbols[1], symbols[2], symbols[3]];
                    let nibbles = symbols.map(|symbol| ((symbol >> low_bits) as u16).wrapping_add(8));
                    let quad = if (nibbles[0] | nibbles[1] | nibbles[2] | nibbles[3]) < 16 {
                        nibbles[0] | nibbles[1] << 4 | nibbles[2] << 8 | nibbles[3] << 12
                    } else {
                        self.split_far(stream, z, symbols, low_bits)
                    };
                    self.quads.push(quad);
                    if low_bits > 0 {
                        self.split_low(stream, z, symbols, low_bits);
                    }
                }
            }
        }
    }

    /// A quad with far symbols: they are listed, and the nearest high part stands in.
    #[cold]
    fn split_far(&mut self, stream: usize, z: usize, symbols: [i16; 4], low_bits: u32) -> u16 {
        let mut quad = 0;
        for (i, symbol) in symbols.into_iter().enumerate() {
            let high = i32::from(symbol) >> low_bits;
            let near = high.clamp(-8, 7);
            quad |= ((near + 8) as u16) << (4 * i);
            if near != high {
                let weight = lane_quad(stream, z) * 4 + i;
                self.far.push([((stream % LANES) | (weight << 5)) as i32, (high - near) << low_bits]);
            }
        }
        quad
    }

    #[inline(always)]
    fn split_low(&mut self, stream: usize, z: usize, symbols: [i16; 4], low_bits: u32) {
        let low = symbols.map(|symbol| symbol as u8 & ((1 << low_bits) - 1));
        let (byte, bit) = plane_place(stream, z, low_bits);
        let planes = &mut self.planes[byte..];
        if low_bits == 1 {
            planes[0] |= (low[0] | low[1] << 2) << bit;
            planes[1] |= (low[2] | low[3] << 2) << bit;
        } else {
            planes[0] |= low[0] << bit;
            planes[1] |= low[2] << bit;
            planes[4] |= low[1] << bit;
            planes[5] |= low[3] << bit;
        }
    }
}

/// Four low parts of the quad, from the planes of its tile.
fn low_parts(planes: &[u8], stream: usize, z: usize, low_bits: u32) -> [i32; 4] {
    if low_bits == 0 {
        return [0; 4];
    }
    let (byte, bit) = plane_place(stream, z, low_bits);
    let at = |byte_more: usize, bit_more: u32| i32::from(planes[byte + byte_more] >> (bit + bit_more)) & ((1 << low_bits) - 1);
    if low_bits == 1 { [at(0, 0), at(0, 2), at(1, 0), at(1, 2)] } else { [at(0, 0), at(4, 0), at(1, 0), at(5, 0)] }
}

/// Puts tile `tile` together again and writes it to its place in `symbols`, (rows, cols) row-major.
///
/// `quads`: (64, quads of a stream), nibbles biased by 8; `planes`: those of the tile.
///
/// # Errors
/// [`LayoutError::Tile`] if a far entry points outside the tile or a symbol leaves the range of i16.
pub(super) fn join(
    quads: &[u16],
    planes: &[u8],
    far: &[[i32; 2]],
    geometry: &Geometry,
    low_bits: u32,
    tile: usize,
    symbols: &mut [i16],
) -> Result<(), LayoutError> {
    let tile_cols = geometry.tile_cols();
    let mut values = vec![0i32; geometry.tile_weights()];
    for (stream, quads) in quads.chunks_exact(stream_quads(tile_cols)).enumerate() {
        for (z, quad) in quads.iter().enumerate() {
            let low = low_parts(planes, stream, z, low_bits);
            let start = stream_row(stream) * tile_cols + quad_col(stream, z);
            for (i, value) in values[start..start + 4].iter_mut().enumerate() {
                let high = i32::from(quad >> (4 * i) & 15) - 8;
                *value = (high << low_bits) + low[i];
            }
        }
    }
    for &[place, delta] in far {
        let (lane, weight) = (place as u32 as usize % LANES, place as u32 as usize / LANES);
        let (quad, i) = (weight / 4, weight % 4);
        if quad >= tile_cols / 8 {
            return Err(LayoutError::Tile { tile, what: "a far symbol lies outside the tile" });
        }
        let (stream, z) = (lane + quad / 2 % 2 * LANES, quad / 4 * 2 + quad % 2);
        let value = &mut values[stream_row(stream) * tile_cols + quad_col(stream, z) + i];
        *value = value.checked_add(delta).ok_or(LayoutError::Tile { tile, what: "a symbol overflows" })?;
    }
    let (first_row, first_col) = (tile % geometry.row_tiles() * TILE_ROWS, tile / geometry.row_tiles() * tile_cols);
    for (row, values) in values.chunks_exact(tile_cols).enumerate().take(geometry.rows() - first_row) {
        for (col, &value) in values.iter().enumerate().take(geometry.cols().saturating_sub(first_col)) {
            let symbol = i16::try_from(value).map_err(|_| LayoutError::Tile { tile, what: "a symbol outside the range of i16" })?;
            symbols[(first_row + row) * geometry.cols() + first_col + col] = symbol;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_of_quads() {
        // lane 6 (g 1, c 2), row 9, second 32 columns of block 1, second four columns
        let (stream, z) = (6 + 32, 7);
        assert_eq!((stream_row(stream), quad_col(stream, z), lane_quad(stream, z)), (9, 64 + 32 + 16 + 4, 8 + 4 + 2 + 1));
    }

    #[test]
    fn split_and_join_are_inverse() {
        let geometry = Geometry::new(16, 256).unwrap();
        let rows: Vec<i16> = (0..16 * 256i32).map(|i| (i * 7919 % 61 - 30) as i16).collect();
        for low_bits in 0..=2 {
            let mut fragment = Fragment::default();
            fragment.split(&rows, 256, 0, 256, low_bits);
            let mut symbols = vec![0; rows.len()];
            join(&fragment.quads, &fragment.planes, &fragment.far, &geometry, low_bits, 0, &mut symbols).unwrap();
            assert_eq!(symbols, rows);
            let far = rows.iter().filter(|&&symbol| !(-8..8).contains(&(symbol >> low_bits))).count();
            assert_eq!(fragment.far.len(), far);
        }
    }

    #[test]
    fn low_bits_lie_where_the_kernel_masks_them() {
        // the kernel's masks, 1 bit: 0x01 row g, 0x02 row g + 8 of even columns, 0x04 and 0x08 of odd ones; << 4 for the second 32 columns
        let mut rows = vec![0i16; 16 * 128];
        for (row, col, byte, bits) in
            [(0, 0, 0, 0x01), (8, 0, 0, 0x02), (0, 1, 0, 0x04), (8, 33, 0, 0x80), (0, 6, 3, 0x01), (1, 64, 4 * 8 + 4, 0x01)]
        {
            rows[row * 128 + col] = 1;
            let mut fragment = Fragment::default();
            fragment.split(&rows, 128, 0, 128, 1);
            let mut expected = vec![0; 256];
            expected[byte] = bits;
            assert_eq!(fragment.planes, expected, "row {row}, column {col}");
            rows[row * 128 + col] = 0;
        }
        // 2 bits: dwords of even and of odd columns; 0x03 row g, 0x0c row g + 8
        for (row, col, byte, bits) in [(0, 0, 0, 0x03), (8, 0, 0, 0x0c), (0, 1, 4, 0x03), (8, 35, 5, 0xc0), (0, 64, 8, 0x03)] {
            rows[row * 128 + col] = 3;
            let mut fragment = Fragment::default();
            fragment.split(&rows, 128, 0, 128, 2);
            let mut expected = vec![0; 512];
            expected[byte] = bits;
            assert_eq!(fragment.planes, expected, "row {row}, column {col}");
            rows[row * 128 + col] = 0;
        }
    }
}
