//! The file's `rans` and `rans-pairs` chunks, decoded on the device into the plain layout: coded bytes cross PCIe, not decoded ones.
//!
//! Chunks are gathered in pinned memory, two batches in turn, so that gathering, copying and decoding overlap.

use std::sync::Arc;
use std::time::Instant;

use tersor_codec::{DecodeError, ESCAPE, FAR_BYTES, FarList, Table, rans, rans_pairs};

use crate::CudaError;
use crate::abi::{RansChunk, RansJob};
use crate::driver::{Buffer, Device, Event, Function, Pinned, Shape, Stream};
use crate::kernels::Kernels;
use crate::layout::{Geometry, LANES, TILE_ROWS};
use crate::matrix::{PlainMatrix, nibble_bytes};

/// Bytes of a batch. A warp decodes a chunk, and a GPU wants many warps: chunks of wide matrices are large.
const BATCH_BYTES: usize = 64 << 20;
/// Most threads that gather a batch in pinned memory: one copies at a fifth of what PCIe carries.
const GATHER_THREADS_MAX: usize = 16;
/// Readable bytes behind a chunk that the kernel asks for.
const CHUNK_PADDING: usize = 64;
/// Chunks begin at multiples of this in the file, and so here.
const CHUNK_ALIGN: usize = 16;
/// Entries of a table on the device, one for each low byte of a state.
const ENTRIES: usize = 256;

/// A table of a codec whose chunks the device decodes.
#[derive(Clone, Copy, Debug)]
pub struct RansTable<'a>(Coder<'a>);

#[derive(Clone, Copy, Debug)]
enum Coder<'a> {
    Singles(&'a rans::Table),
    Pairs(&'a rans_pairs::Table),
}

impl<'a> RansTable<'a> {
    /// If there is a kernel for chunks of this table: `rans` with 16-bit states, 8-bit words, 256 slots at most and 64 lanes, and `rans-pairs`.
    #[must_use]
    pub fn new(table: &'a Table) -> Option<Self> {
        match table {
            Table::Rans(table) => {
                let known = matches!(table.params(), rans::Params { state_bits: 16, word_bits: 8, prob_bits: 1..=8, lanes: 64 });
                known.then_some(Self(Coder::Singles(table)))
            }
            Table::RansPairs(table) => Some(Self(Coder::Pairs(table))),
            _ => None,
        }
    }
}

/// A matrix of a stack, as the file holds it.
#[derive(Clone, Debug)]
pub struct RansPart<'a> {
    /// The table.
    pub table: RansTable<'a>,
    /// Chunks, in order, each with the row tiles that it holds.
    pub chunks: Vec<(&'a [u8], usize)>,
    /// Columns of the matrix.
    pub cols: usize,
    /// First row tile in the stack.
    pub row_tile: usize,
    /// Most symbols that may leave the nibbles and low bits: capacity of the list.
    pub far_max: usize,
}

/// What the device gets of a chunk, from its states on, and how much of it are words and escapes.
struct Sent<'a> {
    bytes: &'a [u8],
    words: usize,
    escapes: usize,
}

impl Coder<'_> {
    /// (256): by the low byte of a state, as `Lanes` in rans.cuh wants it.
    fn packed(&self) -> Vec<u32> {
        (0..=u8::MAX).map(|low| self.entry(low)).collect()
    }

    /// `min(scale, 255) | rest << 8 | symbol << 16 | (scale - min(scale, 255)) << 24`: a state with these low 8 bits and the others `high` becomes `scale * high +
    /// rest`. With `p` = `prob_bits` that is `freq * (state >> p) + offset`, since `state >> p` is `high << (8 - p) | low >> p`.
    fn entry(&self, low: u8) -> u32 {
        let (prob_bits, freq, offset, symbol) = match self {
            Self::Singles(table) => {
                let (slots, prob_bits) = (table.slots(), table.params().prob_bits);
                let slot = usize::from(low) & ((1 << prob_bits) - 1);
                (prob_bits, u32::from(slots.freq[slot]), u32::from(slots.offset[slot]), slots.symbol_byte[slot])
            }
            Self::Pairs(table) => {
                let (slots, slot) = (table.slots(), usize::from(low));
                (8, slots.freq[slot].into(), slots.offset[slot].into(), slots.pair_byte[slot])
            }
        };
        // 256 at most, for a symbol alone in the table; rest < scale, since offset < freq.
        let (scale, rest) = (freq << (8 - prob_bits), freq * (u32::from(low) >> prob_bits) + offset);
        let factor = scale.min(255);
        factor | rest << 8 | u32::from(symbol) << 16 | (scale - factor) << 24
    }

    /// Splits a chunk of `symbols` symbols. What it lists is left to the host: `correct` is told its positions and how much more its symbols are
    /// than those that the kernel decodes in their places, with `low_bits` raw low bits.
    fn split<'a>(
        &self,
        symbols: usize,
        bytes: &'a [u8],
        low_bits: u32,
        correct: &mut dyn FnMut(usize, i32),
    ) -> Result<Sent<'a>, DecodeError> {
        // What the kernel reads, from the states on, are the bytes before the far entries.
        let before_far = |sent: usize, far: &FarList<'_>| {
            let end = bytes.len() - far.len() * FAR_BYTES;
            &bytes[end - sent..end]
        };
        match self {
            Self::Singles(table) => {
                let chunk = rans::Chunk::parse(table.params(), symbols, bytes)?;
                // The kernel takes symbol byte 0 for the least symbol of the nibbles, low bits 0.
                chunk.far.iter().for_each(|far| correct(far.position as usize, i32::from(far.symbol) - (-8 << low_bits)));
                let sent = chunk.states.len() + chunk.words.len() + chunk.escapes.len();
                Ok(Sent { bytes: before_far(sent, &chunk.far), words: chunk.words.len(), escapes: chunk.escapes.len() })
            }
            Self::Pairs(table) => {
                let chunk = rans_pairs::Chunk::parse(table, symbols, bytes)?;
                let decoded = i32::from(table.window().listed_byte()) - 128;
                let mut far = chunk.far.iter();
                for (position, byte) in chunk.listed.iter() {
                    let symbol = match byte {
                        ESCAPE => {
                            let own = far.next().filter(|far| far.position as usize == position);
                            i32::from(own.ok_or(DecodeError::FarMismatch { position })?.symbol)
                        }
                        _ => i32::from(byte) - 128,
                    };
                    if symbol != decoded {
                        correct(position, symbol - decoded);
                    }
                }
                if let Some(far) = far.next() {
                    return Err(DecodeError::FarMismatch { position: far.position as usize });
                }
                let sent = chunk.states.len() + chunk.escapes.len() + chunk.raw_lines.len() + chunk.words.len();
                Ok(Sent { bytes: before_far(sent, &chunk.far), words: chunk.words.len(), escapes: chunk.escapes.len() })
            }
        }
    }
}

impl RansPart<'_> {
    fn chunk_symbols(&self, row_tiles: usize) -> usize {
        row_tiles * self.cols.div_ceil(4) * 4 * TILE_ROWS
    }

    /// Most entries of the kernel's list. Where the symbol that stands in for the listed ones leaves the nibbles, they are in it too.
    fn list_max(&self, low_bits: u32) -> usize {
        let listed = match self.table.0 {
            Coder::Pairs(table) if !(-8..8).contains(&((i32::from(table.window().listed_byte()) - 128) >> low_bits)) => {
                let listed = |&(bytes, row_tiles): &(&[u8], usize)| {
                    rans_pairs::Chunk::parse(table, self.chunk_symbols(row_tiles), bytes).map_or(0, |chunk| chunk.listed.bytes().len())
                };
                self.chunks.iter().map(listed).sum()
            }
            _ => 0,
        };
        self.far_max + listed
    }
}

/// Decodes chunks on the device.
#[derive(Debug)]
pub struct RansDecoder {
    device: Arc<Device>,
    staging: [Pinned; 2],
    coded: [Buffer; 2],
    descriptors: [Pinned; 2],
    chunks: [Buffer; 2],
    /// The copy from the staging area is done.
    copied: [Event; 2],
    /// The kernel that reads the buffer is done.
    decoded: [Event; 2],
    /// Status and number of far symbols.
    counters: Buffer,
    /// Events around each launch, while it is measured.
    timed: Option<Vec<(Event, Event)>>,
    /// Table of the part at work.
    table: Buffer,
    next: usize,
}

/// The batch being filled: chunks with their places.
#[derive(Default)]
struct Batch<'a> {
    bytes: usize,
    chunks: Vec<(RansChunk, &'a [u8])>,
    first_chunk: usize,
}

impl Batch<'_> {
    /// Writes the chunks to their places, which ascend.
    fn gather(&self, mut area: &mut [u8]) {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(GATHER_THREADS_MAX);
        let share = self.chunks.len().div_ceil(threads).max(1);
        std::thread::scope(|scope| {
            let mut start = 0;
            for part in self.chunks.chunks(share) {
                let (last, bytes) = part[part.len() - 1];
                let end = last.offset as usize + bytes.len();
                let (mine, rest) = std::mem::take(&mut area).split_at_mut(end - start);
                area = rest;
                let first = start;
                start = end;
                scope.spawn(move || {
                    for (chunk, bytes) in part {
                        mine[chunk.offset as usize - first..][..bytes.len()].copy_from_slice(bytes);
                    }
                });
            }
        });
    }
}

impl RansDecoder {
    /// With its staging areas.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        let descriptor_bytes = BATCH_BYTES / CHUNK_ALIGN / 8 * size_of::<RansChunk>();
        let pinned = |bytes| Ok::<_, CudaError>([device.pin(bytes)?, device.pin(bytes)?]);
        let buffers = |bytes| Ok::<_, CudaError>([device.allocate(bytes, "coded chunks")?, device.allocate(bytes, "coded chunks")?]);
        let events = || Ok::<_, CudaError>([device.event(false)?, device.event(false)?]);
        Ok(Self {
            device: Arc::clone(device),
            staging: pinned(BATCH_BYTES)?,
            coded: buffers(BATCH_BYTES)?,
            descriptors: pinned(descriptor_bytes)?,
            chunks: buffers(descriptor_bytes)?,
            copied: events()?,
            decoded: events()?,
            counters: device.allocate(8, "counters")?,
            timed: None,
            table: device.allocate(4 * ENTRIES, "a decoding table")?,
            next: 0,
        })
    }

    /// Decodes the parts of a stack into the plain layout with `low_bits` raw low bits.
    ///
    /// # Errors
    /// [`CudaError::Corrupt`] for chunks that no encoder wrote, out of memory, the driver's.
    pub fn decode(
        &mut self,
        kernels: &Kernels,
        geometry: Geometry,
        low_bits: u32,
        parts: &[RansPart<'_>],
    ) -> Result<PlainMatrix, CudaError> {
        let far_max: usize = parts.iter().map(|part| part.list_max(low_bits)).sum();
        let mut matrix = PlainMatrix::empty(&self.device, geometry, low_bits)?;
        let list = self.device.allocate(12 * far_max, "far symbols")?;
        // Symbol 0 everywhere, so that cells that pad rows and columns stay that: even columns hold 0 + 8 in the low nibble, odd ones 0 in the high.
        let (weights, planes) = matrix.weights();
        weights.fill_range(0, nibble_bytes(&geometry), 0x08, Stream::Side)?;
        weights.fill_range(planes, weights.bytes() - planes, 0, Stream::Side)?;
        self.counters.fill_range(0, 8, 0, Stream::Side)?;
        let mut far = Vec::new();
        for part in parts {
            self.decode_part(kernels, &matrix, &geometry, low_bits, part, &list, far_max, &mut far)?;
        }
        let counters: Vec<u32> = self.counters.read(0, 2)?;
        if counters[0] != 0 {
            return Err(CudaError::Corrupt { chunk: counters[0] as usize - 1 });
        }
        let found = counters[1] as usize;
        if found > far_max {
            return Err(CudaError::Unsupported {
                what: format!("a matrix with {found} wide symbols where its header announces {far_max}"),
            });
        }
        let words: Vec<u32> = list.read(0, 3 * found)?;
        far.extend(words.as_chunks::<3>().0.iter().map(|&[tile, at, delta]| (tile, [at as i32, delta as i32])));
        let (offsets, entries) = by_tile(far, geometry.tiles());
        matrix.set_far(&self.device, &offsets, &entries)?;
        Ok(matrix)
    }

    /// Seconds from the first byte of a part that is sent to its last that is decoded, and those in which the decoding kernel ran, for measurements: allocation
    /// and the list of far symbols are left out.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub fn pipeline_seconds(
        &mut self,
        kernels: &Kernels,
        geometry: Geometry,
        low_bits: u32,
        part: &RansPart<'_>,
    ) -> Result<(f64, f64), CudaError> {
        let matrix = PlainMatrix::empty(&self.device, geometry, low_bits)?;
        let far_max = part.list_max(low_bits);
        let list = self.device.allocate(12 * far_max, "far symbols")?;
        self.counters.fill_range(0, 8, 0, Stream::Side)?;
        self.device.synchronize()?;
        self.timed = Some(Vec::new());
        let start = Instant::now();
        let done = self.decode_part(kernels, &matrix, &geometry, low_bits, part, &list, far_max, &mut Vec::new());
        let all = start.elapsed().as_secs_f64();
        let launches = self.timed.take().unwrap_or_default();
        done?;
        let kernel = launches.iter().map(|(start, end)| start.seconds_until(end)).sum::<Result<f64, _>>()?;
        Ok((all, kernel))
    }

    #[allow(clippy::too_many_arguments)] // What `decode` knows.
    fn decode_part(
        &mut self,
        kernels: &Kernels,
        matrix: &PlainMatrix,
        geometry: &Geometry,
        low_bits: u32,
        part: &RansPart<'_>,
        list: &Buffer,
        far_max: usize,
        far: &mut Vec<(u32, [i32; 2])>,
    ) -> Result<(), CudaError> {
        let coder = part.table.0;
        self.table.write(0, &coder.packed())?;
        let (kernel, (raw_bits, base)) = match coder {
            Coder::Singles(_) => (&kernels.rans_decode, (0, 0)),
            Coder::Pairs(table) => (&kernels.rans_pairs_decode, (table.window().raw_bits(), table.window().base())),
        };
        let col_steps = part.cols.div_ceil(4);
        let mut job = RansJob {
            payload: 0,
            chunks: 0,
            table: self.table.address(),
            nibbles: matrix.weights().0.address(),
            planes: matrix.weights().0.address() + matrix.weights().1 as u64,
            far: list.address(),
            far_count: self.counters.address() + 4,
            status: self.counters.address(),
            col_steps: col_steps as u32,
            row_tiles: geometry.row_tiles() as u32,
            tc: geometry.tile_cols() as u32,
            r: low_bits,
            far_capacity: far_max as u32,
            first_chunk: 0,
            raw_bits: raw_bits.into(),
            base: base.into(),
        };
        let mut batch = Batch::default();
        let mut row_tile = part.row_tile;
        for (number, (bytes, row_tiles)) in part.chunks.iter().enumerate() {
            let mut correct = |position, delta| far.push(far_of(geometry, row_tile, col_steps, position, delta));
            let sent = coder.split(part.chunk_symbols(*row_tiles), bytes, low_bits, &mut correct);
            let sent = sent.map_err(|_| CudaError::Corrupt { chunk: number })?;
            let room = sent.bytes.len() + CHUNK_PADDING;
            if room > BATCH_BYTES {
                return Err(CudaError::Unsupported { what: format!("a chunk of {} bytes", bytes.len()) });
            }
            if batch.bytes + room > BATCH_BYTES
                || batch.chunks.len() * size_of::<RansChunk>() + size_of::<RansChunk>() > self.descriptors[0].bytes().len()
            {
                self.send(kernel, &mut job, &mut batch)?;
            }
            if batch.chunks.is_empty() {
                batch.first_chunk = number;
            }
            let place = RansChunk {
                offset: batch.bytes as u64,
                words: sent.words as u32,
                escapes: sent.escapes as u32,
                row_tile: row_tile as u32,
                row_tiles: *row_tiles as u32,
            };
            batch.chunks.push((place, sent.bytes));
            batch.bytes = (batch.bytes + room).next_multiple_of(CHUNK_ALIGN);
            row_tile += row_tiles;
        }
        self.send(kernel, &mut job, &mut batch)?;
        // The table is written anew for the next part.
        self.device.synchronize_stream(Stream::Compute)
    }

    /// Copies the batch on the side stream and decodes it on the compute stream.
    fn send(&mut self, kernel: &Function, job: &mut RansJob, batch: &mut Batch<'_>) -> Result<(), CudaError> {
        if batch.chunks.is_empty() {
            return Ok(());
        }
        let i = self.next;
        let descriptor_bytes = batch.chunks.len() * size_of::<RansChunk>();
        // The areas are free once their last copies are done.
        self.copied[i].wait_on_host()?;
        batch.gather(self.staging[i].bytes_mut());
        for ((chunk, _), out) in batch.chunks.iter().zip(self.descriptors[i].bytes_mut().chunks_exact_mut(size_of::<RansChunk>())) {
            out[..8].copy_from_slice(&chunk.offset.to_le_bytes());
            for (field, out) in [chunk.words, chunk.escapes, chunk.row_tile, chunk.row_tiles].iter().zip(out[8..].chunks_exact_mut(4)) {
                out.copy_from_slice(&field.to_le_bytes());
            }
        }
        let device = &self.device;
        device.wait(&self.decoded[i], Stream::Side)?;
        device.copy_in(&self.coded[i], 0, &self.staging[i], 0, batch.bytes.min(BATCH_BYTES), Stream::Side)?;
        device.copy_in(&self.chunks[i], 0, &self.descriptors[i], 0, descriptor_bytes, Stream::Side)?;
        device.record(&self.copied[i], Stream::Side)?;
        device.wait(&self.copied[i], Stream::Compute)?;
        (job.payload, job.chunks) = (self.coded[i].address(), self.chunks[i].address());
        job.first_chunk = batch.first_chunk as u32;
        let shape = Shape {
            grid: (batch.chunks.len() as u32, 1),
            threads: LANES as u32,
            shared_bytes: 0,
            cluster: 1,
            programmatic: false,
            cooperative: false,
        };
        let events = if self.timed.is_some() { Some((device.event(true)?, device.event(true)?)) } else { None };
        if let Some((start, _)) = &events {
            device.record(start, Stream::Compute)?;
        }
        // SAFETY: RansJob is the parameter of both kernels; its addresses are buffers that live until the stream was synchronized.
        unsafe { device.launch(kernel, shape, Stream::Compute, &mut [(&raw mut *job).cast()]) }?;
        if let Some((_, end)) = &events {
            device.record(end, Stream::Compute)?;
        }
        device.record(&self.decoded[i], Stream::Compute)?;
        if let (Some(timed), Some(events)) = (&mut self.timed, events) {
            timed.push(events);
        }
        self.next ^= 1;
        *batch = Batch::default();
        Ok(())
    }
}

/// Tile and entry of a symbol at a position of a chunk that is `delta` more than what the kernel decodes there.
fn far_of(geometry: &Geometry, first_row_tile: usize, col_steps: usize, position: usize, delta: i32) -> (u32, [i32; 2]) {
    let (tile_index, in_tile) = (position / 64, position % 64);
    let (row_tile, col_step) = (first_row_tile + tile_index / col_steps, tile_index % col_steps);
    let (row, col) = (in_tile / 4, col_step * 4 + in_tile % 4);
    let (tile, lane, weight) = place(geometry, row_tile, row, col);
    (tile as u32, [(lane | weight << 5) as i32, delta])
}

/// Tile, lane and weight of a cell: row of the row tile, column of the matrix.
fn place(geometry: &Geometry, row_tile: usize, row: usize, col: usize) -> (usize, usize, usize) {
    let (seg, in_seg) = (col / geometry.tile_cols(), col % geometry.tile_cols());
    let (block, in_block) = (in_seg / 64, in_seg % 64);
    let (half, c, k) = (in_block / 32, in_block % 32 / 8, in_block % 8);
    let quad = block * 8 + half * 4 + row / 8 * 2 + k / 4;
    (seg * geometry.row_tiles() + row_tile, row % 8 * 4 + c, quad * 4 + k % 4)
}

/// Offsets (tiles + 1) and entries, tile by tile.
fn by_tile(mut far: Vec<(u32, [i32; 2])>, tiles: usize) -> (Vec<u32>, Vec<[i32; 2]>) {
    far.sort_unstable();
    let mut offsets = vec![0u32; tiles + 1];
    for (tile, _) in &far {
        offsets[*tile as usize + 1] += 1;
    }
    for tile in 0..tiles {
        offsets[tile + 1] += offsets[tile];
    }
    (offsets, far.into_iter().map(|(_, entry)| entry).collect())
}

#[cfg(test)]
mod tests {
    use tersor_codec::{Codec, Histogram, Table, rans};

    use super::*;

    /// What dp4a makes of an entry and a state's factors, and the entry's symbol byte.
    fn by_entry(entries: &[u32], state: u32) -> (u32, u8) {
        let [factor, rest, symbol, more] = entries[state as usize & 255].to_le_bytes();
        let high = state >> 8;
        (u32::from(factor) * high + u32::from(rest) + u32::from(more) * high, symbol)
    }

    fn check(table: &Table, prob_bits: u32, slot: impl Fn(usize) -> (u16, u16, u8)) {
        let coder = RansTable::new(table).unwrap().0;
        let entries = coder.packed();
        for state in 0..1 << 16 {
            let (freq, offset, symbol) = slot(state as usize & ((1 << prob_bits) - 1));
            let next = u32::from(freq) * (state >> prob_bits) + u32::from(offset);
            assert_eq!(by_entry(&entries, state), (next, symbol), "{state}");
        }
        let mut distinct = entries.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), 256, "an entry tells its byte");
    }

    /// Every state, with every number of slots, from many symbols to one.
    #[test]
    fn entries_are_the_codecs_arithmetic() {
        for spread in [0i16, 1, 3, 20] {
            let mut histogram = Histogram::new();
            let symbols: Vec<i16> = (-spread..=spread).flat_map(|symbol| vec![symbol; 1 << (8 - symbol.unsigned_abs().min(8))]).collect();
            histogram.add(&symbols);
            for prob_bits in 1..=8 {
                let table = Table::build(Codec::Rans(rans::Params { prob_bits, ..rans::Params::DEFAULT }), &histogram).unwrap();
                let Table::Rans(inner) = &table else { unreachable!("a table of rans") };
                let slots = inner.slots();
                check(&table, prob_bits.into(), |slot| (slots.freq[slot], slots.offset[slot], slots.symbol_byte[slot]));
            }
            let table = Table::build(Codec::RansPairs, &histogram).unwrap();
            let Table::RansPairs(inner) = &table else { unreachable!("a table of rans-pairs") };
            let slots = inner.slots();
            check(&table, 8, |slot| (slots.freq[slot].into(), slots.offset[slot].into(), slots.pair_byte[slot]));
        }
    }
}
