//! Quantizing rates on one thread: `cargo run --release -p tersor-quant --example quantize_rates`.

use std::time::Instant;
use tersor_quant::{Dtype, EcsqParams, Grid, Plan, RateModel, Rows, SliceRows, quantize};

fn main() {
    let cols = 4096;
    // A sum of phases that do not repeat looks random enough to the quantizers, and costs nothing to make.
    let weights: Vec<f32> =
        (0..4096 * cols).map(|i| ((i as f32 * 0.7).sin() + (i as f32 * 1.3).cos() + (i as f32 * 0.37).sin()) * 0.02).collect();
    let rows = SliceRows::new(&weights, cols, Dtype::F16);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
    let rate = |name: &str, run: &(dyn Fn() + Sync)| {
        run();
        let seconds = (0..5)
            .map(|_| {
                let begin = Instant::now();
                pool.install(run);
                begin.elapsed().as_secs_f64()
            })
            .fold(f64::INFINITY, f64::min);
        println!("{name:12} {:7.0} M weights/s", weights.len() as f64 / seconds / 1e6);
    };
    let ecsq = |grid| Plan::Ecsq(EcsqParams { grid, relative_step: 0.3, rounding: 0.5 });
    let plans = [
        ("ecsq row", ecsq(Grid::Row)),
        ("ecsq tensor", ecsq(Grid::Tensor)),
        ("affine4", Plan::Affine4 { group_size: 64 }),
        ("q4_0", Plan::Q4_0),
        ("int4-row", Plan::Int4Row),
    ];
    for (name, plan) in plans {
        rate(name, &|| drop(quantize(&plan, &rows as &dyn Rows).expect("finite weights")));
    }
    rate("measure", &|| drop(RateModel::measure(&rows).expect("finite weights")));
}
