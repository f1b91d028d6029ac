//! The way back to the very files that were encoded: `tersor.original.safetensors` keeps of the original directory what its tensors do not
//! say.
//!
//! A tensor file is its head (length field and JSON header, with whatever order, metadata and padding its writer chose) and the tensors' data
//! in the order that the header names. The data are in our tensors; so the heads, the configuration and the index are all that must be kept,
//! with a checksum of every whole file.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use xxhash_rust::xxh3::Xxh3;

use crate::bytes::Bytes;
use crate::dir::{BIASES, CHECKSUM_PREFIX, CONFIG_FILE, INDEX_FILE, ModelDir, SCALES, WEIGHT, format_checksum, parse_checksum};
use crate::error::{FileError, FormatError};
use crate::import_mlx::to_mlx;
use crate::limits;
use crate::manifest::{FileSum, MANIFEST_FILE, Manifest};
use crate::safetensors::{Entry, Header, LENGTH_BYTES};
use crate::tensor::{Dtype, Tensor};
use crate::writer::{Staging, create_new, sync};

/// Name of the record.
pub(crate) const ORIGINAL_FILE: &str = "tersor.original.safetensors";
/// `format` in the record's metadata.
const RECORD_FORMAT: &str = "tersor-original";
/// A part of the record with such a name is the head of a tensor file; others are whole files.
const TENSOR_FILE_ENDING: &str = ".safetensors";
/// Files with weights in other containers: never copied.
const OTHER_WEIGHTS: [&str; 10] = ["safetensors", "bin", "gguf", "pth", "pt", "npz", "onnx", "h5", "msgpack", "ot"];

/// What [`restore_original`] is doing; passed to its callback.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RestoreProgress<'a> {
    /// File or tensor at hand.
    pub item: &'a str,
    /// Bytes written.
    pub bytes_done: u64,
    /// Bytes of all files.
    pub bytes_total: u64,
    /// The directory that is being written, under its temporary name.
    pub temporary: &'a Path,
}

/// What [`restore_original`] wrote.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct RestoreReport {
    /// Files written, each compared with its checksum.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
}

/// The record of `dir`, a directory that is about to be encoded.
pub(crate) fn record(dir: &ModelDir) -> Result<Vec<u8>, FormatError> {
    let mut header: BTreeMap<String, Value> = BTreeMap::new();
    let mut metadata = BTreeMap::from([("format".to_owned(), RECORD_FORMAT.to_owned())]);
    let mut data = Vec::new();
    let index = dir.path().join(INDEX_FILE).is_file().then_some(INDEX_FILE);
    for name in dir.files().chain(index) {
        let path = dir.path().join(name);
        let start = data.len();
        read_part(&path, name.ends_with(TENSOR_FILE_ENDING), &mut data)?;
        let entry = json!({"dtype": Dtype::U8.name(), "shape": [data.len() - start], "data_offsets": [start, data.len()]});
        header.insert(name.to_owned(), entry);
        let sum = FileSum::of(&path, |_| ())?;
        metadata.insert(format!("{CHECKSUM_PREFIX}{name}"), format_checksum(sum.xxh3));
    }
    header.insert(crate::safetensors::METADATA_KEY.to_owned(), json!(metadata));
    let json = json!(header).to_string();
    let mut record = (json.len() as u64).to_le_bytes().to_vec();
    record.extend_from_slice(json.as_bytes());
    record.extend_from_slice(&data);
    Ok(record)
}

/// Appends a file, or the head of a tensor file, to `out`. Both are small: [`ModelDir::open`] was within the limits, and so are they.
fn read_part(path: &Path, is_tensor_file: bool, out: &mut Vec<u8>) -> Result<(), FormatError> {
    let io = |e| FormatError::io("read", path, e);
    let mut file = File::open(path).map_err(|e| FormatError::io("open", path, e))?;
    let mut bytes = limits::JSON_BYTES_MAX;
    if is_tensor_file {
        let mut length = [0; LENGTH_BYTES];
        file.read_exact(&mut length).map_err(io)?;
        out.extend_from_slice(&length);
        bytes = u64::from_le_bytes(length).min(limits::HEADER_BYTES_MAX);
    }
    file.take(bytes).read_to_end(out).map_err(io)?;
    Ok(())
}

/// The files beside the tensors and the configuration: tokenizer, licence, README. Files whose names begin with a dot are not among them, nor
/// are weights in other containers.
pub(crate) fn companions(dir: &ModelDir) -> Result<Vec<PathBuf>, FormatError> {
    let entries = fs::read_dir(dir.path()).map_err(|e| FormatError::io("read", dir.path(), e))?;
    let is_companion = |path: &PathBuf| {
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return false };
        let is_weights = path.extension().and_then(|e| e.to_str()).is_some_and(|e| OTHER_WEIGHTS.contains(&e));
        path.is_file() && !is_weights && !name.starts_with('.') && ![CONFIG_FILE, INDEX_FILE, MANIFEST_FILE].contains(&name)
    };
    let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(is_companion).collect();
    files.sort();
    Ok(files)
}

/// A file of the original directory.
struct OriginalFile {
    name: String,
    /// The whole file, or the head of a tensor file.
    bytes: Bytes,
    xxh3: u64,
    /// Tensors in the order of their data; empty for other files.
    entries: Vec<Entry>,
}

impl OriginalFile {
    fn total_bytes(&self) -> u64 {
        self.entries.last().map_or(self.bytes.len(), |last| last.range.end) as u64
    }
}

/// Reads the record of a directory.
fn read(dir: &ModelDir) -> Result<Vec<OriginalFile>, FormatError> {
    let path = dir.path().join(ORIGINAL_FILE);
    if !path.is_file() {
        let message = "keeps no record of original files; only what `tersor encode` wrote can be turned back into the same files";
        return Err(FormatError::Usage { path: dir.path().to_owned(), message: message.to_owned() });
    }
    let file = File::open(&path).map_err(|e| FormatError::io("open", &path, e))?;
    let bytes = Bytes::map(&file).map_err(|e| FormatError::io("map", &path, e))?;
    let refuse = |message: String| FormatError::file(&path, FileError::Metadata { message });
    let Header { entries, metadata } = Header::parse(&bytes).map_err(|cause| FormatError::file(&path, cause))?;
    if metadata.get("format").is_none_or(|format| format != RECORD_FORMAT) {
        return Err(refuse(format!("the format is not {RECORD_FORMAT}")));
    }
    let mut files = Vec::new();
    for Entry { name, range, .. } in entries {
        if Path::new(&name).file_name().is_none_or(|file_name| file_name != name.as_str()) {
            return Err(refuse(format!("{name:?} is not the name of a file in a directory")));
        }
        let checksum = metadata.get(&format!("{CHECKSUM_PREFIX}{name}")).and_then(|text| parse_checksum(text));
        let xxh3 = checksum.ok_or_else(|| refuse(format!("no checksum of {name:?}")))?;
        let bytes = bytes.slice(range).expect("Header::parse checks ranges against the file");
        let entries = match name.ends_with(TENSOR_FILE_ENDING) {
            true => Header::parse_head(&bytes).map_err(|cause| FormatError::file(&path, cause))?.entries,
            false => Vec::new(),
        };
        files.push(OriginalFile { name, bytes, xxh3, entries });
    }
    Ok(files)
}

/// Writes the files from which `dir` was encoded, byte for byte: tensor files from the record and the decoded tensors, all others as they were
/// copied. Every file is compared with its checksum, and the directory appears under its name only when all are right.
///
/// # Errors
/// A directory without a record, a file that does not come out as it was, a destination as [`DirWriter`](crate::DirWriter) refuses it, or
/// [`FormatError::Stopped`] when `progress` says so.
pub fn restore_original(
    dir: &ModelDir,
    output: impl AsRef<Path>,
    force: bool,
    progress: &mut dyn FnMut(RestoreProgress<'_>) -> ControlFlow<()>,
) -> Result<RestoreReport, FormatError> {
    let originals = read(dir)?;
    let manifest = Manifest::read(dir.path())?;
    let ours: Vec<&str> = dir.files().chain([ORIGINAL_FILE]).collect();
    let copied = manifest.files.iter().filter(|(name, _)| !ours.contains(&name.as_str()));
    let bytes_total = originals.iter().map(OriginalFile::total_bytes).chain(copied.clone().map(|(_, sum)| sum.bytes)).sum();
    let staging = Staging::create(output.as_ref(), force)?;
    let mut report = RestoreReport::default();
    let mut step = |item: &str, bytes_done| match progress(RestoreProgress { item, bytes_done, bytes_total, temporary: staging.path() }) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(FormatError::Stopped { path: output.as_ref().to_owned() }),
    };
    for original in &originals {
        let path = staging.path().join(&original.name);
        let mut file = Sink::create(&path)?;
        file.write(&original.bytes)?;
        for entry in &original.entries {
            step(&entry.name, report.bytes + file.bytes)?;
            write_tensor(dir, entry, &mut file)?;
            dir.release(&entry.name);
        }
        report.bytes += file.bytes;
        report.files += 1;
        file.finish(original.xxh3)?;
    }
    for (name, sum) in copied {
        step(name, report.bytes)?;
        let (from, to) = (dir.path().join(name), staging.path().join(name));
        fs::copy(&from, &to).map_err(|e| FormatError::io("copy", &from, e))?;
        if FileSum::of(&to, |_| ())? != *sum {
            return Err(FormatError::Manifest { path: from, message: "differs from the manifest".to_owned() });
        }
        report.bytes += sum.bytes;
        report.files += 1;
    }
    staging.install()?;
    Ok(report)
}

/// Writes the data of one tensor of an original tensor file.
fn write_tensor(dir: &ModelDir, entry: &Entry, file: &mut Sink<'_>) -> Result<(), FormatError> {
    let in_tensor = |cause| FormatError::Tensor { place: dir.place(&entry.name), cause };
    let coded_of = |ending| {
        let stem = entry.name.strip_suffix(ending)?;
        match dir.tensor(&format!("{stem}{WEIGHT}")) {
            Some(Tensor::Coded(coded)) => Some(coded),
            _ => None,
        }
    };
    let raw = if let Some(coded) = coded_of(WEIGHT) {
        to_mlx(coded).map_err(in_tensor)?.words
    } else if let Some(coded) = coded_of(SCALES) {
        coded.scales().raw().clone()
    } else if let Some(biases) = coded_of(BIASES).and_then(|coded| coded.scales().raw_biases()) {
        biases.clone()
    } else if let Tensor::Raw(raw) = dir.require(&entry.name)? {
        raw.clone()
    } else {
        // Found by its name, so a coded tensor without that ending, which `ModelDir` never makes.
        return Err(FormatError::NoTensor { path: dir.path().to_owned(), name: entry.name.clone() });
    };
    if raw.bytes().len() != entry.range.len() {
        let message = format!("tensor {:?} has {} bytes, the original had {}", entry.name, raw.bytes().len(), entry.range.len());
        return Err(FormatError::Manifest { path: dir.path().to_owned(), message });
    }
    file.write(raw.bytes())
}

/// A new file, hashed while it is written.
struct Sink<'a> {
    path: &'a Path,
    file: File,
    hash: Xxh3,
    bytes: u64,
}

impl<'a> Sink<'a> {
    fn create(path: &'a Path) -> Result<Self, FormatError> {
        Ok(Self { path, file: create_new(path)?, hash: Xxh3::new(), bytes: 0 })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), FormatError> {
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes).map_err(|e| FormatError::io("write", self.path, e))
    }

    fn finish(self, xxh3: u64) -> Result<(), FormatError> {
        if self.hash.digest() != xxh3 {
            let message = "does not come out as the original was".to_owned();
            return Err(FormatError::Manifest { path: self.path.to_owned(), message });
        }
        sync(&self.file, self.path)
    }
}
