//! Size and encoding rate of the device layouts on Gaussian symbols, one thread: checks first, then measures.
//!
//! `cargo run --release -p tersor-cuda --example encode_rate [rows]`: matrices of `rows` (1024) × 8192. `all` counts everything on the device, `above H` compares
//! it with the empirical entropy; the table weighs more here than in a large matrix. Rates are the best of three.

use std::time::{Duration, Instant};

use tersor_cuda::layout::{Geometry, Plain, QuadMatrix, QuadParams, Stack, Statistics};

const COLS: usize = 8192;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let rows: usize = std::env::args().nth(1).map_or(Ok(1024), |text| text.parse())?;
    println!(
        "{:>6} {:>28} {:>7} {:>8} {:>9} {:>9} {:>11} {:>10}",
        "H", "parameters", "all", "above H", "sample ms", "choose ms", "encode M/s", "plain M/s"
    );
    for sigma in [0.6, 0.92, 1.133, 1.35, 1.92, 3.13] {
        let symbols = gaussian(rows * COLS, sigma);
        let stack = Stack::new(COLS, &[&symbols])?;
        let geometry = Geometry::new(rows, COLS)?;
        let (statistics, sample) = fastest(|| Statistics::sample(&stack, geometry, 1));
        let (params, choose) = fastest(|| QuadParams::choose(&statistics, &geometry, 1));
        let (coded, encode) = fastest(|| QuadMatrix::encode(&stack, geometry, params, &statistics, 1));
        let (plain, pack) = fastest(|| Plain::pack(&stack, geometry, 0, 1));
        let coded = coded?;
        assert!(coded.decode()? == symbols && plain?.unpack()? == symbols, "what was encoded does not come back");
        let (entropy, bits) = (statistics.symbols().entropy_bits(), coded.bytes() as f64 * 8.0 / symbols.len() as f64);
        let rate = |time: Duration| symbols.len() as f64 / time.as_secs_f64() / 1e6;
        println!(
            "{entropy:6.3} {:>28} {bits:7.4} {:7.2}% {:9.1} {:9.1} {:11.0} {:10.0}",
            format!("low {} window {} copies {}", params.low_bits, params.window_bits, 1 << params.copies_log2),
            (bits / entropy - 1.0) * 100.0,
            sample.as_secs_f64() * 1e3,
            choose.as_secs_f64() * 1e3,
            rate(encode),
            rate(pack)
        );
    }
    Ok(())
}

fn fastest<T>(f: impl Fn() -> T) -> (T, Duration) {
    let timed = || {
        let start = Instant::now();
        (f(), start.elapsed())
    };
    [timed(), timed(), timed()].into_iter().min_by_key(|&(_, time)| time).expect("three runs")
}

/// Rounded Gaussian samples.
fn gaussian(symbols: usize, sigma: f64) -> Vec<i16> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    (0..symbols).map(|_| ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos() * sigma).round() as i16).collect()
}
