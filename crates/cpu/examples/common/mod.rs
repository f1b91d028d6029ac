//! What the examples that time kernels share.

use std::time::Instant;

/// Gaussian symbols of deviation `1 / step`.
pub fn gauss(count: usize, step: f64) -> Vec<i16> {
    let mut s = 88_172_645_463_325_252u64;
    let mut unit = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 11) as f64 / (1u64 << 53) as f64
    };
    (0..count).map(|_| ((-2.0 * unit().max(1e-300).ln()).sqrt() * (std::f64::consts::TAU * unit()).cos() / step).round() as i16).collect()
}

/// Seconds of a call, the best of a quarter of a second.
pub fn seconds(mut f: impl FnMut()) -> f64 {
    let begin = Instant::now();
    let mut best = f64::INFINITY;
    while begin.elapsed().as_secs_f64() < 0.25 {
        let start = Instant::now();
        f();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}
