//! Static frequencies of `rans` and `block-ans`: their bytes, and the lookup tables they become. How
//! they are chosen: `trial.rs`.
//!
//! # Bytes
//! ```text
//! u16 count | count x ( u8 symbol byte | u16 freq )      little-endian, symbol bytes strictly ascending
//! ```
//! Frequencies are at least 1 and sum to `2^prob_bits`; `cum` of an entry is the sum of those
//! before it. With 16-bit states none is above 255, so that decoders keep them in bytes: a lone
//! symbol at `prob_bits` 8 gets a companion entry of frequency 1.

use crate::ans::{self, PushEntry};
use crate::error::{ParamsError, TableError};
use crate::escape::{ESCAPED_BITS, FAR_BITS};
use crate::histogram::{Histogram, Population, symbol_byte};
use crate::log2::log2;
use crate::rans::Slots;
use crate::trial::{Limits, Trial};
use crate::{ESCAPE, SYMBOL_BIAS};

/// Widths of the numbers of an rANS coder, bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Widths {
    pub(crate) state: u8,
    pub(crate) word: u8,
    pub(crate) prob: u8,
}

impl Widths {
    pub(crate) fn validate(self) -> Result<(), ParamsError> {
        let refuse = |parameter, value: u8, allowed| Err(ParamsError::OutOfRange { parameter, value: value.into(), allowed });
        match self {
            Self { state: 16, word: 8, prob: 1..=8 } | Self { state: 32, word: 16, prob: 1..=12 } => Ok(()),
            Self { state: 16, word: 8, prob } => refuse("prob_bits", prob, "1..=8 with 16-bit states"),
            Self { state: 32, word: 16, prob } => refuse("prob_bits", prob, "1..=12 with 32-bit states"),
            Self { state: 16, word, .. } => refuse("word_bits", word, "8 with 16-bit states"),
            Self { state: 32, word, .. } => refuse("word_bits", word, "16 with 32-bit states"),
            Self { state, .. } => refuse("state_bits", state, "16 or 32"),
        }
    }

    fn slots(self) -> u32 {
        1 << self.prob
    }

    /// Largest frequency that decoders can hold: a byte with 16-bit states, 12 bits plus one with
    /// 32-bit states.
    fn freq_max(self) -> u32 {
        if self.state == 16 { self.slots().min(255) } else { self.slots() }
    }
}

/// Bits of a table entry in the file.
const ENTRY_BITS: f64 = 24.0;

#[derive(Clone, Debug)]
pub(crate) struct Frequencies {
    widths: Widths,
    /// (symbol byte, freq), ascending
    entries: Vec<(u8, u16)>,
    /// (2^prob_bits,)
    freq: Vec<u16>,
    /// (2^prob_bits,) slot - cum
    offset: Vec<u16>,
    /// (2^prob_bits,)
    symbol_byte: Vec<u8>,
    /// (2^prob_bits,) the three above in one word, for the scalar decoder
    pop_entries: Vec<u32>,
    /// by symbol byte, for the encoder
    push_entries: Box<[PushEntry; 256]>,
    /// by symbol byte
    coded: Box<[bool; 256]>,
}

impl Frequencies {
    /// `entries`: valid, see [`check_entries`].
    pub(crate) fn new(widths: Widths, entries: Vec<(u8, u16)>) -> Self {
        let slots = widths.slots() as usize;
        let mut freq = Vec::with_capacity(slots);
        let mut offset = Vec::with_capacity(slots);
        let mut symbol_byte = Vec::with_capacity(slots);
        let mut pop_entries = Vec::with_capacity(slots);
        let mut push_entries = Box::new([PushEntry::default(); 256]);
        let mut coded = Box::new([false; 256]);
        for &(byte, entry_freq) in &entries {
            let cum = freq.len() as u32;
            let (state_bits, prob_bits) = (widths.state.into(), widths.prob.into());
            push_entries[usize::from(byte)] = PushEntry::new(entry_freq.into(), cum, state_bits, prob_bits);
            coded[usize::from(byte)] = true;
            for slot_offset in 0..entry_freq {
                freq.push(entry_freq);
                offset.push(slot_offset);
                symbol_byte.push(byte);
                pop_entries.push(ans::pop_entry(entry_freq.into(), slot_offset.into(), byte));
            }
        }
        Self { widths, entries, freq, offset, symbol_byte, pop_entries, push_entries, coded }
    }

    /// The frequencies that cost the fewest bits for `histogram`, everything counted.
    pub(crate) fn build(widths: Widths, histogram: &Histogram) -> Result<Self, TableError> {
        let population = Population::new(histogram);
        if population.core_total + population.far_total == 0 {
            return Err(TableError::EmptyHistogram);
        }
        let ranked: Vec<(u8, f64)> = population.core.iter().map(|&(byte, count)| (byte, count as f64)).collect();
        let limits = Limits { slots: widths.slots(), freq_max: widths.freq_max(), entry_bits: ENTRY_BITS, always_escape: false };
        let mut trial = Trial::new(limits, &ranked, (population.core_total + population.far_total) as f64);
        let mut best: Option<(f64, Vec<u32>)> = None;
        for own in 0..=ranked.len() {
            if !trial.extend_to(own) {
                break;
            }
            let bits = trial.cost_bits();
            if best.as_ref().is_none_or(|(least_bits, _)| bits < *least_bits) {
                best = Some((bits, trial.freqs().to_vec()));
            }
        }
        // The first trial, ESCAPE alone, never fails.
        let (_, freqs) = best.ok_or(TableError::EmptyHistogram)?;
        let bytes = std::iter::once(ESCAPE).chain(ranked.iter().map(|&(byte, _)| byte));
        let mut entries: Vec<(u8, u16)> =
            bytes.zip(&freqs).filter(|&(_, &freq)| freq > 0).map(|(byte, &freq)| (byte, freq as u16)).collect();
        let missing = widths.slots() - freqs.iter().sum::<u32>();
        if missing > 0 {
            // A lone entry at 255 of 256 slots: ESCAPE keeps it company, or symbol 0 if it is
            // ESCAPE itself.
            let companion = if freqs[0] > 0 { SYMBOL_BIAS as u8 } else { ESCAPE };
            entries.push((companion, missing as u16));
        }
        entries.sort_unstable();
        Ok(Self::new(widths, entries))
    }

    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        out.extend((self.entries.len() as u16).to_le_bytes());
        for &(byte, freq) in &self.entries {
            out.push(byte);
            out.extend(freq.to_le_bytes());
        }
    }

    pub(crate) fn read(widths: Widths, bytes: &[u8]) -> Result<Self, TableError> {
        let (_, entries) = read_entries::<0, 3>(bytes)?;
        let entries: Vec<(u8, u16)> = entries.iter().map(|&[byte, low, high]| (byte, u16::from_le_bytes([low, high]))).collect();
        check_entries(&entries, widths.slots(), widths.freq_max())?;
        Ok(Self::new(widths, entries))
    }

    pub(crate) fn payload_bits(&self, histogram: &Histogram) -> f64 {
        let mut bits_of = [f64::INFINITY; 256];
        for &(byte, freq) in &self.entries {
            bits_of[usize::from(byte)] = f64::from(self.widths.prob) - log2(freq.into());
        }
        payload_bits(histogram, &bits_of)
    }

    pub(crate) fn entries(&self) -> &[(u8, u16)] {
        &self.entries
    }

    pub(crate) fn has_escape(&self) -> bool {
        self.coded[usize::from(ESCAPE)]
    }

    pub(crate) fn slots(&self) -> Slots<'_> {
        Slots { freq: &self.freq, offset: &self.offset, symbol_byte: &self.symbol_byte }
    }

    pub(crate) fn prob_bits(&self) -> u32 {
        self.widths.prob.into()
    }

    pub(crate) fn pop_entries(&self) -> &[u32] {
        &self.pop_entries
    }

    pub(crate) fn push_entries(&self) -> &[PushEntry; 256] {
        &self.push_entries
    }

    pub(crate) fn coded(&self) -> &[bool; 256] {
        &self.coded
    }
}

/// Bits of all symbols of `histogram` when symbol byte `b` (0: ESCAPE) costs `bits_of[b]`, infinite
/// if it has no entry.
pub(crate) fn payload_bits(histogram: &Histogram, bits_of: &[f64; 256]) -> f64 {
    let escape_bits = bits_of[usize::from(ESCAPE)];
    let bits = histogram.iter().map(|(symbol, count)| {
        let byte = symbol_byte(symbol);
        let own_bits = bits_of[usize::from(byte)];
        count as f64
            * match byte {
                0 => escape_bits + FAR_BITS,
                _ if own_bits.is_finite() => own_bits,
                _ => escape_bits + ESCAPED_BITS,
            }
    });
    bits.sum()
}

/// `F bytes | u16 count | count x N bytes`, and nothing else; at most one entry for every symbol byte.
pub(crate) fn read_entries<const F: usize, const N: usize>(bytes: &[u8]) -> Result<(&[u8; F], &[[u8; N]]), TableError> {
    let available_bytes = bytes.len();
    let front = bytes.split_first_chunk::<F>().and_then(|(front, rest)| Some((front, rest.split_first_chunk::<2>()?)));
    let (front, (count, rest)) = front.ok_or(TableError::Truncated { needed_bytes: F + 2, available_bytes })?;
    let entries = usize::from(u16::from_le_bytes(*count));
    if entries == 0 || entries > 256 {
        return Err(TableError::EntryCount { entries, entries_max: 256 });
    }
    let needed_bytes = F + 2 + entries * N;
    if needed_bytes > available_bytes {
        return Err(TableError::Truncated { needed_bytes, available_bytes });
    }
    if needed_bytes < available_bytes {
        return Err(TableError::TrailingBytes { extra_bytes: available_bytes - needed_bytes });
    }
    let (list, _) = rest.as_chunks::<N>();
    match list.windows(2).position(|pair| pair[0][0] >= pair[1][0]) {
        Some(before) => Err(TableError::NotAscending { entry: before + 1 }),
        None => Ok((front, list)),
    }
}

/// Each frequency is 1..=`freq_max`, and their sum `slots`.
pub(crate) fn check_entries(entries: &[(u8, u16)], slots: u32, freq_max: u32) -> Result<(), TableError> {
    let mut sum = 0;
    for (entry, &(_, freq)) in entries.iter().enumerate() {
        let freq = u32::from(freq);
        if freq == 0 || freq > freq_max {
            return Err(TableError::Frequency { entry, freq, freq_max });
        }
        sum += freq;
    }
    if sum == slots { Ok(()) } else { Err(TableError::FrequencySum { sum, expected: slots }) }
}

/// Parameters of a codec whose table is [`Frequencies`].
pub trait AnsParams: Copy {
    /// Refuses what the layout cannot hold.
    fn check(&self) -> Result<(), ParamsError>;
    /// Widths of the coder's numbers.
    fn widths(&self) -> Widths;
}

/// Static frequencies of one tensor, the table of `rans` and `block-ans`.
#[derive(Clone, Debug)]
pub struct AnsTable<P> {
    params: P,
    frequencies: Frequencies,
}

impl<P: AnsParams> AnsTable<P> {
    pub(crate) fn build(params: P, histogram: &Histogram) -> Result<Self, TableError> {
        params.check()?;
        Ok(Self { params, frequencies: Frequencies::build(params.widths(), histogram)? })
    }

    pub(crate) fn read(params: P, bytes: &[u8]) -> Result<Self, TableError> {
        params.check()?;
        Ok(Self { params, frequencies: Frequencies::read(params.widths(), bytes)? })
    }

    pub(crate) fn frequencies(&self) -> &Frequencies {
        &self.frequencies
    }

    /// Parameters of the codec.
    pub fn params(&self) -> P {
        self.params
    }

    /// The tables of a decoder.
    pub fn slots(&self) -> Slots<'_> {
        self.frequencies.slots()
    }

    /// (symbol byte, frequency), ascending by symbol byte.
    pub fn entries(&self) -> &[(u8, u16)] {
        self.frequencies.entries()
    }

    /// Whether ESCAPE has an entry: if not, decoders may skip the handling of escapes.
    pub fn has_escape(&self) -> bool {
        self.frequencies.has_escape()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULT: Widths = Widths { state: 16, word: 8, prob: 7 };

    fn histogram(counts: &[(i16, usize)]) -> Histogram {
        let mut histogram = Histogram::new();
        for &(symbol, count) in counts {
            histogram.add(&vec![symbol; count]);
        }
        histogram
    }

    #[test]
    fn dyadic_counts_get_their_exact_frequencies() {
        let histogram = histogram(&[(-1, 1000), (0, 2000), (1, 1000)]);
        let frequencies = Frequencies::build(DEFAULT, &histogram).unwrap();
        assert_eq!(frequencies.entries(), [(127, 32), (128, 64), (129, 32)]);
        assert_eq!(frequencies.payload_bits(&histogram), 6000.0);
        let slots = frequencies.slots();
        assert_eq!((slots.symbol_byte[31], slots.freq[31], slots.offset[31]), (127, 32, 31));
        assert_eq!((slots.symbol_byte[32], slots.freq[32], slots.offset[32]), (128, 64, 0));
        assert_eq!(slots.freq.len(), 128);
    }

    #[test]
    fn lone_symbols() {
        for (prob, expected) in [(7, vec![(131, 128)]), (8, vec![(0, 1), (131, 255)])] {
            let table = Frequencies::build(Widths { prob, ..DEFAULT }, &histogram(&[(3, 9)])).unwrap();
            assert_eq!(table.entries(), expected);
        }
        for (prob, expected) in [(7, vec![(0, 128)]), (8, vec![(0, 255), (128, 1)])] {
            let table = Frequencies::build(Widths { prob, ..DEFAULT }, &histogram(&[(300, 9)])).unwrap();
            assert_eq!(table.entries(), expected);
        }
        let precise = Widths { state: 32, word: 16, prob: 12 };
        assert_eq!(Frequencies::build(precise, &histogram(&[(3, 9)])).unwrap().entries(), [(131, 4096)]);
        assert_eq!(Frequencies::build(DEFAULT, &Histogram::new()).unwrap_err(), TableError::EmptyHistogram);
    }

    #[test]
    fn rare_symbols_escape_and_more_symbols_than_slots_do() {
        let table = Frequencies::build(DEFAULT, &histogram(&[(0, 100_000), (1, 100_000), (9, 3), (300, 1)]));
        let bytes: Vec<u8> = table.unwrap().entries().iter().map(|entry| entry.0).collect();
        assert_eq!(bytes, [0, 128, 129]);
        let uniform: Vec<(i16, usize)> = (-127..=127).map(|symbol| (symbol, 10)).collect();
        for prob in 1..=8 {
            let table = Frequencies::build(Widths { prob, ..DEFAULT }, &histogram(&uniform)).unwrap();
            assert!(table.entries().len() <= 1 << prob);
            assert!(table.payload_bits(&histogram(&uniform)).is_finite());
            check_entries(&table.entries, table.widths.slots(), table.widths.freq_max()).unwrap();
        }
    }

    #[test]
    fn read_refuses_what_is_no_table() {
        let table = Frequencies::build(DEFAULT, &histogram(&[(0, 3), (1, 1)])).unwrap();
        let mut bytes = Vec::new();
        table.write(&mut bytes);
        assert_eq!(bytes, [2, 0, 128, 96, 0, 129, 32, 0]);
        assert_eq!(Frequencies::read(DEFAULT, &bytes).unwrap().entries(), table.entries());
        let refused = |bytes: &[u8]| Frequencies::read(DEFAULT, bytes).unwrap_err();
        assert_eq!(refused(&[0]), TableError::Truncated { needed_bytes: 2, available_bytes: 1 });
        assert_eq!(refused(&[0, 0]), TableError::EntryCount { entries: 0, entries_max: 256 });
        assert_eq!(refused(&[1, 1]), TableError::EntryCount { entries: 257, entries_max: 256 });
        assert_eq!(refused(&bytes[..7]), TableError::Truncated { needed_bytes: 8, available_bytes: 7 });
        assert_eq!(refused(&[&bytes[..], &[0]].concat()), TableError::TrailingBytes { extra_bytes: 1 });
        assert_eq!(refused(&[2, 0, 128, 64, 0, 128, 64, 0]), TableError::NotAscending { entry: 1 });
        assert_eq!(refused(&[2, 0, 128, 128, 0, 129, 0, 0]), TableError::Frequency { entry: 1, freq: 0, freq_max: 128 });
        assert_eq!(refused(&[1, 0, 128, 255, 255]), TableError::Frequency { entry: 0, freq: 65535, freq_max: 128 });
        assert_eq!(refused(&[1, 0, 128, 127, 0]), TableError::FrequencySum { sum: 127, expected: 128 });
        let byte_wide = Widths { prob: 8, ..DEFAULT };
        let lone = Frequencies::read(byte_wide, &[1, 0, 128, 0, 1]).unwrap_err();
        assert_eq!(lone, TableError::Frequency { entry: 0, freq: 256, freq_max: 255 });
    }
}
