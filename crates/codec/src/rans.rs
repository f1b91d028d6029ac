//! `rans`: interleaved range asymmetric numeral systems, the best ratio and the one that decodes in
//! registers.
//!
//! # Method
//! Each of `lanes` states codes every `lanes`-th symbol by the static frequencies of the table (the
//! arithmetic: `ans.rs`, `lanes.rs`; choice and bytes of the table: `trial.rs`, `frequencies.rs`). All
//! lanes share one stream of words. Symbol `i` of a chunk belongs to lane `i % lanes`; a *step* is `lanes` symbols,
//! the last step may be partial and then uses the first lanes only.
//!
//! # Bytes of a chunk (little-endian)
//! ```text
//! u32 escape_bytes | u32 far_count | states | words | escapes | far entries (6 bytes each)
//! ```
//! - **states**, 16 bits: `lanes` low bytes, then `lanes` high bytes; 32 bits: `lanes` x u32. What
//!   the encoder ended with;
//! - **words**, all that the other parts leave over: read forward. After each symbol of a step, in
//!   lane order, a lane whose state is below `STATE_MIN` takes the next word;
//! - **escapes**, **far entries**: see [`crate::FarList`].
//!
//! # Why this suits SIMD and GPUs
//! With 64 lanes, a step is one tile of 16 rows x 4 columns: 64 bytes leave the decoder in the
//! order in which one `vpdpbusd` multiplies them, and no sum crosses lanes. 16-bit states are
//! stored, and kept, as two planes of bytes: the low plane is itself the index of `vpermb` into
//! 64-slot tables (`vpermi2b` for 128 slots), thus frequency, offset and symbol byte of all lanes
//! are three instructions away; "below `STATE_MIN`" is "high byte zero"; and the refill of all
//! lanes is one `vpexpandb` from the shared stream, which then advances by a popcount. On a GPU a
//! warp does the same with a ballot.
//!
//! The default `prob_bits` of 7 is the knee. Above the entropy at 2.25 and at 3.79 bits: 64 slots
//! 1.9 and 2.3 %, 128 slots 1.5 and 1.3 %, 256 slots 1.4 and 1.0 %; the AVX-512 prototype fused
//! with a dot, on a Zen 5 core: 20, 19.5 and 17.5 G symbols/s. Beyond that the 16-bit states
//! themselves limit, and [`Params::PRECISE`] takes over.
//!
//! # Proof of validity
//! Decoders run optimistically. A chunk is valid if and only if, after its last symbol, all words
//! are used and no more, all escapes are used and no more, the far list names just the escapes of
//! value 0, and every lane is back at `STATE_MIN`, where the encoder began.
//!
//! # Cost
//! Above the entropy: rounding of the frequencies, escapes, the states (`lanes * state_bits` a
//! chunk, less the half word that a state gives back), and the coarseness of a state of few bits.
//! Measured on chunks of 65,536 Gaussian symbols, bits per symbol, everything in the chunk counted:
//!
//! | entropy | 1.51 | 2.25 | 3.06 | 3.79 |
//! |---|---|---|---|---|
//! | `rans` | 0.026 | 0.033 | 0.038 | 0.048 |
//! | `rans-precise` | 0.013 | 0.013 | 0.013 | 0.014 |
//! | `rans-precise` with 64 lanes | 0.025 | 0.025 | 0.025 | 0.025 |
//!
//! The scalar coder in this crate, one Zen 5 core, shared: encode 0.5, decode 0.64 G symbols/s at
//! every entropy, either state width (example `rates`).

use crate::FarList;
use crate::error::{DecodeError, EncodeError, ParamsError};
use crate::escape::{Classified, Parts, resolve};
use crate::frequencies::{AnsParams, AnsTable, Widths};
use crate::lanes::{self, Coded, LANES_MAX};

/// Parameters of `rans`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Params {
    /// 16 or 32.
    pub state_bits: u8,
    /// 8 with 16-bit states, 16 with 32-bit states.
    pub word_bits: u8,
    /// Frequencies sum to `2^prob_bits`: 1..=8 with 16-bit states, 1..=12 with 32-bit states.
    pub prob_bits: u8,
    /// Interleaved states, 1..=64.
    pub lanes: u8,
}

impl Params {
    /// 16-bit states, tables of 128 slots: decodes in registers, 1 to 2 % above the entropy.
    pub const DEFAULT: Self = Self { state_bits: 16, word_bits: 8, prob_bits: 7, lanes: 64 };
    /// 32-bit states, tables of 4096 slots: 0.014 bit above the entropy at 65,536 symbols a chunk,
    /// nearly all of it the states; so 32 lanes, which are half a tile: 64 would cost 0.025.
    pub const PRECISE: Self = Self { state_bits: 32, word_bits: 16, prob_bits: 12, lanes: 32 };

    /// Refuses what the layout cannot hold.
    pub fn validate(&self) -> Result<(), ParamsError> {
        self.widths().validate()?;
        match self.lanes {
            1..=64 => Ok(()),
            lanes => Err(ParamsError::OutOfRange { parameter: "lanes", value: lanes.into(), allowed: "1..=64" }),
        }
    }

    /// Least state after a symbol, and every lane's state after its last: `2^(state_bits -
    /// word_bits)`.
    pub fn state_min(&self) -> u32 {
        1 << (self.state_bits - self.word_bits)
    }

    /// Bytes of the states part of a chunk.
    pub fn states_bytes(&self) -> usize {
        usize::from(self.lanes) * usize::from(self.state_bits / 8)
    }
}

impl AnsParams for Params {
    fn check(&self) -> Result<(), ParamsError> {
        self.validate()
    }

    fn widths(&self) -> Widths {
        Widths { state: self.state_bits, word: self.word_bits, prob: self.prob_bits }
    }
}

/// What a decoder looks up by slot, `state & (2^prob_bits - 1)`: three tables of `2^prob_bits`
/// entries.
#[derive(Clone, Copy, Debug)]
pub struct Slots<'a> {
    /// Frequency of the slot's entry: fits a byte with 16-bit states, at most 4096 with 32-bit
    /// states.
    pub freq: &'a [u16],
    /// Slot minus the sum of the frequencies before the entry; less than the frequency.
    pub offset: &'a [u16],
    /// The entry's symbol byte; 0 is [`crate::ESCAPE`].
    pub symbol_byte: &'a [u8],
}

/// Static frequencies of one tensor.
pub type Table = AnsTable<Params>;

/// The parts of a chunk.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// States that the lanes begin with, see the module's layout; `states_bytes()` bytes.
    pub states: &'a [u8],
    /// Words, read forward; a whole number of them.
    pub words: &'a [u8],
    /// Escape bytes in symbol order.
    pub escapes: &'a [u8],
    /// Far symbols.
    pub far: FarList<'a>,
}

impl<'a> Chunk<'a> {
    /// Splits a chunk of `symbols` symbols into its parts. Lengths and the far list are checked,
    /// the rest only decoding can prove.
    pub fn parse(params: Params, symbols: usize, chunk: &'a [u8]) -> Result<Self, DecodeError> {
        let Parts { body, escapes, far } = Parts::parse(chunk, symbols, params.states_bytes())?;
        let (states, words) = body.split_at(params.states_bytes());
        if words.len() % usize::from(params.word_bits / 8) != 0 {
            return Err(DecodeError::WordAlignment { words_bytes: words.len(), word_bits: params.word_bits });
        }
        Ok(Self { states, words, escapes, far })
    }

    /// The state that `lane` begins with.
    pub(crate) fn state(&self, params: Params, lane: usize) -> u32 {
        if params.state_bits == 16 {
            lanes::state_of_planes(self.states, lane)
        } else {
            let (states, _) = self.states.as_chunks::<4>();
            u32::from_le_bytes(states[lane])
        }
    }
}

pub(crate) fn encode(table: &Table, symbols: &[i16], out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let classified = Classified::new(symbols, table.frequencies().coded())?;
    classified.write_header(out);
    let lanes = usize::from(table.params().lanes);
    if table.params().word_bits == 8 {
        let coded = Coded::new::<8>(table.frequencies(), lanes, &classified.codes);
        coded.write_state_planes(out);
        coded.write_byte_words(out);
    } else {
        let coded = Coded::new::<16>(table.frequencies(), lanes, &classified.codes);
        coded.write_wide_states(out);
        coded.write_wide_words(out);
    }
    classified.write_tail(out);
    Ok(())
}

/// Decodes to symbol bytes, far = 0.
pub(crate) fn decode<'a>(table: &Table, bytes: &'a [u8], out: &mut [u8]) -> Result<FarList<'a>, DecodeError> {
    let params = table.params();
    let chunk = Chunk::parse(params, out.len(), bytes)?;
    let mut states = [0; LANES_MAX];
    let states = &mut states[..usize::from(params.lanes)];
    for (lane, state) in states.iter_mut().enumerate() {
        *state = chunk.state(params, lane);
    }
    match params.word_bits {
        8 => lanes::decode::<8>(table.frequencies(), states, chunk.words, out)?,
        _ => lanes::decode::<16>(table.frequencies(), states, chunk.words, out)?,
    }
    resolve(out, chunk.escapes, chunk.far)?;
    Ok(chunk.far)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two symbols of equal frequency: each is one bit, most recent lowest.
    #[test]
    fn a_chunk_by_hand() {
        let params = Params { prob_bits: 1, lanes: 1, ..Params::DEFAULT };
        let table = Table::read(params, &[2, 0, 128, 1, 0, 129, 1, 0]).unwrap();
        let mut out = Vec::new();
        // Backward from 256 = 1_0000_0000b: symbols 1, 0, 1 append bits 1, 0, 1.
        encode(&table, &[1, 0, 1], &mut out).unwrap();
        assert_eq!(out, [0, 0, 0, 0, 0, 0, 0, 0, 0b0000_0101, 0b0000_1000]);
        // Eight bits later the state is full: the ninth symbol first moves the low byte out.
        out.clear();
        encode(&table, &[1, 0, 0, 0, 0, 0, 0, 1, 1], &mut out).unwrap();
        // 1_0000_0000 then backward 1, 1 and five times 0: 16 bits, full, so that the next 0 moves
        // 0110_0000 out.
        let state = 0b1000_0000_0110_0000u32;
        let moved = state as u8;
        let x = (state >> 8) << 1 << 1 | 1;
        assert_eq!(out[8..], [x as u8, (x >> 8) as u8, moved]);
        let mut bytes = [0; 9];
        decode(&table, &out, &mut bytes).unwrap();
        assert_eq!(bytes, [129, 128, 128, 128, 128, 128, 128, 129, 129]);
    }

    #[test]
    fn lane_planes() {
        let params = Params { prob_bits: 1, lanes: 3, ..Params::DEFAULT };
        let table = Table::read(params, &[2, 0, 128, 1, 0, 129, 1, 0]).unwrap();
        let mut out = Vec::new();
        encode(&table, &[1, 0, 0, 1], &mut out).unwrap();
        // lane 0: symbols 1, 1 -> 256 * 4 + 3; lane 1 and 2: symbol 0 -> 512
        assert_eq!(out[8..], [3, 0, 0, 4, 2, 2]);
        let mut bytes = [0; 4];
        decode(&table, &out, &mut bytes).unwrap();
        assert_eq!(bytes, [129, 128, 128, 129]);
    }

    #[test]
    fn what_is_left_over_or_missing_is_named() {
        let params = Params { prob_bits: 1, lanes: 1, ..Params::DEFAULT };
        let table = Table::read(params, &[2, 0, 128, 1, 0, 129, 1, 0]).unwrap();
        let mut good = Vec::new();
        encode(&table, &[1; 9], &mut good).unwrap();
        assert_eq!(good.len(), 11);
        let refused = |bytes: &[u8], symbols: usize| decode(&table, bytes, &mut vec![0; symbols]).unwrap_err();
        assert_eq!(refused(&good[..10], 9), DecodeError::WordsExhausted { available_words: 0 });
        assert_eq!(refused(&[&good[..], &[0]].concat(), 9), DecodeError::WordsLeft { left_words: 1 });
        assert!(matches!(refused(&good, 8), DecodeError::FinalState { lane: 0, expected: 256, .. }));
        assert_eq!(refused(&good[..9], 9), DecodeError::Truncated { needed_bytes: 10, available_bytes: 9 });
        assert_eq!(refused(&good, 0), DecodeError::Empty);
    }
}
