//! `fused`: the coded bytes stay mapped and are decoded inside each product; symbols never leave registers.
//!
//! Needs the least memory, the coded size. A step reads the coded bytes only, so where decoding keeps up with memory it is the fastest too.

use super::budget::Footprint;
use super::held::HeldWeights;
use super::set::TensorSet;
use super::{OpenError, Options, Strategy};
use tersor_format::ModelDir;

/// Everything stays as it is stored.
pub(super) fn footprint(set: &TensorSet, options: &Options) -> Footprint {
    set.footprint(options)
}

pub(super) fn open(dir: &ModelDir, set: TensorSet, options: &Options) -> Result<HeldWeights, OpenError> {
    let decoded = vec![false; set.linears.len()];
    HeldWeights::load(dir, set, &decoded, Strategy::Fused, options)
}
