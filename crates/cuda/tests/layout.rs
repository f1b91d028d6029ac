//! Both layouts: what is packed or encoded comes back, for any symbols and shapes, and damage is refused.

use proptest::prelude::*;
use tersor_cuda::layout::{Geometry, LayoutError, Plain, QuadMatrix, QuadParams, Stack, Statistics};

/// A small generator of its own, so that inputs do not depend on a library's.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// In (0, 1).
    fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    fn gaussian(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

fn gaussian(seed: u64, symbols: usize, sigma: f64) -> Vec<i16> {
    let mut random = Random(seed);
    (0..symbols).map(|_| (random.gaussian() * sigma).round() as i16).collect()
}

/// Encodes with every kind of parameters, by one thread and by several, and decodes.
fn check(rows: usize, cols: usize, symbols: &[i16]) -> QuadMatrix {
    let stack = Stack::new(cols, &[symbols]).unwrap();
    let geometry = Geometry::new(rows, cols).unwrap();
    for low_bits in 0..=2 {
        let plain = Plain::pack(&stack, geometry, low_bits, 1).unwrap();
        assert!(plain.unpack().unwrap() == symbols, "plain, {low_bits} low bits");
        assert!(plain == Plain::pack(&stack, geometry, low_bits, 3).unwrap());
    }
    let statistics = Statistics::sample(&stack, geometry, 2);
    for (low_bits, window_bits, copies_log2) in [(0, 14, 0), (1, 12, 2), (2, 9, 0)] {
        let params = QuadParams { low_bits, window_bits, copies_log2 };
        let coded = QuadMatrix::encode(&stack, geometry, params, &statistics, 1).unwrap();
        assert!(coded.decode().unwrap() == symbols, "{params:?}");
        assert!(coded == QuadMatrix::encode(&stack, geometry, params, &statistics, 3).unwrap(), "{params:?}: threads");
    }
    let auto = QuadMatrix::encode_auto(&stack, geometry, 2).unwrap();
    assert!(auto.decode().unwrap() == symbols, "{:?}", auto.params);
    auto
}

const SHAPES: [(usize, usize); 7] = [(1, 1), (17, 130), (16, 128), (3, 700), (40, 4096), (33, 4100), (48, 5632)];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn gaussian_symbols(seed: u64, sigma in 0.5f64..4.0, shape in 0..SHAPES.len()) {
        let (rows, cols) = SHAPES[shape];
        check(rows, cols, &gaussian(seed, rows * cols, sigma));
    }

    #[test]
    fn sparse_outliers(seed: u64, every in 2u64..2000, shape in 0..SHAPES.len()) {
        let (rows, cols) = SHAPES[shape];
        let mut random = Random(seed);
        let symbols = gaussian(seed, rows * cols, 1.2).into_iter().map(|symbol| if random.next().is_multiple_of(every) { random.next() as i16 } else { symbol });
        check(rows, cols, &symbols.collect::<Vec<_>>());
    }

    #[test]
    fn any_symbols(symbols in prop::collection::vec(any::<i16>(), 1..3000)) {
        check(1, symbols.len(), &symbols);
        check(symbols.len(), 1, &symbols);
    }
}

#[test]
fn constants() {
    for (rows, cols) in SHAPES {
        for symbol in [0, 3, -8, 7, 8, i16::MIN, i16::MAX] {
            check(rows, cols, &vec![symbol; rows * cols]);
        }
    }
}

#[test]
fn uniform_symbols() {
    let mut random = Random(5);
    let symbols: Vec<i16> = (0..33 * 4100).map(|_| random.next() as i16).collect();
    check(33, 4100, &symbols);
}

/// The ring cannot hold what lies between rows of zeros and rows of noise: streams are held back.
#[test]
fn rows_of_unlike_entropy() {
    let (rows, cols) = (64, 4096);
    let mut random = Random(9);
    let symbols: Vec<i16> =
        (0..rows * cols).map(|i| (random.gaussian() * if i / cols % 5 == 0 { 0.1 } else { 1.6 }).round() as i16).collect();
    let auto = check(rows, cols, &symbols);
    // rows 0, 5, 10 .. are nearly free, the others have 2.7 bits; padding, patches and the table of so small a matrix included, 3.5 suffice
    assert!(auto.bytes() * 16 < rows * cols * 7, "{} bytes", auto.bytes());
}

/// Every other row is one quad that is frequent, the quad of zeros is rare: patches cannot hold streams back, so the book must become uniform.
#[test]
fn patches_that_do_not_help() {
    let (rows, cols) = (32, 4096);
    let mut random = Random(3);
    let symbols: Vec<i16> = (0..rows * cols).map(|i| if i / cols % 2 == 0 { 3 } else { 1 + (random.next() % 4) as i16 }).collect();
    check(rows, cols, &symbols);
}

#[test]
fn stacks_are_one_matrix() {
    let (q, k) = (gaussian(1, 20 * 300, 1.5), gaussian(2, 7 * 300, 1.0));
    let stack = Stack::new(300, &[&q, &k]).unwrap();
    let geometry = stack.geometry().unwrap();
    let symbols = QuadMatrix::encode_auto(&stack, geometry, 1).unwrap().decode().unwrap();
    assert_eq!(symbols.len(), 39 * 300);
    assert_eq!(symbols[..20 * 300], q);
    assert_eq!(symbols[20 * 300..32 * 300], [0; 12 * 300]);
    assert_eq!(symbols[32 * 300..], k);
    let plain =
        Plain::pack(&|row_tile: usize, out: &mut [i16]| tersor_cuda::layout::Source::row_tile(&stack, row_tile, out), geometry, 0, 2)
            .unwrap();
    assert_eq!(plain.unpack().unwrap(), symbols);
}

/// NOTES.md: 2.308 bits per weight for H 2.25 and 28672 x 8192, of which the table is 0.002.
#[test]
fn size_of_gaussian_symbols() {
    let (rows, cols) = (256, 8192);
    let symbols = gaussian(7, rows * cols, 1.133);
    let stack = Stack::new(cols, &[&symbols]).unwrap();
    let geometry = stack.geometry().unwrap();
    let entropy = Statistics::sample(&stack, geometry, 2).symbols().entropy_bits();
    let params = QuadParams { low_bits: 0, window_bits: 14, copies_log2: 0 };
    let coded = QuadMatrix::encode(&stack, geometry, params, &Statistics::sample(&stack, geometry, 2), 2).unwrap();
    let bits = (coded.bytes() - params.table_bytes()) as f64 * 8.0 / geometry.weights() as f64;
    assert!((1.015..1.03).contains(&(bits / entropy)), "{bits} bits per weight, entropy {entropy}");
}

#[test]
fn parameters_are_checked() {
    let stack = Stack::new(4, &[&[0; 4]]).unwrap();
    let geometry = stack.geometry().unwrap();
    let statistics = Statistics::sample(&stack, geometry, 1);
    for (low_bits, window_bits, copies_log2) in [(3, 14, 0), (0, 15, 0), (0, 0, 0), (0, 14, 3), (0, 8, 6), (0, 8, u32::MAX)] {
        let params = QuadParams { low_bits, window_bits, copies_log2 };
        assert!(matches!(QuadMatrix::encode(&stack, geometry, params, &statistics, 1), Err(LayoutError::Parameter { .. })), "{params:?}");
    }
}

#[test]
fn damage_is_refused_or_decodes_to_something() {
    let (rows, cols) = (40, 1400);
    let mut symbols = gaussian(11, rows * cols, 1.4);
    symbols[777] = 30_000;
    let stack = Stack::new(cols, &[&symbols]).unwrap();
    let geometry = stack.geometry().unwrap();
    let params = QuadParams { low_bits: 1, window_bits: 10, copies_log2: 0 };
    let coded = QuadMatrix::encode(&stack, geometry, params, &Statistics::sample(&stack, geometry, 1), 1).unwrap();
    let mut random = Random(1);
    let mut refused = 0;
    for round in 0..600 {
        let mut damaged = coded.clone();
        let bits = 1u64 << (random.next() % 64) | 1 << (random.next() % 64);
        let mut pick = |len: usize| random.next() as usize % len;
        match round % 9 {
            0 => damaged.words[pick(coded.words.len())] ^= bits as u32,
            1 => damaged.head[pick(coded.head.len())][round / 9 % 2] ^= bits as u32,
            2 => damaged.lens[pick(coded.lens.len())] ^= bits,
            3 => damaged.schedule[pick(coded.schedule.len())] ^= bits,
            4 => damaged.patch_offsets[pick(coded.patch_offsets.len())] ^= bits as u32,
            5 => damaged.patches[pick(coded.patches.len())] ^= bits as u32,
            6 => damaged.far.entries[0][round / 9 % 2] ^= bits as i32,
            7 => damaged.table[pick(coded.table.len())] ^= bits as u32,
            _ => damaged.words.truncate(pick(coded.words.len())),
        }
        match damaged.decode() {
            Ok(decoded) => assert_eq!(decoded.len(), symbols.len()),
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 300, "only {refused} refused");
    let mut short = coded.clone();
    short.schedule.pop();
    assert_eq!(short.decode(), Err(LayoutError::ArrayLength { array: "schedule", len: 2, expected: 3 }));
}
