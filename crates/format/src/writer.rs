//! Writing model directories, all or nothing.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::dir::{
    BIASES, CHECKSUM_PREFIX, CODED, CONFIG_FILE, FORMAT_NAME, FORMAT_VERSION, INDEX_FILE, MODEL_FILE, ModelDir, QUANTIZATION_KEY, SCALES,
    WEIGHT, format_checksum,
};
use crate::encode::EncodedTensor;
use crate::error::FormatError;
use crate::header::BLOB_ALIGN;
use crate::limits;
use crate::manifest::{FileSum, MANIFEST_FILE, Manifest};
use crate::original::{self, ORIGINAL_FILE};
use crate::safetensors::{LENGTH_BYTES, METADATA_KEY};
use crate::tensor::{Dtype, RawTensor};

/// Raw tensors wait here for the end of the blobs.
const SPOOL_FILE: &str = ".raw-tensors";
/// Takes the blobs over when the room kept for the header was too small.
const GROWN_FILE: &str = ".model-with-more-room";
/// Room kept for the header when no tensor was announced.
const HEADER_BYTES_DEFAULT: usize = 4096;
/// Bytes of a tensor's two entries in the header without its name: JSON syntax, dtype, shape and offsets below 10^11, checksum.
const HEADER_BYTES_PER_TENSOR: usize = 112;
/// Bytes of the header beside the entries of tensors.
const HEADER_BYTES_BASE: usize = 48;

/// Writes a directory under a temporary name and renames it when everything is on disk. Dropped before
/// [`finish`](Self::finish) succeeds, it removes what it wrote.
///
/// Tensors are written as they come and nothing is kept in memory: blobs go to their final place behind the room kept for
/// the header, raw tensors to a second file that is appended in the end.
///
/// ```no_run
/// # fn main() -> Result<(), tersor_format::FormatError> {
/// let mut writer = tersor_format::DirWriter::create("demo", false)?;
/// writer.write_raw("model.norm.weight", tersor_format::Dtype::F32, &[2], &[0; 8])?;
/// writer.copy_file("source/tokenizer.json")?;
/// writer.finish(serde_json::json!({"model_type": "llama"}))
/// # }
/// ```
#[derive(Debug)]
pub struct DirWriter {
    staging: Staging,
    names: BTreeSet<String>,
    /// Room for the JSON header, estimated from what was announced.
    header_bytes: usize,
    blobs: Option<Section>,
    raws: Option<Section>,
    manifest: Manifest,
    /// After an error the files are in an unknown state, and `finish` refuses.
    failed: bool,
}

/// A directory under a temporary name beside the one that it will have. Dropped before [`install`](Self::install) succeeds, it is removed.
#[derive(Debug)]
pub(crate) struct Staging {
    path: PathBuf,
    force: bool,
    temp: TempDir,
}

impl Staging {
    /// Creates the temporary directory; see [`DirWriter::create`].
    pub fn create(path: &Path, force: bool) -> Result<Self, FormatError> {
        // A destination that is a symbolic link is followed, so that the link survives.
        let path = match path.canonicalize() {
            Ok(path) => path,
            Err(_) => path.to_owned(),
        };
        let usage = |message: &str| FormatError::Usage { path: path.clone(), message: message.to_owned() };
        let Some(name) = path.file_name() else {
            return Err(usage("not a name for a directory"));
        };
        check_destination(&path, force)?;
        let mut temp_name = std::ffi::OsString::from(".");
        temp_name.push(name);
        temp_name.push(format!(".tersor-tmp-{}", std::process::id()));
        let temp = path.with_file_name(temp_name);
        fs::create_dir(&temp).map_err(|e| FormatError::io("create", &temp, e))?;
        Ok(Self { path, force, temp: TempDir { path: temp } })
    }

    /// The temporary directory.
    pub fn path(&self) -> &Path {
        &self.temp.path
    }

    /// Gives the directory its name, durably.
    pub fn install(self) -> Result<(), FormatError> {
        sync_dir(&self.temp.path)?;
        check_destination(&self.path, self.force)?;
        install(&self.temp.path, &self.path, self.force).map_err(|e| FormatError::io("replace", &self.path, e))?;
        // `create` made sure that there is a name; an empty parent means the current directory.
        let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        sync_dir(parent.unwrap_or(Path::new(".")))
    }
}

/// A directory that is removed when dropped.
#[derive(Debug)]
struct TempDir {
    path: PathBuf,
}

impl Drop for TempDir {
    fn drop(&mut self) {
        // After a successful rename there is nothing under this name, or, after an exchange, the old directory.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// A file of tensors without gaps.
#[derive(Debug)]
struct Section {
    path: PathBuf,
    file: File,
    /// Bytes before the first tensor.
    start: u64,
    tensors: Vec<Stored>,
}

#[derive(Debug)]
struct Stored {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: u64,
    checksum: u64,
}

impl Section {
    fn create(path: PathBuf, start: u64) -> Result<Self, FormatError> {
        let io = |e| FormatError::io("write", &path, e);
        let mut file = File::options().read(true).write(true).create_new(true).open(&path).map_err(io)?;
        file.seek(SeekFrom::Start(start)).map_err(io)?;
        Ok(Self { path, file, start, tensors: Vec::new() })
    }

    fn write(&mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Result<(), FormatError> {
        self.file.write_all(bytes).map_err(|e| FormatError::io("write", &self.path, e))?;
        self.tensors.push(Stored {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
            bytes: bytes.len() as u64,
            checksum: xxh3_64(bytes),
        });
        Ok(())
    }
}

impl DirWriter {
    /// Creates the temporary directory `.NAME.tersor-tmp-PID` beside `path`.
    ///
    /// # Errors
    /// `path` exists and `force` is false; it exists and is neither empty nor a model directory; its parent does not exist;
    /// the temporary directory exists (left behind by a process that was killed, or in use by another writer).
    pub fn create(path: impl AsRef<Path>, force: bool) -> Result<Self, FormatError> {
        Ok(Self {
            staging: Staging::create(path.as_ref(), force)?,
            names: BTreeSet::new(),
            header_bytes: 0,
            blobs: None,
            raws: None,
            manifest: Manifest::default(),
            failed: false,
        })
    }

    /// The temporary directory, for those who must remove it when they end the process without unwinding.
    pub fn temp_path(&self) -> &Path {
        self.staging.path()
    }

    /// Announces a raw tensor, so that the room kept for the header fits. Has an effect before the first coded tensor is
    /// written. Optional: if the header turns out longer than the room kept, `finish` copies the file once.
    pub fn expect_raw(&mut self, name: &str) {
        self.header_bytes += 2 * json!(name).to_string().len() + HEADER_BYTES_PER_TENSOR;
    }

    /// Announces a coded tensor, as [`expect_raw`](Self::expect_raw); `has_biases` for affine schemes.
    pub fn expect_coded(&mut self, name: &str, has_biases: bool) {
        for _ in 0..2 + usize::from(has_biases) {
            self.expect_raw(name);
        }
    }

    /// Writes a tensor as it is: `bytes` are its elements, row-major, little-endian.
    ///
    /// # Errors
    /// A name written twice or reserved for coded tensors, a length that does not fit the shape, or an I/O error.
    pub fn write_raw(&mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Result<(), FormatError> {
        let expected = shape.iter().try_fold(dtype.bytes(), |n, &dim| n.checked_mul(dim));
        if expected != Some(bytes.len()) {
            return Err(self.usage(format!("tensor {name:?}: {dtype} {shape:?} is not {} bytes", bytes.len())));
        }
        if name.ends_with(CODED) || name == METADATA_KEY {
            return Err(self.usage(format!("tensor {name:?}: this name is reserved")));
        }
        self.take_name(name)?;
        self.guard(|writer| writer.raws()?.write(name, dtype, shape, bytes))
    }

    /// Writes the coded tensor that the model calls `name`, which must end in `.weight`: `X.coded`, `X.scales`, and
    /// `X.biases` if it has them.
    ///
    /// # Errors
    /// As [`write_raw`](Self::write_raw), or a name that does not end in `.weight`.
    pub fn write_coded(&mut self, name: &str, tensor: &EncodedTensor) -> Result<(), FormatError> {
        let Some(stem) = name.strip_suffix(WEIGHT) else {
            return Err(self.usage(format!("tensor {name:?}: only names in {WEIGHT} can be coded")));
        };
        self.take_name(name)?;
        self.guard(|writer| {
            let mut part =
                |ending, part: &RawTensor| writer.write_raw(&format!("{stem}{ending}"), part.dtype(), part.shape(), part.bytes());
            part(SCALES, tensor.scales())?;
            tensor.biases().map_or(Ok(()), |biases| part(BIASES, biases))?;
            let (coded, blob) = (format!("{stem}{CODED}"), tensor.blob());
            writer.take_name(&coded)?;
            writer.blobs()?.write(&coded, Dtype::U8, &[blob.len()], blob)
        })
    }

    /// Copies a file (tokenizer.json, ...) into the directory under its own name.
    ///
    /// # Errors
    /// A name that is reserved or taken, or an I/O error.
    pub fn copy_file(&mut self, source: impl AsRef<Path>) -> Result<(), FormatError> {
        let source = source.as_ref();
        let Some(name) = source.file_name().and_then(|name| name.to_str()) else {
            return Err(FormatError::Usage { path: source.to_owned(), message: "not the name of a file".to_owned() });
        };
        let target = self.take_file(name)?;
        self.guard(|writer| {
            let mut reader = File::open(source).map_err(|e| FormatError::io("open", source, e))?;
            let mut file = create_new(&target)?;
            io::copy(&mut reader, &mut file).map_err(|e| FormatError::io("write", &target, e))?;
            sync(&file, &target)?;
            let sum = FileSum::of(&target, |_| ())?;
            writer.manifest.files.insert(name.to_owned(), sum);
            Ok(())
        })
    }

    /// Writes a small file.
    ///
    /// # Errors
    /// As [`copy_file`](Self::copy_file).
    pub fn write_file(&mut self, name: &str, bytes: &[u8]) -> Result<(), FormatError> {
        if Path::new(name).file_name().is_none_or(|file_name| file_name != name) {
            return Err(self.usage(format!("{name:?} is not the name of a file")));
        }
        self.take_file(name)?;
        self.guard(|writer| writer.put(name, bytes))
    }

    /// Keeps what is needed to write the files of `source` again, byte for byte, by [`restore_original`](crate::restore_original) from
    /// this directory: the heads of its tensor files, its configuration and index, and a copy of every other file (but those whose names begin
    /// with a dot, and weights in other containers).
    ///
    /// # Errors
    /// As [`copy_file`](Self::copy_file).
    pub fn keep_original(&mut self, source: &ModelDir) -> Result<(), FormatError> {
        let record = original::record(source)?;
        self.guard(|writer| writer.put(ORIGINAL_FILE, &record))?;
        original::companions(source)?.iter().try_for_each(|file| self.copy_file(file))
    }

    /// Adds `quantization_config` to `config` (keys already in it stay if its `quant_method` is `tersor`), writes it and
    /// the manifest, syncs everything and renames the directory to its final name. An old directory is exchanged for the
    /// new one in one step where the system can do that (Linux, macOS), and removed.
    ///
    /// # Errors
    /// `config` is not an object, an earlier call failed, or an I/O error; the temporary directory is removed.
    pub fn finish(mut self, mut config: Value) -> Result<(), FormatError> {
        if self.failed {
            return Err(self.usage("an earlier write failed".to_owned()));
        }
        let Some(object) = config.as_object_mut() else {
            return Err(self.usage("the configuration is not a JSON object".to_owned()));
        };
        let ours = |old: &Value| old.is_object() && old.get("quant_method") == Some(&json!(FORMAT_NAME));
        let mut quantization = object.remove(QUANTIZATION_KEY).filter(ours).unwrap_or_else(|| json!({}));
        quantization["quant_method"] = json!(FORMAT_NAME);
        quantization["version"] = json!(FORMAT_VERSION);
        object.insert(QUANTIZATION_KEY.to_owned(), quantization);
        // The same bytes whether or not another crate of the build turns on serde_json's `preserve_order`.
        config.sort_all_objects();
        self.put(CONFIG_FILE, format!("{config:#}\n").as_bytes())?;
        self.finish_model()?;
        let manifest = self.manifest.to_json();
        self.put(MANIFEST_FILE, &manifest)?;
        self.staging.install()
    }

    /// Completes `model.safetensors`: raw tensors behind the blobs, header in front.
    fn finish_model(&mut self) -> Result<(), FormatError> {
        // Widest elements first: with blobs a multiple of 64, every tensor is aligned to its element.
        let mut raws = self.raws.take();
        let mut order: Vec<(u64, Stored)> = Vec::new();
        if let Some(raws) = &mut raws {
            let mut start = 0;
            for tensor in std::mem::take(&mut raws.tensors) {
                let bytes = tensor.bytes;
                order.push((start, tensor));
                start += bytes;
            }
            order.sort_by_key(|(_, tensor)| std::cmp::Reverse(tensor.dtype.bytes()));
        }
        let blobs = self.blobs.as_ref().map_or(&[][..], |blobs| &blobs.tensors);
        let json = header_json(blobs.iter().chain(order.iter().map(|(_, tensor)| tensor)));
        if json.len() as u64 > limits::HEADER_BYTES_MAX {
            let limit = limits::HEADER_BYTES_MAX;
            return Err(FormatError::TooLarge { path: self.staging.path.clone(), bytes: json.len() as u64, limit });
        }
        let start_min = data_start(json.len());
        let mut model = match self.blobs.take() {
            Some(blobs) if blobs.start >= start_min => blobs,
            Some(mut blobs) => {
                // The room kept was too small: move the blobs to a file with more.
                let mut grown = Section::create(self.staging.path().join(GROWN_FILE), start_min)?;
                let start = blobs.start;
                copy(&mut blobs, start, &mut grown, None)?;
                fs::rename(&grown.path, &blobs.path).map_err(|e| FormatError::io("rename", &grown.path, e))?;
                grown.path = blobs.path;
                grown
            }
            None => Section::create(self.staging.path().join(MODEL_FILE), start_min)?,
        };
        if let Some(raws) = &mut raws {
            for (start, tensor) in &order {
                copy(raws, *start, &mut model, Some(tensor.bytes))?;
            }
            fs::remove_file(&raws.path).map_err(|e| FormatError::io("remove", &raws.path, e))?;
        }
        let header_bytes = model.start as usize - LENGTH_BYTES;
        let mut header = (header_bytes as u64).to_le_bytes().to_vec();
        header.extend_from_slice(&json);
        header.resize(model.start as usize, b' ');
        let io = |e| FormatError::io("write", &model.path, e);
        model.file.seek(SeekFrom::Start(0)).map_err(io)?;
        model.file.write_all(&header).map_err(io)?;
        sync(&model.file, &model.path)?;
        let sum = FileSum::of(&model.path, |_| ())?;
        self.manifest.files.insert(MODEL_FILE.to_owned(), sum);
        Ok(())
    }

    /// The file of blobs, created when the first one comes.
    fn blobs(&mut self) -> Result<&mut Section, FormatError> {
        if self.blobs.is_none() {
            let room = if self.header_bytes == 0 { HEADER_BYTES_DEFAULT } else { HEADER_BYTES_BASE + self.header_bytes };
            self.blobs = Some(Section::create(self.staging.path().join(MODEL_FILE), data_start(room))?);
        }
        Ok(self.blobs.as_mut().expect("just created"))
    }

    /// The file of raw tensors, created when the first one comes.
    fn raws(&mut self) -> Result<&mut Section, FormatError> {
        if self.raws.is_none() {
            self.raws = Some(Section::create(self.staging.path().join(SPOOL_FILE), 0)?);
        }
        Ok(self.raws.as_mut().expect("just created"))
    }

    /// Runs `write` and remembers whether it failed.
    fn guard(&mut self, write: impl FnOnce(&mut Self) -> Result<(), FormatError>) -> Result<(), FormatError> {
        let result = write(self);
        self.failed |= result.is_err();
        result
    }

    fn take_name(&mut self, name: &str) -> Result<(), FormatError> {
        if !self.names.insert(name.to_owned()) {
            return Err(self.usage(format!("tensor {name:?} is written twice")));
        }
        Ok(())
    }

    /// The path of a new file of the directory.
    fn take_file(&mut self, name: &str) -> Result<PathBuf, FormatError> {
        if [CONFIG_FILE, MODEL_FILE, INDEX_FILE, MANIFEST_FILE, ORIGINAL_FILE].contains(&name) || name.starts_with('.') {
            return Err(self.usage(format!("file {name:?}: this name is reserved")));
        }
        if self.manifest.files.contains_key(name) {
            return Err(self.usage(format!("file {name:?} is written twice")));
        }
        Ok(self.staging.path().join(name))
    }

    fn put(&mut self, name: &str, bytes: &[u8]) -> Result<(), FormatError> {
        let path = self.staging.path().join(name);
        let mut file = create_new(&path)?;
        file.write_all(bytes).map_err(|e| FormatError::io("write", &path, e))?;
        sync(&file, &path)?;
        let mut hash = Xxh3::new();
        hash.update(bytes);
        let sum = FileSum { bytes: bytes.len() as u64, xxh3: hash.digest() };
        self.manifest.files.insert(name.to_owned(), sum);
        Ok(())
    }

    fn usage(&self, message: String) -> FormatError {
        FormatError::Usage { path: self.staging.path.clone(), message }
    }
}

/// Where data start for a header of `json_bytes`: blobs must lie at multiples of 64.
fn data_start(json_bytes: usize) -> u64 {
    (LENGTH_BYTES + json_bytes).next_multiple_of(BLOB_ALIGN) as u64
}

/// The JSON header without padding. Written by hand so that the order of keys is ours: checksums, then tensors by offset.
fn header_json<'a>(tensors: impl Iterator<Item = &'a Stored> + Clone) -> Vec<u8> {
    let mut json = format!("{{\"{METADATA_KEY}\":{{\"format\":\"{FORMAT_NAME}\"");
    for tensor in tensors.clone() {
        let key = json!(format!("{CHECKSUM_PREFIX}{}", tensor.name));
        json += &format!(",{key}:\"{}\"", format_checksum(tensor.checksum));
    }
    json.push('}');
    let mut begin = 0;
    for Stored { name, dtype, shape, bytes, .. } in tensors {
        let end = begin + bytes;
        let (name, shape) = (json!(name), json!(shape));
        json += &format!(",{name}:{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":[{begin},{end}]}}");
        begin = end;
    }
    json.push('}');
    json.into_bytes()
}

/// Appends `bytes` bytes of `from` (or all to its end), beginning at byte `start` of that file.
fn copy(from: &mut Section, start: u64, to: &mut Section, bytes: Option<u64>) -> Result<(), FormatError> {
    from.file.seek(SeekFrom::Start(start)).map_err(|e| FormatError::io("read", &from.path, e))?;
    let mut source = io::Read::take(&mut from.file, bytes.unwrap_or(u64::MAX));
    // `io::copy` lets the kernel copy where it can.
    io::copy(&mut source, &mut to.file).map_err(|e| FormatError::io("write", &to.path, e))?;
    Ok(())
}

pub(crate) fn create_new(path: &Path) -> Result<File, FormatError> {
    File::create_new(path).map_err(|e| FormatError::io("create", path, e))
}

pub(crate) fn sync(file: &File, path: &Path) -> Result<(), FormatError> {
    file.sync_all().map_err(|e| FormatError::io("sync", path, e))
}

fn sync_dir(path: &Path) -> Result<(), FormatError> {
    // Opening a directory for fsync is a Unix notion.
    if cfg!(unix) {
        let dir = File::open(path).map_err(|e| FormatError::io("open", path, e))?;
        sync(&dir, path)?;
    }
    Ok(())
}

/// Refuses to replace what is there unless `force`, and anything but a model directory even then: a slip in a path must not
/// cost a home directory.
fn check_destination(path: &Path, force: bool) -> Result<(), FormatError> {
    let usage = |message: &str| Err(FormatError::Usage { path: path.to_owned(), message: message.to_owned() });
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(FormatError::io("examine", path, e)),
        Ok(_) if !force => usage("already exists"),
        Ok(metadata) if !metadata.is_dir() => usage("exists and is not a directory"),
        Ok(_) => {
            let mut entries = fs::read_dir(path).map_err(|e| FormatError::io("read", path, e))?;
            let is_model = path.join(CONFIG_FILE).is_file() || path.join(MANIFEST_FILE).is_file();
            if is_model || entries.next().is_none() {
                return Ok(());
            }
            usage("exists and is not a model directory: refusing to replace it")
        }
    }
}

/// Gives the complete directory `temp` its final name. With `force` an existing directory is left under the name `temp`.
#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
fn install(temp: &Path, path: &Path, force: bool) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;

    let exists = force && path.exists();
    let flags = if exists { RenameFlags::EXCHANGE } else { RenameFlags::NOREPLACE };
    match renameat_with(CWD, temp, CWD, path, flags) {
        // Some file systems (NFS, some FUSE) know neither flag.
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => install_in_two_steps(temp, path, exists),
        result => Ok(result?),
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
fn install(temp: &Path, path: &Path, force: bool) -> io::Result<()> {
    install_in_two_steps(temp, path, force && path.exists())
}

/// As `install` for systems that cannot exchange two names: for a moment the old directory has a third name.
fn install_in_two_steps(temp: &Path, path: &Path, exists: bool) -> io::Result<()> {
    if !exists {
        return fs::rename(temp, path);
    }
    let mut aside = temp.as_os_str().to_owned();
    aside.push("-old");
    fs::rename(path, &aside)?;
    if let Err(e) = fs::rename(temp, path) {
        fs::rename(&aside, path)?;
        return Err(e);
    }
    // Under the temporary name the old directory is removed with the writer.
    fs::rename(&aside, temp)
}
