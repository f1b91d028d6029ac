//! What a file may ask for at most. Each limit is checked before anything is allocated.

/// Rows and columns of a coded tensor.
pub const DIM_MAX: u64 = 1 << 24;
/// Symbols of a coded tensor, padding included.
pub const SYMBOLS_MAX: u64 = 1 << 32;
/// Bytes of a table.
pub const TABLE_BYTES_MAX: u64 = 64 << 10;
/// Symbols in a chunk that holds more than one row tile.
pub const CHUNK_SYMBOLS_MAX: u64 = 1 << 24;
/// Bytes of a safetensors JSON header.
pub const HEADER_BYTES_MAX: u64 = 64 << 20;
/// Tensors in a safetensors file.
pub const TENSORS_MAX: usize = 1 << 20;
/// Dimensions of a tensor.
pub const DIMS_MAX: usize = 16;
/// Bytes of config.json, of the shard index and of the manifest.
pub const JSON_BYTES_MAX: u64 = 16 << 20;
/// Files in a manifest, shards in an index.
pub const FILES_MAX: usize = 1 << 16;
