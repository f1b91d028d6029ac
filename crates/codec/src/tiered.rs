//! `tiered`: short fields for the frequent symbols, and the others passed on to a next tier of
//! fields; a prefix code that decodes as fast as plain fields are unpacked.
//!
//! # Method
//! A table has one to three *tiers*, each with fields of its own width, 2 to 4 bits, and a symbol
//! byte for every field value but 0. Field 0 is ESCAPE: the symbol is coded in the next tier, and
//! behind the last tier as an escape byte. So the first tier has a field for every symbol of the
//! chunk, the second one for every symbol that the first escapes, and so on. A symbol of tier `t`
//! has a code of `bits[0] + ... + bits[t]`.
//!
//! The most frequent symbols go to the first tier, the next to the second. Of all lists of widths
//! the table takes the cheapest: for Gaussian symbols 2-2-2 below 2.9 bits of entropy, 3-2-2 up to
//! 3.5, then 3-3-3 and 4-3-3.
//!
//! # Bytes of the table
//! ```text
//! u8 tiers (1..=3) | tiers x u8 bits (2..=4) | for each tier 2^bits - 1 x u8 symbol byte
//! ```
//! The symbol bytes of a tier ascend strictly, none is 0, and none occurs in two tiers.
//!
//! # Bytes of a chunk (little-endian)
//! ```text
//! u32 escape_bytes | u32 far_count | (tiers - 1) x u32 symbols | escapes | fields of the last tier | ... | fields of the first tier | far entries
//! ```
//! `symbols` are those of the second and the third tier. Fields are packed by tiles of 64, eight
//! tiles to `bits` *lines* of 64 bytes. Byte `j` of a line belongs to field `j` of its tiles:
//!
//! ```text
//! 2 bits   line i: tiles 4i to 4i + 3, the first in the lowest bits
//! 4 bits   line i: tiles 2i and 2i + 1, the first in the lowest bits
//! 3 bits   line 0:  bits 0-2 tile 0 | 3-5 tile 1 | 6-7 low bits of tile 6
//!          line 1:  bits 0-2 tile 2 | 3-5 tile 3 | 6 high bit of tile 6 | 7 high bit of tile 7
//!          line 2:  bits 0-2 tile 4 | 3-5 tile 5 | 6-7 low bits of tile 7
//! ```
//! The last eight tiles of a tier may be fewer; lines without a field are then left out. Fields
//! beyond the last symbol are 0.
//!
//! # Why this suits SIMD
//! A tile of the first tier is a shift of a line, a byte permute by the table, which ignores the
//! bits that belong to other tiles, and one byte expand that fills in the escaped symbols. These
//! were decoded before in the same way, from the tier behind, so a tier costs in proportion to its
//! symbols. No step waits for the one before but for the address of the next escaped symbol, so one
//! chunk alone keeps a core busy. Tiers lie in the order in which they are decoded: a chunk is read
//! from front to back.
//!
//! # Proof of validity
//! Every tier escapes as many symbols as the next one has; unused fields are zero; far list and
//! escape bytes of 0 name the same positions.

use std::cmp::Reverse;

use crate::error::{DecodeError, EncodeError, TableError};
use crate::escape::{Classified, ESCAPED_BITS, FAR_BITS, check_symbols, take_u32};
use crate::frequencies::payload_bits;
use crate::histogram::Population;
use crate::{ESCAPE, FAR_BYTES, FarList, Histogram, SYMBOL_BIAS};

/// Most tiers of a table.
pub const TIERS_MAX: usize = 3;
/// Fields of a tile.
const TILE: usize = 64;
/// Tiles that are packed together.
const TILES: usize = 8;
/// Widths of fields.
const BITS: std::ops::RangeInclusive<u8> = 2..=4;

/// One tier of a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tier {
    /// Bits of a field, 2..=4.
    bits: u8,
    /// By field: the symbol byte; field 0 is [`ESCAPE`], and what is beyond `2^bits` too.
    symbol_bytes: [u8; 16],
}

impl Tier {
    /// `symbol_bytes`: of the fields 1, 2, ...; in any order.
    fn new(bits: u8, symbol_bytes: &[u8]) -> Self {
        let mut tier = Self { bits, symbol_bytes: [ESCAPE; 16] };
        let own = &mut tier.symbol_bytes[1..=symbol_bytes.len()];
        own.copy_from_slice(symbol_bytes);
        own.sort_unstable();
        tier
    }

    /// Bits of a field.
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// By field: the symbol byte; [`ESCAPE`] for field 0 and for what no field can hold.
    pub fn symbol_bytes(&self) -> &[u8; 16] {
        &self.symbol_bytes
    }

    /// Symbol bytes that have a field.
    fn coded(&self) -> &[u8] {
        &self.symbol_bytes[1..1 << self.bits]
    }

    /// Bytes of the fields of `symbols` symbols.
    pub fn field_bytes(&self, symbols: usize) -> usize {
        let tiles = symbols.div_ceil(TILE);
        (tiles / TILES * usize::from(self.bits) + self.lines(tiles % TILES)) * TILE
    }

    /// Lines that the first `tiles` of eight tiles touch.
    fn lines(&self, tiles: usize) -> usize {
        let last = (0..tiles).flat_map(|tile| places(self.bits, tile)).map(|place| place.line + 1).max();
        last.unwrap_or(0)
    }
}

/// Where some bits of a tile's fields lie: `width` bits of the field from `from` on, at `shift` of
/// the bytes of `line`.
#[derive(Clone, Copy)]
struct Place {
    line: usize,
    shift: u8,
    from: u8,
    width: u8,
}

/// The places of tile `tile` of eight.
fn places(bits: u8, tile: usize) -> impl Iterator<Item = Place> {
    let whole = |line, shift| (Place { line, shift, from: 0, width: bits }, None);
    let (first, second) = match (bits, tile) {
        (3, 6) => (Place { line: 0, shift: 6, from: 0, width: 2 }, Some(Place { line: 1, shift: 6, from: 2, width: 1 })),
        (3, 7) => (Place { line: 2, shift: 6, from: 0, width: 2 }, Some(Place { line: 1, shift: 7, from: 2, width: 1 })),
        _ => {
            let together = usize::from(8 / bits);
            whole(tile / together, bits * (tile % together) as u8)
        }
    };
    std::iter::once(first).chain(second)
}

/// The tiers of a tensor.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Table {
    tiers: Vec<Tier>,
}

impl Table {
    /// The widths and symbols that cost the fewest bits, the table counted; of equals the one with
    /// the fewest tiers.
    pub(crate) fn build(histogram: &Histogram) -> Result<Self, TableError> {
        let population = Population::new(histogram);
        if population.core_total + population.far_total == 0 {
            return Err(TableError::EmptyHistogram);
        }
        let mut counts = [0; 256];
        for &(byte, count) in &population.core {
            counts[usize::from(byte)] = count;
        }
        // All symbols, for a tier is full: those that do not occur are the last.
        let mut ranked: Vec<u8> = (1..=255).collect();
        ranked.sort_by_key(|&byte| (Reverse(counts[usize::from(byte)]), byte.abs_diff(SYMBOL_BIAS as u8), byte));
        let cost_bits = |widths: &[u8]| {
            let mut rest = population.core_total + population.far_total;
            let (mut bits, mut next) = (8.0 * (1 + widths.len()) as f64, 0);
            for &width in widths {
                let entries = (1 << width) - 1;
                bits += rest as f64 * f64::from(width) + 8.0 * entries as f64;
                rest -= ranked[next..next + entries].iter().map(|&byte| counts[usize::from(byte)]).sum::<u64>();
                next += entries;
            }
            bits + (rest - population.far_total) as f64 * ESCAPED_BITS + population.far_total as f64 * FAR_BITS
        };
        let mut lists: Vec<Vec<u8>> = vec![Vec::new()];
        let mut best: Option<(f64, Vec<u8>)> = None;
        for _ in 0..TIERS_MAX {
            lists = lists.iter().flat_map(|list| BITS.map(move |bits| [&list[..], &[bits]].concat())).collect();
            for list in &lists {
                let bits = cost_bits(list);
                if best.as_ref().is_none_or(|(least_bits, _)| bits < *least_bits) {
                    best = Some((bits, list.clone()));
                }
            }
        }
        let (_, widths) = best.expect("there are lists of one tier");
        let mut ranked = &ranked[..];
        let tiers = widths.into_iter().map(|bits| {
            let (own, rest) = ranked.split_at((1 << bits) - 1);
            ranked = rest;
            Tier::new(bits, own)
        });
        Ok(Self { tiers: tiers.collect() })
    }

    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        out.push(self.tiers.len() as u8);
        out.extend(self.tiers.iter().map(|tier| tier.bits));
        for tier in &self.tiers {
            out.extend(tier.coded());
        }
    }

    pub(crate) fn read(bytes: &[u8]) -> Result<Self, TableError> {
        let available_bytes = bytes.len();
        let truncated = |needed_bytes| TableError::Truncated { needed_bytes, available_bytes };
        let (&count, rest) = bytes.split_first().ok_or(truncated(1))?;
        let count = usize::from(count);
        if !(1..=TIERS_MAX).contains(&count) {
            return Err(TableError::Tiers { tiers: count, tiers_max: TIERS_MAX });
        }
        let (widths, mut rest) = rest.split_at_checked(count).ok_or(truncated(1 + count))?;
        let mut seen = [false; 256];
        let mut tiers = Vec::with_capacity(count);
        for (tier, &bits) in widths.iter().enumerate() {
            if !BITS.contains(&bits) {
                return Err(TableError::TierBits { tier, bits });
            }
            let entries = (1usize << bits) - 1;
            let (own, after) = rest.split_at_checked(entries).ok_or(truncated(available_bytes - rest.len() + entries))?;
            rest = after;
            for (entry, &byte) in own.iter().enumerate() {
                let ascends = entry == 0 || own[entry - 1] < byte;
                if byte == ESCAPE || !ascends || seen[usize::from(byte)] {
                    return Err(TableError::TierSymbol { tier, field: entry + 1, symbol_byte: byte });
                }
                seen[usize::from(byte)] = true;
            }
            tiers.push(Tier::new(bits, own));
        }
        if !rest.is_empty() {
            return Err(TableError::TrailingBytes { extra_bytes: rest.len() });
        }
        Ok(Self { tiers })
    }

    pub(crate) fn payload_bits(&self, histogram: &Histogram) -> f64 {
        let mut bits_of = [f64::INFINITY; 256];
        let mut bits = 0.0;
        for tier in &self.tiers {
            bits += f64::from(tier.bits);
            for &byte in tier.coded() {
                bits_of[usize::from(byte)] = bits;
            }
        }
        bits_of[usize::from(ESCAPE)] = bits;
        payload_bits(histogram, &bits_of)
    }

    /// The tiers, first to last.
    pub fn tiers(&self) -> &[Tier] {
        &self.tiers
    }

    /// By symbol byte: whether it has a field in some tier; ESCAPE always has.
    fn coded(&self) -> [bool; 256] {
        let mut coded = [false; 256];
        for &byte in self.tiers.iter().flat_map(Tier::coded) {
            coded[usize::from(byte)] = true;
        }
        coded[usize::from(ESCAPE)] = true;
        coded
    }
}

/// The parts of a chunk.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// By tier: symbols and packed fields, `field_bytes(symbols)` bytes. No symbols beyond the last
    /// tier.
    pub tiers: [(usize, &'a [u8]); TIERS_MAX],
    /// Escape bytes in symbol order.
    pub escapes: &'a [u8],
    /// Far symbols.
    pub far: FarList<'a>,
}

impl<'a> Chunk<'a> {
    /// Splits a chunk of `symbols` symbols into its parts. Lengths and the far list are checked,
    /// and that no tier has more symbols than the one before; the rest only decoding can prove.
    pub fn parse(table: &Table, symbols: usize, chunk: &'a [u8]) -> Result<Self, DecodeError> {
        check_symbols(symbols)?;
        let count = table.tiers.len();
        let available_bytes = chunk.len() as u64;
        let header_bytes = 4 * (1 + count);
        let truncated = |needed_bytes| DecodeError::Truncated { needed_bytes, available_bytes };
        let (mut header, mut rest) = chunk.split_at_checked(header_bytes).ok_or(truncated(header_bytes as u64))?;
        let mut number = || take_u32(&mut header).map_or(0, u64::from);
        let (escape_bytes, far_bytes) = (number(), number() * FAR_BYTES as u64);
        let mut tiers = [(0, &chunk[..0]); TIERS_MAX];
        tiers[0].0 = symbols;
        for tier in 1..count {
            let (symbols, symbols_max) = (number() as usize, tiers[tier - 1].0);
            if symbols > symbols_max {
                return Err(DecodeError::TierTooLong { tier, symbols, symbols_max });
            }
            tiers[tier].0 = symbols;
        }
        let field_bytes: usize = table.tiers.iter().zip(&tiers).map(|(tier, (symbols, _))| tier.field_bytes(*symbols)).sum();
        let needed_bytes = header_bytes as u64 + escape_bytes + field_bytes as u64 + far_bytes;
        if needed_bytes > available_bytes {
            return Err(truncated(needed_bytes));
        }
        if needed_bytes < available_bytes {
            return Err(DecodeError::TrailingBytes { extra_bytes: available_bytes - needed_bytes });
        }
        let mut take = |bytes: usize| {
            let (part, after) = rest.split_at(bytes);
            rest = after;
            part
        };
        let escapes = take(escape_bytes as usize);
        for (tier, (symbols, fields)) in table.tiers.iter().zip(&mut tiers).rev() {
            *fields = take(tier.field_bytes(*symbols));
        }
        Ok(Self { tiers, escapes, far: FarList::parse(rest, symbols)? })
    }
}

pub(crate) fn encode(table: &Table, symbols: &[i16], out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let classified = Classified::new(symbols, &table.coded())?;
    classified.write_header(out);
    let mut codes = classified.codes.clone();
    let mut packed = Vec::with_capacity(table.tiers.len());
    for (index, tier) in table.tiers.iter().enumerate() {
        if index > 0 {
            out.extend((codes.len() as u32).to_le_bytes());
        }
        let mut field_of = [0; 256];
        for (field, &byte) in (1..).zip(tier.coded()) {
            field_of[usize::from(byte)] = field;
        }
        let fields: Vec<u8> = codes.iter().map(|&code| field_of[usize::from(code)]).collect();
        packed.push(pack(tier.bits, &fields));
        codes.retain(|&code| field_of[usize::from(code)] == 0);
    }
    classified.write_escapes(out);
    for fields in packed.iter().rev() {
        out.extend(fields);
    }
    classified.write_far(out);
    Ok(())
}

fn pack(bits: u8, fields: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for fields in fields.chunks(TILES * TILE) {
        let mut lines = [[0u8; TILE]; 4];
        let mut used = 0;
        for (tile, fields) in fields.chunks(TILE).enumerate() {
            for Place { line, shift, from, width } in places(bits, tile) {
                let mask = (1 << width) - 1;
                for (byte, &field) in lines[line].iter_mut().zip(fields) {
                    *byte |= (field >> from & mask) << shift;
                }
                used = used.max(line + 1);
            }
        }
        out.extend_from_slice(lines[..used].as_flattened());
    }
    out
}

/// Decodes to symbol bytes, far = 0.
pub(crate) fn decode<'a>(table: &Table, bytes: &'a [u8], out: &mut [u8]) -> Result<FarList<'a>, DecodeError> {
    let chunk = Chunk::parse(table, out.len(), bytes)?;
    // What the tier at hand escapes: the symbols of the tier behind it.
    let mut escaped = chunk.escapes.to_vec();
    for index in (1..table.tiers.len()).rev() {
        let mut symbols = vec![0; chunk.tiers[index].0];
        decode_tier(table, &chunk, index, &escaped, &mut symbols)?;
        escaped = symbols;
    }
    decode_tier(table, &chunk, 0, &escaped, out)?;
    let mut far = chunk.far.iter();
    for position in (0..out.len()).filter(|&position| out[position] == ESCAPE) {
        if far.next().is_none_or(|far| far.position as usize != position) {
            return Err(DecodeError::FarMismatch { position });
        }
    }
    match far.next() {
        Some(far) => Err(DecodeError::FarMismatch { position: far.position as usize }),
        None => Ok(chunk.far),
    }
}

/// The symbol bytes of one tier; `escaped` are those of the next.
fn decode_tier(table: &Table, chunk: &Chunk<'_>, index: usize, escaped: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
    let tier = &table.tiers[index];
    unpack(tier.bits, chunk.tiers[index].1, out)?;
    let escapes = out.iter().filter(|field| **field == 0).count();
    if escapes != escaped.len() {
        return Err(DecodeError::TierCount { tier: index, escapes, symbols: escaped.len() });
    }
    let mut escaped = escaped.iter();
    for field in out {
        *field = match *field {
            0 => *escaped.next().expect("as many as there are escapes"),
            field => tier.symbol_bytes[usize::from(field)],
        };
    }
    Ok(())
}

/// `packed`: as many bytes as the fields of `out` take.
fn unpack(bits: u8, packed: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
    let mut unused = 0;
    for (packed, out) in packed.chunks(usize::from(bits) * TILE).zip(out.chunks_mut(TILES * TILE)) {
        let mut lines = [[0u8; TILE]; 4];
        lines.as_flattened_mut()[..packed.len()].copy_from_slice(packed);
        let mut fields = [[0u8; TILE]; TILES];
        for (tile, fields) in fields.iter_mut().enumerate() {
            for Place { line, shift, from, width } in places(bits, tile) {
                let mask = (1 << width) - 1;
                for (field, &byte) in fields.iter_mut().zip(&lines[line]) {
                    *field |= (byte >> shift & mask) << from;
                }
            }
        }
        let (own, rest) = fields.as_flattened().split_at(out.len());
        out.copy_from_slice(own);
        unused = rest.iter().fold(unused, |unused, &field| unused | field);
    }
    if unused == 0 { Ok(()) } else { Err(DecodeError::PaddingNotZero) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn histogram(symbols: &[i16]) -> Histogram {
        let mut histogram = Histogram::new();
        histogram.add(symbols);
        histogram
    }

    fn table(widths: &[u8]) -> Table {
        let mut next = 120;
        let tiers = widths.iter().map(|&bits| {
            let own: Vec<u8> = (next..next + (1 << bits) - 1).collect();
            next += own.len() as u8;
            Tier::new(bits, &own)
        });
        Table { tiers: tiers.collect() }
    }

    #[test]
    fn frequent_symbols_come_first() {
        // 1, 0 and -1 are the most frequent; a tier is filled up with the symbols nearest to 0.
        let mut symbols = vec![0; 500];
        symbols.extend([1; 300].iter().chain(&[-1; 290]).chain(&[5; 20]));
        let built = Table::build(&histogram(&symbols)).unwrap();
        assert_eq!(built.tiers[0], Tier::new(2, &[127, 128, 129]));
        assert_eq!(built.tiers[1], Tier::new(2, &[126, 130, 133]));
        assert_eq!(built.tiers.len(), 2);
        assert_eq!(built.payload_bits(&histogram(&[0, 0, 1, 5, 7, 1000])), 2.0 * 3.0 + 4.0 + (4.0 + 8.0) + (4.0 + 8.0 + 48.0));
    }

    #[test]
    fn bytes_by_hand() {
        // Tier 0: symbols -8, -7, -6 (bytes 120 to 122); tier 1: -5 to 1 (bytes 123 to 129).
        let table = table(&[2, 3]);
        let symbols = [-8, -6, -5, 1, 100, 300];
        let mut out = Vec::new();
        encode(&table, &symbols, &mut out).unwrap();
        let mut expected = vec![2, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0, 228, 0];
        let line = |fields: &[u8]| [fields, &vec![0; 64 - fields.len()]].concat();
        expected.extend(line(&[1, 7, 0, 0]));
        expected.extend(line(&[1, 3, 0, 0, 0, 0]));
        expected.extend([5, 0, 0, 0, 44, 1]);
        assert_eq!(out, expected);
        let mut bytes = [0; 6];
        decode(&table, &out, &mut bytes).unwrap();
        assert_eq!(bytes, [120, 122, 123, 129, 228, 0]);

        let mut refused = |at: usize, value: u8| {
            let mut broken = out.clone();
            broken[at] = value;
            decode(&table, &broken, &mut bytes).unwrap_err()
        };
        assert_eq!(refused(14 + 4, 1), DecodeError::PaddingNotZero);
        assert_eq!(refused(14 + 64, 0), DecodeError::TierCount { tier: 0, escapes: 5, symbols: 4 });
        assert_eq!(refused(14 + 3, 1), DecodeError::TierCount { tier: 1, escapes: 1, symbols: 2 });
        assert_eq!(refused(12, 0), DecodeError::FarMismatch { position: 4 });
        assert_eq!(refused(8, 7), DecodeError::TierTooLong { tier: 1, symbols: 7, symbols_max: 6 });
    }

    #[test]
    fn eight_tiles_of_three_bits() {
        let fields: Vec<u8> = (0..512).map(|i| if i % 64 == 0 { (i / 64) as u8 } else { 0 }).collect();
        let packed = pack(3, &fields);
        assert_eq!(packed.len(), 192);
        // Tiles 0 to 7 have the fields 0 to 7.
        assert_eq!((packed[0], packed[64], packed[128]), (0x88, 0xda, 0xec));
        let mut back = [0; 512];
        unpack(3, &packed, &mut back).unwrap();
        assert_eq!(back[..], fields);
        let three_bits = Tier::new(3, &[1, 2, 3, 4, 5, 6, 7]);
        let bytes = [0, 64, 64, 128, 128, 192, 192, 192, 192, 256];
        for (tiles, bytes) in bytes.into_iter().enumerate() {
            assert_eq!(three_bits.field_bytes(tiles * 64), bytes, "{tiles} tiles");
            assert_eq!(pack(3, &vec![7; tiles * 64]).len(), bytes, "{tiles} tiles");
        }
    }

    #[test]
    fn read_refuses_impossible_tiers() {
        let good = [2, 2, 2, 1, 2, 3, 4, 5, 255];
        assert_eq!(Table::read(&good).unwrap().tiers.len(), 2);
        let refused = |bytes: &[u8]| Table::read(bytes).unwrap_err();
        assert_eq!(refused(&[]), TableError::Truncated { needed_bytes: 1, available_bytes: 0 });
        assert_eq!(refused(&good[..8]), TableError::Truncated { needed_bytes: 9, available_bytes: 8 });
        assert_eq!(refused(&[&good[..], &[0]].concat()), TableError::TrailingBytes { extra_bytes: 1 });
        assert_eq!(refused(&[4, 2, 2, 2, 2]), TableError::Tiers { tiers: 4, tiers_max: 3 });
        assert_eq!(refused(&[0]), TableError::Tiers { tiers: 0, tiers_max: 3 });
        assert_eq!(refused(&[1, 5]), TableError::TierBits { tier: 0, bits: 5 });
        assert_eq!(refused(&[1, 2, 0, 1, 2]), TableError::TierSymbol { tier: 0, field: 1, symbol_byte: 0 });
        assert_eq!(refused(&[1, 2, 3, 3, 4]), TableError::TierSymbol { tier: 0, field: 2, symbol_byte: 3 });
        assert_eq!(refused(&[2, 2, 2, 1, 2, 3, 3, 4, 5]), TableError::TierSymbol { tier: 1, field: 1, symbol_byte: 3 });
    }
}
