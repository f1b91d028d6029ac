// quad: decodes entropy-coded weights on the fly, into a product (`quad_r*_t*`) or into the plain layout (`quad_store`).
//
// Computes.  sums[token][row] += 16 * sum over supersteps s of the segment: m[token][s] * (sum over the 128 columns of s of
// symbol * q[token][column]), exact in int64, hence independent of the order of summation: fused, decoded and plain paths give the
// same bits.  The consumer multiplies by unit / 16 and the row's scale.  Symbols are unbounded.
//
// Code.  A symbol is split into high = symbol >> R and R raw low bits.  Four highs of consecutive columns are a quad.  Quads are
// Huffman coded with codes of at most W bits; those without a code are sent as quad (0,0,0,0) and listed as patches.  Highs outside
// -8..7 are listed as far symbols.
//
// Layout.  Tile = 16 rows x tc columns = one warp.  Lane l: g = l/4, c = l%4 holds rows g and g+8 and columns c*8..c*8+7 (mod 32): the
// A fragment of mma.m16n8k32.s8, so that tensor cores do the product and eight tokens cost nearly what one does.  Per block of 64
// columns a lane decodes 4 words (rows g, g+8, then g, g+8 of the other 32 columns) of two quads each: 8 lookups, 32 weights.  A word
// holds 8 nibbles: low nibbles biased by 8 (columns 0,2,4,6), high ones two's complement (columns 1,3,5,7); `word & 0x0f0f0f0f` is
// an A register as it stands, and so is the word itself (bytes 16*high + low) when the low part's product with the odd columns is
// taken off, which column 1 of the first product yields for nothing at one token.
// Each lane has two LSB-first bit streams, one per row: two independent chains.  Rows of 64 words arrive by bulk copies in a ring of
// RING_GROUPS groups of GROUP_ROWS rows a warp; the first group is stored twice, also behind the ring, so that inside a superstep
// (128 columns) the pointer never wraps.  Whether a superstep must wait for a group and whether it may ask for one is simulated at
// encoding and stored (2 bits): lanes need not vote.  The streams start with 2 + log2(copies) junk bits: window & mask is the byte
// address of the table entry (bits 0..5 code length, bits 16..31 the quad's nibbles).
//
// Needs.  sm_80 for mma; bulk copies and programmatic launches from sm_90, below which cp.async fills the ring.  Shared memory: the
// table, the activations of the block's segments, RING_BYTES a warp.
//
// Cost, per 8 weights and lane: 2 window shifts, 2 address LOP, 2 table loads, add, refill (LOP, 2 moves, load, add), PRMT, LOP, 1/4 of
// a pair of mma.  The limit on an H200 is shared memory: 32 random lookups in 32 banks take 3.66 passes, 1.10 passes a weight in all.
//
// Measured: bench/RESULTS.md, "CUDA"; how it came to be: bench/cuda/lab/NOTES.md.

enum Mode { FUSED = 0, STORE = 1 };

// NT tokens (1 or a multiple of 8).  NT = 1: a block is consecutive tiles.  NT > 1: a block is tiles of one segment, whose
// activations sit in shared memory.
template <int R, int NT, int MODE>
__device__ __forceinline__ void quad(const Quad& M, const Act& A, i64* __restrict__ sums, uint4* __restrict__ out4) {
  extern __shared__ __align__(1024) u8 sm[];
  constexpr bool FLAT = NT == 1;
  const u32 smb = shared_address(sm);
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);                  // through shfl the compiler knows it uniform
  const int lane = threadIdx.x & 31, warps = blockDim.x >> 5, S = M.tc / SUPERSTEP;
  const int blocks_of_seg = FLAT ? 1 : (M.row_tiles + warps - 1) / warps;
  const int t = FLAT ? blockIdx.x * warps + warp : (blockIdx.x / blocks_of_seg) * M.row_tiles + (blockIdx.x % blocks_of_seg) * warps + warp;
  auto seg_of = [&](int tile) { return M.magic ? (int)__umulhi(tile, M.magic) : tile / M.row_tiles; };
  const int seg = FLAT ? seg_of(t) : blockIdx.x / blocks_of_seg, row_tile = t - seg * M.row_tiles;
  const bool live = FLAT ? t < M.row_tiles * M.segs : row_tile < M.row_tiles;
  const int seg0 = FLAT ? seg_of(blockIdx.x * warps) : seg; // a flat block may span several segments
  const int nseg = min(M.block_segs, M.segs - seg0);
  // Shared memory: table | B fragments of the block's segments | {m, 128 S} | barrier of the block | barriers of the warps | rings.
  const u32 xs_b = smb + M.table_bytes;
  const u32 x_bytes = MODE == FUSED ? (u32)M.tc * (FLAT ? 2 : NT) : 0u, inf_b = xs_b + x_bytes * M.block_segs;
  const u32 inf_bytes = MODE == FUSED ? (u32)S * 8 * NT * M.block_segs : 0u;
  const u32 common = inf_b + ((inf_bytes + 127) & ~127u), bars = common + 128 + warp * 64;
  const u32 ring = common + 128 + ((warps * 64 + 127) & ~127) + warp * RING_BYTES;

  const bool bulk_info = FLAT && HOPPER && !(S & 1); // bulk copies are multiples of 16 bytes

  // ---- Prologue: small and cold things first; behind the rings' megabytes they would wait for them.
#if HOPPER
  if (threadIdx.x == 0) { // the table, by 8 copies; blocks start at different places of it, lest all ask the same slice of L2 at once
    barrier_init(common);
    barrier_fence();
    barrier_expect(common, M.table_bytes + (MODE == FUSED ? x_bytes * nseg + (bulk_info ? S * nseg * 8 : 0) : 0));
    const u32 eighth = M.table_bytes / 8;
#pragma unroll 1
    for (u32 i = 0; i < 8; i++) {
      const u32 j = ((i + blockIdx.x) & 7) * eighth;
      bulk_copy(smb + j, (const u8*)M.table + j, eighth, common);
    }
  }
#else
  for (u32 i = threadIdx.x * 16; i < M.table_bytes; i += blockDim.x * 16) copy_async_16(smb + i, (const u8*)M.table + i);
#endif
  const int tt = live ? t : 0;
  const uint2 head = M.head[tt];
  u64 sched = M.sched[tt];
  const u32 p0 = M.patch_off[tt], f0 = M.far_off[tt], f1 = M.far_off[tt + 1];
  const u64 lens_a = M.lens[(size_t)tt * 4 + (lane >> 4)], lens_b = M.lens[(size_t)tt * 4 + 2 + (lane >> 4)];
  const u8* src = nullptr;  // whole rows
  const u8* rag = nullptr;  // the rest of the rows
  int len_a = 0, len_b = 0, asked = 0, slot = 0, whole_groups = RING_GROUPS;
  launch_dependents();
#if HOPPER
  const u64 once = policy_once();
#endif
  auto ask = [&]() { // for one group of rows (warp-uniform)
    if (asked < whole_groups) {
      const u32 to = ring + slot * GROUP_BYTES;
#if HOPPER
      const u32 b = bars + slot * 8, bytes = slot == 0 ? 2 * GROUP_BYTES : GROUP_BYTES, first = slot == 0;
      asm volatile("{ .reg .pred p, q; elect.sync _|p, 0xffffffff; setp.ne.and.u32 q,%4,0,p; @p mbarrier.arrive.expect_tx.shared.b64 _,[%2],%3;"
                   "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0],[%1],%7,[%2],%6;"
                   "@q cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%5],[%1],%7,[%2],%6; }" ::"r"(to),
                   "l"(src + asked * GROUP_BYTES), "r"(b), "r"(bytes), "r"(first), "r"(to + RING_GROUPS * GROUP_BYTES), "l"(once), "n"(GROUP_BYTES)
                   : "memory");
#else
#pragma unroll
      for (int i = 0; i < GROUP_BYTES / 512; i++) {
        const u8* s = src + asked * GROUP_BYTES + (i * 32 + lane) * 16;
        const u32 d = to + (i * 32 + lane) * 16;
        copy_async_16(d, s);
        if (slot == 0) copy_async_16(d + RING_GROUPS * GROUP_BYTES, s);
      }
      copy_async_commit();
#endif
    } else { // rows that not all streams have: ballots find the words that exist
#pragma unroll 1
      for (int r = 0; r < GROUP_ROWS * 2; r++) {
        const bool has = (r & 1 ? len_b : len_a) > GROUP_ROWS * asked + (r >> 1);
        const u32 b = __ballot_sync(~0u, has);
        if (has) {
          const u8* s = rag + __popc(b & ((1u << lane) - 1)) * 4;
          const u32 d = ring + slot * GROUP_BYTES + r * 128 + lane * 4;
          copy_async_4(d, s);
          if (slot == 0) copy_async_4(d + RING_GROUPS * GROUP_BYTES, s);
        }
        rag += __popc(b) * 4;
      }
      copy_async_commit();
    }
    asked++;
    slot = slot + 1 == RING_GROUPS ? 0 : slot + 1;
  };
  if (live) {
    if (lane == 0) {
      for (int i = 0; i < RING_GROUPS; i++) barrier_init(bars + i * 8);
      barrier_fence();
    }
    src = M.words + (size_t)t * RING_GROUPS * GROUP_BYTES; // the first groups of a tile lie at a fixed stride: no header is waited for
    __syncwarp();
    ask();
    ask();
  }
  wait_for_kernel_before(); // weights do not depend on the kernel before; activations do
  if (MODE == FUSED) {
#if HOPPER
    if (threadIdx.x == 0) {
      bulk_copy(xs_b, (const u8*)A.frag + (size_t)seg0 * x_bytes, x_bytes * nseg, common);
      if (bulk_info) bulk_copy(inf_b, A.info + seg0 * S, S * nseg * 8, common);
    }
#else
    for (u32 i = threadIdx.x * 16; i < x_bytes * nseg; i += blockDim.x * 16) copy_async_16(xs_b + i, (const u8*)A.frag + (size_t)seg0 * x_bytes + i);
#endif
    if (FLAT && !bulk_info) for (int i = threadIdx.x; i < S * nseg; i += blockDim.x) copy_async_8(inf_b + i * 8, A.info + seg0 * S + i);
    if (!FLAT)
      for (int i = threadIdx.x; i < S * NT; i += blockDim.x) {
        const int token = i / S, s = i % S;
        copy_async_8(inf_b + (s * NT + token) * 8, A.info + (size_t)token * (M.k / SUPERSTEP) + seg0 * S + s);
      }
  }
  copy_async_commit();
  constexpr int AHEAD = 3; // the first patches, on their way
  u32 early[AHEAD];
  const int patches = head.y >> 16;
#pragma unroll
  for (int i = 0; i < AHEAD; i++) early[i] = live && lane + 32 * i < patches ? __ldg(M.patches + p0 + lane + 32 * i) : ~0u << 16;
  copy_async_wait();
  __syncthreads();
  if (!live) return;
  barrier_wait(common, 0);
  const int whole_rows = head.y & 0xffff;
  whole_groups = whole_rows / GROUP_ROWS;
  len_a = whole_rows + (int)((lens_a >> ((lane & 15) * 4)) & 15);
  len_b = whole_rows + (int)((lens_b >> ((lane & 15) * 4)) & 15);
  const u8* rest = M.words + ((size_t)head.x * 32 - RING_GROUPS * GROUP_BYTES); // what follows the first groups
  rag = rest + whole_groups * GROUP_BYTES;
  const int g = lane >> 2, c = lane & 3;
  constexpr int NTL = (NT + 7) / 8, NY = NTL * (FLAT ? 1 : 2);
  i64 y0[NY] = {}, y1[NY] = {}; // rows g and g + 8; one token: valid where c = 0

  // ---- While the ring fills: patches, spread over the lanes; sums meet in shared memory in parts of 16 and 32 bits, exactly
  // (|m| < 2^12, a patch's sum is below 2^18, a tile has fewer than 2^16 patches).
  const int* sums_of_supersteps = (const int*)(sm + (inf_b - smb));
  if (MODE == FUSED) {
    u32* acc = (u32*)(sm + (ring - smb) + 2 * GROUP_BYTES); // (tokens, 32) in the two groups that are not asked for yet
    for (int token = 0; token < NT; token++) acc[token * 32 + lane] = 0;
    __syncwarp();
#pragma unroll 1
    for (int i = lane, k = 0; i < patches; i += 32, k++) {
      const u32 v = (k == 0 ? early[0] : k == 1 ? early[1] : k == 2 ? early[2] : __ldg(M.patches + p0 + i)) ^ 0x0808u; // to two's complement
      const u32 q = (v >> 16) & 511, of_lane = v >> 25, of_c = of_lane & 3, half = (q & 1) * 16;
      const int even = (int)(((v & 0x0f0fu) << 4) << half), odd = (int)((v & 0xf0f0u) << half), r = (of_lane >> 2) + (q & 2) * 4;
#pragma unroll 1
      for (int token = 0; token < NT; token++) {
        const u32 xo = (xs_b - smb) + (FLAT ? (seg - seg0) * M.tc * 2 + ((q >> 3) * 8 + of_c) * 16 : (((q >> 3) * NTL + (token >> 3)) * 32 + (token & 7) * 4 + of_c) * 16) + ((q >> 2) & 1) * 4;
        const int d = __dp4a(even, *(const int*)(sm + xo), __dp4a(odd, *(const int*)(sm + xo + 8), 0)) << R; // 16 * sum
        const i64 z = (i64)sums_of_supersteps[(((FLAT ? (seg - seg0) * S : 0) + (q >> 4)) * NT + token) * 2] * d;
        atomicAdd(acc + token * 32 + r, (u32)z & 0xffffu);
        atomicAdd(acc + token * 32 + 16 + r, (u32)(z >> 16));
      }
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < NY; j++) {
      const u32* a = acc + (FLAT ? 0 : (j >> 1) * 8 + c * 2 + (j & 1)) * 32;
      if (!FLAT || c == 0) {
        y0[j] = (i64)a[g] + (i64)(int)a[16 + g] * 65536;
        y1[j] = (i64)a[g + 8] + (i64)(int)a[24 + g] * 65536;
      }
    }
    __syncwarp();
    add_far<NT>(f0, f1, M.far, OfSegment(A, seg, M.tc, M.k), (u64*)acc, y0, y1);
#if HOPPER
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    __syncwarp();
  }
  ask();
  ask();
  src = rest;

  // ---- Main loop.
  const u32 mask = M.mask, copy = lane * 4 & M.lane_mask;
  const u32 ring_end = ring + RING_GROUPS * GROUP_BYTES;
  int wait_slot = 0, got = 2;
  u32 wait_parity = 0;
  auto arrived = [&]() {
#if HOPPER
    barrier_wait(bars + wait_slot * 8, wait_parity);
    if (++wait_slot == RING_GROUPS) { wait_slot = 0; wait_parity ^= 1; }
#else
    copy_async_wait();
#endif
  };
  arrived();
  arrived(); // superstep 0 needs no more than two groups
  __syncwarp();
  struct Stream { u32 lo, hi, next, pos, address; } st[2]; // rows g and g + 8; `next` keeps the load off the chain
  for (int i = 0; i < 2; i++) {
    const u32 a = ring + i * 128 + lane * 4;
    st[i] = {load_shared(a), load_shared(a + 256), load_shared(a + 512), 0, a + 768};
  }
  const u8* plane = M.planes + ((size_t)t * S) * 256 * R + lane * 8 * R;
  uint4 plane_next = {0, 0, 0, 0};
  if (R == 1) { const uint2 v = *(const uint2*)plane; plane_next.x = v.x; plane_next.y = v.y; }
  if (R == 2) plane_next = *(const uint4*)plane;
  uint4* o4 = MODE == STORE ? out4 + ((size_t)t * S * 2) * 32 + lane : nullptr;
  const u32 xw = xs_b + (FLAT ? (seg - seg0) * M.tc * 2 + (lane & 7) * 16 : lane * 16), iw = inf_b + (FLAT ? (seg - seg0) * S * 8 : c * 16);
  const u32 one = M.one; // 1, unknown to the compiler: moves and adds as multiply-adds, off the integer pipe
  auto refill = [&](Stream& q, u32 pos) { // predicated in PTX: the compiler would load into a temporary and move
    asm volatile("{ .reg .pred p; setp.ne.u32 p,%4,0; @p mad.lo.u32 %0,%1,%5,0; @p mad.lo.u32 %1,%2,%5,0; @p ld.shared.u32 %2,[%3]; @p mad.lo.u32 %3,%5,256,%3; }"
                 : "+r"(q.lo), "+r"(q.hi), "+r"(q.next), "+r"(q.address)
                 : "r"((pos ^ q.pos) & 32), "r"(one));
    q.pos = pos;
  };
  auto store_patch = [&](u32 v) { // same nibble order as a table entry
    const u32 q = (v >> 16) & 511;
    *(u16*)((u8*)(out4 + ((size_t)t * S * 2 + (q >> 3)) * 32 + (v >> 25)) + (q & 7) * 2) = (u16)v;
  };
  uint4 x_row = {0, 0, 0, 0};
#pragma unroll 1
  for (int s = 0; s < S; s++) {
    if (sched & 2) {
      if (got < whole_groups) arrived(); else copy_async_wait();
      got++;
    }
    __syncwarp();
    if (sched & 1) ask();
    sched >>= 2;
    for (int i = 0; i < 2; i++) if (st[i].address >= ring_end) st[i].address -= RING_GROUPS * GROUP_BYTES;
    const uint4 low = plane_next;
    if (R > 0 && s + 1 < S) {
      plane += 256 * R;
      if (R == 1) { const uint2 v = __ldg((const uint2*)plane); plane_next.x = v.x; plane_next.y = v.y; } else plane_next = __ldg((const uint4*)plane);
    }
    int al[NTL][4] = {}, ah[NTL][4] = {}, bl[NTL][4] = {}, bh[NTL][4] = {};
#pragma unroll
    for (int hb = 0; hb < 2; hb++) {
      u32 n[4];
#pragma unroll
      for (int u = 0; u < 4; u += 2) { // both streams step together: two independent chains
        u32 w0[2], e0[2], w1[2], e1[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          w0[i] = __funnelshift_r(st[i].lo, st[i].hi, st[i].pos);
          e0[i] = *(const u32*)(sm + ((w0[i] & mask) | copy));
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
          w1[i] = __funnelshift_r(w0[i], 0u, e0[i]);
          e1[i] = *(const u32*)(sm + ((w1[i] & mask) | copy));
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
          refill(st[i], st[i].pos + e0[i] + e1[i]);
          n[u + i] = __byte_perm(e0[i], e1[i], 0x7632);
        }
      }
      if (MODE == FUSED && FLAT) // only columns 0 (lanes 0..3) and 1 (lanes 4..7) of B matter; the other lanes keep what they have
        asm volatile("{ .reg .pred p; setp.lt.u32 p,%4,8; @p ld.shared.v4.u32 {%0,%1,%2,%3},[%5]; }"
                     : "+r"(x_row.x), "+r"(x_row.y), "+r"(x_row.z), "+r"(x_row.w)
                     : "r"(lane), "r"(xw + (s * 2 + hb) * 128));
      if (MODE == STORE) {
        *o4 = make_uint4(n[0], n[1], n[2], n[3]);
        o4 += 32;
      } else {
#pragma unroll
        for (int j = 0; j < NTL; j++) {
          const uint4 x = FLAT ? x_row : load_shared_16(xw + ((s * 2 + hb) * NTL + j) * 512);
          const u32 L = 0x0f0f0f0f, H = 0xf0f0f0f0;
          mma(al[j], n[0] & L, n[1] & L, n[2] & L, n[3] & L, x.x, x.y);
          // One token: whole bytes 16 * odd + even against the odd columns; column 1 of the first product is to be taken off.
          if (FLAT) mma(ah[j], n[0], n[1], n[2], n[3], x.z, x.w); else mma(ah[j], n[0] & H, n[1] & H, n[2] & H, n[3] & H, x.z, x.w);
          if (R == 1) {
            const u32 p = hb ? low.y : low.x, p4 = p >> 4;
            mma(bl[j], p & 0x01010101, p & 0x02020202, p4 & 0x01010101, p4 & 0x02020202, x.x, x.y);
            mma(bh[j], p & 0x04040404, p & 0x08080808, p4 & 0x04040404, p4 & 0x08080808, x.z, x.w);
          }
          if (R == 2) {
            const u32 p = hb ? low.z : low.x, q = hb ? low.w : low.y, p4 = p >> 4, q4 = q >> 4;
            mma(bl[j], p & 0x03030303, p & 0x0c0c0c0c, p4 & 0x03030303, p4 & 0x0c0c0c0c, x.x, x.y);
            mma(bl[j], q & 0x03030303, q & 0x0c0c0c0c, q4 & 0x03030303, q4 & 0x0c0c0c0c, x.z, x.w);
          }
        }
      }
    }
    if (MODE == STORE) { // patches right behind the stores of their superstep, while those are in L2
      __syncwarp();
#pragma unroll
      for (int i = 0; i < AHEAD; i++) if (((early[i] >> 20) & 31) == (u32)s && lane + 32 * i < patches) store_patch(early[i]);
    }
    if (MODE == FUSED) {
      auto total = [&](int j, int i, int even) { // i: element of the C fragment; 16 * the integer sum
        int v = (al[j][i] * 16 + ah[j][i] - (FLAT ? al[j][i + 1] : 0) - even) << R;
        if (R == 1) v += i < 2 ? 16 * bl[j][i] + 4 * bh[j][i] : 8 * bl[j][i] + 2 * bh[j][i];
        if (R == 2) v += i < 2 ? 16 * bl[j][i] : 4 * bl[j][i];
        return v;
      };
      if (FLAT) {
        int2 f;
        asm("ld.shared.v2.u32 {%0,%1},[%2];" : "=r"(f.x), "=r"(f.y) : "r"(iw + s * 8));
        y0[0] += (i64)f.x * total(0, 0, f.y);
        y1[0] += (i64)f.x * total(0, 2, f.y);
      } else {
#pragma unroll
        for (int j = 0; j < NTL; j++) {
          const uint4 v = load_shared_16(iw + (s * NT + j * 8) * 8);
          y0[j * 2 % NY] += (i64)(int)v.x * total(j, 0, v.y);
          y0[(j * 2 + 1) % NY] += (i64)(int)v.z * total(j, 1, v.w);
          y1[j * 2 % NY] += (i64)(int)v.x * total(j, 2, v.y);
          y1[(j * 2 + 1) % NY] += (i64)(int)v.z * total(j, 3, v.w);
        }
      }
    }
  }
  // Nothing may land in shared memory after this block has left it.
  for (; got < asked; got++) if (got < whole_groups) arrived(); else copy_async_wait();
  if (MODE == STORE) {
    __syncwarp();
#pragma unroll 1
    for (int i = lane + 32 * AHEAD; i < patches; i += 32) store_patch(M.patches[p0 + i]);
  }
  if (MODE == FUSED) add_sums<NT>(sums, M.n, row_tile, y0, y1);
}

#define QUAD(R, NT) \
  extern "C" __global__ void __launch_bounds__(896, 1) quad_r##R##_t##NT(Quad M, Act A, i64* sums) { quad<R, NT, FUSED>(M, A, sums, nullptr); }
QUAD(0, 1) QUAD(0, 8) QUAD(0, 16)
QUAD(1, 1) QUAD(1, 8) QUAD(1, 16)
QUAD(2, 1) QUAD(2, 8) QUAD(2, 16)

// Bulk decode of the highs to nibbles; the raw low bits and the far list are shared with the plain layout as they lie.
extern "C" __global__ void __launch_bounds__(896, 1) quad_store(Quad M, uint4* out) { quad<0, 1, STORE>(M, Act(), nullptr, out); }
