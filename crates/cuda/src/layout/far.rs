//! Far symbols: those whose high part does not fit a nibble.

use super::LayoutError;

/// Far symbols of all tiles.
///
/// An entry is `[lane | weight << 5, delta]`, as i32: the symbol is `delta` more than high part (−8 or 7) and low bits say. Weight = quad · 4 + i,
/// see [`fragment`](super::fragment). Entries of a tile follow stream and position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FarList {
    /// (tiles + 1,) first entry of each tile
    pub offsets: Vec<u32>,
    /// (entries,)
    pub entries: Vec<[i32; 2]>,
}

impl FarList {
    /// The lists of all tiles, in tile order.
    pub(super) fn new<'a>(tiles: impl Iterator<Item = &'a [[i32; 2]]>) -> Self {
        let mut list = Self { offsets: vec![0], entries: Vec::new() };
        for tile in tiles {
            list.entries.extend_from_slice(tile);
            list.offsets.push(list.entries.len() as u32);
        }
        list
    }

    /// Size on the device.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.offsets) + size_of_val(&*self.entries)
    }

    /// Entries of tile `tile` of `tiles`.
    pub(super) fn tile(&self, tile: usize, tiles: usize) -> Result<&[[i32; 2]], LayoutError> {
        csr(&self.offsets, &self.entries, tile, tiles, "far offsets")
    }
}

/// The part of `entries` that belongs to `tile`.
pub(super) fn csr<'a, T>(
    offsets: &[u32],
    entries: &'a [T],
    tile: usize,
    tiles: usize,
    array: &'static str,
) -> Result<&'a [T], LayoutError> {
    if offsets.len() != tiles + 1 {
        return Err(LayoutError::ArrayLength { array, len: offsets.len(), expected: tiles + 1 });
    }
    if offsets[tiles] as usize != entries.len() {
        return Err(LayoutError::ArrayLength { array, len: entries.len(), expected: offsets[tiles] as usize });
    }
    entries.get(offsets[tile] as usize..offsets[tile + 1] as usize).ok_or(LayoutError::Tile { tile, what: "offsets do not ascend" })
}
