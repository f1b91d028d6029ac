//! Plain Hugging Face directories: what is read, and what is refused with which words.

mod common;

use std::fs;
use std::path::Path;

use common::{line, safetensors};
use tersor_format::{Dtype, ErrorKind, FormatError, ModelDir, Tensor};

fn write(dir: &Path, name: &str, bytes: impl AsRef<[u8]>) {
    fs::write(dir.join(name), bytes).unwrap();
}

/// A directory with this file as its only shard.
fn open_file(file: &[u8]) -> Result<ModelDir, FormatError> {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "config.json", "{}");
    write(dir.path(), "model.safetensors", file);
    ModelDir::open(dir.path())
}

fn refused(header: &str, data: &[u8], kind: ErrorKind, words: &str) {
    let error = open_file(&safetensors(header, data)).expect_err(header);
    let text = line(&error);
    assert!(text.contains(words), "{header}: {text}");
    assert!(text.contains("model.safetensors"), "{text}");
    assert_eq!(error.kind(), kind, "{text}");
}

#[test]
fn reads_every_float_type_exactly() {
    let header = r#"{"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},
        "b":{"dtype":"BF16","shape":[2],"data_offsets":[8,12]},"c":{"dtype":"F16","shape":[2],"data_offsets":[12,16]},
        "d":{"dtype":"U32","shape":[1],"data_offsets":[16,20]},"e":{"dtype":"F32","shape":[0,4],"data_offsets":[20,20]}}  "#;
    let mut data = Vec::new();
    data.extend(1.5f32.to_le_bytes());
    data.extend((-2.0f32).to_le_bytes());
    data.extend([0x80, 0x3f, 0x00, 0xc0]); // bf16 1, -2
    data.extend([0x00, 0x3c, 0x01, 0x00]); // f16 1, least subnormal
    data.extend(7u32.to_le_bytes());
    let dir = open_file(&safetensors(header, &data)).unwrap();
    assert!(!dir.is_tersor());
    let floats = |name| match dir.require(name).unwrap() {
        Tensor::Raw(raw) => raw.to_f32().unwrap(),
        _ => panic!("raw"),
    };
    assert_eq!(floats("a"), [1.5, -2.0]);
    assert_eq!(floats("b"), [1.0, -2.0]);
    assert_eq!(floats("c"), [1.0, 2f32.powi(-24)]);
    assert!(floats("e").is_empty());
    let Some(Tensor::Raw(d)) = dir.tensor("d") else { panic!("raw") };
    assert_eq!((d.dtype(), &d.bytes()[..]), (Dtype::U32, &[7, 0, 0, 0][..]));
    assert_eq!(d.to_f32().unwrap_err().kind(), ErrorKind::Unsupported);
    assert!(dir.tensor("f").is_none());
    let missing = dir.require("f").unwrap_err();
    assert!(line(&missing).contains("no tensor \"f\""));
    dir.check("a").unwrap();
    dir.release("a");
    assert_eq!(floats("a"), [1.5, -2.0]);
}

#[test]
fn tensors_outlive_their_directory() {
    let header = r#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}"#;
    let dir = open_file(&safetensors(header, &[1, 2, 3])).unwrap();
    let tensor = dir.tensor("a").unwrap().clone();
    drop(dir);
    let Tensor::Raw(raw) = tensor else { panic!("raw") };
    raw.bytes().release().unwrap();
    assert_eq!(raw.bytes()[..], [1, 2, 3]);
}

#[test]
fn hostile_headers_are_refused() {
    use ErrorKind::{Corrupt, Limit, Unsupported};
    let one =
        |dtype: &str, shape: &str, offsets: &str| format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#);
    refused(&one("F64x", "[1]", "[0,8]"), &[0; 8], Unsupported, "unsupported dtype \"F64x\"");
    refused(&one("F32", "[3]", "[0,8]"), &[0; 8], Corrupt, "does not fit its 8 bytes");
    // 2^62 x 2^3 x 4 bytes wraps to 0 in 64 bits.
    refused(&one("F32", "[4611686018427387904,8]", "[0,0]"), &[], Corrupt, "does not fit its 0 bytes");
    refused(&one("F32", "[4611686018427387904,8,0]", "[0,0]"), &[], Corrupt, "does not fit");
    refused(&one("U8", "[8]", "[1,9]"), &[0; 9], Corrupt, "begins at 1; 0 was expected");
    refused(&one("U8", "[8]", "[8,0]"), &[0; 8], Corrupt, "begins at 8");
    refused(&one("U8", "[8]", "[0,8]"), &[0; 7], Corrupt, "need 8 bytes of data, the file has 7");
    refused(&one("U8", "[8]", "[0,8]"), &[0; 9], Corrupt, "need 8 bytes of data, the file has 9");
    refused(&one("U8", "[18446744073709551615]", "[0,18446744073709551615]"), &[0; 9], Corrupt, "need 18446744073709551615");
    refused(&one("U8", "[18446744073709551616]", "[0,0]"), &[], Corrupt, "JSON header");
    refused(&one("U8", "[-1]", "[0,0]"), &[], Corrupt, "JSON header");
    refused(&one("U8", "[8]", "[0,8,9]"), &[0; 8], Corrupt, "JSON header");
    refused("[]", &[], Corrupt, "JSON header");
    refused("", &[], Corrupt, "JSON header");
    refused("{} {}", &[], Corrupt, "JSON header");
    refused(&"[".repeat(10_000), &[], Corrupt, "JSON header");
    let deep = format!(r#"{{"a":{}"#, "{\"a\":".repeat(10_000));
    refused(&deep, &[], Corrupt, "JSON header");
    let pair = r#""a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
    refused(&format!("{{{pair},{pair}}}"), &[0; 2], Corrupt, "\"a\" occurs twice");
    refused(r#"{"__metadata__":{"a":"b","a":"b"}}"#, &[], Corrupt, "occurs twice");
    refused(r#"{"__metadata__":{},"__metadata__":{}}"#, &[], Corrupt, "occurs twice");
    let twice = r#"{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
    refused(twice, &[0], Corrupt, "duplicate field");
    let unknown = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x\ny":[[[]]]}}"#;
    refused(unknown, &[0], Corrupt, "unknown field");
    let overlap = r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#;
    refused(overlap, &[0; 3], Corrupt, "begins at 1; 2 was expected");
    let hole = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}"#;
    refused(hole, &[0; 3], Corrupt, "begins at 2; 1 was expected");

    let length = |n: u64| open_file(&n.to_le_bytes()).unwrap_err();
    assert_eq!(length(u64::MAX).kind(), Limit);
    assert!(line(&length(u64::MAX)).contains("the limit is 67108864"));
    assert_eq!(length(1 << 20).kind(), Corrupt);
    assert!(line(&length(1 << 20)).contains("truncated: 1048584 bytes needed"));
    assert!(line(&open_file(&[]).unwrap_err()).contains("truncated"));
    assert!(line(&open_file(&[0; 7]).unwrap_err()).contains("truncated"));
}

#[test]
fn a_plain_file_is_refused_at_every_shorter_or_longer_length() {
    let header = r#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}"#;
    let file = safetensors(header, &[1, 2, 3]);
    for length in 0..file.len() {
        line(&open_file(&file[..length]).unwrap_err());
    }
    line(&open_file(&[&file[..], &[0]].concat()).unwrap_err());
    open_file(&file).unwrap();
}

const INDEX: &str = r#"{"metadata":{"total_size":2},"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors"}}"#;

fn shard(name: &str) -> Vec<u8> {
    safetensors(&format!(r#"{{"{name}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}"#), &[9])
}

#[test]
fn shards_are_read_and_a_missing_one_is_named() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "config.json", "{}");
    write(dir.path(), "model.safetensors.index.json", INDEX);
    write(dir.path(), "m-1.safetensors", shard("a"));
    let error = ModelDir::open(dir.path()).unwrap_err();
    assert!(matches!(&error, FormatError::MissingShard { shard, tensor, .. } if shard == "m-2.safetensors" && tensor == "b"));
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(line(&error).contains("shard \"m-2.safetensors\" is missing"));

    write(dir.path(), "m-2.safetensors", shard("b"));
    let open = ModelDir::open(dir.path()).unwrap();
    assert_eq!(open.tensors().map(|(name, _)| name).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(open.file_bytes(), 2 * shard("a").len() as u64);

    write(dir.path(), "m-2.safetensors", shard("a"));
    let error = ModelDir::open(dir.path()).unwrap_err();
    assert!(line(&error).contains("m-2.safetensors: tensor \"a\": stored twice"), "{error}");

    write(dir.path(), "m-2.safetensors", shard("c"));
    let error = ModelDir::open(dir.path()).unwrap_err();
    assert!(line(&error).contains("tensor \"b\" is not in shard \"m-2.safetensors\""), "{error}");

    for (index, words) in [
        (r#"{"weight_map":{"a":"../m-1.safetensors"}}"#, "not the name of a file"),
        (r#"{"weight_map":{"a":"/etc/passwd"}}"#, "not the name of a file"),
        (r#"{"weight_map":{"a":""}}"#, "not the name of a file"),
        (r#"{"weight_map":{"a":".."}}"#, "not the name of a file"),
        (r#"{"weight_map":{}}"#, "names no tensor"),
        (r#"{"weight_map":{"a":"m-1.safetensors","a":"m-1.safetensors"}}"#, "occurs twice"),
        (r#"{"weight_map":[]}"#, "index.json"),
        ("{}", "index.json"),
    ] {
        write(dir.path(), "model.safetensors.index.json", index);
        let error = ModelDir::open(dir.path()).unwrap_err();
        assert!(line(&error).contains(words), "{index}: {error}");
    }
}

#[test]
fn missing_and_malformed_documents_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = |words: &str, kind| {
        let error = ModelDir::open(dir.path()).unwrap_err();
        assert!(line(&error).contains(words), "{error}");
        assert_eq!(error.kind(), kind);
    };
    error("config.json: cannot open", ErrorKind::Io);
    write(dir.path(), "config.json", "{}");
    error("model.safetensors: cannot open", ErrorKind::Io);
    write(dir.path(), "model.safetensors", shard("a"));
    ModelDir::open(dir.path()).unwrap();
    for bad in ["", "{", "[]", "1", "{\"a\":\u{0}}"] {
        write(dir.path(), "config.json", bad);
        error("config.json", ErrorKind::Corrupt);
    }
    write(dir.path(), "config.json", "[".repeat(1 << 20));
    error("recursion limit", ErrorKind::Corrupt);
    write(dir.path(), "config.json", vec![b' '; (16 << 20) + 1]);
    error("16777217 bytes; the limit is 16777216", ErrorKind::Limit);
    write(dir.path(), "config.json", r#"{"quantization_config":{"quant_method":"tersor","version":2}}"#);
    error("unsupported tersor format version 2", ErrorKind::Unsupported);
    write(dir.path(), "config.json", r#"{"quantization_config":{"quant_method":"tersor"}}"#);
    error("unsupported tersor format version none", ErrorKind::Unsupported);
    write(dir.path(), "config.json", r#"{"quantization_config":{"quant_method":"tersor","version":1}}"#);
    error("0 of 1 tensor files say that their format is tersor", ErrorKind::Corrupt);
    write(dir.path(), "config.json", r#"{"quantization_config":{"quant_method":"gptq"}}"#);
    ModelDir::open(dir.path()).unwrap();
    let error = tersor_format::verify(dir.path(), &mut |_| ()).unwrap_err();
    assert!(line(&error).contains("no checksums to verify"));
}
