//! 32 rANS states of 32 bits with 16-bit words and 12 bits of probability, for AVX-512: the step that
//! `rans-precise` and `block-ans` share.
//!
//! Computes: the table entries of 32 lanes, and their next states before the refill.
//!
//! Layout: two registers, the low and the high halves of the states. A table of 4096 slots does not
//! fit registers, but its entries do, 64 of them, and the slot leads to the entry in two moves: its
//! upper 6 bits choose one of 64 buckets, which knows the entry of its first slot and where the next
//! few entries begin within it. Only the rare symbols at either end of the alphabet have so few
//! slots that several share a bucket: three or four borders at 2.25 bits, five to eight at 3.8. Slots
//! in a bucket are below 64, so borders are bytes, two to a lane.
//!
//! With `x = high * 2^16 + low`, `x >> 12 = high * 16 + (low >> 12)`, thus
//! `freq * (x >> 12) + offset = (16 freq) * high + (freq * (low >> 12) + offset)`: an unsigned 16 x 16
//! product, and a term that fits 16 bits since `4095 * 15 + 4094 < 2^16`. "Below STATE_MIN" is "high
//! half zero".
//!
//! Needs: BW. At most 64 entries, none of frequency 4096, at most 8 borders in a bucket.
//!
//! Cost: for 32 symbols 19 instructions, and 4 for every two borders. Masks are avoided, since on Zen 5
//! a comparison and the masked operation behind it take 11 cycles, and plain arithmetic half of that:
//! without them, and with all chunks' states in registers, `rans-precise` went from 5.4 to 6.8 G
//! weights/s at 2.25 bits and from 3.2 to 5.5 at 3.79.

use std::arch::x86_64::*;

/// Slots are divided into as many buckets as one permute can tell apart.
const BUCKETS: usize = 64;
/// Entries that one permute can tell apart.
const ENTRIES_MAX: usize = 64;
const PROB_BITS: u32 = 12;
const BUCKET_SLOTS: usize = (1 << PROB_BITS) / BUCKETS;
/// Entries that may begin within a bucket.
const BORDERS_MAX: usize = 8;

/// The table as permutes want it.
pub(super) struct Tables {
    /// Most borders of a bucket.
    pub borders: usize,
    /// By bucket: the entry of its first slot.
    first: [u16; BUCKETS],
    /// By bucket, two bytes for two of the entries that begin within it: the slot before, counted from
    /// the bucket's first; 255 if there is none.
    border: [[[u8; 2]; BUCKETS]; BORDERS_MAX / 2],
    /// By entry: 16 times the frequency.
    freq: [u16; ENTRIES_MAX],
    /// By entry: the first slot.
    cum: [u16; ENTRIES_MAX],
    /// By entry: the symbol byte.
    symbol: [u8; ENTRIES_MAX],
    /// Ones that the compiler does not see: it would make comparisons into masks of the minimum with a
    /// constant 1, and masks are slow.
    ones: [u8; 64],
}

impl Tables {
    /// Of entries whose frequencies sum to 4096; `None` if they do not suit.
    pub(super) fn new(entries: &[(u8, u16)]) -> Option<Tables> {
        if entries.len() > ENTRIES_MAX || entries.len() < 2 {
            return None;
        }
        let mut tables = Tables {
            borders: 0,
            first: [0; BUCKETS],
            border: [[[255; 2]; BUCKETS]; BORDERS_MAX / 2],
            freq: [0; ENTRIES_MAX],
            cum: [0; ENTRIES_MAX],
            symbol: [0; ENTRIES_MAX],
            ones: [1; 64],
        };
        let mut borders = [0; BUCKETS];
        let mut cum = 0usize;
        for (entry, &(symbol, freq)) in entries.iter().enumerate() {
            (tables.freq[entry], tables.cum[entry], tables.symbol[entry]) = (freq << 4, cum as u16, symbol);
            if !cum.is_multiple_of(BUCKET_SLOTS) {
                let bucket = cum / BUCKET_SLOTS;
                tables.border.get_mut(borders[bucket] / 2)?[bucket][borders[bucket] % 2] = (cum % BUCKET_SLOTS - 1) as u8;
                borders[bucket] += 1;
            }
            let end = cum + usize::from(freq);
            // The buckets that begin in this entry.
            tables.first[cum.div_ceil(BUCKET_SLOTS)..end.div_ceil(BUCKET_SLOTS)].fill(entry as u16);
            cum = end;
        }
        tables.borders = borders.into_iter().max().unwrap_or(0);
        Some(tables)
    }
}

/// The table in registers, with room for `2 * B` borders in a bucket.
#[derive(Clone, Copy)]
pub(super) struct Registers<const B: usize> {
    first: [__m512i; 2],
    border: [[__m512i; 2]; B],
    freq: [__m512i; 2],
    cum: [__m512i; 2],
    symbol: __m512i,
    ones: __m512i,
}

/// What a step leaves of 32 lanes.
pub(super) struct Step {
    /// (32) u16 entries.
    pub entry: __m512i,
    pub low: __m512i,
    pub high: __m512i,
    /// The lanes whose state is below STATE_MIN.
    pub hungry: u32,
}

impl<const B: usize> Registers<B> {
    /// # Safety
    /// AVX-512 BW and VBMI, here and below.
    #[inline(always)]
    pub(super) unsafe fn new(tables: &Tables) -> Registers<B> {
        const { assert!(2 * B <= BORDERS_MAX) }
        // SAFETY: all loads are of whole arrays.
        unsafe {
            let zero = [_mm512_setzero_si512(); 2];
            let mut registers = Registers {
                first: load(&tables.first),
                border: [zero; B],
                freq: load(&tables.freq),
                cum: load(&tables.cum),
                symbol: _mm512_loadu_si512(tables.symbol.as_ptr().cast()),
                ones: _mm512_loadu_si512(tables.ones.as_ptr().cast()),
            };
            for b in 0..B {
                registers.border[b] = load(&tables.border[b]);
            }
            registers
        }
    }

    /// One symbol of each of 32 lanes.
    #[inline(always)]
    pub(super) unsafe fn step(&self, low: __m512i, high: __m512i) -> Step {
        // SAFETY: registers only. The permutes ignore the bits above those they need.
        unsafe {
            let bucket = _mm512_srli_epi16::<6>(low);
            let slot = _mm512_and_si512(low, _mm512_set1_epi16((1 << PROB_BITS) - 1));
            // The slot in its bucket, in both bytes; then, in each byte, how many borders it passed.
            let twice = _mm512_shuffle_epi8(_mm512_and_si512(low, _mm512_set1_epi16(63)), _mm512_loadu_si512(TWICE.as_ptr().cast()));
            let mut passed = _mm512_setzero_si512();
            for border in &self.border {
                let beyond = _mm512_subs_epu8(twice, lookup(border, bucket));
                passed = _mm512_add_epi8(passed, _mm512_min_epu8(beyond, self.ones));
            }
            let passed = _mm512_maddubs_epi16(passed, self.ones);
            let entry = _mm512_add_epi16(lookup(&self.first, bucket), passed);
            let freq = lookup(&self.freq, entry);
            let offset = _mm512_sub_epi16(slot, lookup(&self.cum, entry));
            // 16 freq times the upper 4 bits as they stand, divided by 2^16.
            let upper = _mm512_and_si512(low, _mm512_set1_epi16(0xf000u16 as i16));
            let rest = _mm512_add_epi16(_mm512_mulhi_epu16(freq, upper), offset);
            let product = _mm512_mullo_epi16(freq, high);
            let low = _mm512_add_epi16(product, rest);
            // The carry of an addition is the upper bit of a & b | (a | b) & !sum. (Comparisons would
            // do, but a mask takes many cycles from the vector units and back.)
            let carry = _mm512_srli_epi16::<15>(_mm512_ternarylogic_epi32::<0xd4>(product, rest, low));
            let high = _mm512_add_epi16(_mm512_mulhi_epu16(freq, high), carry);
            Step { entry, low, high, hungry: _mm512_testn_epi16_mask(high, high) }
        }
    }

    /// The symbol bytes of 64 entries.
    #[inline(always)]
    pub(super) unsafe fn symbols(&self, entries: __m512i) -> __m512i {
        // SAFETY: registers only.
        unsafe { _mm512_permutexvar_epi8(entries, self.symbol) }
    }
}

/// The low byte of each word, twice, by the bytes of 128 bits.
static TWICE: [u8; 64] = {
    let mut table = [0; 64];
    let mut i = 0;
    while i < 64 {
        table[i] = (i % 16 / 2 * 2) as u8;
        i += 1;
    }
    table
};

#[inline(always)]
unsafe fn load<T>(table: &[T; 64]) -> [__m512i; 2] {
    const { assert!(size_of::<T>() == 2) }
    // SAFETY: 128 readable bytes.
    unsafe { [_mm512_loadu_si512(table.as_ptr().cast()), _mm512_loadu_si512(table.as_ptr().add(32).cast())] }
}

#[inline(always)]
unsafe fn lookup(table: &[__m512i; 2], index: __m512i) -> __m512i {
    // SAFETY: registers only.
    unsafe { _mm512_permutex2var_epi16(table[0], index, table[1]) }
}
