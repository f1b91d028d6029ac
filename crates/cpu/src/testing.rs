//! What the tests share.

use std::ops::Range;

use tersor_codec::{Codec, decode_chunk_bytes};
use tersor_format::{CodedTensor, EncodedTensor, encode_tensor};
use tersor_quant::{QuantizedTensor, Scales};

use crate::Level;
use crate::source::FarAt;

/// The levels of this machine. `TERSOR_REQUIRE`, a comma list such as `avx2,avx512`, names levels
/// without which the tests fail; any other level that is missing is named on stderr.
pub(crate) fn levels() -> Vec<Level> {
    let available = Level::available();
    let required = std::env::var("TERSOR_REQUIRE").unwrap_or_default();
    for name in required.split(',').map(str::trim).filter(|n| !n.is_empty()) {
        // The list also names devices of other crates, which are not ours to judge.
        assert!(
            !matches!(name.parse::<Level>(), Err(crate::LevelError::Missing { .. })),
            "TERSOR_REQUIRE names {name}, which this machine lacks"
        );
    }
    for name in ["avx2", "avx512"] {
        if !available.iter().any(|l| l.name() == name) {
            eprintln!("skipped: level {name} is not available on this machine");
        }
    }
    available
}

/// Gaussian symbols about `mean`, one in a thousand far if `far`.
pub(crate) fn gaussian(codec: Codec, rows: usize, cols: usize, deviation: f64, mean: f64, far: bool, chunk_symbols: u32) -> EncodedTensor {
    let mut state = 88_172_645_463_325_252u64;
    let mut unit = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    let mut symbol = || {
        let gauss = (-2.0 * unit().max(1e-300).ln()).sqrt() * (std::f64::consts::TAU * unit()).cos();
        if far && unit() < 1e-3 { 1000 } else { (mean + deviation * gauss).round().clamp(-127.0, 127.0) as i16 }
    };
    let symbols = (0..rows * cols).map(|_| symbol()).collect();
    let scales = Scales::Row { scales: vec![0x3c00; rows], scale_exponent: 0 };
    encode_tensor(&QuantizedTensor { rows, cols, symbols, scales }, codec, chunk_symbols).unwrap()
}

/// Symbol bytes and far symbols by the codec's decoder.
pub(crate) fn by_codec(tensor: &CodedTensor, chunks: Range<usize>) -> (Vec<u8>, Vec<FarAt>) {
    let (mut bytes, mut far) = (Vec::new(), Vec::new());
    for chunk in chunks {
        let mut own = vec![0; tensor.chunk_symbols(chunk)];
        let list = decode_chunk_bytes(tensor.table(), tensor.chunk(chunk), &mut own).unwrap();
        far.extend(FarAt::of_chunk(tensor, chunk, list));
        bytes.extend(own);
    }
    (bytes, far)
}
