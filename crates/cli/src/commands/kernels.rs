//! `tersor kernels`: decode and GEMV rates beside the machine's read bandwidth.
//!
//! Every row is measured on synthetic Gaussian symbols of a given entropy, in two working sets: one that stays in each core's cache, and
//! one of many copies that must come from memory. Before a clock starts, the kernel's answer is compared with sums of the plain symbols.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use tersor_codec::{Codec, Histogram};
use tersor_cpu::{Activations, Decoded, Job, KernelScales, Level, Matrix, Pool, decode_into, matmul, read_bandwidth, read_row};
use tersor_format::{Bytes, CHUNK_SYMBOLS_TARGET, CodedTensor, encode_tensor};
use tersor_quant::{QuantizedTensor, Scales};
use tersor_runtime::device::{self, Device, KernelReport, KernelRequest};

use crate::machine;
use crate::options::{Usage, default_threads, positive, thread_count};
use crate::output::table::Table;
use crate::output::{self, units};
use crate::progress::Progress;

/// Weights of the cache working set for each thread: with 4 to 5 bits of a weight it fits the 512 KiB or more of a core's own cache. Twelve
/// chunks, which are whole groups for kernels of two, four and six streams.
const CACHE_WEIGHTS: usize = 12 << 16;
/// Windows that are timed.
const WINDOWS: usize = 5;

/// Measure decode and GEMV rates beside the machine's read bandwidth
///
/// `decode` writes the decoded form to memory, `fused-gemv` multiplies while it decodes, `gemv` multiplies the decoded form. Bytes and the
/// fraction of the bandwidth count what a kernel reads of the matrix: coded bytes, or decoded ones for gemv.
#[derive(clap::Args)]
pub struct Args {
    /// Codecs, or all
    #[arg(long, value_name = "C,C", value_delimiter = ',', default_value = "all")]
    codec: Vec<String>,
    /// SIMD levels (scalar, avx2, avx512), or all [default: the best of this machine]
    #[arg(long, value_name = "L,L", value_delimiter = ',')]
    level: Vec<String>,
    /// Thread counts [default: 1 and all cores]
    #[arg(long, value_name = "N,N", value_delimiter = ',', value_parser = thread_count)]
    threads: Vec<usize>,
    /// Rows of the matrix in memory
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    rows: u32,
    /// Columns of the matrix
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    cols: u32,
    /// Entropy of the symbols, bits per weight
    #[arg(long, default_value_t = 2.25, value_parser = positive, allow_negative_numbers = true)]
    entropy: f64,
    /// Where the matrices lie: cache, memory, or both
    #[arg(long, value_name = "WHERE", default_value = "both", value_parser = ["cache", "memory", "both"])]
    working_set: String,
    /// Least time for each row, seconds
    #[arg(long, default_value_t = 0.2, value_parser = positive)]
    seconds: f64,
    /// Where to run: cpu, cuda or cuda:N
    #[arg(long, value_name = "D", default_value_t = Device::Cpu)]
    device: Device,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    machine: Machine,
    rows: Vec<Row>,
}

#[derive(Serialize)]
struct Machine {
    cpu: String,
    level: String,
    cores: usize,
    read_gb_per_second: BTreeMap<String, f64>,
    /// The maker's name of the GPU, where one is measured; the bandwidth is then its memory's.
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
}

#[derive(Serialize)]
struct Row {
    kernel: &'static str,
    device: Device,
    codec: String,
    level: String,
    threads: usize,
    entropy_bits: f64,
    bpw: f64,
    working_set: &'static str,
    weights_per_second: f64,
    coded_gb_per_second: f64,
    fraction_of_bandwidth: Option<f64>,
}

impl Row {
    /// What rows to compare with each other have in common.
    fn setting(&self) -> (&str, &str, usize, &str) {
        (&self.codec, &self.level, self.threads, self.working_set)
    }
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let codecs = codecs(&args.codec)?;
    ensure!(args.entropy <= 7.0, Usage("--entropy: at most 7 bits".to_owned()));
    let report = match args.device {
        Device::Cuda(index) => on_gpu(args, &codecs, index)?,
        _ => on_cpu(args, &codecs)?,
    };
    if args.json { output::json(&report) } else { output::text(&render(&report, args)) }
}

fn on_cpu(args: &Args, codecs: &[Codec]) -> Result<Report> {
    let levels = levels(&args.level)?;
    let mut threads = args.threads.clone();
    if threads.is_empty() {
        threads = vec![1, default_threads()];
    }
    threads.sort_unstable();
    threads.dedup();
    let memory_bytes = machine::beyond_caches_bytes();
    let mut bandwidth = BTreeMap::new();
    let progress = Progress::new(
        "kernels",
        (threads.len() * (1 + levels.len() * codecs.len() * 3 * if args.working_set == "both" { 2 } else { 1 })) as u64,
    );
    {
        let buffer = vec![1; memory_bytes as usize];
        for &count in &threads {
            progress.message(&format!("read bandwidth, {count} threads"));
            bandwidth.insert(count, read_bandwidth(&Pool::new(count), Level::best(), &buffer, WINDOWS as u32 + 1));
            progress.add(1);
        }
    }
    // Both working sets of a codec are measured one after the other, so that their ratio is of one moment.
    let large = Sample::gaussian(args.rows as usize, args.cols as usize, args.entropy);
    let mut rows = Vec::new();
    for &codec in codecs {
        for &count in &threads {
            let cache_rows = (CACHE_WEIGHTS * count / args.cols as usize).clamp(1, args.rows as usize);
            let small = Sample::gaussian(cache_rows, args.cols as usize, args.entropy);
            for (sample, working_set) in [(&small, "cache"), (&large, "memory")] {
                if args.working_set != "both" && args.working_set != working_set {
                    continue;
                }
                let bytes = if working_set == "cache" { 0 } else { memory_bytes };
                let set = WorkingSet::new(sample, codec, bytes).with_context(|| codec.to_string())?;
                for &level in &levels {
                    progress.message(&format!("{codec}, {level}, {count} threads, {working_set}"));
                    let bench = Bench { set: &set, sample, pool: &Pool::new(count), level, seconds: args.seconds };
                    let context = || format!("{codec}: {level}: {count} threads");
                    for measured in bench.run().with_context(context)? {
                        let per_weight = measured.bytes_per_weight * 8.0;
                        let read = measured.weights_per_second * measured.bytes_per_weight;
                        rows.push(Row {
                            kernel: measured.kernel,
                            device: args.device,
                            codec: codec.to_string(),
                            level: level.to_string(),
                            threads: count,
                            entropy_bits: sample.entropy_bits,
                            bpw: per_weight,
                            working_set,
                            weights_per_second: measured.weights_per_second,
                            coded_gb_per_second: read / 1e9,
                            fraction_of_bandwidth: (working_set == "memory").then(|| read / bandwidth[&count]),
                        });
                        progress.add(1);
                    }
                }
            }
        }
    }
    drop(progress);
    let machine = Machine {
        cpu: machine::cpu_name(),
        level: Level::best().to_string(),
        cores: default_threads(),
        read_gb_per_second: bandwidth.iter().map(|(count, bytes)| (count.to_string(), bytes / 1e9)).collect(),
        device: None,
    };
    Ok(Report { machine, rows })
}

/// On a GPU there are no threads or levels to choose, and the matrices come from its memory.
fn on_gpu(args: &Args, codecs: &[Codec], index: usize) -> Result<Report> {
    ensure!(
        args.level.is_empty() && args.threads.is_empty() && args.working_set != "cache",
        Usage(format!("--level, --threads and --working-set cache: for the CPU only, not for {}", args.device))
    );
    device::info(index)?;
    let sample = Sample::gaussian(args.rows as usize, args.cols as usize, args.entropy);
    let coded = codecs.iter().map(|&codec| {
        let encoded = encode_tensor(&sample.tensor, codec, CHUNK_SYMBOLS_TARGET).with_context(|| codec.to_string())?;
        Ok(encoded.tensor().clone())
    });
    let coded = coded.collect::<Result<Vec<CodedTensor>>>()?;
    let cache_dir = machine::cache_dir();
    let measured = device::kernels(index, &KernelRequest { samples: &coded, seconds: args.seconds, cache_dir: Some(&cache_dir) })?;
    Ok(gpu_report(&measured, args.device, codecs, sample.entropy_bits))
}

/// `codecs` are those of the samples.
fn gpu_report(measured: &KernelReport, device: Device, codecs: &[Codec], entropy_bits: f64) -> Report {
    let row = |row: &device::KernelRow| {
        let read = row.weights_per_second * row.bytes_per_weight;
        Row {
            kernel: row.kernel,
            device,
            codec: codecs[row.sample].to_string(),
            level: measured.level.clone(),
            threads: 1,
            entropy_bits,
            bpw: row.bytes_per_weight * 8.0,
            working_set: "memory",
            weights_per_second: row.weights_per_second,
            coded_gb_per_second: read / 1e9,
            fraction_of_bandwidth: Some(read / measured.read_bytes_per_second),
        }
    };
    let machine = Machine {
        cpu: machine::cpu_name(),
        level: measured.level.clone(),
        cores: default_threads(),
        read_gb_per_second: BTreeMap::from([("1".to_owned(), measured.read_bytes_per_second / 1e9)]),
        device: Some(measured.name.clone()),
    };
    Report { machine, rows: measured.rows.iter().map(row).collect() }
}

fn codecs(names: &[String]) -> Result<Vec<Codec>> {
    if names.iter().any(|name| name == "all") {
        return Ok(Codec::SHORT_NAMES.map(|(_, codec)| codec).to_vec());
    }
    names.iter().map(|name| name.parse().map_err(|error| Usage(format!("--codec: {error}")).into())).collect()
}

fn levels(names: &[String]) -> Result<Vec<Level>> {
    if names.is_empty() {
        return Ok(vec![Level::best()]);
    }
    if names.iter().any(|name| name == "all") {
        return Ok(Level::available());
    }
    names.iter().map(|name| name.parse().map_err(|error| Usage(format!("--level: {error}")).into())).collect()
}

/// A matrix of Gaussian symbols, every row with scale 1.
struct Sample {
    tensor: QuantizedTensor,
    entropy_bits: f64,
    x: Vec<f32>,
}

impl Sample {
    fn gaussian(rows: usize, cols: usize, entropy_bits: f64) -> Self {
        let mut random = Random(0x7465_7273_6f72);
        let sigma = sigma_of(entropy_bits);
        let symbols: Vec<i16> = (0..rows * cols).map(|_| (random.gaussian() * sigma).round() as i16).collect();
        let mut histogram = Histogram::new();
        histogram.add(&symbols);
        // 0x3c00 is 1.0 in binary16.
        let scales = Scales::Row { scales: vec![0x3c00; rows], scale_exponent: 0 };
        let x = (0..cols).map(|_| random.gaussian() as f32).collect();
        Self { tensor: QuantizedTensor { rows, cols, symbols, scales }, entropy_bits: histogram.entropy_bits(), x }
    }

    /// y = W x from the plain symbols, by the arithmetic that all kernels promise: exact sums per segment, then f32 in column order.
    fn oracle(&self, x: &Activations) -> Vec<f32> {
        let cols = self.tensor.cols;
        let row = |symbols: &[i16]| {
            let mut y = 0.0_f32;
            for (segment, scale) in x.only().scales.iter().enumerate() {
                let columns = segment * x.segment()..((segment + 1) * x.segment()).min(cols);
                let sum: i32 = symbols[columns.clone()]
                    .iter()
                    .zip(&x.only().q.as_flattened()[columns])
                    .map(|(&s, &q)| i32::from(s) * i32::from(q))
                    .sum();
                y += sum as f32 * scale;
            }
            y
        };
        self.tensor.symbols.chunks_exact(cols).map(row).collect()
    }
}

/// Standard deviation at which rounding a Gaussian gives the entropy.
fn sigma_of(entropy_bits: f64) -> f64 {
    let entropy = |sigma: f64| {
        let density = |symbol: i32| (-0.5 * (f64::from(symbol) / sigma).powi(2)).exp();
        // Probabilities of the integers from Simpson's rule over each unit interval.
        let mass = |symbol: i32| {
            let at = |x: f64| (-0.5 * (x / sigma).powi(2)).exp();
            let middle = f64::from(symbol);
            (at(middle - 0.5) + 4.0 * density(symbol) + at(middle + 0.5)) / 6.0
        };
        let reach = (sigma * 9.0).ceil() as i32 + 2;
        let masses: Vec<f64> = (-reach..=reach).map(mass).collect();
        let total: f64 = masses.iter().sum();
        masses.iter().map(|m| m / total).filter(|&p| p > 0.0).map(|p| -p * p.log2()).sum::<f64>()
    };
    let (mut low, mut high) = (0.05, 64.0);
    for _ in 0..60 {
        let middle = f64::midpoint(low, high);
        if entropy(middle) < entropy_bits { low = middle } else { high = middle }
    }
    low
}

/// SplitMix64 (Steele, Lea, Flood 2014) and the polar method: the same symbols on every machine.
struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn gaussian(&mut self) -> f64 {
        loop {
            let (a, b) = (self.uniform() * 2.0 - 1.0, self.uniform() * 2.0 - 1.0);
            let s = a * a + b * b;
            if s > 0.0 && s < 1.0 {
                return a * (-2.0 * s.ln() / s).sqrt();
            }
        }
    }
}

/// Copies of one coded matrix, coded and decoded.
struct WorkingSet {
    coded: Vec<CodedTensor>,
    scales: KernelScales,
    coded_bytes: u64,
}

impl WorkingSet {
    /// As many copies as `bytes` take, at least one.
    fn new(sample: &Sample, codec: Codec, bytes: u64) -> Result<Self> {
        let encoded = encode_tensor(&sample.tensor, codec, CHUNK_SYMBOLS_TARGET)?;
        let tensor = encoded.tensor();
        let copies = bytes.div_ceil(tensor.coded_bytes()).max(1);
        let coded = (0..copies)
            .map(|_| {
                let blob = Bytes::from(encoded.blob().to_vec());
                CodedTensor::open(blob, encoded.scales().clone(), encoded.biases().cloned())
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { coded, scales: KernelScales::from_coded(tensor)?, coded_bytes: tensor.coded_bytes() })
    }
}

struct Bench<'a> {
    set: &'a WorkingSet,
    sample: &'a Sample,
    pool: &'a Pool,
    level: Level,
    seconds: f64,
}

struct Measured {
    kernel: &'static str,
    weights_per_second: f64,
    bytes_per_weight: f64,
}

impl Bench<'_> {
    fn run(&self) -> Result<[Measured; 3]> {
        let (rows, cols) = (self.sample.tensor.rows, self.sample.tensor.cols);
        let weights = (rows * cols) as f64;
        let x = Activations::quantize(self.level, &self.sample.x, 1, cols, self.set.scales.segment());
        let expected = self.sample.oracle(&x);
        let mut y = vec![f32::NAN; rows];

        // One decoded matrix for each coded one until they fill the same number of bytes, so that both come from memory.
        let mut decoded = vec![self.decoded(0)?];
        self.check_decoded(&decoded[0])?;
        let decoded_bytes = decoded[0].bytes();
        let copies = (self.set.coded.len() as u64 * self.set.coded_bytes).div_ceil(decoded_bytes);
        for index in 1..copies as usize {
            decoded.push(self.decoded(index)?);
        }
        for matrix in [Matrix::Coded(&self.set.coded[0]), Matrix::Decoded(&decoded[0])] {
            y.fill(f32::NAN);
            self.gemv(matrix, &x, &mut y)?;
            ensure!(y.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()), "wrong product: nothing was timed");
        }

        let gemv = self.rate(decoded.len(), |index| self.gemv(Matrix::Decoded(&decoded[index]), &x, &mut y))?;
        let fused = self.rate(self.set.coded.len(), |index| self.gemv(Matrix::Coded(&self.set.coded[index]), &x, &mut y))?;
        let slots = decoded.len();
        let decode = self.rate(self.set.coded.len(), |index| {
            Ok(decode_into(self.level, &self.set.coded[index], &mut decoded[index % slots], Some(self.pool))?)
        })?;
        let coded = self.set.coded_bytes as f64 / weights;
        Ok([
            Measured { kernel: "decode", weights_per_second: decode * weights, bytes_per_weight: coded },
            Measured { kernel: "fused-gemv", weights_per_second: fused * weights, bytes_per_weight: coded },
            Measured { kernel: "gemv", weights_per_second: gemv * weights, bytes_per_weight: decoded_bytes as f64 / weights },
        ])
    }

    fn decoded(&self, index: usize) -> Result<Decoded> {
        let mut decoded = Decoded::new();
        decode_into(self.level, &self.set.coded[index % self.set.coded.len()], &mut decoded, Some(self.pool))?;
        Ok(decoded)
    }

    /// With scale 1 a row of weights is a row of symbols.
    fn check_decoded(&self, decoded: &Decoded) -> Result<()> {
        let mut weights = vec![f32::NAN; self.sample.tensor.cols];
        for (row, symbols) in self.sample.tensor.symbols.chunks_exact(self.sample.tensor.cols).enumerate() {
            read_row(self.level, Matrix::Decoded(decoded), &self.set.scales, row, &mut weights)?;
            ensure!(weights.iter().zip(symbols).all(|(&w, &s)| w == f32::from(s)), "row {row} is decoded wrongly: nothing was timed");
        }
        Ok(())
    }

    fn gemv(&self, matrix: Matrix<'_>, x: &Activations, y: &mut [f32]) -> Result<()> {
        let job = Job { matrix, scales: &self.set.scales, x, out: y };
        Ok(matmul(self.pool, self.level, &mut [job])?)
    }

    /// Matrices per second: the median of [`WINDOWS`] windows after one to warm up. Windows go on through the `count` matrices where the
    /// last one stopped, so that matrices come from memory again if all of them do not fit the cache.
    fn rate(&self, count: usize, mut body: impl FnMut(usize) -> Result<()>) -> Result<f64> {
        let length = self.seconds / WINDOWS as f64;
        let mut next = 0;
        let mut window = || -> Result<f64> {
            let start = Instant::now();
            let mut done = 0;
            loop {
                body(next)?;
                next = (next + 1) % count;
                done += 1;
                let seconds = start.elapsed().as_secs_f64();
                if seconds >= length {
                    return Ok(f64::from(done) / seconds);
                }
            }
        };
        window()?;
        let mut rates = (0..WINDOWS).map(|_| window()).collect::<Result<Vec<f64>>>()?;
        rates.sort_by(f64::total_cmp);
        Ok(rates[WINDOWS / 2])
    }
}

fn render(report: &Report, args: &Args) -> String {
    let machine = &report.machine;
    let bandwidth = machine.read_gb_per_second.iter().map(|(threads, rate)| {
        let rate = units::digits3(*rate);
        match (&machine.device, threads.as_str()) {
            (Some(_), _) => format!("{rate} GB/s"),
            (None, "1") => format!("{rate} GB/s with 1 thread"),
            (None, _) => format!("{rate} GB/s with {threads} threads"),
        }
    });
    let who = match &machine.device {
        Some(name) => format!("{name} ({})", machine.level),
        None => format!("{}, {} cores, best level {}", machine.cpu, machine.cores, machine.level),
    };
    let mut text = format!(
        "{who}; read bandwidth {}\n{} x {}, Gaussian symbols of {:.2} bits; every kernel's answer was checked before it was timed\n\n",
        bandwidth.collect::<Vec<_>>().join(", "),
        args.rows,
        args.cols,
        args.entropy
    );
    let mut table =
        Table::new(&["codec", "level", ">threads", "in", "kernel", ">bpw", ">G weights/s", ">GB/s read", ">of bandwidth", ">of gemv"]);
    for row in &report.rows {
        let gemv = report.rows.iter().find(|other| other.kernel == "gemv" && other.setting() == row.setting());
        table.row([
            row.codec.clone(),
            row.level.clone(),
            row.threads.to_string(),
            row.working_set.to_owned(),
            row.kernel.to_owned(),
            format!("{:.3}", row.bpw),
            units::digits3(row.weights_per_second / 1e9),
            units::digits3(row.coded_gb_per_second),
            row.fraction_of_bandwidth.map_or("-".to_owned(), |part| format!("{part:.2}")),
            gemv.map_or("-".to_owned(), |gemv| format!("{:.2}", row.weights_per_second / gemv.weights_per_second)),
        ]);
    }
    text += &table.render();
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn rows_of_a_gpu_are_set_beside_its_bandwidth_and_its_gemv() {
        let row = |kernel, sample, weights_per_second, bytes_per_weight| device::KernelRow {
            kernel,
            sample,
            weights_per_second,
            bytes_per_weight,
        };
        let measured = KernelReport {
            name: "Example GPU".to_owned(),
            level: "sm_90".to_owned(),
            read_bytes_per_second: 1e12,
            rows: vec![row("fused-gemv", 1, 2e12, 0.25), row("gemv", 0, 1e12, 0.5), row("gemv", 1, 1e12, 0.5)],
        };
        let codecs = codecs(&["fixed".to_owned(), "rans".to_owned()]).unwrap();
        let report = gpu_report(&measured, Device::Cuda(1), &codecs, 2.25);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["machine"]["device"], "Example GPU");
        let fused = &json["rows"][0];
        assert_eq!((fused["device"].as_str(), fused["codec"].as_str()), (Some("cuda:1"), Some(codecs[1].to_string().as_str())));
        assert_eq!((fused["bpw"].as_f64(), fused["coded_gb_per_second"].as_f64()), (Some(2.0), Some(500.0)));
        assert_eq!(fused["fraction_of_bandwidth"], 0.5);
        let args = Cli::parse_from(["kernels", "--device", "cuda:1"]).args;
        let text = render(&report, &args);
        assert!(text.starts_with("Example GPU (sm_90); read bandwidth 1000 GB/s\n"), "{text}");
        let line = text.lines().find(|line| line.contains("fused-gemv")).unwrap();
        assert!(line.trim_end().ends_with("0.50     2.00"), "{line:?}");
    }

    #[test]
    fn samples_have_the_entropy_asked_for() {
        for entropy in [1.5, 2.25, 3.8] {
            let sample = Sample::gaussian(256, 512, entropy);
            assert!((sample.entropy_bits - entropy).abs() < 0.02, "{entropy}: {}", sample.entropy_bits);
        }
    }
}
