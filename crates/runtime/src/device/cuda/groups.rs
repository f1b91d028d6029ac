//! Matrices that meet the same activations are one matrix on the device, its parts one below the other: q, k, v; gate, up.

use crate::model::config::Config;
use crate::model::llama::LayerVectors;
use crate::model::weights::{LinearId, LinearKind};
use crate::residency::OpenError;
use crate::residency::set::{Linear, TensorSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tersor_codec::{Histogram, decode_chunk};
use tersor_cpu::{Level, Pool, decode_bytes};
use tersor_cuda::layout::parallel;
use tersor_cuda::layout::plain::choose_low_bits;
use tersor_cuda::layout::{Geometry, Plain, QuadMatrix, QuadParams, Source, Statistics, TILE_ROWS};
use tersor_cuda::{Buffer, CudaError, Device, Kernels, PlainMatrix, QuadPlaces, RansDecoder, RansPart, RansTable};
use tersor_format::{CodedTensor, ModelDir, ScaleScheme};

/// Groups of a layer, in order of use.
pub(super) const PER_LAYER: usize = 4;

/// Symbols of a tile of the file: 16 rows of 4 columns.
const TILE_SYMBOLS: usize = 4 * TILE_ROWS;

/// Chunks of a matrix that are decoded to choose its form.
const SAMPLED_CHUNKS: usize = 2;

/// What a group is for; the position in a layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Qkv,
    O,
    GateUp,
    Down,
    Head,
}

impl Kind {
    const IN_LAYER: [Self; PER_LAYER] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];

    fn parts(self) -> &'static [LinearKind] {
        match self {
            Self::Qkv => &[LinearKind::Q, LinearKind::K, LinearKind::V],
            Self::O => &[LinearKind::O],
            Self::GateUp => &[LinearKind::Gate, LinearKind::Up],
            Self::Down => &[LinearKind::Down],
            Self::Head => &[LinearKind::Head],
        }
    }
}

/// One matrix of the device.
#[derive(Debug)]
pub(super) struct Group {
    pub kind: Kind,
    /// Positions of its parts in the tensor set.
    pub slots: Vec<usize>,
    pub geometry: Geometry,
    /// Row at which each part begins, a multiple of 16.
    pub first_rows: Vec<usize>,
    /// Scale of each row.
    pub scale: Buffer,
    /// Bias of each row.
    pub bias: Option<Buffer>,
}

impl Group {
    /// Columns, not padded.
    pub fn cols(&self) -> usize {
        self.geometry.cols()
    }

    /// Rows, padded.
    pub fn n(&self) -> usize {
        self.geometry.padded_rows()
    }
}

/// All groups of a model: layer by layer, then the head.
#[derive(Debug)]
pub(super) struct Groups {
    pub all: Vec<Group>,
    pub layers: usize,
}

impl Groups {
    /// Cuts the model into groups and sends scales and biases to the device.
    pub fn new(dir: &ModelDir, set: &TensorSet, config: &Config, layers: &[LayerVectors], kernels: &Kernels) -> Result<Self, OpenError> {
        let mut all = Vec::new();
        for (layer, vectors) in layers.iter().enumerate() {
            for kind in Kind::IN_LAYER {
                let biases = match kind {
                    Kind::Qkv => &vectors.biases[..3],
                    Kind::O => &vectors.biases[3..],
                    _ => &[],
                };
                all.push(group(dir, set, kind, layer, biases, kernels)?);
            }
        }
        all.push(group(dir, set, Kind::Head, 0, &[], kernels)?);
        Ok(Self { all, layers: config.layers })
    }

    /// Number of a layer's group in [`all`](Self::all).
    pub fn index(&self, layer: usize, kind: Kind) -> usize {
        if kind == Kind::Head { self.layers * PER_LAYER } else { layer * PER_LAYER + kind as usize }
    }

    /// Groups of a layer.
    pub fn of_layer(layer: usize) -> std::ops::Range<usize> {
        layer * PER_LAYER..(layer + 1) * PER_LAYER
    }

    /// Bytes of scales and biases on the device.
    pub fn scale_bytes(&self) -> u64 {
        self.all.iter().map(|group| (group.scale.bytes() + group.bias.as_ref().map_or(0, Buffer::bytes)) as u64).sum()
    }
}

/// Where to find the coded tensor of a matrix; other forms are for the CPU.
fn coded<'a>(dir: &ModelDir, linear: &'a Linear) -> Result<&'a CodedTensor, OpenError> {
    let unsupported = |what: &str| OpenError::Device {
        cause: format!("{}: {what} is not supported on a GPU; use --device cpu", dir.place(&linear.name)),
    };
    let Some(tensor) = linear.coded() else { return Err(unsupported("a matrix that is not coded")) };
    if !tensor.cols().is_multiple_of(4) {
        return Err(unsupported(&format!("a matrix of {} columns, which is no multiple of 4,", tensor.cols())));
    }
    match tensor.scales().scheme() {
        ScaleScheme::Tensor | ScaleScheme::Row => Ok(tensor),
        _ => Err(unsupported("a matrix with a scale for each group of columns")),
    }
}

fn group(dir: &ModelDir, set: &TensorSet, kind: Kind, layer: usize, biases: &[Vec<f32>], kernels: &Kernels) -> Result<Group, OpenError> {
    let layer = u16::try_from(layer).expect("Config limits the number of layers");
    let slot = |&part: &LinearKind| {
        let id = if part == LinearKind::Head { LinearId::HEAD } else { LinearId::new(layer, part) };
        set.index.of(id).expect("every part of a model is in its set")
    };
    let slots: Vec<usize> = kind.parts().iter().map(slot).collect();
    let (mut first_rows, mut rows) = (Vec::new(), 0usize);
    let mut scale: Vec<f32> = Vec::new();
    let mut bias: Vec<f32> = Vec::new();
    for (part, &slot) in slots.iter().enumerate() {
        let tensor = coded(dir, &set.linears[slot])?;
        rows = rows.next_multiple_of(TILE_ROWS);
        first_rows.push(rows);
        rows += tensor.rows();
        let scales =
            tensor.scales().to_f32().map_err(|e| OpenError::Device { cause: format!("{}: {e}", dir.place(&set.linears[slot].name)) })?;
        scale.resize(first_rows[part], 0.0);
        match scales[..] {
            [one] if tensor.scales().scheme() == ScaleScheme::Tensor => scale.resize(rows, one),
            _ => scale.extend_from_slice(&scales),
        }
        bias.resize(first_rows[part], 0.0);
        bias.extend_from_slice(biases.get(part).map_or(&[][..], |bias| bias));
        bias.resize(rows, 0.0);
    }
    let cols = set.linears[slots[0]].coded().map_or(0, CodedTensor::cols);
    let geometry = kernels.geometry(rows, cols)?;
    scale.resize(geometry.padded_rows(), 0.0);
    bias.resize(geometry.padded_rows(), 0.0);
    let device = kernels.device();
    let has_bias = biases.iter().any(|bias| !bias.is_empty());
    Ok(Group {
        kind,
        slots,
        geometry,
        first_rows,
        scale: device.upload(&scale, "scales")?,
        bias: has_bias.then(|| device.upload(&bias, "biases")).transpose()?,
    })
}

/// The symbols of a coded tensor as bytes in the file's order, for the encoders of the device layouts.
pub(super) struct Symbols<'a> {
    tensor: &'a CodedTensor,
    /// (row tiles, column steps, 64), symbol + 128; far symbols are 0.
    bytes: Vec<u8>,
    /// Chunks that hold far symbols, whole, by number.
    far: Vec<Option<Vec<i16>>>,
}

impl<'a> Symbols<'a> {
    /// `bytes`: memory to use.
    pub fn new(name: &str, tensor: &'a CodedTensor, level: Level, pool: Option<&Pool>, mut bytes: Vec<u8>) -> Result<Self, OpenError> {
        let decode = |cause: String| OpenError::Device { cause: format!("{name}: {cause}") };
        bytes.resize(tensor.header().symbols() as usize, 0);
        decode_bytes(level, tensor, &mut bytes, pool).map_err(|e| decode(e.to_string()))?;
        let mut far = Vec::with_capacity(tensor.chunk_count());
        let mut at = 0;
        for chunk in 0..tensor.chunk_count() {
            let symbols = tensor.chunk_symbols(chunk);
            let whole = bytes[at..at + symbols].contains(&0).then(|| {
                let mut whole = vec![0; symbols];
                decode_chunk(tensor.table(), tensor.chunk(chunk), &mut whole).map(|()| whole)
            });
            far.push(whole.transpose().map_err(|e| decode(e.to_string()))?);
            at += symbols;
        }
        Ok(Self { tensor, bytes, far })
    }

    /// Row tile `tile` of the tensor, (16, cols).
    pub fn row_tile(&self, tile: usize, out: &mut [i16]) {
        let (steps, cols) = (self.tensor.col_steps(), self.tensor.cols());
        let chunk = tile / self.tensor.chunk_row_tiles(0).len();
        let in_chunk = tile - self.tensor.chunk_row_tiles(chunk).start;
        match &self.far[chunk] {
            Some(whole) => {
                let whole = &whole[in_chunk * steps * TILE_SYMBOLS..];
                put_rows(out, cols, |at| std::array::from_fn(|i| whole[at + i]));
            }
            None => {
                let bytes = &self.bytes[tile * steps * TILE_SYMBOLS..];
                put_rows(out, cols, |at| std::array::from_fn(|i| i16::from(bytes[at + i]) - 128));
            }
        }
    }
}

/// Rows of a row tile, whose fours of columns lie one behind the other, each row by row.
fn put_rows(out: &mut [i16], cols: usize, four: impl Fn(usize) -> [i16; 4]) {
    for (row, out) in out.chunks_exact_mut(cols).enumerate() {
        for (step, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            *out = four(step * TILE_SYMBOLS + row * 4);
        }
    }
}

/// The parts of a group as one matrix.
struct Stacked<'a> {
    parts: Vec<Symbols<'a>>,
    /// First row tile of each part.
    starts: Vec<usize>,
}

impl Source for Stacked<'_> {
    fn row_tile(&self, row_tile: usize, symbols: &mut [i16]) {
        let part = self.starts.partition_point(|&start| start <= row_tile) - 1;
        let tile = row_tile - self.starts[part];
        if tile < self.parts[part].tensor.row_tiles() {
            self.parts[part].row_tile(tile, symbols);
        }
    }
}

/// Brings groups to the device in the forms that strategies ask for.
pub(super) struct Loader<'a> {
    pub dir: &'a ModelDir,
    pub set: &'a TensorSet,
    pub groups: &'a Groups,
    pub kernels: &'a Kernels,
    pub pool: &'a Pool,
    pub level: Level,
    rans: Option<RansDecoder>,
    /// Tile width and parameters of the quad layout, by kind.
    chosen: Mutex<Vec<(Kind, Geometry, QuadParams)>>,
    /// Memory that groups leave to those behind them: fresh memory costs as much as what is done with it.
    spare: Mutex<Vec<Vec<u8>>>,
}

/// Groups that are transcoded side by side at most: what a group takes besides its encoding, one thread does.
const SIDE_BY_SIDE_MAX: usize = 4;

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Loader<'a> {
    pub fn new(dir: &'a ModelDir, set: &'a TensorSet, groups: &'a Groups, kernels: &'a Kernels, pool: &'a Pool, level: Level) -> Self {
        Self { dir, set, groups, kernels, pool, level, rans: None, chosen: Mutex::default(), spare: Mutex::default() }
    }

    pub fn device(&self) -> &Arc<Device> {
        self.kernels.device()
    }

    fn tensors(&self, group: &Group) -> impl Iterator<Item = (&'a str, &'a CodedTensor)> + use<'a> {
        let set = self.set;
        let slots = group.slots.clone();
        slots.into_iter().map(move |slot| {
            let linear = &set.linears[slot];
            (linear.name.as_str(), linear.coded().expect("groups hold coded matrices only"))
        })
    }

    /// `threads`: all where no other group is worked on, and only then.
    fn stacked(&self, group: &Group, threads: usize) -> Result<Stacked<'a>, OpenError> {
        let pool = (threads == self.pool.threads()).then_some(self.pool);
        let part = |(name, tensor)| Symbols::new(name, tensor, self.level, pool, self.spare());
        let parts: Vec<Symbols<'a>> = self.tensors(group).map(part).collect::<Result<_, _>>()?;
        Ok(Stacked { parts, starts: group.first_rows.iter().map(|row| row / TILE_ROWS).collect() })
    }

    /// Memory for bytes, of any length and content.
    fn spare(&self) -> Vec<u8> {
        locked(&self.spare).pop().unwrap_or_default()
    }

    /// Bytes that are 0, which go [back](Self::give_back).
    pub fn zeroed(&self, bytes: usize) -> Vec<u8> {
        let mut memory = self.spare();
        memory.clear();
        memory.resize(bytes, 0);
        memory
    }

    /// Leaves memory to other groups.
    pub fn give_back(&self, bytes: Vec<u8>) {
        locked(&self.spare).push(bytes);
    }

    /// [`side_by_side`], for an `f` that calls [`quad`](Self::quad).
    pub fn each<T: Send>(
        &self,
        n: usize,
        alone: usize,
        f: impl Fn(usize, usize) -> Result<T, OpenError> + Sync,
    ) -> Result<Vec<T>, OpenError> {
        side_by_side(n, alone, self.pool.threads(), f)
    }

    /// A group in the quad layout, in host memory: transcoded from the file's chunks. `threads`: all where no other group is worked on, and only then.
    pub fn quad(&self, index: usize, threads: usize) -> Result<(QuadPlaces, QuadMatrix), OpenError> {
        let group = &self.groups.all[index];
        let stacked = self.stacked(group, threads)?;
        // Groups of one kind are alike: what was chosen for the first (tile width, low bits, window) serves the others, each with a table of its own.
        let known = locked(&self.chosen).iter().find(|(kind, ..)| *kind == group.kind).map(|&(_, geometry, params)| (geometry, params));
        let encoded = match known {
            Some((geometry, params)) => {
                QuadMatrix::encode(&stacked, geometry, params, &Statistics::sample(&stacked, geometry, threads), threads)
            }
            None => QuadMatrix::encode_auto(&stacked, group.geometry, threads),
        };
        stacked.parts.into_iter().for_each(|part| self.give_back(part.bytes));
        let matrix = encoded.map_err(|e| OpenError::Device { cause: e.to_string() })?;
        if known.is_none() {
            locked(&self.chosen).push((group.kind, matrix.geometry, matrix.params));
        }
        Ok((QuadPlaces::new(&matrix), matrix))
    }

    /// Bytes on the device of a group in the plain layout, known without decoding it.
    pub fn plain_bytes(&self, index: usize) -> u64 {
        let group = &self.groups.all[index];
        let (low_bits, far) = self.plain_form(group);
        PlainMatrix::bytes_for(&group.geometry, low_bits, far) as u64
    }

    /// Raw low bits of the plain layout, and about how many far symbols are left: chosen from a few chunks of each part.
    fn plain_form(&self, group: &Group) -> (u32, usize) {
        let mut counts = Histogram::new();
        let mut weights = 0;
        for (_, tensor) in self.tensors(group) {
            weights += tensor.header().symbols() as usize;
            let step = tensor.chunk_count().div_ceil(SAMPLED_CHUNKS).max(1);
            for chunk in (0..tensor.chunk_count()).step_by(step) {
                let mut symbols = vec![0; tensor.chunk_symbols(chunk)];
                // A chunk that does not decode is found when all are decoded.
                if decode_chunk(tensor.table(), tensor.chunk(chunk), &mut symbols).is_ok() {
                    counts.add(&symbols);
                }
            }
        }
        let low_bits = choose_low_bits(&counts);
        let far: u64 = counts.iter().filter(|(symbol, _)| !(-8..8).contains(&(symbol >> low_bits))).map(|(_, count)| count).sum();
        (low_bits, (far as f64 / counts.total().max(1) as f64 * weights as f64).ceil() as usize)
    }

    /// A group in the plain layout. Chunks of the codecs that the device decodes cross PCIe as they are; others are decoded here.
    pub fn plain(&mut self, index: usize) -> Result<PlainMatrix, OpenError> {
        let group = &self.groups.all[index];
        let (low_bits, _) = self.plain_form(group);
        let tables: Option<Vec<RansTable<'_>>> = self.tensors(group).map(|(_, tensor)| RansTable::new(tensor.table())).collect();
        let Some(tables) = tables else {
            let stacked = self.stacked(group, self.pool.threads())?;
            let plain = Plain::pack(&stacked, group.geometry, low_bits, self.pool.threads())
                .map_err(|e| OpenError::Device { cause: e.to_string() })?;
            return Ok(PlainMatrix::upload(self.device(), &plain)?);
        };
        let mut parts = Vec::new();
        for (((_, tensor), first_row), table) in self.tensors(group).zip(&group.first_rows).zip(tables) {
            parts.push(RansPart {
                table,
                chunks: (0..tensor.chunk_count()).map(|chunk| (tensor.chunk(chunk), tensor.chunk_row_tiles(chunk).len())).collect(),
                cols: tensor.cols(),
                row_tile: first_row / TILE_ROWS,
                far_max: tensor.header().wide_count as usize,
            });
        }
        if self.rans.is_none() {
            self.rans = Some(RansDecoder::new(self.device())?);
        }
        let decoder = self.rans.as_mut().expect("just made");
        decoder.decode(self.kernels, group.geometry, low_bits, &parts).map_err(|e| match e {
            CudaError::Corrupt { .. } => {
                let names: Vec<&str> = self.tensors(group).map(|(name, _)| name).collect();
                OpenError::Device { cause: format!("{}: {e}", names.join(", ")) }
            }
            other => other.into(),
        })
    }

    /// Gives the coded bytes of a group back to the system.
    pub fn release(&self, index: usize) {
        for (name, _) in self.tensors(&self.groups.all[index]) {
            self.dir.release(name);
        }
    }
}

/// `f(0..n)` in order; `f` is told how many threads it may take: all `threads` where it runs alone. The first `alone` come one after the other, so that what is
/// chosen for the groups of a kind is always chosen by the same one; of the others some at a time. None begins behind an error.
fn side_by_side<T: Send, E: Send>(
    n: usize,
    alone: usize,
    threads: usize,
    f: impl Fn(usize, usize) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    let mut results = (0..n.min(alone)).map(|i| f(i, threads)).collect::<Result<Vec<T>, E>>()?;
    let (first, failed) = (results.len(), AtomicBool::new(false));
    let workers = SIDE_BY_SIDE_MAX.min(threads).min(n - first).max(1);
    let others = parallel::map(
        n - first,
        workers,
        || (),
        |(), i| {
            let result = (!failed.load(Ordering::Relaxed)).then(|| f(first + i, threads / workers));
            failed.fetch_or(matches!(result, Some(Err(_))), Ordering::Relaxed);
            result
        },
    );
    // One is left out only where another holds the error.
    for result in others.into_iter().flatten() {
        results.push(result?);
    }
    Ok(results)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_side_by_side_come_in_order() {
        for (n, alone, threads) in [(0, 4, 2), (3, 4, 16), (50, 4, 1), (50, 4, 3), (50, 0, 16)] {
            let results = side_by_side(n, alone, threads, |i, share| {
                match i < alone {
                    true => assert_eq!(share, threads),
                    false => assert!(share * SIDE_BY_SIDE_MAX.min(threads).min(n - alone) <= threads && share > 0),
                }
                Ok::<usize, ()>(i * i)
            });
            assert_eq!(results, Ok((0..n).map(|i| i * i).collect()), "{n} {alone} {threads}");
        }
        assert_eq!(side_by_side(100, 4, 2, |i, _| if i == 7 { Err(i) } else { Ok(()) }), Err(7));
        assert_eq!(side_by_side(100, 4, 2, |i, _| if i == 3 { Err(i) } else { Ok(()) }), Err(3));
    }

    #[test]
    fn rows_of_a_tile_of_the_file() {
        let (cols, mut out) = (8, vec![0; 16 * 8]);
        put_rows(&mut out, cols, |at| std::array::from_fn(|i| (at + i) as i16));
        for (i, symbol) in out.into_iter().enumerate() {
            let (row, col) = (i / cols, i % cols);
            assert_eq!(usize::try_from(symbol), Ok(col / 4 * TILE_SYMBOLS + row * 4 + col % 4));
        }
    }
}
