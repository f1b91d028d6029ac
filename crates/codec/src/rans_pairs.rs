//! `rans-pairs`: range asymmetric numeral systems over *pairs* of symbols; the ratio of `rans` in half
//! as many steps.
//!
//! # Method
//! 64 lanes code pairs of symbols (`pairs.rs`) by the static frequencies of the table, as `rans` does
//! single symbols (`ans.rs`, `lanes.rs`): 16-bit states, words of a byte, 256 slots. Pair `i` of a chunk
//! belongs to lane `i % 64`: a step is 64 pairs, the symbols of two tiles.
//!
//! What would not fit 256 pair bytes is kept out of the coder. The window has 16, 32 or 64 symbols: of
//! the wider ones the low one or two bits of every symbol are *raw*, stored as they are, for at high
//! entropy they are nearly uniform. Symbols outside the window are *listed*. Pairs without an entry are
//! escaped: coded as ESCAPE, pair byte 0, followed by the pair byte itself. So is the pair of two first
//! symbols of the window, whose pair byte is 0.
//!
//! The table takes the window, the raw bits, the entries and the frequencies that cost the fewest bits,
//! as if the symbols of a pair were independent.
//!
//! # Bytes of the table
//! ```text
//! u8 base | u8 raw_bits (0..=2) | u16 count | count x (u8 pair byte, u8 freq)
//! ```
//! `base` is the symbol byte of the window's first symbol, 1..=256 - (16 << raw_bits). The pair bytes
//! ascend strictly, the first is ESCAPE. The frequencies are 1..=127 and sum to 256, so there are three
//! entries at least.
//!
//! # Bytes of a chunk (little-endian)
//! ```text
//! u32 listed | u32 far_count | u32 escape_bytes | listed x u16 gap | listed x u8 symbol byte | states: 64 low bytes, 64 high bytes | escapes | raw lines | words | far entries
//! ```
//! - **listed**, **raw lines**: `pairs.rs`;
//! - **states**, **words**: as in `rans`; all lanes have a state, however few pairs there are;
//! - **escapes**: the pair bytes of the escaped pairs, in order. Their raw bits are in the lines.
//!
//! # Why this suits SIMD
//! As in `rans`, a step is a handful of operations on registers of 64 bytes, here for 128 symbols: three
//! tables of 256 bytes are looked up by the plane of low bytes, which is the slot itself, with no mask
//! and no shift; the plane of high bytes is the other factor of the product. With frequencies below 128
//! product and offset fit a signed word, what `vpmaddubsw` computes. The nibbles of the pairs are
//! multiplied as those of `tiered`: the window's first symbol is added to the sums. Listed symbols lie
//! before all else and are corrections to the sums, so that no step asks for them.
//!
//! # Proof of validity
//! As in `rans`: all words and escapes are used and no more, and every lane ends at `STATE_MIN`, 256.
//! Halves of pairs and raw bits without a symbol are zero; listed symbols lie in the chunk and are coded
//! as such; far list and listed bytes of 0 name the same positions.
//!
//! # Cost
//! Measured on chunks of 65,536 Gaussian symbols, bits per symbol above the entropy, everything in the
//! chunk counted; the states and their coarseness are 0.017 of it:
//!
//! | entropy | 1.51 | 2.25 | 3.06 | 3.79 |
//! |---|---|---|---|---|
//! | `rans-pairs` | 0.026 | 0.038 | 0.062 | 0.069 |
//! | of it the table: rounding, escapes, raw bits | 0.008 | 0.020 | 0.045 | 0.051 |
//! | entries, raw bits | 22, 0 | 46, 0 | 90, 0 | 72, 1 |
//! | `rans` | 0.026 | 0.034 | 0.038 | 0.048 |
//!
//! The more entropy, the more pairs are too rare for one of 256 slots: at 2.25 bits 0.4 % are escaped, at
//! 3.06 bits 3 %. Between 3.1 and 3.4 bits one raw bit becomes the better choice; two are not up to 4
//! bits. The scalar coder, one Zen 4 core: encode 0.61 to 0.66, decode 0.57 to 0.66 G symbols/s, where
//! `rans` has 0.37 to 0.39 and 0.49 to 0.51 (example `codec_rates`).

use crate::error::{DecodeError, EncodeError, TableError};
use crate::escape::{check_symbols, take_u32};
use crate::frequencies::{Frequencies, Widths, check_entries, read_entries};
use crate::histogram::Population;
use crate::lanes::{self, Coded};
use crate::log2::log2;
use crate::pairs::{LISTED_BYTES, Listed, Nibbles, Placed, RAW_BITS_MAX, Window, first_symbol, pairs_of, ranked_pairs};
use crate::trial::{Limits, Trial};
use crate::{ESCAPE, FAR_BYTES, FarList, Histogram};

/// Interleaved states, pairs of a step.
pub const LANES: usize = 64;
/// Least state after a pair, and every lane's state after its last.
pub const STATE_MIN: u32 = 256;
/// Bytes of the states of a chunk.
pub const STATES_BYTES: usize = 2 * LANES;
/// Sum of the frequencies.
pub const SLOTS: usize = 256;
/// Largest frequency: a signed byte.
pub const FREQ_MAX: u8 = 127;
/// Bytes of the counts that a chunk begins with.
const HEADER_BYTES: usize = 12;
/// Bits of a table entry in the file.
const ENTRY_BITS: f64 = 16.0;
/// Bits of an escaped pair beside the code of ESCAPE.
const ESCAPED_PAIR_BITS: f64 = 8.0;
/// Entries beyond the best number of them that are tried: what they bring falls with their counts.
const TRIALS_IN_VAIN: usize = 32;
const WIDTHS: Widths = Widths { state: 16, word: 8, prob: 8 };

/// What a decoder looks up by slot, the low byte of a state `x`: the state before was
/// `freq * (x >> 8) + offset`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slots {
    /// Frequency of the slot's entry, 1..=127.
    pub freq: [u8; SLOTS],
    /// Slot minus the sum of the frequencies before the entry; less than the frequency.
    pub offset: [u8; SLOTS],
    /// The entry's pair byte; 0 is [`ESCAPE`].
    pub pair_byte: [u8; SLOTS],
}

/// Window and static frequencies of one tensor.
#[derive(Clone, Debug)]
pub struct Table {
    window: Window,
    frequencies: Frequencies,
    slots: Box<Slots>,
}

impl Table {
    /// `entries`: valid.
    fn new(window: Window, entries: Vec<(u8, u16)>) -> Self {
        let mut slots = Box::new(Slots { freq: [0; SLOTS], offset: [0; SLOTS], pair_byte: [0; SLOTS] });
        let mut slot = 0;
        for &(pair, freq) in &entries {
            for offset in 0..freq {
                slots.freq[slot] = freq as u8;
                slots.offset[slot] = offset as u8;
                slots.pair_byte[slot] = pair;
                slot += 1;
            }
        }
        Self { window, frequencies: Frequencies::new(WIDTHS, entries), slots }
    }

    /// The table that costs the fewest bits, the table counted; of equals the one with the fewest raw
    /// bits. Which window is the best of its width is judged by the entropy of the nibbles.
    pub(crate) fn build(histogram: &Histogram) -> Result<Self, TableError> {
        let population = Population::new(histogram);
        if population.core_total + population.far_total == 0 {
            return Err(TableError::EmptyHistogram);
        }
        let mut judged: Vec<(Window, f64)> = (0..=RAW_BITS_MAX).map(|raw_bits| likely_window(&population, raw_bits)).collect();
        judged.sort_by(|a, b| a.1.total_cmp(&b.1));
        let mut best: Option<(f64, Self)> = None;
        for (window, entropy_bits) in judged {
            // No table is better than the entropy.
            if best.as_ref().is_none_or(|(least_bits, _)| entropy_bits < *least_bits) {
                let (bits, table) = Self::best_of(&population, window);
                if best.as_ref().is_none_or(|(least_bits, _)| bits < *least_bits) {
                    best = Some((bits, table));
                }
            }
        }
        let (_, table) = best.ok_or(TableError::EmptyHistogram)?;
        Ok(table)
    }

    /// The best table of a window, and what it costs in bits.
    fn best_of(population: &Population, window: Window) -> (f64, Self) {
        let nibbles = Nibbles::new(population, window);
        let counts = nibbles.pair_counts();
        let ranked = ranked_pairs(&counts);
        let limits = Limits { slots: SLOTS as u32, freq_max: FREQ_MAX.into(), entry_bits: ENTRY_BITS, always_escape: true };
        let mut trial = Trial::new(limits, &ranked, counts.iter().sum());
        let (mut least_bits, mut freqs) = (f64::INFINITY, Vec::new());
        // With one or two entries the frequencies cannot sum to 256.
        for own in 2..=ranked.len() {
            if own > freqs.len() + TRIALS_IN_VAIN || !trial.extend_to(own) {
                break;
            }
            if trial.cost_bits() < least_bits {
                (least_bits, freqs) = (trial.cost_bits(), trial.freqs().to_vec());
            }
        }
        let pairs = std::iter::once(ESCAPE).chain(ranked.iter().map(|&(pair, _)| pair));
        let mut entries: Vec<(u8, u16)> = pairs.zip(&freqs).map(|(pair, &freq)| (pair, freq as u16)).collect();
        entries.sort_unstable();
        (least_bits + nibbles.beside_bits(window), Self::new(window, entries))
    }

    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        let entries = self.frequencies.entries();
        out.extend([self.window.base(), self.window.raw_bits()]);
        out.extend((entries.len() as u16).to_le_bytes());
        out.extend(entries.iter().flat_map(|&(pair, freq)| [pair, freq as u8]));
    }

    pub(crate) fn read(bytes: &[u8]) -> Result<Self, TableError> {
        let (&[base, raw_bits], entries) = read_entries::<2, 2>(bytes)?;
        if raw_bits > RAW_BITS_MAX {
            return Err(TableError::RawBits { raw_bits, raw_bits_max: RAW_BITS_MAX });
        }
        let window = Window::new(base, raw_bits)?;
        let entries: Vec<(u8, u16)> = entries.iter().map(|&[pair, freq]| (pair, freq.into())).collect();
        check_entries(&entries, SLOTS as u32, FREQ_MAX.into())?;
        if entries[0].0 != ESCAPE {
            return Err(TableError::NoEscape);
        }
        Ok(Self::new(window, entries))
    }

    /// As if the symbols of a pair were independent.
    pub(crate) fn payload_bits(&self, histogram: &Histogram) -> f64 {
        let nibbles = Nibbles::new(&Population::new(histogram), self.window);
        let mut bits_of = [f64::INFINITY; 256];
        for &(pair, freq) in self.entries() {
            bits_of[usize::from(pair)] = 8.0 - log2(freq.into());
        }
        let escaped_bits = bits_of[usize::from(ESCAPE)] + ESCAPED_PAIR_BITS;
        // ESCAPE is no code of the pair byte 0.
        bits_of[usize::from(ESCAPE)] = f64::INFINITY;
        let pairs = nibbles.pair_counts().into_iter().zip(bits_of);
        let codes: f64 = pairs.map(|(count, own)| count * own.min(escaped_bits)).sum();
        codes + nibbles.beside_bits(self.window)
    }

    /// Symbols that are not listed.
    pub fn window(&self) -> Window {
        self.window
    }

    /// The tables of a decoder.
    pub fn slots(&self) -> &Slots {
        &self.slots
    }

    /// (pair byte, frequency), ascending by pair byte.
    pub fn entries(&self) -> &[(u8, u16)] {
        self.frequencies.entries()
    }
}

/// Of the windows with `raw_bits` the one where the nibbles have the least entropy, all else counted, and
/// these bits. Of equals the one nearest to the middle of the alphabet.
fn likely_window(population: &Population, raw_bits: u8) -> (Window, f64) {
    let mut best = None;
    let mut least_bits = f64::INFINITY;
    for window in Window::all(raw_bits) {
        let nibbles = Nibbles::new(population, window);
        let beside_bits = nibbles.beside_bits(window);
        if beside_bits >= least_bits {
            continue;
        }
        let symbols = nibbles.symbols();
        let terms: f64 = nibbles.counts.iter().map(|&count| count as f64 * log2(count)).sum();
        let entropy_bits = symbols as f64 * log2(symbols) - terms + beside_bits;
        // The pair of two nibbles 0 has no code of its own.
        let judged_bits = entropy_bits + nibbles.pair_count(0) * ESCAPED_PAIR_BITS;
        if judged_bits < least_bits {
            least_bits = judged_bits;
            best = Some((window, entropy_bits));
        }
    }
    best.expect("the bits of the first window are finite")
}

/// The parts of a chunk.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// Symbols outside the window.
    pub listed: Listed<'a>,
    /// States that the lanes begin with: 64 low bytes, 64 high bytes.
    pub states: &'a [u8; STATES_BYTES],
    /// Pair bytes of the escaped pairs.
    pub escapes: &'a [u8],
    /// Raw bits, whole lines of 64 bytes: `window.raw_line_bytes(pairs)`.
    pub raw_lines: &'a [u8],
    /// Words of a byte, read forward.
    pub words: &'a [u8],
    /// Far symbols.
    pub far: FarList<'a>,
}

impl<'a> Chunk<'a> {
    /// Splits a chunk of `symbols` symbols into its parts. Lengths and both lists are checked, the rest
    /// only decoding can prove.
    pub fn parse(table: &Table, symbols: usize, chunk: &'a [u8]) -> Result<Self, DecodeError> {
        check_symbols(symbols)?;
        let available_bytes = chunk.len() as u64;
        let raw_line_bytes = table.window.raw_line_bytes(pairs_of(symbols));
        let least_bytes = (HEADER_BYTES + STATES_BYTES + raw_line_bytes) as u64;
        let truncated = |needed_bytes| DecodeError::Truncated { needed_bytes, available_bytes };
        let (mut header, rest) = chunk.split_at_checked(HEADER_BYTES).ok_or(truncated(least_bytes))?;
        let mut number = || take_u32(&mut header).map_or(0, u64::from);
        let (listed_bytes, far_bytes, escape_bytes) = (number() * LISTED_BYTES as u64, number() * FAR_BYTES as u64, number());
        let needed_bytes = least_bytes + listed_bytes + far_bytes + escape_bytes;
        if needed_bytes > available_bytes {
            return Err(truncated(needed_bytes));
        }
        // All lengths are below that of the chunk.
        let (listed, rest) = rest.split_at(listed_bytes as usize);
        let (states, rest) = rest.split_first_chunk().ok_or(truncated(needed_bytes))?;
        let (escapes, rest) = rest.split_at(escape_bytes as usize);
        let (raw_lines, rest) = rest.split_at(raw_line_bytes);
        let (words, far) = rest.split_at(rest.len() - far_bytes as usize);
        let (listed, far) = (Listed::parse(listed, symbols)?, FarList::parse(far, symbols)?);
        Ok(Self { listed, states, escapes, raw_lines, words, far })
    }
}

pub(crate) fn encode(table: &Table, symbols: &[i16], out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let placed = Placed::new(symbols, table.window)?;
    let mut codes = table.window.pair_bytes(&placed.codes);
    let escapes = escape(&mut codes, table.frequencies.coded());
    let coded = Coded::new::<8>(&table.frequencies, LANES, &codes);
    placed.write_counts(out);
    out.extend((escapes.len() as u32).to_le_bytes());
    placed.write_listed(out);
    coded.write_state_planes(out);
    out.extend(escapes);
    out.extend(table.window.raw_lines(&placed.codes));
    coded.write_byte_words(out);
    placed.write_far(out);
    Ok(())
}

/// Replaces pair bytes without an entry by ESCAPE; returns them, and those that are 0 themselves.
fn escape(pairs: &mut [u8], coded: &[bool; 256]) -> Vec<u8> {
    let code_of: [u8; 256] = std::array::from_fn(|pair| if coded[pair] { pair as u8 } else { ESCAPE });
    // Every pair writes itself, and keeps it by advancing: no branch to mispredict.
    let mut escapes = vec![0; pairs.len() + 1];
    let mut count = 0;
    for pair in pairs {
        escapes[count] = *pair;
        *pair = code_of[usize::from(*pair)];
        count += usize::from(*pair == ESCAPE);
    }
    escapes.truncate(count);
    escapes
}

/// Decodes to symbol bytes, far = 0.
pub(crate) fn decode<'a>(table: &Table, bytes: &'a [u8], out: &mut [u8]) -> Result<FarList<'a>, DecodeError> {
    let chunk = Chunk::parse(table, out.len(), bytes)?;
    let mut states: [u32; LANES] = std::array::from_fn(|lane| lanes::state_of_planes(chunk.states, lane));
    let mut pairs = vec![0; pairs_of(out.len())];
    lanes::decode::<8>(&table.frequencies, &mut states, chunk.words, &mut pairs)?;
    unescape(&mut pairs, chunk.escapes)?;
    table.window.join(&pairs, chunk.raw_lines, out)?;
    chunk.listed.put(table.window, chunk.far, out)?;
    Ok(chunk.far)
}

/// Replaces every ESCAPE by its pair byte; proves that the escapes are used up.
fn unescape(pairs: &mut [u8], escapes: &[u8]) -> Result<(), DecodeError> {
    let mut escapes = escapes.iter();
    for (index, pair) in pairs.iter_mut().enumerate() {
        if *pair == ESCAPE {
            *pair = *escapes.next().ok_or(DecodeError::EscapesExhausted { position: first_symbol(index) })?;
        }
    }
    if escapes.len() > 0 { Err(DecodeError::EscapesLeft { left_bytes: escapes.len() }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn histogram(symbols: &[i16]) -> Histogram {
        let mut histogram = Histogram::new();
        histogram.add(symbols);
        histogram
    }

    /// Nibble 8 is symbol 0; the pairs (0, 0), (1, 0) and ESCAPE, and (0, 1) with the rest.
    fn table(raw_bits: u8) -> Table {
        let base = 128 - (8 << raw_bits);
        Table::read(&[base, raw_bits, 4, 0, ESCAPE, 64, 0x88, 64, 0x89, 64, 0x98, 64]).unwrap()
    }

    #[test]
    fn slots_by_hand() {
        let table = Table::read(&[120, 0, 3, 0, 0, 2, 0x77, 127, 0x88, 127]).unwrap();
        let slots = table.slots();
        let at = |slot: usize| (slots.freq[slot], slots.offset[slot], slots.pair_byte[slot]);
        assert_eq!([at(0), at(1), at(2), at(128)], [(2, 0, 0), (2, 1, 0), (127, 0, 0x77), (127, 126, 0x77)]);
        assert_eq!([at(129), at(255)], [(127, 0, 0x88), (127, 126, 0x88)]);
        assert_eq!((table.window().base(), table.window().raw_bits()), (120, 0));
    }

    #[test]
    fn expected_bits_by_hand() {
        // Every code has two bits, every escaped pair a byte more.
        assert_eq!(table(0).payload_bits(&histogram(&[0; 8])), 4.0 * 2.0);
        assert_eq!(table(0).payload_bits(&histogram(&[1; 2])), 10.0);
        assert_eq!(table(0).payload_bits(&histogram(&[-8; 2])), 10.0, "pair byte 0 has no code");
        // Two of 0 and 1 give half a pair each of (0, 1) and (1, 0), a quarter of the two others.
        assert_eq!(table(0).payload_bits(&histogram(&[0, 0, 1, 1])), 1.5 * 2.0 + 0.5 * 10.0);
        // Listed symbols take a pair of 0, and 24 bits; a far one 48 more.
        assert_eq!(table(0).payload_bits(&histogram(&[100, 1000])), 2.0 + 2.0 * 24.0 + 48.0);
        assert_eq!(table(2).payload_bits(&histogram(&[0, 1, 2, 3])), 2.0 * 2.0 + 4.0 * 2.0);
    }

    #[test]
    fn bytes_by_hand() {
        let table = table(1);
        // Two tiles: the first four symbols have partners, the others not.
        let mut symbols = vec![-16; 68];
        symbols[..5].copy_from_slice(&[0, 3, 1, 100, -15]);
        symbols[64..].copy_from_slice(&[1, 0, 300, 2]);
        let mut out = Vec::new();
        encode(&table, &symbols, &mut out).unwrap();
        // Listed: 100 at 3, 300 at 66. Pairs: 0x88, 0x89, 0x88, 0x98, and then zeros, which escape.
        let mut expected = vec![2, 0, 0, 0, 1, 0, 0, 0, 60, 0, 0, 0, 3, 0, 62, 0, 228, 0];
        // A state of 256 takes two bits of code: slot 64, 128, 64, 192, 0 behind 256 / 64 = 4, that is 1024 and so.
        let low = [[64, 128, 64, 192].as_slice(), &[0; 60]].concat();
        expected.extend([&low[..], &[4; 64], &[0; 60]].concat());
        // Raw bits: of 0 and 1, of 3 and 0, of 1 and of the listed 300; of the listed 100 and of 2; of -15.
        expected.extend([[0b10, 0b01, 0b01, 0b00, 0b01].as_slice(), &[0; 59]].concat());
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
        let (states, escapes, raw) = (18, 18 + 128, 18 + 128 + 60);
        assert_eq!(refused(states, 0), DecodeError::EscapesExhausted { position: 63 });
        assert_eq!(refused(states + 4, 64), DecodeError::EscapesLeft { left_bytes: 1 });
        assert_eq!(refused(states + 64, 3), DecodeError::WordsExhausted { available_words: 0 });
        assert_eq!(refused(states + 65, 5), DecodeError::FinalState { lane: 1, state: 320, expected: 256 });
        assert_eq!(refused(escapes, 0x10), DecodeError::PaddingNotZero, "a partner beyond the last symbol");
        assert_eq!(refused(raw + 4, 0b11), DecodeError::PaddingNotZero);
        assert_eq!(refused(raw + 5, 0b100), DecodeError::PaddingNotZero, "a step that is not there");
        assert_eq!(refused(raw + 3, 0b01), DecodeError::ListedNibble { position: 3 });
        assert_eq!(refused(12, 4), DecodeError::ListedNibble { position: 4 });
        assert_eq!(refused(14, 64), DecodeError::ListedOutside { position: 68, symbols: 68 });
        assert_eq!(refused(16, 0), DecodeError::FarMismatch { position: 3 });
        assert_eq!(refused(17, 1), DecodeError::FarMismatch { position: 66 });
        out.insert(raw + 64, 7);
        assert_eq!(decode(&table, &out, &mut bytes), Err(DecodeError::WordsLeft { left_words: 1 }));
        let needed_bytes = 18 + 128 + 60 + 64 + 6;
        let short = Err(DecodeError::Truncated { needed_bytes, available_bytes: needed_bytes - 1 });
        assert_eq!(decode(&table, &out[..needed_bytes as usize - 1], &mut bytes), short);
    }

    /// `round(gauss * sigma)`, by Box and Muller, with some outliers.
    fn gaussian(sigma: f64, shift: i16) -> Vec<i16> {
        let mut state = 88_172_645_463_325_252u64;
        let mut uniform = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
        };
        let mut gauss = || (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
        (0..1 << 16).map(|i| shift + (gauss() * sigma * if i % 4096 == 0 { 9.0 } else { 1.0 }).round() as i16).collect()
    }

    /// What the choice of the window by the entropy of its nibbles costs, against trying every one.
    #[test]
    fn no_window_is_much_better_than_the_one_chosen() {
        for (sigma, shift) in [(0.3, 0), (1.0, 0), (1.9, 1), (3.3, 0), (3.3, 90), (6.0, 0), (12.0, -3), (40.0, 0)] {
            let histogram = histogram(&gaussian(sigma, shift));
            let population = Population::new(&histogram);
            let windows = (0..=RAW_BITS_MAX).flat_map(Window::all);
            let least = windows.map(|window| Table::best_of(&population, window).0).min_by(f64::total_cmp).unwrap();
            let built = Table::build(&histogram).unwrap();
            let bits = built.payload_bits(&histogram) + built.entries().len() as f64 * ENTRY_BITS;
            assert!(bits >= least * 0.999_999 && bits < least * 1.002, "sigma {sigma}: {bits} bits, possible are {least}");
        }
    }

    #[test]
    fn raw_bits_follow_the_spread() {
        let raw_bits = |sigma| Table::build(&histogram(&gaussian(sigma, 0))).unwrap().window().raw_bits();
        assert_eq!([0.5, 1.1, 2.4, 6.0].map(raw_bits), [0, 0, 1, 2]);
    }

    #[test]
    fn lone_pairs_get_company() {
        let built = Table::build(&histogram(&[5; 9])).unwrap();
        let entries = built.entries();
        assert_eq!((entries.len(), entries[0].0, entries.iter().map(|entry| entry.1).sum::<u16>()), (3, ESCAPE, 256));
        assert!(entries.iter().all(|&(_, freq)| freq <= 127));
    }

    #[test]
    fn read_refuses_impossible_tables() {
        let good = [120, 0, 3, 0, 0, 2, 0x77, 127, 0x88, 127];
        let refused = |bytes: &[u8]| Table::read(bytes).unwrap_err();
        assert_eq!(refused(&good[..3]), TableError::Truncated { needed_bytes: 4, available_bytes: 3 });
        assert_eq!(refused(&good[..9]), TableError::Truncated { needed_bytes: 10, available_bytes: 9 });
        assert_eq!(refused(&[&good[..], &[0]].concat()), TableError::TrailingBytes { extra_bytes: 1 });
        let with = |at: usize, value: u8| {
            let mut bytes = good;
            bytes[at] = value;
            refused(&bytes)
        };
        assert_eq!(with(0, 0), TableError::PairWindow { base: 0, base_max: 240 });
        assert_eq!(with(0, 241), TableError::PairWindow { base: 241, base_max: 240 });
        assert_eq!(refused(&[225, 1, 3, 0, 0, 2, 0x77, 127, 0x88, 127]), TableError::PairWindow { base: 225, base_max: 224 });
        assert_eq!(with(1, 3), TableError::RawBits { raw_bits: 3, raw_bits_max: 2 });
        assert_eq!(with(2, 0), TableError::EntryCount { entries: 0, entries_max: 256 });
        assert_eq!(with(4, 1), TableError::NoEscape);
        assert_eq!(with(5, 0), TableError::Frequency { entry: 0, freq: 0, freq_max: 127 });
        assert_eq!(with(5, 3), TableError::FrequencySum { sum: 257, expected: 256 });
        assert_eq!(with(7, 128), TableError::Frequency { entry: 1, freq: 128, freq_max: 127 });
        assert_eq!(with(8, 0x77), TableError::NotAscending { entry: 2 });
    }
}
