//! safetensors headers, read strictly: no duplicate names, no unknown fields, no holes, no overlaps, nothing left over.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use crate::error::FileError;
use crate::limits;
use crate::tensor::Dtype;

/// Bytes of the length field that starts every file.
pub(crate) const LENGTH_BYTES: usize = 8;
/// Key of the metadata in the header.
pub(crate) const METADATA_KEY: &str = "__metadata__";

/// A tensor as the header describes it.
#[derive(Debug)]
pub(crate) struct Entry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Bytes from the start of the file; inside it where the whole file was parsed.
    pub range: Range<usize>,
}

/// A checked header.
#[derive(Debug)]
pub(crate) struct Header {
    /// In the order of their data.
    pub entries: Vec<Entry>,
    pub metadata: BTreeMap<String, String>,
}

impl Header {
    /// Parses the header of a whole file and checks every tensor's range against the file's length.
    pub fn parse(file: &[u8]) -> Result<Self, FileError> {
        let available = file.len() as u64;
        let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
            return Err(FileError::Truncated { needed: LENGTH_BYTES as u64, available });
        };
        let header_bytes = u64::from_le_bytes(*length);
        if header_bytes > limits::HEADER_BYTES_MAX {
            return Err(FileError::HeaderTooLong { bytes: header_bytes, limit: limits::HEADER_BYTES_MAX });
        }
        let Some((json, data)) = rest.split_at_checked(header_bytes as usize) else {
            return Err(FileError::Truncated { needed: LENGTH_BYTES as u64 + header_bytes, available });
        };
        let header = Self::from_json(json)?;
        let tensors = header.entries.last().map_or(0, |last| last.range.end - (LENGTH_BYTES + json.len())) as u64;
        if tensors != data.len() as u64 {
            return Err(FileError::DataLength { tensors, available: data.len() as u64 });
        }
        Ok(header)
    }

    /// Parses the head of a file, its length field and JSON header, without the data: ranges may lie beyond any file.
    pub fn parse_head(head: &[u8]) -> Result<Self, FileError> {
        let (needed, available) = (LENGTH_BYTES as u64, head.len() as u64);
        let (length, json) = head.split_first_chunk().ok_or(FileError::Truncated { needed, available })?;
        let needed = u64::from_le_bytes(*length).saturating_add(LENGTH_BYTES as u64);
        if needed != available {
            return Err(FileError::Truncated { needed, available });
        }
        Self::from_json(json)
    }

    /// Parses a JSON header; the tensors must follow each other.
    fn from_json(json: &[u8]) -> Result<Self, FileError> {
        let data_start = LENGTH_BYTES + json.len();
        let json: Json = serde_json::from_slice(json).map_err(|e| FileError::Json { message: one_line(&e) })?;

        let mut tensors = json.tensors;
        tensors.sort_by_key(|(_, t)| t.data_offsets);
        let mut entries = Vec::with_capacity(tensors.len());
        let mut expected = 0;
        for (name, JsonTensor { dtype, shape, data_offsets: (begin, end) }) in tensors {
            if begin != expected || end < begin {
                return Err(FileError::Offsets { name, found: begin, expected });
            }
            let Some(dtype) = Dtype::from_name(&dtype) else {
                return Err(FileError::Dtype { name, dtype });
            };
            let bytes = shape.iter().try_fold(dtype.bytes() as u64, |n, &dim| n.checked_mul(dim));
            if bytes != Some(end - begin) {
                return Err(FileError::Shape { name, shape, dtype: dtype.name(), bytes: end - begin });
            }
            // No file is that long, and sums of what follows cannot overflow.
            if end > i64::MAX as u64 - data_start as u64 {
                return Err(FileError::DataLength { tensors: end, available: i64::MAX as u64 });
            }
            let range = data_start + begin as usize..data_start + end as usize;
            // A dimension beyond usize can only stand beside a 0; no such tensor has elements.
            let shape = shape.into_iter().map(|dim| usize::try_from(dim).unwrap_or(usize::MAX)).collect();
            entries.push(Entry { name, dtype, shape, range });
            expected = end;
        }
        Ok(Self { entries, metadata: json.metadata })
    }
}

/// An error's text without line breaks: serde quotes keys of the file in its messages.
pub(crate) fn one_line(error: &dyn fmt::Display) -> String {
    error.to_string().chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The header as written; only the form of the JSON is checked.
#[derive(Default)]
struct Json {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, JsonTensor)>,
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct JsonVisitor;

        impl<'de> Visitor<'de> for JsonVisitor {
            type Value = Json;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
                let mut json = Json::default();
                let mut names = HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !names.insert(name.clone()) {
                        return Err(A::Error::custom(format_args!("{name:?} occurs twice")));
                    }
                    if name == METADATA_KEY {
                        json.metadata = map.next_value::<UniqueMap<String>>()?.0;
                    } else {
                        json.tensors.push((name, map.next_value()?));
                    }
                }
                Ok(json)
            }
        }

        deserializer.deserialize_map(JsonVisitor)
    }
}

/// A map whose keys may not repeat (serde's own maps keep the last of equals).
pub(crate) struct UniqueMap<V>(pub BTreeMap<String, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MapVisitor<V>(std::marker::PhantomData<V>);

        impl<'de, V: Deserialize<'de>> Visitor<'de> for MapVisitor<V> {
            type Value = UniqueMap<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<UniqueMap<V>, A::Error> {
                let mut map = BTreeMap::new();
                while let Some((key, value)) = access.next_entry::<String, V>()? {
                    if map.contains_key(&key) {
                        return Err(A::Error::custom(format_args!("{key:?} occurs twice")));
                    }
                    map.insert(key, value);
                }
                Ok(UniqueMap(map))
            }
        }

        deserializer.deserialize_map(MapVisitor(std::marker::PhantomData))
    }
}
