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
// Order.  There is no barrier of the grid, and no fence.  Sums are exact integers, and each carries in its low 8 bits the arrivals of the warps that
// have added to it, weighed so that they are COMPLETE together: whoever needs a sum reads it until they are.  What attention and silu leave are words
// of a number and its layer, read until the layer is right.  The unit of these activations depends on a maximum over the whole grid: each part has a flag of
// its own, its maximum in it.
//
//   norm, qkv | attention | o | norm, gate and up | silu | down | norm ...
//
// Every block norms the whole residual stream for itself and keeps it in shared memory.  Since a norm waits for all rows of o or down, no block is ever
// more than one product ahead of another that has a share in it; so what attention and silu leave may lie in one place for all layers.
//
// Needs.  All blocks at once on the GPU (a cooperative launch), one a multiprocessor; sums, flags and arrivals of all layers cleared.
//
// Cost.  Not the memory's: an 8 B-shaped layer takes some 45 us on an H200, of which its weights would take 24.  Some 18 go into the products, the rest
// into seven waits for sums, words or flags that pass through the L2 cache, and what is computed between them; schedulers issue in 27 % of the cycles, and
// warps wait for global memory (47 % of it), barriers, and results of arithmetic; not for instructions.  Tried and slower, in tokens/s: on an H200, where launches gave
// 523 and this kernel then 579, barriers of the grid (520), all lanes reading sums over and over (463), copies by lanes (519), a warp that feeds the others
// (528), 2 KiB a warp ahead (526); on an H100, where it gives 478 to 492: constants asked for by cp.async a product ahead (460 to 467), with q, k and v
// by warps of their own and loops instead of unrolled rounds (440), with a feeding warp that keeps 32, 64 or 96 KiB in flight (440 each); prefetching
// 8 or 16 KiB a warp into the L2 cache while attention waits changes nothing.
// Measured: bench/RESULTS.md, "CUDA".

#if HOPPER

constexpr int STEP_THREADS = STEP_WARPS * 32;
constexpr int SUPERSTEP_BYTES = SUPERSTEP * TILE_ROWS / 2;
constexpr int SLOT_BYTES = STEP_SLOT * SUPERSTEP_BYTES;
constexpr int ROUNDS = STEP_HIDDEN_MAX / (STEP_WARPS * SUPERSTEP); // supersteps of the residual stream that a warp has
constexpr u32 READY = 0x80000000;                                 // a flag's part is there; its other bits are a maximum
constexpr int GROUP = 32;                                         // columns that silu leaves together
constexpr u32 COMPLETE = 128;                                     // what all arrivals at a sum add up to

enum { QKV = 0, O = 1, GATE_UP = 2, DOWN = 3, HEAD = 4, KINDS = 5 };

struct StepProduct {
  Plain matrix;
  const float* scale;   // (n)
  const float* bias;    // (n), or null
  i64* sums;            // (n): 256 * sum + arrivals
  const u8* arrivals;   // (row tiles): what the first of them counts for, so that together they are COMPLETE; the others are 1 each
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
  u64* parts;            // attention's out, (heads, SPLITS, head_dim), a word each
  u64* stats;            // attention's stats, (layers, heads, SPLITS); 0: not there yet
  u64* mixed;            // what attention left, (heads * head_dim), a word each
  u64* active;           // what silu left, (intermediate), a word each
  u32* mixed_flags;      // (layers, heads, SPLITS)
  u32* active_flags;     // (layers, groups of the intermediate columns)
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

static_assert(sizeof(StepLayer) == 392 && sizeof(Step) == 248, "as abi.rs says");

// The share of a warp in the products of a kind, in supersteps.
struct Share {
  u32 at, end;
  u32 tile, row_tile;    // where it begins
  u32 column, first;     // superstep of columns with which that tile begins, superstep of the tile
  u32 tile_end;          // behind the last tile that begins in it
  u32 unused;
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
  u32* most;             // (warps): maxima of flags
  StepLayer* layers;     // this one and the next, by turns
  const u8** nibbles;    // (products)
  Share* shares;         // (kinds, warps)
  int2* met;             // (kinds): supersteps of columns that the block meets, the last excluded
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
__device__ __forceinline__ u64 load_now(const u64* p) { return (u64)load_now((const i64*)p); }
__device__ __forceinline__ void publish(u32* p, u32 v) { asm volatile("st.relaxed.gpu.global.u32 [%0],%1;" ::"l"(p), "r"(v) : "memory"); }
__device__ __forceinline__ void publish(u64* p, u64 v) { asm volatile("st.relaxed.gpu.global.u64 [%0],%1;" ::"l"(p), "l"(v) : "memory"); }

// A word: a number, and behind it who left it (the layer plus 1), so that whoever sees the one sees the other.
__device__ __forceinline__ u64 word_of(float v, u32 tag) { return (u64)tag << 32 | __float_as_uint(v); }
__device__ __forceinline__ u32 tag_of(u64 word) { return (u32)(word >> 32); }
__device__ __forceinline__ float number_of(u64 word) { return __uint_as_float((u32)word); }

__device__ __forceinline__ bool complete(i64 sum) { return ((u32)sum & 255) == COMPLETE; }

// Waits for one sum, before many lanes look at many: what they read over and over, weights could not pass meanwhile.
__device__ __forceinline__ void wait_for(const i64* p) {
  while (!complete(load_now(p))) {
  }
}

__device__ __forceinline__ bool complete(const FourSums& s) { return complete(s.a.x) && complete(s.a.y) && complete(s.b.x) && complete(s.b.y); }
__device__ __forceinline__ FourSums load_four_now(const i64* p) { return {load_two_now(p), load_two_now(p + 2)}; }
__device__ __forceinline__ FourSums sums_alone(const FourSums& s) { return {{s.a.x >> 8, s.a.y >> 8}, {s.b.x >> 8, s.b.y >> 8}}; }

// ---- Weights.

__device__ __forceinline__ int kind_of(int product, int products) { return product + 1 == products ? (int)HEAD : product & 3; }

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
  u32 left, product, products;
  u32 ring, bar, slot;       // addresses: of the ring, of the slot's barrier, of the slot
  u32 ring_end, bars;
  u32 parity;                // of the arrivals at the slots' barriers
  u64 once;

  __device__ __forceinline__ Feed(const Room& room, int products, int slots)
      : next(nullptr), left(0), product(0), products(products), ring(room.ring), bar(room.bars), slot(room.ring), ring_end(room.ring + slots * SLOT_BYTES),
        bars(room.bars), parity(0), once(policy_once()) {
    if ((threadIdx.x & 31) == 0) {
      for (int i = 0; i < slots; i++) barrier_init(bars + i * 8);
      barrier_fence();
    }
    __syncwarp();
  }

  // Asks for one more slot; at the end for none.
  __device__ __forceinline__ void put(const Room& room) {
    while (left == 0 && product < products) {
      const Share& share = room.shares[kind_of(product, products) * STEP_WARPS + (threadIdx.x >> 5)];
      left = share.end - share.at;
      next = room.nibbles[product++] + (size_t)share.at * SUPERSTEP_BYTES;
    }
    const u32 count = min(left, (u32)STEP_SLOT), bytes = count * SUPERSTEP_BYTES;
    if (count > 0 && (threadIdx.x & 31) == 0) {
      barrier_expect(bar, bytes);
      bulk_copy_once(slot, next, bytes, bar, once);
    }
    next += bytes;
    left -= count;
    slot += SLOT_BYTES;
    bar += 8;
    if (slot == ring_end) slot = ring, bar = bars, parity ^= 1;
  }

  // Waits for the slot that was asked for first; `put` asks for another in its place.
  __device__ __forceinline__ void wait() const {
    barrier_wait(bar, parity ^ 1); // its copy was asked for a round before
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

// Far symbols of the tiles that begin in a warp's share. They are rare, but where they are, is known from global memory only: asked for ahead of the product.
struct Far { u32 at, end; };
__device__ __forceinline__ Far far_of(const Plain& M, const Share& share) { return {__ldg(M.far_off + share.tile + (share.first > 0)), __ldg(M.far_off + share.tile_end)}; }

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
__device__ __forceinline__ void product(const StepProduct& of, Feed& feed, const Room& room, const Share& p, Far far) {
  const Plain& M = of.matrix;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const u32 supersteps = M.tc / SUPERSTEP, mine = lane * 16, frag = room.frag + (lane & 3) * 16;
  u32 at = p.at, tile = p.tile, row_tile = p.row_tile, column = p.column, first = p.first, of_slot = 0;
  while (at < p.end) {
    const u32 end = min(at - first + supersteps, p.end);
    const u32 arrival = column + first == 0 ? __ldg(of.arrivals + row_tile) : 1;
    i64 y0[1] = {0}, y1[1] = {0};
    u32 x = frag + (column + first) * SUPERSTEP;
    const int2* info = room.info + column + first;
#pragma unroll 1
    for (; at < end; x += SUPERSTEP, info++) {
      if (of_slot == 0) feed.wait();
      const u32 from = feed.slot + of_slot * SUPERSTEP_BYTES + mine;
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
    if (first == 0 && far.at < far.end)
      add_far<1>(__ldg(M.far_off + tile), __ldg(M.far_off + tile + 1), M.far, OfRoom{room, (int)column}, room.far[warp], y0, y1);
    if ((lane & 3) == 0) {
      u64* out = (u64*)(of.sums + row_tile * TILE_ROWS + (lane >> 2));
      atomicAdd(out, (u64)(y0[0] * 256 + arrival));
      atomicAdd(out + 8, (u64)(y1[0] * 256 + arrival));
    }
    first = 0;
    tile++;
    if (++row_tile == M.row_tiles) row_tile = 0, column += supersteps;
  }
}

// ---- Activations.

// A lane's columns of ROUNDS supersteps, of base + warp and every STEP_WARPS-th after it.
struct Columns {
  Four of[ROUNDS];
  u32 most[ROUNDS]; // bits of the superstep's largest
};

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
    int cols[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      cols[u] = min(column_of(0, r0 + u), hidden - 4); // beyond the end: loaded, not used
      w[u] = load_four(weight + cols[u]);
      if (!add) continue;
      scale[u] = load_four(add->scale + cols[u]);
      if (add->bias) bias[u] = load_four(add->bias + cols[u]);
    }
    if (add) {
#pragma unroll
      for (int u = 0; u < AT_ONCE; u++)
        if (lane == u) wait_for(add->sums + cols[u]);
      __syncwarp();
      bool all;
      do {
        all = true;
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) sums[u] = load_four_now(add->sums + cols[u]);
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) all &= complete(sums[u]);
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
      const u32 most = columns.most[r0 + u] = most_of(a);
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
    columns.most[r] = __float_as_uint(__uint_as_float(columns.most[r]) * factor);
  }
  return unit_of(__uint_as_float(all.most) * factor);
}

// Four columns that other blocks left as words of `tag`, of `cols`; 0 beyond.
struct FourWords { longlong2 a, b; };
__device__ __forceinline__ FourWords load_words_now(const u64* p) { return {load_two_now((const i64*)p), load_two_now((const i64*)p + 2)}; }
__device__ __forceinline__ bool complete(const FourWords& v, u32 tag) { return tag_of(v.a.x) == tag && tag_of(v.a.y) == tag && tag_of(v.b.x) == tag && tag_of(v.b.y) == tag; }

// What attention or silu left, of all blocks.
struct Left {
  const u64* words;      // (cols)
  const u32* flags;      // (flag_count)
  u32 tag;
  int cols;
  int flag_count;
};

// Columns of a superstep a round up to `end`; with the first of them the unit, which is known when all flags are there.
__device__ __forceinline__ void gather(const Room& room, const Left& L, int base, int end, bool first, Columns& columns, float& unit) {
  constexpr int AT_ONCE = 2; // rounds whose loads are in flight together
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  u32 most = 0;
#pragma unroll
  for (int r0 = 0; r0 < ROUNDS; r0 += AT_ONCE) {
    if (r0 > 0 && superstep_of(base, r0) >= end) break;
    const u64* from[AT_ONCE];
    FourWords v[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) from[u] = L.words + min(column_of(base, r0 + u), L.cols - 4);
    // A few lanes wait for all, as for sums.
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++)
      if ((lane & 3) == u && superstep_of(base, r0 + u) < end)
        while (tag_of(load_now(from[u])) != L.tag) {
        }
    __syncwarp();
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) v[u] = load_words_now(from[u]);
    if (r0 == 0 && first)
      for (int i = warp * 32; i < L.flag_count; i += STEP_THREADS) { // warp-uniform
        u32 flag;
        do flag = load_now(L.flags + min(i + lane, L.flag_count - 1));
        while (!(flag & READY));
        most = max(most, flag & ~READY);
      }
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      if (superstep_of(base, r0 + u) >= end) break;
      while (!complete(v[u], L.tag)) v[u] = load_words_now(from[u]);
      const bool there = column_of(base, r0 + u) < L.cols;
      columns.of[r0 + u] = there ? Four{{number_of(v[u].a.x), number_of(v[u].a.y), number_of(v[u].b.x), number_of(v[u].b.y)}} : Four{};
      columns.most[r0 + u] = most_of(columns.of[r0 + u]);
    }
  }
  if (!first) return;
  most = most_of_warp(most);
  if (lane == 0) room.most[warp] = most;
  __syncthreads(); // and all warps are done with the activations before these
  unit = unit_of(__uint_as_float(most_of_warp(room.most[lane % STEP_WARPS])));
}

// int8 activations of the supersteps in `range`, for the block's products. frag: (columns / 64, 4 lanes, 4 words), words as in ops.cu.
__device__ __forceinline__ void quantize(const Room& room, int2 range, int base, const Columns& columns, float unit, float per) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int r = 0; r < ROUNDS; r++) {
    const int superstep = superstep_of(base, r);
    if (superstep < range.x || superstep >= range.y) continue;
    const Quantized x = quantized(columns.of[r], columns.most[r], unit, per);
    const u32 to = room.frag + superstep * SUPERSTEP + (lane >> 4) * 64 + (lane >> 1 & 3) * 16 + (lane >> 3 & 1) * 4 + (lane & 1) * 2;
    asm volatile("st.shared.u16 [%0],%1;" ::"r"(to), "h"((u16)x.evens) : "memory");
    asm volatile("st.shared.u16 [%0],%1;" ::"r"(to + 8), "h"((u16)x.odds) : "memory");
    if (lane == 0) room.info[superstep] = make_int2(x.m, 128 * x.even);
  }
}

// ---- Attention: the heads' parts, shared out to crews of half a block. Then each of a head's crews puts together the parts of some of its elements.

// Where a crew leaves its part of a head.
struct WordOut {
  u64* part;    // (head_dim)
  u64* stat;
  u32 tag;
  __device__ __forceinline__ void stats(float highest, float total) const { publish(stat, (u64)__float_as_uint(total) << 32 | __float_as_uint(highest)); } // never 0
  __device__ __forceinline__ void value(int e, float y) const { publish(part + e, word_of(y, tag)); }
};

// The elements of a head that its crew `split` puts together, by the threads of one warp.
__device__ __forceinline__ void mix(const Step& P, int layer, int head, int split) {
  const int lane = threadIdx.x & 31, each = (P.head_dim + SPLITS - 1) / SPLITS, e = split * each + lane;
  const u64* stat = P.stats + ((size_t)layer * P.heads + head) * SPLITS;
  u32 most = 0;
  if (lane < each && e < P.head_dim) {
    u64 words[SPLITS], of[SPLITS];
    bool all;
    do {
      all = true;
#pragma unroll
      for (int s = 0; s < SPLITS; s++) {
        of[s] = load_now(stat + s);
        words[s] = load_now(P.parts + (head * SPLITS + s) * P.head_dim + e);
      }
#pragma unroll
      for (int s = 0; s < SPLITS; s++) all &= of[s] != 0 && (tag_of(of[s]) == 0 || tag_of(words[s]) == layer + 1); // without positions there is no part
    } while (!all);
    float2 stats[SPLITS];
    float parts[SPLITS];
#pragma unroll
    for (int s = 0; s < SPLITS; s++) {
      stats[s] = make_float2(__uint_as_float((u32)of[s]), __uint_as_float((u32)(of[s] >> 32)));
      parts[s] = number_of(words[s]);
    }
    const float y = mixed_of(stats, parts);
    publish(P.mixed + head * P.head_dim + e, word_of(y, layer + 1));
    most = __float_as_uint(y) & 0x7fffffff;
  }
  most = most_of_warp(most);
  if (lane == 0) publish(P.mixed_flags + (layer * P.heads + head) * SPLITS + split, most | READY);
}

template <int PAIRS>
__device__ __forceinline__ void attend_all(const Step& P, const Room& room, const StepLayer& L, int layer, float unit, const Place& place) {
  constexpr int THREADS = ATTENTION_WARPS * 32;
  static_assert(sizeof(AttendRoom<PAIRS>) == (2 * ATTENTION_WARPS + ATTENTION_WARPS * PAIRS * 64 + 8 + PAIRS * 64) * 4, "as step.rs says");
  static_assert(PAIRS * 64 <= THREADS && PAIRS * 64 <= SPLITS * 32, "a thread an element");
  const int which = threadIdx.x / THREADS, group = P.heads / P.kv_heads * SPLITS, half = P.head_dim / 2;
  const Crew crew = {(int)threadIdx.x % THREADS, THREADS, 1 + which};
  const StepProduct& qkv = L.products[QKV];
  AttendRoom<PAIRS>& mine = ((AttendRoom<PAIRS>*)room.attention)[which];
  Attend A;
  A.rope = {{}, L.q_norm, L.k_norm, P.turn, P.place, nullptr, P.eps, layer, P.heads, P.kv_heads, P.head_dim, P.k_row, P.v_row};
  A.attention = {nullptr, P.place, nullptr, nullptr, P.scale, layer, P.heads, P.kv_heads, P.head_dim, L.window};
  const Angle angle = angle_of(crew, A.rope, 0);
#pragma unroll 1
  for (int item = blockIdx.x + which * gridDim.x; item < P.heads * SPLITS; item += 2 * gridDim.x) {
    const int head = item / SPLITS, split = item % SPLITS;
    fetch_positions(crew, A.attention, place, item / group, item % group);
    // Elements i and i + half of q, k and v.
    const Rows rows = rows_of(A.rope, head);
    const int i = min(crew.index, half - 1);
    float y[6] = {};
    if ((crew.index & ~31) < half) { // the other warps have no elements
      int row[6];
      float scale[6], bias[6];
      i64 sums[6];
#pragma unroll
      for (int e = 0; e < 6; e++) {
        row[e] = rows.of[e >> 1] + i + (e & 1) * half;
        scale[e] = __ldg(qkv.scale + row[e]);
        bias[e] = qkv.bias ? __ldg(qkv.bias + row[e]) : 0.0f;
      }
#pragma unroll
      for (int e = 0; e < 6; e++)
        if ((crew.index & 31) == e) wait_for(qkv.sums + row[e]);
      __syncwarp();
      bool all;
      do {
        all = true;
#pragma unroll
        for (int e = 0; e < 6; e++) sums[e] = load_now(qkv.sums + row[e]);
#pragma unroll
        for (int e = 0; e < 6; e++) all &= complete(sums[e]);
      } while (!all);
#pragma unroll
      for (int e = 0; e < 6; e++) {
        y[e] = value_of(sums[e] >> 8, unit, scale[e]);
        if (qkv.bias) y[e] += bias[e];
      }
    }
    const WordOut out = {P.parts + (size_t)item * P.head_dim, P.stats + (size_t)layer * P.heads * SPLITS + item, (u32)layer + 1};
    attend<PAIRS>(crew, mine, A, place, angle, head, split, make_float2(y[0], y[1]), make_float2(y[2], y[3]), make_float2(y[4], y[5]), out);
    if (crew.index < 32) mix(P, layer, head, split);
    crew.sync(); // the room may be used again
  }
}

// silu(gate) * up, GROUP columns a warp.
__device__ __forceinline__ void activate(const Step& P, const StepProduct& gate_up, int layer, float unit) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, groups = (P.intermediate + GROUP - 1) / GROUP;
  for (int g = warp * gridDim.x + blockIdx.x; g < groups; g += STEP_WARPS * gridDim.x) {
    const int col = g * GROUP + lane, row = min(col, P.intermediate - 1), up_row = P.up_row + row;
    const float scale = __ldg(gate_up.scale + row), up_scale = __ldg(gate_up.scale + up_row);
    if (lane == 0) wait_for(gate_up.sums + row);
    if (lane == GROUP / 2) wait_for(gate_up.sums + up_row);
    __syncwarp();
    i64 sum, up_sum;
    do {
      sum = load_now(gate_up.sums + row);
      up_sum = load_now(gate_up.sums + up_row);
    } while (!complete(sum) || !complete(up_sum));
    float gate = value_of(sum >> 8, unit, scale), up = value_of(up_sum >> 8, unit, up_scale);
    if (gate_up.bias) gate += __ldg(gate_up.bias + row), up += __ldg(gate_up.bias + up_row);
    const float y = col < P.intermediate ? silu(gate, up) : 0.0f;
    if (col < P.intermediate) publish(P.active + col, word_of(y, layer + 1));
    const u32 most = most_of_warp(__float_as_uint(y) & 0x7fffffff);
    if (lane == 0) publish(P.active_flags + layer * groups + g, most | READY);
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
  room.most = (u32*)place(STEP_WARPS * 4);
  room.layers = (StepLayer*)place(2 * sizeof(StepLayer));
  room.nibbles = (const u8**)place(products * 8);
  room.shares = (Share*)place(KINDS * STEP_WARPS * sizeof(Share));
  room.met = (int2*)place(KINDS * 8);
  for (int i = threadIdx.x; i < products; i += STEP_THREADS) room.nibbles[i] = (const u8*)(i + 1 < products ? P.layers[i / 4].products[i % 4].matrix : P.head.matrix).nibbles;
  for (int kind = P.layer_count > 0 ? lane : HEAD; kind < KINDS; kind += 32) { // of all layers alike
    const Plain& M = kind == HEAD ? P.head.matrix : P.layers[0].products[kind].matrix;
    const u32 supersteps = M.tc / SUPERSTEP, of_seg = M.row_tiles * supersteps;
    u32 first, end;
    share_out(0, of_seg * M.segs, gridDim.x, blockIdx.x, first, end);
    if (warp == 0) room.met[kind] = first == end ? make_int2(0, 0) : make_int2(first / of_seg * supersteps, ((end - 1) / of_seg + 1) * supersteps);
    Share share = {};
    share_out(first, end - first, STEP_WARPS, warp, share.at, share.end);
    share.tile = share.at / supersteps;
    share.first = share.at % supersteps;
    share.column = share.tile / M.row_tiles * supersteps;
    share.row_tile = share.tile % M.row_tiles;
    share.tile_end = (share.end + supersteps - 1) / supersteps;
    room.shares[kind * STEP_WARPS + warp] = share;
  }
  auto load_layer = [&](int layer) {
    const u32* from = (const u32*)(P.layers + layer);
    u32* to = (u32*)(room.layers + (layer & 1));
    // Not by the threads on which attention waits.
    for (int i = (int)threadIdx.x - STEP_THREADS / 4; i >= 0 && i < (int)(sizeof(StepLayer) / 4); i += STEP_THREADS) to[i] = __ldg(from + i);
  };
  static_assert(sizeof(StepLayer) / 4 <= STEP_THREADS / 4, "at once");
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

  const int mixed_flags = P.heads * SPLITS, active_flags = (P.intermediate + GROUP - 1) / GROUP;
  auto product_at = [&](int p) -> const StepProduct& { return p + 1 < products ? room.layers[p >> 2 & 1].products[p & 3] : P.head; };
  float unit = 0; // of the last product's activations
  Far far = far_of(product_at(0).matrix, room.shares[kind_of(0, products) * STEP_WARPS + warp]);

  // One product after another, and all code but once: what a step executes should fit the instruction cache.
#pragma unroll 1
  for (int p = 0; p < products; p++) {
    const int which = kind_of(p, products), layer = p >> 2;
    const bool norm = which == QKV || which == GATE_UP || which == HEAD;
    const StepProduct& here = product_at(p);
    const int2 range = room.met[which];
    Columns columns = {};
    int base = 0;
    if (norm) {
      const float* weight = which == HEAD ? P.final_norm : which == QKV ? room.layers[layer & 1].input_norm : room.layers[layer & 1].post_norm;
      unit = normed(P.hidden, P.eps, room, p > 0 ? &product_at(p - 1) : nullptr, unit, weight, columns);
    }
    const Left left = which == O ? Left{P.mixed, P.mixed_flags + layer * mixed_flags, (u32)layer + 1, P.heads * P.head_dim, mixed_flags}
                                 : Left{P.active, P.active_flags + layer * active_flags, (u32)layer + 1, P.intermediate, active_flags};
    base = norm ? 0 : range.x;
    do {
      if (!norm) gather(room, left, base, range.y, base == range.x, columns, unit);
      quantize(room, range, base, columns, unit, per_unit(unit));
      base += ROUNDS * STEP_WARPS;
    } while (!norm && base < range.y);
    __syncthreads();
    product(here, feed, room, room.shares[which * STEP_WARPS + warp], far);
    if (which != HEAD) {
      if (which == QKV && layer + 1 < P.layer_count) load_layer(layer + 1); // nobody needs the layer before this one any more
      if (which == QKV) attend_all<PAIRS>(P, room, room.layers[layer & 1], layer, unit, position);
      if (which == GATE_UP) activate(P, here, layer, unit);
      far = far_of(product_at(p + 1).matrix, room.shares[kind_of(p + 1, products) * STEP_WARPS + warp]);
    }
  }
  for (int row = blockIdx.x * STEP_THREADS + threadIdx.x; row < P.vocab; row += gridDim.x * STEP_THREADS) {
    if (lane == 0) wait_for(P.head.sums + row);
    __syncwarp(__activemask());
    i64 sum;
    do sum = load_now(P.head.sums + row);
    while (!complete(sum));
    const float y = value_of(sum >> 8, unit, P.head.scale[row]);
    P.logits[row] = P.head.bias ? y + P.head.bias[row] : y;
  }
}

#define STEP(DIM, PAIRS) extern "C" __global__ void __launch_bounds__(STEP_THREADS, 1) step_##DIM(Step P) { step<PAIRS>(P); }
STEP(64, 1) STEP(128, 2) STEP(256, 4)

#endif
