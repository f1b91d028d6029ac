//! MLX directories in, the same bytes out.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use common::{Random, line, safetensors};
use serde_json::json;
use tersor_codec::Codec;
use tersor_format::{
    DirWriter, ErrorKind, FormatError, MlxDir, MlxTensor, ModelDir, RestoreReport, Tensor, encode_tensor, restore_original, to_mlx, verify,
};

/// An MLX directory with one quantized (32, 128) tensor of group size 64 and a norm; `quantization` as given.
fn write(path: &Path, quantization: serde_json::Value, words_shape: [usize; 2]) -> [Vec<u8>; 3] {
    let mut random = Random(21);
    let words: Vec<u8> = (0..32 * 16 * 4).map(|_| random.next() as u8).collect();
    let mut halves = |n: usize| (0..n).flat_map(|_| random.scale().to_le_bytes()).collect::<Vec<u8>>();
    let (scales, biases) = (halves(64), halves(64));
    let header = json!({
        "l.q.weight": {"dtype": "U32", "shape": words_shape, "data_offsets": [0, 2048]},
        "l.q.scales": {"dtype": "BF16", "shape": [32, 2], "data_offsets": [2048, 2176]},
        "l.q.biases": {"dtype": "BF16", "shape": [32, 2], "data_offsets": [2176, 2304]},
        "norm.weight": {"dtype": "BF16", "shape": [1], "data_offsets": [2304, 2306]},
    });
    let data = [&words[..], &scales, &biases, &[0x80, 0x3f]].concat();
    fs::create_dir_all(path).unwrap();
    fs::write(path.join("model.safetensors"), safetensors(&header.to_string(), &data)).unwrap();
    let config = json!({"quantization": quantization, "quantization_config": quantization});
    fs::write(path.join("config.json"), config.to_string()).unwrap();
    [words, scales, biases]
}

#[test]
fn a_directory_survives_encoding() {
    let root = tempfile::tempdir().unwrap();
    let (source, target) = (root.path().join("mlx"), root.path().join("tersor"));
    let original = write(&source, json!({"group_size": 64, "bits": 4}), [32, 16]);
    let dir = ModelDir::open(&source).unwrap();
    let mut writer = DirWriter::create(&target, false).unwrap();
    for (name, tensor) in MlxDir::new(&dir).unwrap().tensors().unwrap() {
        match tensor {
            MlxTensor::Raw(raw) => writer.write_raw(name, raw.dtype(), raw.shape(), raw.bytes()).unwrap(),
            MlxTensor::Quantized(packed) => {
                assert_eq!((packed.rows(), packed.cols(), packed.group_size()), (32, 128, 64));
                let encoded = encode_tensor(&packed.to_tensor().unwrap(), Codec::default(), 1024).unwrap();
                writer.write_coded(name, &encoded).unwrap();
            }
        }
    }
    writer.finish(dir.config().clone()).unwrap();
    verify(&target, &mut |_| ()).unwrap();
    let dir = ModelDir::open(&target).unwrap();
    assert_eq!(dir.tensors().map(|(name, _)| name).collect::<Vec<_>>(), ["l.q.weight", "norm.weight"]);
    assert!(MlxDir::new(&dir).is_none(), "its tensors are coded now");
    let Some(Tensor::Coded(coded)) = dir.tensor("l.q.weight") else { panic!("coded") };
    let parts = to_mlx(coded).unwrap();
    assert_eq!(parts.words.shape(), [32, 16]);
    assert_eq!([&parts.words, &parts.scales, &parts.biases].map(|part| part.bytes().to_vec()), original);
}

#[test]
fn what_is_not_four_bit_affine_is_refused_by_name() {
    let root = tempfile::tempdir().unwrap();
    let refused = |quantization: serde_json::Value, shape, words: &str| -> FormatError {
        write(root.path(), quantization, shape);
        let dir = ModelDir::open(root.path()).unwrap();
        let error = MlxDir::new(&dir).unwrap().tensors().expect_err(words);
        let text = line(&error);
        assert!(text.contains(words) && text.contains("l.q.weight"), "{text}");
        error
    };
    let eight = refused(json!({"group_size": 64, "bits": 8}), [32, 16], "8 bits; only 4");
    assert_eq!(eight.kind(), ErrorKind::Unsupported);
    refused(json!({"group_size": 64, "bits": 4, "l.q": {"group_size": 64, "bits": 6}}), [32, 16], "6 bits");
    refused(json!({"group_size": 64, "bits": 4, "mode": "mxfp4"}), [32, 16], "mode \"mxfp4\"");
    refused(json!({"group_size": 0, "bits": 4}), [32, 16], "group size 0");
    refused(json!({"group_size": 32, "bits": 4}), [32, 16], "scales is BF16 [32, 2]");
    refused(json!({"group_size": 64, "bits": 4}), [16, 32], "scales is BF16 [32, 2]");
}

/// Every file of a directory by name.
fn files(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(path).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

/// Two shards, written as some program might: tensors in no order, metadata of its own, a header padded with spaces.
fn write_shards(path: &Path) {
    let mut random = Random(5);
    fs::create_dir_all(path).unwrap();
    let mut map = serde_json::Map::new();
    for shard in 0..2 {
        let name = format!("model-0000{}-of-00002.safetensors", shard + 1);
        let header = format!(
            "{{ \"l{shard}.norm.weight\":{{\"shape\":[3],\"dtype\":\"F32\",\"data_offsets\":[128,140]}},\"__metadata__\":{{\"by\":\"hand\"}}, \
             \"l{shard}.q.scales\" : {{\"dtype\":\"F16\",\"shape\":[16,1],\"data_offsets\":[140,172]}},\
             \"l{shard}.q.biases\":{{\"dtype\":\"F16\",\"shape\":[16,1],\"data_offsets\":[684,716]}},\
             \"l{shard}.q.weight\":{{\"dtype\":\"U32\",\"shape\":[16,8],\"data_offsets\":[172,684]}},\
             \"other\":{{\"dtype\":\"I64\",\"shape\":[16],\"data_offsets\":[0,128]}}}}   "
        )
        .replace("other", &format!("l{shard}.other"));
        let mut data: Vec<u8> = (0..716).map(|_| random.next() as u8).collect();
        for part in [140..172, 684..716] {
            data[part].as_chunks_mut().0.iter_mut().for_each(|half| *half = random.scale().to_le_bytes());
        }
        for part in ["norm.weight", "q.scales", "q.biases", "q.weight", "other"] {
            map.insert(format!("l{shard}.{part}"), json!(name));
        }
        fs::write(path.join(&name), safetensors(&header, &data)).unwrap();
    }
    fs::write(path.join("model.safetensors.index.json"), format!("{:#}", json!({"weight_map": map}))).unwrap();
    fs::write(path.join("config.json"), "{\"quantization\":\n{\"bits\":4, \"group_size\":64}, \"x\":1.50}\n").unwrap();
    fs::write(path.join("README.md"), "read me").unwrap();
    fs::write(path.join("tokenizer.json"), "{}").unwrap();
}

/// Encodes `source` with its original files kept.
fn encode(source: &Path, target: &Path) {
    let dir = ModelDir::open(source).unwrap();
    let mut writer = DirWriter::create(target, false).unwrap();
    for (name, tensor) in MlxDir::new(&dir).unwrap().tensors().unwrap() {
        match tensor {
            MlxTensor::Raw(raw) => writer.write_raw(name, raw.dtype(), raw.shape(), raw.bytes()).unwrap(),
            MlxTensor::Quantized(packed) => {
                writer.write_coded(name, &encode_tensor(&packed.to_tensor().unwrap(), Codec::default(), 1024).unwrap()).unwrap();
            }
        }
    }
    writer.keep_original(&dir).unwrap();
    writer.finish(json!({"model_type": "llama"})).unwrap();
}

fn restore(source: &Path, target: &Path) -> Result<RestoreReport, FormatError> {
    restore_original(&ModelDir::open(source)?, target, false, &mut |_| ControlFlow::Continue(()))
}

#[test]
fn the_very_files_come_back() {
    let root = tempfile::tempdir().unwrap();
    let [source, coded, back] = ["source", "coded", "back"].map(|name| root.path().join(name));
    write_shards(&source);
    encode(&source, &coded);
    verify(&coded, &mut |_| ()).unwrap();
    let report = restore(&coded, &back).unwrap();
    assert_eq!(files(&back), files(&source));
    assert_eq!(report.files, 6);
    assert_eq!(report.bytes, files(&source).values().map(|bytes| bytes.len() as u64).sum::<u64>());

    // A single file, and a destination that is taken.
    let single = root.path().join("single");
    write(&single, json!({"group_size": 64, "bits": 4}), [32, 16]);
    let coded = root.path().join("single-coded");
    encode(&single, &coded);
    assert!(line(&restore(&coded, &back).unwrap_err()).contains("already exists"));
    let back = root.path().join("single-back");
    restore(&coded, &back).unwrap();
    assert_eq!(files(&back), files(&single));
}

#[test]
fn what_would_not_be_the_same_is_not_written() {
    let root = tempfile::tempdir().unwrap();
    let [source, coded, back] = ["source", "coded", "back"].map(|name| root.path().join(name));
    write_shards(&source);
    encode(&source, &coded);
    let record = coded.join("tersor.original.safetensors");
    let bytes = fs::read(&record).unwrap();
    let refused = |words: &str| {
        let error = line(&restore(&coded, &back).unwrap_err());
        assert!(error.contains(words), "{error}");
        let names: Vec<_> = fs::read_dir(root.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "nothing is left behind: {names:?}");
    };
    let changed = |from: &[u8], to: &[u8]| {
        let at = bytes.windows(from.len()).position(|window| window == from).expect("the record holds it");
        let mut changed = bytes.clone();
        changed[at..at + from.len()].copy_from_slice(to);
        fs::write(&record, changed).unwrap();
    };
    changed(b"by\":\"hand", b"by\":\"head");
    refused("does not come out as the original was");
    changed(b"[128,140]", b"[128,144]");
    refused("does not fit its 16 bytes");
    changed(b"l1.norm.weight", b"l1.form.weight");
    refused("l1.form.weight");
    changed(b"tersor-original", b"tersor-anything");
    refused("the format is not");
    changed(b"\"config.json", b"\"../fig.json");
    refused("not the name of a file");
    fs::write(&record, &bytes).unwrap();
    fs::write(coded.join("README.md"), "read mi").unwrap();
    refused("differs from the manifest");
    fs::write(coded.join("README.md"), "read me").unwrap();
    let stopped = restore_original(&ModelDir::open(&coded).unwrap(), &back, false, &mut |_| ControlFlow::Break(()));
    assert!(matches!(stopped, Err(FormatError::Stopped { .. })));
    fs::remove_file(&record).unwrap();
    refused("keeps no record");
}
