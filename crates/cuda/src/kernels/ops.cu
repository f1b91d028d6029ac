// ops: what a transformer needs between its matrices.
//
// Every kernel computes a token from that token's numbers alone, in an order that depends on the model's shape only: logits do not
// depend on how a prompt is sliced, on the batch, or on the strategy.

// How a matrix's sums become numbers: value(row) = sum[token][row] * unit[token] / 16 * scale[row] (+ bias[row]).
struct Sums {
  const i64* sum;      // (tokens, n)
  const float* unit;   // (tokens)
  const float* scale;  // (n)
  const float* bias;   // (n), or null
  int n;
};

__device__ __forceinline__ float value(const Sums& s, int token, int row) {
  const float y = (float)((double)s.sum[(size_t)token * s.n + row] * (0.0625 * (double)s.unit[token])) * s.scale[row];
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

// ---- Sums and maxima over a block, and over a cluster of blocks where there are clusters.

__device__ __forceinline__ u32 cluster_blocks() {
#if HOPPER
  u32 n;
  asm volatile("mov.u32 %0,%%cluster_nctaid.x;" : "=r"(n));
  return n;
#else
  return 1;
#endif
}
__device__ __forceinline__ void cluster_barrier() {
#if HOPPER
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ u32 load_of_block(const u32* p, u32 rank) { // p's place in another block of the cluster
#if HOPPER
  u32 a, v;
  asm volatile("mapa.shared::cluster.u32 %0,%1,%2;" : "=r"(a) : "r"(shared_address(p)), "r"(rank));
  asm volatile("ld.shared::cluster.u32 %0,[%1];" : "=r"(v) : "r"(a) : "memory");
  return v;
#else
  return *p;
#endif
}

// A sum and a maximum over all threads of the cluster; all get both. The order is fixed by the launch's shape.
struct Both { float sum; u32 most; };

__device__ __forceinline__ Both combine_warp(Both v) {
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) {
    v.sum += __shfl_xor_sync(~0u, v.sum, d);
    v.most = max(v.most, __shfl_xor_sync(~0u, v.most, d));
  }
  return v;
}

// `slots`: 2 * 17 words of shared memory of this call alone; at most 16 warps.
__device__ __forceinline__ Both combine(Both v, u32 (*slots)[17]) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  v = combine_warp(v);
  if (lane == 0) {
    slots[0][warp] = __float_as_uint(v.sum);
    slots[1][warp] = v.most;
  }
  __syncthreads();
  if (warp == 0) {
    const Both all = combine_warp({lane < warps ? __uint_as_float(slots[0][lane]) : 0.0f, lane < warps ? slots[1][lane] : 0u});
    if (lane == 0) {
      slots[0][16] = __float_as_uint(all.sum);
      slots[1][16] = all.most;
    }
  }
  const int blocks = cluster_blocks();
  if (blocks == 1) {
    __syncthreads();
    return {__uint_as_float(slots[0][16]), slots[1][16]};
  }
  cluster_barrier();
  const u32 rank = min(lane, blocks - 1); // at most 16 blocks
  const u32 sum = load_of_block(&slots[0][16], rank), most = load_of_block(&slots[1][16], rank);
  return combine_warp({lane < blocks ? __uint_as_float(sum) : 0.0f, most});
}

enum Input { NORM = 0, COPY = 1, SILU = 2, MIX = 3 };

struct Prepare {
  float* x;              // NORM: residual stream, (tokens, cols), updated; COPY: input, (tokens, cols); MIX: attention's out
  const float2* stats;   // MIX: attention's stats
  const float* weight;   // NORM: (cols)
  const u32* rows;       // NORM: token t reads row rows[t] of x and of the sums; null: t
  Sums add;              // NORM: added to x first, if sum is not null; SILU: gate at row i, up at row up_row + i
  uint4* frag;           // see below
  i8* q;                 // (tokens padded, k)
  int2* info;            // (tokens padded, k / 128): m, 128 * sum of the even columns' q
  float* unit;           // (tokens padded)
  i64* clear;            // (tokens padded, clear_n): where the product will add its sums
  float eps;
  int cols;
  int k;                 // padded columns, a multiple of 128
  int tokens;            // those beyond get zeros
  int nt;                // tokens that a product takes together: 1 or a multiple of 8
  int up_row;
  int clear_n;
  int head_dim;          // MIX
};

// What the blocks that shared a head's positions found, put together: element `col` of token t's heads.
__device__ __forceinline__ float mixed_value(const Prepare& P, int t, int col) {
  const size_t head = (size_t)t * (P.cols / P.head_dim) + col / P.head_dim;
  const float* part = P.x + head * SPLITS * P.head_dim + col % P.head_dim;
  float2 stats[SPLITS];
  float parts[SPLITS];
#pragma unroll
  for (int s = 0; s < SPLITS; s++) { // all loads together: what a block without positions left is loaded, but not used
    stats[s] = P.stats[head * SPLITS + s];
    parts[s] = part[s * P.head_dim];
  }
  float highest = stats[0].x, total = 0, y = 0;
#pragma unroll
  for (int s = 1; s < SPLITS; s++) highest = fmaxf(highest, stats[s].x);
#pragma unroll
  for (int s = 0; s < SPLITS; s++) {
    if (stats[s].y == 0) continue;
    const float weight = expf(stats[s].x - highest);
    total += weight * stats[s].y;
    y += weight * parts[s];
  }
  return y / total;
}

// prepare: activations of the next matrix, as int8 with a scale for each 128 columns that is an integer multiple m < 4096 of the token's
// unit: q * m * unit. So that a product's sums over any columns are exact integers.
//
// A cluster of blocks takes a token (gridDim.y), for the unit needs the maximum of all; a block takes a run of supersteps. First a thread has
// single columns, so that loads are coalesced; then half a warp has a superstep, a lane 8 columns.
// frag is what the lanes of a product load: (batch of nt tokens, k / 64, nt / 8, lanes, 4 words); word w of lane (token % 8) * 4 + c holds the
// even (w < 2) or odd columns among c * 8.. of the 32 columns w % 2. For nt = 1 there are 8 lanes, of which 4..7 hold odd columns twice.
template <int INPUT>
__device__ __forceinline__ void prepare(const Prepare& P) {
  extern __shared__ float kept[]; // (columns of the block)
  __shared__ u32 slots[2][17];
  const int t = blockIdx.y, rank = blockIdx.x, supersteps = P.k / SUPERSTEP, blocks = gridDim.x;
  const int of_block = (supersteps + blocks - 1) / blocks, first = rank * of_block, count = max(min(of_block, supersteps - first), 0);
  const bool there = t < P.tokens;
  launch_dependents();
  if (INPUT == NORM || INPUT == SILU)
    for (int i = threadIdx.x; i < count * SUPERSTEP; i += blockDim.x) {
      const int col = first * SUPERSTEP + i;
      if (!there || col >= P.cols) break;
      if (INPUT == NORM) fetch_constant(P.weight + col);
      if (INPUT == SILU || P.add.sum) fetch_constants(P.add, col);
      if (INPUT == SILU) fetch_constants(P.add, P.up_row + col);
    }
  wait_for_kernel_before();
  for (int i = rank * blockDim.x + threadIdx.x; i < P.clear_n / 2; i += blocks * blockDim.x)
    ((uint4*)(P.clear + (size_t)t * P.clear_n))[i] = make_uint4(0, 0, 0, 0);
  const int row = INPUT == NORM && P.rows && there ? P.rows[t] : t;
  Both all = {0.0f, 0u}; // sum of squares; bits of the largest |v|, compared as integers so that a NaN is the largest
  constexpr int AT_ONCE = 4; // columns whose loads are in flight together
  for (int i0 = threadIdx.x; i0 < count * SUPERSTEP; i0 += AT_ONCE * blockDim.x) {
    float a[AT_ONCE], gate[AT_ONCE];
    int cols[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      const int i = i0 + u * blockDim.x, col = first * SUPERSTEP + i;
      cols[u] = there && i < count * SUPERSTEP && col < P.cols ? col : -1;
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      a[u] = gate[u] = 0;
      if (cols[u] < 0) continue;
      if (INPUT == MIX) {
        a[u] = mixed_value(P, t, cols[u]);
      } else if (INPUT == SILU) {
        gate[u] = value(P.add, t, cols[u]);
        a[u] = value(P.add, t, P.up_row + cols[u]);
      } else {
        a[u] = P.x[(size_t)row * P.cols + cols[u]];
        if (INPUT == NORM && P.add.sum) gate[u] = value(P.add, row, cols[u]);
      }
    }
    if (INPUT == SILU) {
#pragma unroll
      for (int u = 0; u < AT_ONCE; u++) a[u] *= gate[u] / (1.0f + expf(-gate[u]));
    }
    if (INPUT == NORM) {
      if (P.add.sum) {
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++)
          if (cols[u] >= 0) P.x[(size_t)row * P.cols + cols[u]] = a[u] += gate[u];
      }
#pragma unroll
      for (int u = 0; u < AT_ONCE; u++)
        if (cols[u] >= 0) {
          all.sum += a[u] * a[u];
          a[u] *= P.weight[cols[u]]; // the norm's factor follows
        }
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      const int i = i0 + u * blockDim.x;
      if (i < count * SUPERSTEP) kept[i] = a[u];
      all.most = max(all.most, __float_as_uint(a[u]) & 0x7fffffff);
    }
  }
  all = combine(all, slots);
  const float factor = INPUT == NORM ? 1.0f / sqrtf(all.sum / P.cols + P.eps) : 1.0f;
  const float top = __uint_as_float(all.most) * factor;
  const bool finite = top <= 3.4e38f;
  const float unit = !finite ? __uint_as_float(0x7fc00000) : top < 1e-30f ? 0.0f : top / (127.0f * 4095.0f);
  if (threadIdx.x == 0 && rank == 0) P.unit[t] = unit;
  const int batch = t / P.nt, token = t - batch * P.nt, token_tiles = (P.nt + 7) / 8, lanes = P.nt == 1 ? 8 : 32;
  const int lane16 = threadIdx.x & 15;
  for (int i = threadIdx.x >> 4; i < (count + 1 & ~1); i += blockDim.x >> 4) { // even, so that both halves of a warp take part in the shuffles
    const bool inside = i < count;
    float v[8];
    u32 bits = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      v[j] = inside ? kept[i * SUPERSTEP + lane16 * 8 + j] * factor : 0.0f;
      bits = max(bits, __float_as_uint(v[j]) & 0x7fffffff);
    }
#pragma unroll
    for (int d = 8; d > 0; d >>= 1) bits = max(bits, __shfl_xor_sync(~0u, bits, d));
    const float absmax = __uint_as_float(bits);
    int m = 0;
    float inverse = 0;
    if (finite && unit > 0 && absmax > 0) {
      m = min(max((int)ceilf(absmax / (127.0f * unit)), 1), 4095);
      inverse = 1.0f / (m * unit);
    }
    u32 words[2] = {0, 0}; // even columns, odd columns
    int even = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int q = min(max(__float2int_rn(v[j] * inverse), -127), 127);
      words[j & 1] |= (u32)(q & 255) << (j / 2 * 8);
      if (!(j & 1)) even += q;
    }
#pragma unroll
    for (int d = 8; d > 0; d >>= 1) even += __shfl_xor_sync(~0u, even, d);
    if (!inside) continue;
    const int superstep = first + i, column_block = superstep * 2 + (lane16 >> 3), kb = (lane16 >> 2) & 1, c = lane16 & 3;
    u32* f = (u32*)(P.frag + (((size_t)batch * (P.k / 64) + column_block) * token_tiles + token / 8) * lanes);
    f[((token & 7) * 4 + c) * 4 + kb] = words[0];
    f[((token & 7) * 4 + c) * 4 + 2 + kb] = words[1];
    if (P.nt == 1) {
      f[(4 + c) * 4 + kb] = words[1];
      f[(4 + c) * 4 + 2 + kb] = words[1];
    }
    u32* q = (u32*)(P.q + (size_t)t * P.k + superstep * SUPERSTEP + lane16 * 8);
    q[0] = __byte_perm(words[0], words[1], 0x5140);
    q[1] = __byte_perm(words[0], words[1], 0x7362);
    if (lane16 == 0) P.info[(size_t)t * supersteps + superstep] = make_int2(m, 128 * even);
  }
  cluster_barrier(); // no block leaves while another may read its slots
}

extern "C" __global__ void __launch_bounds__(512) prepare_norm(Prepare P) { prepare<NORM>(P); }
extern "C" __global__ void __launch_bounds__(512) prepare_copy(Prepare P) { prepare<COPY>(P); }
extern "C" __global__ void __launch_bounds__(512) prepare_silu(Prepare P) { prepare<SILU>(P); }
extern "C" __global__ void __launch_bounds__(512) prepare_mix(Prepare P) { prepare<MIX>(P); }

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

// Elements i and i + head_dim / 2 of a head, normed (Qwen3) and turned by the token's position. All threads of the block; `slots`: 8 floats.
__device__ __forceinline__ float2 turned(const Rope& P, int t, int part, float2 v, float* slots) {
  const int i = threadIdx.x, half = P.head_dim / 2;
  const float* norm = part == Q ? P.q_norm : part == K ? P.k_norm : nullptr;
  if (norm) {
    float s = i < half ? v.x * v.x + v.y * v.y : 0.0f;
    for (int d = 16; d > 0; d >>= 1) s += __shfl_xor_sync(~0u, s, d);
    if ((i & 31) == 0 && i < half) slots[i >> 5] = s;
    __syncthreads();
    s = 0;
    for (int w = 0; w < (half + 31) / 32; w++) s += slots[w];
    __syncthreads(); // the slots may be written again
    const float inverse = 1.0f / sqrtf(s / P.head_dim + P.eps);
    if (i < half) v = make_float2(v.x * (inverse * norm[i]), v.y * (inverse * norm[half + i]));
  }
  if (i >= half || part == V) return v;
  const float cosine = P.turn[(size_t)t * P.head_dim + i], sine = P.turn[(size_t)t * P.head_dim + half + i];
  return make_float2(v.x * cosine - v.y * sine, v.y * cosine + v.x * sine);
}

// Writes the elements i and i + head_dim / 2 of a head's key or value to the cache.
__device__ __forceinline__ void keep(const Rope& P, const Place& place, int part, int head, float2 v) {
  const int i = threadIdx.x, half = P.head_dim / 2;
  u16* to = (part == K ? place.keys : place.values) + (((size_t)P.layer * P.kv_heads + head) * place.capacity + place.position) * P.head_dim;
  to[i] = half_of(v.x);
  to[half + i] = half_of(v.y);
}

__device__ __forceinline__ float2 pair_of(const Rope& P, int t, int row) {
  const int i = threadIdx.x, half = P.head_dim / 2;
  return i < half ? make_float2(value(P.sums, t, row + i), value(P.sums, t, row + half + i)) : make_float2(0, 0);
}
__device__ __forceinline__ void fetch_pair_constants(const Rope& P, int row) {
  const int i = threadIdx.x, half = P.head_dim / 2;
  if (i >= half) return;
  fetch_constants(P.sums, row + i);
  fetch_constants(P.sums, row + half + i);
}

// rope: turns the heads of q and k, keeps k and v. Grid (heads + 2 kv_heads, tokens).
extern "C" __global__ void __launch_bounds__(256) rope(Rope P) {
  __shared__ float slots[8];
  const int t = blockIdx.y, half = P.head_dim / 2, i = threadIdx.x;
  int head = blockIdx.x, row = head * P.head_dim;
  const int part = head < P.heads ? Q : head < P.heads + P.kv_heads ? K : V;
  if (part == K) { head -= P.heads; row = P.k_row + head * P.head_dim; }
  if (part == V) { head -= P.heads + P.kv_heads; row = P.v_row + head * P.head_dim; }
  launch_dependents();
  fetch_pair_constants(P, row);
  wait_for_kernel_before();
  const float2 v = turned(P, t, part, pair_of(P, t, row), slots);
  if (i >= half) return;
  if (part == Q) {
    float* q = P.q + ((size_t)t * P.heads + head) * P.head_dim;
    q[i] = v.x;
    q[half + i] = v.y;
  } else {
    keep(P, P.places[t], part, head, v);
  }
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
__device__ __forceinline__ void attention(const Attention& P, const float* query, int head, int split, int t) { // query: (head_dim)
  constexpr int WARPS = 8, AT_ONCE = 4;
  __shared__ float top_of[WARPS], sum_of[WARPS];
  __shared__ float mixed[WARPS][PAIRS * 64];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, pairs = P.head_dim / 2;
  const Place place = P.places[t];
  const size_t base = ((size_t)P.layer * P.kv_heads + head / (P.heads / P.kv_heads)) * place.capacity * P.head_dim;
  const u32* keys = (const u32*)(place.keys + base);
  const u32* values = (const u32*)(place.values + base);
  const int end = place.position + 1, begin = P.window > 0 && end > P.window ? end - P.window : 0;
  const size_t place_of_block = ((size_t)t * P.heads + head) * SPLITS + split;
  if (begin + split * WARPS * AT_ONCE >= end) {
    if (threadIdx.x == 0) P.stats[place_of_block] = make_float2(-__uint_as_float(0x7f800000), 0.0f);
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
    mixed[warp][(lane + 32 * j) * 2] = acc[j].x;
    mixed[warp][(lane + 32 * j) * 2 + 1] = acc[j].y;
  }
  if (lane == 0) { top_of[warp] = top; sum_of[warp] = sum; }
  __syncthreads();
  float highest = top_of[0];
  for (int w = 1; w < WARPS; w++) highest = fmaxf(highest, top_of[w]);
  float total = 0, weight[WARPS];
  for (int w = 0; w < WARPS; w++) total += sum_of[w] * (weight[w] = sum_of[w] > 0 ? expf(top_of[w] - highest) : 0.0f);
  if (threadIdx.x == 0) P.stats[place_of_block] = make_float2(highest, total);
  for (int e = threadIdx.x; e < P.head_dim; e += blockDim.x) {
    float y = 0;
    for (int w = 0; w < WARPS; w++) y += mixed[w][e] * weight[w];
    P.out[place_of_block * P.head_dim + e] = y;
  }
}

template <int PAIRS>
__device__ __forceinline__ void attention_of_grid(const Attention& P) { // (heads * SPLITS, tokens)
  const int head = blockIdx.x / SPLITS, split = blockIdx.x % SPLITS, t = blockIdx.y;
  launch_dependents();
  wait_for_kernel_before();
  attention<PAIRS>(P, P.q + ((size_t)t * P.heads + head) * P.head_dim, head, split, t);
}

extern "C" __global__ void __launch_bounds__(256) attention_64(Attention P) { attention_of_grid<1>(P); }   // head_dim <= 64
extern "C" __global__ void __launch_bounds__(256) attention_128(Attention P) { attention_of_grid<2>(P); }  // <= 128
extern "C" __global__ void __launch_bounds__(256) attention_256(Attention P) { attention_of_grid<4>(P); }  // <= 256

// attend: rope and attention for a single token, to the same bits, since a launch costs as much as either.
//
// Grid (heads * SPLITS). Every block turns the key and value of its head too: those that share them write the same numbers, so that no block waits
// for another. Tried: the block that is done last prepares the next product's activations; slower than a cluster of blocks.
struct Attend {
  Rope rope;               // q is not used
  Attention attention;     // q is not used
};

// Keys and values of the positions before, on their way into the L2 cache: the share of one of the blocks of a kv head, a line a thread.
__device__ __forceinline__ void fetch_positions(const Attention& P, const Place& place, int kv_head, int share) {
  const u64 base = ((u64)P.layer * P.kv_heads + kv_head) * place.capacity * P.head_dim * 2, end = (u64)place.position * P.head_dim * 2;
  const u64 at = (u64)(share * blockDim.x + threadIdx.x) * 128;
  if (at >= end) return;
  fetch_constant((const u8*)place.keys + base + at);
  fetch_constant((const u8*)place.values + base + at);
}

template <int PAIRS>
__device__ __forceinline__ void attend(const Attend& P) {
  __shared__ float slots[8], query[256];
  const Rope& R = P.rope;
  const int head = blockIdx.x / SPLITS, split = blockIdx.x % SPLITS, kv_head = head / (R.heads / R.kv_heads), half = R.head_dim / 2, i = threadIdx.x;
  const int rows[3] = {head * R.head_dim, R.k_row + kv_head * R.head_dim, R.v_row + kv_head * R.head_dim};
  launch_dependents();
  for (int part = 0; part < 3; part++) fetch_pair_constants(R, rows[part]);
  // Written before the step's first kernel: it need not be waited for.
  const Place place = R.places[0];
  fetch_positions(P.attention, place, kv_head, blockIdx.x - kv_head * (R.heads / R.kv_heads) * SPLITS);
  wait_for_kernel_before();
  float2 q = pair_of(R, 0, rows[Q]), k = pair_of(R, 0, rows[K]), v = pair_of(R, 0, rows[V]); // loads in flight together
  q = turned(R, 0, Q, q, slots);
  k = turned(R, 0, K, k, slots);
  if (i < half) {
    query[i] = q.x;
    query[half + i] = q.y;
    keep(R, place, K, kv_head, k);
    keep(R, place, V, kv_head, v);
  }
  __syncthreads();
  attention<PAIRS>(P.attention, query, head, split, 0);
}

extern "C" __global__ void __launch_bounds__(256) attend_64(Attend P) { attend<1>(P); }
extern "C" __global__ void __launch_bounds__(256) attend_128(Attend P) { attend<2>(P); }
extern "C" __global__ void __launch_bounds__(256) attend_256(Attend P) { attend<4>(P); }

// logits: the head's sums as numbers, (tokens, rows). Grid (blocks of rows, tokens).
extern "C" __global__ void __launch_bounds__(256) logits(Sums sums, float* out, int rows) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  launch_dependents();
  if (row < rows) fetch_constants(sums, row);
  wait_for_kernel_before();
  if (row < rows) out[(size_t)blockIdx.y * rows + row] = value(sums, blockIdx.y, row);
}

// read_all: reads memory and keeps nothing: the bandwidth that products are compared with.
extern "C" __global__ void __launch_bounds__(512) read_all(const uint4* p, u64 count, u32* out) {
  u32 sum = 0;
  const u64 stride = (u64)gridDim.x * blockDim.x;
  u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x;
  for (; i + 3 * stride < count; i += 4 * stride) {
    const uint4 a = __ldcs(p + i), b = __ldcs(p + i + stride), c = __ldcs(p + i + 2 * stride), d = __ldcs(p + i + 3 * stride);
    sum ^= a.x ^ b.y ^ c.z ^ d.w;
  }
  if (sum == 0x12345) out[0] = sum;
}
