//! `huffman`: length-limited canonical Huffman codes; the coder that needs no multiplication.
//!
//! # Method
//! Code lengths are the best possible under the limit `code_bits_max`, found by package-merge
//! (Larmore and Hirschberg 1990): think of the code length of a symbol as coins of values 1/2, 1/4,
//! ..., each at the price of the symbol's count; the cheapest coins that sum to `symbols - 1` are
//! found by pairing the cheapest of each value into the next. The core alphabet is the one with the
//! fewest bits in total, all others escaping at 8 bits more. Codes are canonical: ordered by
//! length, then symbol byte.
//!
//! # Bytes of the table (little-endian)
//! ```text
//! u16 count | count x ( u8 symbol byte | u8 code bits )      symbol bytes strictly ascending
//! ```
//! The codes are complete: the sum of `2^-bits` is exactly 1. A lone entry has 0 bits, which
//! satisfies just that.
//!
//! # Bytes of a chunk (little-endian)
//! The codes of a chunk lie in lanes or in planes.
//! ```text
//! lanes:   u32 escape_bytes | u32 far_count | lanes x u32 lane_bytes | lane streams | escapes | far entries (6 bytes each)
//! planes:  u32 escape_bytes | u32 far_count | planes | escapes | far entries
//! ```
//! **Planes** (`lanes` is 0 in [`Params`], the default) are the bits of each inner node of the code tree in turn: see
//! [`crate::planes`]. They cost up to 7 bits a node, and decode 64 symbols at a time.
//!
//! **Lanes**: symbol `i` is in lane `i % lanes`. A lane's bits fill its bytes from the lowest bit upward, and
//! so do the bits of a code, first bit first (the code is stored bit-reversed): the next
//! `code_bits_max` bits of a little-endian load are the index of the lookup table. The last byte of
//! a lane is filled up with zeros.
//!
//! # Why this suits SIMD and GPUs
//! Planes are for SIMD. A lane is one chain of dependent lookups, some 10 cycles a symbol; four lanes keep a scalar core
//! busy. On a GPU a lane is a thread and the lookup table, 2^12 x 2 bytes, lies in shared memory;
//! limited to 8 bits it takes 512 bytes. The code length is in the low byte of an entry so that a
//! shift by the entry needs no mask where shifts are taken modulo the width.
//!
//! # Proof of validity
//! Decoders run optimistically, past the end of a lane if the bytes say so. A chunk is valid if and
//! only if each lane's symbols end in the lane's last byte, the rest of that byte is zero, and
//! escapes and far list are used up. Planes are proved before they are decoded: their ones say how long the next ones are.
//!
//! # Cost
//! Whole bits for every symbol. Above the entropy of 1.51, 2.25, 3.06 and 3.79 bits (Gaussian):
//! 0.164, 0.075, 0.059 and 0.037 bit; limited to codes of 8 bits 0.164, 0.075, 0.068 and 0.050. The
//! scalar coder in this crate, one Zen 5 core, shared: encode 0.55 to 0.7, decode 1.1 G symbols/s
//! at every entropy (example `rates`).

use crate::ESCAPE;
use crate::error::{DecodeError, EncodeError, ParamsError, TableError};
use crate::escape::{Classified, ESCAPED_BITS, Parts, resolve};
use crate::frequencies::{payload_bits, read_entries};
use crate::histogram::Population;
use crate::planes::{self, Node};
use crate::{FarList, Histogram};

/// Most lanes that a chunk may have.
const LANES_MAX: usize = 64;

/// Parameters of `huffman`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Params {
    /// Longest code, 1..=12 bits.
    pub code_bits_max: u8,
    /// Interleaved bit streams, 1..=64; 0 for planes.
    pub lanes: u8,
}

impl Params {
    /// Codes of up to 12 bits, which cost next to nothing against unlimited ones, in planes.
    pub const DEFAULT: Self = Self { code_bits_max: 12, lanes: 0 };

    /// Whether the codes lie in planes, not in lanes.
    pub fn has_planes(&self) -> bool {
        self.lanes == 0
    }

    /// Refuses what the layout cannot hold.
    pub fn validate(&self) -> Result<(), ParamsError> {
        let Self { code_bits_max, lanes } = *self;
        if !(1..=12).contains(&code_bits_max) {
            let value = code_bits_max.into();
            return Err(ParamsError::OutOfRange { parameter: "code_bits_max", value, allowed: "1..=12" });
        }
        if usize::from(lanes) > LANES_MAX {
            return Err(ParamsError::OutOfRange { parameter: "lanes", value: lanes.into(), allowed: "1..=64, or 0 for planes" });
        }
        Ok(())
    }

    fn leaves(&self) -> usize {
        1 << self.code_bits_max
    }
}

/// Bits of a table entry in the file.
const ENTRY_BITS: f64 = 16.0;

/// Static codes of one tensor.
#[derive(Clone, Debug)]
pub struct Table {
    params: Params,
    /// (symbol byte, code bits), ascending
    entries: Vec<(u8, u8)>,
    /// (2^code_bits_max,) by the next bits: symbol byte << 8 | code bits
    lookup: Vec<u16>,
    /// by symbol byte: bit-reversed code << 8 | code bits
    codes: Box<[u32; 256]>,
    /// by symbol byte
    coded: Box<[bool; 256]>,
    /// inner nodes, breadth first
    nodes: Vec<Node>,
}

impl Table {
    /// `entries`: ascending and complete.
    fn new(params: Params, entries: Vec<(u8, u8)>) -> Self {
        let mut by_length = entries.clone();
        by_length.sort_unstable_by_key(|&(byte, bits)| (bits, byte));
        let nodes = planes::tree(&by_length.iter().map(|&(byte, bits)| (bits, byte)).collect::<Vec<_>>());
        let mut lookup = vec![0; params.leaves()];
        let (mut codes, mut coded) = (Box::new([0; 256]), Box::new([false; 256]));
        // Codes as numbers of `code_bits_max` bits, first bit highest: canonical order is numeric
        // order.
        let mut next_leaf = 0u32;
        for (byte, bits) in by_length {
            let reversed = if bits == 0 { 0 } else { next_leaf.reverse_bits() >> (32 - params.code_bits_max) };
            codes[usize::from(byte)] = reversed << 8 | u32::from(bits);
            coded[usize::from(byte)] = true;
            for index in (reversed as usize..params.leaves()).step_by(1 << bits) {
                lookup[index] = u16::from_be_bytes([byte, bits]);
            }
            next_leaf += 1 << (params.code_bits_max - bits);
        }
        Self { params, entries, lookup, codes, coded, nodes }
    }

    pub(crate) fn build(params: Params, histogram: &Histogram) -> Result<Self, TableError> {
        params.validate()?;
        let Population { core, core_total, far_total } = Population::new(histogram);
        let mut escaped = core_total + far_total;
        if escaped == 0 {
            return Err(TableError::EmptyHistogram);
        }
        let mut best: Option<(f64, Vec<(u8, u8)>)> = None;
        let mut counts: Vec<(u64, u8)> = Vec::new();
        for rank in 0..=core.len() {
            if rank > 0 {
                let (byte, count) = core[rank - 1];
                counts.push((count, byte));
                escaped -= count;
            }
            let mut alphabet = counts.clone();
            if escaped > 0 {
                alphabet.push((escaped, ESCAPE));
            }
            if alphabet.len() > params.leaves() {
                break;
            }
            alphabet.sort_unstable();
            let lengths = package_merge(&alphabet, params.code_bits_max);
            let code_bits = alphabet.iter().zip(&lengths).map(|(&(count, _), &bits)| count as f64 * f64::from(bits));
            let bits = code_bits.sum::<f64>() + escaped as f64 * ESCAPED_BITS + alphabet.len() as f64 * ENTRY_BITS;
            if best.as_ref().is_none_or(|(least_bits, _)| bits < *least_bits) {
                best = Some((bits, alphabet.iter().zip(lengths).map(|(&(_, byte), bits)| (byte, bits)).collect()));
            }
        }
        // The first alphabet, ESCAPE alone, never fails.
        let (_, mut entries) = best.ok_or(TableError::EmptyHistogram)?;
        entries.sort_unstable();
        Ok(Self::new(params, entries))
    }

    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        out.extend((self.entries.len() as u16).to_le_bytes());
        out.extend(self.entries.iter().flat_map(|&(byte, bits)| [byte, bits]));
    }

    pub(crate) fn read(params: Params, bytes: &[u8]) -> Result<Self, TableError> {
        params.validate()?;
        let (_, entries) = read_entries::<0, 2>(bytes)?;
        let entries: Vec<(u8, u8)> = entries.iter().map(|&[byte, bits]| (byte, bits)).collect();
        let code_bits_max = params.code_bits_max;
        let (mut sum, lone) = (0, entries.len() == 1);
        for (entry, &(_, code_bits)) in entries.iter().enumerate() {
            if code_bits > code_bits_max || (code_bits == 0) != lone {
                return Err(TableError::CodeBits { entry, code_bits, code_bits_max });
            }
            sum += 1u32 << (code_bits_max - code_bits);
        }
        let expected = 1 << code_bits_max;
        if sum != expected {
            return Err(TableError::KraftSum { sum, expected });
        }
        Ok(Self::new(params, entries))
    }

    pub(crate) fn payload_bits(&self, histogram: &Histogram) -> f64 {
        let mut bits_of = [f64::INFINITY; 256];
        for &(byte, bits) in &self.entries {
            bits_of[usize::from(byte)] = bits.into();
        }
        payload_bits(histogram, &bits_of)
    }

    /// Parameters of the codec.
    pub fn params(&self) -> Params {
        self.params
    }

    /// `2^code_bits_max` entries by the next bits of a lane: `symbol byte << 8 | code bits`.
    pub fn lookup(&self) -> &[u16] {
        &self.lookup
    }

    /// (symbol byte, code bits), ascending by symbol byte.
    pub fn entries(&self) -> &[(u8, u8)] {
        &self.entries
    }

    /// The inner nodes of the code tree, breadth first, from left to right; none if there is one entry only.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Whether ESCAPE has an entry: if not, decoders may skip the handling of escapes.
    pub fn has_escape(&self) -> bool {
        self.coded[usize::from(ESCAPE)]
    }
}

/// Best code lengths of at most `bits_max` for `alphabet`, which ascends by count and has
/// 1..=`2^bits_max` entries.
fn package_merge(alphabet: &[(u64, u8)], bits_max: u8) -> Vec<u8> {
    let mut lengths = vec![0; alphabet.len()];
    // One list of coins for every value, 2^-bits_max first: (price, whether it is a symbol's own
    // coin and no package).
    let mut levels: Vec<Vec<bool>> = Vec::new();
    let mut packages: Vec<u64> = Vec::new();
    for _ in 0..bits_max {
        let mut list = Vec::with_capacity(alphabet.len() + packages.len());
        let (mut leaves, mut pairs) = (alphabet.iter().map(|entry| entry.0).peekable(), packages.iter().peekable());
        loop {
            match (leaves.peek(), pairs.peek()) {
                (Some(&leaf), pair) if pair.is_none_or(|&&price| leaf <= price) => {
                    list.push((leaf, true));
                    leaves.next();
                }
                (_, Some(&&price)) => {
                    list.push((price, false));
                    pairs.next();
                }
                _ => break,
            }
        }
        packages = list.chunks_exact(2).map(|pair| pair[0].0 + pair[1].0).collect();
        levels.push(list.into_iter().map(|(_, own)| own).collect());
    }
    // Coins of value 1/2 that sum to `symbols - 1`; each package taken stands for two coins of the
    // level below. A symbol's code is as long as the number of its coins taken, and those of rarer
    // symbols come first in every list.
    let mut take = 2 * (alphabet.len() - 1);
    for level in levels.iter().rev() {
        let own = level[..take].iter().filter(|&&own| own).count();
        for length in &mut lengths[..own] {
            *length += 1;
        }
        take = 2 * (take - own);
    }
    lengths
}

/// The parts of a chunk.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// (lanes,) u32 length of every lane's stream, bytes; they sum to the length of `streams`.
    pub lane_bytes: &'a [u8],
    /// The lanes' streams, one after the other; or the planes, see [`planes::find`].
    pub streams: &'a [u8],
    /// Escape bytes in symbol order.
    pub escapes: &'a [u8],
    /// Far symbols.
    pub far: FarList<'a>,
}

impl<'a> Chunk<'a> {
    /// Splits a chunk of `symbols` symbols into its parts. Lengths and the far list are checked,
    /// the rest only decoding can prove.
    pub fn parse(params: Params, symbols: usize, chunk: &'a [u8]) -> Result<Self, DecodeError> {
        let index_bytes = usize::from(params.lanes) * 4;
        let Parts { body, escapes, far } = Parts::parse(chunk, symbols, index_bytes)?;
        let (lane_bytes, streams) = body.split_at(index_bytes);
        let view = Self { lane_bytes, streams, escapes, far };
        if params.has_planes() {
            return Ok(view);
        }
        let needed: u64 = view.lengths().map(u64::from).sum();
        let available = streams.len() as u64;
        if needed > available {
            let available_bytes = chunk.len() as u64;
            return Err(DecodeError::Truncated { needed_bytes: available_bytes + (needed - available), available_bytes });
        }
        if needed < available {
            return Err(DecodeError::TrailingBytes { extra_bytes: available - needed });
        }
        Ok(view)
    }

    /// (lanes,) bytes of every lane's stream.
    pub fn lengths(&self) -> impl ExactSizeIterator<Item = u32> + use<'a> {
        let (lengths, _) = self.lane_bytes.as_chunks::<4>();
        lengths.iter().map(|&length| u32::from_le_bytes(length))
    }
}

pub(crate) fn encode(table: &Table, symbols: &[i16], out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let classified = Classified::new(symbols, &table.coded)?;
    classified.write_header(out);
    if table.params.has_planes() {
        planes::encode(&table.nodes, |byte| table.codes[usize::from(byte)] >> 8, &classified.codes, out);
    } else {
        encode_lanes(table, &classified.codes, out);
    }
    classified.write_tail(out);
    Ok(())
}

fn encode_lanes(table: &Table, codes: &[u8], out: &mut Vec<u8>) {
    let lanes = usize::from(table.params.lanes);
    let index = out.len();
    out.resize(index + 4 * lanes, 0);
    for lane in 0..lanes {
        let start = out.len();
        let codes = codes.get(lane..).unwrap_or(&[]);
        let (mut pending, mut pending_bits) = (0u64, 0);
        for &code in codes.iter().step_by(lanes) {
            let code = table.codes[usize::from(code)];
            pending |= u64::from(code >> 8) << pending_bits;
            pending_bits += code & 0xff;
            if pending_bits >= 32 {
                out.extend((pending as u32).to_le_bytes());
                pending >>= 32;
                pending_bits -= 32;
            }
        }
        out.extend(&pending.to_le_bytes()[..pending_bits.div_ceil(8) as usize]);
        // Fits: at most CHUNK_SYMBOLS_MAX codes of 12 bits.
        let lane_bytes = (out.len() - start) as u32;
        out[index + 4 * lane..][..4].copy_from_slice(&lane_bytes.to_le_bytes());
    }
}

/// Decodes to symbol bytes, far = 0.
pub(crate) fn decode<'a>(table: &Table, bytes: &'a [u8], out: &mut [u8]) -> Result<FarList<'a>, DecodeError> {
    let chunk = Chunk::parse(table.params, out.len(), bytes)?;
    if table.params.has_planes() {
        planes::decode(&table.nodes, table.entries[0].0, chunk.streams, out)?;
    } else {
        decode_lanes(table, &chunk, out)?;
    }
    resolve(out, chunk.escapes, chunk.far)?;
    Ok(chunk.far)
}

/// Symbols of one lane that a 64-bit load always covers: `4 * 12 + 7 <= 64`.
const SYMBOLS_A_LOAD: usize = 4;

fn decode_lanes(table: &Table, chunk: &Chunk<'_>, out: &mut [u8]) -> Result<(), DecodeError> {
    let lanes = usize::from(table.params.lanes);
    let lookup = table.lookup.as_slice();
    let mut starts_bits = [0u64; LANES_MAX];
    let mut end_bits = 0;
    for (start, length) in starts_bits.iter_mut().zip(chunk.lengths()) {
        *start = end_bits;
        end_bits += 8 * u64::from(length);
    }
    let mut positions_bits = starts_bits;
    let positions = &mut positions_bits[..lanes];

    let mut rounds = out.chunks_exact_mut(SYMBOLS_A_LOAD * lanes);
    for round in &mut rounds {
        for (lane, position) in positions.iter_mut().enumerate() {
            let mut bits = peek(chunk.streams, *position);
            for symbol in 0..SYMBOLS_A_LOAD {
                let entry = lookup[bits as usize & (lookup.len() - 1)];
                round[symbol * lanes + lane] = (entry >> 8) as u8;
                bits >>= entry & 0xff;
                *position += u64::from(entry & 0xff);
            }
        }
    }
    for step in rounds.into_remainder().chunks_mut(lanes) {
        for (code, position) in step.iter_mut().zip(positions.iter_mut()) {
            let entry = lookup[peek(chunk.streams, *position) as usize & (lookup.len() - 1)];
            *code = (entry >> 8) as u8;
            *position += u64::from(entry & 0xff);
        }
    }

    for (lane, length) in chunk.lengths().enumerate() {
        let used_bits = positions[lane] - starts_bits[lane];
        let available_bits = 8 * u64::from(length);
        if used_bits.next_multiple_of(8) != available_bits {
            return Err(DecodeError::LaneBits { lane, used_bits, available_bits });
        }
        let unused = available_bits - used_bits;
        if unused > 0 && peek(chunk.streams, positions[lane]) & ((1 << unused) - 1) != 0 {
            return Err(DecodeError::PaddingNotZero);
        }
    }
    Ok(())
}

/// At least 57 bits of `bytes` from bit `position` on; zeros beyond the end.
#[inline(always)]
fn peek(bytes: &[u8], position: u64) -> u64 {
    let start = (position / 8) as usize;
    let word = match bytes.get(start..).and_then(|rest| rest.first_chunk::<8>()) {
        Some(word) => u64::from_le_bytes(*word),
        None => peek_end(bytes, start),
    };
    word >> (position % 8)
}

#[cold]
fn peek_end(bytes: &[u8], start: usize) -> u64 {
    let rest = bytes.get(start..).unwrap_or(&[]);
    rest.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(counts: &[u64], bits_max: u8) -> Vec<u8> {
        let alphabet: Vec<(u64, u8)> = counts.iter().copied().zip(0..=255).collect();
        package_merge(&alphabet, bits_max)
    }

    #[test]
    fn package_merge_by_hand() {
        assert_eq!(lengths(&[5], 12), [0]);
        assert_eq!(lengths(&[1, 1_000_000], 12), [1, 1]);
        assert_eq!(lengths(&[1, 1, 2, 4, 8], 12), [4, 4, 3, 2, 1]);
        assert_eq!(lengths(&[1, 1, 2, 4, 8], 3), [3, 3, 3, 3, 1]);
        assert_eq!(lengths(&[1, 1, 2, 4, 8, 16, 32, 64], 3), [3; 8]);
        assert_eq!(lengths(&[1; 256], 8), [8; 256]);
    }

    /// All complete codes of up to five symbols against package-merge.
    #[test]
    fn no_complete_code_is_shorter() {
        fn complete(symbols: usize, bits_max: u8, chosen: &mut Vec<u8>, each: &mut impl FnMut(&[u8])) {
            if chosen.len() == symbols {
                if chosen.iter().map(|&bits| 1 << (bits_max - bits)).sum::<u32>() == 1 << bits_max {
                    each(chosen);
                }
                return;
            }
            for bits in 1..=bits_max {
                chosen.push(bits);
                complete(symbols, bits_max, chosen, each);
                chosen.pop();
            }
        }
        for counts in [vec![1u64, 1, 1], vec![1, 2, 3, 4], vec![1, 1, 1, 1, 100], vec![1, 2, 4, 8, 16], vec![3, 3, 4, 5, 9]] {
            for bits_max in 3..=4 {
                let cost = |bits: &[u8]| -> u64 { counts.iter().zip(bits).map(|(&n, &b)| n * u64::from(b)).sum() };
                let found = cost(&lengths(&counts, bits_max));
                let mut least = u64::MAX;
                complete(counts.len(), bits_max, &mut Vec::new(), &mut |bits| least = least.min(cost(bits)));
                assert_eq!(found, least, "{counts:?} within {bits_max} bits");
            }
        }
    }

    #[test]
    fn a_chunk_by_hand() {
        // Codes: 128 is 0; of equal lengths the lower byte comes first: ESCAPE is 10, 129 is 11.
        let params = Params { code_bits_max: 3, lanes: 2 };
        let table = Table::read(params, &[3, 0, 0, 2, 128, 1, 129, 2]).unwrap();
        assert_eq!(table.lookup()[..4], [0x8001, 0x0002, 0x8001, 0x8102]);
        let mut out = Vec::new();
        encode(&table, &[0, 1, 1, -3, 0], &mut out).unwrap();
        // lane 0: 0, 11, 0 -> bits 0 1 1 0; lane 1: 11, then 10 (escape) -> bits 1 1 1 0
        assert_eq!(out, [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0b0110, 0b0111, 125]);
        let mut bytes = [0; 5];
        decode(&table, &out, &mut bytes).unwrap();
        assert_eq!(bytes, [128, 129, 129, 125, 128]);
        for bit in 4..8 {
            let mut broken = out.clone();
            broken[16] |= 1 << bit;
            assert_eq!(decode(&table, &broken, &mut bytes).unwrap_err(), DecodeError::PaddingNotZero);
        }
        let longer = decode(&table, &out, &mut [0; 16]).unwrap_err();
        assert!(matches!(longer, DecodeError::LaneBits { lane: 0, available_bits: 8, .. }), "{longer:?}");
    }

    #[test]
    fn a_lone_symbol_takes_no_bits() {
        let mut histogram = Histogram::new();
        histogram.add(&[7; 100]);
        for (lanes, chunk_bytes) in [(4, 24), (0, 8)] {
            let table = Table::build(Params { lanes, ..Params::DEFAULT }, &histogram).unwrap();
            assert_eq!(table.entries(), [(135, 0)]);
            let mut out = Vec::new();
            encode(&table, &[7; 100], &mut out).unwrap();
            assert_eq!(out, vec![0; chunk_bytes]);
            let mut bytes = [0; 100];
            decode(&table, &out, &mut bytes).unwrap();
            assert_eq!(bytes, [135; 100]);
        }
    }

    #[test]
    fn read_refuses_incomplete_codes() {
        let params = Params { code_bits_max: 3, lanes: 1 };
        let refused = |bytes: &[u8]| Table::read(params, bytes).unwrap_err();
        assert_eq!(refused(&[2, 0, 1, 1, 2, 2]), TableError::KraftSum { sum: 6, expected: 8 });
        assert_eq!(refused(&[3, 0, 1, 1, 2, 1, 3, 3]), TableError::KraftSum { sum: 9, expected: 8 });
        let code_bits = |entry, code_bits| TableError::CodeBits { entry, code_bits, code_bits_max: 3 };
        assert_eq!(refused(&[1, 0, 1, 1]), code_bits(0, 1));
        assert_eq!(refused(&[2, 0, 1, 0, 2, 1]), code_bits(0, 0));
        assert_eq!(refused(&[2, 0, 1, 1, 2, 4]), code_bits(1, 4));
    }
}
