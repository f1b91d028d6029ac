//! What a GPU can do, measured once by the kernels that models run: what `auto` decides by.

use crate::residency::OpenError;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};
use tersor_cuda::layout::{Plain, QuadMatrix, QuadParams, Statistics};
use tersor_cuda::{Activations, Form, Input, Kernels, PlainMatrix, QuadAt, QuadPlaces, Queue, Stream};

/// Shape of the measured matrix: some times the L2 of an H200 in plain form, so that its bytes come from memory.
const SHAPE: (usize, usize) = (32_768, 8_192);
/// Timed products.
const REPEATS: usize = 20;

/// Rates of a GPU's products at one token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceProfile {
    /// The GPU it was measured on.
    pub name: String,
    /// Bytes of the plain layout that a product reads per second.
    pub plain_bytes_per_second: f64,
    /// Weights of the quad layout that a product decodes and multiplies per second.
    pub quad_weights_per_second: f64,
}

impl DeviceProfile {
    /// Seconds of a product with the plain form.
    pub fn plain_seconds(&self, bytes: u64) -> f64 {
        bytes as f64 / self.plain_bytes_per_second
    }

    /// Seconds of a product with the coded form: bound by decoding or by its bytes.
    pub fn quad_seconds(&self, weights: u64, bytes: u64) -> f64 {
        (weights as f64 / self.quad_weights_per_second).max(bytes as f64 / self.plain_bytes_per_second)
    }

    /// From the cache, or measured now (about a second) and kept there.
    pub fn load(kernels: &Kernels, cache: Option<&Path>) -> Result<Self, OpenError> {
        let name = &kernels.device().properties().name;
        let file = cache.map(|dir| file(dir, name));
        let kept = file.as_ref().and_then(|file| fs::read_to_string(file).ok()).and_then(|text| serde_json::from_str::<Self>(&text).ok());
        if let Some(profile) = kept.filter(|profile| profile.name == *name && profile.is_sane()) {
            return Ok(profile);
        }
        let profile = Self::measure(kernels)?;
        if let Some(file) = file {
            // Without a cache the next start measures again.
            let _ = file.parent().map(fs::create_dir_all);
            let _ = serde_json::to_string(&profile).map(|text| fs::write(&file, text));
        }
        Ok(profile)
    }

    fn is_sane(&self) -> bool {
        [self.plain_bytes_per_second, self.quad_weights_per_second].iter().all(|rate| rate.is_finite() && *rate > 0.0)
    }

    fn measure(kernels: &Kernels) -> Result<Self, OpenError> {
        let device = kernels.device();
        let (rows, cols) = SHAPE;
        let geometry = kernels.geometry(rows, cols)?;
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let failed = |e: tersor_cuda::layout::LayoutError| OpenError::Device { cause: e.to_string() };
        let statistics = Statistics::sample(&sample, geometry, threads);
        let params = QuadParams { low_bits: 1, window_bits: 13, copies_log2: 0 };
        let quad = QuadMatrix::encode(&sample, geometry, params, &statistics, threads).map_err(failed)?;
        let plain = Plain::pack(&sample, geometry, 0, threads).map_err(failed)?;
        let places = QuadPlaces::new(&quad);
        let mut image = vec![0; places.bytes()];
        places.write(&quad, &mut image);
        let coded = device.upload(&image, "a measured matrix")?;
        let plain = PlainMatrix::upload(device, &plain)?;
        let x = device.upload(&vec![0.5f32; cols], "activations")?;
        let activations = Activations::new(device, 1, geometry.padded_cols())?;
        let sums = device.allocate(geometry.padded_rows() * 8, "sums")?;
        let seconds = |form: &Form<'_>| -> Result<f64, OpenError> {
            let mut queue = Queue::new(kernels);
            queue.prepare(Input::Copy(&x), &activations, 1, cols, form, &sums)?;
            for _ in 0..3 {
                queue.product(form, &activations, 1, &sums)?;
            }
            let (start, end) = (device.event(true)?, device.event(true)?);
            device.record(&start, Stream::Compute)?;
            for _ in 0..REPEATS {
                queue.product(form, &activations, 1, &sums)?;
            }
            device.record(&end, Stream::Compute)?;
            Ok(start.seconds_until(&end)? / REPEATS as f64)
        };
        let coded = seconds(&Form::Quad(QuadAt { places: &places, buffer: &coded, at: 0 }))?;
        let decoded = seconds(&plain.form())?;
        Ok(Self {
            name: device.properties().name.clone(),
            plain_bytes_per_second: plain.bytes() as f64 / decoded,
            quad_weights_per_second: (rows * cols) as f64 / coded,
        })
    }
}

fn file(dir: &Path, name: &str) -> PathBuf {
    let safe: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    dir.join(format!("profile-cuda-{safe}.json"))
}

/// Symbols of a bell-shaped distribution of about 3 bits of entropy: sums of four hashed nibbles.
fn sample(row_tile: usize, symbols: &mut [i16]) {
    for (i, symbol) in symbols.iter_mut().enumerate() {
        // splitmix64 (Steele, Lea, Flood 2014)
        let mut z = ((row_tile * 1_048_583 + i) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z ^= z >> 27;
        let nibbles = (0..4).map(|k| (z >> (4 * k)) & 15).sum::<u64>() as i16;
        *symbol = (nibbles - 30) / 5;
    }
}
