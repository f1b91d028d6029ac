//! Figures for people: three significant digits, decimal prefixes.

/// Bytes as `812 B`, `12.3 kB`, `1.45 GB` (powers of 1000).
pub fn bytes(count: u64) -> String {
    if count < 1000 { format!("{count} B") } else { format!("{}B", si(count as f64)) }
}

/// A count with an SI prefix: `12.3 k`, `1.45 G`; plain below 1000.
pub fn count(value: f64) -> String {
    si(value).trim_end().to_owned()
}

/// A number and an SI prefix to put a unit behind: `12.3 k`, `1.45 G`, `7 `.
fn si(value: f64) -> String {
    const PREFIXES: [&str; 5] = ["", "k", "M", "G", "T"];
    let mut scaled = value;
    let mut prefix = 0;
    // 999.5 would print as 1000 with three digits, so it takes the next prefix.
    while scaled.abs() >= 999.5 && prefix + 1 < PREFIXES.len() {
        scaled /= 1000.0;
        prefix += 1;
    }
    format!("{} {}", digits3(scaled), PREFIXES[prefix])
}

/// Three significant digits without an exponent.
pub fn digits3(value: f64) -> String {
    match value.abs() {
        a if a >= 99.95 => format!("{value:.0}"),
        a if a >= 9.995 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// A duration: `12 ms`, `3.21 s`, `2 min 05 s`.
pub fn seconds(value: f64) -> String {
    if value < 0.9995 {
        format!("{} ms", digits3(value * 1000.0))
    } else if value < 119.5 {
        format!("{} s", digits3(value))
    } else {
        let whole = value.round() as u64;
        format!("{} min {:02} s", whole / 60, whole % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_change_where_three_digits_end() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1000), "1.00 kB");
        assert_eq!(bytes(999_499), "999 kB");
        assert_eq!(bytes(999_500), "1.00 MB");
        assert_eq!(bytes(25_100_000), "25.1 MB");
        assert_eq!(bytes(u64::MAX), "18446744 TB");
        assert_eq!(count(12_340_000_000.0), "12.3 G");
        assert_eq!(count(7.0), "7.00");
    }

    #[test]
    fn durations() {
        assert_eq!(seconds(0.0123), "12.3 ms");
        assert_eq!(seconds(3.2149), "3.21 s");
        assert_eq!(seconds(125.0), "2 min 05 s");
    }
}
