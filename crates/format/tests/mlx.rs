//! MLX directories in, the same bytes out.

mod common;

use std::fs;
use std::path::Path;

use common::{Random, line, safetensors};
use serde_json::json;
use tersor_codec::Codec;
use tersor_format::{DirWriter, ErrorKind, FormatError, MlxDir, MlxTensor, ModelDir, Tensor, encode_tensor, to_mlx, verify};

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
