// step: a whole step of one token in one kernel: all layers and the logits, of a model whose matrices are all in the plain layout.
//
// Computes what ops.cu and plain.cu compute one launch after another, to the bit.
//
// Why.  A launch costs 3 to 5 us in which the memory idles, and a layer needs nine.  Here the weights are one stream: each warp knows from
// the start which parts of which matrices it will multiply, and keeps its ring of RING supersteps full whatever the model waits for: the
// barriers and everything between two products happen while weights arrive.
//
// Layout.  The 1 KiB supersteps of a matrix in the plain layout (no raw low bits) follow each other in memory; block b of the grid takes the
// b-th even share of them, warp w the w-th share of the block's, which arrives in a ring of its own.  Activations are prepared by each block for itself, in shared memory, from
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
constexpr int ROUNDS = STEP_HIDDEN_MAX / (STEP_WARPS * SUPERSTEP); // supersteps of the residual stream that a warp has

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
  int frag_bytes;        // room for activations
  int unused;
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
  u32 bars;              // of the warp: a barrier a slot
  Share* shares;         // (products)
  StepLayer* layers;     // this one and the next, by turns
  int2* info;            // (supersteps)
  u32 frag;              // (columns), see below
  u64 (*far)[TILE_ROWS]; // (warps)
  Both* said;            // (supersteps of the residual stream): sum of squares, maximum
  u8* attention;         // (2) AttendRoom
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

// What a warp reads, from the first product to the last: RING supersteps ahead of what it multiplies. Bulk copies, since loads and atomics of the
// model's other parts would queue behind as many copies by lanes.
template <int RING>
struct Feed {
  const u8* next;
  u32 left, product, products, slot, bars;
  u32 parity;  // of the arrivals at the slots' barriers
  u64 once;

  __device__ __forceinline__ Feed(const Room& room, int products)
      : next(nullptr), left(0), product(0), products(products), slot(0), bars(room.bars), parity(0), once(policy_once()) {
#if HOPPER
    if ((threadIdx.x & 31) == 0) {
      for (int i = 0; i < RING; i++) barrier_init(bars + i * 8);
      barrier_fence();
    }
    __syncwarp();
#endif
  }

  // Asks for one more superstep; at the end for none.
  __device__ __forceinline__ void put(const Room& room) {
    const u32 lane = threadIdx.x & 31;
    while (left == 0 && product < products) {
      const Share share = room.shares[product++];
      u32 at, end;
      share_out(share.first, share.count, STEP_WARPS, threadIdx.x >> 5, at, end);
      left = end - at;
      next = share.nibbles + (size_t)at * SUPERSTEP_BYTES;
    }
    if (left > 0) {
      const u32 to = room.ring + slot * SUPERSTEP_BYTES;
#if HOPPER
      if (lane == 0) {
        barrier_expect(bars + slot * 8, SUPERSTEP_BYTES);
        bulk_copy_once(to, next, SUPERSTEP_BYTES, bars + slot * 8, once);
      }
#else
      copy_async_16_once(to + lane * 16, next + lane * 16, once);
      copy_async_16_once(to + lane * 16 + SUPERSTEP_BYTES / 2, next + lane * 16 + SUPERSTEP_BYTES / 2, once);
#endif
      next += SUPERSTEP_BYTES;
      left--;
    }
#if !HOPPER
    copy_async_commit(); // so that there are always RING groups of copies
#endif
    if (++slot == RING) slot = 0, parity ^= 1;
  }

  // The superstep that was asked for first; `put` asks for another in its place.
  __device__ __forceinline__ void take(const Room& room, uint4 (&v)[2]) const {
#if HOPPER
    barrier_wait(bars + slot * 8, parity ^ 1); // the slot's copy was asked for a round before
#else
    copy_async_wait_but<RING - 1>();
#endif
    const u32 from = room.ring + slot * SUPERSTEP_BYTES + (threadIdx.x & 31) * 16;
    v[0] = load_ring(from);
    v[1] = load_ring(from + SUPERSTEP_BYTES / 2);
    __syncwarp(); // all lanes have it
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

// A warp's part of a product.
struct Task {
  u32 at, end;           // supersteps
  u32 far, far_end;      // far symbols of the tiles that begin in it
};

// Before the barrier: far symbols are rare, but where they are, is known from global memory only.
__device__ __forceinline__ Task task_of(const Plain& M, const Share& share) {
  Task p;
  share_out(share.first, share.count, STEP_WARPS, threadIdx.x >> 5, p.at, p.end);
  const u32 supersteps = M.tc / SUPERSTEP;
  p.far = __ldg(M.far_off + (p.at + supersteps - 1) / supersteps);
  p.far_end = __ldg(M.far_off + (p.end + supersteps - 1) / supersteps);
  return p;
}

// A superstep's sums of rows g and g + 8, times 16.
__device__ __forceinline__ void multiply_superstep(const uint4 (&v)[2], u32 x, int2 m, i64& y0, i64& y1) {
  const u32 L = 0x0f0f0f0f, H = 0xf0f0f0f0;
  int low[2][4] = {}, high[2][4] = {};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const uint4 a = v[half], f = load_shared_16(x + half * 64);
    mma(low[half], a.x & L, a.y & L, a.z & L, a.w & L, f.x, f.y);
    mma(high[half], a.x & H, a.y & H, a.z & H, a.w & H, f.z, f.w);
  }
  y0 += (i64)m.x * ((low[0][0] + low[1][0]) * 16 + (high[0][0] + high[1][0] - m.y));
  y1 += (i64)m.x * ((low[0][2] + low[1][2]) * 16 + (high[0][2] + high[1][2] - m.y));
}

// The warp's part of a product with the activations in `room`.
template <int RING>
__device__ __forceinline__ void product(const Plain& M, Feed<RING>& feed, const Room& room, Task p, i64* sums) {
  const int warp = threadIdx.x >> 5, c = threadIdx.x & 3;
  const u32 supersteps = M.tc / SUPERSTEP;
  while (p.at < p.end) {
    const u32 tile = p.at / supersteps, first = p.at - tile * supersteps, run = min(supersteps - first, p.end - p.at);
    const u32 seg = tile / M.row_tiles, row_tile = tile - seg * M.row_tiles;
    i64 y0[1] = {0}, y1[1] = {0};
    u32 x = room.frag + (seg * supersteps + first) * SUPERSTEP + c * 16;
    const int2* info = room.info + seg * supersteps + first;
#pragma unroll 1
    for (u32 i = 0; i < run; i++, x += SUPERSTEP, info++) {
      uint4 v[2];
      feed.take(room, v);
      multiply_superstep(v, x, *info, y0[0], y1[0]);
      feed.put(room);
    }
    if (first == 0 && p.far < p.far_end)
      add_far<1>(__ldg(M.far_off + tile), __ldg(M.far_off + tile + 1), M.far, OfRoom{room, (int)(seg * supersteps)}, room.far[warp], y0, y1);
    add_sums<1>(sums, M.n, row_tile, y0, y1);
    p.at += run;
  }
}

// The supersteps of columns that the block's share of a product meets.
__device__ __forceinline__ int2 met(const Plain& M, const Share& share) {
  if (share.count == 0) return make_int2(0, 0);
  const u32 supersteps = M.tc / SUPERSTEP, tiles = M.row_tiles;
  return make_int2(share.first / supersteps / tiles * supersteps, ((share.first + share.count - 1) / supersteps / tiles + 1) * supersteps);
}

// A lane's columns of ROUNDS supersteps, of base + warp and every STEP_WARPS-th after it.
struct Columns { Four of[ROUNDS]; };

__device__ __forceinline__ int superstep_of(int base, int round) { return base + (threadIdx.x >> 5) + round * STEP_WARPS; }
__device__ __forceinline__ int column_of(int base, int round) { return superstep_of(base, round) * SUPERSTEP + (threadIdx.x & 31) * 4; }

// Before the barrier: what `normed` will load besides sums, on its way into the L2 cache.
__device__ __forceinline__ void fetch_norm(int hidden, const Sums& add, const float* weight) {
#pragma unroll
  for (int r = 0; r < ROUNDS; r++) {
    const int col = column_of(0, r);
    if (col >= hidden) break;
    fetch_constant(weight + col);
    fetch_constants(add, col);
  }
}

// Adds a product to the stream (if there is one) and norms it; returns the unit. Every block does all of it; each writes a part of the new stream.
__device__ __forceinline__ float normed(int hidden, float eps, const Room& room, const float* x, const Sums& add, const float* weight, float* out, Columns& columns) {
  constexpr int AT_ONCE = 2; // rounds whose loads are in flight together
  const int lane = threadIdx.x & 31, supersteps = (hidden + SUPERSTEP - 1) / SUPERSTEP;
#pragma unroll
  for (int r0 = 0; r0 < ROUNDS; r0 += AT_ONCE) {
    if (superstep_of(0, r0) >= supersteps) break;
    Four a[AT_ONCE], w[AT_ONCE], scale[AT_ONCE] = {};
    FourSums sums[AT_ONCE] = {};
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      const int col = min(column_of(0, r0 + u), hidden - 4); // beyond the end: loaded, not used
      a[u] = load_four(x + col);
      w[u] = load_four(weight + col);
      if (add.sum) {
        sums[u] = load_four_sums(add.sum + col);
        scale[u] = load_four(add.scale + col);
      }
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      const int superstep = superstep_of(0, r0 + u), col = column_of(0, r0 + u);
      if (superstep >= supersteps) break;
      if (add.sum) {
        const Four more = values_of(sums[u], add.unit[0], scale[u], add.bias, add.bias && col < hidden ? load_four(add.bias + col) : Four{});
#pragma unroll
        for (int j = 0; j < 4; j++) a[u].v[j] += more.v[j];
        if (superstep % gridDim.x == blockIdx.x && col < hidden) *(float4*)(out + col) = float4_of(a[u]);
      }
      if (col >= hidden) a[u] = Four{};
      const float sum = squares_of(a[u]);
#pragma unroll
      for (int j = 0; j < 4; j++) a[u].v[j] *= w[u].v[j];
      columns.of[r0 + u] = a[u];
      const u32 most = most_of(a[u]);
      if (lane == 0) room.said[superstep] = {sum, most};
    }
  }
  __syncthreads();
  Both all = {0.0f, 0u};
  for (int s = lane; s < supersteps; s += 32) {
    all.sum += room.said[s].sum;
    all.most = max(all.most, room.said[s].most);
  }
  all = combine_warp(all);
  const float factor = 1.0f / sqrtf(all.sum / hidden + eps);
#pragma unroll
  for (int r = 0; r < ROUNDS; r++) {
#pragma unroll
    for (int j = 0; j < 4; j++) columns.of[r].v[j] *= factor;
  }
  return unit_of(__uint_as_float(all.most) * factor);
}

// int8 activations of the supersteps in `range`, for the block's products. frag: (columns / 64, 4 lanes, 4 words), words as in ops.cu.
__device__ __forceinline__ void quantize(const Room& room, int2 range, int base, const Columns& columns, float unit) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int r = 0; r < ROUNDS; r++) {
    const int superstep = superstep_of(base, r);
    if (superstep < range.x || superstep >= range.y) continue;
    const Quantized x = quantized(columns.of[r], unit);
    const u32 to = room.frag + superstep * SUPERSTEP + (lane >> 4) * 64 + (lane >> 1 & 3) * 16 + (lane >> 3 & 1) * 4 + (lane & 1) * 2;
    asm volatile("st.shared.u16 [%0],%1;" ::"r"(to), "h"(x.evens()) : "memory");
    asm volatile("st.shared.u16 [%0],%1;" ::"r"(to + 8), "h"(x.odds()) : "memory");
    if (lane == 0) room.info[superstep] = make_int2(x.m, 128 * x.even);
  }
}

// The heads' parts, shared out to crews of half a block.
struct Attends {
  Attend at;
  Crew crew;
  Angle angle;
  int which;   // crew of the block
  int group;   // crews that share a kv head
  __device__ __forceinline__ int first() const { return blockIdx.x + which * gridDim.x; }
  __device__ __forceinline__ int items() const { return at.rope.heads * SPLITS; }
};

__device__ __forceinline__ Attends attends(const Step& P, const StepLayer& L, const Sums& qkv, int layer) {
  constexpr int THREADS = ATTENTION_WARPS * 32;
  const int which = threadIdx.x / THREADS;
  Attends all;
  all.crew = {(int)threadIdx.x % THREADS, THREADS, 1 + which};
  all.which = which;
  all.group = P.heads / P.kv_heads * SPLITS;
  all.at.rope = {qkv, L.q_norm, L.k_norm, P.turn, P.place, nullptr, P.eps, layer, P.heads, P.kv_heads, P.head_dim, P.k_row, P.v_row};
  all.at.attention = {nullptr, P.place, P.parts, P.stats, P.scale, layer, P.heads, P.kv_heads, P.head_dim, L.window};
  all.angle = angle_of(all.crew, all.at.rope, 0);
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
  AttendRoom<PAIRS>& mine = ((AttendRoom<PAIRS>*)room.attention)[all.which];
  __shared__ bool last[2];
  for (int item = all.first(); item < all.items(); item += 2 * gridDim.x) {
    const int head = item / SPLITS;
    attend<PAIRS>(crew, mine, all.at, place, all.angle, head, item % SPLITS);
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
  room.bars = shared_address(place(STEP_WARPS * RING * 8)) + warp * RING * 8;
  room.attention = place(2 * sizeof(AttendRoom<PAIRS>));
  room.frag = shared_address(place(P.frag_bytes));
  room.info = (int2*)place(P.frag_bytes / SUPERSTEP * 8);
  room.far = (u64 (*)[TILE_ROWS])place(STEP_WARPS * TILE_ROWS * 8);
  room.said = (Both*)place(ROUNDS * STEP_WARPS * 8);
  room.layers = (StepLayer*)place(2 * sizeof(StepLayer));
  room.shares = (Share*)place(products * sizeof(Share));
  for (int i = threadIdx.x; i < products; i += STEP_THREADS) {
    const Plain& M = i + 1 < products ? P.layers[i / 4].products[i % 4].matrix : P.head.matrix;
    u32 first, end;
    share_out(0, (u32)M.row_tiles * M.segs * (M.tc / SUPERSTEP), gridDim.x, blockIdx.x, first, end);
    room.shares[i] = {(const u8*)M.nibbles, first, end - first};
  }
  auto load_layer = [&](int layer) { // by the threads behind the first warp, whose first thread waits at barriers
    const u32* from = (const u32*)(P.layers + layer);
    u32* to = (u32*)(room.layers + (layer & 1));
    for (int i = (int)threadIdx.x - 32; i >= 0 && i < (int)(sizeof(StepLayer) / 4); i += STEP_THREADS - 32) to[i] = __ldg(from + i);
  };
  if (P.layer_count > 0) load_layer(0);
  __syncthreads();
  Feed<RING> feed(room, products);
#pragma unroll 1
  for (int i = 0; i < RING; i++) feed.put(room);

  Grid grid = {P.control, 0};
  u32* mosts = P.control + 1 + P.heads; // of the layer
  const Place position = *P.place;
  const float* x = P.x;
  Sums add = {}, before = {}; // what the stream still lacks, or has just got; sums of the last product behind a norm
  int turn = 0;
  auto clear = [&](const Sums& sums) {
    for (int i = blockIdx.x * STEP_THREADS + threadIdx.x; i < sums.n; i += gridDim.x * STEP_THREADS) const_cast<i64*>(sums.sum)[i] = 0;
  };
  auto product_at = [&](int p) -> const StepProduct& { return p + 1 < products ? room.layers[p >> 2 & 1].products[p & 3] : P.head; };
  auto weight_of = [&](int p) { return p + 1 == products ? P.final_norm : (p & 3) == QKV ? room.layers[p >> 2 & 1].input_norm : room.layers[p >> 2 & 1].post_norm; };
  Task task = task_of(product_at(0).matrix, room.shares[0]);

  // One product after another, and all code but once: what a step executes must fit the instruction cache.
#pragma unroll 1
  for (int p = 0; p < products; p++) {
    const int which = p + 1 == products ? HEAD : p & 3, layer = p >> 2;
    const bool norm = which == QKV || which == GATE_UP || which == HEAD;
    const StepProduct& product_here = product_at(p);
    const int2 range = met(product_here.matrix, room.shares[p]);
    Columns columns = {};
    float u;
    int base = 0;
    if (norm) {
      u = normed(P.hidden, P.eps, room, x, add, weight_of(p), P.stream[turn], columns);
      if (add.sum) x = P.stream[turn], turn ^= 1;
    } else {
      u = unit_of(__uint_as_float(__ldcg(which == O ? mosts : mosts + 1)));
      base = range.x;
    }
    do {
      if (!norm) {
        const float* values = which == O ? P.mixed : P.active;
#pragma unroll
        for (int r = 0; r < ROUNDS; r++)
          if (superstep_of(base, r) < range.y) columns.of[r] = four(__ldcg((const float4*)(values + column_of(base, r))));
      }
      quantize(room, range, base, columns, u);
      base += ROUNDS * STEP_WARPS;
    } while (!norm && base < range.y);
    if (threadIdx.x == 0) unit[!norm] = u; // read behind the next barrier of the grid
    if (!norm) { // nobody needs the sums before these any more, nor those that were added to the stream before them
      clear(before);
      clear(add);
    }
    __syncthreads();
    product<RING>(product_here.matrix, feed, room, task, P.sums[which]);
    const Sums sums = {P.sums[which], unit + !norm, product_here.scale, product_here.bias, product_here.matrix.n};
    grid.arrive();

    if (which == QKV) {
      if (layer + 1 < P.layer_count) load_layer(layer + 1);
      const Attends heads = attends(P, room.layers[layer & 1], sums, layer);
      fetch_heads(heads, position);
      grid.wait();
      attend_all<PAIRS>(P, heads, position, room, P.control + 1, mosts);
      grid.arrive();
    } else if (which == GATE_UP) {
      const int lane = threadIdx.x & 31, col = (warp * gridDim.x + blockIdx.x) * 32 + lane; // the first column of this thread
      if (col < P.intermediate) {
        fetch_constants(sums, col);
        fetch_constants(sums, P.up_row + col);
      }
      grid.wait();
      for (int i = col; i - lane < P.intermediate; i += STEP_THREADS * gridDim.x) {
        float y = 0;
        if (i < P.intermediate) {
          y = silu(value(sums, 0, i), value(sums, 0, P.up_row + i));
          P.active[i] = y;
        }
        const u32 most = most_of_warp(__float_as_uint(y) & 0x7fffffff);
        if (lane == 0) atomicMax(mosts + 1, most);
      }
      grid.arrive();
    }
    if (norm) {
      before = sums;
    } else {
      add = sums;
      if (which == DOWN) mosts += 2;
      fetch_norm(P.hidden, add, weight_of(p + 1));
    }
    if (which != HEAD) task = task_of(product_at(p + 1).matrix, room.shares[p + 1]);
    grid.wait();
  }
  clear(add);
  for (int row = blockIdx.x * STEP_THREADS + threadIdx.x; row < before.n; row += gridDim.x * STEP_THREADS) {
    if (row < P.vocab) P.logits[row] = value(before, 0, row);
    P.sums[HEAD][row] = 0;
  }
}

#define STEP(DIM, PAIRS) extern "C" __global__ void __launch_bounds__(STEP_THREADS, 1) step_##DIM(Step P) { step<PAIRS, STEP_RING>(P); }
STEP(64, 1) STEP(128, 2) STEP(256, 4)
