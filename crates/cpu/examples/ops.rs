//! Times the float operations at every level: dense products, attention, norms, activations.
//!
//! `cargo run --release -p tersor-cpu --example ops`

use std::time::Instant;

use half::f16;
use tersor_cpu::ops::{self, Attention, KvElement, KvView};
use tersor_cpu::{Activations, Dense, DenseType, Level, Pool, dense_matmul};

/// Seconds of the fastest run in a fifth of a second.
fn seconds(mut f: impl FnMut()) -> f64 {
    let begin = Instant::now();
    let mut best = f64::INFINITY;
    while begin.elapsed().as_secs_f64() < 0.2 {
        let start = Instant::now();
        f();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

fn main() {
    let value = |i: usize| (i * 2_654_435_761 % 2003) as f32 / 1001.0 - 1.0;
    let pool = Pool::new(1);
    println!("level    bf16 GEMV  bf16 x32  f16 GEMV   attend   rms_norm  silu_mul  softmax  quantize");
    println!("          GMAC/s     GMAC/s    GMAC/s    GMAC/s    G/s       G/s       G/s      G/s");
    for level in Level::available() {
        let (rows, cols) = (2048, 2048);
        let bytes: Vec<u8> = (0..rows * cols).flat_map(|i| half::bf16::from_f32(value(i)).to_le_bytes()).collect();
        let x: Vec<f32> = (0..32 * cols).map(value).collect();
        let mut out = vec![0.0; 32 * rows];
        let mut dense = |dtype, tokens: usize| {
            let w = Dense::new(dtype, rows, cols, &bytes);
            let time = seconds(|| dense_matmul(&pool, level, w, &x[..tokens * cols], tokens, &mut out[..tokens * rows]));
            (tokens * rows * cols) as f64 / time / 1e9
        };
        let (gemv, batch, gemv16) = (dense(DenseType::Bf16, 1), dense(DenseType::Bf16, 32), dense(DenseType::F16, 1));
        let shape = Attention { heads: 32, kv_heads: 4, head_dim: 64, scale: 0.125, window: None };
        let capacity = 1024;
        let kv: Vec<f16> = (0..4 * capacity * 64).map(|i| f16::store(value(i))).collect();
        let view = KvView { keys: &kv, values: &kv, capacity };
        let mut heads = vec![0.0; 32 * 64];
        let q = &x[..32 * 64];
        let time = seconds(|| ops::attend(&pool, level, shape, q, 1, capacity - 1, view, &mut heads));
        let attend = (2 * 32 * 64 * capacity) as f64 / time / 1e9;
        let weight = &x[..cols];
        let n = x.len() as f64 / 1e9;
        let mut y = x.clone();
        let norm = n / seconds(|| ops::rms_norm(level, &x, weight, 1e-5, &mut y));
        let silu = n / seconds(|| {
            y.copy_from_slice(&x);
            ops::silu_mul(level, &mut y, &x);
        });
        let soft = n / seconds(|| ops::softmax(level, &mut y));
        let mut a = Activations::default();
        let quantize = n / seconds(|| a.requantize(level, &x, 32, cols, 128));
        println!("{:7} {gemv:9.1} {batch:10.1} {gemv16:9.1} {attend:9.1} {norm:9.2} {silu:9.2} {soft:9.2} {quantize:9.2}", level.name());
    }
}
