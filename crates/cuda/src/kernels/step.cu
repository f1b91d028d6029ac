// step: a whole step of one token in one kernel: all layers and the logits, of a model whose matrices are all in the plain layout.
//
// Computes what ops.cu and plain.cu compute one launch after another, to the bit.
//
// Why.  A launch costs 3 to 5 us in which the memory idles, and a layer needs nine.  Here the weights are one stream: it is known from the start which warp
// multiplies which parts of which matrices, and a warp of its own (`feed`) keeps the others' rings filled whatever the model waits for.
//
// Weights.  Supersteps of 1 KiB in the plain layout (no raw low bits).  A block has whole rows of q, k and v, of gate and up (the same of both) and of the
// head: it has normed all columns anyway, and sums that are complete in it need no hop to be silu's input.  Of o and down it has an even share of all tiles,
// so few of the columns, which others left.  A warp has an even share of the block's, in slots of STEP_SLOT supersteps of a tile, which arrive in a
// ring of its own, a bulk copy each.  Where its slots lie is planned at the start, a word a slot.
//
// Order.  There is no barrier of the grid, and no fence but where an answer is given up.  Sums of o and down are exact integers, and each carries in its low 8 bits the arrivals of the warps
// that have added to it, weighed so that they are COMPLETE together: whoever needs a sum reads it until they are.  What a block alone computes are words
// of a number, read until they are there: q, k and v, attention's and silu's results, each layer's in a place of its own; parts of attention, which are larger,
// have one place for all layers and carry theirs.  A block waits for what it multiplies, no more: attention's and silu's results have a unit that depends on
// no maximum (FIXED_UNIT).  Where one is beyond that unit's range, the step's answer is none, and the launches that it stands for find it.
//
//   norm, qkv | attention | o | norm, gate, up and silu | down | norm ...
//
// Every block norms the whole residual stream for itself and keeps it in shared memory.  Since a norm waits for all rows of o or down, no block is ever
// more than one product ahead of another that has a share in it; so attention's parts may lie in one place for all layers.
//
// Host.  No copy stands before the kernel, nor behind it where the greatest logit is all that is asked for: it reads its token in the host's memory, each block a part that it leaves as words for all, and each block writes
// there which of its logits is the greatest; the host takes the greatest of these.
//
// Needs.  All blocks at once on the GPU (a cooperative launch), one a multiprocessor; sums and words of all layers cleared.
//
// Cost.  An 8 B-shaped layer takes some 45 us on an H100, of which its weights alone would take 35, and some 40 on an H200, where they would take 25.  Before
// there was a feeding warp it took 55 on an H100 with these clocks read in it (the global timer, from the first block that begins a layer): down's last sums 7.5, normed 8.3, rounded 8.9, q, k and v multiplied 11.6, left 12.2,
// read 14.9, attention's parts 16.8, together 18.8, read 21.2, o multiplied 23.5, its sums 26.8, rounded 28.2, gate and up multiplied 39 to 48, silu's words read
// 51, down multiplied 56 to 60.  At the start of every product its ring was full, and yet gate and up took 17 us for what the memory brings in 12: blocks that were
// done first asked for down's weights, before which those of the others queued.  And while many weights are on their way, a read that hits the L2 cache, or an
// atomic, queues behind them: up to 3,900 cycles instead of 200 to 400.  So what counts is how little is on its way, as long as the memory is busy.
//
// Tried, tokens/s of runs that stood beside each other.  On an H200, where launches gave 523 and this kernel then 579: barriers of the grid (520), all lanes reading
// sums over and over (463), copies by lanes (519).  On an H100, where it gave 478 to 492: constants asked for by cp.async a product ahead (460 to 467), with q, k
// and v by warps of their own and loops instead of unrolled rounds (440).  Where it gave 514 to 526 with rows kept in a block: a superstep at a time instead of two
// (498, for 524); rows of o in a block too (515 to 518); what was cleared fetched into the cache a layer ahead (514 to 516).  Where it gave 541 to 548, each warp
// asking for its own: only the product's own slots until the warp is done with it (539 to 543), until the block is (537 to 540); then no more than 1, 2, 3 on their
// way while it waits (552, 566, 565), with norms, roundings and sums side by side 572 to 580 for 3; q, k and v's too (562 to 570), 4 to 14 KiB a warp of gate and up
// brought to the L2 cache at once besides (555 to 568).  With the feeding warp: always at most 1, 2, 3, 5 on their way (557 to 578, 550 to 557, 538 to 543, 542); at most
// 5, 8, 12 of a block unless a ring is empty (500, 525, 537); two where fewer than 2, 3, 4 are ahead, else one (589, 588, 579); with slots brought to the L2 cache when
// the ring is full, 4 every 4000 cycles 591 to 600, every 2500 591, every 6000 591, 8 every 4000 590 to 603.
// When every block still waited for the maximum of all that attention or silu left, 586 to 590, now 604 to 606; on an H200 (the clocks say) 4.0 us from silu to down,
// now 2.0.  There, before: paces from one slot at a time to no limit 668 to 679, up to 8 slots or none brought to the L2 cache the same, at most a slot in 1500 to 4000
// cycles 652 to 664; all lanes reading words instead of a few first 666 to 676 for 679; parts of attention put together by whoever multiplies them 613 to 644; this
// structure's arguments in shared memory 605 for 680; no look for far symbols, scales loaded early, half the rounds' code: nothing.  Gate and up take 10.7 us however
// many of their weights wait in the L2 cache: it gives 5.5 TB/s.
// What the model waits for is what counts on a fast memory: without weights (none asked for, none waited for) a step at 512 positions took 1,253 us on an H100, 163 more
// than since then: `red` instead of `atomicAdd` of a pointer whose memory the compiler does not know (it looks where it points, and waits), no division by a runtime number
// (heads of a group, tiles of a row), places in shared memory as constants instead of sums of sizes, copies of input and answer left out (33 of them), two columns of a product
// instead of masks for both nibbles, fewer instructions a sum. With weights 611 became 643 tokens/s there, and 701 became 746 on an H200; with the token's words taken
// at once instead of one after another, and blocks' answers to the host without atomics, 747 and 743 became 750 and 748 by turns. Nothing: keys and values asked for before the query is
// known, sums read by all as soon as few arrivals are missing, a slot in registers while the one before is multiplied (slower); parts of attention put together by whoever
// multiplies them, with words of 4 bytes (738 to 740 for 742 to 750 on an H200).
// Measured: bench/RESULTS.md, "CUDA".

#if HOPPER

constexpr int STEP_THREADS = STEP_WARPS * 32; // that compute; one warp more asks for weights
constexpr int SUPERSTEP_BYTES = SUPERSTEP * TILE_ROWS / 2;
constexpr int SLOT_BYTES = STEP_SLOT * SUPERSTEP_BYTES;
constexpr int ROUNDS = STEP_HIDDEN_MAX / (STEP_WARPS * SUPERSTEP); // supersteps of the residual stream that a warp has
constexpr u32 COMPLETE = 128;                                     // what all arrivals at a sum add up to
constexpr u64 NO_ANSWER = ~0ull;                                  // instead of a rank: a logit is no number, or something did not fit FIXED_UNIT

enum { QKV = 0, O = 1, GATE_UP = 2, DOWN = 3, HEAD = 4, KINDS = 5 };

struct StepProduct {
  Plain matrix;
  const float* scale;   // (n)
  const float* bias;    // (n), or null
  // Of o and down:
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

// Where what varies in size begins in the block's shared memory.
struct Places {
  int ring, bars, x, frag, info, parts, warps, nibbles, plan;
};

struct Step {
  const StepLayer* layers;
  StepProduct head;
  const float* final_norm;
  const u32* given;      // in the host's memory: the token's embedding, (hidden); from `turn_at` on its angles as in Rope; from `place_at` on its Place
  u32* input;            // the same, a word each
  u64* parts;            // attention's out, (heads, SPLITS, head_dim), a word each
  u64* stats;            // attention's stats, (layers, heads, SPLITS); 0: not there yet
  u32* qkv;              // (layers, rows), a word each
  u32* mixed;            // what attention left, (layers, heads * head_dim), a word each
  u32* active;           // what silu left, (layers, intermediate), a word each
  float* logits;         // (vocab)
  u32* unfit;            // not 0: something did not fit FIXED_UNIT
  u64* answers;          // (blocks), in the host's memory: the greatest logit's rank, see `rank_of`
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
  int turn_at;           // words
  int place_at;
  int slots;             // of a warp's ring
  int parts_max;         // room for parts of sums
  float per_dim;         // 1 / head_dim
  float per_column;      // 1 / hidden
  Divisor group;         // heads of a KV head
  Places at;
  int plan[KINDS + 1];   // of a warp's slots of all kinds, where each kind's begin; and how many there are
};

static_assert(sizeof(StepLayer) == 392 && sizeof(Step) == 328, "as abi.rs says");

// What a block multiplies of the matrices of a kind, in row tiles; of gate and up as many of each.
struct Block {
  int count;             // row tiles
  int half;              // of these from `first` on, the others from `second` on
  int first;
  int second;
  int supersteps;        // of a tile
  int slots;             // of a tile
  int row_tiles;         // of the matrix
  int segs;
  int begin;             // supersteps of columns that the block meets
  int end;
  int local;             // a block has all columns of its rows, and goes through them before the next row tile
  Divisor per;           // tiles of a row tile, if local; else of a segment
  Divisor of_tile;       // slots
  __device__ __forceinline__ int row_tile(int i) const { return i < half ? first + i : second + (i - half); }
  // Which tile of the matrix is the `ahead`-th behind that of the block's row tile `row` and the segment `seg`.
  __device__ __forceinline__ u32 tile(int row, int seg, int ahead) const {
    const int i = (local ? seg : row) + ahead, whole = per.of(i), rest = i - whole * (int)per.by;
    return (local ? rest : seg + whole) * row_tiles + row_tile(local ? row + whole : rest);
  }
};

// The share of a warp in it.
struct Share {
  int slots;             // how many
  int row;               // where it begins: which of the block's row tiles
  int seg;               // column segment
  int slot;              // slot of the tile
  int tiles;             // that begin in it
  u32 plan;              // address: where in the matrix its slots are, a word each: the first superstep * 2, + 1 if there are two
};

static_assert(sizeof(Block) == 60 && sizeof(Share) == 24, "as step.rs says");

// Shared memory, `Room` of step.rs: what is as long for all models first.
struct Room {
  u32 ring;              // (warps, slots)
  u32 bars;              // (warps): a barrier a slot
  u8* attention;         // (2) AttendRoom
  float4* x;             // (supersteps, lanes): the residual stream
  u32 frag;              // (columns), see `quantize`
  int2* info;            // (supersteps)
  u64 (*far)[TILE_ROWS]; // (warps)
  i64 (*parts)[TILE_ROWS]; // of a block's own sums: row tile t's part of warp w is the t + w-th
  u32* warps;            // (matrices that are not o or down, row tiles of the block): the first with a part of its sums, the last << 16
  u8* arrivals;          // (o and down, row tiles)
  Both* said;            // (supersteps of the residual stream): sum of squares, maximum
  StepLayer* layers;     // this one and the next, by turns
  StepProduct* head;
  float* turn;           // (head_dim)
  const u8** nibbles;    // (products)
  Share* shares;         // (kinds, warps)
  Block* blocks;         // (kinds)
  u32 plan;              // of the warp: (slots of all kinds)
  u32 passed;            // (warps): slots that were multiplied
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

// A word: a number, all bits turned over, so that what was cleared is none; a NaN is always the same.
__device__ __forceinline__ uint4 load_words_now(const u32* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint2 load_two_now(const u32* p) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1},[%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ u32 word_of(float v) { return v == v ? ~__float_as_uint(v) : ~0x7fffffffu; }
__device__ __forceinline__ float number_of(u32 word) { return __uint_as_float(~word); }
__device__ __forceinline__ bool complete(uint4 v) { return v.x != 0 && v.y != 0 && v.z != 0 && v.w != 0; }
__device__ __forceinline__ Four numbers_of(uint4 v) { return {{number_of(v.x), number_of(v.y), number_of(v.z), number_of(v.w)}}; }

// A number, and behind it who left it (the layer plus 1), so that whoever sees the one sees the other.
__device__ __forceinline__ u64 word_of(float v, u32 tag) { return (u64)tag << 32 | __float_as_uint(v); }
__device__ __forceinline__ u32 tag_of(u64 word) { return (u32)(word >> 32); }
__device__ __forceinline__ float number_of(u64 word) { return __uint_as_float((u32)word); }

__device__ __forceinline__ bool complete(i64 sum) { return ((u32)sum & 255) == COMPLETE; }

// Of four sums: the low 8 bits are 0 if all are complete.
__device__ __forceinline__ u32 missing(const FourSums& s) { return ((u32)s.a.x ^ COMPLETE) | ((u32)s.a.y ^ COMPLETE) | ((u32)s.b.x ^ COMPLETE) | ((u32)s.b.y ^ COMPLETE); }
__device__ __forceinline__ FourSums load_four_now(const i64* p) { return {load_two_now(p), load_two_now(p + 2)}; }
// `value_of` the sum alone.
__device__ __forceinline__ float value_of_arrived(i64 sum, float unit, float scale) {
  return __fmaf_rn((float)(int)(sum >> 32), 16777216.0f, (float)((u32)sum >> 8)) * (0.0625f * unit) * scale;
}

// All warps but the one that feeds them.
__device__ __forceinline__ void sync_all() { asm volatile("bar.sync 3,%0;" ::"n"(STEP_THREADS) : "memory"); }

// ---- Weights.

__device__ __forceinline__ int kind_of(int product, int products) { return product + 1 == products ? (int)HEAD : product & 3; }

__device__ __forceinline__ void share_out(u32 first, u32 count, u32 parts, u32 part, u32& at, u32& end) {
  at = first + count * part / parts; // of at most 2^20 slots, in at most some hundred parts
  end = first + count * (part + 1) / parts;
}

__device__ __forceinline__ uint4 load_ring(u32 address) { // not to be moved behind the copy that overwrites it
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v;
}

// A warp's ring, as the warp sees it that multiplies what arrives there.
struct Ring {
  u32 slots, end, bars;      // addresses: of the slots, of their barriers
  u32 slot, bar;             // of the next one
  u32 parity;                // of its arrivals
  u32 count, passed;         // of slots that were multiplied; address: where the feeding warp reads it

  __device__ __forceinline__ Ring(const Room& room, int warp, int count_of_slots)
      : slots(room.ring + warp * count_of_slots * SLOT_BYTES), end(slots + count_of_slots * SLOT_BYTES), bars(room.bars + warp * count_of_slots * 8), slot(slots), bar(bars),
        parity(0), count(0), passed(room.passed + warp * 4) {}
  // Waits for the next slot.
  __device__ __forceinline__ void wait() const { barrier_wait(bar, parity); }
  // All lanes have it: it may be overwritten.
  __device__ __forceinline__ void pass() {
    store_shared(passed, ++count);
    slot += SLOT_BYTES;
    bar += 8;
    if (slot == end) slot = slots, bar = bars, parity ^= 1;
  }
};

// The warp that asks for what the others multiply, from the first product to the last: lane w fills the ring of warp w, with slots of one tile each. Bulk copies,
// since loads and atomics of the model's other parts would queue behind as many copies by lanes.
//
// What the model waits for queues behind weights that are on their way, so no more of them than the memory needs to be busy: a warp that has fewer than
// STEP_PACE slots ahead gets one at once, others one after another; and once a ring is full, now and then a slot comes to the L2 cache, up to STEP_FETCHED.
__device__ __forceinline__ void feed(const Room& room, int products, int count_of_slots) {
  const int w = threadIdx.x & 31;
  const u64 once = policy_once();
  const u32 slots = room.ring + w * count_of_slots * SLOT_BYTES, bars = room.bars + w * count_of_slots * 8, passed = room.passed + w * 4;
  const u8* matrix = nullptr; // that is asked for
  u32 plan = 0;               // address: of its next slot's word
  int left = 0, product = w < STEP_WARPS ? 0 : products; // slots of it that are still to be asked for; the one behind it
  u32 asked = 0, arrived = 0; // slots
  int to = 0, next = 0;       // slots of the ring: where the next goes, the next to arrive
  u32 parity = 0;             // of its arrivals
  int fetched = 0;            // slots of the matrix that come to the L2 cache
  u32 fetched_at = 0;         // clock
  while (__any_sync(~0u, left > 0 || product < products)) {
    if (left == 0 && product < products) {
      const Share& share = room.shares[kind_of(product, products) * STEP_WARPS + w];
      matrix = room.nibbles[product++];
      left = share.slots;
      plan = share.plan;
      fetched = 0;
    }
    if (arrived != asked && barrier_passed(bars + next * 8, parity)) {
      arrived++;
      if (++next == count_of_slots) next = 0, parity ^= 1;
    }
    const int ahead = asked - load_shared_now(passed);
    static_assert(STEP_SLOT == 2, "one or two supersteps");
    if (left > 0 && ahead < count_of_slots && (ahead < STEP_PACE || asked == arrived)) {
      const u32 word = load_shared(plan);
      bulk_copy_of_lane(slots + to * SLOT_BYTES, matrix + (size_t)(word >> 1) * SUPERSTEP_BYTES, ((word & 1) + 1) * SUPERSTEP_BYTES, bars + to * 8, once);
      if (++to == count_of_slots) to = 0;
      plan += 4;
      left--;
      asked++;
      fetched = max(fetched - 1, 0);
    } else if (fetched < min(left, STEP_FETCHED) && ahead == count_of_slots && asked == arrived && clock_now() - fetched_at > STEP_FETCH_CYCLES) {
      const u32 word = load_shared(plan + fetched * 4);
      bulk_fetch(matrix + (size_t)(word >> 1) * SUPERSTEP_BYTES, ((word & 1) + 1) * SUPERSTEP_BYTES);
      fetched++;
      fetched_at = clock_now();
    }
    __syncwarp();
  }
}

// m * q of a column for far symbols, from the fragments of the block.
struct OfRoom {
  const Room& room;
  int first_superstep;
  __device__ __forceinline__ i64 operator()(int, int col) const {
    const int c = first_superstep * SUPERSTEP + col;
    const u32 word = load_shared(room.frag + (c & ~127) + (c >> 3 & 3) * 32 + (c & 1) * 16 + (c >> 6 & 1) * 8 + (c >> 5 & 1) * 4);
    return (i64)room.info[c / SUPERSTEP].x * (i8)(word >> (c >> 1 & 3) * 8);
  }
};

// Far symbols of the tiles that begin in a warp's share, one a lane. They are rare, but where they are, is known from global memory only: asked for ahead of
// the product.
struct Far {
  u32 at, end;
};
__device__ __forceinline__ Far far_of(const Plain& M, const Block& block, const Share& share) {
  const int lane = threadIdx.x & 31;
  if (lane >= share.tiles) return {0, 0};
  if (share.tiles > 32) return {0, 1}; // to be looked for one by one
  const u32* off = M.far_off + block.tile(share.row, share.seg, lane + (share.slot > 0));
  return {__ldg(off), __ldg(off + 1)};
}

// N supersteps' sums of rows g and g + 8, times 16. `from`: the lane's weights in the ring, `x`: the lane's activations. Of a product's eight columns two are used, the
// first with activations of the even columns (the low nibbles), the second with those of the odd ones: a byte as it is, a signed number, is 16 times its high nibble, and
// the low one, whose part the second column of the low nibbles tells.
template <int N>
__device__ __forceinline__ void multiply(u32 from, u32 x, const int2* info, i64& y0, i64& y1, Ring& ring) {
  const u32 L = 0x0f0f0f0f;
  uint4 a[N * 2], f[N];
  int2 m[N];
#pragma unroll
  for (int i = 0; i < N; i++) {
    a[i * 2] = load_ring(from + i * SUPERSTEP_BYTES);
    a[i * 2 + 1] = load_ring(from + i * SUPERSTEP_BYTES + SUPERSTEP_BYTES / 2);
    f[i] = make_uint4(0, 0, 0, 0);
    if ((threadIdx.x & 31) < 8) f[i] = load_shared_16(x + i * SUPERSTEP);
    m[i] = info[i];
  }
  __syncwarp(); // all lanes have what is overwritten
  ring.pass();
#pragma unroll
  for (int i = 0; i < N; i++) {
    int low[4] = {}, all[4] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint4 v = a[i * 2 + half];
      const u32 b0 = half ? f[i].z : f[i].x, b1 = half ? f[i].w : f[i].y;
      mma(low, v.x & L, v.y & L, v.z & L, v.w & L, b0, b1);
      mma(all, v.x, v.y, v.z, v.w, b0, b1);
    }
    y0 += (i64)m[i].x * (low[0] * 16 + (all[1] - low[1] - m[i].y));
    y1 += (i64)m[i].x * (low[2] * 16 + (all[3] - low[3] - m[i].y));
  }
}

// The warp's part of a product with the activations in `room`.
__device__ __forceinline__ void product(const StepProduct& of, int which, Ring& ring, const Room& room, Far far) {
  const Plain& M = of.matrix;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const Block& block = room.blocks[which];
  const Share share = room.shares[which * STEP_WARPS + warp];
  const u32 mine = lane * 16, frag = room.frag + (lane & 3) * 32 + (lane >> 2) * 16;
  const bool any = __any_sync(~0u, far.at < far.end);
  int row = share.row, seg = share.seg, slot = share.slot;
  i64 y0[1] = {0}, y1[1] = {0};
  if (block.local && share.slots == 0 && lane < TILE_ROWS) room.parts[row + warp][lane] = 0; // whoever adds the parts up does not know
#pragma unroll 1
  for (int left = share.slots; left > 0;) {
    const int slots = min(left, block.slots - slot), column = seg * block.supersteps + slot * STEP_SLOT;
    int supersteps = block.supersteps - slot * STEP_SLOT; // of the tile
    u32 x = frag + column * SUPERSTEP;
    const int2* info = room.info + column;
    left -= slots;
#pragma unroll 1
    for (int i = 0; i < slots; i++, x += STEP_SLOT * SUPERSTEP, info += STEP_SLOT, supersteps -= STEP_SLOT) {
      static_assert(STEP_SLOT == 2, "two cases");
      ring.wait();
      if (supersteps > 1) multiply<2>(ring.slot + mine, x, info, y0[0], y1[0], ring);
      else multiply<1>(ring.slot + mine, x, info, y0[0], y1[0], ring);
    }
    const int row_tile = block.row_tile(row);
    if (any && slot == 0) {
      const u32* off = M.far_off + seg * block.row_tiles + row_tile;
      add_far<1>(__ldg(off), __ldg(off + 1), M.far, OfRoom{room, seg * block.supersteps}, room.far[warp], y0, y1);
    }
    if (block.local) {
      seg++;
      if (seg == block.segs || left == 0) {
        if ((lane & 3) == 0) {
          i64* to = room.parts[row + warp] + (lane >> 2);
          to[0] = y0[0];
          to[8] = y1[0];
        }
        y0[0] = y1[0] = 0;
        seg = 0;
        row++;
      }
    } else {
      if ((lane & 3) == 0) {
        const u32 arrival = seg == 0 && slot == 0 ? room.arrivals[(which == DOWN) * (STEP_HIDDEN_MAX / TILE_ROWS) + row_tile] : 1;
        u64* out = (u64*)(of.sums + row_tile * TILE_ROWS + (lane >> 2));
        add_global(out, (u64)(y0[0] * 256 + arrival));
        add_global(out + 8, (u64)(y1[0] * 256 + arrival));
      }
      y0[0] = y1[0] = 0;
      if (++row == block.count) row = 0, seg++;
    }
    slot = 0;
  }
}

// N sums whose parts the block's warps left, of rows i, i + rows ... of the block's; `warps`: of the matrix.
template <int N>
__device__ __forceinline__ void own_sums(const Room& room, const u32* warps, int i, int rows, i64 (&sums)[N]) {
  constexpr int AT_ONCE = 8 / N; // parts of a sum whose loads are in flight together
  const i64* part[N];
  int left[N], most = 0;
#pragma unroll
  for (int n = 0; n < N; n++) {
    const int row = i + n * rows, t = row / TILE_ROWS;
    const u32 first = warps[t] & 0xffff;
    part[n] = room.parts[t + first] + row % TILE_ROWS;
    left[n] = (warps[t] >> 16) + 1 - first;
    most = max(most, left[n]);
    sums[n] = 0;
  }
#pragma unroll 1
  for (int begun = 0; begun < most; begun += AT_ONCE) {
    i64 of[N][AT_ONCE];
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) of[n][j] = begun + j < left[n] ? part[n][(begun + j) * TILE_ROWS] : 0;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int j = 0; j < AT_ONCE; j += 2) sums[n] += of[n][j] + of[n][j + 1];
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
__device__ __forceinline__ float normed(int hidden, float per_column, float eps, const Room& room, const StepProduct* add, float unit, const float* weight, Columns& columns) {
  constexpr int AT_ONCE = 2; // rounds that are computed together
  const int lane = threadIdx.x & 31, supersteps = (hidden + SUPERSTEP - 1) / SUPERSTEP;
#pragma unroll
  for (int r0 = 0; r0 < ROUNDS; r0 += AT_ONCE) {
    if (superstep_of(0, r0) >= supersteps) break;
    // Beyond the end weights and scales are 0, as the stream there is.
    Four w[AT_ONCE] = {}, scale[AT_ONCE] = {}, a[AT_ONCE];
    float squares[AT_ONCE];
    int cols[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      const int col = column_of(0, r0 + u);
      cols[u] = min(col, hidden - 4);
      if (col < hidden) w[u] = load_four(weight + col);
      if (add && col < hidden) scale[u] = load_four(add->scale + col);
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) a[u] = superstep_of(0, r0 + u) < supersteps ? four(room.x[superstep_of(0, r0 + u) * 32 + lane]) : Four{};
    if (add) {
      FourSums sums[AT_ONCE];
      // Two lanes wait for a sum each, before all look at theirs: what they read over and over, weights could not pass meanwhile.
      static_assert(AT_ONCE == 2, "a lane for each");
      const i64* mine = add->sums + (lane == 0 ? cols[0] : cols[1]);
      while (!__all_sync(~0u, lane >= AT_ONCE || complete(load_now(mine)))) {
      }
      u32 none;
      do {
        none = 0;
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) sums[u] = load_four_now(add->sums + cols[u]);
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) none |= missing(sums[u]);
      } while (none & 255);
#pragma unroll
      for (int u = 0; u < AT_ONCE; u++) {
        const i64 all[4] = {sums[u].a.x, sums[u].a.y, sums[u].b.x, sums[u].b.y};
        float more[4];
#pragma unroll
        for (int j = 0; j < 4; j++) more[j] = value_of_arrived(all[j], unit, scale[u].v[j]);
        if (add->bias && column_of(0, r0 + u) < hidden) { // few models have them: not asked for ahead
          const Four bias = load_four(add->bias + cols[u]);
#pragma unroll
          for (int j = 0; j < 4; j++) more[j] += bias.v[j];
        }
#pragma unroll
        for (int j = 0; j < 4; j++) a[u].v[j] += more[j];
        if (superstep_of(0, r0 + u) < supersteps) room.x[superstep_of(0, r0 + u) * 32 + lane] = float4_of(a[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      squares[u] = squares_of(a[u]);
#pragma unroll
      for (int j = 0; j < 4; j++) a[u].v[j] *= w[u].v[j];
      columns.of[r0 + u] = a[u];
      columns.most[r0 + u] = most_of(a[u]);
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++)
      if (lane == 0 && superstep_of(0, r0 + u) < supersteps) room.said[superstep_of(0, r0 + u)] = {squares[u], columns.most[r0 + u]};
  }
  sync_all();
  Both all = {0.0f, 0u};
#pragma unroll
  for (int s = 0; s < ROUNDS * STEP_WARPS; s += 32) {
    if (s + lane >= supersteps) break;
    const Both of = room.said[s + lane];
    all.sum += of.sum;
    all.most = max(all.most, of.most);
  }
  all = combine_warp(all);
  const float factor = norm_factor(all.sum, per_column, eps);
#pragma unroll
  for (int r = 0; r < ROUNDS; r++) {
    if (superstep_of(0, r) >= supersteps) break;
#pragma unroll
    for (int j = 0; j < 4; j++) columns.of[r].v[j] *= factor;
    columns.most[r] = __float_as_uint(__uint_as_float(columns.most[r]) * factor);
  }
  return unit_of(__uint_as_float(all.most) * factor);
}

// What attention or silu left: columns of a superstep a round up to `end`.
__device__ __forceinline__ void gather(const u32* words, int cols, int base, int end, Columns& columns) {
  constexpr int AT_ONCE = 2; // rounds whose loads are in flight together
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int r0 = 0; r0 < ROUNDS; r0 += AT_ONCE) {
    if (superstep_of(base, r0) >= end) break;
    const u32* from[AT_ONCE];
    uint4 v[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) from[u] = words + min(column_of(base, r0 + u), cols - 4);
    // A few lanes wait for all, as for sums.
    static_assert(AT_ONCE == 2, "of four lanes");
    const u32* word = (lane & 3) == 0 ? from[0] : from[1];
    const bool waits = (lane & 3) < AT_ONCE && superstep_of(base, r0 + (lane & 3)) < end;
    while (!__all_sync(~0u, !waits || load_now(word) != 0)) {
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) v[u] = load_words_now(from[u]);
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      if (superstep_of(base, r0 + u) >= end) break;
      while (!complete(v[u])) v[u] = load_words_now(from[u]);
      columns.of[r0 + u] = column_of(base, r0 + u) < cols ? numbers_of(v[u]) : Four{};
      columns.most[r0 + u] = most_of(columns.of[r0 + u]);
    }
  }
}

// int8 activations of the supersteps from `base` on, for the block's products. `unfit`: where to say that some do not fit FIXED_UNIT; or null. Whoever
// writes it does so before its block adds to sums, on which all logits depend. frag: (supersteps, 4 lanes, even columns | odd ones, 2
// halves, 2 words): what a lane of `multiply` takes of a superstep is one load.
__device__ __forceinline__ void quantize(const Room& room, int end, int base, const Columns& columns, float unit, int m_max, u32* unfit) {
  constexpr int AT_ONCE = 2; // rounds that are computed together
  const int lane = threadIdx.x & 31;
  const float per = per_unit(unit);
#pragma unroll
  for (int r0 = 0; r0 < ROUNDS; r0 += AT_ONCE) {
    if (superstep_of(base, r0) >= end) break;
    Quantized x[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) x[u] = quantized(columns.of[r0 + u], columns.most[r0 + u], unit, per, m_max);
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      const int superstep = superstep_of(base, r0 + u);
      if (superstep >= end) break;
      const u32 to = room.frag + superstep * SUPERSTEP + (lane >> 1 & 3) * 32 + (lane >> 4) * 8 + (lane >> 3 & 1) * 4 + (lane & 1) * 2;
      asm volatile("st.shared.u16 [%0],%1;" ::"r"(to), "h"((u16)x[u].evens) : "memory");
      asm volatile("st.shared.u16 [%0],%1;" ::"r"(to + 16), "h"((u16)x[u].odds) : "memory");
      if (lane == 0) room.info[superstep] = make_int2(x[u].m, 128 * x[u].even);
      if (unfit && lane == 0 && !fits(columns.most[r0 + u])) {
        publish(unfit, 1);
        __threadfence();
      }
    }
  }
}

// ---- What the host gives: read where it is by one block each, since PCIe is slow, and left as words for all.

__device__ __forceinline__ u32 load_from_host(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.sys.global.u32 %0,[%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store_to_host(u64* p, u64 v) { asm volatile("st.relaxed.sys.global.u64 [%0],%1;" ::"l"(p), "l"(v) : "memory"); }

constexpr int PLACE_WORDS = 6;
static_assert(sizeof(Place) == PLACE_WORDS * 4, "two addresses, position, capacity");

__device__ __forceinline__ void bring_input(const Step& P) {
  u32 first, end;
  share_out(0, P.place_at + PLACE_WORDS, gridDim.x, blockIdx.x, first, end);
  for (u32 i = first + (threadIdx.x & 31); i < end; i += 32) publish(P.input + i, max(~load_from_host(P.given + i), 1u)); // of all bits set, a NaN, another NaN
}
__device__ __forceinline__ Place take_input(const Step& P, const Room& room) {
  uint4 x[ROUNDS] = {}, addresses;
  uint2 position;
  u32 turn = 0;
  bool all;
  do {
    addresses = load_words_now(P.input + P.place_at);
    position = load_two_now(P.input + P.place_at + 4);
    all = complete(addresses) && position.x != 0 && position.y != 0;
#pragma unroll
    for (int r = 0; r < ROUNDS; r++)
      if (column_of(0, r) < P.hidden) {
        x[r] = load_words_now(P.input + column_of(0, r));
        all &= complete(x[r]);
      }
    if (threadIdx.x < P.head_dim) {
      turn = load_now(P.input + P.turn_at + threadIdx.x);
      all &= turn != 0;
    }
  } while (!all);
#pragma unroll
  for (int r = 0; r < ROUNDS; r++)
    if (superstep_of(0, r) < P.padded_hidden / SUPERSTEP)
      room.x[superstep_of(0, r) * 32 + (threadIdx.x & 31)] = column_of(0, r) < P.hidden ? float4_of(numbers_of(x[r])) : make_float4(0, 0, 0, 0);
  if (threadIdx.x < P.head_dim) room.turn[threadIdx.x] = number_of(turn);
  auto pointer = [](u32 low, u32 high) { return (u16*)((u64)~high << 32 | ~low); };
  return {pointer(addresses.x, addresses.y), pointer(addresses.z, addresses.w), ~position.x, ~position.y};
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
  if (lane >= each || e >= P.head_dim) return;
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
  publish(P.mixed + (layer * P.heads + head) * P.head_dim + e, word_of(mixed_of(stats, parts)));
}

// Keys and values of the positions before, on their way into the L2 cache.
__device__ __forceinline__ void fetch_all(const Step& P, int layer, const Place& place) {
  constexpr int THREADS = ATTENTION_WARPS * 32;
  const int which = threadIdx.x / THREADS;
  const Crew crew = {(int)threadIdx.x % THREADS, THREADS, 1 + which};
  Attention A = {};
  A.layer = layer, A.kv_heads = P.kv_heads, A.head_dim = P.head_dim;
#pragma unroll 1
  for (int item = blockIdx.x + which * gridDim.x; item < P.heads * SPLITS; item += 2 * gridDim.x) {
    const int kv_head = P.group.of(item / SPLITS);
    fetch_positions(crew, A, place, kv_head, item - kv_head * P.group.by * SPLITS);
  }
}

template <int PAIRS>
__device__ __forceinline__ void attend_all(const Step& P, const Room& room, const StepLayer& L, const u32* qkv, int layer, const Place& place) {
  constexpr int THREADS = ATTENTION_WARPS * 32;
  static_assert(sizeof(AttendRoom<PAIRS>) == (2 * ATTENTION_WARPS + ATTENTION_WARPS * PAIRS * 64 + 8 + PAIRS * 64) * 4, "as step.rs says");
  static_assert(PAIRS * 64 <= THREADS && PAIRS * 64 <= SPLITS * 32, "a thread an element");
  const int which = threadIdx.x / THREADS, half = P.head_dim / 2;
  const Crew crew = {(int)threadIdx.x % THREADS, THREADS, 1 + which};
  AttendRoom<PAIRS>& mine = ((AttendRoom<PAIRS>*)room.attention)[which];
  Attend A;
  A.rope = {{}, L.q_norm, L.k_norm, room.turn, nullptr, nullptr, P.eps, P.per_dim, layer, P.heads, P.kv_heads, P.head_dim, P.k_row, P.v_row};
  A.attention = {nullptr, nullptr, nullptr, nullptr, P.scale, layer, P.heads, P.kv_heads, P.head_dim, L.window};
  const Angle angle = angle_of(crew, A.rope, 0);
#pragma unroll 1
  for (int item = blockIdx.x + which * gridDim.x; item < P.heads * SPLITS; item += 2 * gridDim.x) {
    const int head = item / SPLITS, split = item % SPLITS, kv_head = P.group.of(head);
    // Elements i and i + half of q, k and v.
    const Rows rows = rows_of(A.rope, head, kv_head);
    const int i = min(crew.index, half - 1);
    float y[6] = {};
    if ((crew.index & ~31) < half) { // the other warps have no elements
      const u32* from[6];
      u32 words[6];
#pragma unroll
      for (int e = 0; e < 6; e++) from[e] = qkv + rows.of[e >> 1] + i + (e & 1) * half;
      bool all;
      do {
        all = true;
#pragma unroll
        for (int e = 0; e < 6; e++) words[e] = load_now(from[e]);
#pragma unroll
        for (int e = 0; e < 6; e++) all &= words[e] != 0;
      } while (!all);
#pragma unroll
      for (int e = 0; e < 6; e++) y[e] = number_of(words[e]);
    }
    const WordOut out = {P.parts + (size_t)item * P.head_dim, P.stats + (size_t)layer * P.heads * SPLITS + item, (u32)layer + 1};
    attend<PAIRS>(crew, mine, A, place, angle, kv_head, split, make_float2(y[0], y[1]), make_float2(y[2], y[3]), make_float2(y[4], y[5]), out);
    if (crew.index < 32) mix(P, layer, head, split);
    crew.sync(); // the room may be used again
  }
}

// What a thread needs to make numbers of its row of a block's own: scales and biases, of up too.
struct Scales {
  float scale[2], bias[2];
};
__device__ __forceinline__ Scales scales_of(const StepProduct& of, const Block& block, int i, int rows) {
  Scales out = {};
  if (i >= rows) return out;
#pragma unroll
  for (int e = 0; e < 2; e++) {
    if (e > 0 && block.half == block.count) break;
    const int row = block.row_tile(i / TILE_ROWS + e * block.half) * TILE_ROWS + i % TILE_ROWS;
    out.scale[e] = __ldg(of.scale + row);
    if (of.bias) out.bias[e] = __ldg(of.bias + row);
  }
  return out;
}

// The block's rows of q, k and v.
__device__ __forceinline__ void leave_rows(const Room& room, const u32* warps, const StepProduct& of, const Block& block, const Scales& first, float unit, u32* words) {
  const int rows = block.count * TILE_ROWS;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows; i += STEP_THREADS) {
    const Scales scales = i < STEP_THREADS ? first : scales_of(of, block, i, rows);
    i64 sums[1];
    own_sums(room, warps, i, 0, sums);
    float y = value_of(sums[0], unit, scales.scale[0]);
    if (of.bias) y += scales.bias[0];
    publish(words + block.first * TILE_ROWS + i, word_of(y));
  }
}

// silu(gate) * up of the block's rows.
__device__ __forceinline__ void activate(const Step& P, const Room& room, const u32* warps, const StepProduct& of, const Block& block, const Scales& first, float unit, u32* words) {
  const int rows = min(block.half * TILE_ROWS, P.intermediate - block.first * TILE_ROWS), up = block.half * TILE_ROWS;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows; i += STEP_THREADS) {
    const Scales scales = i < STEP_THREADS ? first : scales_of(of, block, i, up);
    i64 sums[2];
    own_sums(room, warps, i, up, sums);
    float y[2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
      y[e] = value_of(sums[e], unit, scales.scale[e]);
      if (of.bias) y[e] += scales.bias[e];
    }
    publish(words + block.first * TILE_ROWS + i, word_of(silu(y[0], y[1])));
  }
}

// A logit by which its token is chosen: the larger, and of equals the one of the least id, in the order of `f32::total_cmp`; what is not finite is above all.
__device__ __forceinline__ u64 rank_of(float logit, u32 id) {
  const u32 bits = __float_as_uint(logit);
  if ((bits & 0x7fffffff) >= 0x7f800000) return NO_ANSWER;
  return (u64)(bits ^ ((u32)((int)bits >> 31) | 0x80000000)) << 32 | ~id;
}

__device__ __forceinline__ u64 greatest_of_warp(u64 v) {
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) v = max(v, __shfl_xor_sync(~0u, v, d));
  return v;
}

template <int PAIRS>
__device__ __forceinline__ void step(const Step& P) {
  extern __shared__ __align__(128) u8 shared[];
  const int products = P.layer_count * 4 + 1, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  Room room;
  u8* at = shared;
  auto place = [&](int bytes) { u8* here = at; at += (bytes + 127) & ~127; return here; };
  room.attention = place(2 * sizeof(AttendRoom<PAIRS>));
  room.far = (u64 (*)[TILE_ROWS])place(STEP_WARPS * TILE_ROWS * 8);
  room.arrivals = place(2 * (STEP_HIDDEN_MAX / TILE_ROWS));
  room.said = (Both*)place(ROUNDS * STEP_WARPS * 8);
  room.layers = (StepLayer*)place(2 * sizeof(StepLayer));
  room.head = (StepProduct*)place(sizeof(StepProduct));
  room.turn = (float*)place(PAIRS * 64 * 4);
  room.shares = (Share*)place(KINDS * STEP_WARPS * sizeof(Share));
  room.blocks = (Block*)place(KINDS * sizeof(Block));
  room.passed = shared_address(place(STEP_WARPS * 4));
  room.ring = shared_address(shared + P.at.ring);
  room.bars = shared_address(shared + P.at.bars);
  room.x = (float4*)(shared + P.at.x);
  room.frag = shared_address(shared + P.at.frag);
  room.info = (int2*)(shared + P.at.info);
  room.parts = (i64 (*)[TILE_ROWS])(shared + P.at.parts);
  room.warps = (u32*)(shared + P.at.warps);
  room.nibbles = (const u8**)(shared + P.at.nibbles);
  room.plan = shared_address(shared + P.at.plan) + warp * P.plan[KINDS] * 4;
  for (int i = threadIdx.x; i < products; i += STEP_THREADS) room.nibbles[i] = (const u8*)(i + 1 < products ? P.layers[i / 4].products[i % 4].matrix : P.head.matrix).nibbles;
  for (int kind = warp == STEP_WARPS ? (int)KINDS : P.layer_count > 0 ? lane : HEAD; kind < KINDS; kind += 32) { // of all layers alike
    const Plain& M = kind == HEAD ? P.head.matrix : P.layers[0].products[kind].matrix;
    Block block = {};
    block.supersteps = M.tc / SUPERSTEP;
    block.slots = (block.supersteps + STEP_SLOT - 1) / STEP_SLOT;
    block.row_tiles = M.row_tiles;
    block.segs = M.segs;
    block.local = kind != O && kind != DOWN;
    u32 first, end;
    if (block.local) {
      const int pairs = kind == GATE_UP ? (P.intermediate + TILE_ROWS - 1) / TILE_ROWS : 0;
      share_out(0, pairs > 0 ? pairs : M.row_tiles, gridDim.x, blockIdx.x, first, end);
      block.first = first;
      block.second = P.up_row / TILE_ROWS + first;
      block.half = end - first;
      block.count = block.half << (pairs > 0);
      block.end = M.segs * block.supersteps;
      first = 0, end = block.count * M.segs * block.slots;
    } else {
      const u32 of_seg = M.row_tiles * block.slots;
      block.count = block.half = M.row_tiles;
      share_out(0, of_seg * M.segs, gridDim.x, blockIdx.x, first, end);
      if (first < end) block.begin = first / of_seg * block.supersteps, block.end = ((end - 1) / of_seg + 1) * block.supersteps;
    }
    const u32 per = block.local ? block.segs : block.row_tiles;
    block.per = divisor(per);
    block.of_tile = divisor(block.slots);
    if (warp == 0) room.blocks[kind] = block;
    u32 at, behind;
    share_out(first, end - first, STEP_WARPS, warp, at, behind);
    const int tile = at / block.slots;
    Share share = {(int)(behind - at), tile / per, tile % per, (int)(at % block.slots), 0, room.plan + P.plan[kind] * 4};
    share.tiles = (share.slot + share.slots + block.slots - 1) / block.slots - (share.slot > 0);
    if (!block.local) share.row = tile % per, share.seg = tile / per;
    room.shares[kind * STEP_WARPS + warp] = share;
    if (block.local)
      for (int t = warp; t < block.count; t += STEP_WARPS) { // warp w has slots from end * w / STEP_WARPS on
        const u32 of_row = block.slots * M.segs;
        room.warps[kind / 2 * P.parts_max + t] = ((t * of_row + 1) * STEP_WARPS - 1) / end | (((t + 1) * of_row * STEP_WARPS - 1) / end) << 16;
      }
  }
  for (int i = threadIdx.x; P.layer_count > 0 && i < 2 * (STEP_HIDDEN_MAX / TILE_ROWS); i += STEP_THREADS) {
    const StepProduct& of = P.layers[0].products[i < STEP_HIDDEN_MAX / TILE_ROWS ? O : DOWN];
    const int row_tile = i % (STEP_HIDDEN_MAX / TILE_ROWS);
    if (row_tile < of.matrix.row_tiles) room.arrivals[i] = of.arrivals[row_tile];
  }
  auto load_layer = [&](int layer) {
    const u32* from = (const u32*)(P.layers + layer);
    u32* to = (u32*)(room.layers + (layer & 1));
    // Not by the first threads, which have silu's columns.
    for (int i = (int)threadIdx.x - STEP_THREADS / 4; i >= 0 && i < (int)(sizeof(StepLayer) / 4); i += STEP_THREADS) to[i] = __ldg(from + i);
  };
  static_assert(sizeof(StepLayer) / 4 <= STEP_THREADS / 4, "at once");
  if (threadIdx.x == 0) *room.head = P.head;
  if (P.layer_count > 0) load_layer(0);
  if (warp == STEP_WARPS) bring_input(P); // while the others plan
  __syncthreads();
#pragma unroll 1
  for (int kind = warp == STEP_WARPS ? (int)KINDS : P.layer_count > 0 ? 0 : HEAD; kind < KINDS; kind++) { // each warp plans its own
    const Block& block = room.blocks[kind];
    const Share& share = room.shares[kind * STEP_WARPS + warp];
#pragma unroll 1
    for (int i = lane; i < share.slots; i += 32) {
      const int tiles = block.of_tile.of(share.slot + i), first = (share.slot + i - tiles * block.slots) * STEP_SLOT;
      const u32 superstep = block.tile(share.row, share.seg, tiles) * block.supersteps + first;
      store_shared(share.plan + i * 4, superstep * 2 + (first + 1 < block.supersteps));
    }
  }
  if (threadIdx.x < STEP_WARPS) store_shared(room.passed + threadIdx.x * 4, 0);
  for (int i = threadIdx.x; i < STEP_WARPS * P.slots; i += STEP_THREADS + 32) barrier_init(room.bars + i * 8);
  barrier_fence();
  __syncthreads();
  if (warp == STEP_WARPS) {
    feed(room, products, P.slots);
    return;
  }
  Ring ring(room, warp, P.slots);
  const Place position = take_input(P, room);

  auto product_at = [&](int p) -> const StepProduct& { return p + 1 < products ? room.layers[p >> 2 & 1].products[p & 3] : *room.head; };
  float unit = 0; // of the last product's activations
  Far far;
  Scales scales;
  auto ask = [&](int p) { // ahead of a product
    const int which = kind_of(p, products);
    const StepProduct& of = product_at(p);
    const Block& block = room.blocks[which];
    far = far_of(of.matrix, block, room.shares[which * STEP_WARPS + warp]);
    scales = block.local ? scales_of(of, block, threadIdx.x, block.half * TILE_ROWS) : Scales{};
  };

  // One product after another, and all code but once: what a step executes should fit the instruction cache.
#pragma unroll 1
  for (int p = 0; p < products; p++) {
    const int which = kind_of(p, products), layer = p >> 2;
    const bool norm = which == QKV || which == GATE_UP || which == HEAD;
    const StepProduct& here = product_at(p);
    ask(p);
    if (which == QKV) fetch_all(P, layer, position);
    const Block& block = room.blocks[which];
    const u32* warps = room.warps + which / 2 * P.parts_max;
    Columns columns = {};
    if (norm) {
      const float* weight = which == HEAD ? P.final_norm : which == QKV ? room.layers[layer & 1].input_norm : room.layers[layer & 1].post_norm;
      unit = normed(P.hidden, P.per_column, P.eps, room, p > 0 ? &product_at(p - 1) : nullptr, unit, weight, columns);
    }
    if (norm) {
      quantize(room, block.end, 0, columns, unit, M_MAX, nullptr);
      sync_all();
    } else {
      unit = FIXED_UNIT;
      const int cols = which == O ? P.heads * P.head_dim : P.intermediate;
      const u32* words = (which == O ? P.mixed : P.active) + (size_t)layer * cols;
      for (int base = block.begin; base < block.end; base += ROUNDS * STEP_WARPS) {
        gather(words, cols, base, block.end, columns);
        quantize(room, block.end, base, columns, unit, FIXED_M_MAX, P.unfit);
      }
      sync_all();
    }
    product(here, which, ring, room, far);
    if (norm) sync_all(); // all parts of the block's sums are there
    if (which == HEAD) break;
    if (which == QKV) {
      u32* qkv = P.qkv + (size_t)layer * here.matrix.n;
      leave_rows(room, warps, here, block, scales, unit, qkv);
      attend_all<PAIRS>(P, room, room.layers[layer & 1], qkv, layer, position);
    }
    if (which == GATE_UP) {
      activate(P, room, warps, here, block, scales, unit, P.active + (size_t)layer * P.intermediate);
      if (layer + 1 < P.layer_count) load_layer(layer + 1); // nobody needs the layer before this one any more
    }
  }
  const Block& block = room.blocks[HEAD];
  const u32* warps = room.warps + HEAD / 2 * P.parts_max;
  const int rows = min(block.count * TILE_ROWS, P.vocab - block.first * TILE_ROWS);
  __threadfence(); // what was said before the sums that were read
  const bool none = load_now(P.unfit) != 0;
  u64 greatest = 0;
  for (int i = threadIdx.x; i < rows; i += STEP_THREADS) {
    const Scales of = i < STEP_THREADS ? scales : scales_of(P.head, block, i, rows);
    i64 sums[1];
    own_sums(room, warps, i, 0, sums);
    float y = value_of(sums[0], unit, of.scale[0]);
    if (P.head.bias) y += of.bias[0];
    if (none) y = __uint_as_float(0x7fc00000);
    const int row = block.first * TILE_ROWS + i;
    P.logits[row] = y;
    greatest = max(greatest, rank_of(y, row));
  }
  greatest = greatest_of_warp(greatest);
  if (lane == 0) room.far[warp][0] = greatest;
  sync_all();
  if (warp > 0) return;
  greatest = greatest_of_warp(room.far[lane % STEP_WARPS][0]);
  if (lane == 0) store_to_host(P.answers + blockIdx.x, max(greatest, 1ull)); // 0 is none yet
}

#define STEP(DIM, PAIRS) extern "C" __global__ void __launch_bounds__(STEP_THREADS + 32, 1) step_##DIM(Step P) { step<PAIRS>(P); }
STEP(64, 1) STEP(128, 2) STEP(256, 4)

#endif
