//! Arbitrary symbols through every codec and back.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tersor_codec::{Codec, Histogram, Table, decode_chunk, encode_chunk};

const CODECS: [&str; 12] = [
    "rans-pairs",
    "tiered",
    "fixed",
    "fixed/b2",
    "fixed/b8",
    "huffman",
    "huffman/c12-l4",
    "block-ans/s32-w16-p12-n1024",
    "rans",
    "rans-precise",
    "block-ans",
    "block-ans/s16-w8-p7-n32",
];

fuzz_target!(|data: &[u8]| {
    let [which, wide, rest @ ..] = data else { return };
    let codec: Codec = CODECS[*which as usize % CODECS.len()].parse().expect("a valid id");
    // Mostly small symbols; `wide` byte values stretch a few of them far out of the core alphabet.
    let symbols: Vec<i16> =
        rest.iter().map(|&b| if b == *wide { (i32::from(b) * 257 - 32768) as i16 } else { i16::from(b as i8 >> (wide & 7)) }).collect();
    if symbols.is_empty() {
        return;
    }
    let mut histogram = Histogram::new();
    histogram.add(&symbols);
    let table = Table::build(codec, &histogram).expect("every histogram has a table");
    let mut chunk = Vec::new();
    encode_chunk(&table, &symbols, &mut chunk).expect("the table's own symbols can be encoded");
    let mut decoded = vec![0i16; symbols.len()];
    decode_chunk(&table, &chunk, &mut decoded).expect("an encoded chunk decodes");
    assert_eq!(symbols, decoded);
});
