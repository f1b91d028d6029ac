// What the kernels share: argument structures (mirrored by `abi.rs`), PTX helpers, waiting for the kernel before.
//
// The generated constants (`layout::header()`) stand above this text.

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#if __CUDA_ARCH__ >= 900
#define HOPPER 1
#else
#define HOPPER 0
#endif

// A matrix in the quad layout (layout/quad.rs). Pointers into one allocation.
struct Quad {
  const u8* words;         // coded words
  const uint2* head;       // (tiles): rows after the first groups, in units of 32 bytes | whole rows, patches << 16
  const u64* lens;         // (tiles, 4): 64 nibbles, rows beyond the whole ones of each stream
  const u64* sched;        // (tiles): 2 bits a superstep: 1 ask for a group, 2 wait for one
  const u32* far_off;      // (tiles + 1)
  const int2* far;         // lane | weight << 5, delta
  const u32* patch_off;    // (tiles + 1)
  const u32* patches;      // nibbles | quad << 16 | lane << 25
  const u8* planes;        // (tiles, supersteps, lanes, 8 r)
  const u32* table;        // (2^w, copies): code length | nibbles << 16
  u32 table_bytes;
  u32 mask;                // window bits that address the table, in place
  u32 lane_mask;           // bits of lane * 4 that choose the table's copy
  u32 magic;               // tile / row_tiles = umulhi(tile, magic); 0: divide
  int row_tiles;
  int segs;
  int tc;                  // columns of a tile
  int n;                   // padded rows
  int k;                   // padded columns
  int one;                 // 1, unknown to the compiler
  int block_segs;          // most column segments that one block touches
  int unused;
};

// A matrix in the plain layout (layout/plain.rs): the decoded form.
struct Plain {
  const uint4* nibbles;    // (segs, row_tiles, tc / 64, lanes)
  const u8* planes;        // as in Quad
  const u32* far_off;      // (tiles + 1)
  const int2* far;
  int row_tiles;
  int segs;
  int tc;
  int n;
  int k;
  int split;               // warps that share a tile, each with tc / split columns
};

// Activations of a batch of tokens (ops.cu writes them).
struct Act {
  const uint4* frag;       // B fragments
  const i8* q;             // (tokens, k)
  const int2* info;        // (tokens, k / 128): m, 128 * sum of the even columns' q
};

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Programmatic dependent launch: the next kernel may begin, and must wait before it reads what this one writes.
__device__ __forceinline__ void launch_dependents() {
#if HOPPER
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_kernel_before() {
#if HOPPER
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// D += A * B for 16 rows, 8 columns, 32 products; int8 into int32.
__device__ __forceinline__ void mma(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void copy_async_4(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0],[%1],4;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_async_8(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0],[%1],8;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_async_16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(to), "l"(from) : "memory");
}
// For what passes once: it shall not push the rest out of the L2 cache.
__device__ __forceinline__ u64 policy_once() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void copy_async_wait() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void copy_async_wait_but() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// ---- Bulk copies, of multiples of 16 bytes, and the barriers on which their bytes arrive; from sm_90 on.

__device__ __forceinline__ void barrier_init(u32 b) {
#if HOPPER
  asm volatile("mbarrier.init.shared.b64 [%0],1;" ::"r"(b) : "memory");
#endif
}
__device__ __forceinline__ void barrier_fence() {
#if HOPPER
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
__device__ __forceinline__ void barrier_expect(u32 b, u32 bytes) {
#if HOPPER
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _,[%0],%1;" ::"r"(b), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void barrier_wait(u32 b, u32 parity) {
#if HOPPER
  asm volatile("{ .reg .pred p; L: mbarrier.try_wait.parity.shared.b64 p,[%0],%1; @!p bra L; }" ::"r"(b), "r"(parity) : "memory");
#endif
}
__device__ __forceinline__ bool barrier_passed(u32 b, u32 parity) {
  u32 passed = 0;
#if HOPPER
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p,[%1],%2; selp.u32 %0,1,0,p; }" : "=r"(passed) : "r"(b), "r"(parity) : "memory");
#endif
  return passed;
}
__device__ __forceinline__ void bulk_copy(u32 to, const void* from, u32 bytes, u32 b) {
#if HOPPER
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(b) : "memory");
#endif
}
// On its way into the L2 cache.
__device__ __forceinline__ void bulk_fetch(const void* from, u32 bytes) {
#if HOPPER
  asm volatile("cp.async.bulk.prefetch.L2.global [%0],%1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ u32 clock_now() {
  u32 v;
  asm volatile("mov.u32 %0,%%clock;" : "=r"(v) :: "memory");
  return v;
}
// Asked for with what its barrier is to expect.
__device__ __forceinline__ void bulk_copy_of_lane(u32 to, const void* from, u32 bytes, u32 b, u64 policy) {
#if HOPPER
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _,[%3],%2; cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0],[%1],%2,[%3],%4;" ::"r"(to), "l"(from), "r"(bytes),
               "r"(b), "l"(policy)
               : "memory");
#endif
}

__device__ __forceinline__ void store_shared(u32 address, u32 v) { asm volatile("st.shared.u32 [%0],%1;" ::"r"(address), "r"(v) : "memory"); }
__device__ __forceinline__ u32 load_shared_now(u32 address) { // what another warp wrote
  u32 v;
  asm volatile("ld.volatile.shared.u32 %0,[%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ u32 load_shared(u32 address) {
  u32 v;
  asm volatile("ld.shared.u32 %0,[%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ uint4 load_shared_16(u32 address) {
  uint4 v;
  asm("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

// A sum in global memory: nobody waits for what it was. Of a pointer that may be to any memory, `atomicAdd` would look where it points, and wait.
__device__ __forceinline__ void add_global(u64* p, u64 v) { asm volatile("red.relaxed.gpu.global.add.u64 [%0],%1;" ::"l"(p), "l"(v) : "memory"); }

// n / by without a division, where n * by < 2^32.
struct Divisor {
  u32 by;
  u32 magic; // 2^32 / by, rounded up
  __device__ __forceinline__ int of(int n) const { return by == 1 ? n : __umulhi(n, magic); }
};
__device__ __forceinline__ Divisor divisor(u32 by) { return {by, by == 1 ? 0 : 0xffffffff / by + 1}; }

// Activations from a tile's segment on, for far symbols: m * q of a token and column.
struct OfSegment {
  const i8* q;
  const int2* info;
  int k;
  __device__ __forceinline__ OfSegment(const Act& a, int seg, int tc, int k) : q(a.q + (size_t)seg * tc), info(a.info + (size_t)seg * (tc / SUPERSTEP)), k(k) {}
  __device__ __forceinline__ i64 operator()(int token, int col) const {
    return (i64)info[(size_t)token * (k / SUPERSTEP) + col / SUPERSTEP].x * q[(size_t)token * k + col];
  }
};

// 16 * (the far symbols' part of a tile's sums), added to a lane's rows g and g + 8. `x(token, column of the segment)`: m * q.
// Entries are spread over the lanes; their sums meet in `acc`, NT * 16 words of 8 bytes in shared memory of this warp alone.
// y[2 j], y[2 j + 1] are the tokens of lane c in token tile j; for one token y[0] counts in lanes c = 0.
template <int NT, int NY, class X>
__device__ __forceinline__ void add_far(u32 first, u32 end, const int2* far, const X& x, u64* acc, i64 (&y0)[NY], i64 (&y1)[NY]) {
  if (first == end) return; // warp-uniform
  const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
  for (int i = lane; i < NT * TILE_ROWS; i += 32) acc[i] = 0;
  __syncwarp();
#pragma unroll 1
  for (u32 f = first + lane; f < end; f += 32) {
    const int2 e = far[f];
    const int of_lane = e.x & 31, w = e.x >> 5, quad = w >> 2, row = (of_lane >> 2) + (quad & 2) * 4;
    const int col = (quad >> 3) * 64 + ((quad >> 2) & 1) * 32 + (of_lane & 3) * 8 + (w & 7);
#pragma unroll 1
    for (int token = 0; token < NT; token++) atomicAdd(acc + token * TILE_ROWS + row, (u64)(16ll * e.y * x(token, col)));
  }
  __syncwarp();
#pragma unroll
  for (int j = 0; j < NY; j++) {
    const int token = NT == 1 ? 0 : (j >> 1) * 8 + c * 2 + (j & 1);
    if (NT > 1 || c == 0) {
      y0[j] += (i64)acc[token * TILE_ROWS + g];
      y1[j] += (i64)acc[token * TILE_ROWS + g + 8];
    }
  }
  __syncwarp();
}

// Adds a tile's sums to those of its rows, (tokens, n), which begin at 0. The order does not matter: they are integers.
template <int NT, int NY>
__device__ __forceinline__ void add_sums(i64* sums, int n, int row_tile, const i64 (&y0)[NY], const i64 (&y1)[NY]) {
  const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
#pragma unroll
  for (int j = 0; j < NY; j++) {
    const int token = NT == 1 ? 0 : (j >> 1) * 8 + c * 2 + (j & 1);
    if (NT == 1 && c != 0) return;
    u64* out = (u64*)(sums + (size_t)token * n + row_tile * TILE_ROWS + g);
    atomicAdd(out, (u64)y0[j]);
    atomicAdd(out + 8, (u64)y1[j]);
  }
}
