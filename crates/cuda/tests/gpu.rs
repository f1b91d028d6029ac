//! Every kernel against the host: products and decoders exactly, on fresh pseudo-random inputs with outputs poisoned first; activations within their rounding.
//!
//! Needs a GPU; elsewhere it says so and passes, unless `TERSOR_REQUIRE` names `cuda`. `TERSOR_SEED` fixes the inputs.

use std::sync::Arc;

use tersor_codec::{Codec, Histogram, Table, encode_chunk, rans};
use tersor_cuda::layout::{Geometry, Plain, QuadMatrix, QuadParams, STEP_HIDDEN_MAX, Stack, Statistics, TILE_ROWS};
use tersor_cuda::{
    Activations, AttentionAt, Buffer, CudaError, Device, Form, Heads, Input, Kernels, Mixed, Place, PlainMatrix, Prepared, QuadAt,
    QuadPlaces, Queue, RansDecoder, RansPart, RansTable, Step, StepInput, StepLayer, StepMatrix, StepModel, Stream, SumsAt,
};

struct Gpu {
    device: Arc<Device>,
    kernels: Kernels,
}

fn gpu() -> Option<Gpu> {
    let found = Device::open(0);
    if let Err(e) = &found {
        let required = std::env::var("TERSOR_REQUIRE").is_ok_and(|list| list.split(',').any(|name| name == "cuda"));
        assert!(!required, "TERSOR_REQUIRE names cuda: {e}");
        eprintln!("SKIPPED: {e}");
        return None;
    }
    let device = found.unwrap();
    let kernels = Kernels::load(&device, None).unwrap();
    Some(Gpu { device, kernels })
}

/// xorshift64* (Vigna 2016).
struct Rng(u64);

impl Rng {
    fn new(stream: u64) -> Self {
        let seed = std::env::var("TERSOR_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or_else(|| std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64);
        eprintln!("TERSOR_SEED={seed}");
        Self((seed ^ stream.wrapping_mul(0x9e37_79b9_7f4a_7c15)) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// About Gaussian, by a sum of uniforms, with one outlier in 3000.
    fn symbols(&mut self, count: usize, deviation: f64) -> Vec<i16> {
        let one = |rng: &mut Self| {
            let sum: f64 = (0..12).map(|_| rng.unit()).sum::<f64>() - 6.0;
            let scale = if rng.next().is_multiple_of(3000) { 60.0 } else { 1.0 };
            (sum * deviation * scale).round() as i16
        };
        (0..count).map(|_| one(self)).collect()
    }

    fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| ((self.unit() - 0.5) * 4.0 * if self.next().is_multiple_of(97) { 20.0 } else { 1.0 }) as f32).collect()
    }
}

/// Deviations for entropies of about 2.2, 3.0 and 3.8 bits, and the raw low bits that suit them.
const KINDS: [(f64, u32); 3] = [(1.1, 0), (2.0, 1), (3.3, 2)];

struct Case {
    rows: usize,
    cols: usize,
    symbols: Vec<i16>,
    /// (padded cols)
    geometry: Geometry,
    quad: QuadMatrix,
    places: QuadPlaces,
    coded: Buffer,
    plain: Plain,
}

impl Case {
    fn new(gpu: &Gpu, rng: &mut Rng, rows: usize, cols: usize, (deviation, low_bits): (f64, u32), supersteps: usize) -> Self {
        let symbols = rng.symbols(rows * cols, deviation);
        let stack = Stack::new(cols, &[&symbols]).unwrap();
        let geometry = Geometry::with_supersteps_max(rows, cols, supersteps).unwrap();
        let statistics = Statistics::sample(&stack, geometry, 2);
        let params = QuadParams { low_bits, window_bits: 12, copies_log2: rng.next() as u32 % 3 };
        let quad = QuadMatrix::encode(&stack, geometry, params, &statistics, 2).unwrap();
        let plain = Plain::pack(&stack, geometry, low_bits, 2).unwrap();
        let places = QuadPlaces::new(&quad);
        let mut image = vec![0; places.bytes()];
        places.write(&quad, &mut image);
        let coded = gpu.device.upload(&image, "a case").unwrap();
        Self { rows, cols, symbols, geometry, quad, places, coded, plain }
    }

    fn quad_at(&self) -> QuadAt<'_> {
        QuadAt { places: &self.places, buffer: &self.coded, at: 0 }
    }

    /// 16 * the sums of a row, from what the device prepared.
    fn expected(&self, q: &[i8], info: &[[i32; 2]], row: usize) -> i64 {
        let row = &self.symbols[row * self.cols..][..self.cols];
        let sums = row.chunks(128).zip(q.chunks(128)).zip(info);
        sums.map(|((w, q), info)| i64::from(info[0]) * 16 * w.iter().zip(q).map(|(&w, &q)| i64::from(w) * i64::from(q)).sum::<i64>()).sum()
    }
}

fn check_product(gpu: &Gpu, case: &Case, form: &Form<'_>, tokens: usize, rng: &mut Rng, what: &str) {
    let k = case.geometry.padded_cols();
    let x = rng.floats(tokens * case.cols);
    let x = gpu.device.upload(&x, "x").unwrap();
    let activations = Activations::new(&gpu.device, tokens, k).unwrap();
    let rows = case.geometry.padded_rows();
    let part = gpu.device.allocate(rows * 8 * tokens.next_multiple_of(32), "sums").unwrap();
    part.fill_range(0, part.bytes(), 0xab, Stream::Compute).unwrap();
    let mut queue = Queue::new(&gpu.kernels);
    queue.prepare(Input::Copy(&x), &activations, tokens, case.cols, form, &part).unwrap();
    queue.product(form, &activations, tokens, &part).unwrap();
    let sums: Vec<i64> = part.read(0, tokens * rows).unwrap();
    let Prepared { q, info, .. } = activations.download(tokens, k).unwrap();
    let mut wrong = 0;
    for token in 0..tokens {
        let (q, info) = (&q[token * k..][..k], &info[token * k / 128..][..k / 128]);
        for row in 0..rows {
            let found = sums[token * rows + row];
            let expected = if row < case.rows { case.expected(q, info, row) } else { 0 };
            if found != expected {
                wrong += 1;
                if wrong <= 3 {
                    eprintln!("{what}: token {token} row {row}: {found} instead of {expected}");
                }
            }
        }
    }
    assert_eq!(wrong, 0, "{what}: {wrong} of {} sums are wrong", tokens * rows);
}

/// (rows, cols, most supersteps of a tile)
const SHAPES: [(usize, usize, usize); 6] = [(64, 1024, 8), (272, 2048, 16), (1000, 2816, 11), (16, 128, 1), (40, 4224, 32), (2048, 512, 4)];

#[test]
fn products_and_bulk_decoding_are_exact() {
    let Some(gpu) = gpu() else { return };
    let mut rng = Rng::new(1);
    for (rows, cols, supersteps) in SHAPES {
        for kind in KINDS {
            let case = Case::new(&gpu, &mut rng, rows, cols, kind, supersteps);
            let what = format!("{rows}x{cols} r{}", kind.1);
            let decoded = PlainMatrix::upload(&gpu.device, &case.plain).unwrap();
            assert_eq!(decoded.download().unwrap(), case.plain, "{what}: what was sent comes back");
            for tokens in [1, 5, 8, 16, 20, 33] {
                check_product(&gpu, &case, &decoded.form(), tokens, &mut rng, &format!("plain {what} t{tokens}"));
                check_product(&gpu, &case, &Form::Quad(case.quad_at()), tokens, &mut rng, &format!("quad {what} t{tokens}"));
            }
            // Bulk decoding: the nibbles are those of the packer.
            let nibbles = gpu.device.allocate(case.plain.words.len() * 4, "nibbles").unwrap();
            nibbles.fill_range(0, nibbles.bytes(), 0xab, Stream::Side).unwrap();
            let quad = case.quad_at();
            let plain = quad.decoded(&nibbles, 0);
            Queue::new(&gpu.kernels).decode(&quad, &plain, Stream::Side).unwrap();
            gpu.device.synchronize().unwrap();
            let words: Vec<u32> = nibbles.read(0, case.plain.words.len()).unwrap();
            assert!(words == case.plain.words, "{what}: bulk decoding differs from the packer");
            assert_eq!(case.quad.decode().unwrap(), case.symbols, "{what}: the oracle");
            check_product(&gpu, &case, &Form::Plain(plain), 1, &mut rng, &format!("decoded {what}"));
        }
    }
}

/// The file's order of symbols: tiles of 16 rows x 4 columns.
fn file_order(symbols: &[i16], rows: usize, cols: usize) -> Vec<i16> {
    let steps = cols.div_ceil(4);
    let mut out = vec![0; rows.div_ceil(16) * steps * 64];
    for row in 0..rows {
        for col in 0..cols {
            out[((row / 16 * steps + col / 4) * 64) + row % 16 * 4 + col % 4] = symbols[row * cols + col];
        }
    }
    out
}

/// A matrix as the file holds it.
struct Filed {
    table: Table,
    /// Chunks with their row tiles.
    chunks: Vec<(Vec<u8>, usize)>,
    cols: usize,
    /// Symbols that the file's header would call wide.
    wide: usize,
}

impl Filed {
    /// `table`: made for the file's order of the symbols.
    fn new(symbols: &[i16], cols: usize, row_tiles: usize, table: impl FnOnce(&Histogram) -> Table) -> Self {
        let ordered = file_order(symbols, symbols.len() / cols, cols);
        let mut histogram = Histogram::new();
        histogram.add(&ordered);
        let table = table(&histogram);
        let row_tile = cols.div_ceil(4) * 64;
        let chunk = |symbols: &[i16]| {
            let mut bytes = Vec::new();
            encode_chunk(&table, symbols, &mut bytes).unwrap();
            (bytes, symbols.len() / row_tile)
        };
        let chunks = ordered.chunks(row_tile * row_tiles).map(chunk).collect();
        let wide = symbols.iter().filter(|symbol| !(-7..=7).contains(*symbol)).count();
        Self { table, chunks, cols, wide }
    }

    fn part(&self, row_tile: usize) -> RansPart<'_> {
        RansPart {
            table: RansTable::new(&self.table).unwrap(),
            chunks: self.chunks.iter().map(|(bytes, row_tiles)| (&bytes[..], *row_tiles)).collect(),
            cols: self.cols,
            row_tile,
            far_max: self.wide,
        }
    }
}

/// Two matrices, one below the other, decoded by the device and packed by the host.
#[allow(clippy::too_many_arguments)] // What a stack is made of.
fn check_chunks(
    gpu: &Gpu,
    decoder: &mut RansDecoder,
    cols: usize,
    supersteps: usize,
    low_bits: u32,
    row_tiles: usize,
    parts: [Vec<i16>; 2],
    mut table: impl FnMut(&Histogram) -> Table,
    what: &str,
) {
    let borrowed: Vec<&[i16]> = parts.iter().map(|part| &part[..]).collect();
    let stack = Stack::new(cols, &borrowed).unwrap();
    let geometry = Geometry::with_supersteps_max(stack.geometry().unwrap().rows(), cols, supersteps).unwrap();
    let expected = Plain::pack(&stack, geometry, low_bits, 2).unwrap();
    let filed = parts.each_ref().map(|part| Filed::new(part, cols, row_tiles, &mut table));
    let jobs: Vec<RansPart<'_>> = filed.iter().enumerate().map(|(i, filed)| filed.part(stack.first_row(i) / TILE_ROWS)).collect();
    let decoded = decoder.decode(&gpu.kernels, geometry, low_bits, &jobs).unwrap().download().unwrap();
    // Symbols beyond -127..=127, and those that `rans-pairs` lists, are kept as another nibble and difference than the packer's: the symbols count.
    assert!(decoded.unpack().unwrap() == expected.unpack().unwrap(), "{what}");
}

#[test]
fn chunks_of_the_file_decode_to_the_plain_layout() {
    let Some(gpu) = gpu() else { return };
    let mut rng = Rng::new(2);
    let mut decoder = RansDecoder::new(&gpu.device).unwrap();
    // One symbol in the table, few, each of 256 by a word, and next to none but ESCAPE: 64 words or escapes a step.
    let flat: Vec<u8> = [0, 1].into_iter().chain((0..=255).flat_map(|byte| [byte, 1, 0])).collect();
    let coarse = vec![2, 0, 0, 255, 0, 128, 1, 0];
    for (rows, cols, supersteps) in SHAPES.into_iter().chain([(33, 130, 2), (1, 1, 1), (100, 36, 1), (130, 300, 1), (75, 259, 2)]) {
        for prob_bits in 1..=8 {
            if prob_bits < 6 && rows * cols > 50_000 {
                continue; // nearly all symbols are escaped
            }
            let codec = Codec::Rans(rans::Params { prob_bits, ..rans::Params::DEFAULT });
            for (deviation, low_bits) in KINDS.into_iter().chain([(0.0, 1)]) {
                let row_tiles = 1 + rng.next() as usize % 3;
                let parts = [rows, rows.div_ceil(3)].map(|rows| rng.symbols(rows * cols, deviation));
                let table = |histogram: &Histogram| Table::build(codec, histogram).unwrap();
                let what = format!("{rows}x{cols} p{prob_bits} by {row_tiles} row tiles, deviation {deviation}, r{low_bits}");
                check_chunks(&gpu, &mut decoder, cols, supersteps, low_bits, row_tiles, parts, table, &what);
            }
        }
        for (table, name) in [(&flat, "flat"), (&coarse, "coarse")] {
            let low_bits = rng.next() as u32 % 3;
            let codec = Codec::Rans(rans::Params { prob_bits: 8, ..rans::Params::DEFAULT });
            let parts = [rows.min(100), 20].map(|rows| rng.symbols(rows * cols, 45.0));
            let what = format!("{rows}x{cols}, {name} table, r{low_bits}");
            check_chunks(&gpu, &mut decoder, cols, supersteps, low_bits, 2, parts, |_| Table::read(codec, table).unwrap(), &what);
        }
    }
}

/// A table of `rans-pairs` of few entries, so that most pairs are escaped, and a step may have 64 of them.
fn coarse_pairs(base: u8, raw_bits: u8) -> Table {
    Table::read(Codec::RansPairs, &[base, raw_bits, 4, 0, 0, 66, 0x78, 1, 0x88, 64, 0x98, 125]).unwrap()
}

#[test]
fn chunks_of_pairs_decode_to_the_plain_layout() {
    let Some(gpu) = gpu() else { return };
    let mut rng = Rng::new(8);
    let mut decoder = RansDecoder::new(&gpu.device).unwrap();
    let built = |histogram: &Histogram| Table::build(Codec::RansPairs, histogram).unwrap();
    let raw_bits = |table: &Table| match table {
        Table::RansPairs(table) => table.window().raw_bits(),
        _ => unreachable!("a table of rans-pairs"),
    };
    // Odd numbers of tiles in a row tile and in a chunk, rows of one tile and of a few, besides.
    let mut seen = [false; 3];
    for (rows, cols, supersteps) in SHAPES.into_iter().chain([(33, 130, 2), (1, 1, 1), (100, 36, 1), (130, 300, 1), (75, 259, 2)]) {
        for (i, (deviation, mean)) in [(0.3, 0), (1.1, 0), (2.4, 0), (6.0, 0), (2.0, 60), (2.0, -40)].into_iter().enumerate() {
            if mean != 0 && rows * cols > 200_000 {
                continue; // all symbols are far ones
            }
            let symbols = |rng: &mut Rng, rows: usize| rng.symbols(rows * cols, deviation).iter().map(|symbol| symbol + mean).collect();
            for low_bits in if rows * cols < 50_000 { 0..3 } else { i as u32 % 3..i as u32 % 3 + 1 } {
                let row_tiles = 1 + rng.next() as usize % 3;
                let parts = [rows, rows.div_ceil(3)].map(|rows| symbols(&mut rng, rows));
                let table = |histogram: &Histogram| {
                    let table = built(histogram);
                    seen[usize::from(raw_bits(&table))] = true;
                    table
                };
                let what = format!("{rows}x{cols} by {row_tiles} row tiles, deviation {deviation} from {mean}, r{low_bits}");
                check_chunks(&gpu, &mut decoder, cols, supersteps, low_bits, row_tiles, parts, table, &what);
            }
        }
        for raw in 0..3 {
            for base in [128 - (8 << raw), 127 - (8 << raw), 1, 100] {
                let low_bits = rng.next() as u32 % 3;
                let parts = [rows.min(100), 20].map(|rows| rng.symbols(rows * cols, 1.5));
                let what = format!("{rows}x{cols}, {raw} raw bits from {base}, r{low_bits}");
                check_chunks(&gpu, &mut decoder, cols, supersteps, low_bits, 2, parts, |_| coarse_pairs(base, raw), &what);
            }
        }
    }
    assert_eq!(seen, [true; 3], "tables with 0, 1 and 2 raw bits");
}

#[test]
fn a_damaged_chunk_is_refused() {
    let Some(gpu) = gpu() else { return };
    let mut rng = Rng::new(3);
    let (rows, cols) = (64, 512);
    let symbols = rng.symbols(rows * cols, 2.0);
    for codec in [Codec::Rans(rans::Params::DEFAULT), Codec::RansPairs] {
        let mut filed = Filed::new(&symbols, cols, 1, |histogram| Table::build(codec, histogram).unwrap());
        // Much at once: after a single flipped bit one chunk in a hundred falls into step again and ends well, with few symbols wrong.
        let chunk = &mut filed.chunks[2].0;
        let middle = chunk.len() / 2;
        chunk[middle..middle + 64].iter_mut().for_each(|byte| *byte ^= 0x5a);
        let geometry = Geometry::new(rows, cols).unwrap();
        let error = RansDecoder::new(&gpu.device).unwrap().decode(&gpu.kernels, geometry, 0, &[filed.part(0)]).unwrap_err();
        assert_eq!(error.to_string(), "chunk 2 is corrupt: words, escapes and states do not meet", "{codec}");
    }
}

/// Anywhere in a chunk: it is refused, or its symbols are wrong, but nothing else happens, and the next matrix is decoded.
#[test]
fn damage_of_any_kind_harms_nothing() {
    let Some(gpu) = gpu() else { return };
    let mut rng = Rng::new(10);
    let (rows, cols) = (48, 260);
    let mut decoder = RansDecoder::new(&gpu.device).unwrap();
    let codecs = [Codec::RansPairs, Codec::Rans(rans::Params::DEFAULT)];
    for (codec, deviation) in codecs.into_iter().flat_map(|codec| [1.1, 2.4, 6.0].map(|deviation| (codec, deviation))) {
        let symbols = rng.symbols(rows * cols, deviation);
        let mut refused = 0;
        for round in 0..24 {
            let mut filed = Filed::new(&symbols, cols, 1, |histogram| Table::build(codec, histogram).unwrap());
            let chunk = &mut filed.chunks[1].0;
            // The head is small: half of the rounds are for it.
            let start = rng.next() as usize % if round % 2 == 0 { 200.min(chunk.len()) } else { chunk.len() };
            let end = (start + 1 + rng.next() as usize % 64).min(chunk.len());
            chunk[start..end].iter_mut().for_each(|byte| *byte = rng.next() as u8);
            match decoder.decode(&gpu.kernels, Geometry::new(rows, cols).unwrap(), 1, &[filed.part(0)]) {
                Ok(_) => {}
                Err(CudaError::Corrupt { chunk }) => {
                    assert_eq!(chunk, 1);
                    refused += 1;
                }
                Err(e) => assert!(matches!(e, CudaError::Unsupported { .. }), "{e}"),
            }
        }
        assert!(refused > 8, "{codec}: {refused} of 24 damaged chunks were refused");
        let table = |histogram: &Histogram| Table::build(codec, histogram).unwrap();
        check_chunks(&gpu, &mut decoder, cols, 8, 1, 1, [symbols.clone(), symbols], table, "after damage");
    }
}

/// The unit of what attention and silu leave, unless it is out of its range (transformer.cuh).
const FIXED_UNIT: f32 = 1.0 / (1 << 22) as f32;

/// Prepared activations are the input within half a step of each superstep, and their statistics are right.
fn check_prepared(q: &[i8], info: &[[i32; 2]], unit: f32, x: &[f32], what: &str) {
    for (s, ((q, info), x)) in q.chunks(128).zip(info).zip(x.chunks(128)).enumerate() {
        let step = info[0] as f32 * unit;
        let m_max = if unit == FIXED_UNIT { 1 << 26 } else { 4095 };
        assert!((0..=m_max).contains(&info[0]), "{what}: m {}", info[0]);
        let even: i32 = q.iter().step_by(2).map(|&q| i32::from(q)).sum();
        assert_eq!(info[1], 128 * even, "{what}: superstep {s}");
        for (i, (&q, &x)) in q.iter().zip(x).enumerate() {
            let error = (f32::from(q) * step - x).abs();
            assert!(
                error <= 0.501 * step + 1e-6 * x.abs() + 1e-30,
                "{what}: column {}: {} for {x}, step {step}",
                s * 128 + i,
                f32::from(q) * step
            );
        }
        let absmax = x.iter().fold(0f32, |m, x| m.max(x.abs()));
        assert!(step <= absmax / 127.0 * 1.0001 + unit * 1.0001, "{what}: superstep {s} has a step of {step} for {absmax}");
    }
}

#[test]
fn activations_are_prepared() {
    let Some(gpu) = gpu() else { return };
    let mut rng = Rng::new(4);
    for (cols, tokens) in [(512, 1), (300, 3), (4096, 1), (14336, 2), (28672, 1), (2816, 20)] {
        let case = Case::new(&gpu, &mut rng, 16, cols, KINDS[0], 32);
        let form = Form::Quad(case.quad_at());
        let k = case.geometry.padded_cols();
        let out = Activations::new(&gpu.device, tokens, k).unwrap();
        let cleared = gpu.device.allocate(tokens.next_multiple_of(32) * 16 * 8, "sums").unwrap();
        cleared.fill_range(0, cleared.bytes(), 0xab, Stream::Compute).unwrap();
        let what = format!("{cols} columns, {tokens} tokens");
        // Copy.
        let x = rng.floats(tokens * cols);
        let input = gpu.device.upload(&x, "x").unwrap();
        Queue::new(&gpu.kernels).prepare(Input::Copy(&input), &out, tokens, cols, &form, &cleared).unwrap();
        let Prepared { q, info, unit } = out.download(tokens, k).unwrap();
        for t in 0..tokens {
            check_prepared(&q[t * k..][..k], &info[t * k / 128..][..k / 128], unit[t], &x[t * cols..][..cols], &format!("copy, {what}"));
        }
        // Norm with an addition, rows in reverse.
        let n = cols.next_multiple_of(16);
        let sums: Vec<i64> = (0..tokens * n).map(|_| (rng.next() % 2_000_001) as i64 - 1_000_000).collect();
        let units: Vec<f32> = (0..tokens).map(|_| (rng.unit() * 1e-6) as f32).collect();
        let scales: Vec<f32> = (0..n).map(|_| rng.unit() as f32).collect();
        let biases: Vec<f32> = rng.floats(n);
        let weight = rng.floats(cols);
        let rows: Vec<u32> = (0..tokens as u32).rev().collect();
        let upload = |data: &[f32]| gpu.device.upload(data, "data").unwrap();
        let (part, unit_b, scale, bias) = (gpu.device.upload(&sums, "sums").unwrap(), upload(&units), upload(&scales), upload(&biases));
        let add = SumsAt { sum: &part, unit: &unit_b, scale: &scale, bias: Some(&bias), n };
        let value = |t: usize, row: usize| (sums[t * n + row] as f64 / 16.0 * f64::from(units[t])) as f32 * scales[row] + biases[row];
        let rows_b = gpu.device.upload(&rows, "rows").unwrap();
        let (weight_b, eps) = (upload(&weight), 1e-5f32);
        let norm = Input::Norm { x: &input, weight: &weight_b, eps, add: Some(add), rows: Some(&rows_b) };
        Queue::new(&gpu.kernels).prepare(norm, &out, tokens, cols, &form, &cleared).unwrap();
        let Prepared { q, info, unit } = out.download(tokens, k).unwrap();
        let stream: Vec<f32> = input.read(0, tokens * cols).unwrap();
        for t in 0..tokens {
            let row = rows[t] as usize;
            let added: Vec<f32> = (0..cols).map(|i| x[row * cols + i] + value(row, i)).collect();
            for (i, (&found, &added)) in stream[row * cols..][..cols].iter().zip(&added).enumerate() {
                assert!((found - added).abs() <= 1e-5 * added.abs().max(1.0), "norm, {what}: stream {i}: {found} for {added}");
            }
            let mean = added.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>() / cols as f64;
            let inverse = 1.0 / (mean + f64::from(eps)).sqrt();
            let normed: Vec<f32> = added.iter().zip(&weight).map(|(x, w)| (f64::from(*x) * inverse * f64::from(*w)) as f32).collect();
            let slack: Vec<f32> = normed.clone();
            check_prepared(&q[t * k..][..k], &info[t * k / 128..][..k / 128], unit[t], &slack, &format!("norm, {what}"));
        }
        // silu(gate) * up.
        let n = 2 * cols.next_multiple_of(16);
        let sums: Vec<i64> = (0..tokens * n).map(|_| (rng.next() % 2_000_001) as i64 - 1_000_000).collect();
        let scales: Vec<f32> = (0..n).map(|_| 1e-3 * rng.unit() as f32).collect();
        for (of_sums, fixed) in [(0.05f32, true), (500.0, false)] {
            let units: Vec<f32> = vec![of_sums; tokens];
            let (part, unit_b, scale) = (gpu.device.upload(&sums, "sums").unwrap(), upload(&units), upload(&scales));
            let up_row = n / 2;
            let both = SumsAt { sum: &part, unit: &unit_b, scale: &scale, bias: None, n };
            Queue::new(&gpu.kernels).prepare(Input::Silu { sums: both, up_row }, &out, tokens, cols, &form, &cleared).unwrap();
            let Prepared { q, info, unit } = out.download(tokens, k).unwrap();
            for t in 0..tokens {
                let value = |row: usize| (sums[t * n + row] as f64 / 16.0 * f64::from(units[t])) * f64::from(scales[row]);
                let x: Vec<f32> = (0..cols).map(|i| (value(i) / (1.0 + (-value(i)).exp()) * value(up_row + i)) as f32).collect();
                assert_eq!(unit[t] == FIXED_UNIT, fixed, "silu, {what}: the unit is {}", unit[t]);
                check_prepared(&q[t * k..][..k], &info[t * k / 128..][..k / 128], unit[t], &x, &format!("silu of {of_sums}, {what}"));
            }
        }
        assert_eq!(cleared.read::<i64>(0, tokens * 16).unwrap(), vec![0; tokens * 16], "room for the product's sums, {what}");
    }
}

#[test]
fn attention_is_softmax_of_what_rope_kept() {
    let Some(gpu) = gpu() else { return };
    let mut rng = Rng::new(5);
    let cases: [(usize, usize, usize, usize, Option<usize>, bool); 5] = [
        (4, 2, 64, 40, None, false),
        (8, 8, 128, 1300, None, true),
        (6, 2, 96, 70, Some(9), false),
        (2, 1, 256, 33, None, false),
        (4, 1, 16, 5, None, true),
    ];
    for ((heads, kv_heads, head_dim, capacity, window, normed), tokens) in cases.into_iter().flat_map(|case| [(case, 3), (case, 1)]) {
        let (layers, layer, first) = (2, 1, capacity - tokens);
        let what = format!("{tokens} tokens, {heads} heads of {head_dim}, {kv_heads} of keys, {capacity} positions");
        let (k_row, v_row) = ((heads * head_dim).next_multiple_of(16), ((heads + kv_heads) * head_dim).next_multiple_of(16));
        let n = v_row + (kv_heads * head_dim).next_multiple_of(16);
        let sums: Vec<i64> = (0..tokens * n).map(|_| (rng.next() % 200_001) as i64 - 100_000).collect();
        let unit = vec![16e-5f32; tokens];
        let scale = vec![1f32; n];
        let upload = |data: &[f32]| gpu.device.upload(data, "data").unwrap();
        let turn: Vec<f32> = (0..tokens)
            .flat_map(|t| {
                let angle = |i: usize| (t + first) as f64 * 10000f64.powf(-2.0 * i as f64 / head_dim as f64);
                (0..head_dim / 2)
                    .map(move |i| angle(i).cos() as f32)
                    .chain((0..head_dim / 2).map(move |i| angle(i).sin() as f32))
                    .collect::<Vec<_>>()
            })
            .collect();
        // The positions before: keys and values of f16 that are exact in f32.
        let element = |rng: &mut Rng| ((rng.next() % 2049) as i32 - 1024) as f32 / 1024.0;
        let cache: Vec<f32> = (0..2 * layers * kv_heads * capacity * head_dim).map(|_| element(&mut rng)).collect();
        let (keys, values) = cache.split_at(cache.len() / 2);
        let halves = |data: &[f32]| data.iter().map(|x| half_bits(*x)).collect::<Vec<u16>>();
        let (keys_b, values_b) = (gpu.device.upload(&halves(keys), "keys").unwrap(), gpu.device.upload(&halves(values), "values").unwrap());
        let places: Vec<u64> = (0..tokens)
            .flat_map(|t| {
                let Place { keys, values, position, capacity } =
                    Place { keys: keys_b.address(), values: values_b.address(), position: (first + t) as u32, capacity: capacity as u32 };
                [keys, values, u64::from(position) | u64::from(capacity) << 32]
            })
            .collect();
        let places = gpu.device.upload(&places, "places").unwrap();
        let q_b = gpu.device.allocate(tokens * heads * head_dim * 4, "q").unwrap();
        let [out, again] = [(); 2].map(|()| Mixed::new(&gpu.device, tokens, heads, head_dim).unwrap());
        let shape = Heads { heads, kv_heads, head_dim, k_row, v_row };
        let norm_weights: Vec<Vec<f32>> = (0..2).map(|_| rng.floats(head_dim)).collect();
        let norm_buffers = [upload(&norm_weights[0]), upload(&norm_weights[1])];
        let (part, unit_b, scale_b, turn_b) = (gpu.device.upload(&sums, "sums").unwrap(), upload(&unit), upload(&scale), upload(&turn));
        let all = SumsAt { sum: &part, unit: &unit_b, scale: &scale_b, bias: None, n };
        let at = AttentionAt {
            sums: all,
            norms: normed.then(|| [&norm_buffers[0], &norm_buffers[1]]),
            eps: 1e-6,
            heads: shape,
            layer,
            window,
            turn: (&turn_b, 0),
            places: (&places, 0),
            q: &q_b,
            out: &out,
        };
        let mut queue = Queue::new(&gpu.kernels);
        queue.rope(&at, tokens).unwrap();
        queue.attention(&at, tokens).unwrap();
        let caches = || [&keys_b, &values_b].map(|b| b.read::<u16>(0, layers * kv_heads * capacity * head_dim).unwrap());
        let apart = caches();
        // The same in one launch, where there is one for it.
        keys_b.write(0, &halves(keys)).unwrap();
        values_b.write(0, &halves(values)).unwrap();
        Queue::new(&gpu.kernels).attend(&AttentionAt { out: &again, ..at }, tokens).unwrap();
        assert!(caches() == apart, "{what}: attend keeps other keys and values than its parts");
        let (parts, stats) = out.download(tokens, heads, head_dim).unwrap();
        let bits = |(parts, stats): &(Vec<f32>, Vec<[f32; 2]>)| -> Vec<u32> {
            let with_positions = parts.chunks(head_dim).zip(stats).filter(|(_, [_, sum])| *sum > 0.0);
            with_positions.flat_map(|(part, stats)| part.iter().chain(stats).map(|x| x.to_bits()).collect::<Vec<_>>()).collect()
        };
        let (together, parts_and_stats) = (again.download(tokens, heads, head_dim).unwrap(), (parts.clone(), stats.clone()));
        assert!(bits(&together) == bits(&parts_and_stats), "{what}: attend differs from its parts");
        // The parts put together, as prepare_mix does it.
        let mix = |parts: &[f32], stats: &[[f32; 2]]| -> Vec<f32> {
            let highest = stats.iter().map(|s| s[0]).fold(f32::MIN, f32::max);
            let used = || parts.chunks(head_dim).zip(stats).filter(|(_, s)| s[1] > 0.0);
            let total: f32 = used().map(|(_, s)| s[1] * (s[0] - highest).exp2()).sum();
            (0..head_dim).map(|i| used().map(|(part, s)| part[i] * (s[0] - highest).exp2()).sum::<f32>() / total).collect()
        };
        let splits = stats.len() / (tokens * heads);
        let found: Vec<f32> =
            parts.chunks(splits * head_dim).zip(stats.chunks(splits)).flat_map(|(parts, stats)| mix(parts, stats)).collect();
        let case = Case::new(&gpu, &mut rng, 16, heads * head_dim, KINDS[0], 32);
        let form = Form::Quad(case.quad_at());
        let k = case.geometry.padded_cols();
        let prepared = Activations::new(&gpu.device, tokens, k).unwrap();
        let cleared = gpu.device.allocate(tokens.next_multiple_of(32) * 16 * 8, "sums").unwrap();
        Queue::new(&gpu.kernels).prepare(Input::Mix(&out, shape), &prepared, tokens, heads * head_dim, &form, &cleared).unwrap();
        let Prepared { q, info, unit } = prepared.download(tokens, k).unwrap();
        for t in 0..tokens {
            let x = &found[t * heads * head_dim..][..heads * head_dim];
            check_prepared(&q[t * k..][..k], &info[t * k / 128..][..k / 128], unit[t], x, &format!("mix, {what}"));
        }

        let value = |t: usize, row: usize| sums[t * n + row] as f64 * 1e-5;
        let head = |t: usize, row: usize, norm: Option<&Vec<f32>>| -> Vec<f64> {
            let mut x: Vec<f64> = (0..head_dim).map(|i| value(t, row + i)).collect();
            if let Some(weight) = norm {
                let inverse = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / head_dim as f64 + 1e-6).sqrt();
                x.iter_mut().zip(weight).for_each(|(x, w)| *x *= inverse * f64::from(*w));
            }
            let half = head_dim / 2;
            (0..head_dim)
                .map(|i| {
                    let (c, s) = (f64::from(turn[t * head_dim + i % half]), f64::from(turn[t * head_dim + half + i % half]));
                    if i < half { x[i] * c - x[i + half] * s } else { x[i] * c + x[i - half] * s }
                })
                .collect()
        };
        for t in 0..tokens {
            for h in 0..heads {
                let q = head(t, h * head_dim, normed.then(|| &norm_weights[0]));
                let kv = h / (heads / kv_heads);
                let at = |p: usize| ((layer * kv_heads + kv) * capacity + p) * head_dim;
                let (end, new) = (first + t + 1, |p: usize| p >= first);
                let begin = window.map_or(0, |w: usize| end.saturating_sub(w));
                let key = |p: usize| -> Vec<f64> {
                    if new(p) {
                        head(p - first, k_row + kv * head_dim, normed.then(|| &norm_weights[1]))
                    } else {
                        keys[at(p)..][..head_dim].iter().map(|x| f64::from(*x)).collect()
                    }
                };
                let val =
                    |p: usize, i: usize| if new(p) { value(p - first, v_row + kv * head_dim + i) } else { f64::from(values[at(p) + i]) };
                let scores: Vec<f64> =
                    (begin..end).map(|p| q.iter().zip(key(p)).map(|(q, k)| q * k).sum::<f64>() / (head_dim as f64).sqrt()).collect();
                let top = scores.iter().copied().fold(f64::MIN, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
                let total: f64 = weights.iter().sum();
                for i in 0..head_dim {
                    let expected = (begin..end).zip(&weights).map(|(p, w)| w * val(p, i)).sum::<f64>() / total;
                    let found = f64::from(found[(t * heads + h) * head_dim + i]);
                    assert!((found - expected).abs() < 4e-3, "{what}: token {t} head {h} [{i}]: {found} for {expected}");
                }
            }
        }
    }
}

/// A small model on the device, as a step and the launches behind each other see it.
struct Tiny {
    heads: Heads,
    hidden: usize,
    ffn: usize,
    vocab: usize,
    /// q, k, v; o; gate, up; down, of each layer; then the head: matrix, scales, biases.
    matrices: Vec<(PlainMatrix, Buffer, Option<Buffer>)>,
    /// Of all norms, (hidden), and those of the heads.
    norm: Buffer,
    head_norms: Option<[Buffer; 2]>,
    window: Option<usize>,
}

impl Tiny {
    const LAYERS: usize = 2;
    const EPS: f32 = 1e-5;

    fn new(gpu: &Gpu, rng: &mut Rng, hidden: usize, ffn: usize, heads: (usize, usize, usize), special: bool) -> Self {
        let (heads, kv_heads, head_dim) = heads;
        let (k_row, v_row) = ((heads * head_dim).next_multiple_of(16), ((heads + kv_heads) * head_dim).next_multiple_of(16));
        let vocab = if hidden < 1024 { 5003 } else { 1003 }; // several row tiles a block, or less than one
        let up_row = ffn.next_multiple_of(16);
        let shapes = [(v_row + kv_heads * head_dim, hidden), (hidden, heads * head_dim), (up_row + ffn, hidden), (hidden, ffn)];
        // Of the matrices of a kind, and of the head.
        // At the greatest width padding would be too much.
        let any = |n: usize| if hidden < STEP_HIDDEN_MAX { 1 + n % 32 } else { 1 << (n % 6) };
        let supersteps: [usize; 5] = std::array::from_fn(|_| any(rng.next() as usize));
        let matrix = |rng: &mut Rng, (rows, cols): (usize, usize), biased: bool, supersteps: usize, gain: f32| {
            let case = Case::new(gpu, rng, rows, cols, (1.1, 0), supersteps);
            let n = case.geometry.padded_rows();
            let scale: Vec<f32> = (0..n).map(|_| gain * (0.5 + rng.unit() as f32) / (cols as f32).sqrt()).collect();
            let bias = biased.then(|| gpu.device.upload(&rng.floats(n), "bias").unwrap());
            (PlainMatrix::upload(&gpu.device, &case.plain).unwrap(), gpu.device.upload(&scale, "scale").unwrap(), bias)
        };
        let of_layers = (0..Self::LAYERS).flat_map(|_| shapes).enumerate();
        // Outliers of weights and of norms together would often leave the range of what silu may leave.
        let gain = |i: usize| if i % 4 == 2 { 0.1 } else { 1.0 };
        let mut matrices: Vec<_> =
            of_layers.map(|(i, shape)| matrix(rng, shape, special && i % 4 < 2, supersteps[i % 4], gain(i))).collect();
        matrices.push(matrix(rng, (vocab, hidden), false, supersteps[4], 1.0));
        let vector = |rng: &mut Rng, n| gpu.device.upload(&rng.floats(n), "norm").unwrap();
        Self {
            heads: Heads { heads, kv_heads, head_dim, k_row, v_row },
            hidden,
            ffn,
            vocab,
            matrices,
            norm: vector(rng, hidden),
            head_norms: special.then(|| [vector(rng, head_dim), vector(rng, head_dim)]),
            window: special.then_some(20),
        }
    }

    fn step_matrix(&self, index: usize) -> StepMatrix<'_> {
        let (matrix, scale, bias) = &self.matrices[index];
        StepMatrix { form: matrix.form(), scale, bias: bias.as_ref() }
    }

    fn model(&self) -> StepModel<'_> {
        let layer = |layer: usize| StepLayer {
            matrices: [0, 1, 2, 3].map(|index| self.step_matrix(layer * 4 + index)),
            input_norm: &self.norm,
            post_norm: &self.norm,
            head_norms: self.head_norms.as_ref().map(|[q, k]| [q, k]),
            window: self.window,
        };
        StepModel {
            layers: (0..Self::LAYERS).map(layer).collect(),
            head: self.step_matrix(Self::LAYERS * 4),
            final_norm: &self.norm,
            eps: Self::EPS,
            heads: self.heads,
            hidden: self.hidden,
            intermediate: self.ffn,
            up_row: self.ffn.next_multiple_of(16),
            vocab: self.vocab,
        }
    }

    /// The same by launches, as the runtime puts them behind each other, from an input as a step's, but on the device. Whether all that attention and silu left
    /// is in the range of a step's numbers.
    fn launches(&self, gpu: &Gpu, x: &Buffer, (turn, place): (usize, usize), logits: &Buffer) -> bool {
        let cols = self.matrices.iter().map(|(m, ..)| m.form().geometry().padded_cols()).max().unwrap();
        let rows = self.matrices.iter().map(|(m, ..)| m.form().geometry().padded_rows()).max().unwrap();
        let activations = [(); 2].map(|()| Activations::new(&gpu.device, 1, cols).unwrap());
        let sums = [(); 2].map(|()| gpu.device.allocate(rows * 8, "sums").unwrap());
        let q = gpu.device.allocate(self.heads.heads * self.heads.head_dim * 4, "q").unwrap();
        let mixed = Mixed::new(&gpu.device, 1, self.heads.heads, self.heads.head_dim).unwrap();
        let mut queue = Queue::new(&gpu.kernels);
        let at = |index: usize, turn: usize| {
            let (matrix, scale, bias) = &self.matrices[index];
            SumsAt {
                sum: &sums[turn],
                unit: activations[turn].unit(),
                scale,
                bias: bias.as_ref(),
                n: matrix.form().geometry().padded_rows(),
            }
        };
        let multiply = |queue: &mut Queue<'_>, of: Input<'_>, index: usize, turn: usize| {
            let form = self.matrices[index].0.form();
            queue.prepare(of, &activations[turn], 1, form.geometry().cols(), &form, &sums[turn]).unwrap();
            queue.product(&form, &activations[turn], 1, &sums[turn]).unwrap();
        };
        let mut units: Vec<_> = (0..2 * Self::LAYERS).map(|_| gpu.device.pin(4).unwrap()).collect();
        let mut said = units.iter_mut();
        let mut say_unit = |queue: &mut Queue<'_>| {
            gpu.device.copy_out(said.next().unwrap(), activations[1].unit(), 4, Stream::Compute).unwrap();
            queue.interrupted();
        };
        let norm = |add| Input::Norm { x, weight: &self.norm, eps: Self::EPS, add, rows: None };
        for layer in 0..Self::LAYERS {
            let of = layer * 4;
            multiply(&mut queue, norm((layer > 0).then(|| at(of - 1, 1))), of, 0);
            let attention = AttentionAt {
                sums: at(of, 0),
                norms: self.head_norms.as_ref().map(|[q, k]| [q, k]),
                eps: Self::EPS,
                heads: self.heads,
                layer,
                window: self.window,
                turn: (x, turn),
                places: (x, place),
                q: &q,
                out: &mixed,
            };
            queue.attend(&attention, 1).unwrap();
            multiply(&mut queue, Input::Mix(&mixed, self.heads), of + 1, 1);
            say_unit(&mut queue);
            multiply(&mut queue, norm(Some(at(of + 1, 1))), of + 2, 0);
            multiply(&mut queue, Input::Silu { sums: at(of + 2, 0), up_row: self.ffn.next_multiple_of(16) }, of + 3, 1);
            say_unit(&mut queue);
        }
        multiply(&mut queue, norm(Some(at(Self::LAYERS * 4 - 1, 1))), Self::LAYERS * 4, 0);
        queue.logits(at(Self::LAYERS * 4, 0), 1, self.vocab, logits).unwrap();
        gpu.device.synchronize().unwrap();
        units.iter().all(|unit| unit.floats(1)[0] == FIXED_UNIT)
    }
}

#[test]
fn a_step_in_one_kernel_is_what_its_launches_are() {
    let Some(gpu) = gpu() else { return };
    let mut rng = Rng::new(9);
    let shapes = [
        (256, 640, (4, 2, 64), false),
        (192, 1000, (6, 2, 96), true),
        (640, 256, (2, 1, 256), false),
        (384, 4500, (4, 2, 64), true),
        (4096, 1536, (32, 8, 128), true),
        (STEP_HIDDEN_MAX, 512, (16, 4, 128), false),
    ];
    let mut all_in_range = 0;
    for (hidden, ffn, heads, special) in shapes {
        let what = format!("{hidden} columns, {ffn} inside, heads {heads:?}");
        let model = Tiny::new(&gpu, &mut rng, hidden, ffn, heads, special);
        let Some(step) = Step::new(&gpu.kernels, &model.model()).unwrap() else {
            eprintln!("SKIPPED: a step in one kernel needs a Hopper GPU or a newer one, and a compiler for it");
            assert!(gpu.device.properties().capability.0 < 9, "{what}: refused");
            return;
        };
        let (capacity, head_dim) = (70, model.heads.head_dim);
        let done = gpu.device.event(false).unwrap();
        let kv = Tiny::LAYERS * model.heads.kv_heads * capacity * head_dim * 2;
        let turn = (hidden * 4).next_multiple_of(256);
        let place = turn + (head_dim * 4).next_multiple_of(256);
        let caches: [[Buffer; 2]; 2] = [(); 2].map(|()| [(); 2].map(|()| gpu.device.allocate(kv, "keys or values").unwrap()));
        let (mut input, again) = (gpu.device.pin(place + 24).unwrap(), gpu.device.allocate(place + 24, "input").unwrap());
        let logits = [(); 2].map(|()| gpu.device.allocate(model.vocab * 4, "logits").unwrap());
        // Positions one after another: the caches fill alike. Outliers of weights and of norms together leave the range of a step's numbers, but rarely.
        let mut positions_in_range = 0;
        for position in 0..capacity as u32 {
            let x = rng.floats(hidden);
            let angle = |i: usize| f64::from(position) * 10000f64.powf(-2.0 * i as f64 / head_dim as f64);
            let half = 0..head_dim / 2;
            let angles: Vec<f32> = half.clone().map(|i| angle(i).cos() as f32).chain(half.map(|i| angle(i).sin() as f32)).collect();
            let staged = |[keys, values]: &[Buffer; 2]| {
                let place_words = [keys.address(), values.address(), u64::from(position) | (capacity as u64) << 32];
                staged(&[
                    (0, f32_bytes(&x)),
                    (turn, f32_bytes(&angles)),
                    (place, place_words.iter().flat_map(|x| x.to_le_bytes()).collect()),
                ])
            };
            input.bytes_mut().copy_from_slice(&staged(&caches[0]));
            again.write(0, &staged(&caches[1])).unwrap();
            logits.iter().for_each(|b| b.fill_range(0, b.bytes(), 0xab, Stream::Compute).unwrap());
            Queue::new(&gpu.kernels).step(&step, &StepInput { input: &input, turn, place, logits: &logits[0] }).unwrap();
            gpu.device.record(&done, Stream::Compute).unwrap();
            step.clear().unwrap();
            let greatest = step.greatest(&done).unwrap();
            let in_range = model.launches(&gpu, &again, (turn, place), &logits[1]);
            let [found, expected] = [0, 1].map(|i| logits[i].read::<u32>(0, model.vocab).unwrap());
            assert!(
                expected.iter().all(|&x| f32::from_bits(x).is_finite()),
                "{what}, position {position}: the launches' logits are numbers"
            );
            if !in_range {
                assert_eq!(greatest, None, "{what}, position {position}: out of range");
                eprintln!("{what}: position {position} leaves the range");
                break;
            }
            positions_in_range += 1;
            let key = |&id: &usize| (f32::from_bits(expected[id]), std::cmp::Reverse(id));
            let first = (0..model.vocab).max_by(|a, b| key(a).0.total_cmp(&key(b).0).then(key(a).1.cmp(&key(b).1)));
            assert_eq!(greatest.map(|id| id as usize), first, "{what}, position {position}: the greatest logit");
            let wrong = found.iter().zip(&expected).filter(|(a, b)| a != b).count();
            assert_eq!(wrong, 0, "{what}, position {position}: logits that differ");
        }
        if positions_in_range == capacity {
            let kept = |of: usize| caches[of].each_ref().map(|b| b.read::<u16>(0, kv / 2).unwrap());
            assert!(kept(0) == kept(1), "{what}: keys or values differ");
        }
        all_in_range += usize::from(positions_in_range == capacity);
    }
    assert!(all_in_range > shapes.len() / 2, "of {} shapes {all_in_range} stay in range: too few", shapes.len());
}

#[test]
fn a_step_out_of_its_numbers_range_gives_no_answer() {
    let Some(gpu) = gpu() else { return };
    let mut rng = Rng::new(10);
    let (hidden, ffn, heads) = (256, 640, (4, 2, 64));
    let model = Tiny::new(&gpu, &mut rng, hidden, ffn, heads, false);
    let Some(step) = Step::new(&gpu.kernels, &model.model()).unwrap() else {
        eprintln!("SKIPPED: a step in one kernel needs a Hopper GPU or a newer one, and a compiler for it");
        return;
    };
    let done = gpu.device.event(false).unwrap();
    let [keys, values] = [(); 2].map(|()| gpu.device.allocate(Tiny::LAYERS * 2 * 4 * 64 * 2, "keys or values").unwrap());
    let (turn, place) = (hidden * 4, hidden * 4 + 256);
    let (mut input, again) = (gpu.device.pin(place + 24).unwrap(), gpu.device.allocate(place + 24, "input").unwrap());
    let logits = gpu.device.allocate(model.vocab * 4, "logits").unwrap();
    let (up, ordinary) =
        (&model.matrices[2].1, model.matrices[2].1.read::<f32>(0, model.matrices[2].0.form().geometry().padded_rows()).unwrap());
    // Then in range again: nothing is left behind.
    for factor in [1.0, 1e6, f32::NAN, 1.0] {
        up.write(0, &ordinary.iter().map(|scale| scale * factor).collect::<Vec<_>>()).unwrap();
        let x = rng.floats(hidden);
        let places: Vec<u8> = [keys.address(), values.address(), 4 << 32].iter().flat_map(|x| x.to_le_bytes()).collect();
        let staged = staged(&[(0, f32_bytes(&x)), (turn, f32_bytes(&[[1f32; 32], [0f32; 32]].concat())), (place, places)]);
        again.write(0, &staged).unwrap();
        let in_range = model.launches(&gpu, &again, (turn, place), &logits);
        assert!(factor == 1.0 || !in_range, "{factor}: in range by the launches' units");
        let expected: Vec<f32> = logits.read(0, model.vocab).unwrap();
        assert!(expected.iter().all(|logit| logit.is_nan() == factor.is_nan()), "{factor}: launches have no range");
        input.bytes_mut().copy_from_slice(&staged);
        Queue::new(&gpu.kernels).step(&step, &StepInput { input: &input, turn, place, logits: &logits }).unwrap();
        gpu.device.record(&done, Stream::Compute).unwrap();
        step.clear().unwrap();
        let greatest = step.greatest(&done).unwrap();
        gpu.device.synchronize().unwrap();
        let found: Vec<f32> = logits.read(0, model.vocab).unwrap();
        assert_eq!(greatest.is_some(), in_range, "{factor}");
        assert!(found.iter().all(|logit| logit.is_nan() != in_range), "{factor}: all logits are numbers, or none");
        assert!(!in_range || found == expected, "{factor}: the same logits");
    }
}

/// Bytes with parts at their places.
fn staged(parts: &[(usize, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (at, part) in parts {
        bytes.resize(*at, 0);
        bytes.extend(part);
    }
    bytes
}

fn f32_bytes(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// f16 of a number that f16 holds exactly.
fn half_bits(x: f32) -> u16 {
    if x == 0.0 {
        return 0;
    }
    let bits = x.to_bits();
    let exponent = (bits >> 23 & 255) as i32 - 127 + 15;
    assert!((1..31).contains(&exponent) && bits & 0x1fff == 0, "{x} is not exact in f16");
    (bits >> 16 & 0x8000) as u16 | (exponent as u16) << 10 | (bits >> 13 & 0x3ff) as u16
}

#[test]
fn recorded_work_is_replayed() {
    let Some(gpu) = gpu() else { return };
    let mut rng = Rng::new(6);
    let case = Case::new(&gpu, &mut rng, 256, 1024, KINDS[1], 8);
    let form = Form::Quad(case.quad_at());
    let activations = Activations::new(&gpu.device, 1, 1024).unwrap();
    let x = gpu.device.allocate(1024 * 4, "x").unwrap();
    let part = gpu.device.allocate(256 * 8, "sums").unwrap();
    x.write(0, &rng.floats(1024)).unwrap();
    let work = || {
        let mut queue = Queue::new(&gpu.kernels);
        queue.prepare(Input::Copy(&x), &activations, 1, 1024, &form, &part)?;
        queue.product(&form, &activations, 1, &part)
    };
    let graph = gpu.device.capture(work).unwrap();
    for _ in 0..3 {
        x.write(0, &rng.floats(1024)).unwrap();
        graph.launch().unwrap();
        let sums: Vec<i64> = part.read(0, 256).unwrap();
        let Prepared { q, info, .. } = activations.download(1, 1024).unwrap();
        for (row, &sum) in sums.iter().enumerate() {
            assert_eq!(sum, case.expected(&q, &info, row), "row {row}");
        }
    }
}

/// Without NVRTC the driver translates PTX of an older architecture: other instructions and launches, the same numbers.
#[test]
fn the_ptx_computes_the_same() {
    let Some(gpu) = gpu() else { return };
    let translated = Gpu { device: Arc::clone(&gpu.device), kernels: Kernels::load_ptx(&gpu.device).unwrap() };
    let mut rng = Rng::new(7);
    for kind in KINDS {
        let case = Case::new(&gpu, &mut rng, 272, 2048, kind, 16);
        let decoded = PlainMatrix::upload(&gpu.device, &case.plain).unwrap();
        let form = Form::Quad(case.quad_at());
        for tokens in [1, 5, 33] {
            check_product(&translated, &case, &form, tokens, &mut rng, &format!("PTX, quad t{tokens}"));
            check_product(&translated, &case, &decoded.form(), tokens, &mut rng, &format!("PTX, plain t{tokens}"));
        }
        let x = gpu.device.upload(&rng.floats(3 * 2048), "x").unwrap();
        let sums = gpu.device.allocate(272 * 8 * 8, "sums").unwrap();
        let prepared = [&gpu, &translated].map(|gpu| {
            let out = Activations::new(&gpu.device, 3, 2048).unwrap();
            Queue::new(&gpu.kernels).prepare(Input::Copy(&x), &out, 3, 2048, &form, &sums).unwrap();
            out.download(3, 2048).unwrap()
        });
        assert!(prepared[0] == prepared[1], "activations");
    }
}

#[test]
fn an_impossible_request_says_what_it_was() {
    let Some(gpu) = gpu() else { return };
    let error = gpu.device.allocate(1 << 50, "a test").unwrap_err().to_string();
    assert!(error.starts_with("out of GPU memory: a test takes 1125899906842624 bytes, "), "{error}");
}
