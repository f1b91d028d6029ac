//! `fused`: every group stays coded on the device, in the layout that its kernels decode inside the product.

use super::groups::Loader;
use super::residency::Fixed;
use crate::residency::OpenError;

pub(super) fn open(loader: &mut Loader<'_>) -> Result<Fixed, OpenError> {
    Fixed::load(loader, &vec![false; loader.groups.all.len()])
}
