//! Ratio and speed of every codec on Gaussian symbols: checks first, then measures.
//!
//! `cargo run --release -p tersor-codec --example codec_rates [chunks]`: one core, chunks of 65,536
//! symbols. `above H` counts everything in a chunk, states and indices included, but not the table.
//! Rates are the best of some repetitions, in millions of symbols per second; `build` is the time
//! to choose a table.

use std::time::{Duration, Instant};

use tersor_codec::{Codec, Histogram, Table, decode_chunk, decode_chunk_bytes, encode_chunk, reference};

const CHUNK_SYMBOLS: usize = 1 << 16;
const REPETITIONS: usize = 3;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let chunks: usize = std::env::args().nth(1).map_or(Ok(32), |text| text.parse())?;
    let mut codecs: Vec<Codec> = Vec::new();
    for id in [
        "fixed",
        "fixed/b3",
        "fixed/b8",
        "huffman",
        "huffman/c8-planes",
        "huffman/c12-l4",
        "tiered",
        "rans-pairs",
        "rans/s16-w8-p6-l64",
        "rans",
        "rans/s16-w8-p8-l64",
    ] {
        codecs.push(id.parse()?);
    }
    for id in ["rans/s32-w16-p10-l64", "rans-precise", "rans/s32-w16-p12-l64"] {
        codecs.push(id.parse()?);
    }
    for symbols in [32, 64, 128, 256, 512, 1024, 4096] {
        codecs.push(format!("block-ans/s16-w8-p8-n{symbols}").parse()?);
        codecs.push(format!("block-ans/s32-w16-p12-n{symbols}").parse()?);
    }
    for step in [1.6, 0.9, 0.5, 0.3] {
        let symbols = gaussian(chunks * CHUNK_SYMBOLS, step);
        let mut histogram = Histogram::new();
        let histogram_time = fastest(|| {
            histogram = Histogram::new();
            histogram.add(&symbols);
        });
        let entropy_bits = histogram.entropy_bits();
        println!("\nGaussian, step {step}: entropy {entropy_bits:.4} bits; histogram {:.0} M/s", rate(&symbols, histogram_time));
        println!("{:28} {:>7} {:>8} {:>8} {:>10} {:>10} {:>9}", "codec", "bits", "above H", "", "encode M/s", "decode M/s", "build ms");
        for &codec in &codecs {
            let build = Instant::now();
            let table = Table::build(codec, &histogram)?;
            let build = build.elapsed();

            let mut coded: Vec<Vec<u8>> = vec![Vec::new(); chunks];
            let mut decoded = vec![0; CHUNK_SYMBOLS];
            let mut bytes = vec![0; CHUNK_SYMBOLS];
            let parts: Vec<&[i16]> = symbols.chunks(CHUNK_SYMBOLS).collect();
            for (part, chunk) in parts.iter().zip(&mut coded) {
                encode_chunk(&table, part, chunk)?;
                decode_chunk(&table, chunk, &mut decoded)?;
                assert_eq!(&decoded, part, "{codec} does not give back what it got");
            }
            assert_eq!(reference::decode_chunk(&table, &coded[0], CHUNK_SYMBOLS)?, parts[0]);

            let coded_bytes: usize = coded.iter().map(Vec::len).sum();
            let bits = coded_bytes as f64 * 8.0 / symbols.len() as f64;
            let encode = fastest(|| {
                for (part, chunk) in parts.iter().zip(&mut coded) {
                    chunk.clear();
                    encode_chunk(&table, part, chunk).expect("encoded before");
                }
            });
            let decode = fastest(|| {
                for chunk in &coded {
                    decode_chunk_bytes(&table, chunk, &mut bytes).expect("decoded before");
                }
            });
            println!(
                "{:28} {bits:7.4} {:8.4} {:7.2}% {:10.0} {:10.0} {:9.2}",
                codec.to_string(),
                bits - entropy_bits,
                (bits / entropy_bits - 1.0) * 100.0,
                rate(&symbols, encode),
                rate(&symbols, decode),
                build.as_secs_f64() * 1e3,
            );
        }
    }
    Ok(())
}

fn fastest(mut run: impl FnMut()) -> Duration {
    let times = (0..REPETITIONS).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed()
    });
    times.min().unwrap_or_default()
}

/// Million symbols per second.
fn rate(symbols: &[i16], time: Duration) -> f64 {
    symbols.len() as f64 / time.as_secs_f64() / 1e6
}

/// `round(gauss / step)`, by Box and Muller from a xorshift generator.
fn gaussian(symbols: usize, step: f64) -> Vec<i16> {
    let mut state = 88_172_645_463_325_252u64;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    let mut gauss = || (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
    (0..symbols).map(|_| (gauss() / step).round() as i16).collect()
}
