//! Bit planes of a code tree: the layout of `huffman` for SIMD.
//!
//! # Method
//! A prefix code is a binary tree, and coding a sequence of symbols sorts it down the tree: the root sees all symbols and notes one
//! bit for each, whether it goes left (0) or right (1); each inner node does so with the symbols that reach it. This is a wavelet
//! tree (Grossi, Gupta and Vitter 2003) shaped by the code, so it takes exactly the bits of the code. Only their order differs:
//! a node's bits lie together, and are its *plane*.
//!
//! Decoding goes up the tree. The sequence of a node is the merge of its children's sequences by its plane; that of a leaf is
//! its symbol, any number of times. Sixty-four symbols are merged at once: the next bytes of the right child expanded into the
//! lanes of the ones, those of the left child into the lanes of the zeros (`vpexpandb` of AVX-512, byte shuffles elsewhere). No
//! merge waits for one before it but for the places where the children go on, which are popcounts.
//!
//! # Bytes
//! Inner nodes in breadth-first order, from left to right on each level; for each as many bits as symbols reach it, from the
//! lowest bit of the first byte upward, and zeros up to a whole byte. Nothing says how many reach a node: the root is reached by
//! all, its children by the zeros and the ones that it holds, and so on down, which also proves that the planes fit their bytes.

use crate::error::DecodeError;

/// Most inner nodes of a tree: one less than there are symbol bytes.
pub const NODES_MAX: usize = 255;

/// Where a bit of an inner node leads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Child {
    /// To a symbol byte.
    Leaf(u8),
    /// To an inner node, by its index, which is greater than the parent's.
    Inner(u8),
}

/// An inner node: where its zeros and its ones lead.
pub type Node = [Child; 2];

/// An inner node's part of a chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Plane {
    /// First byte among the planes' bytes.
    pub start: usize,
    /// Symbols that reach the node: bits of its plane.
    pub symbols: usize,
}

/// The inner nodes of the canonical code of `by_length`: (code bits, symbol byte) ascending. None for a lone entry.
pub(crate) fn tree(by_length: &[(u8, u8)]) -> Vec<Node> {
    let mut nodes: Vec<Node> = Vec::new();
    if by_length.len() == 1 {
        return nodes;
    }
    let mut leaves = by_length.iter().peekable();
    // The places of one level, as (parent, side). Canonical codes are numbers in order, so a level's leaves come first.
    let mut places = vec![(0, 0), (0, 1)];
    nodes.push([Child::Leaf(0); 2]);
    let mut depth = 1;
    while !places.is_empty() {
        let mut below = Vec::new();
        for (parent, side) in places {
            nodes[parent][side] = match leaves.next_if(|leaf| leaf.0 == depth) {
                Some(&(_, byte)) => Child::Leaf(byte),
                None => {
                    let index = nodes.len();
                    below.extend([(index, 0), (index, 1)]);
                    nodes.push([Child::Leaf(0); 2]);
                    Child::Inner(index as u8)
                }
            };
        }
        places = below;
        depth += 1;
    }
    nodes
}

/// Appends the planes of `codes`. `paths`: by symbol byte, the code with its first bit lowest.
pub(crate) fn encode(nodes: &[Node], paths: impl Fn(u8) -> u32, codes: &[u8], out: &mut Vec<u8>) {
    // What reaches each node, and at which depth it lies.
    let mut reaching: Vec<(Vec<u8>, u32)> = vec![(Vec::new(), 0); nodes.len()];
    if let Some(root) = reaching.first_mut() {
        root.0 = codes.to_vec();
    }
    for (index, node) in nodes.iter().enumerate() {
        let (codes, depth) = std::mem::take(&mut reaching[index]);
        let side: [u8; 256] = std::array::from_fn(|byte| (paths(byte as u8) >> depth & 1) as u8);
        // Each code is written to both sides and kept by advancing one of them: no branch to mispredict.
        let mut sides = [vec![0; codes.len() + 1], vec![0; codes.len() + 1]];
        let mut ends = [0; 2];
        for eight in codes.chunks(8) {
            let mut bits = 0;
            for (i, &code) in eight.iter().enumerate() {
                let one = side[usize::from(code)];
                bits |= one << i;
                sides[0][ends[0]] = code;
                sides[1][ends[1]] = code;
                ends[0] += usize::from(1 - one);
                ends[1] += usize::from(one);
            }
            out.push(bits);
        }
        for ((child, mut codes), end) in node.iter().zip(sides).zip(ends) {
            if let Child::Inner(child) = child {
                codes.truncate(end);
                reaching[usize::from(*child)] = (codes, depth + 1);
            }
        }
    }
}

/// Finds the plane of every node among `bytes`, and proves that they fill them: that none is cut short, no byte is left, and the
/// bits beyond each plane's end are zero. Then any bits decode.
#[inline(always)] // So that a caller's popcount instruction is used.
pub fn find(nodes: &[Node], symbols: usize, bytes: &[u8], planes: &mut [Plane; NODES_MAX]) -> Result<(), DecodeError> {
    planes[0] = Plane { start: 0, symbols };
    let mut end = 0;
    for (plane, node) in nodes.iter().enumerate() {
        let reached = planes[plane].symbols;
        let start = end;
        end += reached.div_ceil(8);
        planes[plane].start = start;
        let bits = bytes.get(start..end).ok_or(DecodeError::PlaneTruncated {
            plane,
            needed_bytes: end - start,
            available_bytes: bytes.len() - start.min(bytes.len()),
        })?;
        let unused = (8 * bits.len() - reached) as u32;
        if bits.last().is_some_and(|last| last.leading_zeros() < unused) {
            return Err(DecodeError::PaddingNotZero);
        }
        let (words, rest) = bits.as_chunks::<8>();
        let ones = words.iter().map(|word| u64::from_le_bytes(*word).count_ones() as usize).sum::<usize>()
            + rest.iter().map(|byte| byte.count_ones() as usize).sum::<usize>();
        for (child, symbols) in node.iter().zip([reached - ones, ones]) {
            if let Child::Inner(child) = child {
                planes[usize::from(*child)].symbols = symbols;
            }
        }
    }
    match bytes.len() - end {
        0 => Ok(()),
        extra => Err(DecodeError::TrailingBytes { extra_bytes: extra as u64 }),
    }
}

/// Decodes to codes, escapes unresolved. `lone`: the symbol byte of a table without inner nodes.
pub(crate) fn decode(nodes: &[Node], lone: u8, bytes: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
    let mut planes = [Plane::default(); NODES_MAX];
    find(nodes, out.len(), bytes, &mut planes)?;
    if nodes.is_empty() {
        out.fill(lone);
        return Ok(());
    }
    // The sequences of all nodes below the root, in their order, each with one byte more: merging looks at the next byte of both
    // sides, also when one is used up.
    let mut starts = [0; NODES_MAX + 1];
    for node in 1..nodes.len() {
        starts[node + 1] = starts[node] + planes[node].symbols + 1;
    }
    let mut sequences = vec![0; starts[nodes.len()]];
    for (index, node) in nodes.iter().enumerate().rev() {
        let Plane { start, symbols } = planes[index];
        let bits = &bytes[start..][..symbols.div_ceil(8)];
        // Children have greater indices, so their sequences lie behind.
        let (own, below) = sequences.split_at_mut(starts[index + 1]);
        let own = if index == 0 { &mut *out } else { &mut own[starts[index]..][..symbols] };
        let leaves = node.map(|child| match child {
            Child::Leaf(byte) => [byte],
            Child::Inner(_) => [0],
        });
        let sides = [0, 1].map(|side| match node[side] {
            Child::Leaf(_) => (&leaves[side][..], 0),
            Child::Inner(child) => {
                let start = starts[usize::from(child)] - starts[index + 1];
                (&below[start..][..planes[usize::from(child)].symbols + 1], 1)
            }
        });
        merge(bits, sides, own);
    }
    Ok(())
}

/// `out[i]` is the next of the left or the right side, by bit `i`. A side is its sequence and how far a symbol taken advances it.
fn merge(bits: &[u8], [(left, left_step), (right, right_step)]: [(&[u8], usize); 2], out: &mut [u8]) {
    let (mut l, mut r) = (0, 0);
    for (eight, bits) in out.chunks_mut(8).zip(bits) {
        for (i, symbol) in eight.iter_mut().enumerate() {
            let one = usize::from(bits >> i & 1);
            // Both are read and one is picked: a branch on coded bits would be mispredicted every other time.
            let candidates = [left[l], right[r]];
            *symbol = candidates[one];
            l += left_step & one.wrapping_sub(1);
            r += right_step & one.wrapping_neg();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Child::{Inner, Leaf};

    #[test]
    fn trees_by_hand() {
        assert!(tree(&[(0, 9)]).is_empty());
        assert_eq!(tree(&[(1, 4), (1, 9)]), [[Leaf(4), Leaf(9)]]);
        // 0, 10, 110, 111
        assert_eq!(tree(&[(1, 7), (2, 1), (3, 2), (3, 3)]), [[Leaf(7), Inner(1)], [Leaf(1), Inner(2)], [Leaf(2), Leaf(3)]]);
        // 00, 01, 100, 101, 110, 111
        let nodes = tree(&[(2, 1), (2, 2), (3, 3), (3, 4), (3, 5), (3, 6)]);
        assert_eq!(nodes, [[Inner(1), Inner(2)], [Leaf(1), Leaf(2)], [Inner(3), Inner(4)], [Leaf(3), Leaf(4)], [Leaf(5), Leaf(6)]]);
    }

    #[test]
    fn planes_by_hand() {
        // Codes: 7 is 0, 1 is 10, 2 is 11; paths have the first bit lowest.
        let nodes = tree(&[(1, 7), (2, 1), (2, 2)]);
        let path = |byte| match byte {
            1 => 0b01,
            2 => 0b11,
            _ => 0,
        };
        let codes = [7, 1, 2, 7, 2];
        let mut bytes = Vec::new();
        encode(&nodes, path, &codes, &mut bytes);
        assert_eq!(bytes, [0b10110, 0b110]);
        let mut out = [0; 5];
        assert_eq!(decode(&nodes, 0, &bytes, &mut out), Ok(()));
        assert_eq!(out, codes);
        let mut refused = |bytes: &[u8]| decode(&nodes, 0, bytes, &mut out).unwrap_err();
        assert_eq!(refused(&[0b10110]), DecodeError::PlaneTruncated { plane: 1, needed_bytes: 1, available_bytes: 0 });
        assert_eq!(refused(&[0b10110, 0b110, 0]), DecodeError::TrailingBytes { extra_bytes: 1 });
        assert_eq!(refused(&[0b110110, 0b110]), DecodeError::PaddingNotZero);
        assert_eq!(refused(&[0b10110, 0b1110]), DecodeError::PaddingNotZero);
        // No one: nothing reaches the second node.
        assert_eq!(refused(&[0, 0]), DecodeError::TrailingBytes { extra_bytes: 1 });
        assert_eq!(decode(&nodes, 0, &[0], &mut out), Ok(()));
        assert_eq!(out, [7; 5]);
    }
}
