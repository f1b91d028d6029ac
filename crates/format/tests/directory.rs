//! Directories of ours: written whole or not at all, and every damage found.

mod common;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Kind, Random, contents, line, tensor, write_tiny};
use serde_json::{Value, json};
use tersor_codec::Codec;
use tersor_format::{DirWriter, Dtype, ErrorKind, FormatError, ModelDir, Tensor, VerifyReport, encode_tensor, verify};
use xxhash_rust::xxh3::xxh3_64;

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn check(dir: &Path) -> Result<VerifyReport, FormatError> {
    verify(dir, &mut |_| ())
}

/// As `fs::write` to an existing file, without truncating it first: ext4 flushes files that are truncated and closed, which
/// takes the thousands of changes below from seconds to a minute.
fn overwrite(path: &Path, bytes: &[u8]) {
    let mut file = fs::File::options().write(true).open(path).unwrap();
    file.write_all(bytes).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
}

/// Makes the manifest agree with the files, as whoever forges a file would.
fn forge_manifest(dir: &Path, file: &str) {
    let path = dir.join("tersor.manifest.json");
    let mut manifest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let bytes = fs::read(dir.join(file)).unwrap();
    manifest["files"][file] = json!({"bytes": bytes.len(), "xxh3": format!("{:016x}", xxh3_64(&bytes))});
    overwrite(&path, manifest.to_string().as_bytes());
}

fn tiny() -> (tempfile::TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("tiny");
    write_tiny(&path, false).unwrap();
    (root, path)
}

#[test]
fn what_was_written_is_read_back() {
    let (root, path) = tiny();
    assert_eq!(names(root.path()), ["tiny"]);
    assert_eq!(names(&path), ["config.json", "model.safetensors", "tersor.manifest.json", "tokenizer.json"]);
    let dir = ModelDir::open(&path).unwrap();
    assert!(dir.is_tersor());
    assert_eq!(dir.path(), path);
    assert_eq!(dir.config()["model_type"], "llama");
    assert_eq!(dir.config()["quantization_config"], json!({"quant_method": "tersor", "version": 1}));
    let found: Vec<_> = dir.tensors().map(|(name, _)| name).collect();
    let layers = ["layers.0.weight", "layers.1.weight", "layers.2.weight", "layers.3.weight"];
    assert_eq!(found, [&layers[..], &["model.norm.weight"]].concat());
    assert_eq!(dir.file_bytes(), fs::metadata(path.join("model.safetensors")).unwrap().len());
    for (name, tensor) in dir.tensors() {
        dir.check(name).unwrap();
        dir.check_scales(name).unwrap();
        assert_eq!(matches!(tensor, Tensor::Coded(_)), name != "model.norm.weight");
        dir.release(name);
    }
    let mut random = Random(7);
    for (name, kind) in layers.into_iter().zip(common::KINDS) {
        let Some(Tensor::Coded(coded)) = dir.tensor(name) else { panic!("coded") };
        let expected = tensor(&mut random, 18, 7, kind);
        assert_eq!(tersor_format::decode_tensor(coded).unwrap(), expected);
        // Blobs start at multiples of 64 of the mapping, so that vector loads of the tables and fields are aligned.
        assert_eq!(coded.blob().as_ptr() as usize % 64, 0);
    }
    let mut seen = Vec::new();
    let report = verify(&path, &mut |p| seen.push((p.item.to_owned(), p.bytes_done, p.bytes_total))).unwrap();
    assert_eq!((report.files, report.coded_tensors, report.raw_tensors), (3, 4, 1));
    assert_eq!((report.chunks, report.symbols), (8, 4 * 2 * 2 * 64));
    assert!(report.unlisted.is_empty());
    assert_eq!(seen.last().unwrap().1, seen.last().unwrap().2, "progress ends at the total");
    assert!(seen.is_sorted_by_key(|s| s.1));
}

#[test]
fn the_same_input_gives_the_same_files() {
    let (_a, a) = tiny();
    let (_b, b) = tiny();
    for name in names(&a) {
        assert!(fs::read(a.join(&name)).unwrap() == fs::read(b.join(&name)).unwrap(), "{name}");
    }
}

#[test]
fn every_flipped_bit_is_detected() {
    let (_root, path) = tiny();
    let model = path.join("model.safetensors");
    let (original, manifest) = (fs::read(&model).unwrap(), fs::read(path.join("tersor.manifest.json")).unwrap());
    let expected = contents(&ModelDir::open(&path).unwrap()).unwrap();
    let mut harmless = 0;
    for at in 0..original.len() {
        for flip in [1 << (at % 8), 0xff] {
            let mut bytes = original.clone();
            bytes[at] ^= flip;
            overwrite(&model, &bytes);
            line(&check(&path).expect_err("the manifest knows the file"));
            // Without the manifest the file's own checks are alone. What they let pass must make no difference.
            forge_manifest(&path, "model.safetensors");
            match check(&path) {
                Ok(_) => {
                    assert_eq!(contents(&ModelDir::open(&path).unwrap()).unwrap(), expected, "byte {at} ^ {flip:#x}");
                    harmless += 1;
                }
                Err(error) => {
                    line(&error);
                }
            }
            overwrite(&path.join("tersor.manifest.json"), &manifest);
        }
    }
    // Only spaces of the header's padding can become other white space.
    let spaces = original.iter().rev().skip_while(|&&b| b != b'}').count();
    assert!(harmless < original.len() - spaces, "{harmless}");
    fs::write(&model, &original).unwrap();
    check(&path).unwrap();
}

#[test]
fn every_flipped_bit_of_the_other_files_is_detected() {
    let (_root, path) = tiny();
    for name in ["config.json", "tokenizer.json", "tersor.manifest.json"] {
        let original = fs::read(path.join(name)).unwrap();
        for at in 0..original.len() {
            for bit in 0..8 {
                let mut bytes = original.clone();
                bytes[at] ^= 1 << bit;
                overwrite(&path.join(name), &bytes);
                match check(&path) {
                    // White space of the manifest is nobody's content.
                    Ok(_) => assert!(name == "tersor.manifest.json" && original[at].is_ascii_whitespace(), "{name} {at}"),
                    Err(error) => drop(line(&error)),
                }
            }
        }
        fs::write(path.join(name), &original).unwrap();
    }
}

#[test]
fn every_other_length_is_refused() {
    let (_root, path) = tiny();
    let model = path.join("model.safetensors");
    let original = fs::read(&model).unwrap();
    for length in 0..original.len() {
        overwrite(&model, &original[..length]);
        line(&ModelDir::open(&path).expect_err("truncated"));
    }
    for extra in [1, 64, 4096] {
        fs::write(&model, [&original[..], &vec![0; extra]].concat()).unwrap();
        line(&ModelDir::open(&path).expect_err("too long"));
    }
}

/// Rewrites the JSON header through `change`, keeping its length a multiple of 64 less 8.
fn change_header(path: &Path, change: impl Fn(&mut Value)) {
    let model = path.join("model.safetensors");
    let file = fs::read(&model).unwrap();
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&file[8..8 + length]).unwrap();
    change(&mut header);
    let mut text = header.to_string();
    while !(8 + text.len()).is_multiple_of(64) {
        text.push(' ');
    }
    fs::write(&model, common::safetensors(&text, &file[8 + length..])).unwrap();
    forge_manifest(path, "model.safetensors");
}

#[test]
fn forged_headers_are_refused() {
    let refused = |words: &str, change: &dyn Fn(&mut Value)| {
        let (_root, path) = tiny();
        change_header(&path, change);
        let text = line(&check(&path).expect_err(words));
        assert!(text.contains(words), "{text}");
        assert!(text.contains("tiny"), "names the file: {text}");
    };
    let (_root, path) = tiny();
    change_header(&path, |_| ());
    check(&path).unwrap();

    const KEY: &str = "xxh3:layers.0.coded";
    let metadata =
        |change: fn(&mut serde_json::Map<String, Value>)| move |header: &mut Value| change(header["__metadata__"].as_object_mut().unwrap());
    refused("no checksum of tensor \"layers.0.coded\"", &metadata(|m| drop(m.remove(KEY))));
    refused("which is not in the file", &metadata(|m| drop(m.insert("xxh3:x".into(), json!("0123456789abcdef")))));
    refused("not 16 lower-case", &metadata(|m| m[KEY] = json!("0123456789abcdeF")));
    refused("not 16 lower-case", &metadata(|m| m[KEY] = json!("+123456789abcdef")));
    refused("checksum of the tensor", &metadata(|m| m[KEY] = json!("0123456789abcdef")));
    refused("0 of 1 tensor files say", &metadata(|m| m["format"] = json!("pt")));
    let rename = |from: &'static str, to: &'static str| {
        move |header: &mut Value| {
            let object = header.as_object_mut().unwrap();
            let tensor = object.remove(from).unwrap();
            object.insert(to.to_owned(), tensor);
            let metadata = object["__metadata__"].as_object_mut().unwrap();
            let checksum = metadata.remove(&format!("xxh3:{from}")).unwrap();
            metadata.insert(format!("xxh3:{to}"), checksum);
        }
    };
    refused("tensor \"layers.0.coded\": layers.0.scales missing", &rename("layers.0.scales", "layers.9.scales"));
    refused("biases missing", &rename("layers.2.biases", "layers.9.biases"));
    refused("tensor \"layers.0.weight\": stored twice", &rename("model.norm.weight", "layers.0.weight"));
    refused("must not exist beside", &rename("model.norm.weight", "layers.0.biases"));
    refused("U8 of one dimension", &|header| {
        let n = header["layers.0.coded"]["shape"][0].as_u64().unwrap();
        header["layers.0.coded"]["shape"] = json!([2, n / 2]);
    });
    refused("U8 of one dimension", &|header| header["layers.0.coded"]["dtype"] = json!("I8"));
    refused("scales is BF16 [18], F16 [18] was expected", &|h| h["layers.1.scales"]["dtype"] = json!("BF16"));

    // One more space in the header moves every blob off its boundary.
    let model = path.join("model.safetensors");
    let mut file = fs::read(&model).unwrap();
    let length = u64::from_le_bytes(file[..8].try_into().unwrap());
    file[..8].copy_from_slice(&(length + 1).to_le_bytes());
    file.insert(8 + length as usize, b' ');
    fs::write(&model, file).unwrap();
    let text = line(&ModelDir::open(&path).unwrap_err());
    assert!(text.contains("not at a multiple of 64"), "{text}");
}

#[test]
fn forged_contents_are_refused_by_verify() {
    /// Changes bytes of a stored tensor and forges every checksum above it.
    fn change_data(path: &Path, name: &str, change: impl Fn(&mut [u8])) {
        let model = path.join("model.safetensors");
        let mut file = fs::read(&model).unwrap();
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&file[8..8 + length]).unwrap();
        let offset = |i: usize| 8 + length + header[name]["data_offsets"][i].as_u64().unwrap() as usize;
        let data = &mut file[offset(0)..offset(1)];
        change(data);
        let checksum = format!("{:016x}", xxh3_64(data));
        fs::write(&model, &file).unwrap();
        change_header(path, |header| header["__metadata__"][format!("xxh3:{name}")] = json!(checksum));
    }
    fn forge_side(blob: &mut [u8]) {
        let u32_at = |at: usize| u32::from_le_bytes(blob[at..at + 4].try_into().unwrap()) as usize;
        let side = [&blob[..56], &blob[64..64 + u32_at(36) + 8 * u32_at(32)]].concat();
        blob[56..64].copy_from_slice(&xxh3_64(&side).to_le_bytes());
    }
    let refused = |name: &str, words: &str, change: &dyn Fn(&mut [u8])| {
        let (_root, path) = tiny();
        change_data(&path, name, change);
        let text = line(&check(&path).expect_err(words));
        assert!(text.contains(words) && text.contains("layers."), "{text}");
    };
    refused("layers.1.scales", "scale 1 is not finite", &|b| b[2..4].copy_from_slice(&[0, 0x7c]));
    refused("layers.2.biases", "bias 0 is not finite", &|b| b[..2].copy_from_slice(&[0xc0, 0x7f]));
    refused("layers.1.coded", "is not zero", &|b| b[b.len() - 1] = 1);
    refused("layers.1.coded", "checksum of chunk 0", &|b| {
        let first_chunk = (64 + usize::from(b[36]) + 8 * usize::from(b[32])).next_multiple_of(16);
        b[first_chunk] ^= 1;
    });
    refused("layers.1.coded", "header says symbol_max", &|b| {
        b[53] += 1;
        forge_side(b);
    });
    refused("layers.1.coded", "header says wide_count", &|b| {
        b[48] += 1;
        forge_side(b);
    });
    // A smaller tensor with the same tiles: what were weights is padding now, and not zero.
    refused("layers.2.coded", "padding symbol at row", &|b| {
        b[12] = 5;
        forge_side(b);
    });
}

#[test]
fn the_manifest_must_fit_the_directory() {
    let refused = |words: &str, change: &dyn Fn(&Path)| {
        let (_root, path) = tiny();
        change(&path);
        let error = check(&path).expect_err(words);
        assert!(line(&error).contains(words), "{error}");
    };
    let edit = |change: fn(&mut Value)| {
        move |path: &Path| {
            let path = path.join("tersor.manifest.json");
            let mut manifest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            change(&mut manifest);
            fs::write(path, manifest.to_string()).unwrap();
        }
    };
    refused("tersor.manifest.json: cannot open", &|p| fs::remove_file(p.join("tersor.manifest.json")).unwrap());
    refused("tokenizer.json: cannot read", &|p| fs::remove_file(p.join("tokenizer.json")).unwrap());
    refused("tokenizer.json: 2 bytes, the manifest says 3", &|p| fs::write(p.join("tokenizer.json"), "{}").unwrap());
    refused("tokenizer.json: checksum differs", &|p| fs::write(p.join("tokenizer.json"), "[]\n").unwrap());
    refused("version 2", &edit(|m| m["version"] = json!(2)));
    refused("not the name of a file", &edit(|m| m["files"]["../x"] = json!({"bytes": 0, "xxh3": "0000000000000000"})));
    refused("not 16 lower-case", &edit(|m| m["files"]["x"] = json!({"bytes": 0, "xxh3": "0"})));
    refused(
        "model.safetensors: not in the manifest",
        &edit(|m| {
            m["files"].as_object_mut().unwrap().remove("model.safetensors");
        }),
    );
    refused(
        "config.json: not in the manifest",
        &edit(|m| {
            m["files"].as_object_mut().unwrap().remove("config.json");
        }),
    );
    let (_root, path) = tiny();
    fs::write(path.join("README.md"), "mine").unwrap();
    assert_eq!(check(&path).unwrap().unlisted, ["README.md"]);
}

#[test]
fn an_existing_directory_stays_unless_forced() {
    let (root, path) = tiny();
    let error = write_tiny(&path, false).unwrap_err();
    assert!(line(&error).contains("already exists"));
    assert_eq!(error.kind(), ErrorKind::Limit);
    fs::write(path.join("old"), "").unwrap();
    write_tiny(&path, true).unwrap();
    assert!(!path.join("old").exists(), "replaced, not merged");
    assert_eq!(names(root.path()), ["tiny"]);
    check(&path).unwrap();

    // What is no model directory is not ours to remove.
    let home = root.path().join("home");
    fs::create_dir(&home).unwrap();
    write_tiny(&home, true).unwrap();
    check(&home).unwrap();
    let photos = root.path().join("photos");
    fs::create_dir(&photos).unwrap();
    fs::write(photos.join("cat.jpg"), "cat").unwrap();
    assert!(line(&write_tiny(&photos, true).unwrap_err()).contains("refusing to replace"));
    assert!(line(&write_tiny(&photos.join("cat.jpg"), true).unwrap_err()).contains("not a directory"));
    assert!(line(&write_tiny(&root.path().join("no/parent"), true).unwrap_err()).contains("cannot create"));
    assert_eq!(names(root.path()), ["home", "photos", "tiny"]);
}

#[test]
fn a_destination_that_appears_meanwhile_is_not_overwritten() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("model");
    let writer = DirWriter::create(&path, false).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(line(&writer.finish(json!({})).unwrap_err()).contains("already exists"));
    assert_eq!((names(root.path()), names(&path).len()), (vec!["model".to_owned()], 0));
}

#[cfg(unix)]
#[test]
fn a_link_to_the_destination_survives() {
    let (root, path) = tiny();
    let link = root.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    write_tiny(&link, true).unwrap();
    assert!(link.is_symlink());
    check(&path).unwrap();
}

#[test]
fn errors_and_drops_leave_nothing_behind() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("model");
    let mut writer = DirWriter::create(&path, false).unwrap();
    let temp = format!(".model.tersor-tmp-{}", std::process::id());
    assert_eq!(writer.temp_path(), root.path().join(&temp));
    assert!(line(&DirWriter::create(&path, false).unwrap_err()).contains("cannot create"), "one writer at a time");
    assert_eq!(names(root.path()), [temp.as_str()], "the second writer removed nothing of the first's");

    writer.write_raw("a", Dtype::U8, &[1], &[1]).unwrap();
    for (result, words) in [
        (writer.write_raw("a", Dtype::U8, &[1], &[1]), "written twice"),
        (writer.write_raw("b", Dtype::U8, &[2], &[1]), "is not 1 bytes"),
        (writer.write_raw("b", Dtype::U8, &[usize::MAX, 2], &[1]), "is not 1 bytes"),
        (writer.write_raw("b.coded", Dtype::U8, &[1], &[1]), "reserved"),
        (writer.write_file("config.json", b""), "reserved"),
        (writer.write_file("../x", b""), "not the name of a file"),
        (writer.copy_file(root.path().join("absent.json")), "cannot open"),
    ] {
        assert!(line(&result.unwrap_err()).contains(words), "{words}");
    }
    assert!(line(&writer.finish(json!({})).unwrap_err()).contains("an earlier write failed"));
    assert!(names(root.path()).is_empty());

    let writer = DirWriter::create(&path, false).unwrap();
    assert!(line(&writer.finish(json!([])).unwrap_err()).contains("not a JSON object"));
    assert!(names(root.path()).is_empty());
    drop(DirWriter::create(&path, false).unwrap());
    assert!(names(root.path()).is_empty());
}

#[test]
fn a_failed_replacement_keeps_the_old_directory() {
    let (root, path) = tiny();
    let before = contents(&ModelDir::open(&path).unwrap()).unwrap();
    let mut writer = DirWriter::create(&path, true).unwrap();
    writer.write_raw("a", Dtype::U8, &[1], &[1]).unwrap();
    // As if somebody had cleaned up while we write.
    fs::remove_dir_all(writer.temp_path()).unwrap();
    let error = writer.finish(json!({})).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    line(&error);
    assert_eq!(names(root.path()), ["tiny"]);
    assert_eq!(contents(&ModelDir::open(&path).unwrap()).unwrap(), before);
}

/// A full disk, played by a limit on file sizes: this test runs itself again under `ulimit -f`.
#[cfg(unix)]
#[test]
fn a_full_disk_gives_one_error_and_leaves_nothing() {
    const TARGET: &str = "TERSOR_TEST_FULL_DISK_TARGET";
    if let Some(path) = std::env::var_os(TARGET) {
        let write = || {
            let mut writer = DirWriter::create(&path, true)?;
            writer.write_raw("small", Dtype::U8, &[10], &[1; 10])?;
            writer.write_raw("large", Dtype::U8, &[100_000], &[1; 100_000])?;
            writer.finish(json!({}))
        };
        let error = write().expect_err("more than ulimit allows");
        assert_eq!(error.kind(), ErrorKind::Io);
        println!("error: {}", line(&error));
        return;
    }
    let (root, path) = tiny();
    let output = Command::new("sh")
        // In units of 512 bytes or 1 KiB; the signal must be ignored for the error to reach the program.
        .args(["-c", "trap '' XFSZ; ulimit -f 16; exec \"$0\" \"$@\""])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "a_full_disk_gives_one_error_and_leaves_nothing", "--nocapture"])
        .env(TARGET, &path)
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{stdout}{}", String::from_utf8_lossy(&output.stderr));
    assert!(stdout.contains("error: ") && stdout.contains("cannot write"), "{stdout}");
    assert_eq!(names(root.path()), ["tiny"]);
    check(&path).unwrap();
}

#[test]
fn the_header_grows_when_more_was_written_than_announced() {
    let root = tempfile::tempdir().unwrap();
    let mut random = Random(11);
    let tensors: Vec<_> = (0..40).map(|_| tensor(&mut random, 16, 8, Kind::Row)).collect();
    let write = |name: &str, announce: bool| {
        let path = root.path().join(name);
        let mut writer = DirWriter::create(&path, false).unwrap();
        let name = |i: usize| format!("model.layers.{i}.mlp.down_proj.weight");
        if announce {
            (0..tensors.len()).for_each(|i| writer.expect_coded(&name(i), false));
        }
        for (i, tensor) in tensors.iter().enumerate() {
            writer.write_coded(&name(i), &encode_tensor(tensor, Codec::default(), 64).unwrap()).unwrap();
        }
        writer.finish(json!({})).unwrap();
        check(&path).unwrap();
        assert_eq!(names(&path), ["config.json", "model.safetensors", "tersor.manifest.json"]);
        let dir = ModelDir::open(&path).unwrap();
        let file = fs::read(path.join("model.safetensors")).unwrap();
        (contents(&dir).unwrap(), u64::from_le_bytes(file[..8].try_into().unwrap()))
    };
    let (announced, header_announced) = write("announced", true);
    let (grown, header_grown) = write("grown", false);
    assert_eq!(announced, grown);
    assert!(header_grown > 4096, "the default room was too small: {header_grown}");
    assert!(header_announced < header_grown * 3 / 2, "{header_announced} announced, {header_grown} needed");
}

#[test]
fn raw_tensors_are_aligned_and_files_copied() {
    let root = tempfile::tempdir().unwrap();
    fs::write(root.path().join("tokenizer.json"), "tokens").unwrap();
    let path = root.path().join("model");
    let mut writer = DirWriter::create(&path, false).unwrap();
    writer.write_raw("bytes", Dtype::U8, &[3], &[1, 2, 3]).unwrap();
    writer.write_raw("halves", Dtype::F16, &[3], &[0; 6]).unwrap();
    writer.write_raw("floats", Dtype::F32, &[2], &[0; 8]).unwrap();
    writer.write_raw("empty", Dtype::F32, &[0], &[]).unwrap();
    writer.copy_file(root.path().join("tokenizer.json")).unwrap();
    let config = json!({"z": 1, "a": 2, "quantization_config": {"quant_method": "tersor", "scheme": "ecsq"}});
    writer.finish(config).unwrap();
    assert_eq!(check(&path).unwrap().files, 3);
    assert_eq!(fs::read(path.join("tokenizer.json")).unwrap(), b"tokens");
    let dir = ModelDir::open(&path).unwrap();
    let expected = json!({"quant_method": "tersor", "scheme": "ecsq", "version": 1});
    assert_eq!(dir.config()["quantization_config"], expected);
    for (name, align) in [("halves", 2), ("floats", 4)] {
        let Some(Tensor::Raw(raw)) = dir.tensor(name) else { panic!("raw") };
        assert_eq!(raw.bytes().as_ptr() as usize % align, 0, "{name}");
    }
    let Some(Tensor::Raw(raw)) = dir.tensor("bytes") else { panic!("raw") };
    assert_eq!(raw.bytes()[..], [1, 2, 3]);
}

#[test]
fn a_damaged_raw_tensor_is_found_before_use() {
    let (_root, path) = tiny();
    let model = path.join("model.safetensors");
    let mut file = fs::read(&model).unwrap();
    *file.last_mut().unwrap() ^= 1; // the last scale of some tensor, or the norm: small dtypes come last
    fs::write(&model, file).unwrap();
    let dir = ModelDir::open(&path).unwrap();
    let damaged: Vec<_> = dir.tensors().filter(|(name, _)| dir.check(name).is_err()).map(|(name, _)| name).collect();
    assert_eq!(damaged, ["layers.3.weight"]);
    let error = dir.check_scales("layers.3.weight").unwrap_err();
    assert!(line(&error).contains("tensor \"layers.3.scales\": checksum of the tensor does not match"), "{error}");
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 300, ..Default::default() })]

    /// Any damage to the file, headers included: an error of one line, or tensors that can all be read.
    #[test]
    fn damaged_files_never_panic(
        edits in proptest::collection::vec(
            (proptest::prelude::any::<proptest::sample::Index>(), 0usize..9, proptest::collection::vec(0u8..=255, 0..9)), 1..4),
        in_header in proptest::prelude::any::<bool>(),
    ) {
        // One directory for all cases: writing one syncs the disk.
        static TINY: std::sync::OnceLock<(tempfile::TempDir, PathBuf, Vec<u8>)> = std::sync::OnceLock::new();
        let (_, path, original) = TINY.get_or_init(|| {
            let (root, path) = tiny();
            let original = fs::read(path.join("model.safetensors")).unwrap();
            (root, path, original)
        });
        let (model, mut file) = (path.join("model.safetensors"), original.clone());
        let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        for (at, removed, inserted) in edits {
            let at = at.index(if in_header { header } else { file.len() }).min(file.len());
            let end = (at + removed).min(file.len());
            file.splice(at..end, inserted);
        }
        overwrite(&model, &file);
        forge_manifest(path, "model.safetensors");
        if let Err(error) = check(path) {
            line(&error);
        }
        if let Err(error) = ModelDir::open(path).and_then(|dir| contents(&dir)) {
            line(&error);
        }
    }
}

/// What was announced fits without a copy even where numbers are long, and little room is wasted.
#[test]
fn the_announced_room_fits() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("model");
    let encoded = encode_tensor(&tensor(&mut Random(1), 160, 400, Kind::Affine(32)), Codec::default(), 4096).unwrap();
    let mut writer = DirWriter::create(&path, false).unwrap();
    let names: Vec<_> = (0..50).map(|i| format!("model.layers.{i}.mlp.\"ü\".weight")).collect();
    names.iter().for_each(|name| writer.expect_coded(name, true));
    for name in &names {
        writer.write_coded(name, &encoded).unwrap();
    }
    writer.finish(json!({})).unwrap();
    check(&path).unwrap();
    let file = fs::read(path.join("model.safetensors")).unwrap();
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let spaces = file[8..8 + length].iter().rev().take_while(|&&b| b == b' ').count();
    assert!((64..length / 5).contains(&spaces), "{spaces} of {length}: 64 or more shows that the file was not copied");
}
