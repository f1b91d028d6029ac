//! `auto`: for each group the cheapest form under the budget, by the rates of this GPU's own kernels.
//!
//! Where everything fits decoded and decoding inside the product is no faster, that is `cached`. Where it does not fit, groups are held decoded in the
//! order of seconds saved per byte, the others coded; where not even the coded groups fit, layers are streamed (`prefetch`).

use super::cached;
use super::groups::Loader;
use super::prefetch::Prefetch;
use super::profile::DeviceProfile;
use super::residency::{Fixed, Residency};
use crate::residency::OpenError;
use tersor_format::CodedTensor;

/// The device layout takes about this much of the file's coded bytes, a little more.
const TRANSCODED: f64 = 1.04;

/// What was decided.
#[derive(Debug, PartialEq)]
pub(super) enum Decision {
    /// Which groups are held decoded.
    Decoded(Vec<bool>),
    /// Layers are streamed.
    Stream,
}

/// One group's prices.
#[derive(Clone, Copy, Debug)]
struct Price {
    coded_bytes: u64,
    decoded_bytes: u64,
    /// Seconds that the decoded form saves in a step; negative where it loses.
    saved: f64,
}

pub(super) fn decide(loader: &Loader<'_>, available: Option<u64>, profile: &DeviceProfile) -> Decision {
    let price = |index: usize| {
        let tensors = loader.groups.all[index].slots.iter().filter_map(|&slot| loader.set.linears[slot].coded());
        let (weights, coded) =
            tensors.map(|t: &CodedTensor| (t.header().symbols(), t.coded_bytes())).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
        let (coded_bytes, decoded_bytes) = ((coded as f64 * TRANSCODED) as u64, loader.plain_bytes(index));
        let saved = profile.quad_seconds(weights, coded_bytes) - profile.plain_seconds(decoded_bytes);
        Price { coded_bytes, decoded_bytes, saved }
    };
    let prices: Vec<Price> = (0..loader.groups.all.len()).map(price).collect();
    choose(&prices, available)
}

fn choose(prices: &[Price], available: Option<u64>) -> Decision {
    let coded: u64 = prices.iter().map(|price| price.coded_bytes.min(price.decoded_bytes)).sum();
    let Some(mut room) = available.unwrap_or(u64::MAX).checked_sub(coded) else { return Decision::Stream };
    let extra = |price: &Price| price.decoded_bytes.saturating_sub(price.coded_bytes);
    let mut order: Vec<usize> = (0..prices.len()).filter(|&i| prices[i].saved > 0.0).collect();
    order.sort_by(|&a, &b| {
        let worth = |i: usize| prices[i].saved / (extra(&prices[i]) as f64).max(1.0);
        worth(b).total_cmp(&worth(a)).then(a.cmp(&b))
    });
    let mut decoded = vec![false; prices.len()];
    for i in order {
        if extra(&prices[i]) <= room {
            room -= extra(&prices[i]);
            decoded[i] = true;
        }
    }
    Decision::Decoded(decoded)
}

pub(super) fn open(loader: &mut Loader<'_>, available: Option<u64>, profile: &DeviceProfile) -> Result<Box<dyn Residency>, OpenError> {
    match decide(loader, available, profile) {
        Decision::Stream => Ok(Box::new(Prefetch::open(loader, available, false)?)),
        Decision::Decoded(decoded) if decoded.iter().all(|&d| d) => Ok(Box::new(cached::open(loader)?)),
        Decision::Decoded(decoded) => Ok(Box::new(Fixed::load(loader, &decoded)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn price(coded_bytes: u64, decoded_bytes: u64, saved: f64) -> Price {
        Price { coded_bytes, decoded_bytes, saved }
    }

    #[test]
    fn the_most_seconds_for_a_byte_come_first() {
        let prices = [price(10, 20, 1.0), price(10, 14, 1.0), price(10, 20, -1.0)];
        assert_eq!(choose(&prices, None), Decision::Decoded(vec![true, true, false]));
        assert_eq!(choose(&prices, Some(44)), Decision::Decoded(vec![true, true, false]));
        assert_eq!(choose(&prices, Some(43)), Decision::Decoded(vec![false, true, false]));
        assert_eq!(choose(&prices, Some(30)), Decision::Decoded(vec![false; 3]));
        assert_eq!(choose(&prices, Some(29)), Decision::Stream);
    }
}
