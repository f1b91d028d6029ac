//! One changed byte of a model file is refused, or changes no logit: by `verify`, and by the loader that does not read the manifest.

mod residency_common;

use std::fs;
use std::path::Path;

use residency_common::{Recipe, TestModel, options, run};
use tersor_format::{ModelDir, verify};
use tersor_runtime::model::llama::Model;
use tersor_runtime::residency::{Strategy, open};

/// The logits of some tokens, or why there are none.
fn logits(path: &Path, strategy: Strategy) -> Result<Vec<u32>, String> {
    let mut model = Model::load(&ModelDir::open(path).map_err(|e| e.to_string())?).map_err(|e| e.to_string())?;
    let dir = ModelDir::open(path).map_err(|e| e.to_string())?;
    let mut weights = open(dir, strategy, &options(1)).map_err(|e| e.to_string())?;
    run(&mut model, weights.as_mut()).map_err(|e| e.to_string())
}

/// Changes the byte at `at` of the file, asks `judge`, and restores the file. A new file each time, as a mapped one must not change.
fn with_flip<T>(file: &Path, bytes: &mut [u8], at: usize, judge: impl FnOnce() -> T) -> T {
    let replace = |bytes: &[u8]| {
        let new = file.with_extension("new");
        fs::write(&new, bytes).unwrap();
        fs::rename(new, file).unwrap();
    };
    let mask = 1 << (at % 8);
    bytes[at] ^= mask;
    replace(bytes);
    let answer = judge();
    bytes[at] ^= mask;
    replace(bytes);
    answer
}

#[test]
fn every_byte_of_a_tiny_model() {
    let model = TestModel::new(Recipe { tied: true, ..Recipe::new("rans", 1) });
    let path = model.path();
    let file = path.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let whole = logits(&path, Strategy::Fused).unwrap();
    let mut refused = 0;
    for at in 0..bytes.len() {
        let (verified, computed) = with_flip(&file, &mut bytes, at, || {
            // The manifest's checksum makes `verify` all but trivial; the loader is on its own.
            let verified = at % 16 == 0 && verify(&path, &mut |_| ()).is_ok();
            (verified, logits(&path, Strategy::Fused))
        });
        assert!(!verified, "byte {at}: verify accepts a changed file");
        match computed {
            Ok(logits) => assert_eq!(logits, whole, "byte {at}: computed with damaged weights"),
            Err(error) => {
                assert!(!error.contains('\n'), "byte {at}: {error:?} is not one line");
                refused += 1;
            }
        }
    }
    // Padding and white space may change unnoticed; most of the file may not.
    assert!(refused * 10 > bytes.len() * 9, "{refused} of {} bytes are guarded", bytes.len());
}

#[test]
fn sampled_bytes_of_the_demo_model() {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo");
    let copy = tempfile::tempdir().unwrap();
    let path = copy.path().join("demo");
    fs::create_dir(&path).unwrap();
    for entry in fs::read_dir(demo).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), path.join(entry.file_name())).unwrap();
    }
    let file = path.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    verify(&path, &mut |_| ()).unwrap();
    let whole = logits(&path, Strategy::Cached).unwrap();
    // Every 31st byte of the JSON header's first part, then evenly through the file by a step that is coprime to every alignment.
    let positions = (0..2000).step_by(31).chain((0..bytes.len()).step_by(bytes.len() / 61));
    for at in positions {
        let (verified, computed) =
            with_flip(&file, &mut bytes, at, || (verify(&path, &mut |_| ()).is_ok(), logits(&path, Strategy::Cached)));
        assert!(!verified, "byte {at}: verify accepts a changed file");
        if let Ok(logits) = computed {
            assert_eq!(logits, whole, "byte {at}: computed with damaged weights");
        }
    }
}
