// transformer: what a model computes between its matrices, piece by piece, shared by the kernels for any number of tokens (ops.cu) and the one
// kernel of a step (step.cu). Both give the same bits: every order of summation is here, or is a launch's shape that step.cu repeats.

// How a matrix's sums become numbers: value(row) = sum[token][row] * unit[token] / 16 * scale[row] (+ bias[row]).
struct Sums {
  const i64* sum;      // (tokens, n)
  const float* unit;   // (tokens)
  const float* scale;  // (n)
  const float* bias;   // (n), or null
  int n;
};

// Below 2^47 rounded once, as a conversion of 64 bits would, which takes four times as long as two of 32.
__device__ __forceinline__ float float_of(i64 sum) { return __fmaf_rn((float)(int)(sum >> 24), 16777216.0f, (float)((u32)sum & 0xffffff)); }

__device__ __forceinline__ float value_of(i64 sum, float unit, float scale) { return float_of(sum) * (0.0625f * unit) * scale; }

__device__ __forceinline__ float value(const Sums& s, int token, int row) {
  const float y = value_of(s.sum[(size_t)token * s.n + row], s.unit[token], s.scale[row]);
  return s.bias ? y + s.bias[row] : y;
}

// While the kernel before runs: constants on their way into the L2 cache, which a step's weights have swept.
__device__ __forceinline__ void fetch_constant(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

__device__ __forceinline__ void fetch_constants(const Sums& s, int row) {
  fetch_constant(s.scale + row);
  if (s.bias) fetch_constant(s.bias + row);
}

// What is too large becomes the largest finite one, as on the CPU; a NaN stays one.
__device__ __forceinline__ u16 half_of(float x) {
  u16 h;
  asm("{ .reg .f32 c; min.NaN.f32 c,%1,0f477fe000; max.NaN.f32 c,c,0fc77fe000; cvt.rn.f16.f32 %0,c; }" : "=h"(h) : "f"(x)); // 65504
  return h;
}
__device__ __forceinline__ float float_of(u16 h) {
  float x;
  asm("cvt.f32.f16 %0,%1;" : "=f"(x) : "h"(h));
  return x;
}

// Threads that work together: a whole block, or a part of one with a barrier of its own.
struct Crew {
  int index;    // of this thread
  int threads;  // a multiple of 32
  int barrier;  // of the block's 16
  __device__ __forceinline__ void sync() const { asm volatile("bar.sync %0,%1;" ::"r"(barrier), "r"(threads) : "memory"); }
};
__device__ __forceinline__ Crew whole_block() { return {(int)threadIdx.x, (int)blockDim.x, 0}; }

__device__ __forceinline__ float sum_of_warp(float v) {
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) v += __shfl_xor_sync(~0u, v, d);
  return v;
}
__device__ __forceinline__ u32 most_of_warp(u32 v) { return __reduce_max_sync(~0u, v); }

// A sum and a maximum.
struct Both { float sum; u32 most; };

__device__ __forceinline__ Both combine_warp(Both v) { return {sum_of_warp(v.sum), most_of_warp(v.most)}; }

// Approximations of two units in the last place: 2^x, 1/x, 1/sqrt(x).
__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float inverse_root(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}
constexpr float LOG2_E = 1.44269504f;

// ---- Activations: int8 with a scale for each 128 columns that is an integer multiple m < 4096 of the token's unit.
//
// A warp has a superstep of 128 columns, a lane four consecutive ones. Sums of squares meet in an order that no launch changes: those of a lane, of a
// superstep, of every 32nd superstep, of all.

struct Four { float v[4]; };

__device__ __forceinline__ Four four(float4 v) { return {{v.x, v.y, v.z, v.w}}; }
__device__ __forceinline__ float4 float4_of(const Four& a) { return make_float4(a.v[0], a.v[1], a.v[2], a.v[3]); }
__device__ __forceinline__ Four load_four(const float* p) { return four(*(const float4*)p); }

// Four sums of consecutive rows.
struct FourSums { longlong2 a, b; };
__device__ __forceinline__ FourSums load_four_sums(const i64* p) { return {((const longlong2*)p)[0], ((const longlong2*)p)[1]}; }

__device__ __forceinline__ Four values_of(const FourSums& s, float unit, const Four& scale, bool biased, const Four& bias) {
  const i64 sums[4] = {s.a.x, s.a.y, s.b.x, s.b.y};
  Four out;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const float y = value_of(sums[j], unit, scale.v[j]);
    out.v[j] = biased ? y + bias.v[j] : y;
  }
  return out;
}

// Values of rows row.. of a token, a multiple of four.
__device__ __forceinline__ Four four_values(const Sums& s, int token, int row) {
  const FourSums sums = load_four_sums(s.sum + (size_t)token * s.n + row);
  const Four scale = load_four(s.scale + row), bias = s.bias ? load_four(s.bias + row) : Four{};
  return values_of(sums, s.unit[token], scale, s.bias, bias);
}

// Of a superstep: sum of squares, and the bits of the largest |v|, compared as integers so that a NaN is the largest.
__device__ __forceinline__ float squares_of(const Four& a) {
  float s = 0;
#pragma unroll
  for (int j = 0; j < 4; j++) s = __fmaf_rn(a.v[j], a.v[j], s);
  return sum_of_warp(s);
}
__device__ __forceinline__ u32 most_of(const Four& a) {
  u32 most = 0;
#pragma unroll
  for (int j = 0; j < 4; j++) most = max(most, __float_as_uint(a.v[j]) & 0x7fffffff);
  return most_of_warp(most);
}

constexpr int M_MAX = 4095;
// What attention and silu leave has one unit for all tokens, so that the kernel of a step need not wait for the maximum of a whole layer, as long as no
// superstep's largest |v| is beyond what FIXED_M_MAX reaches: 2032. It is as fine as int8 is above 16 units of 127: 4.8e-4. (Sums of 2^8 supersteps then
// stay below 2^55, as `float_of` and the arrivals of step.cu need.)
constexpr float FIXED_UNIT = 0x1p-22f;
constexpr int FIXED_M_MAX = 1 << 26;
__device__ __forceinline__ bool fits(u32 most) { return __uint_as_float(most) <= 127.0f * FIXED_UNIT * FIXED_M_MAX; }

// `top`: the largest |v| of a token; where it is no number, the unit is none either and all products are NaN.
__device__ __forceinline__ float unit_of(float top) { return !(top <= 3.4e38f) ? __uint_as_float(0x7fc00000) : top < 1e-30f ? 0.0f : top * (1.0f / (127.0f * M_MAX)); }

// What a norm multiplies by. `per_column`: 1 / columns.
__device__ __forceinline__ float norm_factor(float squares, float per_column, float eps) { return inverse_root(squares * per_column + eps); }

struct Quantized {
  u32 evens;    // of the lane's four columns: the even ones in two bytes, the odd ones
  u32 odds;
  int m;        // all lanes have it
  int even;     // sum of the even columns' q, of the superstep
};

// Two numbers as int8, the first in the low byte.
__device__ __forceinline__ u32 bytes_of(float a, float b) {
  u32 v;
  asm("{ .reg .s32 a,b; cvt.rni.s32.f32 a,%1; cvt.rni.s32.f32 b,%2; cvt.pack.sat.s8.s32.b32 %0,b,a,0; }" : "=r"(v) : "f"(a), "f"(b));
  return v;
}

// `most`: the bits of the superstep's largest |a|. `per`: 1 / (127 * unit), or 0.
__device__ __forceinline__ Quantized quantized(const Four& a, u32 most, float unit, float per, int m_max) {
  Quantized out;
  out.m = min((int)ceilf(__uint_as_float(most) * per), m_max);
  const float inverse = out.m > 0 ? reciprocal(out.m * unit) : 0.0f; // m = 0: the superstep's columns are 0, or the unit is none
  out.evens = bytes_of(a.v[0] * inverse, a.v[2] * inverse);
  out.odds = bytes_of(a.v[1] * inverse, a.v[3] * inverse);
  out.even = __reduce_add_sync(~0u, __dp4a((int)out.evens, 0x0101, 0));
  return out;
}
__device__ __forceinline__ float per_unit(float unit) { return unit > 0 ? reciprocal(127.0f * unit) : 0.0f; }

__device__ __forceinline__ float silu(float gate, float up) { return up * (gate * reciprocal(1.0f + exp2_of(-LOG2_E * gate))); }

// Where a token's keys and values are.
struct Place {
  u16* keys;       // f16, (layers, kv_heads, capacity, head_dim)
  u16* values;
  u32 position;
  u32 capacity;
};

struct Rope {
  Sums sums;             // q, k, v stacked; k begins at row k_row, v at v_row
  const float* q_norm;   // (head_dim), or null
  const float* k_norm;
  const float* turn;     // (tokens, head_dim): head_dim / 2 cosines, then sines
  const Place* places;   // (tokens)
  float* q;              // (tokens, heads, head_dim)
  float eps;
  float per_dim;         // 1 / head_dim
  int layer;
  int heads;
  int kv_heads;
  int head_dim;
  int k_row;
  int v_row;
};

enum Part { Q = 0, K = 1, V = 2 };

// The angle by which a thread turns its elements.
struct Angle { float cosine, sine; };
__device__ __forceinline__ Angle angle_of(const Crew& crew, const Rope& P, int t) {
  const int half = P.head_dim / 2, i = min(crew.index, half - 1);
  return {P.turn[(size_t)t * P.head_dim + i], P.turn[(size_t)t * P.head_dim + half + i]};
}

// Elements i and i + head_dim / 2 of a head, normed (Qwen3) and turned by the token's position. All threads of the crew; `slots`: 8 floats.
__device__ __forceinline__ float2 turned(const Crew& crew, const Rope& P, Angle angle, int part, float2 v, float* slots) {
  const int i = crew.index, half = P.head_dim / 2;
  const float* norm = part == Q ? P.q_norm : part == K ? P.k_norm : nullptr;
  if (norm) {
    float s = i < half ? v.x * v.x + v.y * v.y : 0.0f;
    for (int d = 16; d > 0; d >>= 1) s += __shfl_xor_sync(~0u, s, d);
    if ((i & 31) == 0 && i < half) slots[i >> 5] = s;
    crew.sync();
    s = 0;
    for (int w = 0; w < (half + 31) / 32; w++) s += slots[w];
    crew.sync(); // the slots may be written again
    const float inverse = norm_factor(s, P.per_dim, P.eps);
    if (i < half) v = make_float2(v.x * (inverse * norm[i]), v.y * (inverse * norm[half + i]));
  }
  if (part == V) return v;
  return make_float2(v.x * angle.cosine - v.y * angle.sine, v.y * angle.cosine + v.x * angle.sine);
}

// Writes the elements i and i + head_dim / 2 of a head's key or value to the cache.
__device__ __forceinline__ void keep(const Crew& crew, const Rope& P, const Place& place, int part, int head, float2 v) {
  const int i = crew.index, half = P.head_dim / 2;
  u16* to = (part == K ? place.keys : place.values) + (((size_t)P.layer * P.kv_heads + head) * place.capacity + place.position) * P.head_dim;
  to[i] = half_of(v.x);
  to[half + i] = half_of(v.y);
}

// Threads beyond the pairs have the last one, so that all loads are in flight together.
__device__ __forceinline__ float2 pair_of(const Crew& crew, const Rope& P, int t, int row) {
  const int half = P.head_dim / 2, i = min(crew.index, half - 1);
  return make_float2(value(P.sums, t, row + i), value(P.sums, t, row + half + i));
}
__device__ __forceinline__ void fetch_pair_constants(const Crew& crew, const Rope& P, int row) {
  const int i = crew.index, half = P.head_dim / 2;
  if (i >= half) return;
  fetch_constants(P.sums, row + i);
  fetch_constants(P.sums, row + half + i);
}

struct Attention {
  const float* q;        // (tokens, heads, head_dim)
  const Place* places;   // (tokens)
  float* out;            // (tokens, heads, SPLITS, head_dim): sums of weighted values
  float2* stats;         // (tokens, heads, SPLITS): highest score times log2(e), sum of the weights relative to it; 0: no positions, and nothing in out
  float scale;
  int layer;
  int heads;
  int kv_heads;
  int head_dim;
  int window;            // positions that a token sees, its own included; 0: all
};

// attention: softmax(q . keys * scale) values for a head of a token, but for the division. SPLITS blocks share the positions: of their warps, warp w
// takes four at a time from 4 w on, with a running maximum; the warps of a block meet in shared memory, the blocks in prepare_mix. A lane holds the
// pairs of elements lane + 32 j. Which positions meet when depends on the positions only.
template <int PAIRS>
struct AttentionRoom { // shared memory of a crew
  float2 stats[ATTENTION_WARPS]; // highest score, sum
  float mixed[ATTENTION_WARPS][PAIRS * 64];
};

// Of four numbers of each lane, the sums over all lanes.
__device__ __forceinline__ void sum_four(float (&v)[4]) {
  const int lane = threadIdx.x & 31;
  const bool upper = lane & 16, odd = lane & 8;
  // Half of the lanes go on with two of them, a quarter with one.
  float a = (upper ? v[2] : v[0]) + __shfl_xor_sync(~0u, upper ? v[0] : v[2], 16), b = (upper ? v[3] : v[1]) + __shfl_xor_sync(~0u, upper ? v[1] : v[3], 16);
  float s = (odd ? b : a) + __shfl_xor_sync(~0u, odd ? a : b, 8);
#pragma unroll
  for (int d = 4; d > 0; d >>= 1) s += __shfl_xor_sync(~0u, s, d);
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = __shfl_sync(~0u, s, i * 8);
}

// `query`: (head_dim). `out.stats(highest, total)` by one thread, `out.value(e, y)` for each element.
template <int PAIRS, class Out>
__device__ __forceinline__ void attention(const Crew& crew, AttentionRoom<PAIRS>& room, const Attention& P, const Place& place, const float* query, int kv_head, int split, const Out& out) {
  constexpr int WARPS = ATTENTION_WARPS, AT_ONCE = 4;
  const float none = -__uint_as_float(0x7f800000);
  const int warp = crew.index >> 5, lane = crew.index & 31, pairs = P.head_dim / 2;
  const size_t base = ((size_t)P.layer * P.kv_heads + kv_head) * place.capacity * P.head_dim;
  const u32* keys = (const u32*)(place.keys + base) + lane;
  const u32* values = (const u32*)(place.values + base) + lane;
  __builtin_assume(__isGlobal(keys) && __isGlobal(values));
  const int end = place.position + 1, begin = P.window > 0 && end > P.window ? end - P.window : 0;
  if (begin + split * WARPS * AT_ONCE >= end) {
    if (crew.index == 0) out.stats(none, 0.0f);
    return;
  }
  float2 q[PAIRS], acc[PAIRS];
  const float scale = P.scale * LOG2_E;
#pragma unroll
  for (int j = 0; j < PAIRS; j++) {
    const int e = lane + 32 * j;
    const float2 v = e < pairs ? ((const float2*)query)[e] : make_float2(0, 0);
    q[j] = make_float2(v.x * scale, v.y * scale);
    acc[j] = make_float2(0, 0);
  }
  float top = none, sum = 0;
  struct Positions { u32 k[AT_ONCE][PAIRS], v[AT_ONCE][PAIRS]; };
  auto load = [&](Positions& to, int at) { // beyond the end: loaded, with weight 0
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const u32 first = min(at + i, end - 1) * pairs;
      const u32 *key = keys + first, *value = values + first;
#pragma unroll
      for (int j = 0; j < PAIRS; j++) {
        const bool has = lane + 32 * j < pairs;
        to.k[i][j] = has ? key[32 * j] : 0;
        to.v[i][j] = has ? value[32 * j] : 0;
      }
    }
  };
  // The next positions are on their way while these are summed, where registers allow.
  constexpr bool AHEAD = PAIRS <= 2;
  int at = begin + (split * WARPS + warp) * AT_ONCE;
  Positions next = {};
  if (AHEAD) load(next, at);
#pragma unroll 1
  for (; at < end; at += SPLITS * WARPS * AT_ONCE) {
    float score[AT_ONCE];
    Positions here;
    if (AHEAD) here = next;
    const int ahead = at + (AHEAD ? SPLITS * WARPS * AT_ONCE : 0);
    if (ahead < end) load(AHEAD ? next : here, ahead);
    const auto& k = here.k;
    const auto& v = here.v;
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      score[i] = 0;
#pragma unroll
      for (int j = 0; j < PAIRS; j++) score[i] = __fmaf_rn(q[j].x, float_of((u16)k[i][j]), __fmaf_rn(q[j].y, float_of((u16)(k[i][j] >> 16)), score[i]));
    }
    sum_four(score);
#pragma unroll
    for (int i = 1; i < AT_ONCE; i++) if (at + i >= end) score[i] = none;
    const float higher = fmaxf(fmaxf(fmaxf(score[0], score[1]), fmaxf(score[2], score[3])), top), shrink = exp2_of(top - higher);
    top = higher;
    sum *= shrink;
#pragma unroll
    for (int j = 0; j < PAIRS; j++) { acc[j].x *= shrink; acc[j].y *= shrink; }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const float w = exp2_of(score[i] - top);
      sum += w;
#pragma unroll
      for (int j = 0; j < PAIRS; j++) {
        acc[j].x = __fmaf_rn(w, float_of((u16)v[i][j]), acc[j].x);
        acc[j].y = __fmaf_rn(w, float_of((u16)(v[i][j] >> 16)), acc[j].y);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < PAIRS; j++) ((float2*)room.mixed[warp])[lane + 32 * j] = acc[j];
  if (lane == 0) room.stats[warp] = make_float2(top, sum);
  crew.sync();
  if (crew.index >= P.head_dim) return; // heads have at most as many elements as a crew has threads
  float2 stats[WARPS];
  float highest = none, total = 0, y = 0;
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    stats[w] = room.stats[w];
    highest = fmaxf(highest, stats[w].x);
  }
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    const float weight = exp2_of(stats[w].x - highest); // 0 for a warp without positions
    total = __fmaf_rn(stats[w].y, weight, total);
    y = __fmaf_rn(room.mixed[w][crew.index], weight, y);
  }
  if (crew.index == 0) out.stats(highest, total);
  out.value(crew.index, y);
}

// What the blocks that shared a head's positions found, put together: an element of the head.
__device__ __forceinline__ float mixed_of(const float2 (&stats)[SPLITS], const float (&parts)[SPLITS]) {
  float highest = stats[0].x, total = 0, y = 0;
#pragma unroll
  for (int s = 1; s < SPLITS; s++) highest = fmaxf(highest, stats[s].x);
#pragma unroll
  for (int s = 0; s < SPLITS; s++) {
    const float weight = exp2_of(stats[s].x - highest); // 0 for a block without positions, which left no part
    total = __fmaf_rn(weight, stats[s].y, total);
    y = __fmaf_rn(weight, stats[s].y == 0 ? 0.0f : parts[s], y);
  }
  return y * reciprocal(total);
}

// Keys and values of the positions before, on their way into the L2 cache: the share of one of the crews of a kv head, a line a thread.
__device__ __forceinline__ void fetch_positions(const Crew& crew, const Attention& P, const Place& place, int kv_head, int share) {
  const u64 base = ((u64)P.layer * P.kv_heads + kv_head) * place.capacity * P.head_dim * 2, end = (u64)place.position * P.head_dim * 2;
  const u64 at = (u64)(share * crew.threads + crew.index) * 128;
  if (at >= end) return;
  fetch_constant((const u8*)place.keys + base + at);
  fetch_constant((const u8*)place.values + base + at);
}

// Rope and attention of a single token, for one of the crews that share a head. Every crew turns the key and value of its head too: those that share
// them write the same numbers, so that none waits for another.
struct Attend {
  Rope rope;               // q is not used
  Attention attention;     // q is not used
};

template <int PAIRS>
struct AttendRoom {
  AttentionRoom<PAIRS> attention;
  float slots[8];
  float query[PAIRS * 64];
};

// First row of what the crew needs of q, k and v.
struct Rows { int of[3]; };
__device__ __forceinline__ Rows rows_of(const Rope& R, int head, int kv_head) {
  return {{head * R.head_dim, R.k_row + kv_head * R.head_dim, R.v_row + kv_head * R.head_dim}};
}

// `q`, `k`, `v`: of the crew's threads, as `pair_of` has them. `out`: as for `attention`.
template <int PAIRS, class Out>
__device__ __forceinline__ void attend(const Crew& crew, AttendRoom<PAIRS>& room, const Attend& P, const Place& place, Angle angle, int kv_head, int split, float2 q, float2 k, float2 v, const Out& out) {
  const Rope& R = P.rope;
  const int half = R.head_dim / 2, i = crew.index;
  q = turned(crew, R, angle, Q, q, room.slots);
  k = turned(crew, R, angle, K, k, room.slots);
  if (i < half) {
    room.query[i] = q.x;
    room.query[half + i] = q.y;
    keep(crew, R, place, K, kv_head, k);
    keep(crew, R, place, V, kv_head, v);
  }
  crew.sync();
  attention<PAIRS>(crew, room.attention, P.attention, place, room.query, kv_head, split, out);
}
