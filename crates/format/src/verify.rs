//! Reading everything once and believing nothing.

use std::fs;
use std::path::Path;

use rayon::prelude::*;

use crate::dir::ModelDir;
use crate::encode::decode_checked;
use crate::error::{FormatError, TensorError};
use crate::header::{NARROW_MAX, NARROW_MIN, TILE_COLS, TILE_ROWS, TILE_SYMBOLS};
use crate::manifest::{FileSum, MANIFEST_FILE, Manifest};
use crate::tensor::{CodedTensor, Tensor};

/// What [`verify`] is doing; passed to its callback.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct VerifyProgress<'a> {
    /// File or tensor at hand.
    pub item: &'a str,
    /// Bytes done.
    pub bytes_done: u64,
    /// Bytes in all: every file is read once for the manifest, every tensor once more.
    pub bytes_total: u64,
}

/// What [`verify`] found in order.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct VerifyReport {
    /// Files that match the manifest.
    pub files: usize,
    /// Coded tensors decoded.
    pub coded_tensors: usize,
    /// Raw tensors whose checksum matches.
    pub raw_tensors: usize,
    /// Chunks decoded.
    pub chunks: u64,
    /// Symbols decoded, padding included.
    pub symbols: u64,
    /// Entries of the directory that the manifest does not list, ascending. They are not read.
    pub unlisted: Vec<String>,
}

/// Checks a directory of ours: manifest, checksums, zero padding; decodes every tensor with the codec's oracle and compares the
/// header's statistics; scales must be finite. In parallel on rayon's current pool; memory is one chunk a thread.
///
/// # Errors
/// The first thing found wrong, or a directory that is not ours (it has no checksums to verify).
pub fn verify(path: impl AsRef<Path>, progress: &mut (dyn FnMut(VerifyProgress<'_>) + Send)) -> Result<VerifyReport, FormatError> {
    let path = path.as_ref();
    let dir = ModelDir::open(path)?;
    if !dir.is_tersor() {
        let message = "not a tersor directory: it has no checksums to verify".to_owned();
        return Err(FormatError::Usage { path: path.to_owned(), message });
    }
    let manifest = Manifest::read(path)?;
    let file_bytes: u64 = manifest.files.values().fold(0, |sum, file| sum.saturating_add(file.bytes));
    let bytes_total = file_bytes.saturating_add(dir.tensors().map(|(_, tensor)| tensor.bytes()).sum());
    let mut bytes_done = 0;
    let mut report = VerifyReport::default();

    for (name, expected) in &manifest.files {
        let file = path.join(name);
        let differs = |message| FormatError::Manifest { path: file.clone(), message };
        // The size first: a file grown by gigabytes need not be read.
        let bytes = fs::metadata(&file).map_err(|e| FormatError::io("read", &file, e))?.len();
        if bytes != expected.bytes {
            return Err(differs(format!("{bytes} bytes, the manifest says {}", expected.bytes)));
        }
        let start = bytes_done;
        let found = FileSum::of(&file, |bytes| progress(VerifyProgress { item: name, bytes_done: start + bytes, bytes_total }))?;
        if found != *expected {
            return Err(differs("checksum differs from the manifest's".to_owned()));
        }
        bytes_done += bytes;
        report.files += 1;
    }
    for file in dir.files() {
        if !manifest.files.contains_key(file) {
            return Err(FormatError::Manifest { path: path.join(file), message: "not in the manifest".to_owned() });
        }
    }
    report.unlisted = unlisted(path, &manifest)?;

    for (name, tensor) in dir.tensors() {
        dir.check(name)?;
        match tensor {
            Tensor::Raw(_) => report.raw_tensors += 1,
            Tensor::Coded(coded) => {
                check_coded(coded).map_err(|cause| FormatError::Tensor { place: dir.place(name), cause })?;
                report.coded_tensors += 1;
                report.chunks += coded.chunk_count() as u64;
                report.symbols += coded.header().symbols();
            }
        }
        dir.release(name);
        bytes_done += tensor.bytes();
        progress(VerifyProgress { item: name, bytes_done, bytes_total });
    }
    Ok(report)
}

/// Names in the directory that the manifest does not know.
fn unlisted(path: &Path, manifest: &Manifest) -> Result<Vec<String>, FormatError> {
    let io = |e| FormatError::io("read", path, e);
    let mut names = Vec::new();
    for entry in fs::read_dir(path).map_err(io)? {
        let name = entry.map_err(io)?.file_name().to_string_lossy().into_owned();
        if name != MANIFEST_FILE && !manifest.files.contains_key(&name) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// What the header says of the symbols, found by decoding.
#[derive(Clone, Copy)]
struct Statistics {
    min: i16,
    max: i16,
    wide: u64,
}

/// Checks everything of a coded tensor beyond what opening it has checked.
fn check_coded(tensor: &CodedTensor) -> Result<(), TensorError> {
    tensor.check_padding()?;
    tensor.scales().to_f32()?;
    tensor.scales().biases_to_f32()?;
    let found = (0..tensor.chunk_count())
        .into_par_iter()
        .map_init(Vec::new, |tiled, chunk| {
            decode_checked(tensor, chunk, tiled)?;
            check_padding_symbols(tensor, chunk, tiled)?;
            let wide = |&&symbol: &&i16| !(i16::from(NARROW_MIN)..=i16::from(NARROW_MAX)).contains(&symbol);
            Ok(Statistics {
                min: tiled.iter().copied().min().unwrap_or(0),
                max: tiled.iter().copied().max().unwrap_or(0),
                wide: tiled.iter().filter(wide).count() as u64,
            })
        })
        .try_reduce_with(|a, b| Ok(Statistics { min: a.min.min(b.min), max: a.max.max(b.max), wide: a.wide + b.wide }))
        .expect("a tensor has at least one chunk")?;
    let header = tensor.header();
    let clamp = |symbol: i16| i64::from(symbol.clamp(i16::from(i8::MIN), i16::from(i8::MAX)));
    for (field, stored, found) in [
        ("symbol_min", i64::from(header.symbol_min), clamp(found.min)),
        ("symbol_max", i64::from(header.symbol_max), clamp(found.max)),
        ("wide_count", i64::from(header.wide_count), found.wide as i64),
    ] {
        if stored != found {
            return Err(TensorError::Statistic { field, stored, found });
        }
    }
    Ok(())
}

/// Rows and columns that only fill up tiles must hold zeros.
fn check_padding_symbols(tensor: &CodedTensor, chunk: usize, tiled: &[i16]) -> Result<(), TensorError> {
    let row_tile_symbols = tensor.col_steps() * TILE_SYMBOLS;
    for (row_tile, symbols) in tensor.chunk_row_tiles(chunk).zip(tiled.chunks_exact(row_tile_symbols)) {
        let (row_first, cols_padded) = (row_tile * TILE_ROWS, tensor.cols_padded());
        for row in row_first..row_first + TILE_ROWS {
            let cols = if row < tensor.rows() { tensor.cols()..cols_padded } else { 0..cols_padded };
            for col in cols {
                let lane = (row - row_first) * TILE_COLS + col % TILE_COLS;
                if symbols[col / TILE_COLS * TILE_SYMBOLS + lane] != 0 {
                    return Err(TensorError::PaddingSymbol { row, col });
                }
            }
        }
    }
    Ok(())
}
