//! The interleaved states of `rans` and `rans-pairs`: lanes that share one stream of words.
//!
//! Symbol `i` belongs to lane `i % lanes`; a *step* is `lanes` symbols, the last step may be partial
//! and then uses the first lanes only. After each symbol of a step, in lane order, a lane whose state
//! is below `STATE_MIN` takes the next word.

use crate::ans::{pop, push, refill, state_min};
use crate::error::DecodeError;
use crate::frequencies::Frequencies;

/// Most lanes that a chunk may have.
pub(crate) const LANES_MAX: usize = 64;

/// What the encoder leaves: the states that a decoder begins with, and its words.
pub(crate) struct Coded {
    states: [u32; LANES_MAX],
    lanes: usize,
    /// Last word first.
    words: Vec<u16>,
}

impl Coded {
    /// `codes`: bytes with an entry in `frequencies`.
    pub(crate) fn new<const WORD_BITS: u32>(frequencies: &Frequencies, lanes: usize, codes: &[u8]) -> Self {
        let (entries, prob_bits) = (frequencies.push_entries(), frequencies.prob_bits());
        let mut states = [state_min::<WORD_BITS>(); LANES_MAX];
        // Every symbol writes the word that it might move, and keeps it by advancing: no branch to
        // mispredict.
        let mut words = vec![0u16; codes.len() + 1];
        let mut count = 0;
        for step in codes.chunks(lanes).rev() {
            for (state, &code) in states.iter_mut().zip(step).rev() {
                let (word, moved) = push::<WORD_BITS>(state, entries[usize::from(code)], prob_bits);
                words[count] = word;
                count += usize::from(moved);
            }
        }
        words.truncate(count);
        Self { states, lanes, words }
    }

    fn states(&self) -> &[u32] {
        &self.states[..self.lanes]
    }

    /// 16-bit states as two planes: all low bytes, then all high bytes.
    pub(crate) fn write_state_planes(&self, out: &mut Vec<u8>) {
        out.extend(self.states().iter().map(|&state| state as u8));
        out.extend(self.states().iter().map(|&state| (state >> 8) as u8));
    }

    /// 32-bit states one after the other.
    pub(crate) fn write_wide_states(&self, out: &mut Vec<u8>) {
        out.extend(self.states().iter().flat_map(|state| state.to_le_bytes()));
    }

    /// Words of a byte.
    pub(crate) fn write_byte_words(&self, out: &mut Vec<u8>) {
        out.extend(self.words.iter().rev().map(|&word| word as u8));
    }

    /// Words of two bytes.
    pub(crate) fn write_wide_words(&self, out: &mut Vec<u8>) {
        out.extend(self.words.iter().rev().flat_map(|word| word.to_le_bytes()));
    }
}

/// The state that `lane` of `states.len() / 2` lanes begins with, from two planes of bytes.
pub(crate) fn state_of_planes(states: &[u8], lane: usize) -> u32 {
    u32::from(states[states.len() / 2 + lane]) << 8 | u32::from(states[lane])
}

/// Bytes of the words that 64 lanes of either width can take in a step.
const WINDOW_BYTES: usize = 128;

/// Decodes `out.len()` symbols from all of `words`, a whole number of them; `states` are those of the
/// lanes, [`LANES_MAX`] at most. Proves that no word is missing or left, and that every lane ends
/// where its encoder began.
pub(crate) fn decode<const WORD_BITS: u32>(
    frequencies: &Frequencies,
    states: &mut [u32],
    words: &[u8],
    out: &mut [u8],
) -> Result<(), DecodeError> {
    let (entries, prob_bits) = (frequencies.pop_entries(), frequencies.prob_bits());
    let word_bytes = WORD_BITS as usize / 8;
    let available_words = words.len() / word_bytes;
    let mut words = words;
    for step in out.chunks_mut(states.len()) {
        let mut taken = 0;
        if let Some(window) = words.first_chunk::<WINDOW_BYTES>() {
            // Enough words for any step: the lanes need not ask, and the mask tells the compiler
            // so.
            for (state, code) in states.iter_mut().zip(step) {
                *code = pop(state, entries, prob_bits);
                let at = (taken * word_bytes) & (WINDOW_BYTES - word_bytes);
                let word = match WORD_BITS {
                    8 => u32::from(window[at]),
                    _ => u32::from(u16::from_le_bytes([window[at], window[at + 1]])),
                };
                taken += refill::<WORD_BITS>(state, word);
            }
        } else {
            for (state, code) in states.iter_mut().zip(step) {
                *code = pop(state, entries, prob_bits);
                if *state < state_min::<WORD_BITS>() {
                    let word =
                        words.get(taken * word_bytes..(taken + 1) * word_bytes).ok_or(DecodeError::WordsExhausted { available_words })?;
                    let word = word.iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte));
                    taken += refill::<WORD_BITS>(state, word);
                }
            }
        }
        words = &words[taken * word_bytes..];
    }
    if !words.is_empty() {
        return Err(DecodeError::WordsLeft { left_words: words.len() / word_bytes });
    }
    let expected = state_min::<WORD_BITS>();
    match states.iter().position(|&state| state != expected) {
        Some(lane) => Err(DecodeError::FinalState { lane, state: states[lane], expected }),
        None => Ok(()),
    }
}
