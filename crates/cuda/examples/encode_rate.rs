//! Size and encoding rate of the device layouts on Gaussian symbols, one thread: checks first, then measures.
//!
//! `cargo run --release -p tersor-cuda --example encode_rate [rows]`: matrices of `rows` (1024) × 8192. `all` counts everything on the device, `above H` compares
//! it with the empirical entropy; the table weighs more here than in a large matrix. Rates are the best of three. The second table has rows of unlike scale
//! (log-normal, `spread` is the standard deviation of the logarithm), as quantizers with one step for all rows leave them: streams drift apart. First in the geometry of
//! `Geometry::new`, then in that of `encode_auto`; and once more with the rows sorted by energy, which a consumer could undo.

use std::time::{Duration, Instant};

use tersor_codec::Histogram;
use tersor_cuda::layout::{Geometry, Plain, QuadMatrix, QuadParams, Stack, Statistics};

const COLS: usize = 8192;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let rows: usize = std::env::args().nth(1).map_or(Ok(1024), |text| text.parse())?;
    rates(rows)?;
    unlike_rows(rows)
}

fn rates(rows: usize) -> Result<(), Box<dyn std::error::Error>> {
    println!(
        "{:>6} {:>28} {:>7} {:>8} {:>9} {:>9} {:>11} {:>10}",
        "H", "parameters", "all", "above H", "sample ms", "choose ms", "encode M/s", "plain M/s"
    );
    for sigma in [0.6, 0.92, 1.133, 1.35, 1.92, 3.13] {
        let symbols = gaussian(rows * COLS, sigma, 0.0);
        let stack = Stack::new(COLS, &[&symbols])?;
        let geometry = Geometry::new(rows, COLS)?;
        let (statistics, sample) = fastest(|| Statistics::sample(&stack, geometry, 1));
        let (params, choose) = fastest(|| QuadParams::choose(&statistics, &geometry, 1));
        let (coded, encode) = fastest(|| QuadMatrix::encode(&stack, geometry, params, &statistics, 1));
        let (plain, pack) = fastest(|| Plain::pack(&stack, geometry, 0, 1));
        let coded = coded?;
        assert!(coded.decode()? == symbols && plain?.unpack()? == symbols, "what was encoded does not come back");
        let (entropy, bits) = (entropy_bits(&symbols), coded.bytes() as f64 * 8.0 / symbols.len() as f64);
        let rate = |time: Duration| symbols.len() as f64 / time.as_secs_f64() / 1e6;
        println!(
            "{entropy:6.3} {:>28} {bits:7.4} {:7.2}% {:9.1} {:9.1} {:11.0} {:10.0}",
            parameters(&coded),
            (bits / entropy - 1.0) * 100.0,
            sample.as_secs_f64() * 1e3,
            choose.as_secs_f64() * 1e3,
            rate(encode),
            rate(pack)
        );
    }
    Ok(())
}

fn unlike_rows(rows: usize) -> Result<(), Box<dyn std::error::Error>> {
    println!(
        "\n{:>6} {:>11} {:>6} {:>9} {:>28} {:>7} {:>8} {:>9}",
        "spread", "rows", "H", "tile_cols", "parameters", "all", "above H", "patched"
    );
    for spread in [0.0, 0.05, 0.1, 0.2, 0.4] {
        let symbols = gaussian(rows * COLS, 1.133, spread);
        let mut by_energy: Vec<&[i16]> = symbols.chunks(COLS).collect();
        by_energy.sort_by_key(|row| row.iter().map(|&symbol| i64::from(symbol).pow(2)).sum::<i64>());
        let sorted = by_energy.concat();
        for (name, symbols) in [("as they are", &symbols), ("sorted", &sorted)] {
            let stack = Stack::new(COLS, &[symbols])?;
            let geometry = Geometry::new(rows, COLS)?;
            let statistics = Statistics::sample(&stack, geometry, 1);
            let auto = QuadMatrix::encode_auto(&stack, geometry, 1)?;
            for coded in [QuadMatrix::encode(&stack, geometry, auto.params, &statistics, 1)?, auto] {
                assert!(coded.decode()? == *symbols, "what was encoded does not come back");
                let (entropy, bits) = (entropy_bits(symbols), coded.bytes() as f64 * 8.0 / symbols.len() as f64);
                println!(
                    "{spread:6.2} {name:>11} {entropy:6.3} {:9} {:>28} {bits:7.4} {:7.2}% {:8.3}%",
                    coded.geometry.tile_cols(),
                    parameters(&coded),
                    (bits / entropy - 1.0) * 100.0,
                    coded.patches.len() as f64 * 400.0 / symbols.len() as f64
                );
            }
        }
    }
    Ok(())
}

/// Of all symbols, not of a sample.
fn entropy_bits(symbols: &[i16]) -> f64 {
    let mut histogram = Histogram::new();
    histogram.add(symbols);
    histogram.entropy_bits()
}

fn parameters(coded: &QuadMatrix) -> String {
    let QuadParams { low_bits, window_bits, copies_log2 } = coded.params;
    format!("low {low_bits} window {window_bits} copies {}", 1 << copies_log2)
}

fn fastest<T>(f: impl Fn() -> T) -> (T, Duration) {
    let timed = || {
        let start = Instant::now();
        (f(), start.elapsed())
    };
    [timed(), timed(), timed()].into_iter().min_by_key(|&(_, time)| time).expect("three runs")
}

/// Rounded Gaussian samples, whose scale differs between rows.
fn gaussian(symbols: usize, sigma: f64, spread: f64) -> Vec<i16> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    let mut normal = || (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
    let mut row_sigma = sigma;
    let sample = |i: usize| {
        if i.is_multiple_of(COLS) {
            row_sigma = sigma * (normal() * spread).exp();
        }
        (normal() * row_sigma).round() as i16
    };
    (0..symbols).map(sample).collect()
}
