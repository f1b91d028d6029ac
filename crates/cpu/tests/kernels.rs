//! Every kernel against the naive product: codecs, levels, coded and decoded, threads, numbers of
//! tokens, tails, escapes, far symbols, corrupt chunks.

mod common;

use common::{Random, SCALES, SYMBOLS, ScaleKind, Symbols, codecs, levels, naive, symbols_of, tensor};
use proptest::prelude::*;
use tersor_codec::{Codec, rans};
use tersor_cpu::{Activations, Decoded, Job, KernelError, KernelScales, Level, Matrix, Pool, decode_bytes, decode_into, matmul, read_row};
use tersor_format::{CodedTensor, encode_tensor};
use tersor_quant::QuantizedTensor;

/// The default codec.
const RANS: Codec = Codec::Rans(rans::Params::DEFAULT);

fn product(pool: &Pool, level: Level, matrix: Matrix<'_>, scales: &KernelScales, x: &Activations) -> Result<Vec<f32>, KernelError> {
    let mut out = vec![f32::NAN; x.tokens() * matrix.rows()];
    matmul(pool, level, &mut [Job { matrix, scales, x, out: &mut out }])?;
    Ok(out)
}

fn activations(random: &mut Random, tokens: usize, cols: usize, segment: usize) -> Activations {
    let x: Vec<f32> = (0..tokens * cols).map(|_| random.gauss() as f32).collect();
    Activations::quantize(Level::Scalar, &x, tokens, cols, segment)
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Everything that must hold of one tensor.
#[allow(clippy::too_many_arguments)] // The axes of the test matrix.
fn check(
    random: &mut Random,
    rows: usize,
    cols: usize,
    symbols: Symbols,
    kind: ScaleKind,
    codec: Codec,
    chunk_symbols: u32,
    tokens: &[usize],
) {
    let what = format!("{rows}x{cols} {symbols:?} {kind:?} {codec} {chunk_symbols}");
    let quantized = tensor(random, rows, cols, symbols, kind);
    let encoded = encode_tensor(&quantized, codec, chunk_symbols).unwrap_or_else(|e| panic!("{what}: {e}"));
    let coded = encoded.tensor();
    let scales = KernelScales::from_coded(coded).unwrap();
    let pools = [Pool::new(1), Pool::new(2), Pool::new(3)];
    let mut decoded = Decoded::new();
    for &tokens in tokens {
        let x = activations(random, tokens, cols, scales.segment());
        let want = bits(&naive(&quantized, &x));
        for level in levels() {
            for pool in &pools {
                let got = product(pool, level, Matrix::Coded(coded), &scales, &x).unwrap();
                assert_eq!(bits(&got), want, "coded {what} {level} {tokens} tokens {} threads", pool.threads());
                decode_into(level, coded, &mut decoded, Some(pool)).unwrap();
                let got = product(pool, level, Matrix::Decoded(&decoded), &scales, &x).unwrap();
                assert_eq!(bits(&got), want, "decoded {what} {level} {tokens} tokens {} threads", pool.threads());
            }
        }
    }
    let header = coded.header().decoded_bytes();
    let far = quantized.symbols.iter().filter(|s| s.unsigned_abs() > 127).count() as u64;
    assert_eq!(decoded.bytes() - far * 12, header, "bytes of the decoded form, {what}");
    let mut want = vec![0.0; cols];
    let mut got = vec![f32::NAN; cols];
    for row in [0, rows / 2, rows - 1] {
        quantized.dequantize_row(row, &mut want);
        for level in levels() {
            for matrix in [Matrix::Coded(coded), Matrix::Decoded(&decoded)] {
                read_row(level, matrix, &scales, row, &mut got).unwrap();
                assert_eq!(bits(&got), bits(&want), "row {row} of {what} {level}");
            }
        }
    }
}

#[test]
fn every_codec_and_kind_of_symbols() {
    let mut random = Random::new(1);
    for codec in codecs() {
        for symbols in SYMBOLS {
            check(&mut random, 70, 300, symbols, ScaleKind::Row, codec, 4_800, &[1, 3]);
        }
    }
}

#[test]
fn every_kind_of_scales() {
    let mut random = Random::new(2);
    for kind in SCALES {
        // Groups must divide the columns for the formats that have them.
        for codec in [RANS, Codec::RansPairs, Codec::Tiered] {
            check(&mut random, 50, 384, Symbols::Escapes, kind, codec, 12_288, &[1, 2]);
            check(&mut random, 50, 384, Symbols::Far, kind, codec, 12_288, &[1, 2]);
        }
    }
}

#[test]
fn every_block_of_tokens() {
    let mut random = Random::new(3);
    for symbols in SYMBOLS {
        check(&mut random, 33, 140, symbols, ScaleKind::Row, RANS, 2_240, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 23, 32, 33]);
    }
}

#[test]
fn every_number_of_streams_and_a_short_last_chunk() {
    let mut random = Random::new(4);
    let narrow = Codec::Rans(rans::Params { prob_bits: 6, ..rans::Params::DEFAULT });
    let wide = Codec::Rans(rans::Params { prob_bits: 8, ..rans::Params::DEFAULT });
    for codec in [RANS, narrow, wide, Codec::RansPairs] {
        for row_tiles in 1..=25 {
            // Two row tiles a chunk: 1 to 13 chunks, the last of one row tile if their number is odd.
            check(&mut random, row_tiles * 16 - 5, 64, Symbols::Escapes, ScaleKind::Row, codec, 2_048, &[1, 2]);
        }
    }
}

#[test]
fn every_small_shape() {
    let mut random = Random::new(5);
    for rows in [1, 2, 15, 16, 17, 31, 32, 33] {
        for cols in [1, 2, 3, 4, 5, 7, 8, 9, 12, 127, 128, 129, 131, 132, 133, 256, 260] {
            // A few escapes in a segment, and many.
            check(&mut random, rows, cols, Symbols::Far, ScaleKind::Row, RANS, 1_024, &[1, 2]);
            check(&mut random, rows, cols, Symbols::Escapes, ScaleKind::Row, RANS, 1_024, &[1]);
        }
    }
}

#[test]
fn jobs_together_are_jobs_apart() {
    let mut random = Random::new(6);
    let shapes = [(256, 160), (64, 160), (48, 160)];
    let encoded: Vec<_> = shapes
        .iter()
        .map(|&(r, c)| encode_tensor(&tensor(&mut random, r, c, Symbols::Escapes, ScaleKind::Row), RANS, 2_560).unwrap())
        .collect();
    let scales: Vec<_> = encoded.iter().map(|e| KernelScales::from_coded(e.tensor()).unwrap()).collect();
    let mut decoded = Decoded::new();
    decode_into(Level::best(), encoded[1].tensor(), &mut decoded, None).unwrap();
    for tokens in [1, 5] {
        let x = activations(&mut random, tokens, 160, 128);
        for threads in [1, 2, 4] {
            let pool = Pool::new(threads);
            let apart: Vec<_> = encoded
                .iter()
                .zip(&scales)
                .map(|(e, s)| product(&pool, Level::best(), Matrix::Coded(e.tensor()), s, &x).unwrap())
                .collect();
            let mut together: Vec<Vec<f32>> = shapes.iter().map(|s| vec![f32::NAN; tokens * s.0]).collect();
            let mut jobs: Vec<Job<'_>> = together
                .iter_mut()
                .enumerate()
                .map(|(i, out)| {
                    let matrix = if i == 1 { Matrix::Decoded(&decoded) } else { Matrix::Coded(encoded[i].tensor()) };
                    Job { matrix, scales: &scales[i], x: &x, out }
                })
                .collect();
            matmul(&pool, Level::best(), &mut jobs).unwrap();
            assert_eq!(together, apart, "{tokens} tokens, {threads} threads");
        }
    }
}

#[test]
fn wrong_shapes_are_refused_by_name() {
    let mut random = Random::new(7);
    let encoded = encode_tensor(&tensor(&mut random, 20, 32, Symbols::Escapes, ScaleKind::Row), RANS, 2_048).unwrap();
    let scales = KernelScales::from_coded(encoded.tensor()).unwrap();
    let pool = Pool::new(1);
    let matrix = Matrix::Coded(encoded.tensor());
    let run = |x: &Activations, out: usize, scales: &KernelScales| {
        let mut out = vec![0.0; out];
        matmul(&pool, Level::best(), &mut [Job { matrix, scales, x, out: &mut out }]).map_err(|e| e.to_string())
    };
    let x = activations(&mut random, 2, 32, 128);
    assert_eq!(run(&x, 40, &scales), Ok(()));
    assert_eq!(run(&x, 39, &scales), Err("job 0: the length of out is 39, must be 40".into()));
    let none = activations(&mut random, 0, 32, 128);
    assert_eq!(run(&none, 0, &scales), Err("job 0: the number of tokens is 0, must be 1".into()));
    let short = activations(&mut random, 2, 31, 128);
    assert_eq!(run(&short, 40, &scales), Err("job 0: the number of columns of x is 31, must be 32".into()));
    let other = activations(&mut random, 2, 32, 64);
    assert_eq!(run(&other, 40, &scales), Err("job 0: the segment of x is 64, must be 128".into()));
    assert_eq!(
        run(&x, 40, &KernelScales::from_rows(&[1.0; 19], 32)),
        Err("job 0: the number of rows with scales is 19, must be 20".into())
    );
    let mut row = vec![0.0; 32];
    assert!(matches!(read_row(Level::best(), matrix, &scales, 20, &mut row), Err(KernelError::Shape { .. })));
    assert!(matches!(decode_bytes(Level::best(), encoded.tensor(), &mut [0; 64], None), Err(KernelError::Shape { .. })));
}

/// The tensor with some bytes of its chunks changed. Opening checks no chunk, so it still opens.
fn corrupted(coded: &CodedTensor, random: &mut Random, changes: usize) -> CodedTensor {
    let mut blob = coded.blob().to_vec();
    for _ in 0..changes {
        let chunk = coded.chunk(random.below(coded.chunk_count()));
        let start = chunk.as_ptr().addr() - coded.blob().as_ptr().addr();
        // Half of the changes hit the first or last bytes: the lengths, the states, the escapes and
        // the far list.
        let at = match random.below(4) {
            0 => random.below(chunk.len().min(16)),
            1 => chunk.len() - 1 - random.below(chunk.len().min(40)),
            _ => random.below(chunk.len()),
        };
        blob[start + at] = match random.below(3) {
            0 => 0,
            1 => blob[start + at] ^ 1 << random.below(8),
            _ => random.next() as u8,
        };
    }
    let view = coded.scales();
    CodedTensor::open(blob.into(), view.raw().clone(), view.raw_biases().cloned()).expect("the index is untouched")
}

/// Corrupt or not, every kernel says what the oracle says, and computes what it decodes.
fn check_corrupted(random: &mut Random, codec: Codec, symbols: Symbols, changes: usize) -> Result<bool, TestCaseError> {
    let (rows, cols) = (16 * (1 + random.below(9)), 4 * (1 + random.below(40)));
    let quantized = tensor(random, rows, cols, symbols, ScaleKind::Row);
    let encoded = encode_tensor(&quantized, codec, 64 * (1 + random.below(60)) as u32).unwrap();
    let coded = corrupted(encoded.tensor(), random, changes);
    let scales = KernelScales::from_coded(&coded).unwrap();
    let truth = symbols_of(&coded);
    let pool = Pool::new(2);
    let one = activations(random, 1, cols, 128);
    let two = activations(random, 2, cols, 128);
    for level in levels() {
        for x in [&one, &two] {
            let got = product(&pool, level, Matrix::Coded(&coded), &scales, x);
            match &truth {
                Ok(symbols) => {
                    let now = QuantizedTensor { symbols: symbols.clone(), ..quantized.clone() };
                    prop_assert_eq!(bits(&got.unwrap()), bits(&naive(&now, x)), "{} {}", codec, level);
                }
                Err(first) => {
                    let corrupt = matches!(&got, Err(KernelError::Corrupt { job: 0, chunk, .. }) if chunk == first);
                    prop_assert!(corrupt, "{} {}: {:?}, the oracle refuses chunk {}", codec, level, got, first);
                }
            }
        }
        let mut bytes = vec![0; coded.row_tiles() * coded.col_steps() * 64];
        prop_assert_eq!(decode_bytes(level, &coded, &mut bytes, Some(&pool)).is_ok(), truth.is_ok());
        let mut decoded = Decoded::new();
        let stored = decode_into(level, &coded, &mut decoded, Some(&pool));
        match &truth {
            Ok(symbols) => {
                let header = coded.header();
                let form = coded.decoded_form();
                let wide = symbols.iter().filter(|s| !(-7..=7).contains(*s)).count();
                let fits = match (form.bits, form.has_escape) {
                    (4, true) => wide == header.wide_count as usize,
                    (4, false) => bytes.iter().all(|b| (0..16).contains(&(i16::from(*b) - 128 - form.base))),
                    _ => true,
                };
                // Padding is coded too: a change there may count as wide without changing the matrix.
                let padded = bytes.iter().filter(|b| !(121..=135).contains(*b)).count() != wide;
                if !padded {
                    prop_assert_eq!(stored.is_ok(), fits, "{} {} {:?}", codec, level, stored);
                }
                if stored.is_ok() {
                    let now = QuantizedTensor { symbols: symbols.clone(), ..quantized.clone() };
                    let got = product(&pool, level, Matrix::Decoded(&decoded), &scales, &one).unwrap();
                    prop_assert_eq!(bits(&got), bits(&naive(&now, &one)));
                }
            }
            Err(_) => prop_assert!(stored.is_err()),
        }
        prop_assert_eq!(decoded.rows() > 0, stored.is_ok(), "a failed decode leaves no matrix");
    }
    Ok(truth.is_ok())
}

#[test]
fn some_changes_are_still_valid_and_some_are_not() {
    // Guards the property below against being about one side only.
    let mut random = Random::new(9);
    let mut valid = 0;
    for _ in 0..200 {
        valid += usize::from(check_corrupted(&mut random, RANS, Symbols::Escapes, 1).unwrap());
    }
    assert!((5..195).contains(&valid), "{valid} of 200");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn corrupt_chunks_are_judged_as_by_the_oracle(seed in any::<u64>(), codec in 0..codecs().len(), symbols in 0..SYMBOLS.len(), changes in 0usize..4) {
        check_corrupted(&mut Random::new(seed), codecs()[codec], SYMBOLS[symbols], changes)?;
    }

    #[test]
    fn any_tensor_any_way(seed in any::<u64>(), codec in 0..codecs().len(), symbols in 0..SYMBOLS.len(), kind in 0..SCALES.len(), rows in 1usize..90, cols in 1usize..600, tokens in 1usize..20) {
        let mut random = Random::new(seed);
        let kind = SCALES[kind];
        let cols = match kind {
            ScaleKind::Group(g, _) | ScaleKind::Affine(g, _) | ScaleKind::Affine32(g) => cols.next_multiple_of(g as usize),
            _ => cols,
        };
        let chunk_symbols = 64 * (1 + random.below(400)) as u32;
        check(&mut random, rows, cols, SYMBOLS[symbols], kind, codecs()[codec], chunk_symbols, &[1, tokens]);
    }
}
