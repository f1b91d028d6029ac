//! What a transformer needs besides its linears, in f32. Every operation gives the same bits at
//! every level and thread count.
//!
//! Sums run in 16 fixed lanes: lane `j` adds the elements `j, j + 16, ...` in order, then the lanes
//! are added as a balanced tree (8 apart, 4, 2, 1). Products and sums are rounded one by one, never
//! fused. `exp` is our own, so that no libm decides a token.

use half::f16;

use crate::dense::dot_block;
use crate::isa::per_isa;
use crate::level::per_level;
use crate::{Level, Pool, SharedOut};

/// Lanes of every sum.
pub(crate) const LANES: usize = 16;

/// Adds the lanes as a balanced tree.
#[inline(always)]
pub(crate) fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for j in 0..width {
            lanes[j] += lanes[j + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (a16, a_tail) = a.as_chunks::<LANES>();
    let (b16, b_tail) = b.as_chunks::<LANES>();
    for (a, b) in a16.iter().zip(b16) {
        for j in 0..LANES {
            lanes[j] += a[j] * b[j];
        }
    }
    for (j, (a, b)) in a_tail.iter().zip(b_tail).enumerate() {
        lanes[j] += a * b;
    }
    fold(lanes)
}

/// `e^x`, within 2e-7 of the exact value relatively: 0 below about -87.3 (where the result would be
/// subnormal), infinite above about 88.7, NaN for NaN.
///
/// Cody and Waite's reduction to `|r| <= ln 2 / 2`, then the Taylor polynomial of degree 7 in
/// Horner's form; only additions and multiplications that are rounded one by one.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_145_75; // 16 significant bits: products with |n| <= 256 are exact
    const LN2_LOW: f32 = 1.428_606_8e-6;
    const MAGIC: f32 = 12_582_912.0;
    // Clamped by comparisons that let a NaN through.
    let clamped = if x > 89.0 { 89.0 } else { x };
    let clamped = if clamped < -88.0 { -88.0 } else { clamped };
    let shifted = clamped * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    let p = (p * (r * r) + r) + 1.0;
    // 2^n in two factors, as n may be 128.
    let n = shifted.to_bits() as i32 - MAGIC.to_bits() as i32;
    let half = n >> 1;
    let scale = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    let y = p * scale(half) * scale(n.wrapping_sub(half));
    if x < -87.336_54 { 0.0 } else { y }
}

per_level! {
    /// Root-mean-square norm of each row: `out = x / sqrt(mean(x^2) + eps) * weight`.
    ///
    /// `x` and `out`: (rows, weight.len()).
    ///
    /// # Panics
    /// If the lengths disagree, or `weight` is empty.
    pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        assert!(x.len() == out.len() && x.len().is_multiple_of(weight.len()), "x and out must be (rows, weight.len())");
        for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
            let inverse = 1.0 / (dot(x, x) / weight.len() as f32 + eps).sqrt();
            for ((x, w), out) in x.iter().zip(weight).zip(out) {
                *out = x * inverse * w;
            }
        }
    }
}

per_level! {
    /// [`rms_norm`] of each row in place, for the norms of queries and keys.
    ///
    /// `x`: (rows, weight.len()).
    ///
    /// # Panics
    /// If `x` is not whole rows, or `weight` is empty.
    pub fn rms_norm_in_place(weight: &[f32], eps: f32, x: &mut [f32]) {
        assert!(x.len().is_multiple_of(weight.len()), "x must be (rows, weight.len())");
        for x in x.chunks_exact_mut(weight.len()) {
            let inverse = 1.0 / (dot(x, x) / weight.len() as f32 + eps).sqrt();
            for (x, w) in x.iter_mut().zip(weight) {
                *x = *x * inverse * w;
            }
        }
    }
}

per_level! {
    /// Rotary position embedding, as Hugging Face's Llama turns the halves of a head: for `i <
    /// head_dim / 2`, `(x[i], x[i + head_dim / 2])` becomes `(x[i] cos - x[i + head_dim / 2] sin,
    /// x[i + head_dim / 2] cos + x[i] sin)`.
    ///
    /// `x`: (tokens, heads, head_dim); `cos`, `sin`: (tokens, head_dim / 2).
    ///
    /// # Panics
    /// If the lengths disagree.
    pub fn rope(x: &mut [f32], tokens: usize, heads: usize, cos: &[f32], sin: &[f32]) {
        if tokens == 0 || heads == 0 {
            return;
        }
        let half = cos.len() / tokens;
        assert!(
            half > 0 && cos.len() == tokens * half && sin.len() == cos.len() && x.len() == tokens * heads * 2 * half,
            "x must be (tokens, heads, head_dim), cos and sin (tokens, head_dim / 2)"
        );
        let tables = cos.chunks_exact(half).zip(sin.chunks_exact(half));
        for (x, (cos, sin)) in x.chunks_exact_mut(heads * 2 * half).zip(tables) {
            for head in x.chunks_exact_mut(2 * half) {
                let (a, b) = head.split_at_mut(half);
                for ((a, b), (c, s)) in a.iter_mut().zip(b).zip(cos.iter().zip(sin)) {
                    (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                }
            }
        }
    }
}

#[inline(always)]
fn softmax_body(x: &mut [f32]) {
    let max = max_of(x);
    let mut lanes = [0f32; LANES];
    let (x16, tail) = x.as_chunks_mut::<LANES>();
    for x in x16 {
        for j in 0..LANES {
            x[j] = exp(x[j] - max);
            lanes[j] += x[j];
        }
    }
    for (j, x) in tail.iter_mut().enumerate() {
        *x = exp(*x - max);
        lanes[j] += *x;
    }
    let inverse = 1.0 / fold(lanes);
    for x in x {
        *x *= inverse;
    }
}

/// The greatest element; the order does not matter for a maximum. NaNs are passed over (and then
/// poison the sum).
#[inline(always)]
fn max_of(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (x16, tail) = x.as_chunks::<LANES>();
    for x in x16 {
        for j in 0..LANES {
            lanes[j] = if x[j] > lanes[j] { x[j] } else { lanes[j] };
        }
    }
    for x in tail {
        lanes[0] = if *x > lanes[0] { *x } else { lanes[0] };
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, |m, v| if v > m { v } else { m })
}

per_level! {
    /// Softmax of `x` in place: `e^(x - max) / sum`. An empty `x` stays empty.
    pub fn softmax(x: &mut [f32]) {
        softmax_body(x);
    }
}

per_level! {
    /// `gate = silu(gate) * up`, where `silu(g) = g / (1 + e^-g)`.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn silu_mul(gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len(), "gate and up must have one shape");
        for (g, u) in gate.iter_mut().zip(up) {
            *g = *g / (1.0 + exp(-*g)) * u;
        }
    }
}

per_level! {
    /// `x += y`: a residual, or a bias.
    ///
    /// `x`: (rows, y.len()), so `y` of one row is added to each.
    ///
    /// # Panics
    /// If `x` is not whole rows of `y.len()`.
    pub fn add(x: &mut [f32], y: &[f32]) {
        if y.is_empty() && x.is_empty() {
            return;
        }
        assert!(x.len().is_multiple_of(y.len()), "x must be (rows, y.len())");
        for x in x.chunks_exact_mut(y.len()) {
            for (x, y) in x.iter_mut().zip(y) {
                *x += y;
            }
        }
    }
}

/// Index of the greatest element, the first of equals; NaNs never win. 0 if there is nothing
/// greater than minus infinity.
pub fn argmax(x: &[f32]) -> usize {
    let mut best = (f32::NEG_INFINITY, 0);
    for (i, v) in x.iter().enumerate() {
        if *v > best.0 {
            best = (*v, i);
        }
    }
    best.1
}

per_level! {
    /// Index of the greatest element in the order of `f32::total_cmp`, the first of equals; `None` if an element is not finite or there is none.
    /// Reads `x` once, for it may be a vocabulary's logits that just came from another device.
    pub fn greatest_if_finite(x: &[f32]) -> Option<usize> {
        /// Searched again if the greatest is in it.
        const RUN: usize = 1024;
        let key = |x: f32| {
            let bits = x.to_bits() as i32;
            bits ^ ((bits >> 31) as u32 >> 1) as i32
        };
        let (mut best, mut of_best, mut largest) = (i32::MIN, 0, 0);
        for (index, run) in x.chunks(RUN).enumerate() {
            let (mut keys, mut sizes) = ([i32::MIN; LANES], [0; LANES]);
            let (whole, tail) = run.as_chunks::<LANES>();
            for x in whole {
                for j in 0..LANES {
                    keys[j] = keys[j].max(key(x[j]));
                    sizes[j] = sizes[j].max(x[j].to_bits() as i32 & i32::MAX);
                }
            }
            for (j, x) in tail.iter().enumerate() {
                keys[j] = keys[j].max(key(*x));
                sizes[j] = sizes[j].max(x.to_bits() as i32 & i32::MAX);
            }
            let most = keys.into_iter().max().expect("there are lanes");
            largest = sizes.into_iter().fold(largest, i32::max);
            if most > best {
                (best, of_best) = (most, index);
            }
        }
        if x.is_empty() || largest >= f32::INFINITY.to_bits() as i32 {
            return None;
        }
        let run = &x[of_best * RUN..];
        run.iter().position(|x| key(*x) == best).map(|at| of_best * RUN + at)
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
}

/// What a key-value cache stores: `f32` or `f16`.
pub trait KvElement: sealed::Sealed + Copy + Default + Send + Sync + 'static {
    /// Exact.
    fn load(self) -> f32;
    /// Rounded to nearest even; values beyond the largest finite one of the type become that, so
    /// that one outlier does not turn a row into NaNs.
    fn store(x: f32) -> Self;
    /// The values in f32: themselves, or converted into `buffer`, which is long enough.
    #[doc(hidden)]
    fn widen<'a>(level: Level, x: &'a [Self], buffer: &'a mut [f32]) -> &'a [f32];
}

impl KvElement for f32 {
    #[inline(always)]
    fn load(self) -> f32 {
        self
    }
    #[inline(always)]
    fn store(x: f32) -> f32 {
        x
    }
    fn widen<'a>(_level: Level, x: &'a [f32], _buffer: &'a mut [f32]) -> &'a [f32] {
        x
    }
}

impl KvElement for f16 {
    #[inline(always)]
    fn load(self) -> f32 {
        f16_to_f32(self.to_bits())
    }
    #[inline(always)]
    fn store(x: f32) -> f16 {
        f16::from_f32_const(if x.is_nan() { x } else { x.clamp(-65504.0, 65504.0) })
    }
    fn widen<'a>(level: Level, x: &'a [f16], buffer: &'a mut [f32]) -> &'a [f32] {
        let buffer = &mut buffer[..x.len()];
        widen_f16(level, x, buffer);
        buffer
    }
}

/// f16 bits to f32, exact; branch-free integer arithmetic, so that it vectorizes at every level.
/// NaNs keep their payload.
#[inline(always)]
pub(crate) fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff);
    // Normal numbers: shift into place and rebias the exponent by 112. Infinities and NaNs: rebias
    // once more.
    let rebias = if magnitude >= 0x7c00 { 224u32 << 23 } else { 112 << 23 };
    let normal = (magnitude << 13) + rebias;
    // Subnormal numbers: magnitude * 2^-24, by an exact conversion and an exact product.
    let subnormal = (magnitude as i32 as f32 * 5.960_464_5e-8).to_bits();
    f32::from_bits(sign | if magnitude < 0x0400 { subnormal } else { normal })
}

/// Copies f32 values into a cache, each by [`KvElement::store`].
///
/// # Panics
/// If the lengths differ.
pub fn store_kv<E: KvElement>(x: &[f32], out: &mut [E]) {
    assert_eq!(x.len(), out.len(), "as many cache elements as values");
    for (x, out) in x.iter().zip(out) {
        *out = E::store(*x);
    }
}

/// Shape of one layer's attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`, and query head `h` reads key head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Factor of the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// A token at position `p` sees positions `p - window + 1 ..= p` only.
    pub window: Option<usize>,
}

/// Keys and values of one layer: a slice of (kv_heads, capacity, head_dim) each, of which the
/// positions that the call can see are filled.
#[derive(Clone, Copy, Debug)]
pub struct KvView<'a, E> {
    /// (kv_heads, capacity, head_dim)
    pub keys: &'a [E],
    /// (kv_heads, capacity, head_dim)
    pub values: &'a [E],
    /// Positions that a head has room for.
    pub capacity: usize,
}

/// Causal attention of `tokens` new tokens at positions `position ..`, parallel over heads and tokens.
///
/// `q`, `out`: (tokens, heads, head_dim). The cache already holds the keys and values of the new
/// tokens. Every token's result depends only on its own query and on the positions it sees, so it
/// does not matter how a prompt is sliced.
///
/// # Panics
/// If the lengths disagree with the shape, `position + tokens > capacity`, or a window is 0.
#[allow(clippy::too_many_arguments)] // Each is a dimension or a buffer of its own, as for every op here.
pub fn attend<E: KvElement>(
    pool: &Pool,
    level: Level,
    shape: Attention,
    q: &[f32],
    tokens: usize,
    position: usize,
    kv: KvView<'_, E>,
    out: &mut [f32],
) {
    let Attention { heads, kv_heads, head_dim, .. } = shape;
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "{kv_heads} key heads cannot serve {heads} query heads");
    assert!(shape.window != Some(0), "a window of 0 positions sees nothing");
    assert!(q.len() == tokens * heads * head_dim && out.len() == q.len(), "q and out must be (tokens, heads, head_dim)");
    assert!(
        kv.keys.len() == kv_heads * kv.capacity * head_dim && kv.values.len() == kv.keys.len(),
        "keys and values must be (kv_heads, capacity, head_dim)"
    );
    assert!(position + tokens <= kv.capacity, "the cache has {} positions, {} are needed", kv.capacity, position + tokens);
    if q.is_empty() {
        return;
    }
    let group = heads / kv_heads;
    let out = SharedOut::new(out);
    pool.run(tokens * kv_heads, &|task| {
        let (token, kv_head) = (task / kv_heads, task % kv_heads);
        let end = position + token + 1;
        let start = shape.window.map_or(0, |w| end.saturating_sub(w));
        let cached = (kv_head * kv.capacity + start) * head_dim..(kv_head * kv.capacity + end) * head_dim;
        let at = (token * heads + kv_head * group) * head_dim;
        // SAFETY: each (token, kv_head) has its own `group * head_dim` elements of `out`.
        let out = unsafe { out.slice(at, group * head_dim) };
        let group = Group {
            level,
            head_dim,
            q: &q[at..][..group * head_dim],
            keys: &kv.keys[cached.clone()],
            values: &kv.values[cached],
            scale: shape.scale,
        };
        SCRATCH.with_borrow_mut(|scratch| group.attend(scratch, out));
    });
}

thread_local! {
    /// Kept between calls, so that a step allocates nothing.
    static SCRATCH: std::cell::RefCell<AttendScratch> = const { std::cell::RefCell::new(AttendScratch { scores: Vec::new(), wide: Vec::new() }) };
}

struct AttendScratch {
    /// (group, positions)
    scores: Vec<f32>,
    /// Keys or values of some positions in f32.
    wide: Vec<f32>,
}

/// Elements of keys or values that are widened at a time: 16 KiB, half of a usual L1 cache.
const WIDE: usize = 4096;

/// The query heads that share one key head, for one token.
struct Group<'a, E> {
    level: Level,
    head_dim: usize,
    /// (group, head_dim)
    q: &'a [f32],
    /// (positions, head_dim)
    keys: &'a [E],
    /// (positions, head_dim)
    values: &'a [E],
    scale: f32,
}

impl<E: KvElement> Group<'_, E> {
    /// `out = softmax(q K^T scale) V`, (group, head_dim). Keys and values are widened once for all
    /// heads of the group.
    fn attend(&self, scratch: &mut AttendScratch, out: &mut [f32]) {
        let (head_dim, level) = (self.head_dim, self.level);
        let positions = self.keys.len() / head_dim;
        let block = (WIDE / head_dim).max(1);
        scratch.scores.resize(self.q.len() / head_dim * positions, 0.0);
        scratch.wide.resize(block * head_dim, 0.0);
        let (scores, wide) = (&mut scratch.scores[..], &mut scratch.wide[..]);
        for (i, keys) in self.keys.chunks(block * head_dim).enumerate() {
            let keys = E::widen(level, keys, wide);
            for (q, scores) in self.q.chunks_exact(head_dim).zip(scores.chunks_exact_mut(positions)) {
                score(level, q, keys, self.scale, &mut scores[i * block..][..keys.len() / head_dim]);
            }
        }
        for scores in scores.chunks_exact_mut(positions) {
            softmax(level, scores);
        }
        out.fill(0.0);
        for (i, values) in self.values.chunks(block * head_dim).enumerate() {
            let values = E::widen(level, values, wide);
            for (out, scores) in out.chunks_exact_mut(head_dim).zip(scores.chunks_exact(positions)) {
                mix(level, &scores[i * block..][..values.len() / head_dim], values, out);
            }
        }
    }
}

per_isa! {
    /// `scores[p] = (q . keys[p]) * scale`. `keys`: (positions, q.len())
    fn score(isa; q: &[f32], keys: &[f32], scale: f32, scores: &mut [f32]) {
        const TOGETHER: usize = 4;
        let (fours, rest) = scores.as_chunks_mut::<TOGETHER>();
        let (keys_of_fours, keys_of_rest) = keys.split_at(fours.len() * TOGETHER * q.len());
        for (keys, scores) in keys_of_fours.chunks_exact(TOGETHER * q.len()).zip(fours) {
            dot_block::<_, TOGETHER>(isa, keys, q, scores);
            for score in scores {
                *score *= scale;
            }
        }
        for (key, score) in keys_of_rest.chunks_exact(q.len()).zip(rest) {
            dot_block::<_, 1>(isa, key, q, std::slice::from_mut(score));
            *score *= scale;
        }
    }
}

per_isa! {
    /// `out[d] += p[i] * values[i, d]` for all `i` in order.
    fn mix(isa; p: &[f32], values: &[f32], out: &mut [f32]) {
        let head_dim = out.len();
        let (out16, tail) = out.as_chunks_mut::<LANES>();
        let whole = out16.len() * LANES;
        for (block, out) in out16.iter_mut().enumerate() {
            let mut acc = isa.floats(out);
            for (p, value) in p.iter().zip(values.chunks_exact(head_dim)) {
                let value = value[block * LANES..].first_chunk().expect("a whole block of lanes");
                acc = isa.multiply_add(acc, isa.floats(&[*p; LANES]), isa.floats(value));
            }
            isa.store_floats(acc, out);
        }
        for (p, value) in p.iter().zip(values.chunks_exact(head_dim)) {
            for (out, v) in tail.iter_mut().zip(&value[whole..]) {
                *out += p * v;
            }
        }
    }
}

per_level! {
    /// Widens f16 values. Integer arithmetic that vectorizes: no slower than the cache it reads
    /// from, and the heads of a group share it.
    fn widen_f16(x: &[f16], out: &mut [f32]) {
        for (x, out) in x.iter().zip(out) {
            *out = f16_to_f32(x.to_bits());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::levels;
    use proptest::prelude::*;

    fn values(n: usize, seed: u64) -> Vec<f32> {
        let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        (0..n)
            .map(|_| {
                s ^= s << 13;
                s ^= s >> 7;
                s ^= s << 17;
                (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            })
            .collect()
    }

    #[test]
    fn the_greatest_is_found_as_total_cmp_orders_if_all_are_finite() {
        let spread: Vec<f32> = (0..5000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 1e5 - 80.0).collect();
        let mut equals = vec![0.5; 5000];
        (equals[1500], equals[4000]) = (2.0, 2.0);
        let cases = [
            vec![-1.0, -0.5, -2.0],
            vec![-0.0, 0.0, 0.0],
            vec![3.0, 7.5, 7.5, -9.0],
            vec![f32::MIN; 2000],
            vec![f32::MAX, 1.0],
            spread,
            equals,
        ];
        for level in Level::available() {
            for x in &cases {
                let expected = (0..x.len()).max_by(|&a, &b| x[a].total_cmp(&x[b]).then(b.cmp(&a)));
                assert_eq!(greatest_if_finite(level, x), expected, "{level}: {:?}", &x[..x.len().min(4)]);
                for wrong in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    for at in [0, x.len() / 2, x.len() - 1] {
                        let mut x = x.clone();
                        x[at] = wrong;
                        assert_eq!(greatest_if_finite(level, &x), None, "{level}: {wrong} at {at}");
                    }
                }
            }
            assert_eq!(greatest_if_finite(level, &[]), None);
        }
    }

    #[test]
    fn exp_is_within_2e_7_wherever_the_result_is_normal() {
        let mut worst = 0f64;
        // Every 61st float of each sign: some millions, all exponents.
        for bits in (0..88.73f32.to_bits()).step_by(61) {
            for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                let exact = f64::from(x).exp();
                if !(f64::from(f32::MIN_POSITIVE)..=f64::from(f32::MAX)).contains(&exact) {
                    continue;
                }
                worst = worst.max((f64::from(exp(x)) / exact - 1.0).abs());
            }
        }
        assert!(worst < 2e-7, "{worst}");
    }

    #[test]
    fn exp_at_its_ends() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(90.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn every_f16_widens_exactly() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (f16_to_f32(bits), f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(), "{bits:#x}: {ours} {theirs}");
        }
    }

    #[test]
    fn cache_elements_round_to_nearest_and_saturate() {
        assert_eq!(<f16 as KvElement>::store(1e6), f16::MAX);
        assert_eq!(<f16 as KvElement>::store(-1e6), f16::MIN);
        assert!(<f16 as KvElement>::store(f32::NAN).is_nan());
        assert_eq!(<f16 as KvElement>::store(1.0 + 1.0 / 2048.0).load(), 1.0, "a tie goes to even");
        let mut out = [0f32; 2];
        store_kv(&[1.5, -2.0], &mut out);
        assert_eq!(out, [1.5, -2.0]);
    }

    #[test]
    fn by_hand() {
        let mut out = [0.0; 4];
        rms_norm(Level::Scalar, &[3.0, 4.0, 0.0, 0.0], &[1.0, 2.0], 0.0, &mut out);
        let r = 1.0 / 12.5f32.sqrt();
        assert_eq!(out[..2], [3.0 * r, 4.0 * r * 2.0]);
        let mut x = [1.0, 2.0, 3.0, 4.0];
        rope(Level::Scalar, &mut x, 1, 1, &[0.0, 1.0], &[1.0, 0.0]);
        assert_eq!(x, [-3.0, 2.0, 1.0, 4.0], "the first pair (1, 3) turns by 90 degrees, the second stays");
        let mut x = [0.0, std::f32::consts::LN_2];
        softmax(Level::Scalar, &mut x);
        assert!((x[0] - 1.0 / 3.0).abs() < 1e-7 && (x[1] - 2.0 / 3.0).abs() < 1e-7);
        let mut gate = [0.0, 100.0, -200.0];
        silu_mul(Level::Scalar, &mut gate, &[5.0, 2.0, 1.0]);
        assert_eq!(gate, [0.0, 200.0, -0.0]);
        let mut x = [1.0, 2.0, 3.0, 4.0];
        add(Level::Scalar, &mut x, &[10.0, 20.0]);
        assert_eq!(x, [11.0, 22.0, 13.0, 24.0]);
        assert_eq!(argmax(&[1.0, f32::NAN, 3.0, 3.0]), 2);
        assert_eq!(argmax(&[]), 0);
    }

    /// Attention in f64, straight from the definition.
    fn attention_in_f64(
        shape: Attention,
        q: &[f32],
        token: usize,
        position: usize,
        keys: &[f32],
        values: &[f32],
        capacity: usize,
    ) -> Vec<f64> {
        let Attention { heads, kv_heads, head_dim, .. } = shape;
        let mut out = Vec::new();
        for h in 0..heads {
            let kv = h / (heads / kv_heads);
            let q = &q[(token * heads + h) * head_dim..][..head_dim];
            let end = position + token + 1;
            let start = end.saturating_sub(shape.window.unwrap_or(end));
            let row = |x: &[f32], p: usize| -> Vec<f64> {
                x[(kv * capacity + p) * head_dim..][..head_dim].iter().map(|v| f64::from(*v)).collect()
            };
            let e: Vec<f64> = (start..end)
                .map(|p| (row(keys, p).iter().zip(q).map(|(k, q)| k * f64::from(*q)).sum::<f64>() * f64::from(shape.scale)).exp())
                .collect();
            let sum: f64 = e.iter().sum();
            out.extend((0..head_dim).map(|d| (start..end).zip(&e).map(|(p, e)| e / sum * row(values, p)[d]).sum::<f64>()));
        }
        out
    }

    #[test]
    fn attention_is_the_definition_at_every_level_and_slicing() {
        for (heads, kv_heads, head_dim, window) in [(4, 2, 16, None), (3, 1, 20, Some(5)), (2, 2, 7, Some(1))] {
            let shape = Attention { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt(), window };
            let (tokens, position, capacity) = (6, 9, 17);
            let q = values(tokens * heads * head_dim, 1);
            let (keys, vals) = (values(kv_heads * capacity * head_dim, 2), values(kv_heads * capacity * head_dim, 3));
            let half = |x: &[f32]| x.iter().map(|v| <f16 as KvElement>::store(*v)).collect::<Vec<f16>>();
            let back = |x: &[f16]| x.iter().map(|v| v.to_f32()).collect::<Vec<f32>>();
            let (keys16, vals16) = (half(&keys), half(&vals));
            let (keys, vals) = (back(&keys16), back(&vals16));
            let mut first: Option<Vec<f32>> = None;
            for level in levels() {
                for threads in [1, 3] {
                    let pool = Pool::new(threads);
                    let mut out = vec![f32::NAN; q.len()];
                    attend(&pool, level, shape, &q, tokens, position, KvView { keys: &keys, values: &vals, capacity }, &mut out);
                    let want = first.get_or_insert_with(|| out.clone());
                    assert_eq!(&out, want, "{level} f32");
                    // In two slices, from f16: the same values.
                    let cut = 2 * heads * head_dim;
                    let kv = KvView { keys: &keys16, values: &vals16, capacity };
                    let mut out = vec![f32::NAN; q.len()];
                    attend(&pool, level, shape, &q[..cut], 2, position, kv, &mut out[..cut]);
                    attend(&pool, level, shape, &q[cut..], tokens - 2, position + 2, kv, &mut out[cut..]);
                    assert_eq!(&out, want, "{level} f16 sliced");
                }
            }
            for token in 0..tokens {
                let exact = attention_in_f64(shape, &q, token, position, &keys, &vals, capacity);
                let ours = &first.as_ref().unwrap()[token * heads * head_dim..];
                for (ours, exact) in ours.iter().zip(exact) {
                    assert!((f64::from(*ours) - exact).abs() < 1e-6, "{ours} {exact}");
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn levels_agree(n in 1usize..200, rows in 1usize..4, seed in any::<u64>(), wide in any::<bool>()) {
            let stretch = if wide { 100.0 } else { 1.0 };
            let x: Vec<f32> = values(n * rows, seed).iter().map(|v| v * stretch).collect();
            let w = values(n, seed ^ 1);
            let run = |level| {
                let mut norm = vec![0.0; x.len()];
                rms_norm(level, &x, &w, 1e-5, &mut norm);
                let mut in_place = x.clone();
                rms_norm_in_place(level, &w, 1e-5, &mut in_place);
                assert_eq!(norm, in_place);
                let mut soft = x.clone();
                softmax(level, &mut soft);
                let mut gate = x.clone();
                silu_mul(level, &mut gate, &norm);
                let mut turned = [x.clone(), x.clone()].concat();
                rope(level, &mut turned, rows, 1, &x, &norm);
                let mut sum = x.clone();
                add(level, &mut sum, &w);
                [norm, soft, gate, turned, sum].map(|v| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>())
            };
            let want = run(Level::Scalar);
            for level in levels() {
                prop_assert_eq!(run(level), want.clone(), "{}", level);
            }
        }
    }
}
