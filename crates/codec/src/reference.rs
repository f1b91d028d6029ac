//! The slow decoder: each codec as its layout says it, one symbol after the other, every check in
//! place.
//!
//! It shares with the fast decoders only the cutting of a chunk into its parts (`parse`). It is
//! what "decodes correctly" means: the fast decoders accept the same chunks and give the same
//! symbols, and tests compare them on good and on broken chunks. Which error is reported may
//! differ, since fast decoders notice later.

use crate::error::DecodeError;
use crate::planes::{self, Child};
use crate::{ESCAPE, FarList, SYMBOL_BIAS, Table, block_ans, fixed, huffman, pairs, rans, rans_pairs, tiered};

/// Decodes a chunk of `symbols` symbols.
pub fn decode_chunk(table: &Table, chunk: &[u8], symbols: usize) -> Result<Vec<i16>, DecodeError> {
    match table {
        Table::Fixed(table) => decode_fixed(table, chunk, symbols),
        Table::Huffman(table) => decode_huffman(table, chunk, symbols),
        Table::Rans(table) => decode_rans(table, chunk, symbols),
        Table::BlockAns(table) => decode_block_ans(table, chunk, symbols),
        Table::Tiered(table) => decode_tiered(table, chunk, symbols),
        Table::RansPairs(table) => decode_rans_pairs(table, chunk, symbols),
    }
}

fn decode_fixed(table: &fixed::Table, chunk: &[u8], symbols: usize) -> Result<Vec<i16>, DecodeError> {
    let params = table.params();
    let chunk = fixed::Chunk::parse(params, symbols, chunk)?;
    let bits = usize::from(params.bits);
    let bit = |index: usize| u16::from(chunk.fields[index / 8] >> (index % 8) & 1);
    // Where bit `k` of field `i` lies among the bits of the fields.
    let place = |i: usize, k: usize| {
        let (tile, j) = (i / 64, i % 64);
        match bits {
            8 => 8 * i + k,
            2 | 4 => {
                let tiles = 8 / bits;
                8 * (tile / tiles * 64 + j) + tile % tiles * bits + k
            }
            _ => tile * 64 * bits + k * 64 + j,
        }
    };
    let field = |i: usize| (0..bits).map(|k| bit(place(i, k)) << k).sum::<u16>() as i16;
    let fields_stored = 8 * chunk.fields.len() / bits;
    if (symbols..fields_stored).any(|i| field(i) != 0) {
        return Err(DecodeError::PaddingNotZero);
    }
    let mut escapes = Escapes::new(chunk.escapes, chunk.far);
    let mut out = Vec::new();
    for i in 0..symbols {
        out.push(match (table.has_escape(), field(i)) {
            (true, 0) => escapes.next(i)?,
            (true, field) => table.base() + field - 1,
            (false, field) => table.base() + field,
        });
    }
    escapes.finish()?;
    Ok(out)
}

fn decode_huffman(table: &huffman::Table, chunk: &[u8], symbols: usize) -> Result<Vec<i16>, DecodeError> {
    let params = table.params();
    let chunk = huffman::Chunk::parse(params, symbols, chunk)?;
    if params.has_planes() {
        return decode_planes(table, &chunk, symbols);
    }
    // Canonical codes: by length, then symbol byte, counted upward.
    let mut by_length: Vec<(u8, u8)> = table.entries().iter().map(|&(byte, bits)| (bits, byte)).collect();
    by_length.sort_unstable();
    let mut codes = Vec::new();
    let (mut code, mut length) = (0u32, 0);
    for (bits, byte) in by_length {
        code <<= bits - length;
        length = bits;
        codes.push((bits, code, byte));
        code += 1;
    }

    let mut streams = chunk.streams;
    let mut lanes = Vec::new();
    for length in chunk.lengths() {
        let (stream, rest) = streams.split_at(length as usize);
        streams = rest;
        lanes.push(stream.iter().flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1)));
    }
    let mut used_bits = vec![0u64; lanes.len()];
    let mut escapes = Escapes::new(chunk.escapes, chunk.far);
    let mut out = Vec::new();
    for i in 0..symbols {
        let lane = i % lanes.len();
        let (mut code, mut bits) = (0, 0);
        let byte = loop {
            if let Some(&(_, _, byte)) = codes.iter().find(|entry| (entry.0, entry.1) == (bits, code)) {
                break byte;
            }
            let available_bits = used_bits[lane];
            let bit = lanes[lane].next().ok_or(DecodeError::LaneBits { lane, used_bits: available_bits + 1, available_bits })?;
            code = code << 1 | u32::from(bit);
            bits += 1;
            used_bits[lane] += 1;
        };
        out.push(escapes.symbol(i, byte)?);
    }
    for (lane, bits) in lanes.into_iter().enumerate() {
        let left: Vec<u8> = bits.collect();
        if left.len() >= 8 {
            let used_bits = used_bits[lane];
            return Err(DecodeError::LaneBits { lane, used_bits, available_bits: used_bits + left.len() as u64 });
        }
        if left.contains(&1) {
            return Err(DecodeError::PaddingNotZero);
        }
    }
    escapes.finish()?;
    Ok(out)
}

/// From the root down for each symbol in turn: every node gives its next bit.
fn decode_planes(table: &huffman::Table, chunk: &huffman::Chunk<'_>, symbols: usize) -> Result<Vec<i16>, DecodeError> {
    let nodes = table.nodes();
    let mut planes = [planes::Plane::default(); planes::NODES_MAX];
    planes::find(nodes, symbols, chunk.streams, &mut planes)?;
    let mut next_bit = planes.map(|plane| 8 * plane.start);
    let mut escapes = Escapes::new(chunk.escapes, chunk.far);
    let mut out = Vec::new();
    for i in 0..symbols {
        let mut at = if nodes.is_empty() { Child::Leaf(table.entries()[0].0) } else { Child::Inner(0) };
        let byte = loop {
            match at {
                Child::Leaf(byte) => break byte,
                Child::Inner(node) => {
                    let bit = &mut next_bit[usize::from(node)];
                    at = nodes[usize::from(node)][usize::from(chunk.streams[*bit / 8] >> (*bit % 8) & 1)];
                    *bit += 1;
                }
            }
        };
        out.push(escapes.symbol(i, byte)?);
    }
    escapes.finish()?;
    Ok(out)
}

fn decode_rans(table: &rans::Table, chunk: &[u8], symbols: usize) -> Result<Vec<i16>, DecodeError> {
    let params = table.params();
    let chunk = rans::Chunk::parse(params, symbols, chunk)?;
    let lanes = usize::from(params.lanes);
    let mut states: Vec<u32> = (0..lanes)
        .map(|lane| match params.state_bits {
            16 => u32::from(chunk.states[lane]) + 256 * u32::from(chunk.states[lanes + lane]),
            _ => little_endian(&chunk.states[4 * lane..4 * lane + 4]),
        })
        .collect();
    let mut words = chunk.words.chunks(usize::from(params.word_bits / 8));
    let available_words = words.len();
    let mut escapes = Escapes::new(chunk.escapes, chunk.far);
    let mut out = Vec::new();
    for i in 0..symbols {
        let state = &mut states[i % lanes];
        let byte = take_symbol(state, table.entries(), params.prob_bits);
        if *state < params.state_min() {
            let word = words.next().ok_or(DecodeError::WordsExhausted { available_words })?;
            *state = (*state << params.word_bits) + little_endian(word);
        }
        out.push(escapes.symbol(i, byte)?);
    }
    if words.len() > 0 {
        return Err(DecodeError::WordsLeft { left_words: words.len() });
    }
    check_final_states(&states, 0, params.state_min())?;
    escapes.finish()?;
    Ok(out)
}

fn decode_block_ans(table: &block_ans::Table, chunk: &[u8], symbols: usize) -> Result<Vec<i16>, DecodeError> {
    let params = table.params();
    let chunk = block_ans::Chunk::parse(params, symbols, chunk)?;
    let mut far = chunk.far.iter();
    let mut out = Vec::new();
    for (block, range) in chunk.block_ranges().enumerate() {
        let (state, rest) = chunk.blocks[range].split_at(params.state_bytes());
        let mut state = little_endian(state);
        let (mut words_end, mut escapes_start) = (0, rest.len());
        let block_symbols = (symbols - out.len()).min(params.block_symbols as usize);
        for _ in 0..block_symbols {
            let position = out.len();
            let byte = take_symbol(&mut state, table.entries(), params.prob_bits);
            if state < params.state_min() {
                let end = words_end + usize::from(params.word_bits / 8);
                if end > escapes_start {
                    return Err(DecodeError::WordsExhausted { available_words: words_end });
                }
                state = (state << params.word_bits) + little_endian(&rest[words_end..end]);
                words_end = end;
            }
            if byte != ESCAPE {
                out.push(i16::from(byte) - SYMBOL_BIAS);
                continue;
            }
            if escapes_start == words_end {
                return Err(DecodeError::EscapesExhausted { position });
            }
            escapes_start -= 1;
            out.push(match rest[escapes_start] {
                0 => match far.next() {
                    Some(far) if far.position as usize == position => far.symbol,
                    _ => return Err(DecodeError::FarMismatch { position }),
                },
                byte => i16::from(byte) - SYMBOL_BIAS,
            });
        }
        if words_end != escapes_start {
            return Err(DecodeError::BlockGap { block, gap_bytes: escapes_start - words_end });
        }
        check_final_states(&[state], block, params.state_min())?;
    }
    match far.next() {
        Some(far) => Err(DecodeError::FarMismatch { position: far.position as usize }),
        None => Ok(out),
    }
}

fn decode_tiered(table: &tiered::Table, chunk: &[u8], symbols: usize) -> Result<Vec<i16>, DecodeError> {
    let chunk = tiered::Chunk::parse(table, symbols, chunk)?;
    // Of each tier the fields, as they lie in its lines.
    let mut tiers = Vec::new();
    for (tier, (count, bytes)) in table.tiers().iter().zip(chunk.tiers) {
        let bits = usize::from(tier.bits());
        let bit = |line: usize, byte: usize, bit: usize| bytes.get(64 * line + byte).map_or(0, |byte| usize::from(byte >> bit & 1));
        let field = |i: usize| {
            let (eight, tile, j) = (i / 512, i / 64 % 8, i % 64);
            let place = |k: usize| match (bits, tile, k) {
                (3, 6, 2) => (1, 6),
                (3, 7, 2) => (1, 7),
                (3, 6, _) => (0, 6 + k),
                (3, 7, _) => (2, 6 + k),
                (3, ..) => (tile / 2, tile % 2 * 3 + k),
                (4, ..) => (tile / 2, tile % 2 * 4 + k),
                (5, 7, 3) => (1, 5),
                (5, 7, 4) => (3, 5),
                (5, 5.., 0..3) => (2 * (tile - 5), 5 + k),
                (5, 5.., _) => (2 * (tile - 5) + 1, 3 + k),
                (5, ..) => (tile, k),
                _ if tile % 4 < 3 => (tile / 4 * 3 + tile % 4, k),
                _ => (tile / 4 * 3 + k / 2, 6 + k % 2),
            };
            (0..bits).map(|k| (place(k), k)).map(|((line, at), k)| bit(eight * bits + line, j, at) << k).sum::<usize>()
        };
        if (count..count.next_multiple_of(512)).any(|i| field(i) != 0) {
            return Err(DecodeError::PaddingNotZero);
        }
        tiers.push((0..count).map(field).collect::<Vec<_>>().into_iter());
    }
    let mut escapes = chunk.escapes.iter();
    let last = tiers.len().saturating_sub(1);
    let mut pairs = Vec::new();
    for _ in 0..pairs::pairs_of(symbols) {
        let mut pair = ESCAPE;
        for (index, (tier, fields)) in table.tiers().iter().zip(&mut tiers).enumerate() {
            // The first tier has a field for every pair.
            let count = chunk.tiers[index].0;
            let none_left = || DecodeError::TierCount { tier: index - 1, escapes: count + 1, pairs: count };
            let field = fields.next().ok_or_else(none_left)?;
            pair = tier.pair_bytes()[field];
            if pair != ESCAPE {
                break;
            }
        }
        if pair == ESCAPE {
            let count = chunk.escapes.len();
            pair = *escapes.next().ok_or(DecodeError::TierCount { tier: last, escapes: count + 1, pairs: count })?;
        }
        pairs.push(pair);
    }
    let left = tiers.iter().map(ExactSizeIterator::len).chain([escapes.len()]).skip(1);
    for (tier, left) in left.enumerate() {
        if left > 0 {
            let pairs = if tier == last { chunk.escapes.len() } else { chunk.tiers[tier + 1].0 };
            return Err(DecodeError::TierCount { tier, escapes: pairs - left, pairs });
        }
    }
    symbols_of_pairs(&pairs, table.window(), chunk.raw_lines, chunk.listed, chunk.far, symbols)
}

fn decode_rans_pairs(table: &rans_pairs::Table, chunk: &[u8], symbols: usize) -> Result<Vec<i16>, DecodeError> {
    let chunk = rans_pairs::Chunk::parse(table, symbols, chunk)?;
    let mut states: Vec<u32> = (0..64).map(|lane| u32::from(chunk.states[lane]) + 256 * u32::from(chunk.states[64 + lane])).collect();
    let mut words = chunk.words.iter();
    let mut escapes = chunk.escapes.iter();
    let mut pairs = Vec::new();
    for i in 0..pairs::pairs_of(symbols) {
        let state = &mut states[i % 64];
        let mut pair = take_symbol(state, table.entries(), 8);
        if *state < 256 {
            let word = words.next().ok_or(DecodeError::WordsExhausted { available_words: chunk.words.len() })?;
            *state = *state * 256 + u32::from(*word);
        }
        if pair == ESCAPE {
            pair = *escapes.next().ok_or(DecodeError::EscapesExhausted { position: i / 64 * 128 + i % 64 })?;
        }
        pairs.push(pair);
    }
    if words.len() > 0 {
        return Err(DecodeError::WordsLeft { left_words: words.len() });
    }
    if escapes.len() > 0 {
        return Err(DecodeError::EscapesLeft { left_bytes: escapes.len() });
    }
    check_final_states(&states, 0, 256)?;
    symbols_of_pairs(&pairs, table.window(), chunk.raw_lines, chunk.listed, chunk.far, symbols)
}

fn symbols_of_pairs(
    pairs: &[u8],
    window: pairs::Window,
    raw_lines: &[u8],
    listed: pairs::Listed<'_>,
    far: FarList<'_>,
    symbols: usize,
) -> Result<Vec<i16>, DecodeError> {
    let raw_bits = usize::from(window.raw_bits());
    // A lane's symbols follow each other, tile by tile, in the bits of its bytes.
    let raw = |lane: usize, tile: usize| match raw_bits {
        0 => 0,
        _ => {
            let bit = tile * raw_bits;
            i16::from(raw_lines[bit / 8 * 64 + lane] >> (bit % 8)) % (1 << raw_bits)
        }
    };
    let room = (8 * raw_lines.len()).checked_div(raw_bits).unwrap_or(0);
    if (symbols..room).any(|i| raw(i % 64, i / 64) != 0) {
        return Err(DecodeError::PaddingNotZero);
    }
    let mut listed_symbols = Escapes::new(listed.bytes(), far);
    let mut listed = listed.iter().peekable();
    let mut out = Vec::new();
    for i in 0..symbols {
        let pair = i16::from(pairs[i / 128 * 64 + i % 64]);
        let nibble = if i % 128 < 64 { pair % 16 } else { pair / 16 };
        let place = nibble * (1 << raw_bits) + raw(i % 64, i / 64);
        out.push(match listed.next_if(|&(position, _)| position == i) {
            Some(_) if place != i16::from(pairs::LISTED_NIBBLE) * (1 << raw_bits) => return Err(DecodeError::ListedNibble { position: i }),
            Some(_) => listed_symbols.next(i)?,
            None => i16::from(window.base()) + place - SYMBOL_BIAS,
        });
    }
    // Pairs of which only the first symbol is there.
    for i in symbols.saturating_sub(64)..symbols {
        if i % 128 < 64 && i + 64 >= symbols && pairs[i / 128 * 64 + i % 64] / 16 != 0 {
            return Err(DecodeError::PaddingNotZero);
        }
    }
    listed_symbols.finish()?;
    Ok(out)
}

/// The symbol whose frequencies cover the slot of `state`; `state` becomes what it was before that
/// symbol was coded.
fn take_symbol(state: &mut u32, entries: &[(u8, u16)], prob_bits: u8) -> u8 {
    let slot = *state % (1 << prob_bits);
    let mut cum = 0;
    for &(byte, freq) in entries {
        let freq = u32::from(freq);
        if slot < cum + freq {
            *state = freq * (*state >> prob_bits) + slot - cum;
            return byte;
        }
        cum += freq;
    }
    unreachable!("frequencies of a table sum to 2^prob_bits");
}

fn check_final_states(states: &[u32], first: usize, expected: u32) -> Result<(), DecodeError> {
    match states.iter().position(|&state| state != expected) {
        Some(lane) => Err(DecodeError::FinalState { lane: first + lane, state: states[lane], expected }),
        None => Ok(()),
    }
}

fn little_endian(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |value, &byte| value * 256 + u32::from(byte))
}

/// Escape bytes in symbol order, and the far symbols among them.
struct Escapes<'a> {
    bytes: std::slice::Iter<'a, u8>,
    far: FarList<'a>,
    far_used: usize,
}

impl<'a> Escapes<'a> {
    fn new(bytes: &'a [u8], far: FarList<'a>) -> Self {
        Self { bytes: bytes.iter(), far, far_used: 0 }
    }

    /// The symbol of a decoded `byte` at `position`.
    fn symbol(&mut self, position: usize, byte: u8) -> Result<i16, DecodeError> {
        if byte == ESCAPE { self.next(position) } else { Ok(i16::from(byte) - SYMBOL_BIAS) }
    }

    /// The escaped symbol at `position`.
    fn next(&mut self, position: usize) -> Result<i16, DecodeError> {
        match self.bytes.next() {
            None => Err(DecodeError::EscapesExhausted { position }),
            Some(0) => match self.far.get(self.far_used) {
                Some(far) if far.position as usize == position => {
                    self.far_used += 1;
                    Ok(far.symbol)
                }
                _ => Err(DecodeError::FarMismatch { position }),
            },
            Some(&byte) => Ok(i16::from(byte) - SYMBOL_BIAS),
        }
    }

    fn finish(self) -> Result<(), DecodeError> {
        if self.bytes.len() > 0 {
            return Err(DecodeError::EscapesLeft { left_bytes: self.bytes.len() });
        }
        match self.far.get(self.far_used) {
            Some(far) => Err(DecodeError::FarMismatch { position: far.position as usize }),
            None => Ok(()),
        }
    }
}
