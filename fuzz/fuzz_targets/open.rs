//! Arbitrary bytes as the `model.safetensors` of a directory: opening, checking and decoding end in a value or in one line of error.
//! A small real model is the starting point, so that mutations reach past the first checks.
#![no_main]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use tersor_format::{ModelDir, Tensor, decode_tensor, verify};

/// One directory for the whole run; its model file is rewritten for every input.
fn directory() -> &'static Path {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        let path = tempfile::tempdir().expect("a temporary directory").keep();
        fs::write(path.join("config.json"), r#"{"quantization_config":{"quant_method":"tersor","version":1}}"#).expect("writable");
        path
    })
}

fn one_line(error: impl std::fmt::Display) {
    let text = error.to_string();
    assert!(!text.is_empty() && !text.contains('\n'), "an error is one line: {text:?}");
}

fuzz_target!(|data: &[u8]| {
    let path = directory();
    fs::write(path.join("model.safetensors"), data).expect("writable");
    let dir = match ModelDir::open(path) {
        Ok(dir) => dir,
        Err(error) => return one_line(error),
    };
    if let Err(error) = verify(path, &mut |_| ()) {
        one_line(error);
    }
    for (_, tensor) in dir.tensors() {
        let Tensor::Coded(coded) = tensor else { continue };
        // A few bytes may claim 2^32 symbols; the model compares shapes with its configuration first.
        if coded.rows() * coded.cols() > 1 << 20 {
            continue;
        }
        if let Err(error) = decode_tensor(coded) {
            one_line(error);
        }
    }
});
