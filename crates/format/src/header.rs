//! The 64-byte header of a coded tensor.

use std::ops::Range;

use tersor_codec::{Codec, CodecKind, PADDING_BYTES, block_ans, fixed, huffman, rans};

use crate::error::TensorError;
use crate::limits;

/// First four bytes of a blob, "TRSR".
pub const MAGIC: [u8; 4] = *b"TRSR";
/// Version of the blob.
pub const VERSION: u16 = 1;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 64;
/// One field of the header: its name in FORMAT.md, where it starts, and how long it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Field {
    /// Name in FORMAT.md.
    pub name: &'static str,
    /// Bytes from the start of the blob.
    pub offset: usize,
    /// Bytes.
    pub bytes: usize,
}

macro_rules! fields {
    ($($name:ident $offset:literal $bytes:literal)*) => {
        /// Every field of the header in order; FORMAT.md's table is tested against it.
        pub const FIELDS: &[Field] = &[$(Field { name: stringify!($name), offset: $offset, bytes: $bytes }),*];

        /// The fields one by one, as byte ranges.
        mod at {
            #![allow(non_upper_case_globals)]
            use std::ops::Range;
            $(pub const $name: Range<usize> = $offset..$offset + $bytes;)*
        }
    };
}

fields! {
    magic 0 4
    version 4 2
    scheme 6 1
    codec 7 1
    rows 8 4
    cols 12 4
    group_size 16 4
    row_tiles_per_chunk 20 4
    state_bits 24 1
    word_bits 25 1
    prob_bits 26 1
    lanes 27 1
    block_symbols 28 4
    chunk_count 32 4
    table_bytes 36 4
    payload_bytes 40 8
    wide_count 48 4
    symbol_min 52 1
    symbol_max 53 1
    scale_exponent 54 1
    reserved 55 1
    checksum 56 8
}

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
/// Smallest symbol that is not wide.
pub const NARROW_MIN: i8 = -7;
/// Largest symbol that is not wide.
pub const NARROW_MAX: i8 = 7;
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

    /// Its name in FORMAT.md.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tensor => "tensor",
            Self::Row => "row",
            Self::GroupAffine => "group affine",
            Self::GroupSymmetric => "group symmetric",
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
    /// Parses and checks the first [`HEADER_BYTES`] of `blob`; what follows them is not looked at, and neither is the
    /// checksum (it covers table and index too).
    ///
    /// # Errors
    /// Fewer bytes, an unknown version, scheme or codec, or fields that contradict each other or a limit.
    pub fn parse(blob: &[u8]) -> Result<Self, TensorError> {
        let Some(bytes) = blob.first_chunk::<HEADER_BYTES>() else {
            return Err(TensorError::Truncated { needed: HEADER_BYTES as u64, available: blob.len() as u64 });
        };
        let u8_at = |at: Range<usize>| bytes[at.start];
        let u32_at = |at: Range<usize>| u32::from_le_bytes(array(bytes, at));
        let u64_at = |at: Range<usize>| u64::from_le_bytes(array(bytes, at));

        let magic: [u8; 4] = array(bytes, at::magic);
        if magic != MAGIC {
            return Err(TensorError::Magic { found: u32::from_le_bytes(magic) });
        }
        let version = u16::from_le_bytes(array(bytes, at::version));
        if version != VERSION {
            return Err(TensorError::Version { found: version, known: VERSION });
        }
        let scheme = ScaleScheme::from_id(u8_at(at::scheme))?;
        let params = CodecFields {
            state_bits: u8_at(at::state_bits),
            word_bits: u8_at(at::word_bits),
            prob_bits: u8_at(at::prob_bits),
            lanes: u8_at(at::lanes),
            block_symbols: u32_at(at::block_symbols),
        };
        let codec = params.codec(u8_at(at::codec))?;
        if bytes[at::reserved.start] != 0 {
            return Err(field("reserved", u64::from(bytes[at::reserved.start]), "must be 0"));
        }
        let header = Self {
            scheme,
            codec,
            rows: u32_at(at::rows),
            cols: u32_at(at::cols),
            group_size: u32_at(at::group_size),
            row_tiles_per_chunk: u32_at(at::row_tiles_per_chunk),
            chunk_count: u32_at(at::chunk_count),
            table_bytes: u32_at(at::table_bytes),
            payload_bytes: u64_at(at::payload_bytes),
            wide_count: u32_at(at::wide_count),
            symbol_min: u8_at(at::symbol_min) as i8,
            symbol_max: u8_at(at::symbol_max) as i8,
            scale_exponent: u8_at(at::scale_exponent) as i8,
            checksum: u64_at(at::checksum),
        };
        header.check()?;
        Ok(header)
    }

    /// The header's bytes, with `self.checksum` as it is.
    pub fn write(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: Range<usize>, value: &[u8]| bytes[at].copy_from_slice(value);
        let params = CodecFields::new(self.codec);
        put(at::magic, &MAGIC);
        put(at::version, &VERSION.to_le_bytes());
        put(at::scheme, &[self.scheme.id()]);
        put(at::codec, &[self.codec.kind().code()]);
        put(at::rows, &self.rows.to_le_bytes());
        put(at::cols, &self.cols.to_le_bytes());
        put(at::group_size, &self.group_size.to_le_bytes());
        put(at::row_tiles_per_chunk, &self.row_tiles_per_chunk.to_le_bytes());
        put(at::state_bits, &[params.state_bits]);
        put(at::word_bits, &[params.word_bits]);
        put(at::prob_bits, &[params.prob_bits]);
        put(at::lanes, &[params.lanes]);
        put(at::block_symbols, &params.block_symbols.to_le_bytes());
        put(at::chunk_count, &self.chunk_count.to_le_bytes());
        put(at::table_bytes, &self.table_bytes.to_le_bytes());
        put(at::payload_bytes, &self.payload_bytes.to_le_bytes());
        put(at::wide_count, &self.wide_count.to_le_bytes());
        put(at::symbol_min, &self.symbol_min.to_le_bytes());
        put(at::symbol_max, &self.symbol_max.to_le_bytes());
        put(at::scale_exponent, &self.scale_exponent.to_le_bytes());
        put(at::checksum, &self.checksum.to_le_bytes());
        bytes
    }

    /// Every rule of FORMAT.md that the header alone can break.
    fn check(&self) -> Result<(), TensorError> {
        for (what, value) in [("rows", self.rows), ("cols", self.cols)] {
            if value == 0 {
                return Err(field(what, 0, "must not be 0"));
            }
            limit(what, u64::from(value), limits::DIM_MAX)?;
        }
        // At most 2^20 x 2^22 x 64: no overflow.
        let symbols = self.symbols();
        limit("number of symbols", symbols, limits::SYMBOLS_MAX)?;

        let group_size = u64::from(self.group_size);
        if self.scheme.is_group() {
            if group_size == 0 || !group_size.is_multiple_of(TILE_COLS as u64) {
                return Err(field("group_size", group_size, "must be a positive multiple of 4"));
            }
            limit("group_size", group_size, limits::DIM_MAX)?;
            if self.scale_exponent != 0 {
                return Err(field("scale_exponent", u64::from(self.scale_exponent as u8), "must be 0 with groups"));
            }
        } else if group_size != 0 {
            return Err(field("group_size", group_size, "must be 0 without groups"));
        }

        let per_chunk = u64::from(self.row_tiles_per_chunk);
        let row_tiles = self.row_tiles() as u64;
        if per_chunk == 0 || per_chunk > row_tiles {
            return Err(field("row_tiles_per_chunk", per_chunk, "must be from 1 to the number of row tiles"));
        }
        if per_chunk > 1 {
            let chunk_symbols = per_chunk * self.col_steps() as u64 * TILE_SYMBOLS as u64;
            limit("number of symbols in a chunk", chunk_symbols, limits::CHUNK_SYMBOLS_MAX)?;
        }
        let chunk_count = u64::from(self.chunk_count);
        if chunk_count != row_tiles.div_ceil(per_chunk) {
            return Err(field("chunk_count", chunk_count, "must be row tiles / row_tiles_per_chunk, rounded up"));
        }
        if self.table_bytes == 0 {
            return Err(field("table_bytes", 0, "must not be 0"));
        }
        limit("table_bytes", u64::from(self.table_bytes), limits::TABLE_BYTES_MAX)?;
        // Every chunk but the last takes at least 16 bytes. This bound also keeps the sums below from overflowing.
        if self.payload_bytes <= (chunk_count - 1) * CHUNK_ALIGN as u64 {
            return Err(field("payload_bytes", self.payload_bytes, "too small for the number of chunks"));
        }
        limit("payload_bytes", self.payload_bytes, limits::PAYLOAD_BYTES_MAX)?;

        if self.symbol_min > self.symbol_max {
            return Err(field("symbol_min", u64::from(self.symbol_min as u8), "must not exceed symbol_max"));
        }
        let wide_count = u64::from(self.wide_count);
        if wide_count > symbols {
            return Err(field("wide_count", wide_count, "must not exceed the number of symbols"));
        }
        if (wide_count != 0) != (self.symbol_min < NARROW_MIN || self.symbol_max > NARROW_MAX) {
            return Err(field("wide_count", wide_count, "contradicts symbol_min and symbol_max"));
        }
        Ok(())
    }

    /// Where the index starts, bytes from the start of the blob.
    pub fn index_start(&self) -> u64 {
        HEADER_BYTES as u64 + u64::from(self.table_bytes)
    }

    /// Where the first chunk starts, bytes from the start of the blob.
    pub fn payload_start(&self) -> u64 {
        let index_end = self.index_start() + u64::from(self.chunk_count) * INDEX_ENTRY_BYTES as u64;
        index_end.next_multiple_of(CHUNK_ALIGN as u64)
    }

    /// Length of the blob: payload and at least 64 zero bytes, rounded up to a multiple of 64.
    pub fn blob_bytes(&self) -> u64 {
        (self.payload_start() + self.payload_bytes + PADDING_BYTES as u64).next_multiple_of(BLOB_ALIGN as u64)
    }

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

/// The codec's parameters as the header stores them. A field that the codec does not use is 0.
struct CodecFields {
    state_bits: u8,
    word_bits: u8,
    prob_bits: u8,
    lanes: u8,
    block_symbols: u32,
}

impl CodecFields {
    fn new(codec: Codec) -> Self {
        let none = Self { state_bits: 0, word_bits: 0, prob_bits: 0, lanes: 0, block_symbols: 0 };
        match codec {
            Codec::Fixed(p) => Self { prob_bits: p.bits, ..none },
            Codec::Huffman(p) => Self { prob_bits: p.code_bits_max, lanes: p.lanes, ..none },
            Codec::Rans(p) => Self { state_bits: p.state_bits, word_bits: p.word_bits, prob_bits: p.prob_bits, lanes: p.lanes, ..none },
            Codec::BlockAns(p) => {
                Self { state_bits: p.state_bits, word_bits: p.word_bits, prob_bits: p.prob_bits, block_symbols: p.block_symbols, ..none }
            }
            Codec::Tiered | Codec::RansPairs => none,
            other => unreachable!("codec {other} has no header fields: this crate is older than the codec crate"),
        }
    }

    fn codec(&self, kind: u8) -> Result<Codec, TensorError> {
        let kind = CodecKind::from_code(kind).ok_or(TensorError::Codec { found: kind })?;
        let Self { state_bits, word_bits, prob_bits, lanes, block_symbols } = *self;
        let codec = match kind {
            CodecKind::Fixed => Codec::Fixed(fixed::Params { bits: prob_bits }),
            CodecKind::Huffman => Codec::Huffman(huffman::Params { code_bits_max: prob_bits, lanes }),
            CodecKind::Rans => Codec::Rans(rans::Params { state_bits, word_bits, prob_bits, lanes }),
            CodecKind::BlockAns => Codec::BlockAns(block_ans::Params { state_bits, word_bits, prob_bits, block_symbols }),
            CodecKind::Tiered => Codec::Tiered,
            CodecKind::RansPairs => Codec::RansPairs,
            other => {
                return Err(TensorError::Codec { found: other.code() });
            }
        };
        let refuse = |message: String| TensorError::CodecParams { codec: kind.name(), message };
        codec.validate().map_err(|e| refuse(e.to_string()))?;
        // Validation passed, so `new` sees only parameters that it can write: unequal means an unused field is not 0.
        let Self { state_bits, word_bits, prob_bits, lanes, block_symbols } = Self::new(codec);
        if (state_bits, word_bits, prob_bits, lanes, block_symbols)
            != (self.state_bits, self.word_bits, self.prob_bits, self.lanes, self.block_symbols)
        {
            return Err(refuse("a parameter that the codec does not use is not 0".to_owned()));
        }
        Ok(codec)
    }
}

fn array<const N: usize>(bytes: &[u8; HEADER_BYTES], at: Range<usize>) -> [u8; N] {
    bytes[at].try_into().expect("fields! states the length of every field")
}

fn field(field: &'static str, value: u64, message: &'static str) -> TensorError {
    TensorError::Field { field, value, message }
}

pub(crate) fn limit(what: &'static str, value: u64, limit: u64) -> Result<(), TensorError> {
    if value > limit { Err(TensorError::Limit { what, value, limit }) } else { Ok(()) }
}
