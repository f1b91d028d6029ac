//! Pairs of symbols, what `tiered` and `rans-pairs` code: the window, pair bytes, raw bits, and the
//! list of the symbols outside the window.
//!
//! A pair is the symbols at the same lane of two consecutive tiles of 64: `2p` and `2p + 1`; a pair whose
//! second tile is beyond the chunk has 0 for it. A *window* is `16 << raw_bits` consecutive symbols. The
//! low `raw_bits` bits of a symbol's place in it are stored as they are, the *raw bits*; the rest is a
//! nibble. A *pair byte* has the nibble of the first tile's symbol in its low half.
//!
//! # Listed symbols
//! A symbol outside the window is coded as place `8 << raw_bits`, nibble 8, and *listed*:
//! ```text
//! listed x u16 gap | listed x u8 symbol byte
//! ```
//! It lies `gap` symbols behind the one that follows the last listed one; its symbol byte, 0 for a far
//! one, replaces what the pair says.
//!
//! # Raw lines
//! Lines of 64 bytes, byte `j` belongs to lane `j`. A line serves `4 / raw_bits` steps of 64 pairs: of
//! step `t` of them it has, from bit `2 * raw_bits * t` on, the raw bits of the first symbol, then those
//! of the second. Bits without a symbol are 0.

use crate::error::{DecodeError, EncodeError, TableError};
use crate::escape::{check_encodable, write_far};
use crate::histogram::{Population, symbol_byte};
use crate::{ESCAPE, FAR_BYTES, Far, FarList};

/// Symbols of a tile, pairs of a step.
pub(crate) const TILE: usize = 64;
/// Symbols of a window without raw bits.
const NIBBLES: u8 = 16;
/// Most raw bits of a symbol.
pub const RAW_BITS_MAX: u8 = 2;
/// The nibble of a symbol that is listed.
pub const LISTED_NIBBLE: u8 = NIBBLES / 2;
/// Bytes of a listed symbol: its gap and its symbol byte.
pub const LISTED_BYTES: usize = 3;
/// Largest gap between listed symbols.
const GAP_MAX: usize = u16::MAX as usize;

/// Pairs of a chunk of `symbols` symbols.
pub fn pairs_of(symbols: usize) -> usize {
    symbols / (2 * TILE) * TILE + (symbols % (2 * TILE)).min(TILE)
}

/// Index in the chunk of the first symbol of pair `pair`.
pub(crate) fn first_symbol(pair: usize) -> usize {
    pair / TILE * 2 * TILE + pair % TILE
}

/// Consecutive symbols that have a nibble.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Window {
    /// Symbol byte of place 0, not [`ESCAPE`].
    base: u8,
    raw_bits: u8,
}

impl Window {
    /// The window from symbol byte `base` on, if it lies in the core alphabet; `raw_bits` is at most
    /// [`RAW_BITS_MAX`].
    pub(crate) fn new(base: u8, raw_bits: u8) -> Result<Self, TableError> {
        let base_max = Self::base_max(raw_bits);
        if (1..=base_max).contains(&base) { Ok(Self { base, raw_bits }) } else { Err(TableError::PairWindow { base, base_max }) }
    }

    /// All windows, those nearest to the middle of the alphabet first.
    pub(crate) fn all(raw_bits: u8) -> Vec<Self> {
        let usual = 128 - (LISTED_NIBBLE << raw_bits);
        let mut bases: Vec<u8> = (1..=Self::base_max(raw_bits)).collect();
        bases.sort_by_key(|&base| (base.abs_diff(usual), base));
        bases.into_iter().map(|base| Self { base, raw_bits }).collect()
    }

    /// The last window ends with symbol byte 255.
    fn base_max(raw_bits: u8) -> u8 {
        255 - ((NIBBLES << raw_bits) - 1)
    }

    /// Symbol byte of the first symbol.
    pub fn base(self) -> u8 {
        self.base
    }

    /// Bits of a symbol that are not coded, at most [`RAW_BITS_MAX`].
    pub fn raw_bits(self) -> u8 {
        self.raw_bits
    }

    /// The symbol byte that stands in for a listed symbol.
    pub fn listed_byte(self) -> u8 {
        self.base + (LISTED_NIBBLE << self.raw_bits)
    }

    /// Place of the last symbol.
    fn last_place(self) -> u8 {
        (NIBBLES << self.raw_bits) - 1
    }

    /// The nibble of a symbol byte in the window.
    fn nibble(self, byte: u8) -> Option<u8> {
        let place = byte.wrapping_sub(self.base);
        (place <= self.last_place()).then_some(place >> self.raw_bits)
    }

    /// Steps that one raw line serves.
    fn steps_per_line(self) -> usize {
        4 / usize::from(self.raw_bits)
    }

    /// Bytes of the raw lines of `pairs` pairs.
    pub fn raw_line_bytes(self, pairs: usize) -> usize {
        match self.raw_bits {
            0 => 0,
            _ => pairs.div_ceil(TILE).div_ceil(self.steps_per_line()) * TILE,
        }
    }

    /// Pair bytes of symbol bytes in the window.
    pub(crate) fn pair_bytes(self, codes: &[u8]) -> Vec<u8> {
        let nibble = |code: u8| (code - self.base) >> self.raw_bits;
        let mut pairs = vec![0; pairs_of(codes.len())];
        for (pairs, codes) in pairs.chunks_mut(TILE).zip(codes.chunks(2 * TILE)) {
            let (first, second) = codes.split_at(pairs.len());
            for (pair, &code) in pairs.iter_mut().zip(first) {
                *pair = nibble(code);
            }
            for (pair, &code) in pairs.iter_mut().zip(second) {
                *pair |= nibble(code) << 4;
            }
        }
        pairs
    }

    /// Raw lines of symbol bytes in the window.
    pub(crate) fn raw_lines(self, codes: &[u8]) -> Vec<u8> {
        let mut lines = vec![0; self.raw_line_bytes(pairs_of(codes.len()))];
        if self.raw_bits == 0 {
            return lines;
        }
        let mask = (1 << self.raw_bits) - 1;
        let raw = |code: u8| (code - self.base) & mask;
        for (step, codes) in codes.chunks(2 * TILE).enumerate() {
            let (start, shift) = self.raw_place(step);
            let line = &mut lines[start..][..TILE];
            let (first, second) = codes.split_at(codes.len().min(TILE));
            for (byte, &code) in line.iter_mut().zip(first) {
                *byte |= raw(code) << shift;
            }
            for (byte, &code) in line.iter_mut().zip(second) {
                *byte |= raw(code) << (shift + self.raw_bits);
            }
        }
        lines
    }

    /// Where the raw bits of a step begin: byte of the first lane, and bit. Only with raw bits.
    fn raw_place(self, step: usize) -> (usize, u8) {
        let per_line = self.steps_per_line();
        (step / per_line * TILE, 2 * self.raw_bits * (step % per_line) as u8)
    }

    /// Symbol bytes of the pairs and their raw bits; proves that halves and raw bits without a symbol
    /// are 0. `lines`: `raw_line_bytes(pairs.len())` bytes.
    pub(crate) fn join(self, pairs: &[u8], lines: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
        let (bits, mask) = (self.raw_bits, (1 << self.raw_bits) - 1);
        let mut raw = [0; TILE];
        let mut unused = 0;
        for (step, (pairs, out)) in pairs.chunks(TILE).zip(out.chunks_mut(2 * TILE)).enumerate() {
            let (first, second) = out.split_at_mut(pairs.len());
            if bits > 0 {
                let (start, shift) = self.raw_place(step);
                for (raw, &byte) in raw.iter_mut().zip(&lines[start..]) {
                    *raw = byte >> shift & (mask << bits | mask);
                }
            }
            let alone = second.len();
            unused = pairs[alone..].iter().fold(unused, |unused, pair| unused | pair >> 4);
            unused = raw[alone..].iter().fold(unused, |unused, raw| unused | raw >> bits);
            unused = raw[pairs.len()..].iter().fold(unused, |unused, raw| unused | raw);
            for ((out, pair), raw) in first.iter_mut().zip(pairs).zip(raw) {
                *out = self.base + ((pair & 15) << bits | raw & mask);
            }
            for ((out, pair), raw) in second.iter_mut().zip(pairs).zip(raw) {
                *out = self.base + ((pair >> 4) << bits | raw >> bits);
            }
        }
        if bits > 0 {
            // Steps behind the last one.
            let (start, shift) = self.raw_place(pairs.len().div_ceil(TILE));
            let rest = lines.get(start..).unwrap_or_default();
            unused = rest.iter().fold(unused, |unused, byte| unused | byte >> shift);
        }
        if unused == 0 { Ok(()) } else { Err(DecodeError::PaddingNotZero) }
    }
}

/// How often the nibbles of a window occur, and the symbols outside.
pub(crate) struct Nibbles {
    /// Listed symbols count as [`LISTED_NIBBLE`].
    pub(crate) counts: [u64; NIBBLES as usize],
    pub(crate) listed: u64,
    far: u64,
}

impl Nibbles {
    pub(crate) fn new(population: &Population, window: Window) -> Self {
        let mut nibbles = Self { counts: [0; NIBBLES as usize], listed: population.far_total, far: population.far_total };
        for &(byte, count) in &population.core {
            match window.nibble(byte) {
                Some(nibble) => nibbles.counts[usize::from(nibble)] += count,
                None => nibbles.listed += count,
            }
        }
        nibbles.counts[usize::from(LISTED_NIBBLE)] += nibbles.listed;
        nibbles
    }

    /// By pair byte: how many of the pairs it is expected to be, were their symbols independent.
    pub(crate) fn pair_counts(&self) -> [f64; 256] {
        std::array::from_fn(|pair| self.pair_count(pair))
    }

    pub(crate) fn pair_count(&self, pair: usize) -> f64 {
        let [a, b] = [pair % 16, pair / 16].map(|nibble| self.counts[nibble] as f64);
        a * b / (2.0 * self.symbols().max(1) as f64)
    }

    pub(crate) fn symbols(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Bits of what lies beside the pairs: raw and listed symbols. `window`: that of the nibbles.
    pub(crate) fn beside_bits(&self, window: Window) -> f64 {
        let raw_bits = self.symbols() as f64 * f64::from(window.raw_bits);
        raw_bits + self.listed as f64 * 8.0 * LISTED_BYTES as f64 + self.far as f64 * 8.0 * FAR_BYTES as f64
    }
}

/// All pair bytes but ESCAPE, the most frequent ones first, with their counts.
pub(crate) fn ranked_pairs(counts: &[f64; 256]) -> Vec<(u8, f64)> {
    let mut ranked: Vec<(u8, f64)> = (1..=255).map(|pair| (pair, counts[usize::from(pair)])).collect();
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    ranked
}

/// Symbols split into what is coded as pairs and what is listed.
pub(crate) struct Placed {
    /// (symbols,) symbol bytes in the window; [`Window::listed_byte`] for listed symbols.
    pub(crate) codes: Vec<u8>,
    gaps: Vec<u16>,
    listed_bytes: Vec<u8>,
    far: Vec<Far>,
}

impl Placed {
    /// Lists the symbols outside the window. Where a gap would not fit, a symbol on the way is listed too.
    pub(crate) fn new(symbols: &[i16], window: Window) -> Result<Self, EncodeError> {
        check_encodable(symbols)?;
        let codes = symbols.iter().map(|&symbol| symbol_byte(symbol)).collect();
        let mut placed = Self { codes, gaps: Vec::new(), listed_bytes: Vec::new(), far: Vec::new() };
        let outside = |code: u8| code.wrapping_sub(window.base) > window.last_place();
        let mut next = 0;
        for (tile, codes) in placed.codes.chunks_mut(TILE).enumerate() {
            let (start, end) = (tile * TILE, tile * TILE + codes.len());
            // All of a tile at once, no branch for each.
            if !codes.iter().fold(false, |any, &code| any | outside(code)) && end - next <= GAP_MAX {
                continue;
            }
            for (position, code) in (start..).zip(codes) {
                let gap = position - next;
                if outside(*code) || gap == GAP_MAX {
                    placed.gaps.push(gap as u16);
                    placed.listed_bytes.push(*code);
                    if *code == ESCAPE {
                        placed.far.push(Far { position: position as u32, symbol: symbols[position] });
                    }
                    *code = window.listed_byte();
                    next = position + 1;
                }
            }
        }
        Ok(placed)
    }

    /// `u32 listed | u32 far_count`
    pub(crate) fn write_counts(&self, out: &mut Vec<u8>) {
        out.extend((self.listed_bytes.len() as u32).to_le_bytes());
        out.extend((self.far.len() as u32).to_le_bytes());
    }

    pub(crate) fn write_listed(&self, out: &mut Vec<u8>) {
        out.extend(self.gaps.iter().flat_map(|gap| gap.to_le_bytes()));
        out.extend(&self.listed_bytes);
    }

    pub(crate) fn write_far(&self, out: &mut Vec<u8>) {
        write_far(&self.far, out);
    }
}

/// The listed symbols of a chunk: a view of its bytes.
#[derive(Clone, Copy, Debug)]
pub struct Listed<'a> {
    /// u16 each.
    gaps: &'a [u8],
    bytes: &'a [u8],
}

impl<'a> Listed<'a> {
    /// `bytes`: [`LISTED_BYTES`] for each.
    pub(crate) fn parse(bytes: &'a [u8], symbols: usize) -> Result<Self, DecodeError> {
        let (gaps, bytes) = bytes.split_at(bytes.len() / LISTED_BYTES * 2);
        let listed = Self { gaps, bytes };
        match listed.iter().last() {
            Some((position, _)) if position >= symbols => Err(DecodeError::ListedOutside { position, symbols }),
            _ => Ok(listed),
        }
    }

    /// Symbol bytes, 0 for a far one.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Position in the chunk, ascending, and symbol byte.
    pub fn iter(&self) -> impl Iterator<Item = (usize, u8)> + use<'a> {
        let gaps = self.gaps.as_chunks().0.iter().map(|gap| usize::from(u16::from_le_bytes(*gap)));
        let positions = gaps.scan(0, |next, gap| {
            let position = *next + gap;
            *next = position + 1;
            Some(position)
        });
        positions.zip(self.bytes.iter().copied())
    }

    /// Puts the listed symbols in their places; proves that they were coded as such, and that the far
    /// list names those with symbol byte 0.
    pub(crate) fn put(&self, window: Window, far: FarList<'_>, out: &mut [u8]) -> Result<(), DecodeError> {
        let mut far = far.iter();
        for (position, byte) in self.iter() {
            if out[position] != window.listed_byte() {
                return Err(DecodeError::ListedNibble { position });
            }
            out[position] = byte;
            if byte == ESCAPE && far.next().is_none_or(|far| far.position as usize != position) {
                return Err(DecodeError::FarMismatch { position });
            }
        }
        match far.next() {
            Some(far) => Err(DecodeError::FarMismatch { position: far.position as usize }),
            None => Ok(()),
        }
    }
}

/// The window with `raw_bits` of the most symbols; of equals the one nearest to the middle of the alphabet.
pub(crate) fn fullest_window(population: &Population, raw_bits: u8) -> Window {
    // The first of equals.
    Window::all(raw_bits).into_iter().min_by_key(|&window| Nibbles::new(population, window).listed).expect("there are windows")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Histogram;

    #[test]
    fn windows_lie_in_the_core_alphabet() {
        for (raw_bits, base_max, usual) in [(0, 240, 120), (1, 224, 112), (2, 192, 96)] {
            assert_eq!(Window::new(0, raw_bits), Err(TableError::PairWindow { base: 0, base_max }));
            assert_eq!(Window::new(base_max + 1, raw_bits), Err(TableError::PairWindow { base: base_max + 1, base_max }));
            let all = Window::all(raw_bits);
            assert_eq!((all.len(), all[0].base, all[1].base), (usize::from(base_max), usual, usual - 1));
            let last = Window::new(base_max, raw_bits).unwrap();
            assert_eq!((last.nibble(255), last.nibble(base_max), last.nibble(base_max - 1)), (Some(15), Some(0), None));
            assert_eq!(all[0].listed_byte(), 128);
        }
    }

    /// Two raw bits: places 0 to 63 from symbol byte 96 on; a line serves two steps.
    #[test]
    fn raw_lines_by_hand() {
        let window = Window::new(96, 2).unwrap();
        let mut codes = vec![96; 128 + 65];
        (codes[0], codes[64], codes[128], codes[192]) =
            (96 + 4 * 0b1001 + 0b10, 96 + 4 * 0b0011 + 0b01, 96 + 4 * 0b1111 + 0b11, 96 + 4 * 0b0100 + 0b10);
        assert_eq!(window.pair_bytes(&codes)[..1], [0b0011_1001]);
        assert_eq!(window.pair_bytes(&codes)[64], 0b0100_1111);
        let (pairs, lines) = (window.pair_bytes(&codes), window.raw_lines(&codes));
        assert_eq!((pairs.len(), lines.len()), (128, 64));
        assert_eq!((lines[0], &lines[1..]), (0b1011_0110, &[0; 63][..]));
        let mut out = vec![0; codes.len()];
        window.join(&pairs, &lines, &mut out).unwrap();
        assert_eq!(out, codes);
        let mut refused = |pair: (usize, u8), line: (usize, u8)| {
            let (mut pairs, mut lines) = (pairs.clone(), lines.clone());
            pairs[pair.0] |= pair.1;
            lines[line.0] |= line.1;
            window.join(&pairs, &lines, &mut out) == Err(DecodeError::PaddingNotZero)
        };
        assert!(refused((65, 0x10), (0, 0)), "a nibble beyond the last symbol");
        assert!(refused((0, 0), (1, 0b0100_0000)), "raw bits beyond the last symbol");
        assert!(!refused((65, 0x01), (63, 0b0010_0000)));
        // One step alone leaves half of its line.
        window.join(&pairs[..64], &[0x0f; 64], &mut out[..128]).unwrap();
        assert_eq!(window.join(&pairs[..64], &[0x1f; 64], &mut out[..128]), Err(DecodeError::PaddingNotZero));
        assert_eq!(window.join(&pairs[..1], &[[1, 1].as_slice(), &[0; 62]].concat(), &mut out[..1]), Err(DecodeError::PaddingNotZero));
    }

    #[test]
    fn lines_of_every_tail() {
        for raw_bits in 0..=RAW_BITS_MAX {
            let window = Window::new(90, raw_bits).unwrap();
            for symbols in 1..1200 {
                let codes: Vec<u8> = (0..symbols).map(|i| 90 + (i * 37 % (16 << raw_bits)) as u8).collect();
                let (pairs, lines) = (window.pair_bytes(&codes), window.raw_lines(&codes));
                assert_eq!((pairs.len(), lines.len()), (pairs_of(symbols), window.raw_line_bytes(pairs.len())));
                let mut out = vec![0; symbols];
                window.join(&pairs, &lines, &mut out).unwrap();
                assert_eq!(out, codes, "{raw_bits} raw bits, {symbols} symbols");
            }
        }
        assert!([(0, 0), (1, 1), (64, 1), (65, 2), (128, 2), (256, 4)].into_iter().all(|(pairs, steps): (usize, usize)| {
            let lines = |raw_bits| Window { base: 90, raw_bits }.raw_line_bytes(pairs) / 64;
            [lines(0), lines(1), lines(2)] == [0, steps.div_ceil(4), steps.div_ceil(2)]
        }));
    }

    #[test]
    fn the_fullest_window_follows_the_symbols() {
        let base = |symbols: &[i16]| {
            let mut histogram = Histogram::new();
            histogram.add(symbols);
            let population = Population::new(&histogram);
            [0, 2].map(|raw_bits| fullest_window(&population, raw_bits).base)
        };
        assert_eq!(base(&[0, 0, 1]), [120, 96], "-8..=7 and -32..=31 if that will do");
        assert_eq!(base(&[0, 12]), [125, 96], "as near to it as possible");
        assert_eq!(base(&[-127; 3]), [1, 1]);
        assert_eq!(base(&[127, 200]), [240, 192]);
        assert_eq!(base(&[300]), [120, 96]);
    }

    #[test]
    fn placed_by_hand() {
        let window = Window::new(126, 0).unwrap();
        let symbols = [0, -2, -3, 13, 14, 300, i16::MIN, 1];
        let placed = Placed::new(&symbols, window).unwrap();
        assert_eq!(placed.codes, [128, 126, 134, 141, 134, 134, 134, 129]);
        assert_eq!((&placed.gaps[..], &placed.listed_bytes[..]), (&[2, 1, 0, 0][..], &[125, 142, 0, 0][..]));
        assert_eq!(placed.far, [(5, 300), (6, i16::MIN)].map(|(position, symbol)| Far { position, symbol }));
    }

    #[test]
    fn long_gaps_are_bridged() {
        let window = Window::new(120, 0).unwrap();
        let mut symbols = vec![0; 3 * 65536];
        *symbols.last_mut().unwrap() = 100;
        let placed = Placed::new(&symbols, window).unwrap();
        assert!(placed.codes.iter().all(|&code| code == 128));
        let mut bytes = Vec::new();
        placed.write_listed(&mut bytes);
        let listed = Listed::parse(&bytes, symbols.len()).unwrap();
        assert_eq!(listed.iter().collect::<Vec<_>>(), [(65535, 128), (131_071, 128), (196_607, 228)]);
        assert_eq!(Listed::parse(&bytes, 196_607).unwrap_err(), DecodeError::ListedOutside { position: 196_607, symbols: 196_607 });
        let mut codes = placed.codes;
        listed.put(window, FarList::default(), &mut codes).unwrap();
        assert!(codes[..196_607].iter().all(|&byte| byte == 128) && codes[196_607] == 228);
        codes[65535] = 127;
        assert_eq!(listed.put(window, FarList::default(), &mut codes), Err(DecodeError::ListedNibble { position: 65535 }));
    }
}
