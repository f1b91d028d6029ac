//! What one machine can do: read bandwidth and the rates of the kernels, measured once and kept as a small JSON file.
//!
//! Everything is measured with the kernels that the strategies use, in one run, so that ratios hold even where the machine is busy. A rate is
//! that of the fastest tenth of many short runs: other processes can only make a kernel look slower. Products with one token are measured on working
//! sets larger than the caches, where the weights of large models live, and on one matrix, for models that fit.

use crate::machine::cpu_name;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs;
use std::hint::black_box;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tersor_codec::{Codec, fixed};
use tersor_cpu::{Activations, Decoded, Job, KernelError, KernelScales, Level, Matrix, Pool, decode_into, matmul, read_bandwidth};
use tersor_format::{Bytes, CHUNK_SYMBOLS_TARGET, CodedTensor, EncodeTensorError, TensorError, encode_tensor};
use tersor_quant::{QuantizedTensor, Scales};
use thiserror::Error;

/// Version of the JSON document; another one is measured again.
const VERSION: u32 = 4;
/// Rows and columns of the sample matrix.
const SAMPLE: (usize, usize) = (1024, 2048);
/// Bytes that are timed at once when bandwidth is measured.
const PART_BYTES: usize = 2 << 20;
/// Tokens that share a call when the rate of multiplication is measured.
const BATCH: usize = 16;

/// Rates of one codec, with all threads of the profile.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct CodecRates {
    /// Id of the codec, with its parameters.
    pub codec: String,
    /// Coded size of the sample, bits per weight.
    pub sample_bpw: f64,
    /// Decoding fused with the product by one token, weights per second, coded bytes from memory.
    pub fused_weights_per_second: f64,
    /// The same with the coded bytes in the caches.
    pub fused_cache_weights_per_second: f64,
    /// Decoding to memory, weights per second.
    pub decode_weights_per_second: f64,
    /// Multiplications by each token after the first in one call, weights times tokens per second.
    pub macs_per_second: f64,
}

/// Rates of the product with a decoded matrix, with all threads of the profile.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PlainRates {
    /// Bits of a field of the decoded form: 4 or 8.
    pub bits: u8,
    /// The product by one token, weights per second, decoded bytes from memory.
    pub weights_per_second: f64,
    /// The same with the decoded bytes in the caches.
    pub cache_weights_per_second: f64,
    /// Multiplications by each token after the first in one call, weights times tokens per second.
    pub macs_per_second: f64,
}

/// The measured profile of one machine at one SIMD level with one number of threads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct MachineProfile {
    /// Version of this document.
    pub version: u32,
    /// Version of the library whose kernels were measured.
    pub library: String,
    /// Name of the processor.
    pub cpu: String,
    /// SIMD level.
    pub level: String,
    /// Threads of every rate below.
    pub threads: usize,
    /// Sequential read bandwidth, bytes per second, by number of threads: 1, 2, 4, ... and `threads`.
    pub read_bytes_per_second: BTreeMap<usize, f64>,
    /// Read bandwidth again and again over one buffer, bytes per second with `threads` threads, by size of the buffer in MiB: where it falls, the
    /// caches end.
    pub read_bytes_per_second_by_mib: BTreeMap<u64, f64>,
    /// Products with decoded matrices.
    pub plain: Vec<PlainRates>,
    /// Every codec that `tersor quantize` writes.
    pub codecs: Vec<CodecRates>,
    /// How long the measurement took, seconds.
    pub measured_seconds: f64,
}

/// Why there is no profile.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ProfileError {
    /// The sample could not be encoded.
    #[error("machine profile: cannot encode the sample: {0}")]
    Encode(#[from] EncodeTensorError),
    /// The sample could not be opened.
    #[error("machine profile: cannot open the sample: {0}")]
    Open(#[from] TensorError),
    /// A kernel refused the sample.
    #[error("machine profile: {codec}: {cause}")]
    Kernel {
        /// Id of the codec.
        codec: String,
        /// What the kernel said.
        cause: KernelError,
    },
}

/// How much time a measurement may take.
#[derive(Clone, Copy, Debug)]
struct Effort {
    /// For how long each rate is measured.
    duration: Duration,
    /// Bytes of each working set that is to come from memory; bandwidth is measured on twice as much.
    working_set_bytes: usize,
}

impl Effort {
    /// About 1.5 s in all: some 40 rates, and the preparation of the samples.
    const FULL: Self = Self { duration: Duration::from_millis(15), working_set_bytes: 48 << 20 };
}

impl MachineProfile {
    /// Measures. Takes less than 3 s with optimized kernels, about 100 MiB of memory, and `threads` threads.
    ///
    /// # Errors
    /// [`ProfileError`] if the sample cannot be made or a kernel fails on it.
    pub fn measure(level: Level, threads: usize) -> Result<Self, ProfileError> {
        Self::measure_with(level, threads, Effort::FULL)
    }

    /// The profile kept in `cache_dir`, if it is of this library version, processor, level and number of threads; otherwise measures and
    /// keeps the result there. A cache that cannot be read or written costs the time of measuring, no error.
    ///
    /// # Errors
    /// As [`measure`](Self::measure).
    pub fn load_or_measure(cache_dir: &Path, level: Level, threads: usize) -> Result<Self, ProfileError> {
        if let Some(profile) = Self::load(cache_dir, level, threads) {
            return Ok(profile);
        }
        let profile = Self::measure(level, threads)?;
        // The cache directory may be read-only, or full: the profile is as good without being kept.
        let _ = profile.store(cache_dir);
        Ok(profile)
    }

    /// The profile kept in `cache_dir`; `None` if there is none, it is damaged, or it is not of this library version, processor, level and
    /// number of threads.
    #[must_use]
    pub fn load(cache_dir: &Path, level: Level, threads: usize) -> Option<Self> {
        let bytes = fs::read(Self::path(cache_dir, level, threads)).ok()?;
        let profile: Self = serde_json::from_slice(&bytes).ok()?;
        let fits = profile.version == VERSION
            && profile.library == env!("CARGO_PKG_VERSION")
            && profile.cpu == cpu_name()
            && profile.level == level.name()
            && profile.threads == threads.max(1)
            && profile.is_sane();
        fits.then_some(profile)
    }

    /// Keeps the profile in `cache_dir`, which is made if need be. Readers see the old file or the new one, never a part.
    ///
    /// # Errors
    /// What the system says.
    pub fn store(&self, cache_dir: &Path) -> io::Result<()> {
        fs::create_dir_all(cache_dir)?;
        let path = cache_dir.join(file_name(&self.level, self.threads));
        let temporary = path.with_extension(format!("tmp-{}", std::process::id()));
        let write = || {
            let mut file = fs::File::create(&temporary)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)
        };
        let result = write();
        if result.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        result
    }

    /// Where a profile is kept in `cache_dir`.
    #[must_use]
    pub fn path(cache_dir: &Path, level: Level, threads: usize) -> PathBuf {
        cache_dir.join(file_name(level.name(), threads.max(1)))
    }

    /// Read bandwidth with `threads` threads, bytes per second; between the measured numbers by linear interpolation.
    #[must_use]
    pub fn read_bytes_per_second(&self, threads: usize) -> f64 {
        let below = self.read_bytes_per_second.range(..=threads).next_back();
        let above = self.read_bytes_per_second.range(threads..).next();
        match (below, above) {
            (Some((&t0, &b0)), Some((&t1, &b1))) if t1 > t0 => b0 + (b1 - b0) * (threads - t0) as f64 / (t1 - t0) as f64,
            (Some((_, &b)), _) | (None, Some((_, &b))) => b,
            (None, None) => f64::INFINITY,
        }
    }

    /// How much faster products with decoded matrices read the memory than the loop that measured its bandwidth; at least 1. What is priced by its bytes
    /// would otherwise look slower than it was measured, and what is priced by its rate would not.
    pub(super) fn product_speedup(&self) -> f64 {
        let read = self.read_bytes_per_second(self.threads);
        self.plain.iter().map(|rates| rates.weights_per_second * f64::from(rates.bits) / 8.0 / read).fold(1.0, f64::max)
    }

    /// How much faster than from memory a working set of `bytes` is read that is read again and again; at least 1.
    pub(super) fn cache_speedup(&self, bytes: u64) -> f64 {
        let Some((_, in_memory)) = self.read_bytes_per_second_by_mib.last_key_value() else { return 1.0 };
        // The smallest measured buffer that the working set fits into.
        let fitting = self.read_bytes_per_second_by_mib.range(bytes.div_ceil(1 << 20)..).next();
        fitting.map_or(1.0, |(_, rate)| (rate / in_memory).max(1.0))
    }

    /// What part of a working set of `bytes` comes from memory in each step: 0 if it is read as fast as the smallest that was measured, 1 if as fast
    /// as the largest.
    pub(super) fn memory_share(&self, bytes: u64) -> f64 {
        let (speedup, best) = (self.cache_speedup(bytes), self.cache_speedup(0));
        // Times, not speeds, are what adds up.
        if best <= 1.0 { 1.0 } else { ((1.0 / speedup - 1.0 / best) / (1.0 - 1.0 / best)).clamp(0.0, 1.0) }
    }

    /// The rates of `codec`; of one with other parameters, the slowest codec of its kind; of one that was not measured, the slowest of all.
    pub(super) fn codec(&self, codec: Codec) -> &CodecRates {
        let (id, kind) = (codec.to_string(), codec.kind().name());
        let slowest = |wanted: &dyn Fn(&CodecRates) -> bool| {
            let rates = self.codecs.iter().filter(|rates| wanted(rates));
            rates.min_by(|a, b| a.fused_weights_per_second.total_cmp(&b.fused_weights_per_second))
        };
        slowest(&|rates| rates.codec == id)
            .or_else(|| slowest(&|rates| rates.codec.split('/').next() == Some(kind)))
            .or_else(|| slowest(&|_| true))
            .expect("a profile has codecs: checked when it is loaded")
    }

    /// The rates of the product with a decoded matrix of `bits`-bit fields.
    pub(super) fn plain(&self, bits: u8) -> &PlainRates {
        let found = self.plain.iter().find(|rates| rates.bits == bits);
        found.or_else(|| self.plain.first()).expect("a profile has plain products: checked when it is loaded")
    }

    /// Whether every rate can be divided by. The file may have been edited.
    fn is_sane(&self) -> bool {
        let codecs = self
            .codecs
            .iter()
            .flat_map(|r| [r.fused_weights_per_second, r.fused_cache_weights_per_second, r.decode_weights_per_second, r.macs_per_second]);
        let plain = self.plain.iter().flat_map(|r| [r.weights_per_second, r.cache_weights_per_second, r.macs_per_second]);
        let bandwidths = self.read_bytes_per_second.values().chain(self.read_bytes_per_second_by_mib.values());
        let mut rates = codecs.chain(plain).chain(bandwidths.copied());
        !self.codecs.is_empty()
            && !self.plain.is_empty()
            && !self.read_bytes_per_second.is_empty()
            && !self.read_bytes_per_second_by_mib.is_empty()
            && rates.all(|rate| rate.is_finite() && rate > 0.0)
    }

    fn measure_with(level: Level, threads: usize, effort: Effort) -> Result<Self, ProfileError> {
        let start = Instant::now();
        let threads = threads.max(1);
        let pool = Pool::new(threads);
        let bench = Bench { pool: &pool, level, effort };
        // Symbols of 3 and of 5 bits of entropy: the first decode to nibbles with a few escapes, the second to bytes.
        let narrow = sample(2.0);
        let plain = [bench.plain(&narrow, 4)?, bench.plain(&sample(8.0), 8)?].to_vec();
        let codecs = Codec::SHORT_NAMES.iter().map(|(_, codec)| bench.codec(&narrow, *codec));
        let codecs = codecs.collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            version: VERSION,
            library: env!("CARGO_PKG_VERSION").to_owned(),
            cpu: cpu_name(),
            level: level.name().to_owned(),
            threads,
            read_bytes_per_second: bandwidth(level, threads, effort),
            read_bytes_per_second_by_mib: bandwidth_by_mib(&pool, level, effort),
            plain,
            codecs,
            measured_seconds: rounded(start.elapsed().as_secs_f64(), 1e3),
        })
    }
}

fn file_name(level: &str, threads: usize) -> String {
    format!("profile-{level}-{threads}.json")
}

/// Rounded to a multiple of `1 / parts`: short decimals survive JSON exactly, and the digits beyond are noise.
fn rounded(value: f64, parts: f64) -> f64 {
    (value * parts).round() / parts
}

/// A matrix of normally distributed symbols with standard deviation `deviation`; the same on every machine.
fn sample(deviation: f64) -> QuantizedTensor {
    let (rows, cols) = SAMPLE;
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut uniform = || {
        // splitmix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    // Four uniforms in sum look normal enough; their variance is 1/3.
    let mut normal = || 3f64.sqrt() * ((0..4).map(|_| uniform()).sum::<f64>() - 2.0);
    let symbols = (0..rows * cols).map(|_| (deviation * normal()).round() as i16).collect();
    let scales = Scales::Row { scales: vec![half::f16::ONE.to_bits(); rows], scale_exponent: 0 };
    QuantizedTensor { rows, cols, symbols, scales }
}

/// Measures kernels.
struct Bench<'a> {
    pool: &'a Pool,
    level: Level,
    effort: Effort,
}

impl Bench<'_> {
    /// The plain product. The codec only serves to make the decoded form.
    fn plain(&self, sample: &QuantizedTensor, bits: u8) -> Result<PlainRates, ProfileError> {
        let codec = Codec::Fixed(fixed::Params { bits: 8 });
        let tensor = encode_tensor(sample, codec, CHUNK_SYMBOLS_TARGET)?.tensor().clone();
        debug_assert_eq!(tensor.decoded_form().bits, bits);
        let kernel = |cause| ProfileError::Kernel { codec: format!("decoded/b{bits}"), cause };
        let copies = (0..self.copies(tensor.decoded_bytes())).map(|_| {
            let mut decoded = Decoded::new();
            decode_into(self.level, &tensor, &mut decoded, Some(self.pool)).map(|()| decoded)
        });
        let copies = copies.collect::<Result<Vec<_>, _>>().map_err(kernel)?;
        let copies: Vec<Matrix<'_>> = copies.iter().map(Matrix::Decoded).collect();
        let [weights_per_second, cache_weights_per_second, macs_per_second] = self.products(&tensor, &copies).map_err(kernel)?;
        Ok(PlainRates { bits, weights_per_second, cache_weights_per_second, macs_per_second })
    }

    fn codec(&self, sample: &QuantizedTensor, codec: Codec) -> Result<CodecRates, ProfileError> {
        let encoded = encode_tensor(sample, codec, CHUNK_SYMBOLS_TARGET)?;
        let copy = || {
            let blob = Bytes::from(encoded.blob().to_vec());
            CodedTensor::open(blob, encoded.scales().clone(), encoded.biases().cloned())
        };
        let copies = (0..self.copies(encoded.tensor().coded_bytes())).map(|_| copy()).collect::<Result<Vec<_>, _>>()?;
        let kernel = |cause| ProfileError::Kernel { codec: codec.to_string(), cause };
        let matrices: Vec<Matrix<'_>> = copies.iter().map(Matrix::Coded).collect();
        let products = self.products(encoded.tensor(), &matrices).map_err(kernel)?;
        let [fused_weights_per_second, fused_cache_weights_per_second, macs_per_second] = products;
        // Two buffers, as prefetch has.
        let mut buffers = [Decoded::new(), Decoded::new()];
        let mut next = 0;
        let seconds = self.seconds(|| {
            let tensor = &copies[next % copies.len()];
            next += 1;
            decode_into(self.level, tensor, &mut buffers[next % 2], Some(self.pool))
        });
        let weights = (SAMPLE.0 * SAMPLE.1) as f64;
        Ok(CodecRates {
            codec: codec.to_string(),
            sample_bpw: rounded(8.0 * encoded.tensor().coded_bytes() as f64 / weights, 1e3),
            fused_weights_per_second,
            fused_cache_weights_per_second,
            decode_weights_per_second: rounded(weights / seconds.map_err(kernel)?, 1.0),
            macs_per_second,
        })
    }

    /// How many copies of `bytes` make a working set larger than the caches.
    fn copies(&self, bytes: u64) -> usize {
        (self.effort.working_set_bytes as u64 / bytes.max(1)).max(1) as usize
    }

    /// Weights per second of a product with one token, from memory and from the caches, and weights times tokens per second of each further token.
    fn products(&self, tensor: &CodedTensor, copies: &[Matrix<'_>]) -> Result<[f64; 3], KernelError> {
        let ones = vec![1.0f32; tensor.rows()];
        let scales = KernelScales::from_rows(&ones, tensor.cols());
        let seconds = |tokens: usize, copies: &[Matrix<'_>]| {
            let x: Vec<f32> = (0..tokens * tensor.cols()).map(|i| ((i * 37) % 101) as f32 - 50.0).collect();
            let x = Activations::quantize(self.level, &x, tokens, tensor.cols(), scales.segment());
            let mut out = vec![0.0; tokens * tensor.rows()];
            let mut next = 0;
            self.seconds(|| {
                let matrix = copies[next % copies.len()];
                next += 1;
                let result = matmul(self.pool, self.level, &mut [Job { matrix, scales: &scales, x: &x, out: &mut out }]);
                black_box(&mut out);
                result
            })
        };
        let (one, one_in_cache, batch) = (seconds(1, copies)?, seconds(1, &copies[..1])?, seconds(BATCH, &copies[..1])?);
        let weights = (SAMPLE.0 * SAMPLE.1) as f64;
        // Where noise makes the batch look free, the rate is bounded by the batch as a whole.
        let more = (batch - one_in_cache).max(batch * 0.01) / (BATCH - 1) as f64;
        Ok([one, one_in_cache, more].map(|seconds| rounded(weights / seconds, 1.0)))
    }

    /// Seconds of one `work`.
    fn seconds(&self, mut work: impl FnMut() -> Result<(), KernelError>) -> Result<f64, KernelError> {
        work()?;
        fast_tenth(self.effort.duration, || {
            let start = Instant::now();
            work()?;
            Ok(start.elapsed().as_secs_f64())
        })
    }
}

/// Has runs measured for `duration`, three at least, and returns the result below which a tenth of them lie: free of preemptions, and of the
/// luckiest runs.
fn fast_tenth<E>(duration: Duration, mut seconds: impl FnMut() -> Result<f64, E>) -> Result<f64, E> {
    let start = Instant::now();
    let mut runs = Vec::new();
    while runs.len() < 3 || start.elapsed() < duration {
        runs.push(seconds()?.max(1e-9));
    }
    runs.sort_by(f64::total_cmp);
    Ok(runs[runs.len() / 10])
}

/// Read bandwidth from memory in bytes per second, for 1, 2, 4, ... and `threads` threads.
fn bandwidth(level: Level, threads: usize, effort: Effort) -> BTreeMap<usize, f64> {
    // Not zeros, whose pages might be shared.
    let buffer = vec![1u8; 2 * effort.working_set_bytes];
    let mut counts: Vec<usize> = std::iter::successors(Some(1), |n| Some(2 * n)).take_while(|&n| n < threads).collect();
    counts.push(threads);
    let measure = |threads: usize| sweep(&Pool::new(threads), level, &buffer, effort);
    counts.into_iter().map(|threads| (threads, measure(threads))).collect()
}

/// Read bandwidth of buffers of 2, 4, 8, ... MiB that are read again and again.
fn bandwidth_by_mib(pool: &Pool, level: Level, effort: Effort) -> BTreeMap<u64, f64> {
    let buffer = vec![1u8; 2 * effort.working_set_bytes];
    let sizes = std::iter::successors(Some(PART_BYTES), |size| Some(2 * size)).take_while(|&size| size < buffer.len());
    let sizes = sizes.chain([buffer.len()]);
    sizes.map(|size| ((size >> 20) as u64, sweep(pool, level, &buffer[..size], effort))).collect()
}

/// Bytes per second of reading `buffer` again and again. Timed in parts, which are too short to be preempted often; each part was last read a whole
/// sweep ago.
fn sweep(pool: &Pool, level: Level, buffer: &[u8], effort: Effort) -> f64 {
    let parts = buffer.as_chunks::<PART_BYTES>().0;
    let mut next = 0;
    let mut seconds = || {
        next += 1;
        Ok::<_, Infallible>(PART_BYTES as f64 / read_bandwidth(pool, level, &parts[next % parts.len()], 1))
    };
    for _ in 0..parts.len() {
        let Ok(_) = seconds();
    }
    let Ok(seconds) = fast_tenth(effort.duration, seconds);
    rounded(PART_BYTES as f64 / seconds, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As much as the caching logic needs; the rates mean nothing.
    const QUICK: Effort = Effort { duration: Duration::ZERO, working_set_bytes: 2 << 20 };

    #[test]
    fn measures_keeps_and_invalidates() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("new").join("cache");
        let level = Level::best();
        assert_eq!(MachineProfile::load(&cache, level, 1), None);
        let profile = MachineProfile::measure_with(level, 1, QUICK).unwrap();
        assert!(profile.is_sane());
        assert_eq!((profile.codecs.len(), profile.plain.len()), (Codec::SHORT_NAMES.len(), 2));
        assert_eq!(profile.plain.iter().map(|p| p.bits).collect::<Vec<_>>(), [4, 8]);

        profile.store(&cache).unwrap();
        let path = MachineProfile::path(&cache, level, 1);
        assert_eq!(MachineProfile::load(&cache, level, 1), Some(profile.clone()));
        assert_eq!(fs::read_dir(&cache).unwrap().count(), 1, "no temporary file stays");
        assert_eq!(MachineProfile::load_or_measure(&cache, level, 1).unwrap(), profile, "the kept one, not measured again");
        assert_eq!(MachineProfile::load(&cache, level, 2), None, "another number of threads");

        let edit = |edit: &dyn Fn(&mut MachineProfile)| {
            let mut other = profile.clone();
            edit(&mut other);
            fs::write(&path, serde_json::to_vec(&other).unwrap()).unwrap();
            MachineProfile::load(&cache, level, 1)
        };
        assert_eq!(edit(&|_| ()), Some(profile.clone()));
        assert_eq!(edit(&|p| p.version += 1), None);
        assert_eq!(edit(&|p| p.library = "0.0.0".to_owned()), None);
        assert_eq!(edit(&|p| p.cpu.push('x')), None);
        assert_eq!(edit(&|p| p.level = "other".to_owned()), None);
        assert_eq!(edit(&|p| p.threads = 9), None);
        assert_eq!(edit(&|p| p.codecs.clear()), None);
        assert_eq!(edit(&|p| p.plain[0].weights_per_second = 0.0), None);
        fs::write(&path, b"{ not json").unwrap();
        assert_eq!(MachineProfile::load(&cache, level, 1), None);
    }

    #[test]
    fn rates_of_codecs_that_were_not_measured_are_the_slowest_of_their_kind() {
        let rates = |codec: &str, rate: f64| CodecRates {
            codec: codec.to_owned(),
            sample_bpw: 3.0,
            fused_weights_per_second: rate,
            fused_cache_weights_per_second: rate,
            decode_weights_per_second: rate,
            macs_per_second: rate,
        };
        let profile = MachineProfile {
            version: VERSION,
            library: String::new(),
            cpu: String::new(),
            level: String::new(),
            threads: 2,
            read_bytes_per_second: BTreeMap::from([(1, 10.0), (2, 18.0), (8, 30.0)]),
            read_bytes_per_second_by_mib: BTreeMap::from([(2, 90.0), (32, 30.0), (64, 18.0)]),
            plain: vec![PlainRates { bits: 4, weights_per_second: 7.0, cache_weights_per_second: 8.0, macs_per_second: 7.0 }],
            codecs: vec![rates("rans/s16-w8-p7-l64", 9.0), rates("rans/s32-w16-p12-l64", 3.0), rates("fixed/b4", 1.0)],
            measured_seconds: 0.0,
        };
        let rate = |id: &str| profile.codec(id.parse().unwrap()).fused_weights_per_second;
        assert_eq!(rate("rans/s16-w8-p7-l64"), 9.0);
        assert_eq!(rate("rans/s16-w8-p8-l64"), 3.0);
        assert_eq!(rate("huffman"), 1.0);
        assert_eq!(profile.plain(8).weights_per_second, 7.0);
        let bandwidth = [1, 2, 5, 8, 99].map(|threads| profile.read_bytes_per_second(threads));
        assert_eq!(bandwidth, [10.0, 18.0, 24.0, 30.0, 30.0]);
        // 1/90 is the cache's time for a byte, 1/18 the memory's, 1/30 is half way between them.
        let shares = [0, 2 << 20, (2 << 20) + 1, 32 << 20, 33 << 20, u64::MAX].map(|bytes| profile.memory_share(bytes));
        for (share, expected) in shares.into_iter().zip([0.0, 0.0, 0.5, 0.5, 1.0, 1.0]) {
            assert!((share - expected).abs() < 1e-12, "{shares:?}");
        }
        assert_eq!((profile.cache_speedup(1), profile.cache_speedup(u64::MAX)), (5.0, 1.0));
        // 7 weights of half a byte are less than 18 bytes; 54 are one and a half times as much.
        assert_eq!(profile.product_speedup(), 1.0);
        let mut faster = profile;
        faster.plain[0].weights_per_second = 54.0;
        assert_eq!(faster.product_speedup(), 1.5);
    }
}
