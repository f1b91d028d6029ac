//! A small coded tensor whose payload the fuzzer rewrites: at every SIMD level the kernels accept the chunks that the codec's decoder accepts,
//! and give the same symbol bytes. (Opening checks the head's checksum; the payload's are the loader's, so damage reaches the kernels here.)
#![no_main]

use libfuzzer_sys::fuzz_target;
use tersor_codec::{Codec, decode_chunk_bytes};
use tersor_cpu::{Level, decode_bytes};
use tersor_format::{Bytes, CodedTensor, encode_tensor};
use tersor_quant::{QuantizedTensor, Scales};

const CODECS: [&str; 15] = [
    "rans-pairs",
    "tiered",
    "huffman/c8-planes",
    "huffman/c12-l4",
    "block-ans/s16-w8-p7-n64",
    "block-ans/s16-w8-p6-n128",
    "block-ans/s32-w16-p12-n1024",
    "rans",
    "rans/s16-w8-p6-l64",
    "rans/s16-w8-p8-l64",
    "rans-precise",
    "huffman",
    "block-ans",
    "fixed",
    "fixed/b8",
];

fuzz_target!(|data: &[u8]| {
    let [which, rows, cols, spread, rest @ ..] = data else { return };
    let codec: Codec = CODECS[*which as usize % CODECS.len()].parse().expect("a valid id");
    let (rows, cols) = (*rows as usize % 96 + 1, *cols as usize % 70 + 1);
    let (edits, seed) = rest.split_at(rest.len() / 2);
    let mut state = seed.iter().fold(0x9e37_79b9_7f4a_7c15u64, |s, &b| (s ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let symbols: Vec<i16> = (0..rows * cols)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let bits = (state >> 40) as u32;
            // A few far symbols, otherwise about Laplacian.
            if bits % 509 == 0 { bits as i16 } else { (bits.trailing_zeros() as i16) * (spread % 9) as i16 * if bits & 1 << 20 == 0 { 1 } else { -1 } }
        })
        .collect();
    let tensor = QuantizedTensor { rows, cols, symbols, scales: Scales::Row { scales: vec![0x3c00; rows], scale_exponent: 0 } };
    // Small chunks, so that several are decoded together.
    let encoded = encode_tensor(&tensor, codec, 512).expect("encodes");
    let mut blob = encoded.blob().to_vec();
    let first = encoded.tensor().chunk(0).as_ptr() as usize - encoded.tensor().blob().as_ptr() as usize;
    let room = blob.len() - 64 - first;
    for edit in edits.chunks_exact(3) {
        let at = usize::from(u16::from_le_bytes([edit[0], edit[1]])) % room;
        blob[first + at] = edit[2];
    }
    let coded = CodedTensor::open(Bytes::from(blob), encoded.scales().clone(), None).expect("the head is whole");

    let mut expected = Vec::new();
    let mut valid = true;
    for chunk in 0..coded.chunk_count() {
        let start = expected.len();
        expected.resize(start + coded.chunk_symbols(chunk), 0);
        valid &= decode_chunk_bytes(coded.table(), coded.chunk(chunk), &mut expected[start..]).is_ok();
    }
    for level in Level::available() {
        let mut found = vec![0xaa; expected.len()];
        let result = decode_bytes(level, &coded, &mut found, None);
        assert_eq!(result.is_ok(), valid, "{codec} at {} judges like the codec", level.name());
        if valid {
            assert_eq!(found, expected, "{codec} at {}", level.name());
        }
    }
});
