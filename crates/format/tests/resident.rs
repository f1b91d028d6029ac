//! Opening reads next to nothing, and released tensors stop counting as resident. One test, so that no other test's memory disturbs.
#![cfg(target_os = "linux")]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use tersor_codec::Codec;
use tersor_format::{DirWriter, Dtype, ModelDir, Tensor, encode_tensor};
use tersor_quant::{QuantizedTensor, Scales};

/// Resident bytes of mapped files.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssFile:")).expect("Linux 4.5 or later");
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

fn write(path: &Path) {
    let mut writer = DirWriter::create(path, false).unwrap();
    writer.write_raw("raw.weight", Dtype::F32, &[8 << 20], &vec![1; 32 << 20]).unwrap();
    let symbols = (0..32 << 20).map(|i: u32| (i.wrapping_mul(0x9e37_79b9) >> 28) as i16 - 8).collect();
    let scales = Scales::Tensor { scale: 0x3c00, scale_exponent: 0 };
    let tensor = QuantizedTensor { rows: 1 << 13, cols: 1 << 12, symbols, scales };
    let encoded = encode_tensor(&tensor, "fixed".parse::<Codec>().unwrap(), 1 << 16).unwrap();
    writer.write_coded("coded.weight", &encoded).unwrap();
    writer.finish(serde_json::json!({})).unwrap();
}

#[test]
fn memory_follows_use() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("model");
    write(&path);
    let before = resident();
    let start = Instant::now();
    let dir = ModelDir::open(&path).unwrap();
    let (opened, open_time) = (resident(), start.elapsed());
    assert!(opened < before + (2 << 20), "opening touched {} bytes", opened - before);
    assert!(open_time < Duration::from_millis(200), "opening took {open_time:?}");
    for name in ["raw.weight", "coded.weight"] {
        dir.check(name).unwrap();
        let used = resident();
        assert!(used > opened + (14 << 20), "{name}: {} bytes", used - opened);
        dir.release(name);
        assert!(resident() < opened + (2 << 20), "{name} is still resident");
        dir.check(name).unwrap();
        dir.release(name);
    }
    let tensor = dir.tensor("raw.weight").unwrap().clone();
    drop(dir);
    let Tensor::Raw(raw) = &tensor else { panic!("raw") };
    assert!(raw.bytes().iter().all(|&b| b == 1));
    drop(tensor);
    assert!(resident() < before + (2 << 20), "the last tensor unmaps the file");
}
