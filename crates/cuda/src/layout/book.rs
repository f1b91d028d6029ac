//! The code of quads.
//!
//! Only the likeliest quads have a code, of at most `window_bits` bits; all others are sent as the quad of zeros, which always has one, and
//! listed as *patches* of 32 bits. Code lengths are the best possible for that limit, by package-merge (Larmore & Hirschberg 1990); how many
//! quads get a code is searched for, by the price of codes and patches together.
//!
//! Codes are canonical and written LSB first. Within a length they are handed out in a scattered order: the first bits of a code choose the
//! bank of the shared memory, and neighbours in value, which follow each other in the stream, should not share one.

use super::fragment::{DEVICE_FLIP, ZERO_QUAD};
use super::statistics::Ranking;

/// Size of a patch.
const PATCH_BITS: u64 = 32;

/// Codes of quads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Book {
    window_bits: u32,
    /// (65536,) code | length << 16; 0 for quads without a code
    codes: Vec<u32>,
    /// Bits for codes and patches of the counted quads.
    cost_bits: u64,
}

impl Book {
    /// The cheapest book with codes of at most `window_bits` bits, 1..=14.
    pub(super) fn new(ranking: &Ranking, window_bits: u32) -> Self {
        let full = 1usize << window_bits;
        let mut best: Option<(u64, Vec<(u8, u16)>)> = None;
        // 4/128, 5/128, 6/128, 7/128, 4/64 .. 7/8 of the codes that there could be; the cost falls, then rises
        let sizes = (0..20).map(|i| (full * (4 + i % 4)) >> (7 - i / 4)).map(|size| size.max(2));
        for size in sizes {
            let lengths = code_lengths(ranking, size, window_bits);
            match &best {
                Some((best_cost, _)) if lengths.0 > *best_cost => break,
                _ => best = Some(lengths),
            }
        }
        let (cost_bits, lengths) = best.expect("at least one size was tried");
        Self { window_bits, codes: canonical(lengths), cost_bits }
    }

    /// The cheapest book whose codes all have the same length: streams then never drift apart.
    pub(super) fn uniform(ranking: &Ranking, window_bits: u32) -> Self {
        let coded = |bits: u32| ranking.ranked.len().min((1 << bits) - 1);
        let cost = |bits: u32| {
            let patched: u64 = ranking.ranked[coded(bits)..].iter().map(|&(count, _)| count).sum();
            u64::from(bits) * ranking.total + PATCH_BITS * patched
        };
        let bits = (1..=window_bits).min_by_key(|&bits| cost(bits)).expect("there is at least one length");
        let quads = ranking.ranked[..coded(bits)].iter().map(|&(_, quad)| quad).chain([ZERO_QUAD]);
        Self { window_bits, codes: canonical(quads.map(|quad| (bits as u8, quad)).collect()), cost_bits: cost(bits) }
    }

    /// Code and length of `quad`; length 0 if it has none.
    #[inline(always)]
    pub(super) fn code(&self, quad: u16) -> (u32, u32) {
        let entry = self.codes[usize::from(quad)];
        (entry & 0xffff, entry >> 16)
    }

    /// Bits for codes and patches of the quads that the book was built from.
    pub(super) fn cost_bits(&self) -> u64 {
        self.cost_bits
    }

    /// Quads that have a code.
    pub fn coded_quads(&self) -> usize {
        self.codes.iter().filter(|&&entry| entry > 0).count()
    }

    /// The decoder's table, (2^window_bits, 2^copies_log2): code length in bits 0..6, nibbles of the quad as the device wants them in 16..32.
    /// Its index is the window's bits, first code bit lowest. Windows that no code begins stand for zeros.
    pub(super) fn table(&self, copies_log2: u32) -> Vec<u32> {
        let entry = |quad: u16, length: u32| u32::from(quad ^ DEVICE_FLIP) << 16 | length;
        let mut table = vec![entry(ZERO_QUAD, self.code(ZERO_QUAD).1); 1 << self.window_bits];
        for quad in 0..=u16::MAX {
            let (code, length) = self.code(quad);
            if length > 0 {
                table.iter_mut().skip(code as usize).step_by(1 << length).for_each(|slot| *slot = entry(quad, length));
            }
        }
        table.iter().flat_map(|&entry| std::iter::repeat_n(entry, 1 << copies_log2)).collect()
    }
}

/// Code lengths for the quad of zeros and the `size - 1` likeliest others, and what codes and patches cost together.
fn code_lengths(ranking: &Ranking, size: usize, bits_max: u32) -> (u64, Vec<(u8, u16)>) {
    let coded = &ranking.ranked[..ranking.ranked.len().min(size - 1)];
    let patched = ranking.total - ranking.zero_count - coded.iter().map(|&(count, _)| count).sum::<u64>();
    let mut leaves: Vec<(u64, u16)> = coded.iter().rev().copied().collect();
    let zero_weight = ranking.zero_count + patched;
    leaves.insert(leaves.partition_point(|&(weight, _)| weight < zero_weight), (zero_weight, ZERO_QUAD));
    if leaves.len() == 1 {
        // a decoder must make progress: one bit for the only quad
        return (ranking.total, vec![(1, ZERO_QUAD)]);
    }
    let weights: Vec<u64> = leaves.iter().map(|&(weight, _)| weight).collect();
    let lengths = package_merge(&weights, bits_max);
    let codes: u64 = weights.iter().zip(&lengths).map(|(weight, &length)| weight * u64::from(length)).sum();
    (codes + PATCH_BITS * patched, lengths.into_iter().zip(leaves).map(|(length, (_, quad))| (length, quad)).collect())
}

/// Lengths of the prefix code of least weighted length, none above `bits_max`, for two or more `weights` in ascending order.
///
/// Needs `weights.len() <= 2^bits_max`.
fn package_merge(weights: &[u64], bits_max: u32) -> Vec<u8> {
    // Level by level, from coins of value 2^-bits_max up: merge the leaves with the packages, pairs of the level before. Only which entries
    // are leaves is kept.
    let mut packages: Vec<u64> = Vec::new();
    let mut levels: Vec<Vec<bool>> = Vec::new();
    for _ in 0..bits_max {
        let (mut leaf, mut package) = (weights.iter().copied().peekable(), packages.iter().copied().peekable());
        let mut merged = Vec::with_capacity(weights.len() + packages.len());
        let mut is_leaf = Vec::with_capacity(merged.capacity());
        while let Some(entry) = match (leaf.peek(), package.peek()) {
            (Some(l), Some(p)) if l > p => package.next().map(|weight| (weight, false)),
            (Some(_), _) => leaf.next().map(|weight| (weight, true)),
            (None, _) => package.next().map(|weight| (weight, false)),
        } {
            merged.push(entry.0);
            is_leaf.push(entry.1);
        }
        packages = merged.chunks_exact(2).map(|pair| pair[0] + pair[1]).collect();
        levels.push(is_leaf);
    }
    // The cheapest 2n - 2 entries of the last level make the code; a package stands for two entries of the level below. Leaves are taken
    // in order, so it suffices to count them.
    let mut lengths = vec![0u8; weights.len()];
    let mut take = 2 * weights.len() - 2;
    for level in levels.iter().rev() {
        let leaves = level[..take].iter().filter(|&&is_leaf| is_leaf).count();
        lengths[..leaves].iter_mut().for_each(|length| *length += 1);
        take = 2 * (take - leaves);
    }
    lengths
}

/// Canonical codes, LSB first, by (length, scattered value).
fn canonical(mut lengths: Vec<(u8, u16)>) -> Vec<u32> {
    // multiplication by an odd number permutes the 16-bit values
    lengths.sort_unstable_by_key(|&(length, quad)| (length, quad.wrapping_mul(40503)));
    let mut codes = vec![0; 1 << 16];
    let (mut code, mut last_length) = (0u32, lengths.first().map_or(0, |&(length, _)| length));
    for (length, quad) in lengths {
        code <<= length - last_length;
        last_length = length;
        codes[usize::from(quad)] = code.reverse_bits() >> (32 - u32::from(length)) | u32::from(length) << 16;
        code += 1;
    }
    codes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn package_merge_by_hand() {
        assert_eq!(package_merge(&[1, 1], 5), [1, 1]);
        // Huffman's lengths 4 4 3 2 1, and the best with three bits
        assert_eq!(package_merge(&[1, 1, 2, 4, 8], 4), [4, 4, 3, 2, 1]);
        assert_eq!(package_merge(&[1, 1, 2, 4, 8], 3), [3, 3, 3, 3, 1]);
        assert_eq!(package_merge(&[0, 5, 9, 9], 2), [2, 2, 2, 2]);
    }

    #[test]
    fn lengths_fill_the_code_space() {
        let weights: Vec<u64> = (1..=3000u64).map(|i| i * i * i / 1000).collect();
        for bits_max in [12, 13, 14] {
            let lengths = package_merge(&weights, bits_max);
            assert_eq!(lengths.iter().map(|&length| 1u64 << (bits_max - u32::from(length))).sum::<u64>(), 1 << bits_max);
            assert!(lengths.is_sorted_by(|a, b| a >= b));
        }
    }

    fn ranking(zero_count: u64, ranked: &[(u64, u16)]) -> Ranking {
        Ranking { zero_count, total: zero_count + ranked.iter().map(|&(count, _)| count).sum::<u64>(), ranked: ranked.to_vec() }
    }

    #[test]
    fn a_lone_quad_gets_a_bit() {
        for book in [Book::new(&ranking(9, &[]), 8), Book::uniform(&ranking(9, &[]), 8)] {
            assert_eq!((book.code(ZERO_QUAD), book.coded_quads(), book.cost_bits()), ((0, 1), 1, 9));
            assert_eq!(book.table(0), vec![0x0808_0001; 256]);
        }
    }

    #[test]
    fn tables_invert_codes() {
        let ranked: Vec<(u64, u16)> =
            (0..5000u64).map(|i| (1_000_000 / (i + 1), (i * 13 + 7) as u16)).filter(|&(_, quad)| quad != ZERO_QUAD).collect();
        for window_bits in [8, 12, 14] {
            for book in [Book::new(&ranking(500, &ranked), window_bits), Book::uniform(&ranking(500, &ranked), window_bits)] {
                let table = book.table(1);
                assert_eq!(table.len(), 2 << window_bits);
                let mut coded = 0;
                for quad in 0..=u16::MAX {
                    let (code, length) = book.code(quad);
                    if length > 0 {
                        coded += 1;
                        for rest in [0, u32::MAX] {
                            let window = (code | rest.checked_shl(length).unwrap_or(0)) & ((1 << window_bits) - 1);
                            assert_eq!(table[window as usize * 2], u32::from(quad ^ 0x8080) << 16 | length);
                            assert_eq!(table[window as usize * 2 + 1], table[window as usize * 2]);
                        }
                    }
                }
                assert_eq!(coded, book.coded_quads());
                assert!(coded > 1 && book.code(ZERO_QUAD).1 > 0);
            }
        }
    }
}
