// step: a whole step of one token in one kernel: all layers and the logits, of a model whose matrices are all in the plain layout.
//
// Computes what ops.cu and plain.cu compute one launch after another, to the bit.
//
// Why.  A launch costs 3 to 5 us in which the memory idles, and a layer needs nine.  Here the weights are one stream: each warp knows from
// the start which parts of which matrices it will multiply, and keeps its ring of slots full whatever the model waits for.
//
// Weights.  The 1 KiB supersteps of a matrix in the plain layout (no raw low bits) follow each other in memory; block b of the grid takes the
// b-th even share of them, warp w the w-th share of the block's, which arrives in a ring of its own, SLOT supersteps a bulk copy.
//
// Order.  There is no barrier of the grid.  Sums are exact integers, and each carries in its low 8 bits how many warps have added to it: whoever needs a
// sum reads it until as many have as the host says will.  Two maxima over the whole grid, of what attention and silu left, on which the unit of
// the next activations depends, are flags of their own: one for each part, its maximum in it.
//
//   norm, qkv | attention | o | norm, gate and up | silu | down | norm ...
//
// Every block norms the whole residual stream for itself and keeps it in shared memory.  Since a norm waits for all rows of o or down, no block is ever
// more than one product ahead of another that has a share in it; so what attention and silu leave may lie in one place for all layers.
//
// Needs.  All blocks at once on the GPU (a cooperative launch), one a multiprocessor; sums, flags and arrivals of all layers cleared.
//
// Cost.  Not the memory's: an 8 B-shaped layer takes some 49 us, of which its weights would take 24.  21 go into the products (0.2 us a superstep and
// warp, and some 1.4 us of begin and end each), the rest into six waits for sums or flags that pass through the L2 cache and what is computed
// between them.  It makes little difference how far ahead weights are copied: 526 tokens/s with 2 KiB a warp, 579 with 8 (launches: 523).  Tried and
// slower: barriers of the grid (520), all lanes reading sums over and over (463), copies by lanes (519), a warp that feeds the others (528).
// Measured: bench/RESULTS.md, "CUDA".

#if HOPPER

constexpr int STEP_THREADS = STEP_WARPS * 32;
constexpr int SUPERSTEP_BYTES = SUPERSTEP * TILE_ROWS / 2;
constexpr int SLOT_BYTES = STEP_SLOT * SUPERSTEP_BYTES;
constexpr int ROUNDS = STEP_HIDDEN_MAX / (STEP_WARPS * SUPERSTEP); // supersteps of the residual stream that a warp has
constexpr u32 READY = 0x80000000;                                 // a flag's part is there; its other bits are a maximum

enum { QKV = 0, O = 1, GATE_UP = 2, DOWN = 3, HEAD = 4 };

struct StepProduct {
  Plain matrix;
  const float* scale;   // (n)
  const float* bias;    // (n), or null
  i64* sums;            // (n): 256 * sum + arrivals
  const u8* arrivals;   // (row tiles): what they will be
};

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
  const float* turn;     // as in Rope
  const Place* place;
  float* parts;          // attention's out
  float2* stats;
  float* mixed;          // what attention left, (heads * head_dim), zeros behind it up to the padded columns
  float* active;         // what silu left, (intermediate), likewise
  u32* crews;            // (layers, heads): crews that are done with the head
  u32* mixed_flags;      // (layers, heads, warps of a head)
  u32* active_flags;     // (layers, supersteps of the intermediate columns)
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
  int slots;             // of a warp's ring
  int unused;
};

static_assert(sizeof(StepLayer) == 392 && sizeof(Step) == 256, "as abi.rs says");

// The share of a block in a product.
struct Share {
  const u8* nibbles;
  u32 first;             // superstep
  u32 count;
};

// Shared memory, in order; `shared_bytes` of step.rs adds it up.
struct Room {
  u32 ring;              // of the warp
  u32 bars;              // of the warp: a barrier a slot
  u8* attention;         // (2) AttendRoom
  float4* x;             // (supersteps, lanes): the residual stream
  u32 frag;              // (columns), see `quantize`
  int2* info;            // (supersteps)
  u64 (*far)[TILE_ROWS]; // (warps)
  Both* said;            // (supersteps of the residual stream): sum of squares, maximum
  StepLayer* layers;     // this one and the next, by turns
  Share* shares;         // (products)
};

// ---- What other blocks write while this one waits for it: past the L1 cache, in no order but that of the addresses.

__device__ __forceinline__ u32 load_now(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0,[%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ i64 load_now(const i64* p) {
  i64 v;
  asm volatile("ld.relaxed.gpu.global.s64 %0,[%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ longlong2 load_two_now(const i64* p) {
  longlong2 v;
  asm volatile("ld.relaxed.gpu.global.v2.s64 {%0,%1},[%2];" : "=l"(v.x), "=l"(v.y) : "l"(p) : "memory");
  return v;
}
// After what this thread, and all that have synchronized with it, wrote.
__device__ __forceinline__ void publish(u32* p, u32 v) { asm volatile("st.release.gpu.global.u32 [%0],%1;" ::"l"(p), "r"(v) : "memory"); }
__device__ __forceinline__ u32 add_in_order(u32* p, u32 v) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0,[%1],%2;" : "=r"(before) : "l"(p), "r"(v) : "memory");
  return before;
}

__device__ __forceinline__ bool complete(i64 sum, u32 arrivals) { return ((u32)sum & 255) == arrivals; }

// Waits for one sum, before many lanes look at many: what they read over and over, weights could not pass meanwhile.
__device__ __forceinline__ void wait_for(const i64* p, u32 arrivals) {
  while (!complete(load_now(p), arrivals)) {
  }
}

__device__ __forceinline__ bool complete(const longlong2& v, u32 arrivals) { return ((u32)v.x & 255) == arrivals && ((u32)v.y & 255) == arrivals; }
__device__ __forceinline__ bool complete(const FourSums& s, u32 arrivals) { return complete(s.a, arrivals) && complete(s.b, arrivals); }
__device__ __forceinline__ FourSums load_four_now(const i64* p) { return {load_two_now(p), load_two_now(p + 2)}; }
__device__ __forceinline__ FourSums sums_alone(const FourSums& s) { return {{s.a.x >> 8, s.a.y >> 8}, {s.b.x >> 8, s.b.y >> 8}}; }

// ---- Weights.

__device__ __forceinline__ void share_out(u32 first, u32 count, u32 parts, u32 part, u32& at, u32& end) {
  at = first + (u32)((u64)count * part / parts);
  end = first + (u32)((u64)count * (part + 1) / parts);
}

__device__ __forceinline__ uint4 load_ring(u32 address) { // not to be moved behind the copy that overwrites it
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v;
}

// What a warp reads, from the first product to the last, a ring ahead of what it multiplies. A slot has supersteps of one product. Bulk copies, since
// loads and atomics of the model's other parts would queue behind as many copies by lanes.
struct Feed {
  const u8* next;
  u32 left, product, products, slot, slots, bars;
  u32 parity;  // of the arrivals at the slots' barriers
  u64 once;

  __device__ __forceinline__ Feed(const Room& room, int products, int slots)
      : next(nullptr), left(0), product(0), products(products), slot(0), slots(slots), bars(room.bars), parity(0), once(policy_once()) {
    if ((threadIdx.x & 31) == 0) {
      for (u32 i = 0; i < slots; i++) barrier_init(bars + i * 8);
      barrier_fence();
    }
    __syncwarp();
  }

  // Asks for one more slot; at the end for none.
  __device__ __forceinline__ void put(const Room& room) {
    while (left == 0 && product < products) {
      const Share share = room.shares[product++];
      u32 at, end;
      share_out(share.first, share.count, STEP_WARPS, threadIdx.x >> 5, at, end);
      left = end - at;
      next = share.nibbles + (size_t)at * SUPERSTEP_BYTES;
    }
    const u32 count = min(left, (u32)STEP_SLOT), bytes = count * SUPERSTEP_BYTES, to = room.ring + slot * SLOT_BYTES;
    if (count > 0 && (threadIdx.x & 31) == 0) {
      barrier_expect(bars + slot * 8, bytes);
      bulk_copy_once(to, next, bytes, bars + slot * 8, once);
    }
    next += bytes;
    left -= count;
    if (++slot == slots) slot = 0, parity ^= 1;
  }

  // Waits for the slot that was asked for first; `put` asks for another in its place.
  __device__ __forceinline__ void wait() const {
    barrier_wait(bars + slot * 8, parity ^ 1); // its copy was asked for a round before
  }
};

// m * q of a column for far symbols, from the fragments of the block.
struct OfRoom {
  const Room& room;
  int first_superstep;
  __device__ __forceinline__ i64 operator()(int, int col) const {
    const int c = first_superstep * SUPERSTEP + col;
    const u32 word = load_shared(room.frag + (c & ~63) + (c >> 3 & 3) * 16 + (c & 1) * 8 + (c >> 5 & 1) * 4);
    return (i64)room.info[c / SUPERSTEP].x * (i8)(word >> (c >> 1 & 3) * 8);
  }
};

// A warp's part of a product.
struct Task {
  u32 at, end;           // supersteps
  u32 far, far_end;      // far symbols of the tiles that begin in it
};

// Ahead of the product: far symbols are rare, but where they are, is known from global memory only.
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
__device__ __forceinline__ void product(const Plain& M, Feed& feed, const Room& room, const Task& p, i64* sums) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const u32 supersteps = M.tc / SUPERSTEP;
  u32 at = p.at, of_slot = 0;
  while (at < p.end) {
    const u32 tile = at / supersteps, first = at - tile * supersteps, end = min(at - first + supersteps, p.end);
    const u32 seg = tile / M.row_tiles, row_tile = tile - seg * M.row_tiles;
    i64 y0[1] = {0}, y1[1] = {0};
    u32 x = room.frag + (seg * supersteps + first) * SUPERSTEP + (lane & 3) * 16;
    const int2* info = room.info + seg * supersteps + first;
#pragma unroll 1
    for (; at < end; x += SUPERSTEP, info++) {
      if (of_slot == 0) feed.wait();
      const u32 from = room.ring + feed.slot * SLOT_BYTES + of_slot * SUPERSTEP_BYTES + lane * 16;
      const uint4 v[2] = {load_ring(from), load_ring(from + SUPERSTEP_BYTES / 2)};
      multiply_superstep(v, x, *info, y0[0], y1[0]);
      at++;
      of_slot++;
      if (of_slot == STEP_SLOT || at == p.end) {
        of_slot = 0;
        __syncwarp(); // all lanes have what is overwritten
        feed.put(room);
      }
    }
    if (first == 0 && p.far < p.far_end)
      add_far<1>(__ldg(M.far_off + tile), __ldg(M.far_off + tile + 1), M.far, OfRoom{room, (int)(seg * supersteps)}, room.far[warp], y0, y1);
    if ((lane & 3) == 0) {
      u64* out = (u64*)(sums + row_tile * TILE_ROWS + (lane >> 2));
      atomicAdd(out, (u64)(y0[0] * 256 + 1));
      atomicAdd(out + 8, (u64)(y1[0] * 256 + 1));
    }
  }
}

// The supersteps of columns that the block's share of a product meets.
__device__ __forceinline__ int2 met(const Plain& M, const Share& share) {
  if (share.count == 0) return make_int2(0, 0);
  const u32 supersteps = M.tc / SUPERSTEP, tiles = M.row_tiles;
  return make_int2(share.first / supersteps / tiles * supersteps, ((share.first + share.count - 1) / supersteps / tiles + 1) * supersteps);
}

// ---- Activations.

// A lane's columns of ROUNDS supersteps, of base + warp and every STEP_WARPS-th after it.
struct Columns { Four of[ROUNDS]; };

__device__ __forceinline__ int superstep_of(int base, int round) { return base + (threadIdx.x >> 5) + round * STEP_WARPS; }
__device__ __forceinline__ int column_of(int base, int round) { return superstep_of(base, round) * SUPERSTEP + (threadIdx.x & 31) * 4; }

// Adds a product, if there is one, of activations in `unit`s to the residual stream, and norms it; returns the new unit.
__device__ __forceinline__ float normed(int hidden, float eps, const Room& room, const StepProduct* add, float unit, const float* weight, Columns& columns) {
  constexpr int AT_ONCE = 2; // rounds whose loads are in flight together
  const int lane = threadIdx.x & 31, supersteps = (hidden + SUPERSTEP - 1) / SUPERSTEP;
#pragma unroll
  for (int r0 = 0; r0 < ROUNDS; r0 += AT_ONCE) {
    if (superstep_of(0, r0) >= supersteps) break;
    Four w[AT_ONCE], scale[AT_ONCE] = {}, bias[AT_ONCE] = {};
    FourSums sums[AT_ONCE] = {};
    u32 arrivals[AT_ONCE];
    int cols[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      cols[u] = min(column_of(0, r0 + u), hidden - 4); // beyond the end: loaded, not used
      w[u] = load_four(weight + cols[u]);
      if (!add) continue;
      scale[u] = load_four(add->scale + cols[u]);
      if (add->bias) bias[u] = load_four(add->bias + cols[u]);
      arrivals[u] = __ldg(add->arrivals + cols[u] / TILE_ROWS);
    }
    if (add) {
#pragma unroll
      for (int u = 0; u < AT_ONCE; u++)
        if (lane == u) wait_for(add->sums + cols[u], arrivals[u]);
      __syncwarp();
      bool all;
      do {
        all = true;
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) sums[u] = load_four_now(add->sums + cols[u]);
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) all &= complete(sums[u], arrivals[u]);
      } while (!all);
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      const int superstep = superstep_of(0, r0 + u);
      if (superstep >= supersteps) break;
      Four a = four(room.x[superstep * 32 + lane]);
      if (add) {
        const Four more = values_of(sums_alone(sums[u]), unit, scale[u], add->bias, bias[u]);
        if (column_of(0, r0 + u) < hidden) {
#pragma unroll
          for (int j = 0; j < 4; j++) a.v[j] += more.v[j];
          room.x[superstep * 32 + lane] = float4_of(a);
        }
      }
      const float sum = squares_of(a);
#pragma unroll
      for (int j = 0; j < 4; j++) a.v[j] *= w[u].v[j];
      columns.of[r0 + u] = a;
      const u32 most = most_of(a);
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

// The unit of what all blocks have left, when all of it is there; and all warps of this one are done with the activations before these.
__device__ __forceinline__ float unit_of_parts(const u32* flags, int count) {
  constexpr int AT_ONCE = 4;
  __shared__ u32 most_of_all;
  if (threadIdx.x < 32) {
    u32 most = 0;
    for (int i = threadIdx.x; i < count; i += 32 * AT_ONCE) {
      u32 v[AT_ONCE];
      u32 all;
      do {
        all = READY;
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) v[u] = load_now(flags + min(i + 32 * u, count - 1));
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) all &= v[u];
      } while (!all);
#pragma unroll
      for (int u = 0; u < AT_ONCE; u++) most = max(most, v[u] & ~READY);
    }
    most = most_of_warp(most);
    if (threadIdx.x == 0) most_of_all = most;
  }
  __syncthreads();
  return unit_of(__uint_as_float(most_of_all));
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

// ---- Attention: the heads' parts, shared out to crews of half a block. The crew that is done last with a head puts its parts together.

template <int PAIRS>
__device__ __forceinline__ void attend_all(const Step& P, const Room& room, const StepLayer& L, int layer, float unit, const Place& place) {
  constexpr int THREADS = ATTENTION_WARPS * 32;
  static_assert(sizeof(AttendRoom<PAIRS>) == (2 * ATTENTION_WARPS + ATTENTION_WARPS * PAIRS * 64 + 8 + PAIRS * 64) * 4, "as step.rs says");
  __shared__ bool last[2];
  const int which = threadIdx.x / THREADS, group = P.heads / P.kv_heads * SPLITS, half = P.head_dim / 2;
  const Crew crew = {(int)threadIdx.x % THREADS, THREADS, 1 + which};
  const StepProduct& qkv = L.products[QKV];
  AttendRoom<PAIRS>& mine = ((AttendRoom<PAIRS>*)room.attention)[which];
  Attend A;
  A.rope = {{}, L.q_norm, L.k_norm, P.turn, P.place, nullptr, P.eps, layer, P.heads, P.kv_heads, P.head_dim, P.k_row, P.v_row};
  A.attention = {nullptr, P.place, P.parts, P.stats, P.scale, layer, P.heads, P.kv_heads, P.head_dim, L.window};
  const Angle angle = angle_of(crew, A.rope, 0);
  for (int item = blockIdx.x + which * gridDim.x; item < P.heads * SPLITS; item += 2 * gridDim.x) {
    const int head = item / SPLITS;
    fetch_positions(crew, A.attention, place, item / group, item % group);
    // Elements i and i + half of q, k and v.
    const Rows rows = rows_of(A.rope, head);
    const int i = min(crew.index, half - 1);
    int row[6];
    u32 arrivals[6];
    float scale[6], bias[6], y[6];
    i64 sums[6];
#pragma unroll
    for (int e = 0; e < 6; e++) {
      row[e] = rows.of[e >> 1] + i + (e & 1) * half;
      arrivals[e] = __ldg(qkv.arrivals + row[e] / TILE_ROWS);
      scale[e] = __ldg(qkv.scale + row[e]);
      bias[e] = qkv.bias ? __ldg(qkv.bias + row[e]) : 0.0f;
    }
#pragma unroll
    for (int e = 0; e < 6; e++)
      if ((crew.index & 31) == e) wait_for(qkv.sums + row[e], arrivals[e]);
    __syncwarp();
    bool all;
    do {
      all = true;
#pragma unroll
      for (int e = 0; e < 6; e++) sums[e] = load_now(qkv.sums + row[e]);
#pragma unroll
      for (int e = 0; e < 6; e++) all &= complete(sums[e], arrivals[e]);
    } while (!all);
#pragma unroll
    for (int e = 0; e < 6; e++) {
      y[e] = value_of(sums[e] >> 8, unit, scale[e]);
      if (qkv.bias) y[e] += bias[e];
    }
    attend<PAIRS>(crew, mine, A, place, angle, head, item % SPLITS, make_float2(y[0], y[1]), make_float2(y[2], y[3]), make_float2(y[4], y[5]));
    crew.sync();
    if (crew.index == 0) last[which] = add_in_order(P.crews + layer * P.heads + head, 1) == SPLITS - 1;
    crew.sync();
    if (last[which]) {
      const int warps = (P.head_dim + 31) / 32, warp = crew.index >> 5;
      if (warp < warps) {
        float y = 0;
        if (crew.index < P.head_dim) {
          y = mixed_value(P.parts + (size_t)head * SPLITS * P.head_dim, P.stats + head * SPLITS, P.head_dim, crew.index);
          P.mixed[head * P.head_dim + crew.index] = y;
        }
        const u32 most = most_of_warp(__float_as_uint(y) & 0x7fffffff);
        __syncwarp();
        if ((crew.index & 31) == 0) publish(P.mixed_flags + (layer * P.heads + head) * warps + warp, most | READY);
      }
    }
    crew.sync(); // the room may be used again
  }
}

// silu(gate) * up, a superstep a warp.
__device__ __forceinline__ void activate(const Step& P, const StepProduct& gate_up, int layer, float unit) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, supersteps = (P.intermediate + SUPERSTEP - 1) / SUPERSTEP;
  for (int s = warp * gridDim.x + blockIdx.x; s < supersteps; s += STEP_WARPS * gridDim.x) {
    const int col = s * SUPERSTEP + lane * 4, row = min(col, P.intermediate - 4), rows[2] = {row, P.up_row + row};
    Four scale[2], bias[2] = {}, y = {};
    FourSums sums[2];
    u32 arrivals[2];
#pragma unroll
    for (int u = 0; u < 2; u++) {
      scale[u] = load_four(gate_up.scale + rows[u]);
      if (gate_up.bias) bias[u] = load_four(gate_up.bias + rows[u]);
      arrivals[u] = __ldg(gate_up.arrivals + rows[u] / TILE_ROWS);
    }
#pragma unroll
    for (int u = 0; u < 2; u++)
      if (lane == u) wait_for(gate_up.sums + rows[u], arrivals[u]);
    __syncwarp();
    do {
      sums[0] = load_four_now(gate_up.sums + rows[0]);
      sums[1] = load_four_now(gate_up.sums + rows[1]);
    } while (!complete(sums[0], arrivals[0]) || !complete(sums[1], arrivals[1]));
    if (col < P.intermediate) {
      const Four gate = values_of(sums_alone(sums[0]), unit, scale[0], gate_up.bias, bias[0]), up = values_of(sums_alone(sums[1]), unit, scale[1], gate_up.bias, bias[1]);
#pragma unroll
      for (int j = 0; j < 4; j++) y.v[j] = silu(gate.v[j], up.v[j]);
      *(float4*)(P.active + col) = float4_of(y);
    }
    const u32 most = most_of(y);
    __syncwarp();
    if (lane == 0) publish(P.active_flags + layer * supersteps + s, most | READY);
  }
}

template <int PAIRS>
__device__ __forceinline__ void step(const Step& P) {
  extern __shared__ __align__(128) u8 shared[];
  const int products = P.layer_count * 4 + 1, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  Room room;
  u8* at = shared;
  auto place = [&](int bytes) { u8* here = at; at += (bytes + 127) & ~127; return here; };
  room.ring = shared_address(place(STEP_WARPS * P.slots * SLOT_BYTES)) + warp * P.slots * SLOT_BYTES;
  room.bars = shared_address(place(STEP_WARPS * P.slots * 8)) + warp * P.slots * 8;
  room.attention = place(2 * sizeof(AttendRoom<PAIRS>));
  room.x = (float4*)place(P.padded_hidden * 4);
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
  auto load_layer = [&](int layer) {
    const u32* from = (const u32*)(P.layers + layer);
    u32* to = (u32*)(room.layers + (layer & 1));
    for (int i = threadIdx.x; i < (int)(sizeof(StepLayer) / 4); i += STEP_THREADS) to[i] = __ldg(from + i);
  };
  if (P.layer_count > 0) load_layer(0);
#pragma unroll
  for (int r = 0; r < ROUNDS; r++)
    if (superstep_of(0, r) < P.padded_hidden / SUPERSTEP)
      room.x[superstep_of(0, r) * 32 + lane] = column_of(0, r) < P.hidden ? *(const float4*)(P.x + column_of(0, r)) : make_float4(0, 0, 0, 0);
  const Place position = *P.place;
  __syncthreads();
  Feed feed(room, products, P.slots);
#pragma unroll 1
  for (int i = 0; i < P.slots; i++) feed.put(room);

  const int head_flags = P.heads * ((P.head_dim + 31) / 32), active_flags = (P.intermediate + SUPERSTEP - 1) / SUPERSTEP;
  auto product_at = [&](int p) -> const StepProduct& { return p + 1 < products ? room.layers[p >> 2 & 1].products[p & 3] : P.head; };
  float unit = 0; // of the last product's activations
  Task task = task_of(product_at(0).matrix, room.shares[0]);

  // One product after another, and all code but once: what a step executes should fit the instruction cache.
#pragma unroll 1
  for (int p = 0; p < products; p++) {
    const int which = p + 1 == products ? HEAD : p & 3, layer = p >> 2;
    const bool norm = which == QKV || which == GATE_UP || which == HEAD;
    const StepProduct& here = product_at(p);
    const int2 range = met(here.matrix, room.shares[p]);
    Columns columns = {};
    int base = 0;
    if (norm) {
      const float* weight = which == HEAD ? P.final_norm : which == QKV ? room.layers[layer & 1].input_norm : room.layers[layer & 1].post_norm;
      unit = normed(P.hidden, P.eps, room, p > 0 ? &product_at(p - 1) : nullptr, unit, weight, columns);
    } else {
      unit = which == O ? unit_of_parts(P.mixed_flags + layer * head_flags, head_flags) : unit_of_parts(P.active_flags + layer * active_flags, active_flags);
      base = range.x;
    }
    do {
      if (!norm) {
        const float* values = which == O ? P.mixed : P.active;
#pragma unroll
        for (int r = 0; r < ROUNDS; r++)
          if (superstep_of(base, r) < range.y) columns.of[r] = four(__ldcg((const float4*)(values + column_of(base, r))));
      }
      quantize(room, range, base, columns, unit);
      base += ROUNDS * STEP_WARPS;
    } while (!norm && base < range.y);
    __syncthreads();
    product(here.matrix, feed, room, task, here.sums);
    if (which != HEAD) {
      if (which == QKV && layer + 1 < P.layer_count) load_layer(layer + 1); // nobody needs the layer before this one any more
      if (which == QKV) attend_all<PAIRS>(P, room, room.layers[layer & 1], layer, unit, position);
      if (which == GATE_UP) activate(P, here, layer, unit);
      task = task_of(product_at(p + 1).matrix, room.shares[p + 1]);
    }
  }
  for (int row = blockIdx.x * STEP_THREADS + threadIdx.x; row < P.vocab; row += gridDim.x * STEP_THREADS) {
    const u32 arrivals = __ldg(P.head.arrivals + row / TILE_ROWS);
    if (lane == 0) wait_for(P.head.sums + row, arrivals);
    __syncwarp(__activemask());
    i64 sum;
    do sum = load_now(P.head.sums + row);
    while (!complete(sum, arrivals));
    const float y = value_of(sum >> 8, unit, P.head.scale[row]);
    P.logits[row] = P.head.bias ? y + P.head.bias[row] : y;
  }
}

#define STEP(DIM, PAIRS) extern "C" __global__ void __launch_bounds__(STEP_THREADS, 1) step_##DIM(Step P) { step<PAIRS>(P); }
STEP(64, 1) STEP(128, 2) STEP(256, 4)

#endif
