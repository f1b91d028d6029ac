//! Every codec through the same tests: what goes in comes out, what is broken is refused, and
//! nothing panics.

use proptest::prelude::*;
use tersor_codec::{
    Codec, DecodeError, EncodeError, Far, Histogram, Table, TableError, decode_chunk, decode_chunk_bytes, encode_chunk, reference,
};

/// Every kind, both state widths, the extremes of every parameter.
const IDS: [&str; 30] = [
    "fixed/b2",
    "fixed/b3",
    "fixed/b4",
    "fixed/b5",
    "fixed/b6",
    "fixed/b7",
    "fixed/b8",
    "huffman/c12-planes",
    "huffman/c8-planes",
    "huffman/c1-planes",
    "huffman/c12-l4",
    "huffman/c8-l1",
    "huffman/c2-l3",
    "huffman/c1-l64",
    "rans/s16-w8-p7-l64",
    "rans/s16-w8-p6-l32",
    "rans/s16-w8-p8-l64",
    "rans/s16-w8-p1-l1",
    "rans/s16-w8-p7-l7",
    "rans/s32-w16-p12-l32",
    "rans/s32-w16-p12-l64",
    "rans/s32-w16-p10-l1",
    "rans/s32-w16-p1-l5",
    "block-ans/s32-w16-p12-n1024",
    "block-ans/s32-w16-p12-n32",
    "block-ans/s16-w8-p8-n32",
    "block-ans/s16-w8-p1-n64",
    "block-ans/s16-w8-p7-n16384",
    "tiered",
    "rans-pairs",
];

fn codecs() -> impl Iterator<Item = Codec> {
    IDS.iter().map(|id| id.parse().expect("valid id"))
}

fn histogram(symbols: &[i16]) -> Histogram {
    let mut histogram = Histogram::new();
    histogram.add(symbols);
    histogram
}

fn table(codec: Codec, symbols: &[i16]) -> Table {
    Table::build(codec, &histogram(symbols)).unwrap_or_else(|error| panic!("{codec}: {error}"))
}

fn encoded(table: &Table, symbols: &[i16]) -> Vec<u8> {
    let mut chunk = Vec::new();
    encode_chunk(table, symbols, &mut chunk).unwrap_or_else(|error| panic!("{}: {error}", table.codec()));
    chunk
}

/// Decodes with all three decoders, which must agree.
fn decode(table: &Table, chunk: &[u8], symbols: usize) -> Result<Vec<i16>, DecodeError> {
    let mut out = vec![0; symbols];
    let result = decode_chunk(table, chunk, &mut out);
    let reference = reference::decode_chunk(table, chunk, symbols);
    assert_eq!(result.is_ok(), reference.is_ok(), "{}: {result:?} against {reference:?}", table.codec());
    let mut bytes = vec![0; symbols];
    match decode_chunk_bytes(table, chunk, &mut bytes) {
        Ok(far) => {
            assert_eq!(Ok(&out), reference.as_ref(), "{}", table.codec());
            let far: Vec<Far> = far.iter().collect();
            let expected = out.iter().zip(0..).filter(|(symbol, _)| !(-127..=127).contains(*symbol));
            assert_eq!(far, expected.map(|(&symbol, position)| Far { position, symbol }).collect::<Vec<_>>());
            for (&symbol, &byte) in out.iter().zip(&bytes) {
                assert_eq!(byte, if (-127..=127).contains(&symbol) { (symbol + 128) as u8 } else { 0 });
            }
        }
        Err(error) => assert_eq!(result, Err(error)),
    }
    result.map(|()| out)
}

fn check_round_trip(codec: Codec, table_symbols: &[i16], symbols: &[i16]) {
    let table = table(codec, table_symbols);
    let chunk = encoded(&table, symbols);
    assert_eq!(decode(&table, &chunk, symbols.len()).as_deref(), Ok(symbols), "{codec}");
    let mut bytes = Vec::new();
    table.write(&mut bytes);
    let read = Table::read(codec, &bytes).unwrap_or_else(|error| panic!("{codec}: {error}"));
    assert_eq!(read.codec(), codec);
    assert_eq!(encoded(&read, symbols), chunk, "{codec}: the table changes when written and read");
}

/// A bell of width `spread` with escapes and far symbols, from a linear congruential generator.
fn weights(n: usize, spread: i16, seed: u64) -> Vec<i16> {
    let mut state = seed;
    let mut below = |n: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % n) as i16
    };
    let mut symbol = || (0..4).map(|_| below(2 * spread as u64 + 1) - spread).sum::<i16>() / 2;
    let mut out: Vec<i16> = (0..n).map(|_| symbol()).collect();
    for i in (7..n).step_by(61) {
        out[i] = [127, -127, 128, -128, i16::MIN, i16::MAX, 90][i % 7];
    }
    out
}

#[test]
fn all_tails() {
    let all = weights(4096, 6, 1);
    for codec in codecs() {
        for n in 1..=200 {
            check_round_trip(codec, &all, &all[n..2 * n]);
        }
        check_round_trip(codec, &all, &all);
    }
}

#[test]
fn all_short_sequences_of_tiny_alphabets() {
    let alphabet = [0i16, -1, 300];
    for codec in codecs() {
        let table = table(codec, &[0, 0, 0, 0, -1, 300]);
        for n in 1..=6u32 {
            for number in 0..3usize.pow(n) {
                let symbols: Vec<i16> = (0..n).map(|i| alphabet[number / 3usize.pow(i) % 3]).collect();
                let chunk = encoded(&table, &symbols);
                assert_eq!(decode(&table, &chunk, symbols.len()).as_deref(), Ok(&symbols[..]), "{codec}");
            }
        }
    }
}

#[test]
fn extreme_alphabets() {
    let every: Vec<i16> = (i16::MIN..=i16::MAX).collect();
    let core: Vec<i16> = (-127..=127).collect();
    for codec in codecs() {
        for lone in [0, -127, 127, 128, -128, i16::MIN, i16::MAX] {
            check_round_trip(codec, &[lone], &[lone; 333]);
        }
        check_round_trip(codec, &every, &every[32_000..33_500]);
        check_round_trip(codec, &core, &core.repeat(5));
    }
}

#[test]
fn symbols_unknown_to_the_table() {
    // Often enough that entries cost less than escapes.
    let usual = [1, 1, 1, 2].repeat(100);
    for codec in codecs() {
        let table = table(codec, &usual);
        let known = [1, 2, 1];
        let unknown = [1, 2, 1, -5];
        let mut chunk = vec![42];
        match encode_chunk(&table, &unknown, &mut chunk) {
            // Windows and companions of lone entries may know more.
            Ok(()) => assert_eq!(decode(&table, &chunk[1..], 4).as_deref(), Ok(&unknown[..])),
            Err(error) => {
                assert!(!table.has_escape());
                assert_eq!(error, EncodeError::SymbolNotInTable { position: 3, symbol: -5 });
                assert_eq!(chunk, [42], "{codec}: a refused chunk leaves bytes");
                assert!(table.payload_bits(&histogram(&unknown)).is_infinite());
            }
        }
        assert_eq!(decode(&table, &encoded(&table, &known), 3).as_deref(), Ok(&known[..]));
    }
    let table = table("rans".parse().unwrap(), &usual);
    assert!(encode_chunk(&table, &[3], &mut Vec::new()).is_err());
}

#[test]
fn empty_chunks_and_histograms_are_refused() {
    for codec in codecs() {
        assert_eq!(Table::build(codec, &Histogram::new()).unwrap_err(), TableError::EmptyHistogram);
        let table = table(codec, &[0, 1]);
        assert_eq!(encode_chunk(&table, &[], &mut Vec::new()), Err(EncodeError::Empty));
        assert_eq!(decode(&table, &[0; 100], 0), Err(DecodeError::Empty));
    }
}

#[test]
fn ids_round_trip_and_nonsense_is_refused() {
    for id in IDS {
        assert_eq!(id.parse::<Codec>().unwrap().to_string(), id);
    }
    for (name, codec) in Codec::SHORT_NAMES {
        assert_eq!(name.parse::<Codec>(), Ok(codec));
        assert_eq!(codec.to_string().parse::<Codec>(), Ok(codec));
        codec.validate().unwrap();
    }
    for id in [
        "",
        "rANS",
        "rans/",
        "rans/s16-w8-p7",
        "rans/s16-w8-p7-l64-",
        "rans/s16-w8-p9-l64",
        "rans/s16-w16-p7-l64",
        "rans/s32-w16-p13-l64",
        "rans/s32-w8-p7-l64",
        "rans/s24-w8-p7-l64",
        "rans/s16-w8-p0-l64",
        "rans/s16-w8-p7-l0",
        "rans/s16-w8-p7-l65",
        "rans/s16-w8-p7-l320",
        "rans/s16-w8-p+7-l64",
        "rans/s-w8-p7-l64",
        "fixed/b1",
        "fixed/b9",
        "fixed/4",
        "huffman/c13-l4",
        "huffman/c0-l4",
        "huffman/c12-l0",
        "huffman/c12-planes4",
        "huffman/c13-planes",
        "huffman/planes",
        "huffman/c12-l65",
        "block-ans/s32-w16-p12-n31",
        "block-ans/s32-w16-p12-n16385",
        "block-ans/s32-w16-p12-n99999999999",
    ] {
        assert!(id.parse::<Codec>().is_err(), "{id:?} is accepted");
    }
}

#[test]
fn payload_bits_predict_the_size() {
    let symbols = weights(65_536, 9, 3);
    let histogram = histogram(&symbols);
    for codec in codecs() {
        let table = table(codec, &symbols);
        let bits = encoded(&table, &symbols).len() as f64 * 8.0;
        let expected = table.payload_bits(&histogram);
        // Headers, states and indices, the coarseness of states, and what fills up the last byte.
        let blocks = match codec {
            Codec::BlockAns(params) => params.blocks(symbols.len()) as f64,
            _ => 64.0,
        };
        // The codecs of pairs take their symbols for independent, which those of a sample are not quite.
        let sampling = if matches!(codec, Codec::Tiered | Codec::RansPairs) { expected * 0.002 } else { 0.0 };
        assert!(bits > expected - sampling - 64.0, "{codec}: {bits} bits, at least {expected} expected");
        assert!(bits < expected * 1.012 + 64.0 + blocks * 48.0, "{codec}: {bits} bits, about {expected} expected");
        assert!(expected > histogram.entropy_bits() * symbols.len() as f64, "{codec} beats the entropy");
    }
}

/// What the two defaults promise, on chunks of 65,536 Gaussian symbols, everything in the chunk
/// counted.
#[test]
fn rans_keeps_its_promises() {
    for step in [1.6, 0.9, 0.5, 0.3, 0.1] {
        let mut state = 88_172_645_463_325_252u64;
        let mut uniform = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
        };
        let mut gauss = || (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
        let symbols: Vec<i16> = (0..1 << 16).map(|_| (gauss() / step).round() as i16).collect();
        let entropy_bits = histogram(&symbols).entropy_bits();
        let overhead_bits = |id: &str| {
            let table = table(id.parse().unwrap(), &symbols);
            encoded(&table, &symbols).len() as f64 * 8.0 / symbols.len() as f64 - entropy_bits
        };
        let (precise, default) = (overhead_bits("rans-precise"), overhead_bits("rans"));
        assert!(precise < 0.02, "rans-precise at step {step}: {precise} bits above {entropy_bits}");
        assert!(default < 0.02 * entropy_bits, "rans at step {step}: {default} bits above {entropy_bits}");
        let pairs = overhead_bits("rans-pairs");
        assert!(pairs < 0.021 * entropy_bits, "rans-pairs at step {step}: {pairs} bits above {entropy_bits}");
    }
}

#[test]
fn every_truncation_and_extension_is_refused() {
    let symbols = weights(300, 6, 5);
    for codec in codecs() {
        let table = table(codec, &symbols);
        let chunk = encoded(&table, &symbols);
        for length in 0..chunk.len() {
            assert!(decode(&table, &chunk[..length], 300).is_err(), "{codec}: {length} of {} bytes decode", chunk.len());
        }
        for extra in [0, 1, 255] {
            let longer = [&chunk[..], &[extra]].concat();
            assert!(decode(&table, &longer, 300).is_err(), "{codec}: one byte more decodes");
        }
    }
}

#[test]
fn every_flipped_bit_is_survived() {
    let symbols = weights(150, 6, 7);
    for codec in codecs() {
        let table = table(codec, &symbols);
        let chunk = encoded(&table, &symbols);
        for bit in 0..8 * chunk.len() {
            let mut broken = chunk.clone();
            broken[bit / 8] ^= 1 << (bit % 8);
            // Whether it decodes is for checksums to say; that all decoders agree, and that the
            // same bytes come from no other symbols, is asserted.
            if let Ok(decoded) = decode(&table, &broken, 150) {
                assert_eq!(decoded.len(), 150);
                assert_ne!(encoded(&table, &decoded), chunk, "{codec}: bit {bit}");
            }
        }
    }
}

fn any_codec() -> impl Strategy<Value = Codec> {
    (0..IDS.len()).prop_map(|i| IDS[i].parse().expect("valid id"))
}

fn any_symbols() -> impl Strategy<Value = Vec<i16>> {
    let narrow = prop::collection::vec(-3i16..=3, 1..700);
    let core = prop::collection::vec(-130i16..=130, 1..700);
    let mixed = prop::collection::vec(prop_oneof![9 => -20i16..=20, 1 => any::<i16>()], 1..700);
    let wild = prop::collection::vec(any::<i16>(), 1..100);
    prop_oneof![narrow, core, mixed, wild]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn round_trips(codec in any_codec(), symbols in any_symbols()) {
        check_round_trip(codec, &symbols, &symbols);
    }

    #[test]
    fn arbitrary_bytes_are_no_danger_as_a_table(codec in any_codec(), bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        if let Ok(table) = Table::read(codec, &bytes) {
            let mut written = Vec::new();
            table.write(&mut written);
            prop_assert_eq!(written, bytes);
        }
    }

    #[test]
    fn mutated_tables_are_no_danger(
        codec in any_codec(), symbols in any_symbols(), at in any::<prop::sample::Index>(), value in any::<u8>(),
    ) {
        let good = table(codec, &symbols);
        let mut bytes = Vec::new();
        good.write(&mut bytes);
        let at = at.index(bytes.len());
        bytes[at] = value;
        if let Ok(mutated) = Table::read(codec, &bytes) {
            // Another table: what the good one coded may decode to anything or nothing, but all
            // decoders agree on it.
            let _ = decode(&mutated, &encoded(&good, &symbols), symbols.len());
        }
    }

    #[test]
    fn arbitrary_bytes_are_no_danger_as_a_chunk(
        codec in any_codec(), symbols in any_symbols(), n in 1usize..500, escapes in 0u8..20, far in 0u8..3,
        mut bytes in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        let table = table(codec, &symbols);
        let _ = decode(&table, &bytes, n);
        // Again behind a header that gets past the first check.
        let header = [escapes, 0, 0, 0, far, 0, 0, 0];
        for (byte, header) in bytes.iter_mut().zip(header) {
            *byte = header;
        }
        let _ = decode(&table, &bytes, n);
    }

    #[test]
    fn mutated_chunks_are_no_danger(
        codec in any_codec(),
        symbols in any_symbols(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        n in 1usize..800,
    ) {
        let table = table(codec, &symbols);
        let mut chunk = encoded(&table, &symbols);
        for (at, value) in edits {
            let at = at.index(chunk.len());
            chunk[at] = value;
        }
        let _ = decode(&table, &chunk, symbols.len());
        let _ = decode(&table, &chunk, n);
    }
}
