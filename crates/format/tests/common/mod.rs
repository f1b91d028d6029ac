//! Tensors and directories for the tests.
#![allow(dead_code)] // Each test file uses its part.

use std::path::Path;

use tersor_codec::Codec;
use tersor_format::{DirWriter, Dtype, FormatError, ModelDir, encode_tensor};
use tersor_quant::{QuantizedTensor, ScaleVec, Scales};

/// A small generator (xorshift64*), so that tests need no seed files and no crate.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Roughly normal with deviation `deviation`.
    pub fn symbol(&mut self, deviation: f64) -> i16 {
        let sum: f64 = (0..12).map(|_| (self.next() >> 11) as f64 / (1u64 << 53) as f64).sum();
        ((sum - 6.0) * deviation).round() as i16
    }

    /// A finite positive f16.
    pub fn scale(&mut self) -> u16 {
        0x2000 + (self.next() % 0x1000) as u16
    }
}

pub fn codecs() -> Vec<Codec> {
    let mut codecs: Vec<Codec> = Codec::SHORT_NAMES.iter().map(|(_, codec)| *codec).collect();
    for id in [
        "rans/s16-w8-p6-l64",
        "rans/s16-w8-p8-l8",
        "rans/s32-w16-p10-l1",
        "huffman/c8-l1",
        "huffman/c12-planes",
        "block-ans/s32-w16-p12-n32",
        "block-ans/s16-w8-p8-n64",
        "fixed/b2",
        "fixed/b3",
        "fixed/b8",
    ] {
        codecs.push(id.parse().unwrap());
    }
    codecs
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Tensor,
    Row,
    Affine(u32),
    Symmetric(u32),
}

pub const KINDS: [Kind; 4] = [Kind::Tensor, Kind::Row, Kind::Affine(32), Kind::Symmetric(32)];

/// A random tensor; those with row scales get wide and far symbols too.
pub fn tensor(random: &mut Random, rows: usize, cols: usize, kind: Kind) -> QuantizedTensor {
    let mut symbols: Vec<i16> = (0..rows * cols)
        .map(|_| match kind {
            Kind::Affine(_) | Kind::Symmetric(_) => (random.next() % 16) as i16 - 8,
            _ => random.symbol(2.5),
        })
        .collect();
    if kind == Kind::Row {
        for symbol in symbols.iter_mut() {
            match random.next() % 200 {
                0 => *symbol = 100,
                1 => *symbol = -1000,
                2 => *symbol = i16::MIN,
                _ => {}
            }
        }
    }
    let mut scales = |n: usize| (0..n).map(|_| random.scale()).collect::<Vec<_>>();
    let scales = match kind {
        Kind::Tensor => Scales::Tensor { scale: scales(1)[0], scale_exponent: -3 },
        Kind::Row => Scales::Row { scales: scales(rows), scale_exponent: 0 },
        Kind::Affine(group_size) => Scales::Group {
            group_size,
            scales: ScaleVec::Bf16(scales(rows * cols.div_ceil(group_size as usize))),
            biases: Some(ScaleVec::Bf16(scales(rows * cols.div_ceil(group_size as usize)))),
        },
        Kind::Symmetric(group_size) => {
            Scales::Group { group_size, scales: ScaleVec::F16(scales(rows * cols.div_ceil(group_size as usize))), biases: None }
        }
    };
    QuantizedTensor { rows, cols, symbols, scales }
}

/// Writes a directory with one coded tensor of every scheme, a raw one and a tokenizer. Blobs are a few hundred bytes.
pub fn write_tiny(path: &Path, force: bool) -> Result<(), FormatError> {
    let mut random = Random(7);
    let mut writer = DirWriter::create(path, force)?;
    writer.expect_raw("model.norm.weight");
    for (i, kind) in KINDS.into_iter().enumerate() {
        writer.expect_coded(&format!("layers.{i}.weight"), matches!(kind, Kind::Affine(_)));
    }
    // Small tables: the tests open this directory thousands of times.
    let codecs = ["rans/s16-w8-p7-l8", "huffman/c8-l2", "huffman/c8-planes", "fixed/b4", "block-ans/s16-w8-p8-n64"];
    for (i, (kind, codec)) in KINDS.into_iter().zip(codecs).enumerate() {
        let tensor = tensor(&mut random, 18, 7, kind);
        let encoded = encode_tensor(&tensor, codec.parse().unwrap(), 64).expect("encodes");
        writer.write_coded(&format!("layers.{i}.weight"), &encoded)?;
    }
    writer.write_raw("model.norm.weight", Dtype::F32, &[2], &[0, 0, 128, 63, 0, 0, 0, 64])?;
    writer.write_file("tokenizer.json", b"{}\n")?;
    writer.finish(serde_json::json!({"model_type": "llama"}))
}

/// Everything a reader can get out of a directory: names, dtypes, shapes, decoded symbols, scales, raw bytes.
pub fn contents(dir: &ModelDir) -> Result<Vec<String>, FormatError> {
    use tersor_format::{Tensor, decode_tensor};
    dir.tensors()
        .map(|(name, tensor)| match tensor {
            Tensor::Raw(raw) => Ok(format!("{name} {} {:?} {:?}", raw.dtype(), raw.shape(), &raw.bytes()[..])),
            Tensor::Coded(coded) => {
                let decoded = decode_tensor(coded).map_err(|cause| FormatError::Tensor { place: dir.place(name), cause })?;
                Ok(format!("{name} {decoded:?}"))
            }
            _ => unreachable!("two kinds of tensors"),
        })
        .collect()
}

/// A safetensors file from its header and data.
pub fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(data);
    file
}

/// The error's text, checked to be one line.
pub fn line(error: &FormatError) -> String {
    let text = error.to_string();
    assert!(!text.contains('\n') && !text.is_empty(), "{text:?}");
    text
}
