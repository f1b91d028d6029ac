//! The matrices of a model as a directory holds them: found, measured, and checked against their checksums.

use super::budget::Footprint;
use super::cost::MatrixCost;
use super::{OpenError, Options};
use crate::model::config::Config;
use crate::model::llama::SLICE_TOKENS_MAX;
use crate::model::names::{self, LinearInfo};
use crate::model::weights::{LinearId, LinearKind};
use crate::model::{find, wrong_form};
use std::sync::Mutex;
use tersor_codec::Table;
use tersor_cpu::{Dense, DenseType, KernelScales, Pool};
use tersor_format::{CodedTensor, DecodedForm, Dtype, ModelDir, RawTensor, Tensor};

/// Chunks that a kernel of `tersor_cpu` decodes side by side, to hide latencies.
const CHUNKS_TOGETHER: u64 = 4;

/// Tensors for each thread that are read ahead of the one being checked.
const FETCHED_AHEAD: usize = 4;

/// One matrix as it is stored.
#[derive(Clone, Debug)]
pub(crate) struct Linear {
    pub id: LinearId,
    /// Name of its tensor, as the model calls it.
    pub name: String,
    pub source: Source,
}

/// The stored form.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    /// Entropy coded, with scales as the kernels read them.
    Coded { tensor: CodedTensor, scales: KernelScales },
    /// Float elements in the mapped file; multiplied as they are.
    Raw(RawMatrix),
}

/// A matrix of F32, BF16 or F16.
#[derive(Clone, Debug)]
pub(crate) struct RawMatrix {
    tensor: RawTensor,
    dtype: DenseType,
}

impl RawMatrix {
    /// `None` for other dtypes.
    fn new(tensor: RawTensor) -> Option<Self> {
        let dtype = match tensor.dtype() {
            Dtype::F32 => DenseType::F32,
            Dtype::Bf16 => DenseType::Bf16,
            Dtype::F16 => DenseType::F16,
            _ => return None,
        };
        Some(Self { tensor, dtype })
    }

    pub fn dense(&self) -> Dense<'_> {
        // RawTensor has checked its shape against its bytes, TensorSet that there are two dimensions.
        let shape = self.tensor.shape();
        Dense::new(self.dtype, shape[0], shape[1], self.tensor.bytes())
    }
}

impl Linear {
    pub fn coded(&self) -> Option<&CodedTensor> {
        match &self.source {
            Source::Coded { tensor, .. } => Some(tensor),
            Source::Raw(_) => None,
        }
    }

    /// Bytes that stay mapped while the matrix is held as it is stored.
    pub fn mapped_bytes(&self) -> u64 {
        match &self.source {
            Source::Coded { tensor, .. } => tensor.coded_bytes(),
            Source::Raw(raw) => raw.tensor.bytes().len() as u64,
        }
    }

    /// Bytes of the decoded form; 0 for a matrix that is not coded.
    pub fn decoded_bytes(&self) -> u64 {
        self.coded().map_or(0, CodedTensor::decoded_bytes)
    }

    /// Bytes of scales and biases, which every form needs.
    pub fn scale_bytes(&self) -> u64 {
        match &self.source {
            Source::Coded { scales, .. } => scales.bytes(),
            Source::Raw(_) => 0,
        }
    }

    /// Bytes of the decoding table and the chunk index, which only the coded form needs.
    pub fn table_bytes(&self) -> u64 {
        self.coded().map_or(0, |tensor| table_bytes(tensor.table()) + 8 * tensor.chunk_count() as u64)
    }

    /// What its prices depend on; `None` for a matrix that is not coded.
    pub fn cost(&self) -> Option<MatrixCost> {
        self.coded().map(|tensor| MatrixCost {
            codec: tensor.codec(),
            weights: tensor.header().symbols(),
            coded_bytes: tensor.coded_bytes() + self.table_bytes(),
            decoded_bytes: tensor.decoded_bytes(),
            decoded_bits: DecodedForm::choose(tensor.header()).bits,
        })
    }

    /// Name of the kind as people read it: the tensor's name without the layer's number.
    pub fn group(&self) -> &'static str {
        match self.id.kind {
            LinearKind::Embed => "embed",
            LinearKind::Q => "q",
            LinearKind::K => "k",
            LinearKind::V => "v",
            LinearKind::O => "o",
            LinearKind::Gate => "gate",
            LinearKind::Up => "up",
            LinearKind::Down => "down",
            LinearKind::Head => "head",
        }
    }
}

/// Memory of a decoding table: what is looked up by the next bits of a stream.
fn table_bytes(table: &Table) -> u64 {
    // A slot of rans: frequency and offset of two bytes each, and the symbol byte.
    const SLOT_BYTES: usize = 5;
    let bytes = match table {
        Table::Rans(table) => SLOT_BYTES * table.slots().freq.len(),
        Table::BlockAns(table) => SLOT_BYTES * table.slots().freq.len(),
        Table::Huffman(table) => size_of_val(table.lookup()),
        Table::RansPairs(table) => size_of_val(table.slots()),
        _ => 0,
    };
    bytes as u64
}

/// All matrices of a model, in the order of `names::linears`: embedding, layers, head (unless tied).
#[derive(Debug)]
pub(crate) struct TensorSet {
    pub linears: Vec<Linear>,
    pub index: Index,
    /// Norms and biases as f32.
    small_bytes: u64,
}

/// Where a matrix is found among a model's matrices.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Index {
    pub layers: usize,
    pub tied: bool,
}

impl Index {
    pub const PER_LAYER: usize = LinearKind::IN_LAYER.len();

    /// Position of `id` in [`TensorSet::linears`], if the model has it.
    pub fn of(self, id: LinearId) -> Option<usize> {
        let layer = usize::from(id.layer);
        match id.kind {
            LinearKind::Embed => Some(0),
            LinearKind::Head if self.tied => Some(0),
            LinearKind::Head => Some(1 + self.layers * Self::PER_LAYER),
            kind if layer < self.layers => {
                let position = LinearKind::IN_LAYER.iter().position(|&other| other == kind)?;
                Some(1 + layer * Self::PER_LAYER + position)
            }
            _ => None,
        }
    }
}

impl TensorSet {
    /// Finds every matrix of the model and checks its shape. Reads headers and scales, no chunk.
    pub fn open(dir: &ModelDir) -> Result<Self, OpenError> {
        let config = Config::from_json(dir.path(), dir.config(), None)?;
        let infos = names::linears(&config);
        let linears = infos.into_iter().map(|info| open_linear(dir, info)).collect::<Result<Vec<_>, _>>()?;
        let is_linear = |name: &str| linears.iter().any(|linear| linear.name == name);
        let small_elements = dir.tensors().filter_map(|(name, tensor)| match tensor {
            Tensor::Raw(raw) if raw.shape().len() < 2 && !is_linear(name) => Some(raw.len() as u64),
            _ => None,
        });
        let small_bytes = 4 * small_elements.sum::<u64>();
        Ok(Self { linears, index: Index { layers: config.layers, tied: config.tied }, small_bytes })
    }

    /// Whether matrix `slot` is multiplied by: an embedding that the head is not tied to is only read, row by row.
    pub fn is_multiplied(&self, slot: usize) -> bool {
        slot > 0 || self.index.tied
    }

    /// About what a step reads: the mean of the coded and the decoded size of what is multiplied by.
    pub fn working_set_bytes(&self) -> u64 {
        let of = |slot: usize| {
            let linear = &self.linears[slot];
            linear.coded().map_or(linear.mapped_bytes(), |coded| (coded.coded_bytes() + coded.decoded_bytes()) / 2)
        };
        (0..self.linears.len()).filter(|&slot| self.is_multiplied(slot)).map(of).fold(0, u64::saturating_add)
    }

    /// Positions of the matrices of `layer`.
    pub fn layer(&self, layer: usize) -> std::ops::Range<usize> {
        let start = 1 + layer * Index::PER_LAYER;
        start..start + Index::PER_LAYER
    }

    /// What is held if all matrices stay as they are stored.
    pub fn footprint(&self, options: &Options) -> Footprint {
        self.footprint_with(options, &vec![false; self.linears.len()])
    }

    /// What is held if the matrices marked in `decoded` are held decoded, the others as they are stored.
    pub fn footprint_with(&self, options: &Options, decoded: &[bool]) -> Footprint {
        let mut footprint = Footprint {
            model_bytes: options.model_bytes.max(self.small_bytes),
            scratch_bytes: self.scratch_bytes(options.threads),
            kv_bytes: options.kv_bytes,
            ..Footprint::default()
        };
        for (linear, &decoded) in self.linears.iter().zip(decoded) {
            footprint.scale_bytes += linear.scale_bytes();
            if decoded && linear.coded().is_some() {
                footprint.decoded_bytes += linear.decoded_bytes();
            } else {
                footprint.mapped_bytes += linear.mapped_bytes();
                footprint.table_bytes += linear.table_bytes();
            }
        }
        footprint
    }

    /// int8 activations of a slice with the widest matrix (one byte a column, 8 bytes a segment), and for each thread the symbol bytes of
    /// the chunks that a kernel decodes together.
    fn scratch_bytes(&self, threads: usize) -> u64 {
        let activations = |linear: &Linear| match &linear.source {
            Source::Coded { tensor, scales } => {
                let segments = tensor.cols().div_ceil(scales.segment());
                (SLICE_TOKENS_MAX * (tensor.cols_padded() + 8 * segments)) as u64
            }
            Source::Raw(_) => 0,
        };
        let chunk = |tensor: &CodedTensor| (0..tensor.chunk_count().min(1)).map(|first| tensor.chunk_symbols(first) as u64).sum();
        let activations = self.linears.iter().map(activations).max().unwrap_or(0);
        let chunk: u64 = self.linears.iter().filter_map(Linear::coded).map(chunk).max().unwrap_or(0);
        activations + threads.max(1) as u64 * CHUNKS_TOGETHER * chunk
    }

    /// Whether matrix `slot` is the embedding or the head.
    pub fn is_outside_layers(&self, slot: usize) -> bool {
        slot == 0 || slot > self.index.layers * Index::PER_LAYER
    }
}

fn open_linear(dir: &ModelDir, info: LinearInfo) -> Result<Linear, OpenError> {
    let tensor = find(dir, &info.name, &[info.rows, info.cols])?;
    let unusable = |found: String| wrong_form(dir, &info.name, "entropy coded, F32, BF16 or F16", found);
    let source = match tensor {
        Tensor::Coded(tensor) => {
            let scales = KernelScales::from_coded(tensor);
            let scales = scales.map_err(|cause| OpenError::Scales { place: dir.place(&info.name), cause })?;
            Source::Coded { tensor: tensor.clone(), scales }
        }
        Tensor::Raw(raw) => Source::Raw(RawMatrix::new(raw.clone()).ok_or_else(|| unusable(raw.dtype().to_string()))?),
        _ => return Err(unusable("of an unknown kind".to_owned()).into()),
    };
    Ok(Linear { id: info.id, name: info.name, source })
}

/// Compares the checksums of every tensor of the directory, in parallel, the largest first; `then(name)` runs on the same thread
/// right after the check of a tensor, while its bytes are still in the cache.
///
/// The error is that of the first bad tensor in the order of names, whatever the number of threads: damage does not end the sweep.
pub(crate) fn verify(dir: &ModelDir, pool: &Pool, then: &(dyn Fn(&str) -> Result<(), OpenError> + Sync)) -> Result<(), OpenError> {
    let mut tensors: Vec<(&str, &Tensor)> = dir.tensors().collect();
    tensors.sort_by_key(|(_, tensor)| std::cmp::Reverse(tensor.bytes()));
    let failures: Mutex<Vec<(&str, OpenError)>> = Mutex::new(Vec::new());
    // From a disk, the next tensors are on their way while this one is checked.
    let ahead = FETCHED_AHEAD * pool.threads();
    tensors.iter().take(ahead).for_each(|(name, _)| dir.fetch(name));
    pool.run(tensors.len(), &|task| {
        let (name, tensor) = tensors[task];
        if let Some((next, _)) = tensors.get(task + ahead) {
            dir.fetch(next);
        }
        if let Err(error) = check(dir, name, tensor).and_then(|()| then(name)) {
            failures.lock().unwrap_or_else(|e| e.into_inner()).push((name, error));
        }
    });
    let failures = failures.into_inner().unwrap_or_else(|e| e.into_inner());
    failures.into_iter().min_by(|(a, _), (b, _)| a.cmp(b)).map_or(Ok(()), |(_, error)| Err(error))
}

/// The format's error names file and tensor; this adds the chunk.
fn check(dir: &ModelDir, name: &str, tensor: &Tensor) -> Result<(), OpenError> {
    let Err(cause) = dir.check(name) else { return Ok(()) };
    let chunk = match tensor {
        Tensor::Coded(tensor) => (0..tensor.chunk_count()).find(|&chunk| !tensor.chunk_checksum_ok(chunk)),
        _ => None,
    };
    Err(match chunk {
        Some(chunk) => OpenError::CorruptChunk { chunk, cause },
        None => OpenError::Format(cause),
    })
}
