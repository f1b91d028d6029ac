//! Ctrl-C. While a [`Graceful`] guard lives, the first signal only raises a flag that loops look at through [`check`], so that
//! temporaries are removed by their owners; a second signal, or one outside a guard, ends the process at once.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Exit code of an interrupted command, as shells report SIGINT.
pub const EXIT_CODE: u8 = 130;

static REQUESTED: AtomicBool = AtomicBool::new(false);
static GUARDS: AtomicUsize = AtomicUsize::new(0);
/// A directory that is not finished. Its owner removes it; a second signal does, as no destructor runs then.
static TEMPORARY: Mutex<Option<PathBuf>> = Mutex::new(None);

/// The command was interrupted and has cleaned up.
#[derive(Debug)]
pub struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// Installs the handler for SIGINT, SIGTERM and SIGHUP. Where that fails the system's own handling stays, which also ends the process.
pub fn install() {
    let handler = || {
        let second = REQUESTED.swap(true, Ordering::SeqCst);
        if second || GUARDS.load(Ordering::SeqCst) == 0 {
            if let Some(path) = TEMPORARY.lock().ok().and_then(|mut path| path.take()) {
                let _ = std::fs::remove_dir_all(path);
            }
            std::process::exit(i32::from(EXIT_CODE));
        }
    };
    let _ = ctrlc::set_handler(handler);
}

/// Names the unfinished directory that a second signal must remove.
pub fn remember_temporary(path: &Path) {
    if let Ok(mut temporary) = TEMPORARY.lock() {
        *temporary = Some(path.to_owned());
    }
}

/// The directory is finished.
pub fn forget_temporary() {
    if let Ok(mut temporary) = TEMPORARY.lock() {
        *temporary = None;
    }
}

/// While it lives, the code promises to call [`check`] often and to clean up.
pub struct Graceful(());

/// Begins a part of a command that cleans up after itself.
pub fn graceful() -> Graceful {
    GUARDS.fetch_add(1, Ordering::SeqCst);
    Graceful(())
}

impl Drop for Graceful {
    fn drop(&mut self) {
        GUARDS.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Was an interrupt asked for?
pub fn requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}

/// The flag itself, for loops of other crates.
pub fn flag() -> &'static AtomicBool {
    &REQUESTED
}

/// Asks the command to end, as a signal would.
pub fn request() {
    REQUESTED.store(true, Ordering::Relaxed);
}

/// The request has been answered: what follows is not interrupted.
pub fn forget() {
    REQUESTED.store(false, Ordering::SeqCst);
}

/// [`requested`] as an error for `?`.
pub fn check() -> Result<(), Interrupted> {
    if requested() { Err(Interrupted) } else { Ok(()) }
}
