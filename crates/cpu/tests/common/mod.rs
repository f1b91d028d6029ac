//! Random tensors, and the naive product that every kernel is compared with.

use tersor_codec::{Codec, block_ans, fixed, huffman, rans};
use tersor_cpu::{Activations, Level, LevelError};
use tersor_format::CodedTensor;
use tersor_quant::{QuantizedTensor, ScaleVec, Scales};

/// The levels of this machine; fails if `TERSOR_REQUIRE` names one that is missing, and names those
/// that are skipped.
pub fn levels() -> Vec<Level> {
    let available = Level::available();
    let required = std::env::var("TERSOR_REQUIRE").unwrap_or_default();
    for name in required.split(',').map(str::trim).filter(|n| !n.is_empty()) {
        assert!(!matches!(name.parse::<Level>(), Err(LevelError::Missing { .. })), "TERSOR_REQUIRE names {name}, which this machine lacks");
    }
    for name in ["avx2", "avx512"] {
        if !available.iter().any(|l| l.name() == name) {
            eprintln!("skipped: level {name} is not available on this machine");
        }
    }
    available
}

/// Every kind of codec, and every table size of the one with kernels of its own.
pub fn codecs() -> Vec<Codec> {
    let small = |prob_bits| Codec::Rans(rans::Params { state_bits: 16, word_bits: 8, prob_bits, lanes: 64 });
    let blocks = |prob_bits, block_symbols| Codec::BlockAns(block_ans::Params { state_bits: 16, word_bits: 8, prob_bits, block_symbols });
    vec![
        small(5),
        small(6),
        small(7),
        small(8),
        Codec::Rans(rans::Params { state_bits: 16, word_bits: 8, prob_bits: 7, lanes: 32 }),
        Codec::Rans(rans::Params::PRECISE),
        Codec::Rans(rans::Params { lanes: 64, ..rans::Params::PRECISE }),
        Codec::Huffman(huffman::Params::DEFAULT),
        Codec::Huffman(huffman::Params { code_bits_max: 8, lanes: 0 }),
        Codec::Huffman(huffman::Params { code_bits_max: 12, lanes: 4 }),
        Codec::BlockAns(block_ans::Params::DEFAULT),
        Codec::Tiered,
        Codec::RansPairs,
        blocks(6, 64),
        blocks(7, 128),
        blocks(8, 100),
        blocks(8, 1024),
        Codec::BlockAns(block_ans::Params { state_bits: 32, word_bits: 16, prob_bits: 12, block_symbols: 1024 }),
        Codec::Fixed(fixed::Params { bits: 2 }),
        Codec::Fixed(fixed::Params { bits: 4 }),
        Codec::Fixed(fixed::Params { bits: 5 }),
        Codec::Fixed(fixed::Params { bits: 8 }),
    ]
}

/// xorshift64*: the same numbers everywhere.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n
    }

    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn gauss(&mut self) -> f64 {
        (-2.0 * self.unit().max(1e-300).ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos()
    }
}

/// What the symbols are like.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Symbols {
    /// At most 16 values in a row: nibbles without escapes.
    Narrow,
    /// A Gaussian with tails beyond the nibble.
    Escapes,
    /// The same with outliers beyond the byte.
    Far,
    /// Most symbols beyond the nibble: bytes.
    Wide,
    /// One value only.
    Constant,
}

pub const SYMBOLS: [Symbols; 5] = [Symbols::Narrow, Symbols::Escapes, Symbols::Far, Symbols::Wide, Symbols::Constant];

/// How symbols become weights.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum ScaleKind {
    Tensor,
    Row,
    Group(u32, bool),
    Affine(u32, bool),
    /// Affine in binary32, as over an f32 checkpoint.
    Affine32(u32),
}

pub const SCALES: [ScaleKind; 8] = [
    ScaleKind::Row,
    ScaleKind::Tensor,
    ScaleKind::Group(32, false),
    ScaleKind::Group(64, true),
    ScaleKind::Affine(32, true),
    ScaleKind::Affine(64, false),
    ScaleKind::Affine(128, false),
    ScaleKind::Affine32(64),
];

pub fn tensor(random: &mut Random, rows: usize, cols: usize, symbols: Symbols, kind: ScaleKind) -> QuantizedTensor {
    let base = random.below(100) as i16 - 50;
    let one = random.below(200) as i16 - 100;
    let symbols = (0..rows * cols)
        .map(|_| match symbols {
            Symbols::Narrow => base + random.below(16) as i16,
            Symbols::Escapes => (random.gauss() * 3.0).round().clamp(-120.0, 120.0) as i16,
            Symbols::Far if random.below(300) == 0 => [i16::MIN, -129, -128, 128, 1000, i16::MAX][random.below(6)],
            Symbols::Far => (random.gauss() * 2.0).round() as i16,
            Symbols::Wide => (random.gauss() * 40.0).round().clamp(-127.0, 127.0) as i16,
            Symbols::Constant => one,
        })
        .collect();
    let mut symbols: Vec<i16> = symbols;
    if matches!(kind, ScaleKind::Affine(..) | ScaleKind::Affine32(_)) {
        // Symbols of affine schemes are q - 8: there must be room for the 8.
        symbols.iter_mut().for_each(|s| *s = (*s).min(i16::MAX - 8));
    }
    if let ScaleKind::Affine32(group_size) = kind {
        let count = rows * cols.div_ceil(group_size as usize);
        let mut reals = || ScaleVec::F32((0..count).map(|_| (random.gauss() * 0.02) as f32).collect());
        let scales = Scales::Group { group_size, scales: reals(), biases: Some(reals()) };
        return QuantizedTensor { rows, cols, symbols, scales };
    }
    let mut halves = |n: usize| -> Vec<u16> { (0..n).map(|_| half::f16::from_f64(random.gauss() * 0.02).to_bits()).collect() };
    let scales = match kind {
        ScaleKind::Tensor => Scales::Tensor { scale: halves(1)[0], scale_exponent: -3 },
        ScaleKind::Row => Scales::Row { scales: halves(rows), scale_exponent: 2 },
        ScaleKind::Group(group_size, brain) | ScaleKind::Affine(group_size, brain) => {
            let count = rows * cols.div_ceil(group_size as usize);
            let mut vec = || {
                let bits = halves(count);
                if brain {
                    ScaleVec::Bf16(bits.into_iter().map(|b| half::bf16::from_f32(half::f16::from_bits(b).to_f32()).to_bits()).collect())
                } else {
                    ScaleVec::F16(bits)
                }
            };
            let scales = vec();
            let biases = matches!(kind, ScaleKind::Affine(..) | ScaleKind::Affine32(_)).then(vec);
            Scales::Group { group_size, scales, biases }
        }
        ScaleKind::Affine32(_) => unreachable!("returned above"),
    };
    QuantizedTensor { rows, cols, symbols, scales }
}

/// The symbols of a coded tensor by the codec's oracle, row-major; or the first chunk that does not decode.
pub fn symbols_of(tensor: &CodedTensor) -> Result<Vec<i16>, usize> {
    let (rows, cols, steps) = (tensor.rows(), tensor.cols(), tensor.col_steps());
    let mut out = vec![0; rows * cols];
    for chunk in 0..tensor.chunk_count() {
        let mut symbols = vec![0i16; tensor.chunk_symbols(chunk)];
        tersor_codec::decode_chunk(tensor.table(), tensor.chunk(chunk), &mut symbols).map_err(|_| chunk)?;
        let first = tensor.chunk_row_tiles(chunk).start * 16;
        for (i, symbol) in symbols.into_iter().enumerate() {
            let (row, col) = (first + i / (steps * 64) * 16 + i % 64 / 4, i / 64 % steps * 4 + i % 4);
            if row < rows && col < cols {
                out[row * cols + col] = symbol;
            }
        }
    }
    Ok(out)
}

/// The product by its definition. (tokens, rows)
pub fn naive(tensor: &QuantizedTensor, x: &Activations) -> Vec<f32> {
    let f16 = |bits: u16| half::f16::from_bits(bits).to_f32();
    let mut out = Vec::new();
    for (block, place) in x.blocks().flat_map(|block| (0..block.tokens).map(move |place| (block, place))) {
        let of_token: Vec<i8> = block.q.iter().skip(place).step_by(block.tokens).flatten().copied().collect();
        for row in 0..tensor.rows {
            let symbols = &tensor.symbols[row * tensor.cols..][..tensor.cols];
            let mut acc = 0f32;
            for (segment, part) in symbols.chunks(x.segment()).enumerate() {
                let q = &of_token[segment * x.segment()..];
                let isum: i32 = part.iter().zip(q).map(|(s, q)| i32::from(*s) * i32::from(*q)).sum();
                let xsum: i32 = part.iter().zip(q).map(|(_, q)| i32::from(*q)).sum();
                let xscale = block.scales[segment * block.tokens + place];
                match &tensor.scales {
                    Scales::Group { scales, biases, .. } => {
                        let at = row * tensor.cols.div_ceil(x.segment()) + segment;
                        acc += (isum as f32 * scales.get(at)) * xscale;
                        if let Some(biases) = biases {
                            acc += (biases.get(at) + 8.0 * scales.get(at)) * (xsum as f32 * xscale);
                        }
                    }
                    _ => acc += isum as f32 * xscale,
                }
            }
            out.push(match &tensor.scales {
                Scales::Tensor { scale, scale_exponent } => acc * (f16(*scale) * f32::exp2(f32::from(*scale_exponent))),
                Scales::Row { scales, scale_exponent } => acc * (f16(scales[row]) * f32::exp2(f32::from(*scale_exponent))),
                Scales::Group { .. } => acc,
            });
        }
    }
    out
}
