//! Argument types that several commands share.

use std::fmt;
use std::str::FromStr;

/// A mistake in the command line that only shows once more is known: exit code 2.
#[derive(Debug)]
pub struct Usage(pub String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// A number of bytes written as `2GiB`, `500MB`, `1.5G` or `1000000`. `kB MB GB TB` are powers of 1000; `KiB MiB GiB TiB` and the
/// bare letters `K M G T` are powers of 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let factor: u64 = match unit.trim_start().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            "k" | "kib" => 1 << 10,
            "m" | "mib" => 1 << 20,
            "g" | "gib" => 1 << 30,
            "t" | "tib" => 1 << 40,
            _ => return Err(format!("unknown unit `{}` (B, kB, MB, GB, TB, KiB, MiB, GiB, TiB)", unit.trim())),
        };
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(factor).map(Self).ok_or_else(|| "more than 64 bits of bytes".to_owned());
        }
        let value: f64 = number.parse().map_err(|_| "expected a number of bytes such as 2GiB or 500MB".to_owned())?;
        let bytes = value * factor as f64;
        // 2^64 itself is not representable in u64, and every f64 below it is.
        if bytes >= 18_446_744_073_709_551_616.0 {
            return Err("more than 64 bits of bytes".to_owned());
        }
        Ok(Self(bytes.round() as u64))
    }
}

/// A list of positive thread counts, `1,2`.
pub fn thread_count(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(0) => Err("at least one thread is needed".to_owned()),
        Ok(count) if count > 1024 => Err("at most 1024 threads".to_owned()),
        Ok(count) => Ok(count),
        Err(error) => Err(error.to_string()),
    }
}

/// Threads to use when none are asked for: the cores this process may run on.
pub fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// A finite number greater than zero.
pub fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value > 0.0 => Ok(value),
        Ok(_) => Err("expected a number greater than zero".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_sizes() {
        let parse = |text: &str| text.parse::<ByteSize>().map(|size| size.0);
        assert_eq!(parse("2GiB"), Ok(2 << 30));
        assert_eq!(parse("500MB"), Ok(500_000_000));
        assert_eq!(parse("500 mb"), Ok(500_000_000));
        assert_eq!(parse("1234"), Ok(1234));
        assert_eq!(parse("1.5G"), Ok(3 << 29));
        assert_eq!(parse("0"), Ok(0));
        assert_eq!(parse("18446744073709551615"), Ok(u64::MAX));
        for bad in ["", "GiB", "-1", "1.2.3MB", "12 parsecs", "18446744073709551616", "99999999999TiB", "1e9"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn threads_are_positive() {
        assert_eq!(thread_count("2"), Ok(2));
        assert!(thread_count("0").is_err());
        assert!(thread_count("-1").is_err());
        assert!(thread_count("4096").is_err());
    }
}
