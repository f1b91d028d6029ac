//! `cached`: every group is decoded once, while loading. Coded bytes cross PCIe and are decoded by the device, not by the host.

use super::groups::Loader;
use super::residency::Fixed;
use crate::residency::OpenError;

/// Bytes on the device.
pub(super) fn bytes(loader: &Loader<'_>) -> u64 {
    (0..loader.groups.all.len()).map(|index| loader.plain_bytes(index)).sum()
}

pub(super) fn open(loader: &mut Loader<'_>) -> Result<Fixed, OpenError> {
    Fixed::load(loader, &vec![true; loader.groups.all.len()])
}
