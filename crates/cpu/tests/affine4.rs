//! Decoding to MLX's packed nibbles against packing what the quantizer made: codecs, levels, threads, row ranges, symbols that do not fit.

#[allow(dead_code)] // The kernels' tests use more of it.
mod common;

use common::{Random, ScaleKind, Symbols, codecs, levels, tensor};
use tersor_codec::Codec;
use tersor_cpu::{KernelError, Level, Pool, decode_affine4};
use tersor_format::{CodedTensor, encode_tensor};
use tersor_quant::{QuantizedTensor, affine4};

/// A tensor with all sixteen nibbles, the middle ones more often.
fn nibbles(random: &mut Random, rows: usize, cols: usize) -> QuantizedTensor {
    let mut tensor = tensor(random, rows, cols, Symbols::Narrow, ScaleKind::Affine(32, true));
    tensor.symbols.iter_mut().for_each(|s| *s = ((random.gauss() * 3.0).round() as i16).clamp(-8, 7));
    tensor
}

#[test]
fn every_codec_level_and_shape_gives_the_packed_words() {
    let mut random = Random::new(1);
    let pool = Pool::new(3);
    for codec in codecs().into_iter().filter(|c| !matches!(c, Codec::Fixed(p) if p.bits == 2)) {
        // A whole block of words, tails in both directions, one row tile a chunk and several, chunks for all four streams.
        for (rows, cols, chunk) in [(32, 128, 65_536), (1, 8, 64), (17, 136, 64), (100, 264, 4096), (203, 40, 1)] {
            let quantized = nibbles(&mut random, rows, cols);
            let encoded = encode_tensor(&quantized, codec, chunk).unwrap();
            let want = affine4::pack(&quantized.symbols).unwrap();
            for level in levels() {
                for pool in [None, Some(&pool)] {
                    let mut out = vec![0; want.len()];
                    decode_affine4(level, encoded.tensor(), 0..rows, &mut out, pool).unwrap();
                    assert_eq!(out, want, "{codec} {rows}x{cols} {level}");
                }
            }
        }
    }
}

#[test]
fn any_rows_are_rows_of_the_whole() {
    let mut random = Random::new(2);
    let (rows, words) = (83, 5);
    let quantized = nibbles(&mut random, rows, words * 8);
    let encoded = encode_tensor(&quantized, Codec::default(), 64).unwrap();
    assert!(encoded.tensor().chunk_count() > 4, "ranges must cross tasks");
    let want = affine4::pack(&quantized.symbols).unwrap();
    for start in 0..=rows {
        for end in (start..=rows).step_by(7) {
            let mut out = vec![0; (end - start) * words];
            decode_affine4(Level::best(), encoded.tensor(), start..end, &mut out, None).unwrap();
            assert_eq!(out, want[start * words..end * words], "{start}..{end}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut random = Random::new(3);
    let refuse = |quantized: &QuantizedTensor, rows, len| {
        let encoded = encode_tensor(quantized, Codec::default(), 65_536).unwrap();
        decode_affine4(Level::best(), encoded.tensor(), rows, &mut vec![0; len], None).unwrap_err()
    };
    let quantized = nibbles(&mut random, 16, 16);
    assert!(matches!(refuse(&quantized, 0..17, 34), KernelError::Shape { expected: 16, found: 17, .. }));
    assert!(matches!(refuse(&quantized, 0..16, 31), KernelError::Shape { expected: 32, found: 31, .. }));
    assert!(matches!(refuse(&nibbles(&mut random, 16, 12), 0..16, 24), KernelError::Shape { expected: 16, found: 12, .. }));
    for (symbol, min, max) in [(8, -8, 8), (-9, -9, 7), (300, -8, 127)] {
        let mut wide = quantized.clone();
        wide.symbols[..3].copy_from_slice(&[-8, 7, symbol]);
        assert_eq!(refuse(&wide, 0..16, 32), KernelError::NotNibbles { min, max });
    }
}

/// A header may claim a range that the chunks do not keep to.
#[test]
fn a_header_that_lies_is_found_out() {
    let mut random = Random::new(4);
    let mut quantized = nibbles(&mut random, 16, 16);
    quantized.symbols[5] = 100;
    let encoded = encode_tensor(&quantized, Codec::default(), 65_536).unwrap();
    // The same chunks behind a header whose statistics, and so its checksum, are those of nibbles. (The one wide symbol could be a -8.)
    let mut blob = encoded.blob().to_vec();
    (blob[52], blob[53]) = (-8i8 as u8, 7);
    let table_and_index = 64..encoded.tensor().header().index_start() as usize + 8 * encoded.tensor().chunk_count();
    let covered = [&blob[..56], &blob[table_and_index]].concat();
    blob[56..64].copy_from_slice(&xxhash_rust::xxh3::xxh3_64(&covered).to_le_bytes());
    let tensor = CodedTensor::open_symbols(blob.into()).unwrap();
    let found = decode_affine4(Level::best(), &tensor, 0..16, &mut [0; 32], None);
    assert_eq!(found, Err(KernelError::OutOfRange { chunk: 0, found: 1 }));
}
