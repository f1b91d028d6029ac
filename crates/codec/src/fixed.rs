//! `fixed`: fields of equal width, no entropy coding; the baseline, and the form in which decoded
//! weights are kept.
//!
//! # Method
//! A *window* of consecutive symbols has field values of its own:
//!
//! - without escape, field `f` is symbol `base + f`;
//! - with escape, field 0 is ESCAPE and field `f >= 1` is symbol `base + f - 1`.
//!
//! If all symbols fit a window of `2^bits`, the table has no escape and the window begins at the
//! least symbol (4 bits: -8..=7 for a classic 4-bit checkpoint). Otherwise the window is the
//! symmetric one, as weights are: `2^bits - 1` symbols around 0, with 4 bits -7..=7. With 8 bits
//! the table always is the latter: a field is a symbol byte, and only far symbols escape.
//!
//! # Bytes of the table (little-endian)
//! ```text
//! u8 bits | u8 has_escape (0 or 1) | i16 base        the window lies within -127..=127
//! ```
//!
//! # Bytes of a chunk (little-endian)
//! ```text
//! u32 escape_bytes | u32 far_count | fields | escapes | far entries (6 bytes each)
//! ```
//! Fields are packed by tiles of 64 symbols:
//!
//! - 8 bits, `n` bytes: one byte a symbol;
//! - 4 bits, `ceil(n / 128) * 64` bytes: byte `j` of group `g` has symbol `j` of tile `2g` in its low
//!   and symbol `j` of tile `2g + 1` in its high nibble;
//! - 2 bits, `ceil(n / 256) * 64` bytes: byte `j` of group `g` has symbols `j` of tiles `4g` to
//!   `4g + 3`, the first in the lowest bits;
//! - 3, 5, 6, 7 bits, `ceil(n / 64) * 8 * bits` bytes: each tile is `bits` planes of 8 bytes, that of
//!   the lowest bit first; bit `i` of a plane belongs to symbol `i`.
//!
//! Fields beyond the last symbol are zero, and so are those of the tiles that fill up the last 64
//! bytes.
//!
//! # Why this suits SIMD and GPUs
//! Unpacking a 64-byte register of nibbles is one `and`, one shift and `and`, and gives two whole
//! tiles in the order in which they are multiplied, with no shuffle between bytes. Planes are mask
//! registers: `bits` masked additions give 64 bytes.
//!
//! # Proof of validity
//! The length of the fields is that of the number of symbols, unused fields are zero, escapes and
//! far list are used up.

use crate::error::{DecodeError, EncodeError, ParamsError, TableError};
use crate::escape::{Classified, Parts, resolve};
use crate::frequencies::payload_bits;
use crate::{ESCAPE, FarList, Histogram, SYMBOL_BIAS};

/// Symbols of a tile.
const TILE: usize = 64;

/// Parameters of `fixed`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Params {
    /// Bits of a field, 2..=8.
    pub bits: u8,
}

impl Params {
    /// Nibbles.
    pub const DEFAULT: Self = Self { bits: 4 };

    /// Refuses what the layout cannot hold.
    pub fn validate(&self) -> Result<(), ParamsError> {
        match self.bits {
            2..=8 => Ok(()),
            bits => Err(ParamsError::OutOfRange { parameter: "bits", value: bits.into(), allowed: "2..=8" }),
        }
    }

    /// Bytes of the fields of `symbols` symbols.
    pub fn field_bytes(&self, symbols: usize) -> usize {
        match self.bits {
            8 => symbols,
            4 => symbols.div_ceil(2 * TILE) * TILE,
            2 => symbols.div_ceil(4 * TILE) * TILE,
            bits => symbols.div_ceil(TILE) * 8 * usize::from(bits),
        }
    }
}

/// The window of symbols that have a field value of their own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Table {
    params: Params,
    base: i16,
    has_escape: bool,
}

impl Table {
    /// Refuses windows that leave the core symbols.
    fn new(params: Params, base: i16, escape_flag: u8) -> Result<Self, TableError> {
        params.validate()?;
        let bits = params.bits;
        let refused = TableError::Window { base, escape_flag, bits };
        let last = i32::from(base) + (1 << bits) - 1 - i32::from(escape_flag);
        if escape_flag > 1 || base < -127 || last > 127 {
            return Err(refused);
        }
        Ok(Self { params, base, has_escape: escape_flag == 1 })
    }

    pub(crate) fn build(params: Params, histogram: &Histogram) -> Result<Self, TableError> {
        params.validate()?;
        let (Some(min), Some(max)) = (histogram.min(), histogram.max()) else {
            return Err(TableError::EmptyHistogram);
        };
        let window = 1i32 << params.bits;
        let fits = params.bits < 8 && i32::from(max) - i32::from(min) < window && min >= -127 && max <= 127;
        if fits { Self::new(params, min.min(128 - window as i16), 0) } else { Self::new(params, 1 - (window / 2) as i16, 1) }
    }

    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        out.extend([self.params.bits, u8::from(self.has_escape)]);
        out.extend(self.base.to_le_bytes());
    }

    pub(crate) fn read(params: Params, bytes: &[u8]) -> Result<Self, TableError> {
        params.validate()?;
        let available_bytes = bytes.len();
        let (&[stored, escape_flag, low, high], rest) =
            bytes.split_first_chunk::<4>().ok_or(TableError::Truncated { needed_bytes: 4, available_bytes })?;
        if !rest.is_empty() {
            return Err(TableError::TrailingBytes { extra_bytes: rest.len() });
        }
        if stored != params.bits {
            return Err(TableError::BitsMismatch { stored, expected: params.bits });
        }
        Self::new(params, i16::from_le_bytes([low, high]), escape_flag)
    }

    pub(crate) fn payload_bits(&self, histogram: &Histogram) -> f64 {
        let coded = self.coded();
        payload_bits(histogram, &coded.map(|coded| if coded { self.params.bits.into() } else { f64::INFINITY }))
    }

    /// Parameters of the codec.
    pub fn params(&self) -> Params {
        self.params
    }

    /// First symbol of the window: that of field 1 with escape, of field 0 without.
    pub fn base(&self) -> i16 {
        self.base
    }

    /// Whether field 0 means an escaped symbol.
    pub fn has_escape(&self) -> bool {
        self.has_escape
    }

    /// Symbol byte minus field, for fields that are no ESCAPE: 0..=254.
    fn bias(&self) -> u8 {
        (self.base + SYMBOL_BIAS - i16::from(self.has_escape)) as u8
    }

    /// By symbol byte, 0 for ESCAPE: whether it has a field of its own.
    fn coded(&self) -> [bool; 256] {
        let mut coded = [false; 256];
        let fields = usize::from(self.has_escape)..1 << self.params.bits;
        for field in fields {
            coded[field + usize::from(self.bias())] = true;
        }
        coded[usize::from(ESCAPE)] = self.has_escape;
        coded
    }
}

/// The parts of a chunk.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// Packed fields, `field_bytes(symbols)` bytes.
    pub fields: &'a [u8],
    /// Escape bytes in symbol order.
    pub escapes: &'a [u8],
    /// Far symbols.
    pub far: FarList<'a>,
}

impl<'a> Chunk<'a> {
    /// Splits a chunk of `symbols` symbols into its parts. Lengths and the far list are checked,
    /// the rest only decoding can prove.
    pub fn parse(params: Params, symbols: usize, chunk: &'a [u8]) -> Result<Self, DecodeError> {
        let field_bytes = params.field_bytes(symbols);
        let Parts { body, escapes, far } = Parts::parse(chunk, symbols, field_bytes)?;
        if body.len() > field_bytes {
            return Err(DecodeError::TrailingBytes { extra_bytes: (body.len() - field_bytes) as u64 });
        }
        Ok(Self { fields: body, escapes, far })
    }
}

pub(crate) fn encode(table: &Table, symbols: &[i16], out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let mut classified = Classified::new(symbols, &table.coded())?;
    classified.write_header(out);
    let (bias, has_escape) = (table.bias(), table.has_escape);
    for code in &mut classified.codes {
        *code = if has_escape && *code == ESCAPE { 0 } else { *code - bias };
    }
    pack(table.params.bits, &classified.codes, out);
    classified.write_tail(out);
    Ok(())
}

fn pack(bits: u8, fields: &[u8], out: &mut Vec<u8>) {
    match bits {
        8 => out.extend(fields),
        2 | 4 => {
            let tiles = usize::from(8 / bits);
            for group in fields.chunks(tiles * TILE) {
                let mut packed = [0; TILE];
                for (tile, fields) in group.chunks(TILE).enumerate() {
                    for (byte, &field) in packed.iter_mut().zip(fields) {
                        *byte |= field << (usize::from(bits) * tile);
                    }
                }
                out.extend(packed);
            }
        }
        _ => {
            for tile in fields.chunks(TILE) {
                for plane in 0..bits {
                    let bit = |field: &u8| u64::from(field >> plane & 1);
                    let word = tile.iter().rev().fold(0, |word, field| word << 1 | bit(field));
                    out.extend(word.to_le_bytes());
                }
            }
        }
    }
}

/// Decodes to symbol bytes, far = 0.
pub(crate) fn decode<'a>(table: &Table, bytes: &'a [u8], out: &mut [u8]) -> Result<FarList<'a>, DecodeError> {
    let chunk = Chunk::parse(table.params, out.len(), bytes)?;
    unpack(table.params.bits, chunk.fields, out)?;
    let bias = table.bias();
    if table.has_escape {
        for field in &mut *out {
            *field = if *field == 0 { ESCAPE } else { *field + bias };
        }
    } else {
        for field in &mut *out {
            *field += bias;
        }
    }
    resolve(out, chunk.escapes, chunk.far)?;
    Ok(chunk.far)
}

fn unpack(bits: u8, packed: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
    // Bits of fields that no symbol has.
    let mut unused = 0;
    match bits {
        8 => out.copy_from_slice(packed),
        2 | 4 => {
            let tiles = usize::from(8 / bits);
            let mask = (1 << bits) - 1;
            let (packed, _) = packed.as_chunks::<TILE>();
            for (group, packed) in out.chunks_mut(tiles * TILE).zip(packed) {
                let mut fields = group.chunks_mut(TILE);
                for tile in 0..tiles {
                    let fields = fields.next().unwrap_or_default();
                    let shift = usize::from(bits) * tile;
                    for (field, &byte) in fields.iter_mut().zip(packed) {
                        *field = byte >> shift & mask;
                    }
                    unused = packed[fields.len()..].iter().fold(unused, |unused, &byte| unused | byte >> shift & mask);
                }
            }
        }
        _ => {
            let (planes, _) = packed.as_chunks::<8>();
            for (fields, planes) in out.chunks_mut(TILE).zip(planes.chunks(bits.into())) {
                fields.fill(0);
                for (plane, &word) in planes.iter().enumerate() {
                    let mut word = u64::from_le_bytes(word);
                    for field in &mut *fields {
                        *field |= ((word & 1) as u8) << plane;
                        word >>= 1;
                    }
                    unused |= u8::from(word != 0);
                }
            }
        }
    }
    if unused == 0 { Ok(()) } else { Err(DecodeError::PaddingNotZero) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(bits: u8, symbols: &[i16]) -> Table {
        let mut histogram = Histogram::new();
        histogram.add(symbols);
        Table::build(Params { bits }, &histogram).unwrap()
    }

    #[test]
    fn windows() {
        let window = |bits, symbols: &[i16]| {
            let table = table(bits, symbols);
            (table.base(), table.has_escape())
        };
        assert_eq!(window(4, &[-8, 7]), (-8, false));
        assert_eq!(window(4, &[-8, 8]), (-7, true));
        assert_eq!(window(4, &[120, 127]), (112, false));
        assert_eq!(window(4, &[-127, -120]), (-127, false));
        assert_eq!(window(4, &[-128, -120]), (-7, true));
        assert_eq!(window(4, &[120, 128]), (-7, true));
        assert_eq!(window(2, &[-1, 2]), (-1, false));
        assert_eq!(window(2, &[-2, 2]), (-1, true));
        assert_eq!(window(8, &[0]), (-127, true));
        assert_eq!(window(7, &[-127, 0]), (-127, false));
        assert_eq!(window(7, &[-127, 1]), (-63, true));
    }

    #[test]
    fn nibbles_by_hand() {
        let mut symbols = vec![-8; 64];
        symbols.extend([7, -7, -8]);
        let table = table(4, &symbols);
        let mut out = Vec::new();
        encode(&table, &symbols, &mut out).unwrap();
        assert_eq!(out[8..11], [0xf0, 0x10, 0x00]);
        assert_eq!(out.len(), 8 + 64);
        let mut bytes = [0; 67];
        decode(&table, &out, &mut bytes).unwrap();
        assert_eq!((bytes[0], bytes[64], bytes[65]), (120, 135, 121));
        out[8 + 3] |= 0x10;
        assert_eq!(decode(&table, &out, &mut bytes).unwrap_err(), DecodeError::PaddingNotZero);
        assert_eq!(decode(&table, &out, &mut [0; 129]).unwrap_err(), DecodeError::Truncated { needed_bytes: 136, available_bytes: 72 });
    }

    #[test]
    fn planes_and_escapes_by_hand() {
        let symbols = [-4, -3, 3, 200];
        let table = table(3, &symbols);
        let mut out = Vec::new();
        encode(&table, &symbols, &mut out).unwrap();
        // Fields: -4 escapes (0), -3 is 1, 3 is 7, 200 is far (0).
        let mut expected = vec![2, 0, 0, 0, 1, 0, 0, 0];
        for plane in [0b0110u64, 0b0100, 0b0100] {
            expected.extend(plane.to_le_bytes());
        }
        expected.extend([124, 0]);
        expected.extend([3, 0, 0, 0, 200, 0]);
        assert_eq!(out, expected);
    }

    #[test]
    fn read_refuses_impossible_windows() {
        let params = Params { bits: 4 };
        assert_eq!(Table::read(params, &[4, 0, 0xf8, 0xff]).unwrap().base(), -8);
        let refused = |bytes: &[u8]| Table::read(params, bytes).unwrap_err();
        assert_eq!(refused(&[4, 0, 0]), TableError::Truncated { needed_bytes: 4, available_bytes: 3 });
        assert_eq!(refused(&[4, 0, 0, 0, 0]), TableError::TrailingBytes { extra_bytes: 1 });
        assert_eq!(refused(&[3, 0, 0, 0]), TableError::BitsMismatch { stored: 3, expected: 4 });
        assert_eq!(refused(&[4, 2, 0, 0]), TableError::Window { base: 0, escape_flag: 2, bits: 4 });
        assert_eq!(refused(&[4, 0, 113, 0]), TableError::Window { base: 113, escape_flag: 0, bits: 4 });
        assert_eq!(refused(&[4, 0, 0x80, 0xff]), TableError::Window { base: -128, escape_flag: 0, bits: 4 });
        assert!(Table::read(params, &[4, 1, 113, 0]).is_ok());
        assert!(Table::read(Params { bits: 8 }, &[8, 0, 0x81, 0xff]).is_err());
    }
}
