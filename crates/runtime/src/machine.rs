//! What this machine is, as far as the system tells: processor, memory, caches. Linux tells.

use std::fs;

/// The processor's marketing name, `unknown` where the system does not tell.
#[must_use]
pub fn cpu_name() -> String {
    field("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown".to_owned())
}

/// Physical memory in bytes; 0 where the system does not tell.
#[must_use]
pub fn memory_bytes() -> u64 {
    field("/proc/meminfo", "MemTotal").and_then(|text| kibibytes(&text)).unwrap_or(0)
}

/// The most resident memory this process has had, in bytes (`VmHWM`); 0 where the system does not tell.
#[must_use]
pub fn peak_rss_bytes() -> u64 {
    field("/proc/self/status", "VmHWM").and_then(|text| kibibytes(&text)).unwrap_or(0)
}

/// Bytes that do not fit the caches, for working sets that are to come from memory: four times the last level, 256 MiB at least, however small the last
/// level says it is (a virtual machine may share its host's); within an eighth of the memory.
#[must_use]
pub fn beyond_caches_bytes() -> u64 {
    const LEAST: u64 = 256 << 20;
    let limit = (memory_bytes() / 8).max(LEAST / 4);
    (last_level_cache_bytes() * 4).max(LEAST).min(limit)
}

/// Bytes of the first processor's last-level cache; 0 where the system does not tell.
fn last_level_cache_bytes() -> u64 {
    let size = |index: u32| {
        let text = fs::read_to_string(format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size")).ok()?;
        let text = text.trim();
        match text.strip_suffix('K') {
            Some(number) => number.parse::<u64>().ok()?.checked_mul(1 << 10),
            None => text.strip_suffix('M')?.parse::<u64>().ok()?.checked_mul(1 << 20),
        }
    };
    (0..8).filter_map(size).max().unwrap_or(0)
}

fn field(path: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn kibibytes(text: &str) -> Option<u64> {
    text.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn linux_tells_memory_and_peak() {
        assert!(memory_bytes() > 1 << 20);
        let peak = peak_rss_bytes();
        assert!(peak > 1 << 16 && peak < memory_bytes());
        assert!(beyond_caches_bytes() >= 64 << 20);
    }
}
