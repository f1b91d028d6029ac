// ops: what a transformer needs between its matrices.
//
// Every kernel computes a token from that token's numbers alone, in an order that depends on the model's shape only: logits do not
// depend on how a prompt is sliced, on the batch, or on the strategy.

// ---- Clusters of blocks, where there are clusters.

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
#else
  __syncthreads();
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

// Element `e` of a head. `part`: (SPLITS, head_dim); `stats`: (SPLITS).
__device__ __forceinline__ float mixed_value(const float* part, const float2* stats, int head_dim, int e) {
  float2 of[SPLITS];
  float parts[SPLITS];
#pragma unroll
  for (int s = 0; s < SPLITS; s++) { // all loads together
    of[s] = stats[s];
    parts[s] = part[s * head_dim + e];
  }
  return mixed_of(of, parts);
}

// prepare: activations of the next matrix, as int8 with a scale for each 128 columns that is an integer multiple m < 4096 of the token's
// unit: q * m * unit. So that a product's sums over any columns are exact integers.
//
// A cluster of blocks takes a token (gridDim.y), for the unit needs the maximum of all; a block takes a run of supersteps, a warp every so manyth of them.
// frag is what the lanes of a product load: (batch of nt tokens, k / 64, nt / 8, lanes, 4 words); word w of lane (token % 8) * 4 + c holds the
// even (w < 2) or odd columns among c * 8.. of the 32 columns w % 2. For nt = 1 there are 8 lanes, of which 4..7 hold odd columns twice.
template <int INPUT>
__device__ __forceinline__ void prepare(const Prepare& P) {
  extern __shared__ float4 kept[]; // (supersteps of the block, lanes), then what each superstep has to say
  const int t = blockIdx.y, rank = blockIdx.x, supersteps = P.k / SUPERSTEP, blocks = gridDim.x;
  const int of_block = (supersteps + blocks - 1) / blocks, first = rank * of_block, count = max(min(of_block, supersteps - first), 0);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  Both* said = (Both*)(kept + of_block * 32);
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
  for (int i = warp; i < count; i += warps) {
    const int col = (first + i) * SUPERSTEP + lane * 4;
    Four a = {};
    float sum = 0;
    if (there && col < P.cols) { // columns are a multiple of four
      if (INPUT == MIX) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const size_t head = (size_t)t * (P.cols / P.head_dim) + (col + j) / P.head_dim;
          a.v[j] = mixed_value(P.x + head * SPLITS * P.head_dim, P.stats + head * SPLITS, P.head_dim, (col + j) % P.head_dim);
        }
      } else if (INPUT == SILU) {
        const Four gate = four_values(P.add, t, col), up = four_values(P.add, t, P.up_row + col);
#pragma unroll
        for (int j = 0; j < 4; j++) a.v[j] = silu(gate.v[j], up.v[j]);
      } else {
        float* x = P.x + (size_t)row * P.cols + col;
        a = load_four(x);
        if (INPUT == NORM && P.add.sum) {
          const Four more = four_values(P.add, row, col);
#pragma unroll
          for (int j = 0; j < 4; j++) a.v[j] += more.v[j];
          *(float4*)x = float4_of(a);
        }
      }
    }
    if (INPUT == NORM) {
      sum = squares_of(a);
      const Four weight = there && col < P.cols ? load_four(P.weight + col) : Four{};
#pragma unroll
      for (int j = 0; j < 4; j++) a.v[j] *= weight.v[j]; // the norm's factor follows
    }
    kept[i * 32 + lane] = float4_of(a);
    const u32 most = most_of(a);
    if (lane == 0) said[i] = {sum, most};
  }
  cluster_barrier();
  Both all = {0.0f, 0u};
  for (int s = lane; s < supersteps; s += 32) {
    const int of = s / of_block;
    const u32* p = (const u32*)(said + (s - of * of_block));
    all.sum += __uint_as_float(load_of_block(p, of));
    all.most = max(all.most, load_of_block(p + 1, of));
  }
  all = combine_warp(all);
  const float factor = INPUT == NORM ? norm_factor(all.sum, 1.0f / P.cols, P.eps) : 1.0f;
  const bool fixed = (INPUT == SILU || INPUT == MIX) && fits(all.most);
  const float unit = fixed ? FIXED_UNIT : unit_of(__uint_as_float(all.most) * factor), per = per_unit(unit);
  if (threadIdx.x == 0 && rank == 0) P.unit[t] = unit;
  const int batch = t / P.nt, token = t - batch * P.nt, token_tiles = (P.nt + 7) / 8, lanes = P.nt == 1 ? 8 : 32;
  for (int i = warp; i < count; i += warps) {
    Four a = four(kept[i * 32 + lane]);
#pragma unroll
    for (int j = 0; j < 4; j++) a.v[j] *= factor;
    const Quantized x = quantized(a, __float_as_uint(__uint_as_float(said[i].most) * factor), unit, per, fixed ? FIXED_M_MAX : M_MAX);
    const int superstep = first + i, column_block = superstep * 2 + (lane >> 4), kb = lane >> 3 & 1, c = lane >> 1 & 3, half = lane & 1;
    u16* f = (u16*)(P.frag + (((size_t)batch * (P.k / 64) + column_block) * token_tiles + token / 8) * lanes) + kb * 2 + half;
    f[((token & 7) * 4 + c) * 8] = (u16)x.evens;
    f[((token & 7) * 4 + c) * 8 + 4] = (u16)x.odds;
    if (P.nt == 1) {
      f[(4 + c) * 8] = (u16)x.odds;
      f[(4 + c) * 8 + 4] = (u16)x.odds;
    }
    ((u32*)(P.q + (size_t)t * P.k + superstep * SUPERSTEP))[lane] = __byte_perm(x.evens, x.odds, 0x5140);
    if (lane == 0) P.info[(size_t)t * supersteps + superstep] = make_int2(x.m, 128 * x.even);
  }
  cluster_barrier(); // no block leaves while another may read what it said
}

extern "C" __global__ void __launch_bounds__(512) prepare_norm(Prepare P) { prepare<NORM>(P); }
extern "C" __global__ void __launch_bounds__(512) prepare_copy(Prepare P) { prepare<COPY>(P); }
extern "C" __global__ void __launch_bounds__(512) prepare_silu(Prepare P) { prepare<SILU>(P); }
extern "C" __global__ void __launch_bounds__(512) prepare_mix(Prepare P) { prepare<MIX>(P); }

// rope: turns the heads of q and k, keeps k and v. Grid (heads + 2 kv_heads, tokens).
extern "C" __global__ void __launch_bounds__(256) rope(Rope P) {
  __shared__ float slots[8];
  const int t = blockIdx.y, half = P.head_dim / 2, i = threadIdx.x;
  int head = blockIdx.x, row = head * P.head_dim;
  const Crew crew = whole_block();
  const int part = head < P.heads ? Q : head < P.heads + P.kv_heads ? K : V;
  if (part == K) { head -= P.heads; row = P.k_row + head * P.head_dim; }
  if (part == V) { head -= P.heads + P.kv_heads; row = P.v_row + head * P.head_dim; }
  launch_dependents();
  fetch_pair_constants(crew, P, row);
  wait_for_kernel_before();
  const float2 v = turned(crew, P, angle_of(crew, P, t), part, pair_of(crew, P, t, row), slots);
  if (i >= half) return;
  if (part == Q) {
    float* q = P.q + ((size_t)t * P.heads + head) * P.head_dim;
    q[i] = v.x;
    q[half + i] = v.y;
  } else {
    keep(crew, P, P.places[t], part, head, v);
  }
}

// Where a block leaves its part of a head of a token.
struct PartOut {
  float* part;    // (head_dim)
  float2* stat;
  __device__ __forceinline__ PartOut(const Attention& P, int token, int head, int split) {
    const size_t at = ((size_t)token * P.heads + head) * SPLITS + split;
    part = P.out + at * P.head_dim;
    stat = P.stats + at;
  }
  __device__ __forceinline__ void stats(float highest, float total) const { *stat = make_float2(highest, total); }
  __device__ __forceinline__ void value(int e, float y) const { part[e] = y; }
};

template <int PAIRS>
__device__ __forceinline__ void attention_of_grid(const Attention& P) { // (heads * SPLITS, tokens)
  __shared__ AttentionRoom<PAIRS> room;
  const int head = blockIdx.x / SPLITS, split = blockIdx.x % SPLITS, t = blockIdx.y;
  launch_dependents();
  wait_for_kernel_before();
  attention<PAIRS>(whole_block(), room, P, P.places[t], P.q + ((size_t)t * P.heads + head) * P.head_dim, head / (P.heads / P.kv_heads), split, PartOut(P, t, head, split));
}

extern "C" __global__ void __launch_bounds__(256) attention_64(Attention P) { attention_of_grid<1>(P); }   // head_dim <= 64
extern "C" __global__ void __launch_bounds__(256) attention_128(Attention P) { attention_of_grid<2>(P); }  // <= 128
extern "C" __global__ void __launch_bounds__(256) attention_256(Attention P) { attention_of_grid<4>(P); }  // <= 256

// attend: rope and attention for a single token, to the same bits, since a launch costs as much as either. Grid (heads * SPLITS).
// Tried: the block that is done last prepares the next product's activations; slower than a cluster of blocks.
template <int PAIRS>
__device__ __forceinline__ void attend_of_grid(const Attend& P) {
  __shared__ AttendRoom<PAIRS> room;
  const Rope& R = P.rope;
  const Crew crew = whole_block();
  const int head = blockIdx.x / SPLITS, split = blockIdx.x % SPLITS, group = R.heads / R.kv_heads, kv_head = head / group;
  launch_dependents();
  const Rows rows = rows_of(R, head, kv_head);
  for (int part = 0; part < 3; part++) fetch_pair_constants(crew, R, rows.of[part]);
  // Written before the step's first kernel: they need not be waited for.
  const Place place = R.places[0];
  const Angle angle = angle_of(crew, R, 0);
  fetch_positions(crew, P.attention, place, kv_head, blockIdx.x - kv_head * group * SPLITS);
  wait_for_kernel_before();
  const float2 q = pair_of(crew, R, 0, rows.of[Q]), k = pair_of(crew, R, 0, rows.of[K]), v = pair_of(crew, R, 0, rows.of[V]);
  attend<PAIRS>(crew, room, P, place, angle, kv_head, split, q, k, v, PartOut(P.attention, 0, head, split));
}

extern "C" __global__ void __launch_bounds__(256) attend_64(Attend P) { attend_of_grid<1>(P); }
extern "C" __global__ void __launch_bounds__(256) attend_128(Attend P) { attend_of_grid<2>(P); }
extern "C" __global__ void __launch_bounds__(256) attend_256(Attend P) { attend_of_grid<4>(P); }

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
