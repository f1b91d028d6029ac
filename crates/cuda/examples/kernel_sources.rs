//! Writes the complete text of every kernel, as the device compiler gets it, and beside it the first line that its PTX must have.
//!
//! `cargo run -p tersor-cuda --example kernel_sources OUT`. Used by tools/check_cuda.py.

use std::path::PathBuf;
use std::{env, fs};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = env::args_os().nth(1).map(PathBuf::from).ok_or("usage: kernel_sources OUT")?;
    fs::create_dir_all(&out)?;
    for source in &tersor_cuda::SOURCES {
        fs::write(out.join(source.name), source.full_text())?;
        fs::write(out.join(source.name).with_extension("stamp"), source.ptx_stamp())?;
    }
    Ok(())
}
