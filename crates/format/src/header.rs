//! The 64-byte header of a coded tensor.

use tersor_codec::{Codec, block_ans, fixed, huffman, rans};

use crate::error::TensorError;
use crate::limits;

/// First four bytes of a blob, "TRSR".
pub const MAGIC: [u8; 4] = *b"TRSR";
/// Version of the blob.
pub const VERSION: u16 = 1;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 64;
/// Bytes of one entry of the chunk index: chunk length, low half of its xxh3-64.
pub const INDEX_ENTRY_BYTES: usize = 8;
/// Chunks start at multiples of this, counted from the start of the blob.
pub const CHUNK_ALIGN: usize = 16;
/// Blobs start at multiples of this in the file, and their length is a multiple of it.
pub const BLOB_ALIGN: usize = 64;
/// Rows of a tile.
pub const TILE_ROWS: usize = 16;
/// Columns of a tile.
pub const TILE_COLS: usize = 4;
/// Symbols of a tile.
pub const TILE_SYMBOLS: usize = TILE_ROWS * TILE_COLS;

/// How symbols become weights, as stored in the header.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum ScaleScheme {
    /// One scale for the tensor: w = scale * symbol.
    Tensor,
    /// One scale per row.
    Row,
    /// A scale and a bias per group of columns in a row: w = scale * (symbol + 8) + bias.
    GroupAffine,
    /// A scale per group of columns in a row: w = scale * symbol.
    GroupSymmetric,
}

impl ScaleScheme {
    /// All schemes, in order of their ids.
    pub const ALL: [Self; 4] = [Self::Tensor, Self::Row, Self::GroupAffine, Self::GroupSymmetric];

    /// The id in the header.
    pub const fn id(self) -> u8 {
        match self {
            Self::Tensor => 0,
            Self::Row => 1,
            Self::GroupAffine => 2,
            Self::GroupSymmetric => 3,
        }
    }

    /// Whether scales belong to groups of columns.
    pub const fn is_group(self) -> bool {
        matches!(self, Self::GroupAffine | Self::GroupSymmetric)
    }

    fn from_id(id: u8) -> Result<Self, TensorError> {
        Self::ALL.into_iter().find(|s| s.id() == id).ok_or(TensorError::Scheme { found: id })
    }
}

/// The form that `cached`, `prefetch` and `lru` keep: fixed-width fields, and a byte for each symbol that does not fit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct DecodedForm {
    /// Bits of a field: 4 or 8.
    pub bits: u8,
    /// Value of the smallest symbol of a field: symbol = base + field.
    /// For 8 bits: -128, the field is the symbol byte. For 4 bits with escape: -8, and field 0 is the escape.
    pub base: i16,
    /// Whether field 0 of 4 says that the symbol's byte follows among the row tile's escapes.
    pub has_escape: bool,
}

impl DecodedForm {
    /// The cheapest form for the symbols that `header` describes.
    pub fn choose(header: &TensorHeader) -> Self {
        let (min, max) = (i16::from(header.symbol_min), i16::from(header.symbol_max));
        // At -128 and 127 the statistics are clamped: the true range is unknown.
        let range_known = header.symbol_min > i8::MIN && header.symbol_max < i8::MAX;
        if range_known && max - min < 16 {
            Self { bits: 4, base: min, has_escape: false }
        } else if u64::from(header.wide_count) * 4 <= header.symbols() {
            Self { bits: 4, base: -8, has_escape: true }
        } else {
            Self { bits: 8, base: -128, has_escape: false }
        }
    }
}

/// Header of a coded tensor. Values of this type have passed every check that needs no more than the header.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct TensorHeader {
    /// How symbols become weights.
    pub scheme: ScaleScheme,
    /// The codec with its parameters.
    pub codec: Codec,
    /// Rows.
    pub rows: u32,
    /// Columns.
    pub cols: u32,
    /// Columns that share a scale; 0 for schemes without groups.
    pub group_size: u32,
    /// Row tiles in every chunk but the last, which may hold fewer.
    pub row_tiles_per_chunk: u32,
    /// Chunks.
    pub chunk_count: u32,
    /// Bytes of the table.
    pub table_bytes: u32,
    /// Bytes from the start of the first chunk to the end of the last.
    pub payload_bytes: u64,
    /// Symbols outside -7..=7.
    pub wide_count: u32,
    /// Smallest symbol, padding included, clamped to i8.
    pub symbol_min: i8,
    /// Largest symbol, padding included, clamped to i8.
    pub symbol_max: i8,
    /// Real scale = stored scale * 2^scale_exponent; 0 for schemes with groups.
    pub scale_exponent: i8,
    /// xxh3-64 of the header's first 56 bytes, the table and the index.
    pub checksum: u64,
}

impl TensorHeader {
    /// Row tiles: rows / 16, rounded up.
    pub fn row_tiles(&self) -> usize {
        (self.rows as usize).div_ceil(TILE_ROWS)
    }

    /// Column steps: columns / 4, rounded up.
    pub fn col_steps(&self) -> usize {
        (self.cols as usize).div_ceil(TILE_COLS)
    }

    /// Coded symbols, padding included.
    pub fn symbols(&self) -> u64 {
        self.row_tiles() as u64 * self.col_steps() as u64 * TILE_SYMBOLS as u64
    }

    /// Groups in a row; 1 for schemes without groups.
    pub fn groups(&self) -> usize {
        if self.group_size == 0 { 1 } else { (self.cols as usize).div_ceil(self.group_size as usize) }
    }

    /// Bytes of the decoded form, without the far symbols (which the header does not count; 6 bytes each, and rare).
    ///
    /// A row tile holds its fields (4 bits: 64 bytes for two column steps; 8 bits: 64 bytes for each), and four bytes
    /// of escape offset; each wide symbol adds a byte if the form has escapes.
    pub fn decoded_bytes(&self) -> u64 {
        let form = DecodedForm::choose(self);
        let row_tiles = self.row_tiles() as u64;
        let steps = self.col_steps() as u64;
        let fields = row_tiles * 64 * if form.bits == 4 { steps.div_ceil(2) } else { steps };
        let escapes = if form.has_escape { u64::from(self.wide_count) } else { 0 };
        fields + escapes + row_tiles * 4
    }
}
