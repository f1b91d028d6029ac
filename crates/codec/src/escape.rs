//! Symbols without an entry of their own: escape bytes and the far list, the same for every codec.

/// Bytes of one far entry: u32 position, i16 symbol.
pub const FAR_BYTES: usize = 6;

/// A symbol outside -127..=127.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Far {
    /// Index in the chunk, in symbols.
    pub position: u32,
    /// The symbol, outside -127..=127.
    pub symbol: i16,
}

/// The far symbols of a chunk by ascending position: a view of the chunk's bytes, checked when parsed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FarList<'a> {
    bytes: &'a [u8],
}

impl<'a> FarList<'a> {
    /// Far symbols in the chunk.
    pub fn len(&self) -> usize {
        self.bytes.len() / FAR_BYTES
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The entry `index`, if there is one.
    pub fn get(&self, index: usize) -> Option<Far> {
        let start = index.checked_mul(FAR_BYTES)?;
        let [p0, p1, p2, p3, s0, s1] = *self.bytes.get(start..)?.first_chunk::<FAR_BYTES>()?;
        Some(Far { position: u32::from_le_bytes([p0, p1, p2, p3]), symbol: i16::from_le_bytes([s0, s1]) })
    }

    /// The entries by ascending position.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Far> + 'a {
        self.bytes.chunks_exact(FAR_BYTES).map(|entry| Far {
            position: u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]),
            symbol: i16::from_le_bytes([entry[4], entry[5]]),
        })
    }
}
