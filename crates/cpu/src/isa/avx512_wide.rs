//! 32 rANS states of 32 bits with 16-bit words and 12 bits of probability, for AVX-512: the step that
//! `rans-precise` and `block-ans` share.
//!
//! Computes: the table entries of 32 lanes, and their next states before the refill.
//!
//! Layout: two registers, the low and the high halves of the states. A table of 4096 slots does not
//! fit registers, but its entries do, 64 of them, and the slot leads to the entry in two moves: its
//! upper 6 bits choose one of 64 buckets, which knows the entry of its first slot and where the next
//! few entries begin within it. Only the rare symbols at either end of the alphabet have so few
//! slots that several share a bucket: 3 borders suffice at 2.25 bits, 5 or 6 at 3.8.
//!
//! With `x = high * 2^16 + low`, `x >> 12 = high * 16 + (low >> 12)`, thus
//! `freq * (x >> 12) + offset = (16 freq) * high + (freq * (low >> 12) + offset)`: an unsigned 16 x 16
//! product, and a term that fits 16 bits since `4095 * 15 + 4094 < 2^16`. "Below STATE_MIN" is "high
//! half zero".
//!
//! Needs: BW. At most 64 entries, none of frequency 4096, at most 8 borders in a bucket.
//!
//! Cost: for 32 symbols 16 instructions and 3 for each border. A gather from the table in L1 instead
//! takes 32 loads, which is as long as three such steps.

use std::arch::x86_64::*;

/// Slots are divided into as many buckets as one permute can tell apart.
const BUCKETS: usize = 64;
/// Entries that one permute can tell apart.
const ENTRIES_MAX: usize = 64;
const PROB_BITS: u32 = 12;
const BUCKET_SLOTS: usize = (1 << PROB_BITS) / BUCKETS;
/// Entries that may begin within a bucket.
pub(super) const BORDERS_MAX: usize = 8;

/// The table as permutes want it.
pub(super) struct Tables {
    /// Most borders of a bucket.
    pub borders: usize,
    /// By bucket: the entry of its first slot.
    first: [u16; BUCKETS],
    /// By bucket: the first slot of the next entry that begins within it, of the one after that, and
    /// so forth; 2^16 - 1 if there is none.
    border: [[u16; BUCKETS]; BORDERS_MAX],
    /// By entry: 16 times the frequency.
    freq: [u16; ENTRIES_MAX],
    /// By entry: the first slot.
    cum: [u16; ENTRIES_MAX],
    /// By entry: the symbol byte.
    symbol: [u8; ENTRIES_MAX],
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
            border: [[u16::MAX; BUCKETS]; BORDERS_MAX],
            freq: [0; ENTRIES_MAX],
            cum: [0; ENTRIES_MAX],
            symbol: [0; ENTRIES_MAX],
        };
        let mut borders = [0; BUCKETS];
        let mut cum = 0usize;
        for (entry, &(symbol, freq)) in entries.iter().enumerate() {
            (tables.freq[entry], tables.cum[entry], tables.symbol[entry]) = (freq << 4, cum as u16, symbol);
            if !cum.is_multiple_of(BUCKET_SLOTS) {
                let bucket = cum / BUCKET_SLOTS;
                tables.border.get_mut(borders[bucket])?[bucket] = cum as u16;
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

/// The table in registers, with room for `K` borders.
#[derive(Clone, Copy)]
pub(super) struct Registers<const K: usize> {
    first: [__m512i; 2],
    border: [[__m512i; 2]; K],
    freq: [__m512i; 2],
    cum: [__m512i; 2],
    symbol: __m512i,
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

impl<const K: usize> Registers<K> {
    /// # Safety
    /// AVX-512 BW and VBMI, here and below.
    #[inline(always)]
    pub(super) unsafe fn new(tables: &Tables) -> Registers<K> {
        const { assert!(K <= BORDERS_MAX) }
        // SAFETY: all loads are of whole arrays.
        unsafe {
            let zero = [_mm512_setzero_si512(); 2];
            let mut registers = Registers {
                first: load(&tables.first),
                border: [zero; K],
                freq: load(&tables.freq),
                cum: load(&tables.cum),
                symbol: _mm512_loadu_si512(tables.symbol.as_ptr().cast()),
            };
            for k in 0..K {
                registers.border[k] = load(&tables.border[k]);
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
            let mut entry = lookup(&self.first, bucket);
            for border in &self.border {
                let reached = _mm512_cmpge_epu16_mask(slot, lookup(border, bucket));
                entry = _mm512_mask_sub_epi16(entry, reached, entry, _mm512_set1_epi16(-1));
            }
            let freq = lookup(&self.freq, entry);
            let offset = _mm512_sub_epi16(slot, lookup(&self.cum, entry));
            // 16 freq times the upper 4 bits as they stand, divided by 2^16.
            let upper = _mm512_and_si512(low, _mm512_set1_epi16(0xf000u16 as i16));
            let rest = _mm512_add_epi16(_mm512_mulhi_epu16(freq, upper), offset);
            let low = _mm512_add_epi16(_mm512_mullo_epi16(freq, high), rest);
            let carry = _mm512_cmplt_epu16_mask(low, rest);
            let product = _mm512_mulhi_epu16(freq, high);
            let high = _mm512_mask_sub_epi16(product, carry, product, _mm512_set1_epi16(-1));
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

#[inline(always)]
unsafe fn load(table: &[u16; 64]) -> [__m512i; 2] {
    // SAFETY: 128 readable bytes.
    unsafe { [_mm512_loadu_si512(table.as_ptr().cast()), _mm512_loadu_si512(table.as_ptr().add(32).cast())] }
}

#[inline(always)]
unsafe fn lookup(table: &[__m512i; 2], index: __m512i) -> __m512i {
    // SAFETY: registers only.
    unsafe { _mm512_permutex2var_epi16(table[0], index, table[1]) }
}
