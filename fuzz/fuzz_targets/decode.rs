//! Arbitrary table and chunk bytes: no panic, no large allocation; what decodes also encodes and decodes to the same symbols.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tersor_codec::{Codec, Table, decode_chunk, decode_chunk_bytes, encode_chunk, reference};

const CODECS: [&str; 11] =
    ["rans-pairs", "tiered", "fixed", "huffman", "huffman/c12-l4", "block-ans/s32-w16-p12-n1024", "rans", "rans-precise", "block-ans", "fixed/b8", "block-ans/s16-w8-p7-n32"];

fuzz_target!(|data: &[u8]| {
    let [which, symbols, table_bytes, rest @ ..] = data else { return };
    let codec: Codec = CODECS[*which as usize % CODECS.len()].parse().expect("a valid id");
    let (table, chunk) = rest.split_at((*table_bytes as usize).min(rest.len()));
    let Ok(table) = Table::read(codec, table) else { return };
    let mut written = Vec::new();
    table.write(&mut written);
    assert!(Table::read(codec, &written).is_ok(), "a table that was read can be written and read again");

    let oracle = reference::decode_chunk(&table, chunk, *symbols as usize);
    let mut decoded = vec![0i16; *symbols as usize];
    let mut symbol_bytes = vec![0u8; *symbols as usize];
    let plain = decode_chunk(&table, chunk, &mut decoded);
    let bytes = decode_chunk_bytes(&table, chunk, &mut symbol_bytes);
    assert_eq!(plain.is_ok(), bytes.is_ok(), "both decoders judge alike");
    assert_eq!(plain.is_ok(), oracle.is_ok(), "the fast decoder judges like the oracle");
    if let Ok(oracle) = oracle {
        assert_eq!(decoded, oracle, "the fast decoder decodes like the oracle");
        let mut again = Vec::new();
        encode_chunk(&table, &decoded, &mut again).expect("decoded symbols can be encoded");
        let mut twice = vec![0i16; decoded.len()];
        decode_chunk(&table, &again, &mut twice).expect("an encoded chunk decodes");
        assert_eq!(decoded, twice);
    }
});
