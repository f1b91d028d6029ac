//! Opening model directories.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

use crate::bytes::Bytes;
use crate::error::{FileError, FormatError, Place, TensorError};
use crate::header::BLOB_ALIGN;
use crate::limits;
use crate::safetensors::{Entry, Header, UniqueMap, one_line};
use crate::tensor::{CodedTensor, Dtype, RawTensor, Tensor};

/// The model's configuration.
pub(crate) const CONFIG_FILE: &str = "config.json";
/// The tensors of a directory that is not sharded.
pub const MODEL_FILE: &str = "model.safetensors";
/// Which shard holds which tensor.
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";
/// Value of `format` in a file's metadata, and of `quant_method` in the configuration.
pub(crate) const FORMAT_NAME: &str = "tersor";
/// Version of the directory, in the configuration.
pub(crate) const FORMAT_VERSION: u64 = 1;
/// Key of the configuration's section about quantization.
pub(crate) const QUANTIZATION_KEY: &str = "quantization_config";
/// A file's metadata hold the checksum of tensor X under this prefix and X.
pub(crate) const CHECKSUM_PREFIX: &str = "xxh3:";
/// Endings of the model's name of a coded tensor and of the tensors that store it.
pub(crate) const WEIGHT: &str = ".weight";
pub(crate) const CODED: &str = ".coded";
pub(crate) const SCALES: &str = ".scales";
pub(crate) const BIASES: &str = ".biases";

/// An open model directory: ours, or a plain Hugging Face one. Opening maps the files and checks their headers; weights
/// are read when they are touched.
///
/// Tensors keep the mapping of their file alive, so that clones of them outlive the directory.
#[derive(Debug)]
pub struct ModelDir {
    path: PathBuf,
    config: Value,
    is_tersor: bool,
    file_bytes: u64,
    tensors: BTreeMap<String, Item>,
}

/// A tensor under the model's name, with the stored tensors that it consists of.
#[derive(Debug)]
struct Item {
    tensor: Tensor,
    parts: Vec<Part>,
}

/// A tensor as it is stored.
#[derive(Debug)]
struct Part {
    name: String,
    file: PathBuf,
    raw: RawTensor,
    /// xxh3-64 from the file's metadata; plain directories have none.
    checksum: Option<u64>,
}

impl Part {
    fn place(&self) -> Place {
        Place::tensor(&self.file, &self.name)
    }
}

impl ModelDir {
    /// Opens a directory with `config.json` and either `model.safetensors` or shards listed in
    /// `model.safetensors.index.json`.
    ///
    /// The files must not be modified while the directory or one of its tensors is in use (replacing them by renaming
    /// is fine).
    ///
    /// # Errors
    /// Missing or malformed files, unknown versions, anything that contradicts FORMAT.md.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, FormatError> {
        let path = path.as_ref();
        let config_path = path.join(CONFIG_FILE);
        let config: Value = parse_json(&config_path, &read_json(&config_path)?)?;
        if !config.is_object() {
            return Err(FormatError::Json { path: config_path, message: "not a JSON object".to_owned() });
        }
        let says_tersor = check_version(&config_path, &config)?;

        let model_path = path.join(MODEL_FILE);
        let index_path = path.join(INDEX_FILE);
        let mut stored = Stored::default();
        if !model_path.exists() && index_path.exists() {
            open_shards(path, &index_path, &mut stored)?;
        } else {
            let file = File::open(&model_path).map_err(|e| FormatError::io("open", &model_path, e))?;
            stored.add_file(&model_path, &file)?;
        }

        let is_tersor = stored.tersor_files > 0;
        if is_tersor != says_tersor || (is_tersor && stored.tersor_files != stored.files) {
            let message = format!(
                "{} of {} tensor files say that their format is {FORMAT_NAME}, and {CONFIG_FILE} says that it is{}",
                stored.tersor_files,
                stored.files,
                if says_tersor { "" } else { " not" },
            );
            return Err(FormatError::Mixed { path: path.to_owned(), message });
        }
        let file_bytes = stored.file_bytes;
        let tensors = if is_tersor { stored.coded_items()? } else { BTreeMap::new() };
        let tensors = stored.raw_items(tensors)?;
        Ok(Self { path: path.to_owned(), config, is_tersor, file_bytes, tensors })
    }

    /// The directory as given to [`open`](Self::open).
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Contents of `config.json`: always an object.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Whether this directory was written by [`DirWriter`](crate::DirWriter) (a plain one holds raw tensors only).
    pub fn is_tersor(&self) -> bool {
        self.is_tersor
    }

    /// The tensor that the model calls `name`; a coded one is found as `X.weight` though stored as `X.coded`.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        Some(&self.tensors.get(name)?.tensor)
    }

    /// As [`tensor`](Self::tensor), with an error that names directory and tensor.
    ///
    /// # Errors
    /// There is no such tensor.
    pub fn require(&self, name: &str) -> Result<&Tensor, FormatError> {
        Ok(&self.item(name)?.tensor)
    }

    /// All tensors by the model's names, ascending.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, item)| (name.as_str(), &item.tensor))
    }

    /// File and stored name of a tensor, for messages about it.
    pub fn place(&self, name: &str) -> Place {
        match self.tensors.get(name) {
            Some(item) => item.parts[0].place(),
            None => Place::tensor(&self.path, name),
        }
    }

    /// Tells the system that the bytes of `name` are needed soon (madvise WILLNEED). Unknown names are ignored, and so are failures.
    pub fn fetch(&self, name: &str) {
        if let Some(item) = self.tensors.get(name) {
            for part in &item.parts {
                let _ = part.raw.bytes().fetch();
            }
        }
    }

    /// Tells the system that the bytes of `name` are not needed for now (madvise DONTNEED), so that they stop counting as
    /// resident; they stay valid. Unknown names are ignored, and so are failures: nothing depends on the advice.
    pub fn release(&self, name: &str) {
        if let Some(item) = self.tensors.get(name) {
            for part in &item.parts {
                let _ = part.raw.bytes().release();
            }
        }
    }

    /// Compares the checksums of `name` (for a coded tensor: blob, scales and biases) with those in the file's metadata.
    /// Reads all bytes of the tensor. Tensors of plain directories have no checksums and pass.
    ///
    /// # Errors
    /// A mismatch, or no such tensor.
    pub fn check(&self, name: &str) -> Result<(), FormatError> {
        self.item(name)?.parts.iter().try_for_each(check_part)
    }

    /// As [`check`](Self::check), for the scales and biases of a coded tensor alone: the small part that is read while
    /// loading, when chunks are checked by their own checksums as they are decoded.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn check_scales(&self, name: &str) -> Result<(), FormatError> {
        self.item(name)?.parts[1..].iter().try_for_each(check_part)
    }

    /// Names of the files that [`verify`](crate::verify) must find in the manifest.
    pub(crate) fn files(&self) -> impl Iterator<Item = &str> {
        let parts = self.tensors.values().flat_map(|item| &item.parts);
        let files: BTreeSet<&str> = parts.filter_map(|part| part.file.file_name()?.to_str()).collect();
        files.into_iter().chain([CONFIG_FILE])
    }

    /// Bytes of all tensor files.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    fn item(&self, name: &str) -> Result<&Item, FormatError> {
        let missing = || FormatError::NoTensor { path: self.path.clone(), name: name.to_owned() };
        self.tensors.get(name).ok_or_else(missing)
    }
}

fn check_part(part: &Part) -> Result<(), FormatError> {
    match part.checksum {
        Some(stored) if xxh3_64(part.raw.bytes()) != stored => {
            Err(FormatError::Tensor { place: part.place(), cause: TensorError::Checksum { part: "tensor" } })
        }
        _ => Ok(()),
    }
}

/// Whether the configuration says that the directory is ours; refuses versions other than ours.
fn check_version(path: &Path, config: &Value) -> Result<bool, FormatError> {
    let Some(quantization) = config.get(QUANTIZATION_KEY) else {
        return Ok(false);
    };
    if quantization.get("quant_method").and_then(Value::as_str) != Some(FORMAT_NAME) {
        return Ok(false);
    }
    match quantization.get("version") {
        Some(version) if version.as_u64() == Some(FORMAT_VERSION) => Ok(true),
        found => {
            let found = found.map_or("none".to_owned(), Value::to_string);
            Err(FormatError::Version { path: path.to_owned(), found, known: FORMAT_VERSION })
        }
    }
}

/// Opens every shard that the index names.
fn open_shards(dir: &Path, index_path: &Path, stored: &mut Stored) -> Result<(), FormatError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: UniqueMap<String>,
    }
    let Index { weight_map: UniqueMap(weight_map) } = parse_json(index_path, &read_json(index_path)?)?;
    let bad_index = |message| FormatError::Json { path: index_path.to_owned(), message };
    // The first tensor of each shard, for the message when the shard is missing.
    let mut shards: BTreeMap<&str, &str> = BTreeMap::new();
    for (tensor, shard) in &weight_map {
        shards.entry(shard).or_insert(tensor);
    }
    if shards.is_empty() {
        return Err(bad_index("the index names no tensor".to_owned()));
    }
    for (&shard, &tensor) in &shards {
        if Path::new(shard).file_name().is_none_or(|name| name != shard) {
            return Err(bad_index(format!("shard {shard:?} is not the name of a file in the directory")));
        }
        let path = dir.join(shard);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let (shard, tensor) = (shard.to_owned(), tensor.to_owned());
                return Err(FormatError::MissingShard { path: dir.to_owned(), shard, tensor });
            }
            Err(e) => return Err(FormatError::io("open", &path, e)),
        };
        stored.add_file(&path, &file)?;
    }
    for (tensor, shard) in &weight_map {
        if stored.parts.get(tensor).is_none_or(|part| part.file != dir.join(shard)) {
            return Err(bad_index(format!("tensor {tensor:?} is not in shard {shard:?}")));
        }
    }
    Ok(())
}

/// Every tensor of every file, by the name under which it is stored.
#[derive(Default)]
struct Stored {
    parts: BTreeMap<String, Part>,
    files: usize,
    tersor_files: usize,
    file_bytes: u64,
}

impl Stored {
    fn add_file(&mut self, path: &Path, file: &File) -> Result<(), FormatError> {
        let bytes = Bytes::map(file).map_err(|e| FormatError::io("map", path, e))?;
        let Header { entries, metadata } = Header::parse(&bytes).map_err(|e| FormatError::file(path, e))?;
        let is_tersor = metadata.get("format").is_some_and(|format| format == FORMAT_NAME);
        self.files += 1;
        self.tersor_files += usize::from(is_tersor);
        self.file_bytes += bytes.len() as u64;
        let mut checksums = BTreeMap::new();
        if is_tersor {
            checksums = check_metadata(&entries, &metadata).map_err(|e| FormatError::file(path, e))?;
        }
        for Entry { name, dtype, shape, range } in entries {
            let checksum = checksums.get(name.as_str()).copied();
            let bytes = bytes.slice(range).expect("Header::parse checks ranges against the file");
            let raw =
                RawTensor::new(dtype, shape, bytes).map_err(|cause| FormatError::Tensor { place: Place::tensor(path, &name), cause })?;
            let part = Part { name: name.clone(), file: path.to_owned(), raw, checksum };
            if self.parts.contains_key(&name) {
                return Err(FormatError::DuplicateTensor { place: part.place() });
            }
            self.parts.insert(name, part);
        }
        Ok(())
    }

    /// Takes every coded tensor with its scales and biases.
    fn coded_items(&mut self) -> Result<BTreeMap<String, Item>, FormatError> {
        let coded: Vec<String> = self.parts.keys().filter(|name| name.ends_with(CODED)).cloned().collect();
        let mut items = BTreeMap::new();
        for name in coded {
            let stem = &name[..name.len() - CODED.len()];
            let mut take = |ending: &str| self.parts.remove(&format!("{stem}{ending}"));
            let Some(blob) = take(CODED) else { continue };
            let fail = |cause| FormatError::Tensor { place: blob.place(), cause };
            if blob.raw.dtype() != Dtype::U8 || blob.raw.shape().len() != 1 {
                return Err(fail(TensorError::PartShape {
                    part: "coded",
                    found: format!("{} {:?}", blob.raw.dtype(), blob.raw.shape()),
                    expected: "U8 of one dimension".to_owned(),
                }));
            }
            let missing = || fail(TensorError::MissingPart { part: format!("{stem}{SCALES}") });
            let scales = take(SCALES).ok_or_else(missing)?;
            let biases = take(BIASES);
            let raw_biases = biases.as_ref().map(|part| part.raw.clone());
            let tensor = CodedTensor::open(blob.raw.bytes().clone(), scales.raw.clone(), raw_biases).map_err(fail)?;
            let parts = [Some(blob), Some(scales), biases].into_iter().flatten().collect();
            items.insert(format!("{stem}{WEIGHT}"), Item { tensor: Tensor::Coded(tensor), parts });
        }
        Ok(items)
    }

    /// Adds what remains to `items`, as raw tensors.
    fn raw_items(self, mut items: BTreeMap<String, Item>) -> Result<BTreeMap<String, Item>, FormatError> {
        for (name, part) in self.parts {
            if items.contains_key(&name) {
                return Err(FormatError::DuplicateTensor { place: part.place() });
            }
            items.insert(name, Item { tensor: Tensor::Raw(part.raw.clone()), parts: vec![part] });
        }
        Ok(items)
    }
}

/// Checks what our files promise beyond safetensors: a checksum for every tensor and for nothing else, and blobs aligned.
fn check_metadata<'a>(entries: &[Entry], metadata: &'a BTreeMap<String, String>) -> Result<BTreeMap<&'a str, u64>, FileError> {
    let bad = |message| Err(FileError::Metadata { message });
    let mut checksums = BTreeMap::new();
    for (key, value) in metadata {
        if let Some(name) = key.strip_prefix(CHECKSUM_PREFIX) {
            match parse_checksum(value) {
                Some(checksum) => checksums.insert(name, checksum),
                None => {
                    return bad(format!("checksum of tensor {name:?} is not 16 lower-case hexadecimal digits"));
                }
            };
        }
    }
    let names: BTreeSet<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
    if let Some(name) = names.iter().find(|&name| !checksums.contains_key(name)) {
        return bad(format!("no checksum of tensor {name:?}"));
    }
    if let Some(name) = checksums.keys().find(|&name| !names.contains(name)) {
        return bad(format!("checksum of tensor {name:?}, which is not in the file"));
    }
    for entry in entries {
        if entry.name.ends_with(CODED) && !entry.range.start.is_multiple_of(BLOB_ALIGN) {
            return Err(FileError::Alignment { name: entry.name.clone(), offset: entry.range.start as u64 });
        }
    }
    Ok(checksums)
}

/// A checksum as 16 lower-case hexadecimal digits, exactly.
pub(crate) fn parse_checksum(text: &str) -> Option<u64> {
    let canonical = text.len() == 16 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if canonical { u64::from_str_radix(text, 16).ok() } else { None }
}

/// The inverse of [`parse_checksum`].
pub(crate) fn format_checksum(checksum: u64) -> String {
    format!("{checksum:016x}")
}

/// Reads a JSON document of bounded size.
pub(crate) fn read_json(path: &Path) -> Result<Vec<u8>, FormatError> {
    let file = File::open(path).map_err(|e| FormatError::io("open", path, e))?;
    let bytes = file.metadata().map_err(|e| FormatError::io("read", path, e))?.len();
    let limit = limits::JSON_BYTES_MAX;
    if bytes > limit {
        return Err(FormatError::TooLarge { path: path.to_owned(), bytes, limit });
    }
    // The length may change, or be unknown (a pipe), between the question and the reading.
    let mut json = Vec::new();
    file.take(limit + 1).read_to_end(&mut json).map_err(|e| FormatError::io("read", path, e))?;
    if json.len() as u64 > limit {
        return Err(FormatError::TooLarge { path: path.to_owned(), bytes: json.len() as u64, limit });
    }
    Ok(json)
}

/// Parses a JSON document; the error names its path.
pub(crate) fn parse_json<T: for<'de> Deserialize<'de>>(path: &Path, json: &[u8]) -> Result<T, FormatError> {
    serde_json::from_slice(json).map_err(|e| FormatError::Json { path: path.to_owned(), message: one_line(&e) })
}
