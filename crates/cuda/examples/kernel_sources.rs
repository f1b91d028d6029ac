//! Writes the complete text of every kernel, as the device compiler gets it: generated constants, then the source.
//!
//! `cargo run -p tersor-cuda --example kernel_sources OUT [SOURCES]`: SOURCES is crates/cuda/src/kernels unless given. Used by tools/check_cuda.py.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = env::args_os().skip(1).map(PathBuf::from);
    let out = arguments.next().ok_or("usage: kernel_sources OUT [SOURCES]")?;
    let sources = arguments.next().unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("src/kernels"));
    fs::create_dir_all(&out)?;
    for entry in fs::read_dir(&sources).map_err(|error| format!("{}: {error}", sources.display()))? {
        let path = entry?.path();
        if let (Some(name), true) = (path.file_name(), path.extension().is_some_and(|extension| extension == "cu")) {
            let text = format!("{}#line 1 \"{}\"\n{}", tersor_cuda::layout::header(), name.display(), fs::read_to_string(&path)?);
            fs::write(out.join(name), text)?;
        }
    }
    Ok(())
}
