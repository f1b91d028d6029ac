//! The invariants of absence that ARCHITECTURE.md states, checked by reading the sources.

use std::fs;
use std::path::{Path, PathBuf};

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Every `.rs` file below `dir`, with its text less comments (a word in prose breaks no invariant) and less tests, which may read the
/// environment: a file `testing.rs`, and what follows `#[cfg(test)]`.
fn sources(dir: &str) -> Vec<(PathBuf, String)> {
    fn walk(dir: &Path, found: &mut Vec<(PathBuf, String)>) {
        for entry in fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") && path.file_name().is_some_and(|name| name != "testing.rs") {
                let text = fs::read_to_string(&path).unwrap();
                let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
                let code = text.lines().map(|line| line.split("//").next().unwrap_or("")).collect::<Vec<_>>().join("\n");
                found.push((path, code));
            }
        }
    }
    let mut found = Vec::new();
    walk(&workspace().join(dir), &mut found);
    assert!(!found.is_empty(), "{dir} holds no source");
    found
}

fn assert_absent(dir: &str, words: &[&str]) {
    for (path, code) in sources(dir) {
        for word in words {
            assert!(!code.contains(word), "{} contains `{word}`, which ARCHITECTURE.md says is absent from {dir}", path.display());
        }
    }
}

#[test]
fn codec_and_quant_forbid_unsafe() {
    for krate in ["codec", "quant"] {
        let root = fs::read_to_string(workspace().join(format!("crates/{krate}/src/lib.rs"))).unwrap();
        assert!(root.contains("#![forbid(unsafe_code)]"), "crates/{krate} must forbid unsafe code");
    }
}

#[test]
fn codec_knows_no_file_thread_isa_or_gpu() {
    assert_absent("crates/codec/src", &["std::fs", "std::thread", "rayon", "target_arch", "target_feature", "std::arch", "cuda"]);
}

#[test]
fn quant_knows_no_bytes_on_disk() {
    assert_absent("crates/quant/src", &["std::fs", "std::io", "tersor_codec", "tersor_format"]);
}

#[test]
fn model_does_not_know_that_weights_are_coded() {
    assert_absent("crates/runtime/src/model", &["tersor_codec", "CodedTensor", "Decoded", "residency::", "unsafe", "target_arch"]);
}

#[test]
fn residency_holds_no_unsafe_and_no_isa() {
    assert_absent("crates/runtime/src/residency", &["unsafe", "target_arch", "target_feature", "std::arch"]);
}

#[test]
fn kernels_open_no_file() {
    assert_absent("crates/cpu/src", &["std::fs", "File::open", "std::path"]);
}

#[test]
fn device_layouts_have_no_unsafe_and_know_no_driver() {
    assert_absent("crates/cuda/src/layout", &["unsafe", "cudarc", "std::fs", "tersor_cpu", "tersor_format"]);
}

#[test]
fn only_binaries_read_the_environment_or_print() {
    for krate in ["codec", "quant", "format", "cpu", "cuda", "runtime", "server"] {
        assert_absent(&format!("crates/{krate}/src"), &["env::var", "println!", "eprintln!", "print!(", "dbg!"]);
    }
}

#[test]
fn arrows_point_down() {
    let order = ["codec", "quant", "format", "cpu", "cuda", "runtime", "server", "cli", "python"];
    for (level, krate) in order.iter().enumerate() {
        let manifest = fs::read_to_string(workspace().join(format!("crates/{krate}/Cargo.toml"))).unwrap();
        let dependencies = manifest.split("[dev-dependencies]").next().unwrap();
        for above in &order[level..] {
            assert!(!dependencies.contains(&format!("tersor-{above}.workspace")), "crates/{krate} must not depend on {above}");
        }
    }
}
