//! `block-ans`: rANS in independent blocks; any block decodes alone, so that thousands decode in
//! parallel.
//!
//! # Method
//! A chunk is cut into blocks of `block_symbols` symbols, the last may be shorter. Each block is
//! one rANS state with its own words, coded by the tensor's one table (arithmetic: `ans.rs`, table:
//! `frequencies.rs`, as for [`crate::rans`]).
//!
//! # Bytes of a chunk (little-endian)
//! ```text
//! u32 far_count | ceil(n / block_symbols) x u16 block_bytes | blocks | far entries (6 bytes each, positions in the chunk)
//!
//! block:  state (state_bits / 8 bytes) | words, read forward ... | ... escape bytes, read backward from the block's end
//! ```
//! Block `b` starts at the sum of the `block_bytes` before it. Its first escaped symbol has the
//! block's last byte, and so on. A `u16` suffices: 16,384 symbols take at most 16,384 words of 2
//! bytes, as many escapes and a state.
//!
//! # Why this suits SIMD and GPUs
//! A thread per block: no ballot, no shared stream, no order between threads; one prefix sum over
//! the index finds all blocks. Escapes that run toward the words need no length of their own, which
//! matters when a block has 32 symbols. Since all blocks have the same number of symbols, threads
//! of a warp stay in step.
//!
//! # Proof of validity
//! A block is valid if and only if its words and its escapes meet exactly, none left between them
//! and none used twice, and its state ends at `STATE_MIN`. A chunk is valid if its blocks fill it
//! and the far list names just the escapes of value 0.
//!
//! # Cost
//! An index entry and a state for every block: 48 bits with 32-bit states, 32 with 16-bit states,
//! of which the state gives back half a word, as it holds symbols above `STATE_MIN`: 40 and 28 bits
//! remain. Measured, bits per symbol above the entropy of 2.25 bits (Gaussian, step 0.9),
//! everything counted:
//!
//! | block symbols | 32 | 64 | 128 | 256 | 512 | 1024 | 4096 |
//! |---|---|---|---|---|---|---|---|
//! | 32-bit state, `p12` | 1.27 | 0.63 | 0.31 | 0.157 | 0.079 | 0.040 | 0.011 |
//! | 16-bit state, `p8` | 0.89 | 0.46 | 0.24 | 0.129 | 0.075 | 0.047 | 0.027 |
//!
//! So blocks of 32 cost about all that entropy coding saves on 4-bit weights with an entropy of 3
//! bits, whatever the state. The default is a compromise: at 0.05 bit, a matrix of 4096 x 4096 has
//! 16,384 blocks, a thread each, which is 512 warps; with blocks of 4096 it would have 128, and most
//! of a large GPU would idle. And 64 blocks are a chunk of 65,536 symbols: the lanes of an AVX-512
//! register, if states have 16 bits. Who wants the ratio alone takes [`mod@crate::rans`]. The scalar decoder
//! takes eight blocks side by side, since one alone would wait for itself: 0.55 G symbols/s at any
//! entropy (one Zen 5 core, shared; example `rates`).

use std::ops::Range;

use crate::ans::{self, pop, push, refill};
use crate::error::{DecodeError, EncodeError, ParamsError};
use crate::escape::{Classified, parse_blocks};
use crate::frequencies::{AnsParams, AnsTable, Widths};
use crate::{ESCAPE, FarList};

/// Parameters of `block-ans`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Params {
    /// 16 or 32.
    pub state_bits: u8,
    /// 8 with 16-bit states, 16 with 32-bit states.
    pub word_bits: u8,
    /// Frequencies sum to `2^prob_bits`: 1..=8 with 16-bit states, 1..=12 with 32-bit states.
    pub prob_bits: u8,
    /// Symbols in a block (the last of a chunk may be shorter), 32..=16384.
    pub block_symbols: u32,
}

impl Params {
    /// 16-bit states, 8-bit frequencies, blocks of 1024: 0.007 to 0.02 bit more than 32-bit states with 12-bit frequencies, and ten
    /// times as fast where 64 blocks decode in registers.
    pub const DEFAULT: Self = Self { state_bits: 16, word_bits: 8, prob_bits: 8, block_symbols: 1024 };

    /// Refuses what the layout cannot hold.
    pub fn validate(&self) -> Result<(), ParamsError> {
        self.widths().validate()?;
        match self.block_symbols {
            32..=16384 => Ok(()),
            value => Err(ParamsError::OutOfRange { parameter: "block_symbols", value, allowed: "32..=16384" }),
        }
    }

    /// Least state after a symbol, and a block's state after its last: `2^(state_bits -
    /// word_bits)`.
    pub fn state_min(&self) -> u32 {
        1 << (self.state_bits - self.word_bits)
    }

    /// Bytes of the state that a block begins with.
    pub fn state_bytes(&self) -> usize {
        usize::from(self.state_bits / 8)
    }

    /// Blocks in a chunk of `symbols` symbols.
    pub fn blocks(&self, symbols: usize) -> usize {
        symbols.div_ceil(self.block_symbols as usize)
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

/// Static frequencies of one tensor.
pub type Table = AnsTable<Params>;

/// The parts of a chunk.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// (blocks,) u16 length of every block, bytes; they sum to the length of `blocks`, and each
    /// holds at least a state.
    pub block_bytes: &'a [u8],
    /// All blocks, one after the other.
    pub blocks: &'a [u8],
    /// Far symbols (positions in the chunk).
    pub far: FarList<'a>,
}

impl<'a> Chunk<'a> {
    /// Splits a chunk of `symbols` symbols into its parts. Lengths and the far list are checked,
    /// the rest only decoding can prove.
    pub fn parse(params: Params, symbols: usize, chunk: &'a [u8]) -> Result<Self, DecodeError> {
        let index_bytes = 2 * params.blocks(symbols);
        let (block_bytes, blocks, far) = parse_blocks(chunk, symbols, index_bytes)?;
        let view = Self { block_bytes, blocks, far };
        let mut end = 0;
        for (block, range) in view.block_ranges().enumerate() {
            if range.len() < params.state_bytes() {
                return Err(DecodeError::BlockTruncated { block, block_bytes: range.len() });
            }
            end = range.end;
        }
        if end > blocks.len() {
            let (needed_bytes, available_bytes) = (chunk.len() + (end - blocks.len()), chunk.len());
            return Err(DecodeError::Truncated { needed_bytes: needed_bytes as u64, available_bytes: available_bytes as u64 });
        }
        if end < blocks.len() {
            return Err(DecodeError::TrailingBytes { extra_bytes: (blocks.len() - end) as u64 });
        }
        Ok(view)
    }

    /// Where each block lies in `blocks`, in order.
    pub fn block_ranges(&self) -> impl ExactSizeIterator<Item = Range<usize>> + use<'a> {
        let (lengths, _) = self.block_bytes.as_chunks::<2>();
        let mut start = 0;
        lengths.iter().map(move |&length| {
            let range = start..start + usize::from(u16::from_le_bytes(length));
            start = range.end;
            range
        })
    }
}

pub(crate) fn encode(table: &Table, symbols: &[i16], out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let classified = Classified::new(symbols, table.frequencies().coded())?;
    classified.write_far_count(out);
    match table.params().word_bits {
        8 => encode_blocks::<8>(table, &classified, out),
        _ => encode_blocks::<16>(table, &classified, out),
    }
    classified.write_far(out);
    Ok(())
}

fn encode_blocks<const WORD_BITS: u32>(table: &Table, classified: &Classified, out: &mut Vec<u8>) {
    let params = table.params();
    let (entries, prob_bits) = (table.frequencies().push_entries(), u32::from(params.prob_bits));
    let block_symbols = params.block_symbols as usize;
    let mut index = out.len();
    out.resize(index + 2 * params.blocks(classified.codes.len()), 0);
    let mut escapes = classified.escapes.as_slice();
    // Last word first; one more than symbols, since every symbol writes the word that it might
    // move.
    let mut words = vec![0u16; block_symbols + 1];
    for codes in classified.codes.chunks(block_symbols) {
        let mut state = ans::state_min::<WORD_BITS>();
        let mut count = 0;
        for &code in codes.iter().rev() {
            let (word, moved) = push::<WORD_BITS>(&mut state, entries[usize::from(code)], prob_bits);
            words[count] = word;
            count += usize::from(moved);
        }
        let start = out.len();
        out.extend(&state.to_le_bytes()[..params.state_bytes()]);
        let words = words[..count].iter().rev();
        if WORD_BITS == 8 {
            out.extend(words.map(|&word| word as u8));
        } else {
            out.extend(words.flat_map(|word| word.to_le_bytes()));
        }
        let escaped = codes.iter().filter(|&&code| code == ESCAPE).count();
        let (own, rest) = escapes.split_at(escaped);
        escapes = rest;
        out.extend(own.iter().rev());
        let block_bytes = (out.len() - start) as u16;
        out[index..index + 2].copy_from_slice(&block_bytes.to_le_bytes());
        index += 2;
    }
}

/// Decodes to symbol bytes, far = 0.
pub(crate) fn decode<'a>(table: &Table, bytes: &'a [u8], out: &mut [u8]) -> Result<FarList<'a>, DecodeError> {
    let chunk = Chunk::parse(table.params(), out.len(), bytes)?;
    match table.params().word_bits {
        8 => decode_chunk::<8>(table, &chunk, out)?,
        _ => decode_chunk::<16>(table, &chunk, out)?,
    }
    Ok(chunk.far)
}

/// Blocks that are decoded side by side: one alone would wait for itself at every symbol.
const SIDE_BY_SIDE: usize = 8;

fn decode_chunk<const WORD_BITS: u32>(table: &Table, chunk: &Chunk<'_>, out: &mut [u8]) -> Result<(), DecodeError> {
    let block_symbols = table.params().block_symbols as usize;
    let mut ranges = chunk.block_ranges();
    let mut next = || ranges.next().map_or(&[][..], |range| &chunk.blocks[range]);
    let mut far = FarCursor { entries: chunk.far.iter() };
    let mut groups = out.chunks_exact_mut(SIDE_BY_SIDE * block_symbols);
    let mut first = 0;
    for group in &mut groups {
        let blocks: [_; SIDE_BY_SIDE] = std::array::from_fn(|_| next());
        decode_blocks::<WORD_BITS, SIDE_BY_SIDE>(table, first, blocks, group, block_symbols, &mut far)?;
        first += SIDE_BY_SIDE;
    }
    for codes in groups.into_remainder().chunks_mut(block_symbols) {
        let symbols = codes.len();
        decode_blocks::<WORD_BITS, 1>(table, first, [next()], codes, symbols, &mut far)?;
        first += 1;
    }
    far.finish()
}

/// Decodes `N` blocks of `symbols` symbols, of which the first is block `first` of the chunk.
/// `out`: (N, symbols)
fn decode_blocks<const WORD_BITS: u32, const N: usize>(
    table: &Table,
    first: usize,
    blocks: [&[u8]; N],
    out: &mut [u8],
    symbols: usize,
    far: &mut FarCursor<impl Iterator<Item = crate::Far>>,
) -> Result<(), DecodeError> {
    let params = table.params();
    let (entries, prob_bits) = (table.frequencies().pop_entries(), u32::from(params.prob_bits));
    let word_bytes = WORD_BITS as usize / 8;
    let read = |block: &[u8], at: usize, bytes: usize| -> u32 {
        // Beyond the end, zeros; that it was beyond shows when the block is done.
        block.get(at..at + bytes).map_or(0, |word| word.iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte)))
    };
    let mut states = blocks.map(|block| read(block, 0, params.state_bytes()));
    let mut positions = [params.state_bytes(); N];
    for i in 0..symbols {
        for lane in 0..N {
            out[lane * symbols + i] = pop(&mut states[lane], entries, prob_bits);
            let word = read(blocks[lane], positions[lane], word_bytes);
            positions[lane] += refill::<WORD_BITS>(&mut states[lane], word) * word_bytes;
        }
    }
    for (lane, codes) in out.chunks_mut(symbols).enumerate() {
        let (block, bytes) = (first + lane, blocks[lane]);
        let expected = params.state_min();
        if states[lane] != expected {
            return Err(DecodeError::FinalState { lane: block, state: states[lane], expected });
        }
        let escapes = bytes
            .get(positions[lane]..)
            .ok_or_else(|| DecodeError::WordsExhausted { available_words: (bytes.len() - params.state_bytes()) / word_bytes })?;
        let start = block * params.block_symbols as usize;
        let mut left = escapes.iter().rev();
        for (i, code) in codes.iter_mut().enumerate().filter(|(_, code)| **code == ESCAPE) {
            let position = start + i;
            *code = *left.next().ok_or(DecodeError::EscapesExhausted { position })?;
            if *code == 0 {
                far.expect(position)?;
            }
        }
        if left.len() > 0 {
            return Err(DecodeError::BlockGap { block, gap_bytes: left.len() });
        }
    }
    Ok(())
}

/// Proves that escapes of value 0 and the far list name the same positions.
struct FarCursor<I> {
    entries: I,
}

impl<I: Iterator<Item = crate::Far>> FarCursor<I> {
    fn expect(&mut self, position: usize) -> Result<(), DecodeError> {
        match self.entries.next() {
            Some(far) if far.position as usize == position => Ok(()),
            _ => Err(DecodeError::FarMismatch { position }),
        }
    }

    fn finish(mut self) -> Result<(), DecodeError> {
        match self.entries.next() {
            Some(far) => Err(DecodeError::FarMismatch { position: far.position as usize }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> Params {
        Params { state_bits: 16, word_bits: 8, prob_bits: 2, block_symbols: 32 }
    }

    /// Frequencies 2 (ESCAPE), 1, 1 of 4: an escaped symbol is one bit, the others are two.
    fn table() -> Table {
        Table::read(params(), &[3, 0, 0, 2, 0, 128, 1, 0, 129, 1, 0]).unwrap()
    }

    #[test]
    fn a_chunk_by_hand() {
        let mut out = Vec::new();
        // Backward from 256: symbol 1 (cum 3): 1027; 9 escapes, state 1027 -> (513 << 2) + 1 =
        // 2053; -200 escapes: 2053 -> (1026 << 2) + 1 = 4105
        encode(&table(), &[-200, 9, 1], &mut out).unwrap();
        assert_eq!(out, [1, 0, 0, 0, 4, 0, 0x09, 0x10, 137, 0, 0, 0, 0, 0, 56, 255]);
        let mut bytes = [0; 3];
        assert_eq!(decode(&table(), &out, &mut bytes).unwrap().len(), 1);
        assert_eq!(bytes, [0, 137, 129]);
    }

    #[test]
    fn blocks_are_independent() {
        let symbols: Vec<i16> = (0..100).map(|i| i % 2).collect();
        let mut out = Vec::new();
        encode(&table(), &symbols, &mut out).unwrap();
        let chunk = Chunk::parse(params(), 100, &out).unwrap();
        let ranges: Vec<_> = chunk.block_ranges().collect();
        assert_eq!(ranges.len(), 4);
        assert_eq!(chunk.blocks[ranges[0].clone()], chunk.blocks[ranges[1].clone()]);
        // The last block alone, as a chunk of its own.
        let mut alone = vec![0, 0, 0, 0, ranges[3].len() as u8, 0];
        alone.extend(&chunk.blocks[ranges[3].clone()]);
        let mut bytes = [0; 4];
        decode(&table(), &alone, &mut bytes).unwrap();
        assert_eq!(bytes, [128, 129, 128, 129]);
    }

    #[test]
    fn what_does_not_meet_is_named() {
        let refused = |bytes: &[u8]| decode(&table(), bytes, &mut [0; 3]).unwrap_err();
        // As by hand, without the far symbol: 8, 9, 1.
        assert!(decode(&table(), &[0, 0, 0, 0, 4, 0, 9, 16, 137, 136], &mut [0; 3]).is_ok());
        assert_eq!(refused(&[0, 0, 0, 0, 5, 0, 9, 16, 1, 137, 136]), DecodeError::BlockGap { block: 0, gap_bytes: 1 });
        assert_eq!(refused(&[0, 0, 0, 0, 3, 0, 9, 16, 137]), DecodeError::EscapesExhausted { position: 1 });
        assert_eq!(refused(&[0, 0, 0, 0, 1, 0, 9]), DecodeError::BlockTruncated { block: 0, block_bytes: 1 });
        assert_eq!(refused(&[0, 0, 0, 0, 5, 0, 9, 16, 137, 136]), DecodeError::Truncated { needed_bytes: 11, available_bytes: 10 });
        assert_eq!(refused(&[0, 0, 0, 0, 3, 0, 9, 16, 137, 136]), DecodeError::TrailingBytes { extra_bytes: 1 });
        assert_eq!(refused(&[0, 0, 0, 0, 4, 0, 9, 16, 137, 0]), DecodeError::FarMismatch { position: 0 });
        assert!(matches!(refused(&[0, 0, 0, 0, 4, 0, 9, 17, 137, 136]), DecodeError::FinalState { lane: 0, .. }));
    }
}
