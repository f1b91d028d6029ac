//! Times fused, plain and bulk kernels beside the machine's read bandwidth, after checking that they agree.
//!
//! `cargo run --release -p tersor-cpu --example gemv [level] [million weights in memory] [part of a
//! codec's id]`
//!
//! Gaussian symbols at four entropies; matrices of 4096 columns, one that stays in the caches and
//! one that does not. Rates are in G weights/s. Other processes on the machine disturb them:
//! compare within one run.

mod common;

use common::{gauss, seconds};
use tersor_codec::{Codec, Histogram};
use tersor_cpu::{Activations, Decoded, Job, KernelScales, Level, Matrix, Pool, decode_bytes, decode_into, matmul, read_bandwidth};
use tersor_format::encode_tensor;
use tersor_quant::{QuantizedTensor, Scales};

/// Weights per second, the best of a quarter of a second.
fn rate(weights: usize, f: impl FnMut()) -> f64 {
    weights as f64 / seconds(f) / 1e9
}

fn run(pool: &Pool, level: Level, matrix: Matrix<'_>, scales: &KernelScales, x: &Activations, out: &mut [f32]) {
    matmul(pool, level, &mut [Job { matrix, scales, x, out }]).expect("a chunk just encoded");
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let level: Level = args.next().map_or(Ok(Level::best()), |a| a.parse())?;
    let millions: usize = args.next().map_or(Ok(64), |a| a.parse())?;
    let only = args.next().unwrap_or_default();
    let pools = [Pool::new(1), Pool::new(2)];
    let small = vec![1u8; 512 << 10];
    let large = vec![1u8; 256 << 20];
    println!("level {level}; read bandwidth, GB/s, with 1 and 2 threads:");
    for (name, buffer) in [("cache", &small), ("memory", &large)] {
        let [one, two] = pools.each_ref().map(|p| read_bandwidth(p, level, buffer, 5) / 1e9);
        println!("  {name:6} {one:6.1} {two:6.1}");
    }
    println!(
        "codec                  H  bits  place     fused1 fused2  plain1 plain2  bytes1 store1  batch8 batch64  (G weights/s; batches: G weights/s x tokens)"
    );
    const COLS: usize = 4096;
    for codec in [
        "rans/s16-w8-p6-l64",
        "rans/s16-w8-p7-l64",
        "rans/s16-w8-p8-l64",
        "rans-precise",
        "rans-pairs",
        "tiered",
        "huffman",
        "huffman/c12-l4",
        "block-ans",
        "block-ans/s16-w8-p7-n1024",
        "block-ans/s16-w8-p8-n1024",
        "fixed",
    ] {
        let codec: Codec = codec.parse()?;
        for step in [1.6, 0.9, 0.5, 0.3] {
            if !codec.to_string().contains(&only) {
                continue;
            }
            if step != 0.9 && !matches!(codec, Codec::Rans(_) | Codec::RansPairs | Codec::Tiered | Codec::Huffman(_) | Codec::BlockAns(_)) {
                continue;
            }
            for (place, rows) in [("cache", 192), ("memory", millions * 1_000_000 / COLS / 16 * 16)] {
                let symbols = gauss(rows * COLS, step);
                let mut histogram = Histogram::new();
                histogram.add(&symbols);
                let tensor =
                    QuantizedTensor { rows, cols: COLS, symbols, scales: Scales::Row { scales: vec![0x1c00; rows], scale_exponent: 0 } };
                let encoded = encode_tensor(&tensor, codec, 65_536)?;
                drop(tensor);
                let coded = encoded.tensor();
                let scales = KernelScales::from_coded(coded)?;
                let weights = rows * COLS;
                let x: Vec<f32> = gauss(64 * COLS, 0.01).into_iter().map(f32::from).collect();
                let one = Activations::quantize(level, &x[..COLS], 1, COLS, scales.segment());
                let eight = Activations::quantize(level, &x[..8 * COLS], 8, COLS, scales.segment());
                let many = Activations::quantize(level, &x, 64, COLS, scales.segment());
                let mut decoded = Decoded::new();
                decode_into(level, coded, &mut decoded, Some(&pools[1]))?;
                let scales = &scales;
                // First the answers.
                let mut want = vec![0.0; rows];
                run(&pools[1], Level::Scalar, Matrix::Decoded(&decoded), scales, &one, &mut want);
                let mut out = vec![0.0; rows];
                let mut out8 = vec![0.0; 8 * rows];
                for matrix in [Matrix::Coded(coded), Matrix::Decoded(&decoded)] {
                    run(&pools[1], level, matrix, scales, &one, &mut out);
                    assert_eq!(out, want, "{codec}");
                    run(&pools[1], level, matrix, scales, &eight, &mut out8);
                    assert_eq!(out8[..rows], want[..], "{codec}");
                }
                // Then the clock.
                let fused = pools.each_ref().map(|p| rate(weights, || run(p, level, Matrix::Coded(coded), scales, &one, &mut out)));
                let plain = pools.each_ref().map(|p| rate(weights, || run(p, level, Matrix::Decoded(&decoded), scales, &one, &mut out)));
                let mut bytes = vec![0u8; coded.row_tiles() * coded.col_steps() * 64];
                let bulk = rate(weights, || decode_bytes(level, coded, &mut bytes, None).expect("as above"));
                let store = rate(weights, || decode_into(level, coded, &mut decoded, None).expect("as above"));
                let batch = rate(weights * 8, || run(&pools[0], level, Matrix::Coded(coded), scales, &eight, &mut out8));
                let mut out64 = vec![0.0; 64 * rows];
                let matrix = Matrix::Decoded(&decoded);
                let large = rate(weights * 64, || run(&pools[0], level, matrix, scales, &many, &mut out64));
                println!(
                    "{:20} {:.2}  {:.2}  {place:6}    {:6.2} {:6.2}  {:6.2} {:6.2}  {bulk:6.2} {store:6.2}  {batch:6.1}  {large:6.1}",
                    codec.to_string(),
                    histogram.entropy_bits(),
                    coded.coded_bytes() as f64 * 8.0 / weights as f64,
                    fused[0],
                    fused[1],
                    plain[0],
                    plain[1],
                );
            }
        }
    }
    Ok(())
}
