//! What this machine is, where cached files go, and how this program is started again.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::sync::OnceLock;
pub use tersor_runtime::machine::{beyond_caches_bytes, cpu_name, memory_bytes, peak_rss_bytes};

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
