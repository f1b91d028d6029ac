//! Where the bits of a tensor go.

use anyhow::{Context, Result};
use tersor_codec::{Codec, DecodeError, Histogram, Table, block_ans, fixed, huffman, pairs, rans, rans_pairs, tiered};
use tersor_format::{CodedTensor, RawTensor, ScaleScheme, Tensor, decode_tensor};

/// The account of one tensor. Bits are per weight.
pub struct TensorAccount {
    /// The model's name for it.
    pub name: String,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Number of weights, padding excluded.
    pub weights: u64,
    /// Bytes in the file: blob, scales, biases.
    pub bytes: u64,
    /// What entropy coding did; `None` for tensors stored as they are.
    pub coding: Option<Coding>,
    /// Codec id, or the element type of a raw tensor.
    pub codec: String,
}

/// The account of a coded tensor, in bits per weight.
pub struct Coding {
    /// How scales are shared: `tensor`, `row`, `group-64`, `group-64-bias`.
    pub scales: String,
    /// Empirical entropy of the symbols, found by decoding them.
    pub entropy_bits: f64,
    /// The codes themselves with escapes and far symbols.
    pub code_bits: f64,
}

impl TensorAccount {
    /// Stored bits per weight, everything counted.
    pub fn bpw(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.weights.max(1) as f64
    }

    /// What is stored beside the codes: scales, table, index, states, header, padding; bits per weight.
    pub fn side_bits(&self) -> f64 {
        self.bpw() - self.code_bits()
    }

    /// Bits per weight of the codes; all of a raw tensor.
    pub fn code_bits(&self) -> f64 {
        self.coding.as_ref().map_or(self.bpw(), |coding| coding.code_bits)
    }

    /// Accounts for a tensor of a directory. A coded one is decoded.
    pub fn measure(name: &str, tensor: &Tensor) -> Result<Self> {
        match tensor {
            Tensor::Raw(raw) => Ok(Self::raw(name, raw)),
            Tensor::Coded(coded) => Self::coded(name, coded).with_context(|| name.to_owned()),
            _ => anyhow::bail!("{name}: a kind of tensor that this command does not know"),
        }
    }

    fn raw(name: &str, raw: &RawTensor) -> Self {
        Self {
            name: name.to_owned(),
            shape: raw.shape().to_vec(),
            weights: raw.len() as u64,
            bytes: raw.bytes().len() as u64,
            coding: None,
            codec: raw.dtype().name().to_lowercase(),
        }
    }

    fn coded(name: &str, coded: &CodedTensor) -> Result<Self> {
        let mut histogram = Histogram::new();
        histogram.add(&decode_tensor(coded)?.symbols);
        let weights = coded.rows() as u64 * coded.cols() as u64;
        let group = coded.scales().group_size();
        let scales = match coded.scales().scheme() {
            ScaleScheme::Tensor => "tensor".to_owned(),
            ScaleScheme::Row => "row".to_owned(),
            ScaleScheme::GroupAffine => format!("group-{group}-bias"),
            ScaleScheme::GroupSymmetric => format!("group-{group}"),
        };
        let coding = Coding { scales, entropy_bits: histogram.entropy_bits(), code_bits: code_bits(coded)? / weights as f64 };
        Ok(Self {
            name: name.to_owned(),
            shape: vec![coded.rows(), coded.cols()],
            weights,
            bytes: coded.coded_bytes() + coded.scales().bytes(),
            coding: Some(coding),
            codec: coded.codec().to_string(),
        })
    }
}

/// Bits of all codes of a tensor, escapes and far symbols included. The state that a rANS lane ends in is counted as far as it carries
/// symbols: a state x that began at STATE_MIN has taken in log2(x / STATE_MIN) bits; the rest of the field is side information.
fn code_bits(tensor: &CodedTensor) -> Result<f64, DecodeError> {
    let mut bits = 0.0;
    for index in 0..tensor.chunk_count() {
        let (chunk, symbols) = (tensor.chunk(index), tensor.chunk_symbols(index));
        bits += match tensor.codec() {
            Codec::Rans(params) => {
                let chunk = rans::Chunk::parse(params, symbols, chunk)?;
                let bytes = chunk.words.len() + chunk.escapes.len();
                bytes as f64 * 8.0 + far_bits(chunk.far.len()) + states_bits(params, chunk.states)
            }
            Codec::BlockAns(params) => {
                let chunk = block_ans::Chunk::parse(params, symbols, chunk)?;
                let state_bytes = usize::from(params.state_bits / 8);
                let state_min = 1 << (params.state_bits - params.word_bits);
                let blocks = chunk.block_ranges().map(|range| {
                    let block = &chunk.blocks[range];
                    let state = little_endian(&block[..state_bytes.min(block.len())]);
                    (block.len().saturating_sub(state_bytes)) as f64 * 8.0 + carried(state, state_min)
                });
                blocks.sum::<f64>() + far_bits(chunk.far.len())
            }
            Codec::Huffman(params) => {
                let chunk = huffman::Chunk::parse(params, symbols, chunk)?;
                (chunk.streams.len() + chunk.escapes.len()) as f64 * 8.0 + far_bits(chunk.far.len())
            }
            Codec::Fixed(params) => {
                let chunk = fixed::Chunk::parse(params, symbols, chunk)?;
                (chunk.fields.len() + chunk.escapes.len()) as f64 * 8.0 + far_bits(chunk.far.len())
            }
            Codec::Tiered => {
                let Table::Tiered(table) = tensor.table() else { unreachable!("a table is of its codec") };
                let chunk = tiered::Chunk::parse(table, symbols, chunk)?;
                let fields: usize = chunk.tiers.iter().map(|(_, fields)| fields.len()).sum();
                let listed = chunk.listed.bytes().len() * pairs::LISTED_BYTES;
                (fields + chunk.escapes.len() + chunk.raw_lines.len() + listed) as f64 * 8.0 + far_bits(chunk.far.len())
            }
            Codec::RansPairs => {
                let Table::RansPairs(table) = tensor.table() else { unreachable!("a table is of its codec") };
                let chunk = rans_pairs::Chunk::parse(table, symbols, chunk)?;
                let listed = chunk.listed.bytes().len() * pairs::LISTED_BYTES;
                let bytes = chunk.words.len() + chunk.escapes.len() + chunk.raw_lines.len() + listed;
                // The states are those of `rans`.
                bytes as f64 * 8.0 + far_bits(chunk.far.len()) + states_bits(rans::Params::DEFAULT, chunk.states)
            }
            _ => chunk.len() as f64 * 8.0,
        };
    }
    Ok(bits)
}

fn far_bits(count: usize) -> f64 {
    (count * tersor_codec::FAR_BYTES * 8) as f64
}

/// Bits of symbols in the states of a chunk.
fn states_bits(params: rans::Params, bytes: &[u8]) -> f64 {
    states(params, bytes).map(|x| carried(x, params.state_min())).sum()
}

/// The states of a chunk: 16-bit ones as a plane of low bytes and a plane of high bytes, 32-bit ones in order.
fn states(params: rans::Params, bytes: &[u8]) -> impl Iterator<Item = u32> {
    let lanes = usize::from(params.lanes);
    let planes = params.state_bits == 16;
    (0..lanes).map(move |lane| {
        if planes { u32::from(bytes[lane]) | u32::from(bytes[lanes + lane]) << 8 } else { little_endian(&bytes[lane * 4..][..4]) }
    })
}

fn little_endian(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte))
}

fn carried(state: u32, state_min: u32) -> f64 {
    (f64::from(state.max(1)) / f64::from(state_min)).log2().max(0.0)
}

/// The part of the model a tensor belongs to, for the plot's legend.
pub fn class(name: &str) -> &'static str {
    if name.contains("embed_tokens") || name.starts_with("lm_head") {
        "embedding, head"
    } else if name.contains(".self_attn.") {
        "attention"
    } else if name.contains(".mlp.") {
        "feed-forward"
    } else {
        "other"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_read_in_both_layouts_and_carry_their_excess() {
        let narrow = rans::Params { lanes: 2, ..rans::Params::DEFAULT };
        assert_eq!(states(narrow, &[0x34, 0x78, 0x12, 0x56]).collect::<Vec<_>>(), [0x1234, 0x5678]);
        let wide = rans::Params { lanes: 1, ..rans::Params::PRECISE };
        assert_eq!(states(wide, &[1, 2, 3, 4]).collect::<Vec<_>>(), [0x0403_0201]);
        assert_eq!(carried(256, 256), 0.0);
        assert_eq!(carried(1 << 15, 256), 7.0);
    }
}
