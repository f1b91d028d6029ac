//! `cached`: every matrix is decoded once, while loading; the coded bytes are released tensor by tensor and then unmapped.
//!
//! A step is the plain product with the decoded form: the baseline that the other strategies are measured against. Loading reads
//! the coded bytes, so a cold start is shorter than with a file of the decoded size.

use super::budget::Footprint;
use super::held::HeldWeights;
use super::set::TensorSet;
use super::{OpenError, Options, Strategy};
use tersor_format::ModelDir;

/// Everything that is coded is held decoded.
pub(super) fn footprint(set: &TensorSet, options: &Options) -> Footprint {
    set.footprint_with(options, &vec![true; set.linears.len()])
}

pub(super) fn open(dir: &ModelDir, set: TensorSet, options: &Options) -> Result<HeldWeights, OpenError> {
    let decoded = vec![true; set.linears.len()];
    HeldWeights::load(dir, set, &decoded, Strategy::Cached, options)
}
