//! A tile in one 512-bit register.

use std::arch::x86_64::*;

use super::avx2::fold_8;
use super::{Isa, TileBytes};
use crate::ops::LANES;
use crate::{Avx512, TILE_COLS, TILE_ROWS};

impl Isa for Avx512 {
    type Tile = __m512i;
    type Sums = __m512i;
    type Floats = __m512;
    type Table = __m512i;
    const SPREADS: bool = true;

    #[inline(always)]
    fn load(self, tile: &TileBytes) -> __m512i {
        // SAFETY: 64 readable bytes; the token proves the features, here and below.
        unsafe { _mm512_loadu_si512(tile.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store(self, tile: __m512i, out: &mut TileBytes) {
        // SAFETY: 64 writable bytes.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), tile) }
    }

    #[inline(always)]
    fn splat(self, b: u8) -> __m512i {
        // SAFETY: registers only.
        unsafe { _mm512_set1_epi8(b as i8) }
    }

    #[inline(always)]
    fn low(self, line: __m512i, bias: __m512i) -> __m512i {
        // SAFETY: registers only.
        unsafe { _mm512_add_epi8(_mm512_and_si512(line, _mm512_set1_epi8(15)), bias) }
    }

    #[inline(always)]
    fn high(self, line: __m512i, bias: __m512i) -> __m512i {
        // SAFETY: registers only.
        unsafe { _mm512_add_epi8(_mm512_and_si512(_mm512_srli_epi16::<4>(line), _mm512_set1_epi8(15)), bias) }
    }

    #[inline(always)]
    fn shift_right(self, tile: __m512i, bits: u32) -> __m512i {
        // SAFETY: registers only.
        unsafe { _mm512_srl_epi16(tile, _mm_cvtsi32_si128(bits as i32)) }
    }

    #[inline(always)]
    fn add_bytes(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: registers only.
        unsafe { _mm512_add_epi8(a, b) }
    }

    #[inline(always)]
    fn select_bits(self, mask: __m512i, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: registers only. 0xca is `mask ? a : b` by bit.
        unsafe { _mm512_ternarylogic_epi32::<0xca>(mask, a, b) }
    }

    #[inline(always)]
    fn table(self, bytes: &TileBytes) -> __m512i {
        self.load(bytes)
    }

    /// The permute takes the low six bits of an index.
    #[inline(always)]
    fn lookup(self, table: __m512i, index: __m512i) -> __m512i {
        // SAFETY: registers only.
        unsafe { _mm512_permutexvar_epi8(index, table) }
    }

    /// A load of 64 bytes and a register expand: the expand with a memory operand is microcode on
    /// some cores.
    #[inline(always)]
    unsafe fn unescape(self, tile: __m512i, escape: __m512i, escapes: *const u8) -> (__m512i, usize) {
        // SAFETY: 64 readable bytes, by the contract.
        unsafe {
            let mask = _mm512_cmpeq_epi8_mask(tile, escape);
            let next = _mm512_loadu_si512(escapes.cast());
            (_mm512_mask_expand_epi8(tile, mask, next), mask.count_ones() as usize)
        }
    }

    #[inline(always)]
    fn select(self, mask: u64, zeros: __m512i, ones: __m512i) -> __m512i {
        // SAFETY: registers only.
        unsafe { _mm512_mask_mov_epi8(zeros, mask, ones) }
    }

    #[inline(always)]
    unsafe fn expand(self, mask: u64, zeros: __m512i, ones: *const u8) -> __m512i {
        // SAFETY: 64 readable bytes, by the contract.
        unsafe { _mm512_mask_expand_epi8(zeros, mask, _mm512_loadu_si512(ones.cast())) }
    }

    #[inline(always)]
    unsafe fn merge(self, mask: u64, zeros: *const u8, ones: *const u8) -> __m512i {
        // Two expands that do not wait for each other, 1.7 ns on Zen 4; one into the other takes 2.9. SAFETY: as above.
        unsafe {
            let zeros = _mm512_maskz_expand_epi8(!mask, _mm512_loadu_si512(zeros.cast()));
            let ones = _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(ones.cast()));
            _mm512_or_si512(zeros, ones)
        }
    }

    #[inline(always)]
    fn narrow(self, tile: __m512i, bias: __m512i, lowest: __m512i) -> (__m512i, u64) {
        // SAFETY: registers only.
        unsafe {
            let field = _mm512_sub_epi8(tile, bias);
            // Below the lowest the difference wraps around: one comparison for both ends.
            let above = _mm512_sub_epi8(field, lowest);
            let fits = _mm512_cmple_epu8_mask(above, _mm512_sub_epi8(_mm512_set1_epi8(15), lowest));
            (_mm512_maskz_mov_epi8(fits, field), !fits)
        }
    }

    #[inline(always)]
    fn pair(self, low: __m512i, high: __m512i) -> __m512i {
        // SAFETY: registers only. Fields are below 16, so the shift of 16-bit units moves no bit
        // from one byte to the next.
        unsafe { _mm512_or_si512(low, _mm512_slli_epi16::<4>(high)) }
    }

    /// The raw bits come out of the line by a product of bit matrices, shifted and masked at once.
    #[inline(always)]
    fn symbols<const R: u32>(self, pairs: __m512i, line: __m512i, turn: usize) -> (__m512i, __m512i) {
        let [first, second] = RAW_BITS[R as usize][turn];
        // SAFETY: registers only. Bits that a shift moves into another byte are not selected.
        unsafe {
            let field = _mm512_set1_epi8(15 << R);
            let low = _mm512_sll_epi16(pairs, _mm_cvtsi32_si128(R as i32));
            let high = _mm512_srl_epi16(pairs, _mm_cvtsi32_si128(4 - R as i32));
            let first = _mm512_gf2p8affine_epi64_epi8::<0>(line, _mm512_set1_epi64(first as i64));
            let second = _mm512_gf2p8affine_epi64_epi8::<0>(line, _mm512_set1_epi64(second as i64));
            (self.select_bits(field, low, first), self.select_bits(field, high, second))
        }
    }

    #[inline(always)]
    fn zero_nibbles(self, line: __m512i) -> [u64; 2] {
        // SAFETY: registers only.
        unsafe { [_mm512_testn_epi8_mask(line, _mm512_set1_epi8(15)), _mm512_testn_epi8_mask(line, _mm512_set1_epi8(-16))] }
    }

    #[inline(always)]
    unsafe fn compress(self, tile: __m512i, mask: u64, out: *mut u8) {
        // Compressed in a register and stored whole: a compress into memory, and a masked store, are microcode
        // on some cores. The rule is a few bytes, and 64 that begin anywhere mostly lie across two cache lines,
        // which costs Zen 4 many cycles. SAFETY: 64 writable bytes.
        unsafe {
            let bytes = _mm512_maskz_compress_epi8(mask, tile);
            _mm_storeu_si128(out.cast(), _mm512_castsi512_si128(bytes));
            if mask.count_ones() > 16 {
                _mm512_storeu_si512(out.cast(), bytes);
            }
        }
    }

    #[inline(always)]
    fn zero(self) -> __m512i {
        // SAFETY: registers only.
        unsafe { _mm512_setzero_si512() }
    }

    /// VNNI multiplies unsigned by signed bytes, and the symbol byte is unsigned as it is; `finish`
    /// takes the bias off again.
    #[inline(always)]
    fn dot(self, sums: __m512i, tile: __m512i, q: &[i8; TILE_COLS]) -> __m512i {
        // SAFETY: registers only.
        unsafe { _mm512_dpbusd_epi32(sums, tile, _mm512_set1_epi32(i32::from_le_bytes(q.map(|q| q as u8)))) }
    }

    #[inline(always)]
    fn dot_low(self, sums: __m512i, tile: __m512i, q: &[i8; TILE_COLS]) -> __m512i {
        // SAFETY: registers only.
        self.dot(sums, unsafe { _mm512_and_si512(tile, _mm512_set1_epi8(15)) }, q)
    }

    /// Nibbles where they stand, so 16 times their value: that saves the shift, and a segment's sum stays
    /// far below 2^31.
    #[inline(always)]
    fn dot_high(self, sums: __m512i, tile: __m512i, q: &[i8; TILE_COLS]) -> __m512i {
        // SAFETY: registers only.
        self.dot(sums, unsafe { _mm512_and_si512(tile, _mm512_set1_epi8(0xf0u8 as i8)) }, q)
    }

    #[inline(always)]
    fn dot_small(self, sums: __m512i, tile: __m512i, q: &[i8; TILE_COLS]) -> __m512i {
        self.dot(sums, tile, q)
    }

    /// Second symbols with their nibbles where they stand, as in `dot_high`, so `1 << (4 - R)` times their value. That also puts their
    /// raw bits where a shift of the line that the first symbols need brings them, or where they are: with one raw bit that
    /// leaves a shift and an addition for each line of pairs, with two a shift and half of one.
    #[inline(always)]
    fn dot_symbols<const R: u32>(
        self,
        sums: (__m512i, __m512i),
        pairs: __m512i,
        line: __m512i,
        turn: usize,
        q: [&[i8; TILE_COLS]; 2],
    ) -> (__m512i, __m512i) {
        // Of a line the first raw bits of this turn, and from where the second must be `4 - R` bits higher.
        let from = 2 * R * turn as u32;
        // SAFETY: registers only. Bits that a shift moves into another byte are not selected.
        unsafe {
            let first = _mm512_srl_epi16(line, _mm_cvtsi32_si128(from as i32));
            // Of one raw bit the second lies 1 above the first and belongs 3 above the lowest.
            let second = match (from + R).checked_sub(4 - R) {
                Some(right) => _mm512_srl_epi16(line, _mm_cvtsi32_si128(right as i32)),
                None => _mm512_sll_epi16(line, _mm_cvtsi32_si128((4 - 2 * R - from) as i32)),
            };
            let low = _mm512_sll_epi16(pairs, _mm_cvtsi32_si128(R as i32));
            let first = self.select_bits(_mm512_set1_epi8(15 << R), low, _mm512_and_si512(first, _mm512_set1_epi8((1 << R) - 1)));
            let raw = _mm512_set1_epi8(((1 << R) - 1) << (4 - R));
            let second = self.select_bits(_mm512_set1_epi8(-16), pairs, _mm512_and_si512(second, raw));
            (self.dot(sums.0, first, q[0]), self.dot(sums.1, second, q[1]))
        }
    }

    #[inline(always)]
    fn join_symbols<const R: u32>(self, first: __m512i, second: __m512i) -> __m512i {
        // SAFETY: registers only.
        unsafe { _mm512_add_epi32(first, _mm512_sra_epi32(second, _mm_cvtsi32_si128(4 - R as i32))) }
    }

    #[inline(always)]
    fn join_nibbles(self, low: __m512i, high: __m512i) -> __m512i {
        // SAFETY: registers only.
        unsafe { _mm512_add_epi32(low, _mm512_srai_epi32::<4>(high)) }
    }

    #[inline(always)]
    fn add(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: registers only.
        unsafe { _mm512_add_epi32(a, b) }
    }

    #[inline(always)]
    fn finish(self, sums: __m512i, q_sum: i32) -> [i32; TILE_ROWS] {
        let mut out = [0; TILE_ROWS];
        // SAFETY: 64 writable bytes.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_sub_epi32(sums, _mm512_set1_epi32(128 * q_sum))) }
        out
    }

    #[inline(always)]
    fn finish_floats(self, sums: __m512i, q_sum: i32, more: i32) -> __m512 {
        // SAFETY: registers only.
        unsafe { _mm512_cvtepi32_ps(_mm512_add_epi32(sums, _mm512_set1_epi32(more - 128 * q_sum))) }
    }

    #[inline(always)]
    fn floats(self, x: &[f32; LANES]) -> __m512 {
        // SAFETY: 16 readable floats.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    #[inline(always)]
    fn store_floats(self, x: __m512, out: &mut [f32; LANES]) {
        // SAFETY: 16 writable floats.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), x) }
    }

    #[inline(always)]
    fn splat_float(self, x: f32) -> __m512 {
        // SAFETY: registers only.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn floats_of(self, x: &[i32; LANES]) -> __m512 {
        // SAFETY: 16 readable integers.
        unsafe { _mm512_cvtepi32_ps(_mm512_loadu_si512(x.as_ptr().cast())) }
    }

    #[inline(always)]
    fn multiply(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: registers only.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn multiply_add(self, acc: __m512, a: __m512, b: __m512) -> __m512 {
        // SAFETY: registers only.
        unsafe { _mm512_add_ps(acc, _mm512_mul_ps(a, b)) }
    }

    #[inline(always)]
    fn fold(self, x: __m512) -> f32 {
        // SAFETY: registers only.
        unsafe { fold_8(_mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x))) }
    }
}

/// By number of raw bits and turn: the matrices that take the raw bits of either symbol out of a byte of
/// a line. Row `7 - i` of a matrix has the bit of the byte that becomes bit `i`.
static RAW_BITS: [[[u64; 2]; 4]; 3] = {
    let mut matrices = [[[0; 2]; 4]; 3];
    let mut bits = 1;
    while bits < 3 {
        let mut taken = 0;
        while taken < 8 {
            let (symbol, i) = (taken / bits, taken % bits);
            matrices[bits][symbol / 2][symbol % 2] |= 1 << taken << (8 * (7 - i));
            taken += 1;
        }
        bits += 1;
    }
    matrices
};
