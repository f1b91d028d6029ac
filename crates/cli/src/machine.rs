//! What this machine is: processor, memory, and what the process has used.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::OnceLock;

/// The processor's marketing name, `unknown` where the system does not tell.
pub fn cpu_name() -> String {
    field("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown".to_owned())
}

/// Physical memory in bytes; 0 where the system does not tell.
pub fn memory_bytes() -> u64 {
    field("/proc/meminfo", "MemTotal").and_then(|text| kibibytes(&text)).unwrap_or(0)
}

/// Bytes of the first processor's last-level cache; 0 where the system does not tell.
pub fn last_level_cache_bytes() -> u64 {
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

/// Where this user's cached files go: `$XDG_CACHE_HOME/tersor`, `~/.cache/tersor`, or the temporary directory.
pub fn cache_dir() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")));
    base.unwrap_or_else(std::env::temp_dir).join("tersor")
}

/// Program and first arguments that start the command `tersor` again. Not this executable where that is a Python interpreter.
static LAUNCHER: OnceLock<Vec<OsString>> = OnceLock::new();

/// Says how the command is started where it is not an executable of its own, such as `python -m tersor`. The first call counts.
pub fn set_launcher(program_and_arguments: Vec<OsString>) {
    let _ = LAUNCHER.set(program_and_arguments);
}

/// The program that is this command, and the arguments that come before the command's.
pub fn this_program() -> io::Result<(PathBuf, Vec<OsString>)> {
    match LAUNCHER.get().and_then(|launcher| launcher.split_first()) {
        Some((program, arguments)) => Ok((PathBuf::from(program), arguments.to_vec())),
        None => Ok((std::env::current_exe()?, Vec::new())),
    }
}

/// The most resident memory this process has had, in bytes (`VmHWM`); 0 where the system does not tell.
pub fn peak_rss_bytes() -> u64 {
    field("/proc/self/status", "VmHWM").and_then(|text| kibibytes(&text)).unwrap_or(0)
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
    #[test]
    fn linux_tells_memory_and_peak() {
        assert!(super::memory_bytes() > 1 << 20);
        let peak = super::peak_rss_bytes();
        assert!(peak > 1 << 16 && peak < super::memory_bytes());
    }
}
