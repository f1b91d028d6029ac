//! Codec ids: a codec and its parameters as one value, spelt as text.

use std::fmt;
use std::str::FromStr;

use crate::error::ParamsError;
use crate::{block_ans, fixed, huffman, rans};

/// A codec with all its parameters; its id (`Display`, `FromStr`) spells every one of them.
///
/// | id | short name |
/// |---|---|
/// | `fixed/b4` | `fixed` |
/// | `huffman/c12-planes` | `huffman` |
/// | `huffman/c12-l4` | |
/// | `rans/s16-w8-p7-l64` | `rans` |
/// | `rans/s32-w16-p12-l32` | `rans-precise` |
/// | `block-ans/s16-w8-p8-n1024` | `block-ans` |
/// | `tiered` | `tiered` |
/// | `rans-pairs` | `rans-pairs` |
///
/// ```
/// use tersor_codec::{Codec, rans};
/// assert_eq!("rans".parse::<Codec>().unwrap(), Codec::Rans(rans::Params::DEFAULT));
/// assert_eq!("rans-precise".parse::<Codec>().unwrap().to_string(), "rans/s32-w16-p12-l32");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[non_exhaustive]
pub enum Codec {
    /// Fixed-width fields, no entropy coding: the baseline and the decoded form.
    Fixed(fixed::Params),
    /// Length-limited canonical Huffman codes.
    Huffman(huffman::Params),
    /// Interleaved range asymmetric numeral systems.
    Rans(rans::Params),
    /// rANS in independent blocks of one lane each.
    BlockAns(block_ans::Params),
    /// Short fields with escapes in further tiers; the widths are the table's.
    Tiered,
    /// rANS over pairs of symbols; window and raw bits are the table's.
    RansPairs,
}

/// The codec without its parameters; the numbers are those of the file format.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
#[non_exhaustive]
#[repr(u8)]
pub enum CodecKind {
    /// [`fixed`]
    Fixed = 0,
    /// [`huffman`]
    Huffman = 1,
    /// [`rans`]
    Rans = 2,
    /// [`block_ans`]
    BlockAns = 3,
    /// [`tiered`](mod@crate::tiered)
    Tiered = 4,
    /// [`rans_pairs`](mod@crate::rans_pairs)
    RansPairs = 5,
}

impl CodecKind {
    /// Every kind, in the order of the numbers.
    pub const ALL: [Self; 6] = [Self::Fixed, Self::Huffman, Self::Rans, Self::BlockAns, Self::Tiered, Self::RansPairs];

    /// The number that files store.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The kind that files store as `code`, if there is one.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.code() == code)
    }

    /// The first part of the ids of this kind.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fixed => "fixed",
            Self::Huffman => "huffman",
            Self::Rans => "rans",
            Self::BlockAns => "block-ans",
            Self::Tiered => "tiered",
            Self::RansPairs => "rans-pairs",
        }
    }
}

impl fmt::Display for CodecKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Codec {
    /// What the short names mean, the default codec first.
    pub const SHORT_NAMES: [(&'static str, Self); 7] = [
        ("rans", Self::Rans(rans::Params::DEFAULT)),
        ("rans-precise", Self::Rans(rans::Params::PRECISE)),
        ("huffman", Self::Huffman(huffman::Params::DEFAULT)),
        ("block-ans", Self::BlockAns(block_ans::Params::DEFAULT)),
        ("tiered", Self::Tiered),
        ("rans-pairs", Self::RansPairs),
        ("fixed", Self::Fixed(fixed::Params::DEFAULT)),
    ];

    /// The codec without its parameters.
    pub fn kind(&self) -> CodecKind {
        match self {
            Self::Fixed(_) => CodecKind::Fixed,
            Self::Huffman(_) => CodecKind::Huffman,
            Self::Rans(_) => CodecKind::Rans,
            Self::BlockAns(_) => CodecKind::BlockAns,
            Self::Tiered => CodecKind::Tiered,
            Self::RansPairs => CodecKind::RansPairs,
        }
    }

    /// Refuses parameters outside the ranges that the layouts can hold.
    pub fn validate(&self) -> Result<(), ParamsError> {
        match self {
            Self::Fixed(params) => params.validate(),
            Self::Huffman(params) => params.validate(),
            Self::Rans(params) => params.validate(),
            Self::BlockAns(params) => params.validate(),
            Self::Tiered | Self::RansPairs => Ok(()),
        }
    }
}

/// `rans` at its default: the speed of registers at 1 to 2 % above the entropy.
impl Default for Codec {
    fn default() -> Self {
        Self::Rans(rans::Params::DEFAULT)
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let id = match self {
            Self::Fixed(p) => format!("fixed/b{}", p.bits),
            Self::Huffman(p) if p.has_planes() => format!("huffman/c{}-planes", p.code_bits_max),
            Self::Huffman(p) => format!("huffman/c{}-l{}", p.code_bits_max, p.lanes),
            Self::Rans(p) => {
                format!("rans/s{}-w{}-p{}-l{}", p.state_bits, p.word_bits, p.prob_bits, p.lanes)
            }
            Self::BlockAns(p) => {
                let block_ans::Params { state_bits, word_bits, prob_bits, block_symbols } = p;
                format!("block-ans/s{state_bits}-w{word_bits}-p{prob_bits}-n{block_symbols}")
            }
            Self::Tiered | Self::RansPairs => self.kind().name().to_owned(),
        };
        f.pad(&id)
    }
}

impl FromStr for Codec {
    type Err = ParamsError;

    fn from_str(text: &str) -> Result<Self, ParamsError> {
        if let Some((_, codec)) = Self::SHORT_NAMES.into_iter().find(|(name, _)| *name == text) {
            return Ok(codec);
        }
        let unknown = || ParamsError::UnknownId { id: text.to_owned() };
        let (name, parameters) = text.split_once('/').ok_or_else(unknown)?;
        let codec = match name {
            "fixed" => {
                let [bits] = fields(parameters, ["b"]).ok_or_else(unknown)?;
                Self::Fixed(fixed::Params { bits: narrow("bits", bits)? })
            }
            "huffman" => {
                let [c, lanes] = match parameters.strip_suffix("-planes") {
                    Some(code_bits) => fields(code_bits, ["c"]).map(|[c]| [c, 0]),
                    // 0 lanes are planes, which have a name.
                    None => fields(parameters, ["c", "l"]).filter(|[_, lanes]| *lanes > 0),
                }
                .ok_or_else(unknown)?;
                let code_bits_max = narrow("code_bits_max", c)?;
                Self::Huffman(huffman::Params { code_bits_max, lanes: narrow("lanes", lanes)? })
            }
            "rans" => {
                let [s, w, p, l] = fields(parameters, ["s", "w", "p", "l"]).ok_or_else(unknown)?;
                Self::Rans(rans::Params {
                    state_bits: narrow("state_bits", s)?,
                    word_bits: narrow("word_bits", w)?,
                    prob_bits: narrow("prob_bits", p)?,
                    lanes: narrow("lanes", l)?,
                })
            }
            "block-ans" => {
                let [s, w, p, n] = fields(parameters, ["s", "w", "p", "n"]).ok_or_else(unknown)?;
                Self::BlockAns(block_ans::Params {
                    state_bits: narrow("state_bits", s)?,
                    word_bits: narrow("word_bits", w)?,
                    prob_bits: narrow("prob_bits", p)?,
                    block_symbols: n,
                })
            }
            _ => return Err(unknown()),
        };
        codec.validate()?;
        Ok(codec)
    }
}

/// The numbers of `s16-w8`, whose letters must be `letters` in that order.
fn fields<const N: usize>(text: &str, letters: [&str; N]) -> Option<[u32; N]> {
    let mut values = [0; N];
    let mut parts = text.split('-');
    for (value, letter) in values.iter_mut().zip(letters) {
        let digits = parts.next()?.strip_prefix(letter)?;
        // `parse` alone would accept "+4".
        if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        *value = digits.parse().ok()?;
    }
    parts.next().is_none().then_some(values)
}

fn narrow(parameter: &'static str, value: u32) -> Result<u8, ParamsError> {
    u8::try_from(value).map_err(|_| ParamsError::OutOfRange { parameter, value, allowed: "0..=255" })
}
