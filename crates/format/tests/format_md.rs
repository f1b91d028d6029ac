//! FORMAT.md says what the code does: its tables and its example are compared with the constants and the encoder.

mod common;

use common::{Kind, Random, codecs, tensor};
use tersor_codec::{CodecKind, FAR_BYTES, Table, block_ans, fixed, huffman, rans, rans_pairs, tiered};
use tersor_format::{
    BLOB_ALIGN, CHUNK_ALIGN, CHUNK_SYMBOLS_TARGET, FIELDS, HEADER_BYTES, INDEX_ENTRY_BYTES, MAGIC, ScaleScheme, TILE_COLS, TILE_ROWS,
    VERSION, encode_tensor, limits,
};
use tersor_quant::{QuantizedTensor, Scales};

const DOCUMENT: &str = include_str!("../../../FORMAT.md");

/// Cells of the table whose first column is headed `first` in the section headed `section`.
fn table(section: &str, first: &str) -> Vec<Vec<String>> {
    let start = DOCUMENT.find(&format!("\n{section}\n")).unwrap_or_else(|| panic!("section {section}"));
    let cells = |line: &str| -> Vec<String> { line.trim_matches('|').split('|').map(|cell| cell.trim().replace('`', "")).collect() };
    let rows: Vec<_> = DOCUMENT[start + 1..]
        .lines()
        .skip_while(|line| !line.starts_with(&format!("| {first} |")))
        .take_while(|line| line.starts_with('|'))
        .skip(2)
        .map(cells)
        .collect();
    assert!(!rows.is_empty(), "table of {first} in {section}");
    rows
}

fn number(cell: &str) -> u64 {
    cell.parse().unwrap_or_else(|_| panic!("a number: {cell:?}"))
}

#[test]
fn header_fields() {
    let documented: Vec<(String, usize, usize)> =
        table("### Header", "field").into_iter().map(|row| (row[0].clone(), number(&row[1]) as usize, number(&row[2]) as usize)).collect();
    let coded: Vec<_> = FIELDS.iter().map(|f| (f.name.to_owned(), f.offset, f.bytes)).collect();
    assert_eq!(documented, coded);
    let mut end = 0;
    for field in FIELDS {
        assert_eq!(field.offset, end, "{}", field.name);
        end += field.bytes;
    }
    assert_eq!(end, HEADER_BYTES);
    for row in table("### Header", "field") {
        let width = match row[3].as_str() {
            "" => continue,
            kind => number(&kind[1..]) as usize / 8,
        };
        assert_eq!(width, number(&row[2]) as usize, "type of {}", row[0]);
    }
    assert!(DOCUMENT.contains(&format!("`{}`", std::str::from_utf8(&MAGIC).unwrap())));
    assert_eq!(number(&table("### Header", "field")[1][4]), u64::from(VERSION));
}

#[test]
fn ids() {
    let codecs: Vec<_> = CodecKind::ALL.iter().map(|kind| (u64::from(kind.code()), kind.name().to_owned())).collect();
    let documented: Vec<_> = table("## Codecs", "id").into_iter().map(|row| (number(&row[0]), row[1].clone())).collect();
    assert_eq!(documented, codecs);
    let schemes: Vec<_> = table("## Scales", "id").into_iter().map(|row| (number(&row[0]), row[1].clone())).collect();
    let names = ["tensor", "row", "group affine", "group symmetric"].map(str::to_owned);
    let coded: Vec<_> = ScaleScheme::ALL.iter().map(|scheme| u64::from(scheme.id())).zip(names).collect();
    assert_eq!(schemes, coded);
}

#[test]
fn limits_and_constants() {
    let limits = [
        limits::DIM_MAX,
        limits::SYMBOLS_MAX,
        limits::CHUNK_SYMBOLS_MAX,
        limits::TABLE_BYTES_MAX,
        limits::PAYLOAD_BYTES_MAX,
        limits::HEADER_BYTES_MAX,
        limits::JSON_BYTES_MAX,
    ];
    let documented: Vec<_> = table("## Limits", "limit").iter().map(|row| number(&row[1])).collect();
    assert_eq!(documented, limits);
    let states = |text: String| assert!(DOCUMENT.contains(&text), "{text}");
    states(format!("A *tile* is {TILE_ROWS} rows x\n{TILE_COLS} columns"));
    states(format!("One entry per chunk, {INDEX_ENTRY_BYTES} bytes"));
    states(format!("^ each at a multiple of {CHUNK_ALIGN} from the start of the blob"));
    states(format!("^ each a multiple of {BLOB_ALIGN} long"));
    states(format!("The {} bytes at the end", tersor_codec::PADDING_BYTES));
    assert_eq!(CHUNK_SYMBOLS_TARGET, 65_536);
    states("writers aim at 65,536 symbols".to_owned());
}

/// Lengths of tables and chunks as the document adds them up, against those of the encoder.
#[test]
fn widths_of_tables_and_chunks() {
    let rows = table("## Codecs", "part");
    let width = |part: &str| {
        let row = rows.iter().find(|row| row[0] == part).unwrap_or_else(|| panic!("width of {part}"));
        number(&row[1]) as usize
    };
    assert_eq!(width("far entry"), FAR_BYTES);
    for codec in codecs() {
        let encoded = encode_tensor(&tensor(&mut Random(3), 40, 33, Kind::Row), codec, 1024).unwrap();
        let coded = encoded.tensor();
        let table_bytes = coded.header().table_bytes as usize;
        for chunk in 0..coded.chunk_count() {
            let (bytes, n) = (coded.chunk(chunk), coded.chunk_symbols(chunk));
            let front = width("escape_bytes") + width("far_count");
            let far = |count: usize| count * width("far entry");
            let (table_expected, chunk_expected) = match coded.table() {
                Table::Fixed(table) => {
                    let p = table.params();
                    let parts = fixed::Chunk::parse(p, n, bytes).unwrap();
                    let bits = usize::from(p.bits);
                    let fields = match bits {
                        8 => n,
                        4 => n.div_ceil(128) * 64,
                        2 => n.div_ceil(256) * 64,
                        _ => n.div_ceil(64) * 8 * bits,
                    };
                    (width("fixed table"), front + fields + parts.escapes.len() + far(parts.far.len()))
                }
                Table::Huffman(table) => {
                    let p = table.params();
                    let parts = huffman::Chunk::parse(p, n, bytes).unwrap();
                    let lanes = usize::from(p.lanes) * width("huffman lane_bytes");
                    let entries = table.entries().len() * width("huffman table, entry");
                    let streams = parts.streams.len();
                    let sum = front + lanes + streams + parts.escapes.len() + far(parts.far.len());
                    (width("huffman table, count") + entries, sum)
                }
                Table::Rans(table) => {
                    let p = table.params();
                    let parts = rans::Chunk::parse(p, n, bytes).unwrap();
                    let states = usize::from(p.lanes) * usize::from(p.state_bits) / 8;
                    assert_eq!(&bytes[front..front + states], parts.states);
                    let entries = table.entries().len() * width("rans table, entry");
                    let sum = front + states + parts.words.len() + parts.escapes.len() + far(parts.far.len());
                    (width("rans table, count") + entries, sum)
                }
                Table::BlockAns(table) => {
                    let p = table.params();
                    let parts = block_ans::Chunk::parse(p, n, bytes).unwrap();
                    let index = n.div_ceil(p.block_symbols as usize) * width("block-ans block_bytes");
                    let entries = table.entries().len() * width("rans table, entry");
                    let sum = width("far_count") + index + parts.blocks.len() + far(parts.far.len());
                    (width("rans table, count") + entries, sum)
                }
                Table::Tiered(table) => {
                    let parts = tiered::Chunk::parse(table, n, bytes).unwrap();
                    let tiers = table.tiers().len();
                    let tiles_per_line = 8usize.checked_div(table.window().raw_bits().into());
                    let tiles = n.div_ceil(64).next_multiple_of(2);
                    assert_eq!(parts.raw_lines.len(), tiles_per_line.map_or(0, |tiles_per_line| tiles.div_ceil(tiles_per_line) * 64));
                    let sizes = table.tiers().iter().zip(parts.tiers).map(|(tier, (pairs, fields))| {
                        let (bits, tiles) = (usize::from(tier.bits()), pairs.div_ceil(64));
                        let last = match (bits, tiles % 8) {
                            (3 | 4, rest) => rest.div_ceil(2).min(bits),
                            (5, rest) => rest.min(bits),
                            (_, rest) => rest - rest / 4,
                        };
                        assert_eq!(fields.len(), (tiles / 8 * bits + last) * 64, "{bits} bits, {tiles} tiles");
                        fields.len()
                    });
                    let counts =
                        width("listed") + width("far_count") + width("escape_bytes") + tiers.saturating_sub(1) * width("tiered pairs");
                    let listed = parts.listed.bytes().len() * (width("listed gap") + width("listed byte"));
                    let sum = counts + listed + sizes.sum::<usize>() + parts.escapes.len() + parts.raw_lines.len() + far(parts.far.len());
                    let entries: usize = table.tiers().iter().map(|tier| (1 << tier.bits()) - 1).sum();
                    let front =
                        width("tiered table, base") + width("tiered table, tiers and raw_bits") + tiers * width("tiered table, bits");
                    (front + entries * width("tiered table, entry"), sum)
                }
                Table::RansPairs(table) => {
                    let parts = rans_pairs::Chunk::parse(table, n, bytes).unwrap();
                    let tiles_per_line = 8usize.checked_div(table.window().raw_bits().into());
                    let tiles = n.div_ceil(64).next_multiple_of(2);
                    assert_eq!(parts.raw_lines.len(), tiles_per_line.map_or(0, |tiles_per_line| tiles.div_ceil(tiles_per_line) * 64));
                    assert_eq!(parts.states.len(), width("rans-pairs states"));
                    let front = width("listed") + width("far_count") + width("escape_bytes") + width("rans-pairs states");
                    let listed = parts.listed.bytes().len() * (width("listed gap") + width("listed byte"));
                    let sum = front + listed + parts.escapes.len() + parts.raw_lines.len() + parts.words.len() + far(parts.far.len());
                    let table_front =
                        width("rans-pairs table, base") + width("rans-pairs table, raw_bits") + width("rans-pairs table, count");
                    (table_front + table.entries().len() * width("rans-pairs table, entry"), sum)
                }
                _ => unreachable!("six codecs"),
            };
            assert_eq!(table_bytes, table_expected, "{codec}");
            assert_eq!(bytes.len(), chunk_expected, "{codec}");
        }
    }
}

/// The ranges of the parameters: the ends of each are accepted, what is beyond is not.
#[test]
fn parameter_ranges() {
    let documented = table("## Codecs", "id");
    let ranges = |row: usize, col: usize| -> Vec<(u32, u32)> {
        let ends = documented[row][col].split_whitespace().filter_map(|word| word.split_once("..="));
        ends.map(|(a, b)| (a.parse().unwrap(), b.parse().unwrap())).collect()
    };
    let check = |(min, max): (u32, u32), id: &dyn Fn(u32) -> String| {
        for (value, good) in [(min, true), (max, true), (min - 1, false), (max + 1, false)] {
            assert_eq!(id(value).parse::<tersor_codec::Codec>().is_ok(), good, "{}", id(value));
        }
    };
    check(ranges(0, 3)[0], &|v| format!("fixed/b{v}"));
    check(ranges(1, 3)[0], &|v| format!("huffman/c{v}-l4"));
    check(ranges(1, 4)[0], &|v| format!("huffman/c12-l{v}"));
    check(ranges(1, 3)[0], &|v| format!("huffman/c{v}-planes"));
    check(ranges(2, 3)[0], &|v| format!("rans/s16-w8-p{v}-l64"));
    check(ranges(2, 3)[1], &|v| format!("rans/s32-w16-p{v}-l64"));
    check(ranges(2, 4)[0], &|v| format!("rans/s16-w8-p7-l{v}"));
    check(ranges(3, 3)[0], &|v| format!("block-ans/s16-w8-p{v}-n64"));
    check(ranges(3, 3)[1], &|v| format!("block-ans/s32-w16-p{v}-n64"));
    check(ranges(3, 5)[0], &|v| format!("block-ans/s32-w16-p12-n{v}"));
}

#[test]
fn worked_example() {
    let dump = DOCUMENT.split("```hex\n").nth(1).and_then(|rest| rest.split("```").next()).expect("a hex dump");
    let mut documented = Vec::new();
    for line in dump.lines() {
        let (offset, bytes) = line.split_once("  ").unwrap();
        assert_eq!(usize::from_str_radix(offset, 16).unwrap(), documented.len());
        documented.extend(bytes.split(' ').map(|byte| u8::from_str_radix(byte, 16).unwrap()));
    }
    let scales = Scales::Row { scales: vec![0x3c00, 0x3800], scale_exponent: 0 };
    let tensor = QuantizedTensor { rows: 2, cols: 3, symbols: vec![1, 0, -1, 2, 9, 300], scales };
    let encoded = encode_tensor(&tensor, "rans/s16-w8-p6-l4".parse().unwrap(), 64).unwrap();
    assert_eq!(encoded.blob(), documented);
    assert!(DOCUMENT.contains(&format!("the blob has {} bytes", documented.len())));
}
