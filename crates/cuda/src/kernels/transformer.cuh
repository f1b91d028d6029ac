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

__device__ __forceinline__ float value_of(i64 sum, float unit, float scale) { return (float)((double)sum * (0.0625 * (double)unit)) * scale; }

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

__device__ __forceinline__ u16 half_of(float x) {
  u16 h;
  asm("cvt.rn.f16.f32 %0,%1;" : "=h"(h) : "f"(x));
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

// A sum and a maximum.
struct Both { float sum; u32 most; };

__device__ __forceinline__ Both combine_warp(Both v) {
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) {
    v.sum += __shfl_xor_sync(~0u, v.sum, d);
    v.most = max(v.most, __shfl_xor_sync(~0u, v.most, d));
  }
  return v;
}

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
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) s += __shfl_xor_sync(~0u, s, d);
  return s;
}
__device__ __forceinline__ u32 most_of_warp(u32 most) {
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) most = max(most, __shfl_xor_sync(~0u, most, d));
  return most;
}
__device__ __forceinline__ u32 most_of(const Four& a) {
  u32 most = 0;
#pragma unroll
  for (int j = 0; j < 4; j++) most = max(most, __float_as_uint(a.v[j]) & 0x7fffffff);
  return most_of_warp(most);
}

// `top`: the largest |v| of a token; where it is no number, the unit is none either and all products are NaN.
__device__ __forceinline__ float unit_of(float top) { return !(top <= 3.4e38f) ? __uint_as_float(0x7fc00000) : top < 1e-30f ? 0.0f : top / (127.0f * 4095.0f); }

struct Quantized {
  u32 q;        // of the lane's four columns
  int m;        // all lanes have it
  int even;     // sum of the even columns' q, of the superstep
  __device__ __forceinline__ u16 evens() const { return (u16)__byte_perm(q, 0, 0x4420); }
  __device__ __forceinline__ u16 odds() const { return (u16)__byte_perm(q, 0, 0x4431); }
};

__device__ __forceinline__ Quantized quantized(const Four& a, float unit) {
  const float absmax = __uint_as_float(most_of(a));
  Quantized out = {0, 0, 0};
  float inverse = 0;
  if (unit > 0 && absmax > 0) {
    out.m = min(max((int)ceilf(absmax / (127.0f * unit)), 1), 4095);
    inverse = 1.0f / (out.m * unit);
  }
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const int q = min(max(__float2int_rn(a.v[j] * inverse), -127), 127);
    out.q |= (u32)(q & 255) << j * 8;
    if (!(j & 1)) out.even += q;
  }
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) out.even += __shfl_xor_sync(~0u, out.even, d);
  return out;
}

__device__ __forceinline__ float silu(float gate, float up) { return up * (gate / (1.0f + expf(-gate))); }

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
    const float inverse = 1.0f / sqrtf(s / P.head_dim + P.eps);
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
  float2* stats;         // (tokens, heads, SPLITS): highest score, sum of the weights relative to it; 0: no positions, and nothing in out
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
  float top[ATTENTION_WARPS], sum[ATTENTION_WARPS];
  float mixed[ATTENTION_WARPS][PAIRS * 64];
};

template <int PAIRS>
__device__ __forceinline__ void attention(const Crew& crew, AttentionRoom<PAIRS>& room, const Attention& P, const float* query, int head, int split, int t) { // query: (head_dim)
  constexpr int WARPS = ATTENTION_WARPS, AT_ONCE = 4;
  const int warp = crew.index >> 5, lane = crew.index & 31, pairs = P.head_dim / 2;
  const Place place = P.places[t];
  const size_t base = ((size_t)P.layer * P.kv_heads + head / (P.heads / P.kv_heads)) * place.capacity * P.head_dim;
  const u32* keys = (const u32*)(place.keys + base);
  const u32* values = (const u32*)(place.values + base);
  const int end = place.position + 1, begin = P.window > 0 && end > P.window ? end - P.window : 0;
  const size_t place_of_block = ((size_t)t * P.heads + head) * SPLITS + split;
  if (begin + split * WARPS * AT_ONCE >= end) {
    if (crew.index == 0) P.stats[place_of_block] = make_float2(-__uint_as_float(0x7f800000), 0.0f);
    return;
  }
  float2 q[PAIRS], acc[PAIRS];
#pragma unroll
  for (int j = 0; j < PAIRS; j++) {
    const int e = lane + 32 * j;
    const float2 v = e < pairs ? ((const float2*)query)[e] : make_float2(0, 0);
    q[j] = make_float2(v.x * P.scale, v.y * P.scale);
    acc[j] = make_float2(0, 0);
  }
  float top = -__uint_as_float(0x7f800000), sum = 0;
  for (int at = begin + (split * WARPS + warp) * AT_ONCE; at < end; at += SPLITS * WARPS * AT_ONCE) {
    float score[AT_ONCE];
    u32 k[AT_ONCE][PAIRS], v[AT_ONCE][PAIRS]; // values are on their way while the scores are summed
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
#pragma unroll
      for (int j = 0; j < PAIRS; j++) {
        const bool has = at + i < end && lane + 32 * j < pairs;
        const size_t e = (size_t)(at + i) * pairs + lane + 32 * j;
        k[i][j] = has ? keys[e] : 0;
        v[i][j] = has ? values[e] : 0;
      }
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      score[i] = 0;
#pragma unroll
      for (int j = 0; j < PAIRS; j++) score[i] += q[j].x * float_of((u16)k[i][j]) + q[j].y * float_of((u16)(k[i][j] >> 16));
    }
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) {
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) score[i] += __shfl_xor_sync(~0u, score[i], d);
    }
    float higher = top;
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) if (at + i < end) higher = fmaxf(higher, score[i]);
    const float shrink = expf(top - higher);
    top = higher;
    sum *= shrink;
#pragma unroll
    for (int j = 0; j < PAIRS; j++) { acc[j].x *= shrink; acc[j].y *= shrink; }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const float w = at + i < end ? expf(score[i] - top) : 0.0f;
      sum += w;
#pragma unroll
      for (int j = 0; j < PAIRS; j++) {
        acc[j].x += w * float_of((u16)v[i][j]);
        acc[j].y += w * float_of((u16)(v[i][j] >> 16));
      }
    }
  }
#pragma unroll
  for (int j = 0; j < PAIRS; j++) {
    room.mixed[warp][(lane + 32 * j) * 2] = acc[j].x;
    room.mixed[warp][(lane + 32 * j) * 2 + 1] = acc[j].y;
  }
  if (lane == 0) { room.top[warp] = top; room.sum[warp] = sum; }
  crew.sync();
  float highest = room.top[0];
  for (int w = 1; w < WARPS; w++) highest = fmaxf(highest, room.top[w]);
  float total = 0, weight[WARPS];
  for (int w = 0; w < WARPS; w++) total += room.sum[w] * (weight[w] = room.sum[w] > 0 ? expf(room.top[w] - highest) : 0.0f);
  if (crew.index == 0) P.stats[place_of_block] = make_float2(highest, total);
  for (int e = crew.index; e < P.head_dim; e += crew.threads) {
    float y = 0;
    for (int w = 0; w < WARPS; w++) y += room.mixed[w][e] * weight[w];
    P.out[place_of_block * P.head_dim + e] = y;
  }
}

// What the blocks that shared a head's positions found, put together: element `e` of a head. `part`: (SPLITS, head_dim); `stats`: (SPLITS).
// Past the L1 cache: in step.cu other blocks have just written both.
__device__ __forceinline__ float mixed_value(const float* part, const float2* stats, int head_dim, int e) {
  float2 stat[SPLITS];
  float parts[SPLITS];
#pragma unroll
  for (int s = 0; s < SPLITS; s++) { // all loads together: what a block without positions left is loaded, but not used
    stat[s] = __ldcg(stats + s);
    parts[s] = __ldcg(part + s * head_dim + e);
  }
  float highest = stat[0].x, total = 0, y = 0;
#pragma unroll
  for (int s = 1; s < SPLITS; s++) highest = fmaxf(highest, stat[s].x);
#pragma unroll
  for (int s = 0; s < SPLITS; s++) {
    if (stat[s].y == 0) continue;
    const float weight = expf(stat[s].x - highest);
    total += weight * stat[s].y;
    y += weight * parts[s];
  }
  return y / total;
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
__device__ __forceinline__ Rows rows_of(const Rope& R, int head) {
  const int kv_head = head / (R.heads / R.kv_heads);
  return {{head * R.head_dim, R.k_row + kv_head * R.head_dim, R.v_row + kv_head * R.head_dim}};
}

// `q`, `k`, `v`: of the crew's threads, as `pair_of` has them.
template <int PAIRS>
__device__ __forceinline__ void attend(const Crew& crew, AttendRoom<PAIRS>& room, const Attend& P, const Place& place, Angle angle, int head, int split, float2 q, float2 k, float2 v) {
  const Rope& R = P.rope;
  const int kv_head = head / (R.heads / R.kv_heads), half = R.head_dim / 2, i = crew.index;
  q = turned(crew, R, angle, Q, q, room.slots);
  k = turned(crew, R, angle, K, k, room.slots);
  if (i < half) {
    room.query[i] = q.x;
    room.query[half + i] = q.y;
    keep(crew, R, place, K, kv_head, k);
    keep(crew, R, place, V, kv_head, v);
  }
  crew.sync();
  attention<PAIRS>(crew, room.attention, P.attention, room.query, head, split, 0);
}
