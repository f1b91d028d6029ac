//! Matrices on the device: where the arrays of a layout lie in one allocation, and which form a product reads.

use std::sync::Arc;

use crate::driver::{Buffer, Device};
use crate::layout::{FarList, Geometry, Plain, QuadMatrix, QuadParams};
use crate::{CudaError, abi};

/// Arrays begin at multiples of this: bulk copies need 16, cache lines are 128.
const ALIGN: usize = 256;

/// Bytes of words, read as their little-endian bytes.
trait Words {
    fn put(&self, out: &mut [u8]);
}

macro_rules! words {
    ($($t:ty => |$v:ident| $bytes:expr),*) => { $(
        impl Words for [$t] {
            fn put(&self, out: &mut [u8]) {
                for ($v, out) in self.iter().zip(out.chunks_exact_mut(size_of::<$t>())) {
                    out.copy_from_slice(&$bytes);
                }
            }
        }
    )* };
}
words!(u32 => |v| v.to_le_bytes(), u64 => |v| v.to_le_bytes(), u8 => |v| [*v],
    [u32; 2] => |v| (u64::from(v[0]) | u64::from(v[1]) << 32).to_le_bytes(),
    [i32; 2] => |v| (u64::from(v[0] as u32) | u64::from(v[1] as u32) << 32).to_le_bytes());

/// Places arrays one behind the other.
#[derive(Default)]
struct Packer {
    end: usize,
}

impl Packer {
    fn place(&mut self, bytes: usize) -> usize {
        let at = self.end;
        // An array that nobody indexes still has an address of its own.
        self.end += bytes.max(1).next_multiple_of(ALIGN);
        at
    }
}

/// Where the arrays of a matrix in the quad layout lie, from the start of its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuadPlaces {
    geometry: Geometry,
    params: QuadParams,
    words: usize,
    head: usize,
    lens: usize,
    schedule: usize,
    far_offsets: usize,
    far: usize,
    patch_offsets: usize,
    patches: usize,
    planes: usize,
    table: usize,
    bytes: usize,
}

impl QuadPlaces {
    /// The places of a matrix's arrays.
    #[must_use]
    pub fn new(m: &QuadMatrix) -> Self {
        let mut p = Packer::default();
        let mut place = |bytes| p.place(bytes);
        let places = Self {
            geometry: m.geometry,
            params: m.params,
            words: place(size_of_val(&m.words[..])),
            head: place(size_of_val(&m.head[..])),
            lens: place(size_of_val(&m.lens[..])),
            schedule: place(size_of_val(&m.schedule[..])),
            far_offsets: place(size_of_val(&m.far.offsets[..])),
            far: place(size_of_val(&m.far.entries[..])),
            patch_offsets: place(size_of_val(&m.patch_offsets[..])),
            patches: place(size_of_val(&m.patches[..])),
            planes: place(m.planes.len()),
            table: place(size_of_val(&m.table[..])),
            bytes: 0,
        };
        Self { bytes: p.end, ..places }
    }

    /// Bytes of the whole, with padding.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its shape.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Raw low bits of a symbol.
    #[must_use]
    pub fn low_bits(&self) -> u32 {
        self.params.low_bits
    }

    /// Writes the arrays of the matrix whose places these are.
    ///
    /// # Panics
    /// If `out` is shorter than [`bytes`](Self::bytes), or the matrix is another.
    pub fn write(&self, m: &QuadMatrix, out: &mut [u8]) {
        assert!(*self == Self::new(m) && out.len() >= self.bytes, "places and bytes of this matrix");
        m.words.put(&mut out[self.words..]);
        m.head.put(&mut out[self.head..]);
        m.lens.put(&mut out[self.lens..]);
        m.schedule.put(&mut out[self.schedule..]);
        m.far.offsets.put(&mut out[self.far_offsets..]);
        m.far.entries.put(&mut out[self.far..]);
        m.patch_offsets.put(&mut out[self.patch_offsets..]);
        m.patches.put(&mut out[self.patches..]);
        m.planes.put(&mut out[self.planes..]);
        m.table.put(&mut out[self.table..]);
    }
}

/// A matrix in the quad layout: `places.bytes()` bytes of a buffer.
#[derive(Clone, Copy, Debug)]
pub struct QuadAt<'a> {
    /// Where its arrays lie.
    pub places: &'a QuadPlaces,
    /// The memory.
    pub buffer: &'a Buffer,
    /// Where the matrix begins in it, a multiple of 256.
    pub at: usize,
}

impl<'a> QuadAt<'a> {
    fn base(&self) -> u64 {
        assert!(self.at.is_multiple_of(ALIGN) && self.at + self.places.bytes <= self.buffer.bytes(), "the matrix lies in its buffer");
        self.buffer.address() + self.at as u64
    }

    pub(crate) fn args(&self, block_segs: usize) -> abi::Quad {
        let (p, base) = (self.places, self.base());
        let g = &p.geometry;
        let at = |offset: usize| base + offset as u64;
        let (tiles, row_tiles) = (g.tiles() as u64, g.row_tiles() as u64);
        // Exact while tile * row_tiles < 2^32; see `seg_of` in quad.cu.
        let magic = if row_tiles > 1 && tiles * row_tiles < 1 << 32 { (1u64 << 32).div_ceil(row_tiles) as u32 } else { 0 };
        abi::Quad {
            words: at(p.words),
            head: at(p.head),
            lens: at(p.lens),
            sched: at(p.schedule),
            far_off: at(p.far_offsets),
            far: at(p.far),
            patch_off: at(p.patch_offsets),
            patches: at(p.patches),
            planes: at(p.planes),
            table: at(p.table),
            table_bytes: p.params.table_bytes() as u32,
            mask: ((1 << p.params.window_bits) - 1) << p.params.junk_bits(),
            lane_mask: ((1 << p.params.copies_log2) - 1) * 4,
            magic,
            row_tiles: g.row_tiles() as i32,
            segs: g.segs() as i32,
            tc: g.tile_cols() as i32,
            n: g.padded_rows() as i32,
            k: g.padded_cols() as i32,
            one: 1,
            block_segs: block_segs as i32,
            unused: 0,
        }
    }

    /// The plain form whose nibbles are (or will be) in `nibbles`, from `at` on: low bits and far symbols are shared.
    #[must_use]
    pub fn decoded(self, nibbles: &'a Buffer, at: usize) -> PlainAt<'a> {
        let base = self.base();
        PlainAt {
            geometry: self.places.geometry(),
            low_bits: self.places.low_bits(),
            nibbles,
            at,
            planes: base + self.places.planes as u64,
            far_offsets: base + self.places.far_offsets as u64,
            far: base + self.places.far as u64,
        }
    }
}

/// Bytes of the nibbles of a matrix in the plain layout.
#[must_use]
pub fn nibble_bytes(geometry: &Geometry) -> usize {
    geometry.tiles() * geometry.tile_weights() / 2
}

/// A matrix in the plain layout.
#[derive(Debug)]
pub struct PlainMatrix {
    geometry: Geometry,
    low_bits: u32,
    /// Nibbles, then planes.
    weights: Buffer,
    planes: usize,
    /// Offsets by tile, then entries.
    far: Buffer,
    entries: usize,
}

impl PlainMatrix {
    /// Bytes on the device of nibbles and planes: offset of the planes, and the end.
    fn places(geometry: &Geometry, low_bits: u32) -> (usize, usize) {
        let mut p = Packer::default();
        p.place(nibble_bytes(geometry));
        (p.place(geometry.tiles() * geometry.tile_weights() / 8 * low_bits as usize), p.end)
    }

    /// Bytes on the device of a matrix with `far` far symbols.
    #[must_use]
    pub fn bytes_for(geometry: &Geometry, low_bits: u32, far: usize) -> usize {
        Self::places(geometry, low_bits).1 + far_places(geometry, far).1
    }

    /// Room for a matrix whose arrays the caller fills.
    pub(crate) fn empty(device: &Arc<Device>, geometry: Geometry, low_bits: u32) -> Result<Self, CudaError> {
        let (planes, end) = Self::places(&geometry, low_bits);
        let weights = device.allocate(end, "decoded weights")?;
        let (entries, far_end) = far_places(&geometry, 0);
        Ok(Self { geometry, low_bits, weights, planes, far: device.allocate(far_end, "far symbols")?, entries })
    }

    /// Sets the far symbols: offsets (tiles + 1) and entries.
    pub(crate) fn set_far(&mut self, device: &Arc<Device>, offsets: &[u32], far: &[[i32; 2]]) -> Result<(), CudaError> {
        let (entries, end) = far_places(&self.geometry, far.len());
        let mut image = vec![0; end];
        offsets.put(&mut image);
        far.put(&mut image[entries..]);
        self.far = device.upload(&image, "far symbols")?;
        self.entries = entries;
        Ok(())
    }

    /// A packed matrix, sent to the device.
    ///
    /// # Errors
    /// Out of memory.
    pub fn upload(device: &Arc<Device>, m: &Plain) -> Result<Self, CudaError> {
        let mut matrix = Self::empty(device, m.geometry, m.low_bits)?;
        let mut image = vec![0; matrix.weights.bytes()];
        m.words.put(&mut image);
        m.planes.put(&mut image[matrix.planes..]);
        matrix.weights.write(0, &image)?;
        matrix.set_far(device, &m.far.offsets, &m.far.entries)?;
        Ok(matrix)
    }

    /// Nibbles and planes, and where the planes begin.
    pub(crate) fn weights(&self) -> (&Buffer, usize) {
        (&self.weights, self.planes)
    }

    /// Bytes on the device.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.weights.bytes() + self.far.bytes()
    }

    /// For a product.
    #[must_use]
    pub fn form(&self) -> Form<'_> {
        Form::Plain(PlainAt {
            geometry: &self.geometry,
            low_bits: self.low_bits,
            nibbles: &self.weights,
            at: 0,
            planes: self.weights.address() + self.planes as u64,
            far_offsets: self.far.address(),
            far: self.far.address() + self.entries as u64,
        })
    }

    /// The arrays as they are on the device, for tests and checks.
    ///
    /// # Errors
    /// The driver's.
    pub fn download(&self) -> Result<Plain, CudaError> {
        let tiles = self.geometry.tiles();
        let offsets: Vec<u32> = self.far.read(0, tiles + 1)?;
        let entries: Vec<i32> = self.far.read(self.entries, 2 * offsets[tiles] as usize)?;
        Ok(Plain {
            geometry: self.geometry,
            low_bits: self.low_bits,
            words: self.weights.read(0, nibble_bytes(&self.geometry) / 4)?,
            planes: self.weights.read(self.planes, tiles * self.geometry.tile_weights() / 8 * self.low_bits as usize)?,
            far: FarList { offsets, entries: entries.as_chunks().0.to_vec() },
        })
    }
}

/// Offset of the far entries behind their offsets, and the end.
fn far_places(geometry: &Geometry, far: usize) -> (usize, usize) {
    let mut p = Packer::default();
    p.place(4 * (geometry.tiles() + 1));
    (p.place(8 * far), p.end)
}

/// A matrix in the plain layout, its arrays where they are.
#[derive(Clone, Copy, Debug)]
pub struct PlainAt<'a> {
    geometry: &'a Geometry,
    low_bits: u32,
    nibbles: &'a Buffer,
    at: usize,
    planes: u64,
    far_offsets: u64,
    far: u64,
}

impl PlainAt<'_> {
    pub(crate) fn nibbles(&self) -> u64 {
        assert!(
            self.at.is_multiple_of(16) && self.at + nibble_bytes(self.geometry) <= self.nibbles.bytes(),
            "the nibbles lie in their buffer"
        );
        self.nibbles.address() + self.at as u64
    }

    pub(crate) fn args(&self, split: usize) -> abi::Plain {
        let g = self.geometry;
        abi::Plain {
            nibbles: self.nibbles(),
            planes: self.planes,
            far_off: self.far_offsets,
            far: self.far,
            row_tiles: g.row_tiles() as i32,
            segs: g.segs() as i32,
            tc: g.tile_cols() as i32,
            n: g.padded_rows() as i32,
            k: g.padded_cols() as i32,
            split: split as i32,
        }
    }
}

/// The form of a matrix that a product reads.
#[derive(Clone, Copy, Debug)]
pub enum Form<'a> {
    /// Coded: decoded inside the product.
    Quad(QuadAt<'a>),
    /// Decoded.
    Plain(PlainAt<'a>),
}

impl Form<'_> {
    /// The shape.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        match self {
            Self::Quad(quad) => quad.places.geometry(),
            Self::Plain(plain) => plain.geometry,
        }
    }

    pub(crate) fn low_bits(&self) -> u32 {
        match self {
            Self::Quad(quad) => quad.places.low_bits(),
            Self::Plain(plain) => plain.low_bits,
        }
    }

    /// Tokens that a product takes together, of `tokens` in all: what the activations must be prepared for.
    #[must_use]
    pub fn batch(&self, tokens: usize) -> usize {
        match (self, tokens) {
            (_, 0..=1) => 1,
            (_, 2..=8) => 8,
            (Self::Quad(_), _) | (_, 9..=16) => 16,
            (Self::Plain(_), _) => 32,
        }
    }
}
