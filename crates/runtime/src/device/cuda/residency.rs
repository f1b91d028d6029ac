//! What the strategies of a GPU have in common: which form each group has when its product comes.

use super::groups::Loader;
use crate::model::weights::Span;
use crate::residency::OpenError;
use tersor_cuda::{Buffer, CudaError, Form, PlainMatrix, QuadAt, QuadPlaces, Queue};

/// Where the groups are, for one forward pass after another. The pass goes layer by layer and announces each.
pub(super) trait Residency: Send {
    /// A pass begins.
    ///
    /// # Errors
    /// The driver's.
    fn begin(&mut self, _queue: &mut Queue<'_>) -> Result<(), CudaError> {
        Ok(())
    }

    /// The groups of `layer` are used next.
    ///
    /// # Errors
    /// The driver's.
    fn enter(&mut self, _queue: &mut Queue<'_>, _layer: usize) -> Result<(), CudaError> {
        Ok(())
    }

    /// The groups of `layer` are not used again in this pass.
    ///
    /// # Errors
    /// The driver's.
    fn leave(&mut self, _queue: &mut Queue<'_>, _layer: usize) -> Result<(), CudaError> {
        Ok(())
    }

    /// The pass ends; the compute stream waits for whatever else is under way.
    ///
    /// # Errors
    /// The driver's.
    fn end(&mut self, _queue: &mut Queue<'_>) -> Result<(), CudaError> {
        Ok(())
    }

    /// The form of a group, between `enter` and `leave` of its layer.
    fn form(&self, group: usize) -> Form<'_>;

    /// Every group has one form and one place for good.
    fn stays(&self) -> bool {
        false
    }

    /// Every pass launches the same work, so that it can be recorded once.
    fn repeats(&self) -> bool {
        true
    }

    /// A recorded pass was run again.
    fn replayed(&mut self) {}

    /// What is held.
    fn held(&self) -> Held;

    /// When layers were computed with and buffers filled in the last pass, where that is timed.
    ///
    /// # Errors
    /// The driver's.
    fn timeline(&self) -> Result<Vec<Span>, CudaError> {
        Ok(Vec::new())
    }
}

/// What a strategy holds on the device, bytes, and has done.
#[derive(Clone, Debug, Default)]
pub(super) struct Held {
    /// One line for people.
    pub detail: String,
    pub coded_bytes: u64,
    pub decoded_bytes: u64,
    pub buffer_bytes: u64,
    /// Pinned in host memory.
    pub host_bytes: u64,
    pub hits: u64,
    pub misses: u64,
    pub hit_bytes: u64,
    pub miss_bytes: u64,
}

/// A group that stays on the device in one form.
#[derive(Debug)]
pub(super) enum Resident {
    Quad(QuadPlaces, Buffer),
    Plain(PlainMatrix),
}

impl Resident {
    /// Transcodes a group and sends it to the device.
    pub fn quad(loader: &Loader<'_>, index: usize, threads: usize) -> Result<Self, OpenError> {
        let (places, matrix) = loader.quad(index, threads)?;
        let mut image = loader.zeroed(places.bytes());
        places.write(&matrix, &mut image);
        let buffer = loader.device().upload(&image, "coded weights")?;
        loader.give_back(image);
        loader.release(index);
        Ok(Self::Quad(places, buffer))
    }

    /// All groups that `coded` names, transcoded; in that order.
    pub fn quads(loader: &Loader<'_>, coded: &[usize]) -> Result<Vec<Self>, OpenError> {
        let kind = |at: usize| loader.groups.all[coded[at]].kind;
        let (firsts, others): (Vec<usize>, Vec<usize>) = (0..coded.len()).partition(|&at| (0..at).all(|before| kind(before) != kind(at)));
        let order = [&firsts[..], &others].concat();
        let quad = |i: usize, threads| Ok((order[i], Self::quad(loader, coded[order[i]], threads)?));
        let mut quads = loader.each(order.len(), firsts.len(), quad)?;
        quads.sort_unstable_by_key(|&(at, _)| at);
        Ok(quads.into_iter().map(|(_, quad)| quad).collect())
    }

    pub fn form(&self) -> Form<'_> {
        match self {
            Self::Quad(places, buffer) => Form::Quad(QuadAt { places, buffer, at: 0 }),
            Self::Plain(plain) => plain.form(),
        }
    }

    pub fn bytes(&self) -> u64 {
        match self {
            Self::Quad(places, _) => places.bytes() as u64,
            Self::Plain(plain) => plain.bytes() as u64,
        }
    }
}

/// Groups whose form never changes: `fused`, `cached`, and mixtures of both.
#[derive(Debug)]
pub(super) struct Fixed {
    groups: Vec<Resident>,
}

impl Fixed {
    /// `decoded`: which groups are held decoded.
    pub fn load(loader: &mut Loader<'_>, decoded: &[bool]) -> Result<Self, OpenError> {
        let coded: Vec<usize> = (0..decoded.len()).filter(|&index| !decoded[index]).collect();
        let mut quads = Resident::quads(loader, &coded)?.into_iter();
        let mut groups = Vec::with_capacity(decoded.len());
        for (index, &decoded) in decoded.iter().enumerate() {
            if decoded {
                groups.push(Resident::Plain(loader.plain(index)?));
                loader.release(index);
            } else {
                groups.extend(quads.next());
            }
        }
        Ok(Self { groups })
    }
}

impl Residency for Fixed {
    fn stays(&self) -> bool {
        true
    }

    fn form(&self, group: usize) -> Form<'_> {
        self.groups[group].form()
    }

    fn held(&self) -> Held {
        let (plain, quad): (Vec<&Resident>, Vec<&Resident>) = self.groups.iter().partition(|group| matches!(group, Resident::Plain(_)));
        let bytes = |groups: &[&Resident]| groups.iter().map(|group| group.bytes()).sum();
        Held {
            detail: format!("{} of {} groups decoded", plain.len(), self.groups.len()),
            coded_bytes: bytes(&quad),
            decoded_bytes: bytes(&plain),
            ..Held::default()
        }
    }
}
