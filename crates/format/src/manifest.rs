//! `tersor.manifest.json`: size and checksum of every other file of the directory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use xxhash_rust::xxh3::Xxh3;

use crate::dir::{FORMAT_VERSION, format_checksum, parse_checksum, parse_json, read_json};
use crate::error::FormatError;
use crate::safetensors::UniqueMap;

/// Name of the manifest.
pub(crate) const MANIFEST_FILE: &str = "tersor.manifest.json";
/// Bytes read at a time.
const READ_BYTES: usize = 1 << 17;

/// Size and checksum of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FileSum {
    pub bytes: u64,
    #[serde(serialize_with = "write_hex", deserialize_with = "read_hex")]
    pub xxh3: u64,
}

fn write_hex<S: Serializer>(checksum: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&format_checksum(*checksum))
}

fn read_hex<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_checksum(&text).ok_or_else(|| serde::de::Error::custom("xxh3 is not 16 lower-case hexadecimal digits"))
}

impl FileSum {
    /// Reads a file to its end; `progress` gets the number of bytes read after each piece.
    pub fn of(path: &Path, mut progress: impl FnMut(u64)) -> Result<Self, FormatError> {
        let mut file = File::open(path).map_err(|e| FormatError::io("open", path, e))?;
        let mut hash = Xxh3::new();
        let mut bytes = 0;
        let mut buffer = vec![0; READ_BYTES];
        loop {
            let count = file.read(&mut buffer).map_err(|e| FormatError::io("read", path, e))?;
            if count == 0 {
                return Ok(Self { bytes, xxh3: hash.digest() });
            }
            hash.update(&buffer[..count]);
            bytes += count as u64;
            progress(bytes);
        }
    }
}

/// The manifest: files by name, ascending.
#[derive(Debug, Default)]
pub(crate) struct Manifest {
    pub files: BTreeMap<String, FileSum>,
}

impl Manifest {
    /// Reads the manifest of a directory.
    pub fn read(dir: &Path) -> Result<Self, FormatError> {
        #[derive(Deserialize)]
        struct Document {
            version: u64,
            files: UniqueMap<FileSum>,
        }
        let path = dir.join(MANIFEST_FILE);
        let document: Document = parse_json(&path, &read_json(&path)?)?;
        if document.version != FORMAT_VERSION {
            return Err(FormatError::Version { path, found: document.version.to_string(), known: FORMAT_VERSION });
        }
        let files = document.files.0;
        let is_name = |name: &str| Path::new(name).file_name().is_some_and(|file_name| file_name == name);
        if let Some(name) = files.keys().find(|name| !is_name(name)) {
            let message = format!("{name:?} is not the name of a file in the directory");
            return Err(FormatError::Json { path, message });
        }
        Ok(Self { files })
    }

    /// The manifest's bytes.
    pub fn to_json(&self) -> Vec<u8> {
        #[derive(Serialize)]
        struct Document<'a> {
            version: u64,
            files: &'a BTreeMap<String, FileSum>,
        }
        let document = Document { version: FORMAT_VERSION, files: &self.files };
        let mut json = serde_json::to_vec_pretty(&document).expect("strings and numbers serialize");
        json.push(b'\n');
        json
    }
}
