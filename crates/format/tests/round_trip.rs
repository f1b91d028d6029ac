//! Encoding and decoding in memory: every codec with every scheme, all tails, hostile blobs.

mod common;

use common::{KINDS, Kind, Random, codecs, tensor};
use proptest::prelude::*;
use tersor_codec::{Codec, PADDING_BYTES, decode_chunk};
use tersor_format::{
    Bytes, CHUNK_ALIGN, CHUNK_SYMBOLS_TARGET, CodedTensor, DecodedForm, EncodeTensorError, HEADER_BYTES, RawTensor, TensorError,
    TensorHeader, decode_tensor, encode_tensor,
};
use tersor_quant::{QuantizedTensor, Scales};

/// The parts of an encoded tensor, to be changed and opened again.
fn open(coded: &CodedTensor, blob: &[u8]) -> Result<CodedTensor, TensorError> {
    let scales = coded.scales();
    CodedTensor::open(Bytes::from(blob.to_vec()), scales.raw().clone(), scales.raw_biases().cloned())
}

#[test]
fn every_codec_and_scheme_round_trips_over_all_tails() {
    let mut random = Random(1);
    let codecs = codecs();
    for rows in 1..=35 {
        for cols in 1..=35 {
            // All codecs at the corners, one after the other elsewhere: each meets every tail of 16 and of 4.
            let all = rows % 16 <= 1 && cols % 16 <= 1;
            for (i, &codec) in codecs.iter().enumerate() {
                if !all && (rows * 35 + cols) % codecs.len() != i {
                    continue;
                }
                for kind in KINDS {
                    let tensor = tensor(&mut random, rows, cols, kind);
                    let encoded = encode_tensor(&tensor, codec, 1 << (random.next() % 12)).unwrap();
                    assert_eq!(decode_tensor(encoded.tensor()).unwrap(), tensor, "{rows}x{cols} {codec} {kind:?}");
                }
            }
        }
    }
}

#[test]
fn chunks_are_what_the_format_promises() {
    let mut random = Random(2);
    let tensor = tensor(&mut random, 100, 50, Kind::Row);
    let encoded = encode_tensor(&tensor, Codec::default(), 2 * 16 * 52).unwrap();
    let coded = encoded.tensor();
    assert_eq!((coded.rows(), coded.cols(), coded.cols_padded()), (100, 50, 52));
    assert_eq!((coded.row_tiles(), coded.col_steps(), coded.chunk_count()), (7, 13, 4));
    assert_eq!(coded.header().row_tiles_per_chunk, 2);
    assert_eq!(coded.chunk_row_tiles(3), 6..7);
    assert_eq!(coded.coded_bytes() % 64, 0);
    let blob = encoded.blob();
    let mut symbols = Vec::new();
    for chunk in 0..4 {
        let bytes = coded.chunk(chunk);
        let padded = coded.chunk_with_padding(chunk);
        assert_eq!(&padded[..bytes.len()], bytes);
        assert_eq!(padded.len(), bytes.len() + PADDING_BYTES);
        assert_eq!((bytes.as_ptr() as usize - blob.as_ptr() as usize) % CHUNK_ALIGN, 0);
        assert!(coded.chunk_checksum_ok(chunk));
        let mut out = vec![0; coded.chunk_symbols(chunk)];
        decode_chunk(coded.table(), bytes, &mut out).unwrap();
        symbols.extend(out);
    }
    assert!(blob[blob.len() - PADDING_BYTES..].iter().all(|&b| b == 0));
    // The order of symbols, by the formula of the documentation.
    for row in 0..100 {
        for col in 0..50 {
            let index = ((row / 16) * 13 + col / 4) * 64 + row % 16 * 4 + col % 4;
            assert_eq!(symbols[index], tensor.symbols[row * 50 + col], "{row}, {col}");
        }
    }
    assert_eq!(symbols.len() as u64, coded.header().symbols());
    let wide = symbols.iter().filter(|s| !(-7..=7).contains(*s)).count();
    assert_eq!(coded.header().wide_count as usize, wide);
    assert_eq!((coded.header().symbol_min, coded.header().symbol_max), (-128, 100));
}

#[test]
fn the_default_chunk_is_about_64k_symbols() {
    let encode = |rows: usize, cols: usize| {
        let scales = Scales::Tensor { scale: 0x3c00, scale_exponent: 0 };
        let tensor = QuantizedTensor { rows, cols, symbols: vec![0; rows * cols], scales };
        encode_tensor(&tensor, Codec::default(), CHUNK_SYMBOLS_TARGET).unwrap().tensor().clone()
    };
    assert_eq!(encode(1024, 256).chunk_symbols(0), 65_536);
    assert_eq!(encode(64, 3000).chunk_symbols(0), 48_000);
    assert_eq!(encode(33, 8192).chunk_symbols(0), 131_072, "at least one row tile");
    assert_eq!(encode(1, 1).chunk_symbols(0), 64);
}

#[test]
fn the_bytes_do_not_depend_on_threads() {
    let tensor = tensor(&mut Random(3), 300, 200, Kind::Row);
    for codec in codecs() {
        let blob = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| encode_tensor(&tensor, codec, 4096).unwrap().blob().to_vec())
        };
        assert!(blob(1) == blob(3), "{codec}");
    }
}

#[test]
fn real_scales_have_their_exponent() {
    let encode = |scale_exponent| {
        let scales = Scales::Row { scales: vec![0x3c00, 0x3800], scale_exponent };
        let tensor = QuantizedTensor { rows: 2, cols: 1, symbols: vec![1, 2], scales };
        encode_tensor(&tensor, Codec::default(), 64).unwrap().tensor().scales().to_f32()
    };
    assert_eq!(encode(0).unwrap(), [1.0, 0.5]);
    assert_eq!(encode(-10).unwrap(), [2f32.powi(-10), 2f32.powi(-11)]);
    assert_eq!(encode(-128).unwrap(), [2f32.powi(-128), 2f32.powi(-129)], "subnormal");
    assert_eq!(encode(127).unwrap(), [2f32.powi(127), 2f32.powi(126)]);
}

#[test]
fn the_decoded_form_is_the_cheapest_that_holds_the_symbols() {
    let form = |symbols: &[i16]| {
        let scales = Scales::Tensor { scale: 0x3c00, scale_exponent: 0 };
        let tensor = QuantizedTensor { rows: 16, cols: 8, symbols: symbols.repeat(128 / symbols.len()), scales };
        let encoded = encode_tensor(&tensor, Codec::default(), 64).unwrap();
        (encoded.tensor().decoded_form(), encoded.tensor().decoded_bytes())
    };
    let form_of = |bits, base, has_escape| DecodedForm { bits, base, has_escape };
    assert_eq!(form(&[-8, 7]), (form_of(4, -8, false), 64 + 4));
    assert_eq!(form(&[20, 35]), (form_of(4, 20, false), 64 + 4));
    assert_eq!(form(&[-8, 8, 0, 0, 0, 0, 0, 0]), (form_of(4, -8, true), 64 + 4 + 32));
    assert_eq!(form(&[-8, 8]), (form_of(8, -128, false), 128 + 4));
    // Clamped statistics say nothing about the range.
    assert_eq!(form(&[200, 3000]), (form_of(8, -128, false), 128 + 4));
    assert_eq!(form(&[-200, -3000]), (form_of(8, -128, false), 128 + 4));
}

#[test]
fn inconsistent_input_is_refused() {
    let good = tensor(&mut Random(4), 16, 64, Kind::Affine(32));
    let encode = |change: &dyn Fn(&mut QuantizedTensor)| {
        let mut tensor = good.clone();
        change(&mut tensor);
        encode_tensor(&tensor, Codec::default(), 64).map(|_| ()).unwrap_err()
    };
    assert!(matches!(encode(&|t| t.rows = 15), EncodeTensorError::SymbolCount { found: 1024, .. }));
    assert!(matches!(
        encode(&|t| {
            t.rows = 0;
            t.symbols.clear()
        }),
        EncodeTensorError::SymbolCount { .. }
    ));
    assert!(matches!(encode(&|t| t.rows = 1 << 30), EncodeTensorError::Format(TensorError::Limit { .. })));
    let row = |scales: Vec<u16>| {
        move |t: &mut QuantizedTensor| {
            t.scales = Scales::Row { scales: scales.clone(), scale_exponent: 0 };
        }
    };
    assert!(matches!(encode(&row(vec![1; 15])), EncodeTensorError::ScaleCount { expected: 16, found: 15, .. }));
    assert!(matches!(encode(&row(vec![0x7c00; 16])), EncodeTensorError::NotFinite { part: "scale", index: 0 }));
    let group = |size: u32| {
        move |t: &mut QuantizedTensor| {
            let Scales::Group { group_size, .. } = &mut t.scales else { panic!("group") };
            *group_size = size;
        }
    };
    assert!(matches!(encode(&group(64)), EncodeTensorError::ScaleCount { .. }));
    assert!(matches!(encode(&group(0)), EncodeTensorError::ScaleCount { .. }));
}

/// Sets a field and corrects the checksum, as a malicious writer would.
fn forged(blob: &[u8], offset: usize, bytes: &[u8]) -> Vec<u8> {
    let mut blob = blob.to_vec();
    blob[offset..offset + bytes.len()].copy_from_slice(bytes);
    let u32_at = |at: usize| u32::from_le_bytes(blob[at..at + 4].try_into().unwrap()) as usize;
    let side = HEADER_BYTES.saturating_add(u32_at(36)).saturating_add(u32_at(32).saturating_mul(8));
    if side <= blob.len() {
        let mut covered = blob[..56].to_vec();
        covered.extend_from_slice(&blob[HEADER_BYTES..side]);
        let checksum = xxhash_rust::xxh3::xxh3_64(&covered).to_le_bytes();
        blob[56..64].copy_from_slice(&checksum);
    }
    blob
}

#[test]
fn forged_headers_are_refused_by_name() {
    let tensor = tensor(&mut Random(5), 40, 10, Kind::Row);
    let encoded = encode_tensor(&tensor, Codec::default(), 64).unwrap();
    let (coded, blob) = (encoded.tensor(), encoded.blob());
    assert!(open(coded, &forged(blob, 0, b"TRSR")).is_ok(), "the forger's checksum is right");
    let refused = |offset: usize, bytes: &[u8], words: &str| {
        let error = open(coded, &forged(blob, offset, bytes)).unwrap_err();
        assert!(error.to_string().contains(words), "{offset} {bytes:?}: {error}");
    };
    let u32s = |value: u32| value.to_le_bytes();
    refused(0, b"TRSS", "bad magic");
    refused(4, &[2, 0], "unsupported blob version 2");
    refused(6, &[4], "unsupported quantization scheme id 4");
    refused(7, &[6], "unsupported codec id 6");
    refused(8, &u32s(0), "field rows");
    refused(8, &u32s((1 << 24) + 1), "rows is 16777217; the limit is 16777216");
    refused(8, &[0xff; 8], "rows is 4294967295");
    refused(8, &[u32s(1 << 24), u32s(1 << 24)].concat(), "number of symbols is 281474976710656");
    refused(8, &u32s(41), "F16 [41] was expected");
    refused(12, &u32s(0), "field cols");
    refused(16, &u32s(32), "group_size = 32: must be 0 without groups");
    refused(20, &u32s(0), "row_tiles_per_chunk");
    refused(20, &u32s(4), "row_tiles_per_chunk = 4");
    refused(24, &[3], "codec rans");
    refused(26, &[31], "codec rans");
    refused(27, &[0], "codec rans");
    refused(28, &u32s(1), "does not use is not 0");
    refused(32, &u32s(u32::MAX), "chunk_count");
    refused(36, &u32s(0), "table_bytes");
    refused(36, &u32s(u32::MAX), "table_bytes is 4294967295; the limit is 65536");
    refused(36, &u32s(65536), "bytes needed");
    refused(40, &u64::MAX.to_le_bytes(), "payload_bytes");
    refused(40, &0u64.to_le_bytes(), "payload_bytes");
    refused(40, &(1u64 << 35).to_le_bytes(), "truncated");
    refused(48, &u32s(0), "contradicts");
    refused(48, &u32s(u32::MAX), "wide_count");
    refused(52, &[127, 0], "symbol_min");
    refused(55, &[1], "reserved");
    refused(64, &[0, 0], "table");
    let index = coded.header().index_start() as usize;
    refused(index, &u32s(0), "chunk_bytes");
    refused(index, &u32s(u32::MAX), "chunk_bytes");
    refused(index, &u32s(coded.chunk(0).len() as u32 + 16), "ends after the payload");
    let mut wrong = blob.to_vec();
    wrong[56] ^= 1;
    assert!(open(coded, &wrong).unwrap_err().to_string().contains("checksum of the header, table and index"));
}

#[test]
fn scales_must_fit_the_header() {
    let mut random = Random(6);
    let row = encode_tensor(&tensor(&mut random, 40, 10, Kind::Row), Codec::default(), 64).unwrap();
    let affine = encode_tensor(&tensor(&mut random, 40, 10, Kind::Affine(8)), Codec::default(), 64).unwrap();
    let open = |encoded: &tersor_format::EncodedTensor, scales: &RawTensor, biases: Option<&RawTensor>| {
        CodedTensor::open(Bytes::from(encoded.blob().to_vec()), scales.clone(), biases.cloned()).map(|_| ())
    };
    let (scales, biases) = (affine.scales(), affine.biases());
    assert_eq!(scales.shape(), [40, 2]);
    open(&affine, scales, biases).unwrap();
    open(&row, row.scales(), None).unwrap();
    assert!(matches!(open(&row, scales, None), Err(TensorError::PartShape { part: "scales", .. })));
    assert!(matches!(open(&affine, row.scales(), biases), Err(TensorError::PartShape { part: "scales", .. })));
    assert!(matches!(open(&affine, scales, None), Err(TensorError::MissingPart { .. })));
    assert!(matches!(open(&affine, scales, Some(row.scales())), Err(TensorError::PartShape { part: "biases", .. })));
    assert!(matches!(open(&row, row.scales(), Some(row.scales())), Err(TensorError::UnexpectedPart { .. })));
}

#[test]
fn a_blob_is_refused_at_every_other_length() {
    let encoded = encode_tensor(&tensor(&mut Random(8), 20, 6, Kind::Row), Codec::default(), 64).unwrap();
    let blob = encoded.blob();
    for length in 0..blob.len() {
        assert!(matches!(open(encoded.tensor(), &blob[..length]), Err(TensorError::Truncated { .. })), "{length}");
    }
    let longer = [blob, &[0; 64]].concat();
    assert!(matches!(open(encoded.tensor(), &longer), Err(TensorError::Length { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    /// Arbitrary bytes behind a valid start reach every check; whatever passes must be written back the same.
    #[test]
    fn arbitrary_headers_parse_or_fail(
        bytes in proptest::collection::vec(any::<u8>(), HEADER_BYTES),
        small in proptest::collection::vec(0u8..4, HEADER_BYTES),
        mix in any::<u64>(),
    ) {
        let mut blob: Vec<u8> = (0..HEADER_BYTES).map(|i| if mix >> i & 1 == 0 { small[i] } else { bytes[i] }).collect();
        blob[..6].copy_from_slice(&[b'T', b'R', b'S', b'R', 1, 0]);
        if let Ok(header) = TensorHeader::parse(&blob) {
            prop_assert_eq!(&header.write()[..], &blob[..]);
            prop_assert!(header.blob_bytes() >= header.payload_start() + header.payload_bytes + 64);
            prop_assert!(header.decoded_bytes() > 0);
        }
    }

    /// A valid blob with arbitrary changes and a forged checksum: no panic, and what still decodes has the right shape.
    #[test]
    fn changed_blobs_never_panic(
        codec in 0usize..14,
        kind in 0usize..4,
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        forge in any::<bool>(),
    ) {
        let tensor = tensor(&mut Random(9), 20, 9, KINDS[kind]);
        let encoded = encode_tensor(&tensor, codecs()[codec], 128).unwrap();
        let mut blob = encoded.blob().to_vec();
        for (at, value) in &changes {
            let at = at.index(blob.len());
            blob[at] = *value;
        }
        if forge {
            blob = forged(&blob, 0, b"TRSR");
        }
        if let Ok(coded) = open(encoded.tensor(), &blob) {
            // Chunks too: beyond their checksums there is the codec.
            for chunk in 0..coded.chunk_count() {
                let mut out = vec![0; coded.chunk_symbols(chunk)];
                let _ = decode_chunk(coded.table(), coded.chunk(chunk), &mut out);
            }
            if let Ok(decoded) = decode_tensor(&coded) {
                prop_assert_eq!(decoded.symbols.len(), coded.rows() * coded.cols());
                if !forge {
                    prop_assert_eq!(decoded, tensor);
                }
            }
        }
    }
}
