//! The arithmetic of one rANS state, shared by `rans` and `block-ans`.
//!
//! A state `x` is a number that holds the symbols coded so far. Coding symbol `s` with frequency
//! `freq` out of `2^prob_bits` multiplies it by about `2^prob_bits / freq`, that is, adds
//! `-log2(probability)` bits to it:
//!
//! ```text
//! push:  x' = (x / freq) << prob_bits | (cum + x % freq)          cum = sum of the frequencies of smaller symbol bytes
//! pop:   slot = x' & (2^prob_bits - 1); s = the symbol with cum <= slot < cum + freq
//!        x = freq * (x' >> prob_bits) + (slot - cum)
//! ```
//!
//! States are kept in `STATE_MIN .. STATE_MIN * 2^word_bits`, where `STATE_MIN = 2^(state_bits -
//! word_bits)`: `push` first moves the low word of `x` to the stream if `x'` would be too large,
//! and `pop` takes a word when `x` falls below `STATE_MIN`. Here `state_bits = 2 * word_bits`, thus
//! one word always suffices, and a state is below `STATE_MIN` exactly when its upper half is zero:
//! the SIMD decoder's test is "is the plane of high bytes zero".
//!
//! `pop` undoes `push`, so decoding runs in the opposite order: the encoder goes from the last
//! symbol to the first and its words are reversed, so that the decoder reads forward.

/// What the encoder needs to know of one entry.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PushEntry {
    /// `ceil(2^(state_bits + prob_bits) / freq)`
    reciprocal: u64,
    freq: u32,
    cum: u32,
}

impl PushEntry {
    pub(crate) fn new(freq: u32, cum: u32, state_bits: u32, prob_bits: u32) -> Self {
        let reciprocal = (1u64 << (state_bits + prob_bits)).div_ceil(u64::from(freq));
        Self { reciprocal, freq, cum }
    }
}

/// Codes one symbol into `state`; returns the word that left it and whether one did.
///
/// The division is a multiplication. With `S = state_bits`, `p = prob_bits`, `r = (2^(S+p) + e) /
/// freq`, `0 <= e < freq`: `x * r / 2^(S+p) = x / freq + x * e / (freq * 2^(S+p))`. After the move
/// of a word `x < freq * 2^(S-p)`, so the second term is below `freq / 2^(2p) <= 1 / 2^p <= 1 /
/// freq`, too little to lift `x / freq` over the next integer: the quotient is exact. The product
/// is below `2^(S-p) * 2^(S+p) = 2^(2S) <= 2^64`.
#[inline(always)]
pub(crate) fn push<const WORD_BITS: u32>(state: &mut u32, entry: PushEntry, prob_bits: u32) -> (u16, bool) {
    let state_bits = 2 * WORD_BITS;
    let mut x = *state;
    let moves = x >> (state_bits - prob_bits) >= entry.freq;
    let word = (x & ((1 << WORD_BITS) - 1)) as u16;
    x >>= if moves { WORD_BITS } else { 0 };
    let quotient = ((u64::from(x) * entry.reciprocal) >> (state_bits + prob_bits)) as u32;
    // quotient << p | (cum + x - quotient * freq), rearranged
    *state = x + quotient * ((1 << prob_bits) - entry.freq) + entry.cum;
    (word, moves)
}

/// What the decoder needs to know of one slot, in 32 bits: `freq - 1` (12) | offset (12) | symbol
/// byte (8). A frequency goes up to 4096, so it is stored less one.
pub(crate) fn pop_entry(freq: u32, offset: u32, symbol_byte: u8) -> u32 {
    (freq - 1) << 20 | offset << 8 | u32::from(symbol_byte)
}

/// Takes one symbol byte from `state`, which may then be below `STATE_MIN`: see [`refill`]. No
/// overflow whatever the state: `freq * (q + 1) - 1 < 2^prob_bits * (q + 1) <= 2^state_bits` for `q
/// = state >> prob_bits`.
#[inline(always)]
pub(crate) fn pop(state: &mut u32, pop_entries: &[u32], prob_bits: u32) -> u8 {
    let x = *state;
    let entry = pop_entries[x as usize & (pop_entries.len() - 1)];
    *state = ((entry >> 20) + 1) * (x >> prob_bits) + (entry >> 8 & 0xfff);
    entry as u8
}

/// Takes `word` into `state` if it is below `STATE_MIN`; returns how many words were taken, 0 or 1.
#[inline(always)]
pub(crate) fn refill<const WORD_BITS: u32>(state: &mut u32, word: u32) -> usize {
    // Arithmetic, since compilers make a branch of an `if`, which is mispredicted at every other
    // word.
    let needed = u32::from(*state < state_min::<WORD_BITS>());
    *state = (*state << (needed * WORD_BITS)) | (word & needed.wrapping_neg());
    needed as usize
}

pub(crate) const fn state_min<const WORD_BITS: u32>() -> u32 {
    1 << WORD_BITS
}

#[cfg(test)]
mod tests {
    use super::*;

    /// push against the definition with `/` and `%`, for every frequency and the states at the
    /// edges of every quotient.
    fn check_push<const WORD_BITS: u32>(prob_bits: u32, states: impl Fn(u32) -> Vec<u32>) {
        for freq in 1..=1u32 << prob_bits {
            let cum = (1 << prob_bits) - freq;
            let entry = PushEntry::new(freq, cum, 2 * WORD_BITS, prob_bits);
            let entries: Vec<u32> = (0..1u32 << prob_bits).map(|slot| pop_entry(freq, slot.wrapping_sub(cum) & 0xfff, 77)).collect();
            for x in states(freq) {
                let mut state = x;
                let (word, moves) = push::<WORD_BITS>(&mut state, entry, prob_bits);
                let moved = u64::from(x) >= u64::from(freq) << (2 * WORD_BITS - prob_bits);
                let rest = if moved { x >> WORD_BITS } else { x };
                assert_eq!((moves, u32::from(word)), (moved, x & ((1 << WORD_BITS) - 1)));
                assert_eq!(state, ((rest / freq) << prob_bits) + cum + rest % freq, "x {x} freq {freq}");
                assert!(state >= 1 << WORD_BITS);
                assert_eq!(pop(&mut state, &entries, prob_bits), 77);
                assert_eq!(refill::<WORD_BITS>(&mut state, word.into()), usize::from(moved));
                assert_eq!(state, x);
            }
        }
    }

    #[test]
    fn sixteen_bit_states_exhaustively() {
        for prob_bits in [1, 3] {
            check_push::<8>(prob_bits, |_| (256..65536).collect());
        }
        check_push::<8>(8, |freq| (256..65536).step_by(251 - freq as usize % 7).chain([65535]).collect());
    }

    #[test]
    fn thirty_two_bit_states_at_the_edges() {
        check_push::<16>(6, |freq| {
            let limit = u64::from(freq) << 26;
            let edges = [limit - 1, limit, u64::from(u32::MAX), 1 << 16, (1 << 16) + 1];
            let multiples = (1..400u64).map(|k| (limit / u64::from(freq) / 400 * k) * u64::from(freq));
            let around = multiples.flat_map(|m| [m.saturating_sub(1), m, m + 1]);
            edges.into_iter().chain(around).filter(|x| (1 << 16..1 << 32).contains(x)).map(|x| x as u32).collect()
        });
        for freq in [1u32, 2, 3, 1000, 2049, 4095, 4096] {
            let entry = PushEntry::new(freq, 0, 32, 12);
            for k in 0..1u64 << 10 {
                let quotient = (1 << 20) - 1 - k * 7;
                for x in [quotient * u64::from(freq), quotient * u64::from(freq) + u64::from(freq) - 1] {
                    if (1 << 16..1 << 32).contains(&x) {
                        let mut state = x as u32;
                        assert!(!push::<16>(&mut state, entry, 12).1);
                        assert_eq!(u64::from(state), (quotient << 12) + x % u64::from(freq));
                    }
                }
            }
        }
    }
}
