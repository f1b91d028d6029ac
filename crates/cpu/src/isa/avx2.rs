//! A tile as two 256-bit registers: rows 0..8 and 8..16.

use std::arch::x86_64::*;

use super::{Isa, TileBytes, prefetch};
use crate::ops::LANES;
use crate::{Avx2, TILE_COLS, TILE_ROWS};

/// How far ahead of lines the memory is told what comes: the processor's own prefetcher stops at the end of a page, and a
/// line takes so many instructions that few are under way at once.
const LINES_AHEAD_BYTES: usize = 2048;

/// An expression for each of the two halves. Not `array::from_fn`: the compiler does not inline
/// intrinsics into a closure that lacks the features of its caller.
macro_rules! halves {
    (|$i:ident| $half:expr) => {{
        macro_rules! half {
            ($value:literal) => {{
                let $i = $value;
                $half
            }};
        }
        [half!(0), half!(1)]
    }};
}

impl Isa for Avx2 {
    type Tile = [__m256i; 2];
    type Sums = [__m256i; 2];
    type Floats = [__m256; 2];
    type Table = [__m256i; 4];
    const SPREADS: bool = false;

    #[inline(always)]
    fn load(self, tile: &TileBytes) -> [__m256i; 2] {
        // SAFETY: 64 readable bytes; the token proves AVX2, here and below.
        unsafe { [_mm256_loadu_si256(tile.as_ptr().cast()), _mm256_loadu_si256(tile.as_ptr().add(32).cast())] }
    }

    #[inline(always)]
    fn store(self, tile: [__m256i; 2], out: &mut TileBytes) {
        // SAFETY: 64 writable bytes.
        unsafe {
            _mm256_storeu_si256(out.as_mut_ptr().cast(), tile[0]);
            _mm256_storeu_si256(out.as_mut_ptr().add(32).cast(), tile[1]);
        }
    }

    #[inline(always)]
    fn splat(self, b: u8) -> [__m256i; 2] {
        // SAFETY: registers only.
        unsafe { [_mm256_set1_epi8(b as i8); 2] }
    }

    #[inline(always)]
    fn low(self, line: [__m256i; 2], bias: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: registers only.
        unsafe {
            let nibble = _mm256_set1_epi8(15);
            halves!(|i| _mm256_add_epi8(_mm256_and_si256(line[i], nibble), bias[i]))
        }
    }

    #[inline(always)]
    fn high(self, line: [__m256i; 2], bias: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: registers only.
        unsafe {
            let nibble = _mm256_set1_epi8(15);
            halves!(|i| _mm256_add_epi8(_mm256_and_si256(_mm256_srli_epi16::<4>(line[i]), nibble), bias[i]))
        }
    }

    #[inline(always)]
    fn shift_right(self, tile: [__m256i; 2], bits: u32) -> [__m256i; 2] {
        // SAFETY: registers only.
        unsafe { halves!(|i| _mm256_srl_epi16(tile[i], _mm_cvtsi32_si128(bits as i32))) }
    }

    #[inline(always)]
    fn add_bytes(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: registers only.
        unsafe { halves!(|i| _mm256_add_epi8(a[i], b[i])) }
    }

    #[inline(always)]
    fn select_bits(self, mask: [__m256i; 2], a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: registers only.
        unsafe { halves!(|i| _mm256_or_si256(_mm256_and_si256(mask[i], a[i]), _mm256_andnot_si256(mask[i], b[i]))) }
    }

    /// Quarters of 16 bytes, each in both halves of a register.
    #[inline(always)]
    fn table(self, bytes: &TileBytes) -> [__m256i; 4] {
        // SAFETY: four times 16 readable bytes.
        unsafe {
            let quarter = |i: usize| _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes[16 * i..].as_ptr().cast()));
            [quarter(0), quarter(1), quarter(2), quarter(3)]
        }
    }

    /// A shuffle in every quarter, and a choice among them by bits 4 and 5 of the index. The shuffle gives
    /// 0 where the index has its highest bit set, so the bits above four go.
    #[inline(always)]
    fn lookup(self, table: [__m256i; 4], index: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: registers only. A shift of 16-bit units moves bits 4 and 5 to the highest of their own byte.
        unsafe {
            halves!(|i| {
                let at = _mm256_and_si256(index[i], _mm256_set1_epi8(15));
                let (odd, upper) = (_mm256_slli_epi16::<3>(index[i]), _mm256_slli_epi16::<2>(index[i]));
                let low = _mm256_blendv_epi8(_mm256_shuffle_epi8(table[0], at), _mm256_shuffle_epi8(table[1], at), odd);
                let high = _mm256_blendv_epi8(_mm256_shuffle_epi8(table[2], at), _mm256_shuffle_epi8(table[3], at), odd);
                _mm256_blendv_epi8(low, high, upper)
            })
        }
    }

    #[inline(always)]
    unsafe fn unescape(self, tile: [__m256i; 2], escape: [__m256i; 2], escapes: *const u8) -> ([__m256i; 2], usize) {
        // SAFETY: registers only.
        let mask = unsafe { equal(tile, escape) };
        if mask == 0 {
            return (tile, 0);
        }
        // SAFETY: 64 readable bytes, by the contract.
        unsafe {
            let next = expand(escapes, mask);
            let merged = halves!(|i| {
                let escaped = _mm256_cmpeq_epi8(tile[i], escape[i]);
                _mm256_or_si256(_mm256_andnot_si256(escaped, tile[i]), next[i])
            });
            (merged, mask.count_ones() as usize)
        }
    }

    #[inline(always)]
    fn select(self, mask: u64, zeros: [__m256i; 2], ones: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: registers only.
        unsafe {
            // Each lane gets the byte of the mask that has its bit, and compares the bit.
            let bytes = _mm256_set1_epi64x(mask as i64);
            let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201u64 as i64);
            halves!(|i| {
                let of = _mm256_add_epi8(_mm256_loadu_si256(MASK_BYTES.as_ptr().cast()), _mm256_set1_epi8(4 * i));
                let own = _mm256_and_si256(_mm256_shuffle_epi8(bytes, of), bit);
                _mm256_blendv_epi8(zeros[i as usize], ones[i as usize], _mm256_cmpeq_epi8(own, bit))
            })
        }
    }

    #[inline(always)]
    unsafe fn expand(self, mask: u64, zeros: [__m256i; 2], ones: *const u8) -> [__m256i; 2] {
        // SAFETY: 64 readable bytes, by the contract.
        self.select(mask, zeros, unsafe { expand(ones, mask) })
    }

    #[inline(always)]
    unsafe fn merge(self, mask: u64, zeros: *const u8, ones: *const u8) -> [__m256i; 2] {
        // SAFETY: 64 readable bytes at both, by the contract.
        unsafe { merge(mask, zeros, ones) }
    }

    #[inline(always)]
    fn narrow(self, tile: [__m256i; 2], bias: [__m256i; 2], lowest: [__m256i; 2]) -> ([__m256i; 2], u64) {
        // SAFETY: registers only.
        unsafe {
            let most = _mm256_set1_epi8(15);
            let mut fits = 0u64;
            let fields = halves!(|i| {
                let field = _mm256_sub_epi8(tile[i], bias[i]);
                let clamped = _mm256_max_epu8(_mm256_min_epu8(field, most), lowest[i]);
                let ok = _mm256_cmpeq_epi8(clamped, field);
                fits |= u64::from(_mm256_movemask_epi8(ok) as u32) << (32 * i);
                _mm256_and_si256(field, ok)
            });
            (fields, !fits)
        }
    }

    #[inline(always)]
    fn pair(self, low: [__m256i; 2], high: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: registers only. Fields are below 16, so the shift of 16-bit units moves no bit
        // from one byte to the next.
        unsafe { halves!(|i| _mm256_or_si256(low[i], _mm256_slli_epi16::<4>(high[i]))) }
    }

    #[inline(always)]
    fn zero_nibbles(self, line: [__m256i; 2]) -> [u64; 2] {
        // SAFETY: registers only.
        unsafe {
            let (lower, upper) = (_mm256_set1_epi8(15), _mm256_set1_epi8(0xf0u8 as i8));
            [
                equal(halves!(|i| _mm256_and_si256(line[i], lower)), [_mm256_setzero_si256(); 2]),
                equal(halves!(|i| _mm256_and_si256(line[i], upper)), [_mm256_setzero_si256(); 2]),
            ]
        }
    }

    #[inline(always)]
    fn any_zero_nibble(self, lines: &[TileBytes]) -> bool {
        // SAFETY: registers only, but for loads of whole lines.
        unsafe {
            let (lower, upper) = (_mm256_set1_epi8(15), _mm256_set1_epi8(0xf0u8 as i8));
            let mut least = [upper; 2];
            for line in lines {
                prefetch(line.as_ptr().wrapping_add(LINES_AHEAD_BYTES));
                let line = self.load(line);
                least = halves!(|i| {
                    let nibbles = _mm256_min_epu8(_mm256_and_si256(line[i], lower), _mm256_and_si256(line[i], upper));
                    _mm256_min_epu8(least[i], nibbles)
                });
            }
            let least = _mm256_min_epu8(least[0], least[1]);
            _mm256_movemask_epi8(_mm256_cmpeq_epi8(least, _mm256_setzero_si256())) != 0
        }
    }

    #[inline(always)]
    unsafe fn compress(self, tile: [__m256i; 2], mut mask: u64, mut out: *mut u8) {
        if mask == 0 {
            return;
        }
        let mut bytes: TileBytes = [0; 64];
        self.store(tile, &mut bytes);
        // A few whether there are so many or not, so that hardly a branch depends on how many.
        let mut left = mask.count_ones();
        loop {
            for _ in 0..4 {
                // SAFETY: a 64-bit mask has at most 64 ones, a multiple of four.
                unsafe {
                    *out = bytes[mask.trailing_zeros() as usize % 64];
                    out = out.add(1);
                }
                mask &= mask.wrapping_sub(1);
            }
            if left <= 4 {
                return;
            }
            left -= 4;
        }
    }

    #[inline(always)]
    fn zero(self) -> [__m256i; 2] {
        // SAFETY: registers only.
        unsafe { [_mm256_setzero_si256(); 2] }
    }

    /// `maddubs` takes unsigned by signed bytes: the symbol's sign moves over to `q`. With
    /// `|symbol| <= 128` and `|q| <= 127` a pair's sum is at most 32,512, so nothing saturates.
    #[inline(always)]
    fn dot(self, sums: [__m256i; 2], tile: [__m256i; 2], q: &[i8; TILE_COLS]) -> [__m256i; 2] {
        // SAFETY: registers only.
        unsafe {
            let q = splat_q(q);
            let bias = _mm256_set1_epi8(i8::MIN);
            let ones = _mm256_set1_epi16(1);
            halves!(|i| {
                let symbol = _mm256_xor_si256(tile[i], bias);
                let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(symbol), _mm256_sign_epi8(q, symbol));
                _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, ones))
            })
        }
    }

    #[inline(always)]
    fn dot_low(self, sums: [__m256i; 2], tile: [__m256i; 2], q: &[i8; TILE_COLS]) -> [__m256i; 2] {
        // SAFETY: registers only.
        let nibbles = unsafe { halves!(|i| _mm256_and_si256(tile[i], _mm256_set1_epi8(15))) };
        self.dot_small(sums, nibbles, q)
    }

    #[inline(always)]
    fn dot_small(self, sums: [__m256i; 2], tile: [__m256i; 2], q: &[i8; TILE_COLS]) -> [__m256i; 2] {
        // SAFETY: registers only. Two products are at most 2 * 63 * 128: nothing saturates.
        unsafe {
            let q = splat_q(q);
            let ones = _mm256_set1_epi16(1);
            halves!(|i| _mm256_add_epi32(sums[i], _mm256_madd_epi16(_mm256_maddubs_epi16(tile[i], q), ones)))
        }
    }

    #[inline(always)]
    fn dot_high(self, sums: [__m256i; 2], tile: [__m256i; 2], q: &[i8; TILE_COLS]) -> [__m256i; 2] {
        self.dot_low(sums, self.shift_right(tile, 4), q)
    }

    /// Products of two nibbles are at most 2 * 15 * 127, so eight of them are added in 16 bits.
    #[inline(always)]
    fn dot_lines(self, mut sums: [__m256i; 2], lines: &[TileBytes], q: &[[[i8; TILE_COLS]; 2]]) -> [__m256i; 2] {
        // SAFETY: registers only, but for loads of whole lines.
        unsafe {
            let (nibble, ones, zero) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1), _mm256_setzero_si256());
            for (lines, q) in lines.chunks(8).zip(q.chunks(8)) {
                let (mut low, mut high) = ([zero; 2], [zero; 2]);
                for (line, q) in lines.iter().zip(q) {
                    prefetch(line.as_ptr().wrapping_add(LINES_AHEAD_BYTES));
                    let line = self.load(line);
                    let (q_low, q_high) = (splat_q(&q[0]), splat_q(&q[1]));
                    low = halves!(|i| _mm256_add_epi16(low[i], _mm256_maddubs_epi16(_mm256_and_si256(line[i], nibble), q_low)));
                    high = halves!(|i| {
                        let upper = _mm256_and_si256(_mm256_srli_epi16::<4>(line[i]), nibble);
                        _mm256_add_epi16(high[i], _mm256_maddubs_epi16(upper, q_high))
                    });
                }
                sums = halves!(|i| {
                    let both = _mm256_add_epi32(_mm256_madd_epi16(low[i], ones), _mm256_madd_epi16(high[i], ones));
                    _mm256_add_epi32(sums[i], both)
                });
            }
            sums
        }
    }

    #[inline(always)]
    fn join_nibbles(self, low: [__m256i; 2], high: [__m256i; 2]) -> [__m256i; 2] {
        self.add(low, high)
    }

    #[inline(always)]
    fn add(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: registers only.
        unsafe { halves!(|i| _mm256_add_epi32(a[i], b[i])) }
    }

    #[inline(always)]
    fn finish(self, sums: [__m256i; 2], _q_sum: i32) -> [i32; TILE_ROWS] {
        let mut out = [0; TILE_ROWS];
        // SAFETY: 64 writable bytes.
        unsafe {
            _mm256_storeu_si256(out.as_mut_ptr().cast(), sums[0]);
            _mm256_storeu_si256(out.as_mut_ptr().add(8).cast(), sums[1]);
        }
        out
    }

    #[inline(always)]
    fn finish_floats(self, sums: [__m256i; 2], _q_sum: i32, more: i32) -> [__m256; 2] {
        // SAFETY: registers only.
        unsafe { halves!(|i| _mm256_cvtepi32_ps(_mm256_add_epi32(sums[i], _mm256_set1_epi32(more)))) }
    }

    #[inline(always)]
    fn floats(self, x: &[f32; LANES]) -> [__m256; 2] {
        // SAFETY: 16 readable floats.
        unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))] }
    }

    #[inline(always)]
    fn store_floats(self, x: [__m256; 2], out: &mut [f32; LANES]) {
        // SAFETY: 16 writable floats.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), x[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), x[1]);
        }
    }

    #[inline(always)]
    fn splat_float(self, x: f32) -> [__m256; 2] {
        // SAFETY: registers only.
        unsafe { [_mm256_set1_ps(x); 2] }
    }

    #[inline(always)]
    fn floats_of(self, x: &[i32; LANES]) -> [__m256; 2] {
        // SAFETY: 16 readable integers.
        unsafe { halves!(|i| _mm256_cvtepi32_ps(_mm256_loadu_si256(x.as_ptr().add(8 * i).cast()))) }
    }

    #[inline(always)]
    fn multiply(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: registers only.
        unsafe { halves!(|i| _mm256_mul_ps(a[i], b[i])) }
    }

    #[inline(always)]
    fn multiply_add(self, acc: [__m256; 2], a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: registers only.
        unsafe { halves!(|i| _mm256_add_ps(acc[i], _mm256_mul_ps(a[i], b[i]))) }
    }

    #[inline(always)]
    fn fold(self, x: [__m256; 2]) -> f32 {
        // SAFETY: registers only.
        unsafe { fold_8(_mm256_add_ps(x[0], x[1])) }
    }
}

/// Adds eight lanes: 4 apart, 2 apart, 1 apart.
///
/// # Safety
/// AVX2.
#[inline(always)]
pub(super) unsafe fn fold_8(x: __m256) -> f32 {
    // SAFETY: registers only.
    unsafe {
        let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
    }
}

/// The activations of a step for every row.
///
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn splat_q(q: &[i8; TILE_COLS]) -> __m256i {
    // Not bytes mapped one by one, for which the compiler calls a function where this is inlined often. SAFETY: four
    // readable bytes.
    unsafe { _mm256_set1_epi32(q.as_ptr().cast::<i32>().read_unaligned()) }
}

/// The lanes that are equal.
///
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn equal(a: [__m256i; 2], b: [__m256i; 2]) -> u64 {
    // SAFETY: registers only.
    unsafe {
        let [low, high] = halves!(|i| _mm256_movemask_epi8(_mm256_cmpeq_epi8(a[i], b[i])) as u32);
        u64::from(low) | u64::from(high) << 32
    }
}

/// By a mask of eight lanes: which of the next bytes each lane takes, 0x80 for none, as a byte
/// shuffle wants it. One more entry, so that 16 bytes may be read of each.
static EXPAND: [[u8; 8]; 257] = {
    let mut table = [[0x80; 8]; 257];
    let mut mask = 0;
    while mask < 256 {
        let (mut lane, mut taken) = (0, 0);
        while lane < 8 {
            if mask >> lane & 1 == 1 {
                table[mask][lane] = taken;
                taken += 1;
            }
            lane += 1;
        }
        mask += 1;
    }
    table
};

/// The next bytes in the lanes of `mask`, in lane order, and 0 in the others: AVX-512's `vpexpandb`,
/// from eight shuffles of eight lanes, whose places in the stream popcounts give all at once.
///
/// # Safety
/// AVX2, POPCNT; 64 bytes at `bytes` are readable.
#[inline(always)]
pub(super) unsafe fn expand(bytes: *const u8, mask: u64) -> [__m256i; 2] {
    // SAFETY: part 7 begins at 56 bytes at most. Of the table, entries up to 255 are read with the
    // eight bytes behind.
    macro_rules! part {
        ($i:literal) => {{
            let before = (mask & ((1u64 << (8 * $i)) - 1)).count_ones() as usize;
            let lanes = (mask >> (8 * $i)) as usize & 0xff;
            let next = _mm_loadl_epi64(bytes.add(before).cast());
            _mm_shuffle_epi8(next, _mm_loadu_si128(EXPAND.as_ptr().add(lanes).cast()))
        }};
    }
    // SAFETY: as above.
    unsafe {
        [
            _mm256_set_m128i(_mm_unpacklo_epi64(part!(2), part!(3)), _mm_unpacklo_epi64(part!(0), part!(1))),
            _mm256_set_m128i(_mm_unpacklo_epi64(part!(6), part!(7)), _mm_unpacklo_epi64(part!(4), part!(5))),
        ]
    }
}

/// Of the lower half of a tile: which byte of a 64-bit mask has a lane's bit.
static MASK_BYTES: [u8; 32] = {
    let mut table = [0; 32];
    let mut lane = 0;
    while lane < 32 {
        table[lane] = lane as u8 / 8;
        lane += 1;
    }
    table
};

/// By a mask of eight lanes: what each lane takes of eight bytes for the zeros and, behind them, eight for the ones. One more
/// entry, so that 16 bytes may be read of each.
static MERGE: [[u8; 8]; 257] = {
    let mut table = [[0; 8]; 257];
    let mut mask = 0;
    while mask < 256 {
        let (mut lane, mut next) = (0, [0, 8]);
        while lane < 8 {
            let one = mask >> lane & 1;
            table[mask][lane] = next[one];
            next[one] += 1;
            lane += 1;
        }
        mask += 1;
    }
    table
};

/// The next bytes at `ones` in the lanes of `mask`, those at `zeros` in the others: one shuffle for each eight lanes.
///
/// # Safety
/// AVX2, POPCNT; 64 bytes at both are readable.
#[inline(always)]
unsafe fn merge(mask: u64, zeros: *const u8, ones: *const u8) -> [__m256i; 2] {
    macro_rules! part {
        ($i:literal) => {{
            let before = (mask & ((1u64 << (8 * $i)) - 1)).count_ones() as usize;
            let lanes = (mask >> (8 * $i)) as usize & 0xff;
            let next = _mm_loadl_epi64(zeros.add(8 * $i - before).cast());
            let next = _mm_unpacklo_epi64(next, _mm_loadl_epi64(ones.add(before).cast()));
            _mm_shuffle_epi8(next, _mm_loadu_si128(MERGE.as_ptr().add(lanes).cast()))
        }};
    }
    // SAFETY: part 7 begins at 56 bytes at most on either side. Of the table, entries up to 255 are read with the eight bytes
    // behind.
    unsafe {
        [
            _mm256_set_m128i(_mm_unpacklo_epi64(part!(2), part!(3)), _mm_unpacklo_epi64(part!(0), part!(1))),
            _mm256_set_m128i(_mm_unpacklo_epi64(part!(6), part!(7)), _mm_unpacklo_epi64(part!(4), part!(5))),
        ]
    }
}
