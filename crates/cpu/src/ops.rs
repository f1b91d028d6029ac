//! What a transformer needs besides its linears, in f32. Every operation gives the same bits at every level and thread count.
//!
//! Sums run in 16 fixed lanes: lane `j` adds the elements `j, j + 16, ...` in order, then the lanes are added as a balanced tree (8 apart, 4, 2, 1).
//! Products and sums are rounded one by one, never fused. `exp` is our own, so that no libm decides a token.

use half::f16;

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

/// `e^x`, within 2e-7 of the exact value relatively: 0 below about -87.3 (where the result would be subnormal), infinite above about 88.7, NaN for NaN.
///
/// Cody and Waite's reduction to `|r| <= ln 2 / 2`, then the Taylor polynomial of degree 7 in Horner's form; only additions and multiplications that are rounded one by one.
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
    /// Rotary position embedding, as Hugging Face's Llama turns the halves of a head: for `i < head_dim / 2`,
    /// `(x[i], x[i + head_dim / 2])` becomes `(x[i] cos - x[i + head_dim / 2] sin, x[i + head_dim / 2] cos + x[i] sin)`.
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

/// The greatest element; the order does not matter for a maximum. NaNs are passed over (and then poison the sum).
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

/// Index of the greatest element, the first of equals; NaNs never win. 0 if there is nothing greater than minus infinity.
pub fn argmax(x: &[f32]) -> usize {
    let mut best = (f32::NEG_INFINITY, 0);
    for (i, v) in x.iter().enumerate() {
        if *v > best.0 {
            best = (*v, i);
        }
    }
    best.1
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
    /// Rounded to nearest even; values beyond the largest finite one of the type become that, so that one outlier does not turn a row into NaNs.
    fn store(x: f32) -> Self;
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
}

/// f16 bits to f32, exact; branch-free integer arithmetic, so that it vectorizes at every level. NaNs keep their payload.
#[inline(always)]
pub(crate) fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff);
    // Normal numbers: shift into place and rebias the exponent by 112. Infinities and NaNs: rebias once more.
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

/// Keys and values of one layer: a slice of (kv_heads, capacity, head_dim) each, of which the positions that the call can see are filled.
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
/// `q`, `out`: (tokens, heads, head_dim). The cache already holds the keys and values of the new tokens. Every token's result depends only on its own query and on the positions
/// it sees, so it does not matter how a prompt is sliced.
///
/// # Panics
/// If the lengths disagree with the shape, `position + tokens > capacity`, or a window is 0.
pub fn attend<E: KvElement>(pool: &Pool, level: Level, shape: Attention, q: &[f32], tokens: usize, position: usize, kv: KvView<'_, E>, out: &mut [f32]) {
    let Attention { heads, kv_heads, head_dim, .. } = shape;
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "{kv_heads} key heads cannot serve {heads} query heads");
    assert!(shape.window != Some(0), "a window of 0 positions sees nothing");
    assert!(q.len() == tokens * heads * head_dim && out.len() == q.len(), "q and out must be (tokens, heads, head_dim)");
    assert!(kv.keys.len() == kv_heads * kv.capacity * head_dim && kv.values.len() == kv.keys.len(), "keys and values must be (kv_heads, capacity, head_dim)");
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
        SCORES.with_borrow_mut(|scores| {
            scores.resize(end - start, 0.0);
            attend_group(level, &q[at..][..group * head_dim], &kv.keys[cached.clone()], &kv.values[cached], shape.scale, scores, out);
        });
    });
}

thread_local! {
    /// One score a position, kept between calls so that a step allocates nothing.
    static SCORES: std::cell::RefCell<Vec<f32>> = const { std::cell::RefCell::new(Vec::new()) };
}

per_level! {
    /// Attention of the query heads that share one key head, for one token: `out = softmax(q K^T scale) V`.
    ///
    /// `q`, `out`: (group, head_dim); `keys`, `values`: (positions, head_dim); `scores`: (positions), scratch.
    fn attend_group[E: KvElement](q: &[f32], keys: &[E], values: &[E], scale: f32, scores: &mut [f32], out: &mut [f32]) {
        let head_dim = keys.len() / scores.len();
        for (q, out) in q.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)) {
            let (q16, q_tail) = q.as_chunks::<LANES>();
            for (key, score) in keys.chunks_exact(head_dim).zip(scores.iter_mut()) {
                let mut lanes = [0f32; LANES];
                let (k16, k_tail) = key.as_chunks::<LANES>();
                for (q, k) in q16.iter().zip(k16) {
                    for j in 0..LANES {
                        lanes[j] += q[j] * k[j].load();
                    }
                }
                for (j, (q, k)) in q_tail.iter().zip(k_tail).enumerate() {
                    lanes[j] += q * k.load();
                }
                *score = fold(lanes) * scale;
            }
            softmax_body(scores);
            out.fill(0.0);
            for (value, p) in values.chunks_exact(head_dim).zip(scores.iter()) {
                for (out, v) in out.iter_mut().zip(value) {
                    *out += p * v.load();
                }
            }
        }
    }
}
