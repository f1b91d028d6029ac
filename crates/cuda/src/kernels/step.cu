// step: a whole step of one token in one kernel: all layers and the logits, of a model whose matrices are all in the plain layout.
//
// Computes what ops.cu and plain.cu compute one launch after another, to the bit.
//
// Why.  A launch costs 3 to 5 us in which the memory idles, and a layer needs nine.  Here the weights are one stream: each warp knows from
// the start which parts of which matrices it will multiply, and keeps its ring of RING supersteps full whatever the model waits for: the
// barriers and everything between two products happen while weights arrive.
//
// Layout.  The 1 KiB supersteps of a matrix in the plain layout (no raw low bits) follow each other in memory; block b of the grid takes the
// b-th even share of them, warp w the w-th share of the block's.  A lane copies 16 bytes of each half of a superstep into its warp's ring and
// multiplies what it copied itself, so the ring needs no barriers.  Activations are prepared by each block for itself, in shared memory, from
// what the product before left: exact integer sums, added up in the L2 cache.  Between two products lies a barrier of the grid, before down
// and o a second one, for the maximum over all blocks on which the unit of the activations depends:
//
//   norm, qkv | attention | o | norm, gate and up | silu | down | norm ...
//
// Needs.  All blocks at once on the GPU (a cooperative launch), one a multiprocessor; sums that are 0, which it leaves as 0; `control` cleared.
//
// Cost.  Six barriers a layer, some 1.3 us each, behind the memory's time.  Measured: bench/RESULTS.md, "CUDA".

constexpr int STEP_THREADS = STEP_WARPS * 32;
constexpr int SUPERSTEP_BYTES = SUPERSTEP * TILE_ROWS / 2;
constexpr int CLUSTER_MAX = 8;

struct StepProduct {
  Plain matrix;
  const float* scale;   // (n)
  const float* bias;    // (n), or null
};

enum { QKV = 0, O = 1, GATE_UP = 2, DOWN = 3, HEAD = 4 };

struct StepLayer {
  StepProduct products[4];
  const float* input_norm;  // (hidden)
  const float* post_norm;
  const float* q_norm;      // (head_dim), or null
  const float* k_norm;
  int window;               // as in Attention
  int unused;
};

struct Step {
  const StepLayer* layers;
  StepProduct head;
  const float* final_norm;
  const float* x;        // the token's embedding, (hidden)
  float* stream[2];      // the residual stream, by turns
  const float* turn;     // as in Rope
  const Place* place;
  i64* sums[5];          // of the products, (n) each
  float* parts;          // attention's out
  float2* stats;
  float* mixed;          // what attention left, (heads * head_dim), zeros behind it up to the padded columns
  float* active;         // what silu left, (intermediate), likewise
  u32* control;          // arrivals at barriers | arrivals of crews, (heads) | maxima, (layers, 2)
  float* logits;         // (vocab)
  float eps;
  float scale;
  int layer_count;
  int hidden;
  int padded_hidden;
  int intermediate;
  int heads;
  int kv_heads;
  int head_dim;
  int k_row;
  int v_row;
  int up_row;
  int vocab;
  int cluster;           // blocks of `prepare` for `hidden` columns, whose order of summation this kernel repeats
  int frag_bytes;        // room for activations
  int scratch_bytes;     // room for a normed stream, and for attention
};

// The share of a block in a product.
struct Share {
  const u8* nibbles;
  u32 first;             // superstep
  u32 count;
};

// Shared memory, in order; `step_shared_bytes` of kernels.rs adds it up.
struct Room {
  u32 ring;              // of the warp
  Share* shares;         // (products)
  StepLayer* layers;     // this one and the next, by turns
  int2* info;            // (supersteps)
  u32 frag;              // (columns), see below
  u64 (*far)[TILE_ROWS]; // (warps)
  float* slots;          // (CLUSTER_MAX, warps), then the warps' maxima
  u8* scratch;
};

__device__ __forceinline__ uint4 load_ring(u32 address) { // not to be moved behind the copy that overwrites it
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ void share_out(u32 first, u32 count, u32 parts, u32 part, u32& at, u32& end) {
  at = first + (u32)((u64)count * part / parts);
  end = first + (u32)((u64)count * (part + 1) / parts);
}

// What a warp reads, from the first product to the last: RING supersteps ahead of what it multiplies.
template <int RING>
struct Feed {
  const u8* next;
  u32 left, product, products, slot;
  u64 once;

  __device__ __forceinline__ Feed(int products) : next(nullptr), left(0), product(0), products(products), slot(0), once(policy_once()) {}

  // Asks for one more superstep; at the end for none, so that there are always RING groups of copies.
  __device__ __forceinline__ void put(const Room& room) {
    const u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    while (left == 0 && product < products) {
      const Share share = room.shares[product++];
      u32 at, end;
      share_out(share.first, share.count, STEP_WARPS, warp, at, end);
      left = end - at;
      next = share.nibbles + (size_t)at * SUPERSTEP_BYTES + lane * 16;
    }
    if (left > 0) {
      const u32 to = room.ring + slot * SUPERSTEP_BYTES + lane * 16;
      copy_async_16_once(to, next, once);
      copy_async_16_once(to + SUPERSTEP_BYTES / 2, next + SUPERSTEP_BYTES / 2, once);
      next += SUPERSTEP_BYTES;
      left--;
    }
    copy_async_commit();
    slot = slot + 1 == RING ? 0 : slot + 1;
  }

  // The superstep that was asked for first; `put` asks for one in its place.
  __device__ __forceinline__ void take(const Room& room, uint4& a, uint4& b) {
    copy_async_wait_but<RING - 1>();
    const u32 from = room.ring + slot * SUPERSTEP_BYTES + (threadIdx.x & 31) * 16;
    a = load_ring(from);
    b = load_ring(from + SUPERSTEP_BYTES / 2);
  }
};

// Barriers of the grid, in two halves. What any thread wrote before it arrived, all threads see after waiting.
struct Grid {
  u32* arrivals;
  u32 target;
  __device__ __forceinline__ void arrive() {
    __syncthreads();
    target += gridDim.x;
    if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0],1;" ::"l"(arrivals) : "memory");
  }
  __device__ __forceinline__ void wait() const {
    if (threadIdx.x == 0) {
      u32 seen;
      do asm volatile("ld.acquire.gpu.global.u32 %0,[%1];" : "=r"(seen) : "l"(arrivals) : "memory");
      while (seen < target);
    }
    __syncthreads();
  }
};

// m * q of a column for far symbols, from the fragments of the block.
struct OfRoom {
  const Room& room;
  int first_superstep;
  __device__ __forceinline__ i64 operator()(int, int col) const {
    const int c = first_superstep * SUPERSTEP + col;
    u32 word = load_shared(room.frag + (c & ~63) + (c >> 3 & 3) * 16 + (c & 1) * 8 + (c >> 5 & 1) * 4);
    return (i64)room.info[c / SUPERSTEP].x * (i8)(word >> (c >> 1 & 3) * 8);
  }
};

// The block's share of a product with the activations in `room`.
template <int RING>
__device__ __forceinline__ void product(const Plain& M, Feed<RING>& feed, const Room& room, int index, i64* sums) {
  const int warp = threadIdx.x >> 5, c = threadIdx.x & 3;
  const u32 supersteps = M.tc / SUPERSTEP;
  const Share share = room.shares[index];
  u32 at, end;
  share_out(share.first, share.count, STEP_WARPS, warp, at, end);
  while (at < end) {
    const u32 tile = at / supersteps, first = at - tile * supersteps, run = min(supersteps - first, end - at);
    const u32 seg = tile / M.row_tiles, row_tile = tile - seg * M.row_tiles;
    u32 far = 0, far_end = 0;
    if (first == 0) { // whoever has the begin of a tile
      far = M.far_off[tile];
      far_end = M.far_off[tile + 1];
    }
    i64 y0[1] = {0}, y1[1] = {0};
    u32 x = room.frag + (seg * supersteps + first) * SUPERSTEP + c * 16;
    const int2* info = room.info + seg * supersteps + first;
#pragma unroll 1
    for (u32 i = 0; i < run; i++, x += SUPERSTEP, info++) {
      uint4 v[2];
      feed.take(room, v[0], v[1]);
      int low[4] = {}, high[4] = {};
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint4 a = v[half], f = load_shared_16(x + half * 64);
        const u32 L = 0x0f0f0f0f, H = 0xf0f0f0f0;
        mma(low, a.x & L, a.y & L, a.z & L, a.w & L, f.x, f.y);
        mma(high, a.x & H, a.y & H, a.z & H, a.w & H, f.z, f.w);
      }
      const int2 m = *info;
      y0[0] += (i64)m.x * (low[0] * 16 + high[0] - m.y);
      y1[0] += (i64)m.x * (low[2] * 16 + high[2] - m.y);
      feed.put(room);
    }
    add_far<1>(far, far_end, M.far, OfRoom{room, (int)(seg * supersteps)}, room.far[warp], y0, y1);
    add_sums<1>(sums, M.n, row_tile, y0, y1);
    at += run;
  }
}

// The supersteps of columns that the block's share of a product meets.
__device__ __forceinline__ int2 met(const Plain& M, const Share& share) {
  if (share.count == 0) return make_int2(0, 0);
  const u32 supersteps = M.tc / SUPERSTEP, tiles = M.row_tiles;
  return make_int2(share.first / supersteps / tiles * supersteps, ((share.first + share.count - 1) / supersteps / tiles + 1) * supersteps);
}

// int8 activations of these supersteps. `load(column, v)`: 8 numbers from a column on. frag: (columns / 64, 4 lanes, 4 words), words as in ops.cu.
template <class Load>
__device__ __forceinline__ void quantize(const Room& room, int2 range, float unit, const Load& load) {
  const int lane16 = threadIdx.x & 15, count = range.y - range.x;
  for (int i = threadIdx.x >> 4; i < (count + 1 & ~1); i += STEP_THREADS / 16) { // even, as in ops.cu
    const int superstep = range.x + i;
    float v[8] = {};
    if (i < count) load(superstep * SUPERSTEP + lane16 * 8, v);
    const Quantized x = quantized(v, unit);
    if (i >= count) continue;
    const u32 to = room.frag + superstep * SUPERSTEP + (lane16 >> 3) * 64 + (lane16 & 3) * 16 + (lane16 >> 2 & 1) * 4;
    asm volatile("st.shared.u32 [%0],%1;" ::"r"(to), "r"(x.words[0]) : "memory");
    asm volatile("st.shared.u32 [%0],%1;" ::"r"(to + 8), "r"(x.words[1]) : "memory");
    if (lane16 == 0) room.info[superstep] = make_int2(x.m, 128 * x.even);
  }
  __syncthreads();
}

// Maximum over all threads of the block, of bits.
__device__ __forceinline__ u32 most_of_warp(u32 most) {
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) most = max(most, __shfl_xor_sync(~0u, most, d));
  return most;
}

// Adds a product to the stream (if there is one), norms it and prepares it for the next product; returns the unit. Every block does all of it; each
// writes a part of the new stream. Sums of squares meet as in `prepare` of ops.cu, of `cluster` blocks.
__device__ __forceinline__ float normed(const Step& P, const Room& room, const float* x, const Sums& add, const float* weight, float* out, int2 range) {
  constexpr int AT_ONCE = 8;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, supersteps = P.padded_hidden / SUPERSTEP;
  const int block_cols = (supersteps + P.cluster - 1) / P.cluster * SUPERSTEP, threads = min(block_cols, STEP_THREADS);
  const int per = (block_cols + threads - 1) / threads, rounds = P.cluster * per;
  float* kept = (float*)room.scratch;
  float (*sums)[STEP_WARPS] = (float (*)[STEP_WARPS])room.slots;
  u32* mosts = (u32*)(room.slots + CLUSTER_MAX * STEP_WARPS);
  float sum = 0;
  u32 most = 0;
  int rank = 0, of_rank = 0; // of the next column to load; one behind it for those to sum
  int summed_rank = 0, summed = 0;
#pragma unroll 1
  for (int j0 = 0; j0 < rounds; j0 += AT_ONCE) {
    float a[AT_ONCE], b[AT_ONCE], w[AT_ONCE];
    int cols[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      const int i = of_rank * threads + threadIdx.x, col = rank * block_cols + i;
      cols[u] = j0 + u < rounds && threadIdx.x < threads && i < block_cols && col < P.hidden ? col : -1;
      if (++of_rank == per) of_rank = 0, rank++;
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      a[u] = b[u] = w[u] = 0;
      if (cols[u] < 0) continue;
      a[u] = x[cols[u]];
      w[u] = __ldg(weight + cols[u]);
      if (add.sum) b[u] = value(add, 0, cols[u]);
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      if (j0 + u >= rounds) break;
      if (cols[u] >= 0) {
        if (add.sum) {
          a[u] += b[u];
          if ((cols[u] >> 5) % gridDim.x == blockIdx.x) out[cols[u]] = a[u];
        }
        sum = __fmaf_rn(a[u], a[u], sum);
        a[u] *= w[u];
        kept[cols[u]] = a[u];
        most = max(most, __float_as_uint(a[u]) & 0x7fffffff);
      }
      if (++summed == per) {
#pragma unroll
        for (int d = 16; d > 0; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
        if (lane == 0) sums[summed_rank][warp] = sum;
        sum = 0;
        summed = 0;
        summed_rank++;
      }
    }
  }
  most = most_of_warp(most);
  if (lane == 0) mosts[warp] = most;
  __syncthreads();
  // Two ranks at a time, one in each half of a warp; warps that `prepare` would not have left 0.
  float of_ranks = 0;
#pragma unroll
  for (int r = 0; r < CLUSTER_MAX; r += 2) {
    const int mine = r + (lane >> 4);
    float s = mine < P.cluster ? sums[mine][lane & 15] : 0.0f;
#pragma unroll
    for (int d = 8; d > 0; d >>= 1) s += __shfl_xor_sync(~0u, s, d);
    const float first = __shfl_sync(~0u, s, 0), second = __shfl_sync(~0u, s, 16);
    if (lane == r) of_ranks = first;
    if (lane == r + 1) of_ranks = second;
  }
#pragma unroll
  for (int d = 4; d > 0; d >>= 1) of_ranks += __shfl_xor_sync(~0u, of_ranks, d);
  const float total = __shfl_sync(~0u, of_ranks, 0);
  most = mosts[lane & (STEP_WARPS - 1)];
  most = most_of_warp(most);
  const float factor = 1.0f / sqrtf(total / P.hidden + P.eps);
  const float unit = unit_of(__uint_as_float(most) * factor);
  quantize(room, range, unit, [&](int col, float (&v)[8]) {
    if (col < P.hidden) { // hidden may end inside the 8
      const float4 p = *(const float4*)(kept + col), q = *(const float4*)(kept + col + 4);
      const float all[8] = {p.x, p.y, p.z, p.w, q.x, q.y, q.z, q.w};
#pragma unroll
      for (int j = 0; j < 8; j++) v[j] = col + j < P.hidden ? all[j] * factor : 0.0f;
    }
  });
  return unit;
}

// Prepares what all blocks left in `values`; returns the unit.
__device__ __forceinline__ float prepared(const float* values, const Room& room, const u32* most, int2 range) {
  const float unit = unit_of(__uint_as_float(__ldcg(most)));
  quantize(room, range, unit, [&](int col, float (&v)[8]) {
    const float4 p = __ldcg((const float4*)(values + col)), q = __ldcg((const float4*)(values + col + 4));
    const float all[8] = {p.x, p.y, p.z, p.w, q.x, q.y, q.z, q.w};
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = all[j];
  });
  return unit;
}

__device__ __forceinline__ void clear(i64* sums, int n) {
  for (int i = blockIdx.x * STEP_THREADS + threadIdx.x; i < n; i += gridDim.x * STEP_THREADS) sums[i] = 0;
}

// Brings what a block needs after a barrier into the L2 cache.
__device__ __forceinline__ void fetch_vectors(const float* a, const float* b, const float* c, int n) {
  for (int i = threadIdx.x * 32; i < n; i += STEP_THREADS * 32) {
    fetch_constant(a + i);
    if (b) fetch_constant(b + i);
    if (c) fetch_constant(c + i);
  }
}

// The heads' parts, shared out to crews of half a block.
struct Attends {
  Attend at;
  Crew crew;
  int which;   // crew of the block
  int group;   // crews that share a kv head
  __device__ __forceinline__ int first() const { return blockIdx.x + which * gridDim.x; }
  __device__ __forceinline__ int items() const { return at.rope.heads * SPLITS; }
};

__device__ __forceinline__ Attends attends(const Step& P, const StepLayer& L, int layer, const float* unit) {
  constexpr int THREADS = ATTENTION_WARPS * 32;
  const int which = threadIdx.x / THREADS;
  Attends all;
  all.crew = {(int)threadIdx.x % THREADS, THREADS, 1 + which};
  all.which = which;
  all.group = P.heads / P.kv_heads * SPLITS;
  const StepProduct& qkv = L.products[QKV];
  all.at.rope = {{P.sums[QKV], unit, qkv.scale, qkv.bias, qkv.matrix.n}, L.q_norm, L.k_norm, P.turn, P.place, nullptr, P.eps, layer, P.heads, P.kv_heads, P.head_dim, P.k_row, P.v_row};
  all.at.attention = {nullptr, P.place, P.parts, P.stats, P.scale, layer, P.heads, P.kv_heads, P.head_dim, L.window};
  return all;
}

// Before the barrier: constants, and keys and values of the positions before.
__device__ __forceinline__ void fetch_heads(const Attends& all, const Place& place) {
  for (int item = all.first(); item < all.items(); item += 2 * gridDim.x) {
    const Rows rows = rows_of(all.at.rope, item / SPLITS);
    for (int part = 0; part < 3; part++) fetch_pair_constants(all.crew, all.at.rope, rows.of[part]);
    fetch_positions(all.crew, all.at.attention, place, item / all.group, item % all.group);
  }
}

// The crew that is done last with a head puts its parts together.
template <int PAIRS>
__device__ __forceinline__ void attend_all(const Step& P, const Attends& all, const Place& place, const Room& room, u32* arrivals, u32* most) {
  const Crew& crew = all.crew;
  AttendRoom<PAIRS>& mine = ((AttendRoom<PAIRS>*)room.scratch)[all.which];
  __shared__ bool last[2];
  for (int item = all.first(); item < all.items(); item += 2 * gridDim.x) {
    const int head = item / SPLITS;
    attend<PAIRS>(crew, mine, all.at, place, head, item % SPLITS);
    __threadfence();
    crew.sync();
    if (crew.index == 0) last[all.which] = atomicAdd(arrivals + head, 1) == SPLITS - 1;
    crew.sync();
    if (last[all.which]) {
      __threadfence();
      if (crew.index == 0) arrivals[head] = 0;
      u32 top = 0;
      for (int e = crew.index; e < P.head_dim; e += crew.threads) {
        const float y = mixed_value(P.parts + (size_t)head * SPLITS * P.head_dim, P.stats + head * SPLITS, P.head_dim, e);
        P.mixed[head * P.head_dim + e] = y;
        top = max(top, __float_as_uint(y) & 0x7fffffff);
      }
      top = most_of_warp(top);
      if ((crew.index & 31) == 0 && crew.index < P.head_dim) atomicMax(most, top);
    }
    crew.sync(); // the room may be used again
  }
}

template <int PAIRS, int RING>
__device__ __forceinline__ void step(const Step& P) {
  extern __shared__ __align__(128) u8 shared[];
  __shared__ float unit[2]; // of the products, by turns
  const int products = P.layer_count * 4 + 1, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
  Room room;
  u8* at = shared;
  auto place = [&](int bytes) { u8* here = at; at += (bytes + 127) & ~127; return here; };
  room.ring = shared_address(place(STEP_WARPS * RING * SUPERSTEP_BYTES)) + warp * RING * SUPERSTEP_BYTES;
  room.scratch = place(P.scratch_bytes);
  room.frag = shared_address(place(P.frag_bytes));
  room.info = (int2*)place(P.frag_bytes / SUPERSTEP * 8);
  room.far = (u64 (*)[TILE_ROWS])place(STEP_WARPS * TILE_ROWS * 8);
  room.slots = (float*)place((CLUSTER_MAX + 1) * STEP_WARPS * 4);
  room.layers = (StepLayer*)place(2 * sizeof(StepLayer));
  room.shares = (Share*)place(products * sizeof(Share));
  for (int i = threadIdx.x; i < products; i += STEP_THREADS) {
    const Plain& M = i + 1 < products ? P.layers[i / 4].products[i % 4].matrix : P.head.matrix;
    u32 first, end;
    share_out(0, (u32)M.row_tiles * M.segs * (M.tc / SUPERSTEP), gridDim.x, blockIdx.x, first, end);
    room.shares[i] = {(const u8*)M.nibbles, first, end - first};
  }
  auto load_layer = [&](int layer) { // of the threads behind the first warp, whose first thread waits at barriers
    const u32* from = (const u32*)(P.layers + layer);
    u32* to = (u32*)(room.layers + (layer & 1));
    for (int i = (int)threadIdx.x - 32; i >= 0 && i < (int)(sizeof(StepLayer) / 4); i += STEP_THREADS - 32) to[i] = __ldg(from + i);
  };
  if (P.layer_count > 0) load_layer(0);
  __syncthreads();
  Feed<RING> feed(products);
#pragma unroll 1
  for (int i = 0; i < RING; i++) feed.put(room);

  Grid grid = {P.control, 0};
  u32* mosts = P.control + 1 + P.heads;
  const Place position = *P.place;
  const float* x = P.x;
  Sums add = {nullptr, unit + 1, nullptr, nullptr, 0};
  int turn = 0;
#pragma unroll 1
  for (int layer = 0; layer < P.layer_count; layer++) {
    const StepLayer& L = room.layers[layer & 1];
    auto share = [&](int which) { return met(L.products[which].matrix, room.shares[layer * 4 + which]); };
    auto multiply = [&](int which) { product<RING>(L.products[which].matrix, feed, room, layer * 4 + which, P.sums[which]); };
    auto sums_of = [&](int which, int turn) { return Sums{P.sums[which], unit + turn, L.products[which].scale, L.products[which].bias, L.products[which].matrix.n}; };
    // Every unit is written by one thread, behind a barrier of the block, and read behind the next one of the grid.
    auto keep_unit = [&](int turn, float value) { if (threadIdx.x == 0) unit[turn] = value; };

    float* out = P.stream[turn];
    float u = normed(P, room, x, add, L.input_norm, out, share(QKV));
    if (layer > 0) x = out, turn ^= 1;
    keep_unit(0, u);
    multiply(QKV);
    grid.arrive();
    if (layer + 1 < P.layer_count) load_layer(layer + 1);
    const Attends heads = attends(P, L, layer, unit);
    fetch_heads(heads, position);
    grid.wait();

    if (layer > 0) clear(P.sums[DOWN], add.n);
    attend_all<PAIRS>(P, heads, position, room, P.control + 1, mosts + 2 * layer);
    grid.arrive();
    fetch_vectors(L.post_norm, L.products[O].scale, L.products[O].bias, P.hidden);
    grid.wait();

    clear(P.sums[QKV], L.products[QKV].matrix.n);
    u = prepared(P.mixed, room, mosts + 2 * layer, share(O));
    keep_unit(1, u);
    multiply(O);
    grid.arrive();
    grid.wait();

    out = P.stream[turn];
    u = normed(P, room, x, sums_of(O, 1), L.post_norm, out, share(GATE_UP));
    x = out, turn ^= 1;
    keep_unit(0, u);
    multiply(GATE_UP);
    grid.arrive();
    const int col = (warp * gridDim.x + blockIdx.x) * 32 + (threadIdx.x & 31); // the first column of this thread
    if (col < P.intermediate) {
      fetch_constants(sums_of(GATE_UP, 0), col);
      fetch_constants(sums_of(GATE_UP, 0), P.up_row + col);
    }
    grid.wait();

    clear(P.sums[O], L.products[O].matrix.n);
    for (int i = col; i - (int)(threadIdx.x & 31) < P.intermediate; i += STEP_THREADS * gridDim.x) {
      const Sums s = sums_of(GATE_UP, 0);
      float y = 0;
      if (i < P.intermediate) {
        y = silu(value(s, 0, i), value(s, 0, P.up_row + i));
        P.active[i] = y;
      }
      const u32 top = most_of_warp(__float_as_uint(y) & 0x7fffffff);
      if ((threadIdx.x & 31) == 0) atomicMax(mosts + 2 * layer + 1, top);
    }
    grid.arrive();
    grid.wait();

    clear(P.sums[GATE_UP], L.products[GATE_UP].matrix.n);
    u = prepared(P.active, room, mosts + 2 * layer + 1, share(DOWN));
    keep_unit(1, u);
    multiply(DOWN);
    add = sums_of(DOWN, 1);
    grid.arrive();
    fetch_vectors(layer + 1 < P.layer_count ? room.layers[(layer + 1) & 1].input_norm : P.final_norm, add.scale, add.bias, P.hidden);
    grid.wait();
  }
  const float u = normed(P, room, x, add, P.final_norm, P.stream[turn], met(P.head.matrix, room.shares[products - 1]));
  if (threadIdx.x == 0) unit[0] = u;
  product<RING>(P.head.matrix, feed, room, products - 1, P.sums[HEAD]);
  grid.arrive();
  grid.wait();
  if (P.layer_count > 0) clear(P.sums[DOWN], add.n);
  const Sums s = {P.sums[HEAD], unit, P.head.scale, P.head.bias, P.head.matrix.n};
  for (int row = blockIdx.x * STEP_THREADS + threadIdx.x; row < P.head.matrix.n; row += gridDim.x * STEP_THREADS) {
    if (row < P.vocab) P.logits[row] = value(s, 0, row);
    P.sums[HEAD][row] = 0;
  }
}

#define STEP(DIM, PAIRS) extern "C" __global__ void __launch_bounds__(STEP_THREADS, 1) step_##DIM(Step P) { step<PAIRS, STEP_RING>(P); }
STEP(64, 1) STEP(128, 2) STEP(256, 4)
