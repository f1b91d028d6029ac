//! Times products with a few tokens at a time, beside those with one, after checking that they agree.
//!
//! `cargo run --release -p tersor-cpu --example batch [level] [million weights]`
//!
//! Gaussian symbols of 2.25 bits and of 3.79, 4,096 columns, one thread; G weights/s x tokens. Where reading or decoding the weights is the work, twice the tokens take no longer.

mod common;

use common::{gauss, seconds};
use tersor_codec::Codec;
use tersor_cpu::{Activations, Decoded, Job, KernelScales, Level, Matrix, Pool, decode_into, matmul};
use tersor_format::encode_tensor;
use tersor_quant::{QuantizedTensor, Scales};

const COLS: usize = 4096;
const TOKENS: [usize; 9] = [1, 2, 3, 4, 6, 8, 16, 64, 256];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let level: Level = args.next().map_or(Ok(Level::best()), |a| a.parse())?;
    let millions: usize = args.next().map_or(Ok(64), |a| a.parse())?;
    let rows = millions * 1_000_000 / COLS / 16 * 16;
    let pool = Pool::new(1);
    println!("level {level}, one thread, G weights/s x tokens\n{:12} {:8} {:>5}   {TOKENS:6?} tokens", "codec", "matrix", "bits");
    for codec in ["rans", "rans-pairs", "tiered"] {
        let codec: Codec = codec.parse()?;
        for step in [0.9, 0.3] {
            let tensor = QuantizedTensor {
                rows,
                cols: COLS,
                symbols: gauss(rows * COLS, step),
                scales: Scales::Row { scales: vec![0x1c00; rows], scale_exponent: 0 },
            };
            let encoded = encode_tensor(&tensor, codec, 65_536)?;
            drop(tensor);
            let coded = encoded.tensor();
            let scales = KernelScales::from_coded(coded)?;
            let mut decoded = Decoded::new();
            decode_into(level, coded, &mut decoded, None)?;
            let most = TOKENS[TOKENS.len() - 1];
            let x: Vec<f32> = gauss(most * COLS, 0.01).into_iter().map(f32::from).collect();
            for (name, matrix) in [("coded", Matrix::Coded(coded)), ("decoded", Matrix::Decoded(&decoded))] {
                let run = |tokens: usize, out: &mut [f32]| {
                    let x = Activations::quantize(level, &x[..tokens * COLS], tokens, COLS, scales.segment());
                    matmul(&pool, level, &mut [Job { matrix, scales: &scales, x: &x, out }]).expect("a chunk just encoded");
                };
                let mut want = vec![0.0; most * rows];
                for (token, want) in want.chunks_exact_mut(rows).enumerate() {
                    let x = Activations::quantize(level, &x[token * COLS..(token + 1) * COLS], 1, COLS, scales.segment());
                    matmul(&pool, level, &mut [Job { matrix, scales: &scales, x: &x, out: want }])?;
                }
                let mut out = vec![0.0; most * rows];
                let rates = TOKENS.map(|tokens| {
                    let out = &mut out[..tokens * rows];
                    run(tokens, out);
                    assert!(*out == want[..tokens * rows], "{codec} {name}: {tokens} tokens together are those alone");
                    (tokens * rows * COLS) as f64 / seconds(|| run(tokens, out)) / 1e9
                });
                let bits = coded.coded_bytes() as f64 * 8.0 / (rows * COLS) as f64;
                println!("{:12} {name:8} {bits:5.2}   {rates:6.1?}", codec.to_string());
            }
        }
    }
    Ok(())
}
