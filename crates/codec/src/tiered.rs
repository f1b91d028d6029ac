//! `tiered`: short fields for the frequent *pairs* of symbols, and the other pairs passed on to a
//! next tier of fields; a prefix code that decodes nearly as fast as plain nibbles are unpacked.
//!
//! # Method
//! A pair is the symbols at the same lane of two consecutive tiles of 64 (`pairs.rs`). Where both lie
//! in a window of 16 consecutive symbols, which holds all but a few in ten thousand, they are two
//! nibbles, one *pair byte*: the symbol of the first tile in the low one, counted from the window's
//! first. Symbols outside the window are *listed* with their position. Above some 3.2 bits of entropy
//! these would be many: there the window has 32 or 64 symbols, and the low one or two bits of every
//! symbol, nearly uniform, are *raw*, stored as they are.
//!
//! Pair bytes are coded by up to three *tiers*, each with fields of its own width, 3 to 6 bits, and
//! a pair byte for every field value but 0. Field 0 is ESCAPE: the pair is coded in the next tier,
//! and behind the last tier as a byte of itself. So the first tier has a field for every pair of the
//! chunk, the second one for every pair that the first escapes, and so on. A pair of tier `t` has a
//! code of `bits[0] + ... + bits[t]`, half of that a symbol. Without a tier all pairs are bytes: plain
//! nibbles, for symbols that are nearly uniform.
//!
//! The most frequent pairs go to the first tier, the next to the second. Of all lists of widths the
//! table takes the cheapest, as if the symbols of a pair were independent: for Gaussian symbols 4-4-5 at
//! 2.25 bits of entropy, 5-5-6 at 2.5, 6-6-6 from 2.9 on. It takes raw bits where they save more than a
//! tenth of a bit a symbol, for they cost speed: from 3.25 bits of entropy on, two from 3.7 on.
//!
//! # Bytes of the table
//! ```text
//! u8 base | u8 tiers (0..=3) + 16 * raw_bits (0..=2) | tiers x u8 bits (3..=6) | for each tier 2^bits - 1 x u8 pair byte
//! ```
//! `base` is the symbol byte of the window's first symbol, 1..=256 - (16 << raw_bits). The pair bytes of
//! a tier ascend strictly, none is 0, and none occurs in two tiers.
//!
//! # Bytes of a chunk (little-endian)
//! ```text
//! u32 listed | u32 far_count | u32 escape_bytes | (tiers - 1, but not -1) x u32 pairs | listed x u16 gap | listed x u8 symbol byte | escapes | raw lines | fields of the last tier | ... | fields of the first tier | far entries
//! ```
//! `pairs` are those of the second and the third tier. **listed**, **raw lines**: `pairs.rs`. A pair whose
//! second tile is beyond the chunk has 0 for it. Fields are packed by tiles of 64, eight
//! tiles to `bits` *lines* of 64 bytes. Byte `j` of a line belongs to field `j` of its tiles:
//!
//! ```text
//! 3 bits   line 0:  bits 0-2 tile 0 | 3-5 tile 1 | 6-7 low bits of tile 6
//!          line 1:  bits 0-2 tile 2 | 3-5 tile 3 | 6 high bit of tile 6 | 7 high bit of tile 7
//!          line 2:  bits 0-2 tile 4 | 3-5 tile 5 | 6-7 low bits of tile 7
//! 4 bits   line i:  bits 0-3 tile 2i | 4-7 tile 2i + 1
//! 5 bits   line i:  bits 0-4 tile i, and of tiles 5, 6 and 7:
//!          line 0:  5-7 low bits of tile 5        line 1:  5 bit 3 of tile 7 | 6-7 high bits of tile 5
//!          line 2:  5-7 low bits of tile 6        line 3:  5 bit 4 of tile 7 | 6-7 high bits of tile 6
//!          line 4:  5-7 low bits of tile 7
//! 6 bits   lines 0 to 2: bits 0-5 tiles 0 to 2 | 6-7 bits 0-1, 2-3 and 4-5 of tile 3
//!          lines 3 to 5: tiles 4 to 7 likewise
//! ```
//! The last eight tiles of a tier may be fewer; lines without a field are then left out. Fields
//! beyond the last pair are 0.
//!
//! # Why this suits SIMD
//! A tile of the first tier, 128 symbols, is a line, shifted or not, a byte permute by the table, which
//! ignores the bits that belong to other tiles, and one byte expand that fills in the escaped pairs.
//! These were decoded before in the same way, from the tier behind, so a tier costs in proportion to
//! its pairs. Nibbles are multiplied as they are, with no table: what the window's first symbol is
//! worth is added to the sums. Raw bits join them by a shift and a selection. No step waits for the one before but for the address of the next
//! escaped pair, so one chunk alone keeps a core busy. Tiers lie in the order in which they are
//! decoded: a chunk is read from front to back.
//!
//! # Proof of validity
//! Every tier escapes as many pairs as the next one has; unused fields, halves and raw bits are zero; listed
//! symbols lie in the chunk and have nibble 8 and raw bits 0; far list and listed bytes of 0 name the same
//! positions.

use crate::error::{DecodeError, EncodeError, TableError};
use crate::escape::{check_symbols, take_u32};
use crate::histogram::Population;
use crate::pairs::{LISTED_BYTES, Listed, Nibbles, Placed, RAW_BITS_MAX, TILE, Window, fullest_window, pairs_of, ranked_pairs};
use crate::{ESCAPE, FAR_BYTES, FarList, Histogram};

/// Most tiers of a table.
pub const TIERS_MAX: usize = 3;
/// Tiles that are packed together.
const TILES: usize = 8;
/// Most bits of a field, so lines of eight tiles.
const BITS_MAX: usize = 6;
/// Widths of fields.
const BITS: std::ops::RangeInclusive<u8> = 3..=BITS_MAX as u8;
/// What having raw bits is judged to cost, in bits for each symbol beside the bits themselves: they make products a
/// fifth slower, and decoding to lines of nibbles, which are then no longer the pairs themselves, twice as slow in the cache.
const RAW_JUDGED_BITS: f64 = 0.1;
/// Where the raw bits begin in the byte of the table that has the number of tiers.
const RAW_BITS_SHIFT: u32 = 4;

/// One tier of a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tier {
    /// Bits of a field, 3..=6.
    bits: u8,
    /// By field: the pair byte; field 0 is ESCAPE. Repeats itself every `2^bits` bytes.
    pair_bytes: [u8; 1 << BITS_MAX],
}

impl Tier {
    /// `pair_bytes`: of all fields from 1 on, in any order.
    fn new(bits: u8, pair_bytes: &[u8]) -> Self {
        let mut own = [ESCAPE; 1 << BITS_MAX];
        let fields = 1 << bits;
        own[1..fields].copy_from_slice(pair_bytes);
        own[1..fields].sort_unstable();
        Self { bits, pair_bytes: std::array::from_fn(|i| own[i % fields]) }
    }

    /// Bits of a field.
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// By field: the pair byte; [`ESCAPE`] for field 0. Repeats itself every `2^bits` bytes, so that bits above
    /// the field do not matter to who looks up six.
    pub fn pair_bytes(&self) -> &[u8; 1 << BITS_MAX] {
        &self.pair_bytes
    }

    /// Pair bytes that have a field.
    fn coded(&self) -> &[u8] {
        &self.pair_bytes[1..1 << self.bits]
    }

    /// Bytes of the fields of `pairs` pairs.
    pub fn field_bytes(&self, pairs: usize) -> usize {
        let tiles = pairs.div_ceil(TILE);
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
    let at = |line, shift, from, width| Some(Place { line, shift, from, width });
    let places = match (bits, tile) {
        (3, 6) => [at(0, 6, 0, 2), at(1, 6, 2, 1), None],
        (3, 7) => [at(2, 6, 0, 2), at(1, 7, 2, 1), None],
        (5, 5) => [at(0, 5, 0, 3), at(1, 6, 3, 2), None],
        (5, 6) => [at(2, 5, 0, 3), at(3, 6, 3, 2), None],
        (5, 7) => [at(4, 5, 0, 3), at(1, 5, 3, 1), at(3, 5, 4, 1)],
        (6, 3 | 7) => [at(tile / 4 * 3, 6, 0, 2), at(tile / 4 * 3 + 1, 6, 2, 2), at(tile / 4 * 3 + 2, 6, 4, 2)],
        (6, _) => [at(tile / 4 * 3 + tile % 4, 0, 0, 6), None, None],
        _ => {
            let together = usize::from(8 / bits);
            [at(tile / together, bits * (tile % together) as u8, 0, bits), None, None]
        }
    };
    places.into_iter().flatten()
}

/// The tiers of a tensor.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Table {
    window: Window,
    tiers: Vec<Tier>,
}

impl Table {
    /// The table that costs the fewest bits, itself counted and [`RAW_JUDGED_BITS`]; of equals the one with the fewest raw bits, then with
    /// the fewest tiers. Of the windows with as many raw bits it takes the one with the most symbols, of equals the
    /// one nearest to the middle of the alphabet.
    pub(crate) fn build(histogram: &Histogram) -> Result<Self, TableError> {
        let population = Population::new(histogram);
        if population.core_total + population.far_total == 0 {
            return Err(TableError::EmptyHistogram);
        }
        let mut best: Option<(f64, Self)> = None;
        for raw_bits in 0..=RAW_BITS_MAX {
            let (bits, table) = Self::best_of(&population, fullest_window(&population, raw_bits));
            let judged_bits = if raw_bits > 0 { bits + RAW_JUDGED_BITS * histogram.total() as f64 } else { bits };
            if best.as_ref().is_none_or(|(least_bits, _)| judged_bits < *least_bits) {
                best = Some((judged_bits, table));
            }
        }
        let (_, table) = best.ok_or(TableError::EmptyHistogram)?;
        Ok(table)
    }

    /// The best table of a window, and what it costs in bits.
    fn best_of(population: &Population, window: Window) -> (f64, Self) {
        let nibbles = Nibbles::new(population, window);
        let counts = nibbles.pair_counts();
        // All pairs, for a tier is full: those that do not occur are the last.
        let ranked = ranked_pairs(&counts);
        let mut before = vec![0.0; 256];
        for (i, &(_, count)) in ranked.iter().enumerate() {
            before[i + 1] = before[i] + count;
        }
        let all = before[255] + counts[0];
        let cost_bits = |widths: &[u8]| {
            let (mut bits, mut next) = (8.0 * (2 + widths.len()) as f64, 0);
            for &width in widths {
                let entries = (1 << width) - 1;
                bits += (all - before[next]) * f64::from(width) + 8.0 * entries as f64;
                next += entries;
            }
            bits + (all - before[next]) * 8.0
        };
        let mut lists: Vec<Vec<u8>> = vec![Vec::new()];
        let mut best = (cost_bits(&[]), Vec::new());
        for _ in 0..TIERS_MAX {
            lists = lists.iter().flat_map(|list| BITS.map(move |bits| [&list[..], &[bits]].concat())).collect();
            for list in &lists {
                let bits = cost_bits(list);
                if bits < best.0 {
                    best = (bits, list.clone());
                }
            }
        }
        let (bits, widths) = best;
        let ranked: Vec<u8> = ranked.into_iter().map(|(pair, _)| pair).collect();
        let mut ranked = &ranked[..];
        let tiers = widths.into_iter().map(|bits| {
            let (own, rest) = ranked.split_at((1 << bits) - 1);
            ranked = rest;
            Tier::new(bits, own)
        });
        let tiers = tiers.collect();
        (bits + nibbles.beside_bits(window), Self { window, tiers })
    }

    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        out.extend([self.window.base(), self.tiers.len() as u8 | self.window.raw_bits() << RAW_BITS_SHIFT]);
        out.extend(self.tiers.iter().map(|tier| tier.bits));
        for tier in &self.tiers {
            out.extend(tier.coded());
        }
    }

    pub(crate) fn read(bytes: &[u8]) -> Result<Self, TableError> {
        let available_bytes = bytes.len();
        let truncated = |needed_bytes| TableError::Truncated { needed_bytes, available_bytes };
        let (&[base, counts], rest) = bytes.split_first_chunk().ok_or(truncated(2))?;
        let (raw_bits, count) = (counts >> RAW_BITS_SHIFT, usize::from(counts & ((1 << RAW_BITS_SHIFT) - 1)));
        if raw_bits > RAW_BITS_MAX {
            return Err(TableError::RawBits { raw_bits, raw_bits_max: RAW_BITS_MAX });
        }
        let window = Window::new(base, raw_bits)?;
        if count > TIERS_MAX {
            return Err(TableError::Tiers { tiers: count, tiers_max: TIERS_MAX });
        }
        let (widths, mut rest) = rest.split_at_checked(count).ok_or(truncated(2 + count))?;
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
                    return Err(TableError::TierPair { tier, field: entry + 1, pair_byte: byte });
                }
                seen[usize::from(byte)] = true;
            }
            tiers.push(Tier::new(bits, own));
        }
        if !rest.is_empty() {
            return Err(TableError::TrailingBytes { extra_bytes: rest.len() });
        }
        Ok(Self { window, tiers })
    }

    /// As if the symbols of a pair were independent.
    pub(crate) fn payload_bits(&self, histogram: &Histogram) -> f64 {
        let nibbles = Nibbles::new(&Population::new(histogram), self.window);
        let mut bits = 0.0;
        let mut bits_of = [f64::INFINITY; 256];
        for tier in &self.tiers {
            bits += f64::from(tier.bits);
            for &pair in tier.coded() {
                bits_of[usize::from(pair)] = bits;
            }
        }
        let pairs = nibbles.pair_counts().into_iter().zip(bits_of);
        let fields: f64 = pairs.map(|(count, own)| count * if own.is_finite() { own } else { bits + 8.0 }).sum();
        fields + nibbles.beside_bits(self.window)
    }

    /// Symbols that are not listed.
    pub fn window(&self) -> Window {
        self.window
    }

    /// The tiers, first to last.
    pub fn tiers(&self) -> &[Tier] {
        &self.tiers
    }
}

/// The parts of a chunk.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// By tier: pairs and packed fields, `field_bytes(pairs)` bytes. No pairs beyond the last tier.
    pub tiers: [(usize, &'a [u8]); TIERS_MAX],
    /// Pair bytes that no tier has.
    pub escapes: &'a [u8],
    /// Raw bits, whole lines of 64 bytes: `window.raw_line_bytes(pairs)`.
    pub raw_lines: &'a [u8],
    /// Symbols outside the window.
    pub listed: Listed<'a>,
    /// Far symbols.
    pub far: FarList<'a>,
}

impl<'a> Chunk<'a> {
    /// Splits a chunk of `symbols` symbols into its parts. Lengths and both lists are checked, and
    /// that no tier has more pairs than the one before; the rest only decoding can prove.
    pub fn parse(table: &Table, symbols: usize, chunk: &'a [u8]) -> Result<Self, DecodeError> {
        check_symbols(symbols)?;
        let count = table.tiers.len();
        let available_bytes = chunk.len() as u64;
        let header_bytes = 4 * (3 + count.saturating_sub(1));
        let truncated = |needed_bytes| DecodeError::Truncated { needed_bytes, available_bytes };
        let (mut header, mut rest) = chunk.split_at_checked(header_bytes).ok_or(truncated(header_bytes as u64))?;
        let mut number = || take_u32(&mut header).map_or(0, u64::from);
        let (listed, far_bytes, escape_bytes) = (number(), number() * FAR_BYTES as u64, number());
        let mut tiers = [(0, &chunk[..0]); TIERS_MAX];
        match pairs_of(symbols) {
            pairs if count > 0 => tiers[0].0 = pairs,
            pairs if escape_bytes == pairs as u64 => {}
            pairs => return Err(DecodeError::TierCount { tier: 0, escapes: pairs, pairs: escape_bytes as usize }),
        }
        for tier in 1..count {
            let (pairs, pairs_max) = (number() as usize, tiers[tier - 1].0);
            if pairs > pairs_max {
                return Err(DecodeError::TierTooLong { tier, pairs, pairs_max });
            }
            tiers[tier].0 = pairs;
        }
        let field_bytes: usize = table.tiers.iter().zip(&tiers).map(|(tier, (pairs, _))| tier.field_bytes(*pairs)).sum();
        let raw_line_bytes = table.window.raw_line_bytes(pairs_of(symbols));
        let own_bytes = header_bytes + raw_line_bytes + field_bytes;
        let needed_bytes = own_bytes as u64 + listed * LISTED_BYTES as u64 + escape_bytes + far_bytes;
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
        let (listed, escapes) = (take(LISTED_BYTES * listed as usize), take(escape_bytes as usize));
        let raw_lines = take(raw_line_bytes);
        for (tier, (pairs, fields)) in table.tiers.iter().zip(&mut tiers).rev() {
            *fields = take(tier.field_bytes(*pairs));
        }
        Ok(Self { tiers, escapes, raw_lines, listed: Listed::parse(listed, symbols)?, far: FarList::parse(rest, symbols)? })
    }
}

pub(crate) fn encode(table: &Table, symbols: &[i16], out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let placed = Placed::new(symbols, table.window)?;
    let mut pairs = table.window.pair_bytes(&placed.codes);
    let mut counts = Vec::with_capacity(table.tiers.len());
    let mut packed = Vec::with_capacity(table.tiers.len());
    for tier in &table.tiers {
        counts.push(pairs.len() as u32);
        let mut field_of = [0; 256];
        for (field, &pair) in (1..).zip(tier.coded()) {
            field_of[usize::from(pair)] = field;
        }
        let fields: Vec<u8> = pairs.iter().map(|&pair| field_of[usize::from(pair)]).collect();
        packed.push(pack(tier.bits, &fields));
        pairs.retain(|&pair| field_of[usize::from(pair)] == 0);
    }
    placed.write_counts(out);
    out.extend((pairs.len() as u32).to_le_bytes());
    out.extend(counts.iter().skip(1).flat_map(|count| count.to_le_bytes()));
    placed.write_listed(out);
    out.extend(pairs);
    out.extend(table.window.raw_lines(&placed.codes));
    for fields in packed.iter().rev() {
        out.extend(fields);
    }
    placed.write_far(out);
    Ok(())
}

fn pack(bits: u8, fields: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for fields in fields.chunks(TILES * TILE) {
        let mut lines = [[0u8; TILE]; BITS_MAX];
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
    // What the tier at hand escapes: the pairs of the tier behind it.
    let mut pairs = chunk.escapes.to_vec();
    for index in (0..table.tiers.len()).rev() {
        let escaped = pairs;
        pairs = vec![0; chunk.tiers[index].0];
        decode_tier(table, &chunk, index, &escaped, &mut pairs)?;
    }
    table.window.join(&pairs, chunk.raw_lines, out)?;
    chunk.listed.put(table.window, chunk.far, out)?;
    Ok(chunk.far)
}

/// The pair bytes of one tier; `escaped` are those of the next.
fn decode_tier(table: &Table, chunk: &Chunk<'_>, index: usize, escaped: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
    let tier = &table.tiers[index];
    unpack(tier.bits, chunk.tiers[index].1, out)?;
    let escapes = out.iter().filter(|field| **field == 0).count();
    if escapes != escaped.len() {
        return Err(DecodeError::TierCount { tier: index, escapes, pairs: escaped.len() });
    }
    let mut escaped = escaped.iter();
    for field in out {
        *field = match *field {
            0 => *escaped.next().expect("as many as there are escapes"),
            field => tier.pair_bytes[usize::from(field)],
        };
    }
    Ok(())
}

/// `packed`: as many bytes as the fields of `out` take.
fn unpack(bits: u8, packed: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
    let mut unused = 0;
    for (packed, out) in packed.chunks(usize::from(bits) * TILE).zip(out.chunks_mut(TILES * TILE)) {
        let mut lines = [[0u8; TILE]; BITS_MAX];
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

    /// Pair bytes 0x80, 0x81, ... in the order of the tiers; nibble 8 begins with symbol 0.
    fn table(widths: &[u8], raw_bits: u8) -> Table {
        let mut next = 0x80;
        let tiers = widths.iter().map(|&bits| {
            let own: Vec<u8> = (next..next + (1 << bits) - 1).collect();
            next += own.len() as u8;
            Tier::new(bits, &own)
        });
        Table { window: Window::new(128 - (8 << raw_bits), raw_bits).unwrap(), tiers: tiers.collect() }
    }

    #[test]
    fn frequent_pairs_come_first() {
        let mut symbols = vec![0; 5000];
        symbols.extend([1; 3000].iter().chain(&[-1; 2900]).chain(&[5; 200]).chain(&[100; 10]));
        let built = Table::build(&histogram(&symbols)).unwrap();
        assert_eq!(built.window, Window::new(120, 0).unwrap());
        // Seven of the nine pairs of -1, 0 and 1: without (-1, -1), and of the equals (1, -1) and (-1, 1) the smaller byte.
        assert_eq!(built.tiers[0], Tier::new(3, &[0x78, 0x79, 0x87, 0x88, 0x89, 0x98, 0x99]));
    }

    #[test]
    fn expected_bits_by_hand() {
        let table = |raw_bits| table(&[3, 4], raw_bits);
        // Eight times 0, in four pairs (0, 0), 0x88, which is the second of the second tier.
        assert_eq!(table(0).payload_bits(&histogram(&[0; 8])), 4.0 * 7.0);
        // (-8, -8) has no field: three bits, four bits, and a byte.
        assert_eq!(table(0).payload_bits(&histogram(&[-8; 2])), 15.0);
        // Listed symbols take a pair of 0, and 24 bits; a far one 48 more.
        assert_eq!(table(0).payload_bits(&histogram(&[100, 1000])), 7.0 + 2.0 * 24.0 + 48.0);
        assert_eq!(table(2).payload_bits(&histogram(&[0, 1, 2, 3])), 2.0 * 7.0 + 4.0 * 2.0);
    }

    #[test]
    fn bytes_by_hand() {
        let table = table(&[3, 4], 0);
        // Two tiles: the first three symbols have partners, the others not.
        let mut symbols = vec![-8; 67];
        symbols[..4].copy_from_slice(&[-7, -1, -7, 100]);
        symbols[64..].copy_from_slice(&[0, 0, 300]);
        let mut out = Vec::new();
        encode(&table, &symbols, &mut out).unwrap();
        // Listed: 100 at 3, 300 at 66. Pairs: 0x81, 0x87, 0x81, 0x08 without a field, then zeros, which have none either.
        let mut expected = vec![2, 0, 0, 0, 1, 0, 0, 0, 61, 0, 0, 0, 62, 0, 0, 0, 3, 0, 62, 0, 228, 0];
        expected.extend([&[8][..], &[0; 60]].concat());
        let line = |fields: &[u8]| [fields, &vec![0; 64 - fields.len()]].concat();
        expected.extend(line(&[1, 0]));
        expected.extend(line(&[2, 0, 2]));
        expected.extend([66, 0, 0, 0, 44, 1]);
        assert_eq!(out, expected);
        let mut bytes = [0; 67];
        decode(&table, &out, &mut bytes).unwrap();
        let want: Vec<u8> = symbols.iter().map(|&symbol| if symbol == 300 { 0 } else { (symbol + 128) as u8 }).collect();
        assert_eq!(bytes[..], want);

        let mut refused = |at: usize, value: u8| {
            let mut broken = out.clone();
            broken[at] = value;
            decode(&table, &broken, &mut bytes).unwrap_err()
        };
        let second = 22 + 61;
        assert_eq!(refused(second + 62, 1), DecodeError::PaddingNotZero, "a field beyond the last pair");
        assert_eq!(refused(22 + 1, 0x10), DecodeError::PaddingNotZero, "a partner beyond the last symbol");
        assert_eq!(refused(second + 64, 0), DecodeError::TierCount { tier: 0, escapes: 63, pairs: 62 });
        assert_eq!(refused(second, 0), DecodeError::TierCount { tier: 1, escapes: 62, pairs: 61 });
        assert_eq!(refused(20, 0), DecodeError::FarMismatch { position: 3 });
        assert_eq!(refused(21, 1), DecodeError::FarMismatch { position: 66 });
        assert_eq!(refused(18, 63), DecodeError::ListedOutside { position: 67, symbols: 67 });
        assert_eq!(refused(16, 2), DecodeError::ListedNibble { position: 2 });
        assert_eq!(refused(12, 70), DecodeError::TierTooLong { tier: 1, pairs: 70, pairs_max: 64 });
    }

    #[test]
    fn raw_bits_by_hand() {
        let table = table(&[3], 1);
        let mut symbols = vec![-16; 68];
        symbols[..5].copy_from_slice(&[-13, 3, 1, 100, -15]);
        symbols[64..].copy_from_slice(&[1, 0, 300, 2]);
        let mut out = Vec::new();
        encode(&table, &symbols, &mut out).unwrap();
        // Listed: 100 at 3, 300 at 66. Pairs: 0x81, then 0x89, 0x88 and 0x98 without a field, then zeros, which have none either.
        let mut expected = vec![2, 0, 0, 0, 1, 0, 0, 0, 63, 0, 0, 0, 3, 0, 62, 0, 228, 0];
        expected.extend([[0x89, 0x88, 0x98].as_slice(), &[0; 60]].concat());
        // Raw bits: of -13 and 1, of 3 and 0, of 1 and of the listed 300; of the listed 100 and of 2; of -15.
        expected.extend([[0b11, 0b01, 0b01, 0b00, 0b01].as_slice(), &[0; 59]].concat());
        expected.extend([[2].as_slice(), &[0; 63]].concat());
        expected.extend([66, 0, 0, 0, 44, 1]);
        assert_eq!(out, expected);
        let mut bytes = [0; 68];
        decode(&table, &out, &mut bytes).unwrap();
        let want: Vec<u8> = symbols.iter().map(|&symbol| if symbol == 300 { 0 } else { (symbol + 128) as u8 }).collect();
        assert_eq!(bytes[..], want);

        let mut refused = |at: usize, value: u8| {
            let mut broken = out.clone();
            broken[at] = value;
            decode(&table, &broken, &mut bytes).unwrap_err()
        };
        let raw = 18 + 63;
        assert_eq!(refused(raw + 4, 0b11), DecodeError::PaddingNotZero, "raw bits of a partner beyond the last symbol");
        assert_eq!(refused(raw + 5, 0b100), DecodeError::PaddingNotZero, "a step that is not there");
        assert_eq!(refused(raw + 3, 0b01), DecodeError::ListedNibble { position: 3 });
    }

    #[test]
    fn where_no_pair_is_frequent_nibbles_stay_plain() {
        let symbols: Vec<i16> = (0..4096).map(|i| (i * 7 + i / 16) % 16 - 8).collect();
        let table = Table::build(&histogram(&symbols)).unwrap();
        assert_eq!(table, Table { window: Window::new(120, 0).unwrap(), tiers: vec![] });
        let mut out = Vec::new();
        encode(&table, &symbols[..65], &mut out).unwrap();
        assert_eq!(out[..12], [0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0, 0]);
        assert_eq!((out[12], out.len()), ((symbols[0] + 8 + 16 * (symbols[64] + 8)) as u8, 12 + 64));
        let mut bytes = [0; 65];
        decode(&table, &out, &mut bytes).unwrap();
        assert!(bytes.iter().zip(&symbols).all(|(&byte, &symbol)| i16::from(byte) == symbol + 128));
        out[8] = 63;
        out.pop();
        assert_eq!(decode(&table, &out, &mut bytes), Err(DecodeError::TierCount { tier: 0, escapes: 64, pairs: 63 }));
    }

    /// `round(gauss * sigma)`, by Box and Muller.
    fn gaussian(sigma: f64) -> Vec<i16> {
        let mut state = 88_172_645_463_325_252u64;
        let mut uniform = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
        };
        let mut gauss = || (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
        (0..1 << 16).map(|_| (gauss() * sigma).round() as i16).collect()
    }

    /// With them no Gaussian costs much more than its entropy.
    #[test]
    fn raw_bits_follow_the_spread() {
        let built = [0.9, 1.1, 1.9, 2.8, 6.5].map(|sigma| {
            let histogram = histogram(&gaussian(sigma));
            let table = Table::build(&histogram).unwrap();
            let excess = table.payload_bits(&histogram) / 65536.0 - histogram.entropy_bits();
            assert!(excess < 0.26, "sigma {sigma}: {excess} bits more than the entropy");
            table.window.raw_bits()
        });
        assert_eq!(built, [0, 0, 0, 1, 2]);
    }

    #[test]
    fn every_width_packs_and_unpacks() {
        for bits in BITS {
            let tier = Tier::new(bits, &Vec::from_iter(1..1 << bits));
            for tiles in 0..20 {
                let fields: Vec<u8> = (0..tiles * 64).map(|i| (i * 37 % (1 << bits)) as u8).collect();
                let packed = pack(bits, &fields);
                assert_eq!(packed.len(), tier.field_bytes(fields.len()), "{bits} bits, {tiles} tiles");
                let mut back = vec![0; fields.len()];
                unpack(bits, &packed, &mut back).unwrap();
                assert_eq!(back, fields);
            }
        }
        let bits_of_lines = |bits: u8| (0..TILES).flat_map(|tile| places(bits, tile)).map(|place| usize::from(place.width)).sum::<usize>();
        assert!({ BITS }.all(|bits| bits_of_lines(bits) == TILES * usize::from(bits)));
        // Eight tiles with the fields 0 to 7 in lane 0.
        let fields: Vec<u8> = (0..512).map(|i| if i % 64 == 0 { (i / 64) as u8 } else { 0 }).collect();
        let first = |bits| pack(bits, &fields).into_iter().step_by(64).collect::<Vec<u8>>();
        assert_eq!(first(3), [0x88, 0xda, 0xec]);
        assert_eq!(first(4), [0x10, 0x32, 0x54, 0x76]);
        assert_eq!(first(5), [5 << 5, 1, 6 << 5 | 2, 3, 7 << 5 | 4]);
        assert_eq!(first(6), [3 << 6, 1, 2, 3 << 6 | 4, 1 << 6 | 5, 6]);
    }

    #[test]
    fn read_refuses_impossible_tables() {
        let good = [120, 2, 3, 3, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 255];
        assert_eq!(Table::read(&good).unwrap().tiers.len(), 2);
        let refused = |bytes: &[u8]| Table::read(bytes).unwrap_err();
        assert_eq!(refused(&[1]), TableError::Truncated { needed_bytes: 2, available_bytes: 1 });
        assert_eq!(refused(&good[..17]), TableError::Truncated { needed_bytes: 18, available_bytes: 17 });
        assert_eq!(refused(&[&good[..], &[0]].concat()), TableError::TrailingBytes { extra_bytes: 1 });
        assert_eq!(refused(&[0, 1]), TableError::PairWindow { base: 0, base_max: 240 });
        assert_eq!(refused(&[241, 1]), TableError::PairWindow { base: 241, base_max: 240 });
        assert_eq!(refused(&[225, 0x11]), TableError::PairWindow { base: 225, base_max: 224 });
        assert_eq!(refused(&[120, 0x31]), TableError::RawBits { raw_bits: 3, raw_bits_max: 2 });
        assert_eq!(Table::read(&[192, 0x20]).unwrap().window, Window::new(192, 2).unwrap());
        assert_eq!(refused(&[120, 4, 3, 3, 3, 3]), TableError::Tiers { tiers: 4, tiers_max: 3 });
        assert_eq!(Table::read(&[120, 0]).unwrap().tiers.len(), 0);
        assert_eq!(refused(&[120, 1, 7]), TableError::TierBits { tier: 0, bits: 7 });
        let with = |at: usize, value: u8| {
            let mut bytes = good;
            bytes[at] = value;
            refused(&bytes)
        };
        assert_eq!(with(4, 0), TableError::TierPair { tier: 0, field: 1, pair_byte: 0 });
        assert_eq!(with(5, 1), TableError::TierPair { tier: 0, field: 2, pair_byte: 1 });
        assert_eq!(with(11, 7), TableError::TierPair { tier: 1, field: 1, pair_byte: 7 });
    }
}
