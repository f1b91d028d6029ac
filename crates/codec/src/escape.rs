//! Symbols without an entry of their own: escape bytes and the far list, the same for every codec.
//!
//! Weights have a few large outliers. Giving each an entry would fill the decoder's tables, which
//! should stay in registers, with symbols that hardly occur. So a table has entries for the *core
//! alphabet* only, and one more, ESCAPE, for all other symbols:
//!
//! - a **core symbol** (-127..=127) without an entry is coded as ESCAPE, and its *symbol byte*
//!   (symbol + 128, 1..=255) is appended to the chunk's escape bytes. A SIMD decoder needs one
//!   `vpexpandb` to put 64 of them in place;
//! - a **far symbol** (all others) is coded as ESCAPE with escape byte 0, and listed in the *far
//!   list* with its position. Decoders of bytes leave the byte 0, which dot products take for -128,
//!   and patch the difference.
//!
//! The far list is `far_count` entries of 6 bytes, ascending by position: `u32 position | i16
//! symbol`. It is redundant with the escape bytes of value 0: both must name the same positions.

use crate::error::{DecodeError, EncodeError};
use crate::histogram::symbol_byte;
use crate::{CHUNK_SYMBOLS_MAX, ESCAPE, SYMBOL_BIAS};

/// Bytes of one far entry: u32 position, i16 symbol.
pub const FAR_BYTES: usize = 6;

/// What an escaped core symbol costs beside its code, bits.
pub(crate) const ESCAPED_BITS: f64 = 8.0;
/// What a far symbol costs beside its code: an escape byte and a far entry, bits.
pub(crate) const FAR_BITS: f64 = 8.0 + 8.0 * FAR_BYTES as f64;

/// A symbol outside -127..=127.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Far {
    /// Index in the chunk, in symbols.
    pub position: u32,
    /// The symbol, outside -127..=127.
    pub symbol: i16,
}

/// The far symbols of a chunk by ascending position: a view of the chunk's bytes, checked when
/// parsed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FarList<'a> {
    bytes: &'a [u8],
}

impl<'a> FarList<'a> {
    /// Takes `bytes`, a whole number of entries, for a far list of a chunk of `symbols` symbols, if they
    /// are one.
    pub(crate) fn parse(bytes: &'a [u8], symbols: usize) -> Result<Self, DecodeError> {
        let list = Self { bytes };
        let mut next = 0;
        for (entry, Far { position, symbol }) in list.iter().enumerate() {
            let index = position as usize;
            if index < next || index >= symbols || symbol_byte(symbol) != 0 {
                return Err(DecodeError::FarEntry { entry, position, symbol });
            }
            next = index + 1;
        }
        Ok(list)
    }

    /// Far symbols in the chunk.
    pub fn len(&self) -> usize {
        self.bytes.len() / FAR_BYTES
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The entry `index`, if there is one.
    pub fn get(&self, index: usize) -> Option<Far> {
        let entry = self.bytes.chunks_exact(FAR_BYTES).nth(index)?;
        Some(Self::entry(entry))
    }

    /// The entries by ascending position.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Far> + use<'a> {
        self.bytes.chunks_exact(FAR_BYTES).map(Self::entry)
    }

    /// `entry`: (6,) bytes
    fn entry(entry: &[u8]) -> Far {
        Far { position: u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]), symbol: i16::from_le_bytes([entry[4], entry[5]]) }
    }
}

/// Symbols split into what the coder sees and what goes beside it.
pub(crate) struct Classified {
    /// (symbols,) symbol byte of the table entry; 0 = ESCAPE
    pub(crate) codes: Vec<u8>,
    /// (escaped symbols,) symbol bytes, 0 = far, in symbol order
    pub(crate) escapes: Vec<u8>,
    far: Vec<Far>,
}

impl Classified {
    /// `coded[b]`: whether symbol byte `b` (0: ESCAPE) has an entry.
    pub(crate) fn new(symbols: &[i16], coded: &[bool; 256]) -> Result<Self, EncodeError> {
        check_encodable(symbols)?;
        let mut codes: Vec<u8> = symbols.iter().map(|&symbol| symbol_byte(symbol)).collect();
        let (mut escapes, mut far) = (Vec::new(), Vec::new());
        for (position, code) in codes.iter_mut().enumerate() {
            if *code != ESCAPE && coded[usize::from(*code)] {
                continue;
            }
            let symbol = symbols[position];
            if !coded[usize::from(ESCAPE)] {
                return Err(EncodeError::SymbolNotInTable { position, symbol });
            }
            escapes.push(*code);
            if *code == 0 {
                far.push(Far { position: position as u32, symbol });
            }
            *code = ESCAPE;
        }
        Ok(Self { codes, escapes, far })
    }

    /// The header `u32 escape_bytes | u32 far_count`. Both fit: there are at most
    /// `CHUNK_SYMBOLS_MAX` of each.
    pub(crate) fn write_header(&self, out: &mut Vec<u8>) {
        out.extend((self.escapes.len() as u32).to_le_bytes());
        self.write_far_count(out);
    }

    pub(crate) fn write_far_count(&self, out: &mut Vec<u8>) {
        out.extend((self.far.len() as u32).to_le_bytes());
    }

    /// The end of a chunk: escape bytes, then the far list.
    pub(crate) fn write_tail(&self, out: &mut Vec<u8>) {
        self.write_escapes(out);
        self.write_far(out);
    }

    pub(crate) fn write_escapes(&self, out: &mut Vec<u8>) {
        out.extend(&self.escapes);
    }

    pub(crate) fn write_far(&self, out: &mut Vec<u8>) {
        write_far(&self.far, out);
    }
}

/// The entries of a far list.
pub(crate) fn write_far(far: &[Far], out: &mut Vec<u8>) {
    for far in far {
        out.extend(far.position.to_le_bytes());
        out.extend(far.symbol.to_le_bytes());
    }
}

/// A chunk cut at its header and its end: `u32 escape_bytes | u32 far_count | body | escapes |
/// far`.
pub(crate) struct Parts<'a> {
    pub(crate) body: &'a [u8],
    pub(crate) escapes: &'a [u8],
    pub(crate) far: FarList<'a>,
}

impl<'a> Parts<'a> {
    /// The body is what remains, at least `body_bytes_min`.
    pub(crate) fn parse(chunk: &'a [u8], symbols: usize, body_bytes_min: usize) -> Result<Self, DecodeError> {
        check_symbols(symbols)?;
        let mut rest = chunk;
        let (escape_bytes, far_count) = match (take_u32(&mut rest), take_u32(&mut rest)) {
            (Some(escape_bytes), Some(far_count)) => (u64::from(escape_bytes), u64::from(far_count)),
            _ => return Err(truncated(8 + body_bytes_min as u64, chunk)),
        };
        // At most 8 + 2^32 * 7 + the least body: no overflow.
        let tail_bytes = escape_bytes + far_count * FAR_BYTES as u64;
        let needed_bytes = 8 + body_bytes_min as u64 + tail_bytes;
        if needed_bytes > chunk.len() as u64 {
            return Err(truncated(needed_bytes, chunk));
        }
        let (body, tail) = rest.split_at(rest.len() - tail_bytes as usize);
        let (escapes, far) = tail.split_at(escape_bytes as usize);
        Ok(Self { body, escapes, far: FarList::parse(far, symbols)? })
    }
}

/// A chunk of `block-ans` cut at both ends: `u32 far_count | index | blocks | far`.
pub(crate) fn parse_blocks(chunk: &[u8], symbols: usize, index_bytes: usize) -> Result<(&[u8], &[u8], FarList<'_>), DecodeError> {
    check_symbols(symbols)?;
    let mut rest = chunk;
    let far_count = take_u32(&mut rest).ok_or_else(|| truncated(4 + index_bytes as u64, chunk))?;
    let far_bytes = u64::from(far_count) * FAR_BYTES as u64;
    let needed_bytes = 4 + index_bytes as u64 + far_bytes;
    if needed_bytes > chunk.len() as u64 {
        return Err(truncated(needed_bytes, chunk));
    }
    let (body, far) = rest.split_at(rest.len() - far_bytes as usize);
    let (index, blocks) = body.split_at(index_bytes);
    Ok((index, blocks, FarList::parse(far, symbols)?))
}

/// Whether `symbols` may be one chunk.
pub(crate) fn check_encodable(symbols: &[i16]) -> Result<(), EncodeError> {
    match symbols.len() {
        0 => Err(EncodeError::Empty),
        1..=CHUNK_SYMBOLS_MAX => Ok(()),
        symbols => Err(EncodeError::TooLong { symbols, symbols_max: CHUNK_SYMBOLS_MAX }),
    }
}

pub(crate) fn check_symbols(symbols: usize) -> Result<(), DecodeError> {
    match symbols {
        0 => Err(DecodeError::Empty),
        1..=CHUNK_SYMBOLS_MAX => Ok(()),
        _ => Err(DecodeError::TooLong { symbols, symbols_max: CHUNK_SYMBOLS_MAX }),
    }
}

fn truncated(needed_bytes: u64, chunk: &[u8]) -> DecodeError {
    DecodeError::Truncated { needed_bytes, available_bytes: chunk.len() as u64 }
}

pub(crate) fn take_u32(bytes: &mut &[u8]) -> Option<u32> {
    let (value, rest) = bytes.split_first_chunk::<4>()?;
    *bytes = rest;
    Some(u32::from_le_bytes(*value))
}

/// Replaces every ESCAPE among the decoded `codes` by its escape byte; proves that escapes and far
/// list are used up.
pub(crate) fn resolve(codes: &mut [u8], escapes: &[u8], far: FarList<'_>) -> Result<(), DecodeError> {
    let (mut escapes, mut far) = (escapes.iter(), far.iter());
    let mut put = |position: usize, code: &mut u8| -> Result<(), DecodeError> {
        *code = *escapes.next().ok_or(DecodeError::EscapesExhausted { position })?;
        if *code == 0 && far.next().is_none_or(|far| far.position as usize != position) {
            return Err(DecodeError::FarMismatch { position });
        }
        Ok(())
    };
    let (eights, rest) = codes.as_chunks_mut::<8>();
    let rest_start = eights.len() * 8;
    for (i, eight) in eights.iter_mut().enumerate() {
        let mut zeros = zero_bytes(u64::from_le_bytes(*eight));
        while zeros != 0 {
            let byte = zeros.trailing_zeros() as usize / 8;
            put(i * 8 + byte, &mut eight[byte])?;
            zeros &= zeros - 1;
        }
    }
    for (i, code) in rest.iter_mut().enumerate() {
        if *code == ESCAPE {
            put(rest_start + i, code)?;
        }
    }
    if escapes.len() > 0 {
        return Err(DecodeError::EscapesLeft { left_bytes: escapes.len() });
    }
    match far.next() {
        Some(far) => Err(DecodeError::FarMismatch { position: far.position as usize }),
        None => Ok(()),
    }
}

/// 0x80 in every byte of `word` that is zero, 0 in the others.
fn zero_bytes(word: u64) -> u64 {
    // The sum of the low seven bits carries into bit 7 unless they are all zero, and never into the
    // next byte.
    const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    !(((word & LOW) + LOW) | word | LOW)
}

/// Symbols of the symbol bytes; far ones from the list.
pub(crate) fn widen(bytes: &[u8], far: FarList<'_>, out: &mut [i16]) {
    for (symbol, &byte) in out.iter_mut().zip(bytes) {
        *symbol = i16::from(byte) - SYMBOL_BIAS;
    }
    for Far { position, symbol } in far.iter() {
        out[position as usize] = symbol;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_bytes_are_found_exactly() {
        for value in [0u64, 1, 0x80, 0x0100, 0x8000_0000_0000_0001, u64::MAX, 0x0001_0080_ff00_7f00] {
            let mask = zero_bytes(value);
            for (i, byte) in value.to_le_bytes().into_iter().enumerate() {
                let expected = if byte == 0 { 0x80 } else { 0 };
                assert_eq!(mask.to_le_bytes()[i], expected, "{value:#x} byte {i}");
            }
        }
    }

    #[test]
    fn classify_by_hand() {
        let mut coded = [false; 256];
        for symbol in [ESCAPE, 128, 129] {
            coded[usize::from(symbol)] = true;
        }
        let classified = Classified::new(&[0, 1, -1, 300, 0, i16::MIN], &coded).unwrap();
        assert_eq!(classified.codes, [128, 129, 0, 0, 128, 0]);
        assert_eq!(classified.escapes, [127, 0, 0]);
        let far = [(3, 300), (5, i16::MIN)].map(|(position, symbol)| Far { position, symbol });
        assert_eq!(classified.far, far);

        let mut codes = classified.codes.clone();
        let mut bytes = Vec::new();
        classified.write_far(&mut bytes);
        let list = FarList::parse(&bytes, 6).unwrap();
        assert_eq!((list.len(), list.get(1), list.get(2)), (2, Some(far[1]), None));
        resolve(&mut codes, &classified.escapes, list).unwrap();
        assert_eq!(codes, [128, 129, 127, 0, 128, 0]);
        let mut symbols = [0; 6];
        widen(&codes, list, &mut symbols);
        assert_eq!(symbols, [0, 1, -1, 300, 0, i16::MIN]);
    }

    #[test]
    fn resolve_refuses_what_does_not_match() {
        let far_bytes = [2, 0, 0, 0, 44, 1];
        let far = FarList::parse(&far_bytes, 10).unwrap();
        let codes = [9, 9, 0, 9, 9, 9, 9, 9, 9, 0];
        assert_eq!(resolve(&mut codes.clone(), &[0, 7], far), Ok(()));
        let refused = |escapes: &[u8], far| resolve(&mut codes.clone(), escapes, far).unwrap_err();
        assert_eq!(refused(&[0], far), DecodeError::EscapesExhausted { position: 9 });
        assert_eq!(refused(&[0, 7, 7], far), DecodeError::EscapesLeft { left_bytes: 1 });
        assert_eq!(refused(&[7, 7], far), DecodeError::FarMismatch { position: 2 });
        assert_eq!(refused(&[7, 0], far), DecodeError::FarMismatch { position: 9 });
        assert_eq!(refused(&[0, 7], FarList::default()), DecodeError::FarMismatch { position: 2 });
    }

    #[test]
    fn far_lists_must_ascend_inside_the_chunk_and_be_far() {
        let entry = |position: u32, symbol: i16| {
            let mut bytes = position.to_le_bytes().to_vec();
            bytes.extend(symbol.to_le_bytes());
            bytes
        };
        assert!(FarList::parse(&[entry(0, 128), entry(1, -128)].concat(), 2).is_ok());
        for (first, second) in [((0, 128), (0, 128)), ((1, 128), (0, 128)), ((0, 128), (2, 128)), ((0, 127), (1, 128))] {
            let bytes = [entry(first.0, first.1), entry(second.0, second.1)].concat();
            assert!(FarList::parse(&bytes, 2).is_err(), "{first:?} {second:?}");
        }
    }
}
