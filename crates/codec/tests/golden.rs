//! Golden vectors of `tools/golden_codec.py`, which shares no code with this crate.

use serde_json::Value;
use tersor_codec::{Codec, Histogram, Table, decode_chunk, encode_chunk, reference};

fn cases(json: &str) -> Vec<Value> {
    serde_json::from_str(json).expect("golden file")
}

fn codec(case: &Value) -> Codec {
    case["codec"].as_str().expect("codec").parse().expect("known codec")
}

fn bytes(case: &Value, key: &str) -> Vec<u8> {
    let hex = case[key].as_str().expect("hex");
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).expect("hex")).collect()
}

#[test]
fn chunks_are_the_same_bytes_and_decode_to_the_same_symbols() {
    let cases = cases(include_str!("golden/chunks.json"));
    assert!(cases.len() > 100);
    for (i, case) in cases.iter().enumerate() {
        let codec = codec(case);
        let table_bytes = bytes(case, "table");
        let table = Table::read(codec, &table_bytes).unwrap_or_else(|error| panic!("case {i}, {codec}: {error}"));
        let mut written = Vec::new();
        table.write(&mut written);
        assert_eq!(written, table_bytes, "case {i}, {codec}");

        let symbols = case["symbols"].as_array().expect("symbols").iter();
        let symbols: Vec<i16> = symbols.map(|symbol| symbol.as_i64().expect("symbol") as i16).collect();
        let expected = bytes(case, "chunk");
        let mut chunk = Vec::new();
        encode_chunk(&table, &symbols, &mut chunk).unwrap_or_else(|error| panic!("case {i}, {codec}: {error}"));
        assert_eq!(chunk, expected, "case {i}, {codec}");
        let mut decoded = vec![0; symbols.len()];
        decode_chunk(&table, &expected, &mut decoded).unwrap_or_else(|error| panic!("case {i}, {codec}: {error}"));
        assert_eq!(decoded, symbols, "case {i}, {codec}");
        assert_eq!(reference::decode_chunk(&table, &expected, symbols.len()).as_deref(), Ok(&symbols[..]));
    }
}

/// The tables built here cost no more, and no less, than the best of all possible tables.
#[test]
fn tables_are_the_best_possible() {
    for case in cases(include_str!("golden/tables.json")) {
        let codec = codec(&case);
        let (mut histogram, mut far) = (Histogram::new(), 0.0);
        for pair in case["counts"].as_array().expect("counts") {
            let symbol = pair[0].as_i64().expect("symbol") as i16;
            let count = pair[1].as_u64().expect("count");
            histogram.add(&vec![symbol; count as usize]);
            if !(-127..=127).contains(&symbol) {
                far += count as f64;
            }
        }
        let table = Table::build(codec, &histogram).expect("table");
        let entry_bits = match &table {
            Table::Rans(table) => 24 * table.entries().len(),
            Table::Huffman(table) => 16 * table.entries().len(),
            _ => unreachable!("golden tables are of rans and huffman"),
        };
        // The far list (48 bits an entry) is the same whatever the table, and not in the golden
        // figure.
        let bits = table.payload_bits(&histogram) - 48.0 * far + entry_bits as f64;
        let least = case["least_bits"].as_f64().expect("least_bits");
        assert!((bits - least).abs() < 1e-6 * least.max(1.0), "{codec}: {bits} bits, best {least}: {histogram:?}");
    }
}
