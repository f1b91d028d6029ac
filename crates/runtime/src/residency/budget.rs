//! What a strategy holds in memory, item by item, and the refusal of a budget that is too small for it.

use std::fmt;

/// Bytes that a strategy holds once loading is done. Everything that grows with the model or with the context is here.
///
/// While loading, coded bytes that are about to be decoded are mapped too, one tensor per thread; they are clean pages of the
/// file, which the system can take back at any time, and they are released as soon as the tensor is decoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Footprint {
    /// Coded blobs and uncoded matrices that stay mapped.
    pub mapped_bytes: u64,
    /// Matrices held decoded.
    pub decoded_bytes: u64,
    /// Decode buffers (`prefetch`: two layers).
    pub buffer_bytes: u64,
    /// Scales and biases of coded matrices, as the kernels read them.
    pub scale_bytes: u64,
    /// Decoding tables and chunk indices of the matrices that stay coded.
    pub table_bytes: u64,
    /// What the model itself holds, as the caller states it: norms, biases, activation buffers.
    pub model_bytes: u64,
    /// Scratch of a fixed size: int8 activations of one slice of [`SLICE_TOKENS_MAX`](crate::model::llama::SLICE_TOKENS_MAX) tokens, and for each thread the symbols of the chunks it is decoding.
    pub scratch_bytes: u64,
    /// Key-value cache, as the caller states it.
    pub kv_bytes: u64,
}

impl Footprint {
    /// The weights in every form they are held in: all but scratch, the model's own buffers and the key-value cache.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        let Self { mapped_bytes, decoded_bytes, buffer_bytes, scale_bytes, table_bytes, .. } = *self;
        [mapped_bytes, decoded_bytes, buffer_bytes, scale_bytes, table_bytes].into_iter().fold(0, u64::saturating_add)
    }

    /// What a memory budget must cover.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        [self.model_bytes, self.scratch_bytes, self.kv_bytes].into_iter().fold(self.weight_bytes(), u64::saturating_add)
    }
}

impl fmt::Display for Footprint {
    /// The items that are not zero, for people: `weights 3.1 MiB (coded 3.0 MiB, ...), kv 1.0 MiB`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let items = [
            ("mapped weights", self.mapped_bytes),
            ("decoded weights", self.decoded_bytes),
            ("layer buffers", self.buffer_bytes),
            ("scales", self.scale_bytes),
            ("tables", self.table_bytes),
            ("model buffers", self.model_bytes),
            ("scratch", self.scratch_bytes),
            ("kv cache", self.kv_bytes),
        ];
        let mut first = true;
        for (name, bytes) in items.into_iter().filter(|(_, bytes)| *bytes > 0) {
            let comma = if first { "" } else { ", " };
            write!(f, "{comma}{name} {}", Size(bytes))?;
            first = false;
        }
        Ok(())
    }
}

/// Bytes for people: `17 B`, `3.1 MiB`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
        let (mut value, mut unit) = (self.0 as f64, 0);
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        if unit == 0 { write!(f, "{} B", self.0) } else { write!(f, "{value:.1} {}", UNITS[unit]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_by_hand() {
        let footprint = Footprint {
            mapped_bytes: 1,
            decoded_bytes: 2,
            buffer_bytes: 4,
            scale_bytes: 8,
            table_bytes: 16,
            model_bytes: 32,
            scratch_bytes: 64,
            kv_bytes: 128,
        };
        assert_eq!((footprint.weight_bytes(), footprint.total_bytes()), (31, 255));
        let absurd = Footprint { kv_bytes: u64::MAX, ..footprint };
        assert_eq!(absurd.total_bytes(), u64::MAX, "saturates, so that it is refused and not wrapped");
    }

    #[test]
    fn sizes_read_well() {
        let shown = [17, 1024, 3 * 1024 * 1024 + 100 * 1024, u64::MAX].map(|bytes| Size(bytes).to_string());
        assert_eq!(shown, ["17 B", "1.0 KiB", "3.1 MiB", "16777216.0 TiB"]);
        let footprint = Footprint { mapped_bytes: 2048, kv_bytes: 5, ..Footprint::default() };
        assert_eq!(footprint.to_string(), "mapped weights 2.0 KiB, kv cache 5 B");
    }
}
