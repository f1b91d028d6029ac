//! Rates of a GPU's kernels on a matrix that does not fit its caches, each checked before it is timed.

use super::groups::Symbols;
use crate::device::{KernelReport, KernelRequest, KernelRow};
use crate::residency::OpenError;
use std::time::Instant;
use tersor_cpu::{Level, Pool};
use tersor_cuda::layout::{Plain, QuadMatrix, TILE_ROWS};
use tersor_cuda::{
    Activations, Buffer, CudaError, Device, Form, Input, Kernels, PlainMatrix, Prepared, QuadAt, QuadPlaces, Queue, RansDecoder, RansPart,
    RansTable, Stream, nibble_bytes,
};
use tersor_format::CodedTensor;

/// Bytes that no GPU's cache holds.
const WORKING_SET: usize = 400 << 20;
/// Windows that are timed; the median counts.
const WINDOWS: usize = 7;
/// Rows whose sums are compared with the symbols.
const CHECKED_ROWS: usize = 256;
/// Tokens of the products.
const TOKENS: [usize; 3] = [1, 4, 16];

pub(in crate::device) fn measure(index: usize, request: &KernelRequest<'_>) -> Result<KernelReport, OpenError> {
    let device = Device::open(index)?;
    let kernels = Kernels::load(&device, request.cache_dir)?;
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let pool = Pool::new(threads);
    let bench = Bench { kernels: &kernels, seconds: request.seconds };
    let all = device.allocate(WORKING_SET * 2, "a bandwidth test")?;
    let out = device.allocate(4, "a bandwidth test")?;
    let read = bench.time(&mut |queue, _| queue.read(&all, &out))?;
    let read_bytes_per_second = all.bytes() as f64 / read;
    drop(all);
    let mut rows = Vec::new();
    for (sample, tensor) in request.samples.iter().enumerate() {
        rows.extend(bench.sample(sample, tensor, &pool)?);
    }
    let (major, minor) = device.properties().capability;
    Ok(KernelReport { name: device.properties().name.clone(), level: format!("sm_{major}{minor}"), read_bytes_per_second, rows })
}

struct Bench<'a> {
    kernels: &'a Kernels,
    seconds: f64,
}

impl Bench<'_> {
    /// Median seconds of one call of `work`, which is given the number of the call.
    fn time(&self, work: &mut dyn FnMut(&mut Queue<'_>, usize) -> Result<(), CudaError>) -> Result<f64, CudaError> {
        let device = self.kernels.device();
        let mut queue = Queue::new(self.kernels);
        let mut run = |count: usize| -> Result<f64, CudaError> {
            let (start, end) = (device.event(true)?, device.event(true)?);
            device.record(&start, Stream::Compute)?;
            for i in 0..count {
                work(&mut queue, i)?;
            }
            device.record(&end, Stream::Compute)?;
            Ok(start.seconds_until(&end)? / count as f64)
        };
        run(3)?;
        let once = run(5)?;
        let count = ((self.seconds / WINDOWS as f64 / once) as usize).clamp(5, 1000);
        let mut times = (0..WINDOWS).map(|_| run(count)).collect::<Result<Vec<_>, _>>()?;
        times.sort_by(f64::total_cmp);
        Ok(times[WINDOWS / 2])
    }

    fn sample(&self, sample: usize, tensor: &CodedTensor, pool: &Pool) -> Result<Vec<KernelRow>, OpenError> {
        let device = self.kernels.device();
        let failed = |e: tersor_cuda::layout::LayoutError| OpenError::Device { cause: e.to_string() };
        let (rows, cols) = (tensor.rows(), tensor.cols());
        let geometry = self.kernels.geometry(rows, cols)?;
        let symbols = Symbols::new("the sample", tensor, Level::best(), Some(pool), Vec::new())?;
        let source = |tile: usize, out: &mut [i16]| {
            if tile < tensor.row_tiles() {
                symbols.row_tile(tile, out);
            }
        };
        let quad = QuadMatrix::encode_auto(&source, geometry, pool.threads()).map_err(failed)?;
        let plain = Plain::pack(&source, quad.geometry, quad.params.low_bits, pool.threads()).map_err(failed)?;
        let places = QuadPlaces::new(&quad);
        let copies = |bytes: usize| WORKING_SET.div_ceil(bytes).max(2);
        // Copies of both forms, one behind the other.
        let stride = places.bytes().next_multiple_of(256);
        let coded = device.allocate(stride * copies(stride), "coded weights")?;
        let mut image = vec![0; places.bytes()];
        places.write(&quad, &mut image);
        (0..copies(stride)).try_for_each(|copy| coded.write(copy * stride, &image))?;
        let decoded: Vec<PlainMatrix> =
            (0..copies(plain.bytes())).map(|_| PlainMatrix::upload(device, &plain)).collect::<Result<_, _>>()?;
        let quad_at = |copy: usize| QuadAt { places: &places, buffer: &coded, at: copy % copies(stride) * stride };

        let weights = (rows * cols) as f64;
        let mut report = Vec::new();
        let mut push = |kernel: &'static str, tokens: usize, seconds: f64, bytes: usize| {
            let products = weights * tokens as f64;
            report.push(KernelRow { kernel, sample, weights_per_second: products / seconds, bytes_per_weight: bytes as f64 / products });
        };
        let k = geometry.padded_cols().max(quad.geometry.padded_cols());
        let part = device.allocate(geometry.padded_rows() * 8 * 16, "sums")?;
        let x: Vec<f32> = (0..16 * cols).map(|i| ((i * 7919 % 1009) as f32 - 504.0) / 100.0).collect();
        let x = device.upload(&x, "activations")?;
        for (tokens, names) in TOKENS.into_iter().zip([("fused-gemv", "gemv"), ("fused-gemv/4", "gemv/4"), ("fused-gemv/16", "gemv/16")]) {
            let activations = Activations::new(device, tokens, k)?;
            let mut sums = Vec::new();
            for (coded, name, bytes) in [(true, names.0, places.bytes()), (false, names.1, plain.bytes())] {
                let form = |i: usize| if coded { Form::Quad(quad_at(i)) } else { decoded[i % decoded.len()].form() };
                part.fill_range(0, part.bytes(), 0xab, Stream::Compute)?;
                let mut queue = Queue::new(self.kernels);
                queue.prepare(Input::Copy(&x), &activations, tokens, cols, &form(0), &part)?;
                queue.product(&form(0), &activations, tokens, &part)?;
                sums.push(self.checked(&symbols, &form(0), &activations, tokens, &part, name)?);
                let seconds = self.time(&mut |queue, i| queue.product(&form(i), &activations, tokens, &part))?;
                push(name, tokens, seconds, bytes);
            }
            if sums[0] != sums[1] {
                return Err(wrong(names.0, "its sums are not those of the plain form"));
            }
        }
        let nibbles = device.allocate(nibble_bytes(&quad.geometry), "nibbles")?;
        let decode = |queue: &mut Queue<'_>, i: usize| queue.decode(&quad_at(i), &quad_at(i).decoded(&nibbles, 0), Stream::Compute);
        nibbles.fill_range(0, nibbles.bytes(), 0xab, Stream::Compute)?;
        decode(&mut Queue::new(self.kernels), 0)?;
        if nibbles.read::<u32>(0, plain.words.len())? != plain.words {
            return Err(wrong("decode", "its nibbles are not those of the packer"));
        }
        push("decode", 1, self.time(&mut |queue, i| decode(queue, i))?, places.bytes());
        if let Some(table) = RansTable::new(tensor.table()) {
            let load = self.load(tensor, table, &quad, &symbols)?;
            for (name, seconds) in ["copy", "file-decode", "copy+decode"].into_iter().zip(load) {
                push(name, 1, seconds, tensor.coded_bytes() as usize);
            }
        }
        Ok(report)
    }

    /// Sums of all rows, (tokens, rows), after some of them were compared with the symbols.
    #[allow(clippy::too_many_arguments)] // What a product reads and writes.
    fn checked(
        &self,
        symbols: &Symbols<'_>,
        form: &Form<'_>,
        activations: &Activations,
        tokens: usize,
        part: &Buffer,
        name: &str,
    ) -> Result<Vec<i64>, OpenError> {
        let (g, n) = (form.geometry(), form.geometry().padded_rows());
        let k = g.padded_cols();
        let all: Vec<i64> = part.read(0, tokens * n)?;
        let Prepared { q, info, .. } = activations.download(tokens, k)?;
        let mut tile = vec![0; TILE_ROWS * g.cols()];
        let tiles = g.rows().div_ceil(TILE_ROWS);
        for row_tile in (0..tiles).step_by((tiles * TILE_ROWS).div_ceil(CHECKED_ROWS).max(1)) {
            symbols.row_tile(row_tile, &mut tile);
            for (row, weights) in tile.chunks_exact(g.cols()).enumerate() {
                for token in 0..tokens {
                    let parts = weights.chunks(128).zip(q[token * k..].chunks(128)).zip(&info[token * k / 128..]);
                    let products = |w: &[i16], q: &[i8]| w.iter().zip(q).map(|(&w, &q)| i64::from(w) * i64::from(q)).sum::<i64>();
                    let expected: i64 = parts.map(|((w, q), info)| 16 * i64::from(info[0]) * products(w, q)).sum();
                    if all[token * n + row_tile * TILE_ROWS + row] != expected {
                        return Err(wrong(name, "a sum is not that of the symbols"));
                    }
                }
            }
        }
        Ok(all)
    }

    /// Seconds in which the coded bytes of the file cross PCIe, in which the device decodes them, and in which both are done beside each other.
    fn load(&self, tensor: &CodedTensor, table: RansTable<'_>, quad: &QuadMatrix, symbols: &Symbols<'_>) -> Result<[f64; 3], OpenError> {
        let device = self.kernels.device();
        let bytes = tensor.coded_bytes() as usize;
        let (pinned, buffer) = (device.pin(bytes)?, device.allocate(bytes, "coded bytes")?);
        let median = |mut times: Vec<f64>| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        };
        let copy = || -> Result<f64, CudaError> {
            let start = Instant::now();
            device.copy_in(&buffer, 0, &pinned, 0, bytes, Stream::Side)?;
            device.synchronize()?;
            Ok(start.elapsed().as_secs_f64())
        };
        copy()?;
        let copied = median((0..WINDOWS).map(|_| copy()).collect::<Result<_, _>>()?);
        let mut decoder = RansDecoder::new(device)?;
        let part = || RansPart {
            table,
            chunks: (0..tensor.chunk_count()).map(|chunk| (tensor.chunk(chunk), tensor.chunk_row_tiles(chunk).len())).collect(),
            cols: tensor.cols(),
            row_tile: 0,
            far_max: tensor.header().wide_count as usize,
        };
        let decoded = decoder.decode(self.kernels, quad.geometry, quad.params.low_bits, &[part()])?.download()?;
        let unpacked = decoded.unpack().map_err(|e| wrong("copy+decode", &e.to_string()))?;
        let mut tile = vec![0; TILE_ROWS * tensor.cols()];
        for (row_tile, found) in unpacked.chunks(TILE_ROWS * tensor.cols()).enumerate() {
            symbols.row_tile(row_tile, &mut tile);
            if *found != tile[..found.len()] {
                return Err(wrong("copy+decode", "a symbol differs"));
            }
        }
        let (mut all, mut kernel) = (Vec::new(), Vec::new());
        for _ in 0..WINDOWS {
            let times = decoder.pipeline_seconds(self.kernels, quad.geometry, quad.params.low_bits, &part())?;
            all.push(times.0);
            kernel.push(times.1);
        }
        Ok([copied, median(kernel), median(all)])
    }
}

fn wrong(kernel: &str, what: &str) -> OpenError {
    OpenError::Device { cause: format!("{kernel} answers wrongly: {what}") }
}
