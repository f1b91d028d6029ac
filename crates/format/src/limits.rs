//! What a file may ask for at most. Each limit is checked before anything is allocated.

/// Rows and columns of a coded tensor.
pub const DIM_MAX: u64 = 1 << 24;
/// Symbols of a coded tensor, padding included: counts of symbols fit 32 bits.
pub const SYMBOLS_MAX: u64 = u32::MAX as u64;
/// Bytes of a table.
pub const TABLE_BYTES_MAX: u64 = 64 << 10;
/// Bytes of all chunks of a tensor: eight a symbol in the largest tensor, which no encoder comes near.
pub const PAYLOAD_BYTES_MAX: u64 = 1 << 35;
/// Symbols in a chunk that holds more than one row tile.
pub const CHUNK_SYMBOLS_MAX: u64 = 1 << 24;
/// Bytes of a safetensors JSON header.
pub const HEADER_BYTES_MAX: u64 = 64 << 20;
/// Bytes of config.json, of the shard index and of the manifest.
pub const JSON_BYTES_MAX: u64 = 16 << 20;
