//! A base-2 logarithm from the four basic operations alone, so that tables come out the same on
//! every machine.
//!
//! The `log2` of the standard library is that of the platform, and may differ in the last bit;
//! where two choices cost nearly the same, that bit would decide which table a file gets.

/// log2 of `value` >= 1, within 1e-14; 0 for 0, so that `0 * log2(0)` is the 0 that entropy wants.
pub(crate) fn log2(value: u64) -> f64 {
    if value == 0 {
        return 0.0;
    }
    let exponent = value.ilog2();
    let mantissa = value as f64 / (1u64 << exponent) as f64; // [1, 2)
    // ln m = 2 artanh(y), y = (m - 1) / (m + 1) in [0, 1/3): every term is at most a ninth of the
    // one before.
    let y = (mantissa - 1.0) / (mantissa + 1.0);
    let y_squared = y * y;
    let mut series = 0.0;
    for k in (0..18).rev() {
        series = series * y_squared + 1.0 / f64::from(2 * k + 1);
    }
    f64::from(exponent) + 2.0 * y * series * std::f64::consts::LOG2_E
}

#[cfg(test)]
mod tests {
    use super::log2;

    #[test]
    fn powers_of_two_are_exact_and_the_rest_close() {
        for exponent in 0..64 {
            assert_eq!(log2(1 << exponent), f64::from(exponent));
        }
        for value in (1..5000).chain((1..60).map(|k| (1 << k) + 12345)) {
            let expected = (value as f64).log2();
            assert!((log2(value) - expected).abs() < 1e-13, "{value}: {}", log2(value));
        }
        assert_eq!(log2(0), 0.0);
    }
}
