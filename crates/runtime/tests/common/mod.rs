//! What several tests share.
#![allow(dead_code, reason = "every test binary uses its own part")]

use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;
use tersor_cpu::{Level, Pool};
use tersor_format::ModelDir;
use tersor_runtime::model::kv::KvPrecision;
use tersor_runtime::model::{CpuRunner, Model};
use tersor_runtime::residency::dense::Dense;

/// The tiny models.
pub fn golden_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// An unquantized model, ready to run.
pub fn open(dir: &Path, level: Level, threads: usize) -> (Model, Dense) {
    open_with(dir, level, Arc::new(Pool::new(threads)))
}

/// An unquantized model on a given pool.
pub fn open_with(dir: &Path, level: Level, pool: Arc<Pool>) -> (Model, Dense) {
    let dir = ModelDir::open(dir).unwrap();
    let model = Model::load(&dir).unwrap();
    let weights = Dense::new(&dir, model.config(), pool, level).unwrap();
    (model, weights)
}

/// An unquantized model as sessions and evaluations take it.
pub fn runner(dir: &Path, level: Level, threads: usize, precision: KvPrecision) -> CpuRunner {
    let (model, weights) = open(dir, level, threads);
    CpuRunner::new(model, Box::new(weights), precision)
}

/// A copy of a tiny model with another `config.json`.
pub fn with_config(name: &str, change: impl FnOnce(&mut Value)) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden_dir().join(name)).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    let path = copy.path().join("config.json");
    let mut config = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(&path, config.to_string()).unwrap();
    copy
}

/// The data folder shared by the project's machines, or `None` (with a notice) where it is absent. Set
/// `TERSOR_REQUIRE=data` where it must not be.
pub fn shared_data() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    // Beside the repository, or beside the folder of its worktrees.
    let found = ["../shared/data", "../../shared/data"].iter().map(|up| root.join(up)).find(|data| data.is_dir());
    if found.is_none() {
        let required = std::env::var("TERSOR_REQUIRE").is_ok_and(|list| list.split(',').any(|word| word == "data"));
        assert!(!required, "TERSOR_REQUIRE asks for data, but ../shared/data is absent");
        println!("skipped: ../shared/data is absent");
    }
    found
}
