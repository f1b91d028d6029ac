// quadlut: a GEMV that decodes entropy-coded weights on the fly, beside the plain 4-bit GEMV and a bulk decoder. Lab code for one H200.
//
// Build and run: ./run.sh   (modes: quadlut smoke | all | one W LR warps | encode; SEED=n fixes the random inputs)
//
// What it computes.  Y16[token][row] = 16 * sum over segments s of m[token][s] * (sum over the 128 columns of s of symbol * xq[token][col]),
// exact in int64 (xq: int8 activations; m: the segment's scale as an integer multiple of the token's unit), hence independent of the
// order of summation: fused, decoded and plain paths give the same bits.  Real result = Y16 / 16 * unit * rowscale, left to the
// consumer, as is the sum over the column segments (part[token][segment][row]).  Symbols are unbounded.
//
// Code.  A symbol is split into high = symbol >> R and R raw low bits (R = 0, 1, 2: a fine Gaussian grid loses little by that, see
// NOTES.md, and it keeps the entropy of `high` near 2 b, where four of them fit one table window).  Four consecutive highs = a quad.
// Quads are Huffman coded, codes <= W bits (12..14); only the N likeliest have a code.  The others are sent as quad (0,0,0,0) and
// listed per tile as patches (32 bits: position, four nibbles).  high outside -8..7: `far` list, 64 bits each.
//
// Layout.  Tile = 16 rows x TC columns = one warp.  Lane l: g = l/4, c = l%4 holds rows g and g+8 and columns c*8..c*8+7 (mod 32):
// the A fragment of mma.m16n8k32.s8, so the tensor cores do the dot product and up to 8 tokens cost nearly the same.
// Per block of 64 columns a lane decodes 4 words (rows g, g+8, then g, g+8 of the other 32 columns) of two quads each:
// 8 table lookups = 32 weights.  A word holds 8 nibbles: low nibbles biased by 8 (columns 0,2,4,6), high ones two's complement
// (columns 1,3,5,7); `word & 0x0f0f0f0f` is an A register as it stands, and so is the word itself (bytes 16*high + low) when the low
// part's product with the high columns is subtracted, which column 1 of the first product yields for nothing at batch 1.
// Each lane has two LSB-first bit streams, one per row: two independent chains.  Word w of stream s of lane l: row w, (s*32+l)*4.
// Rows all streams have are stored whole (256 B); of later rows only the words that exist (ballot and popc find them).  Rows arrive by
// bulk copies in a per-warp ring of GR groups of 4 rows; the first group is stored twice, also behind the ring, so that inside a
// superstep (128 columns) the pointer never wraps.  Whether a superstep must wait for a group and whether it may ask for one is
// simulated at encoding and stored (2 bits): lanes need not vote.  The first GR groups of every tile lie at a fixed stride.
// The stream starts with 2+LR junk bits: (window & mask) is the byte address of the table entry; LR = log2 of the table's copies.
// Table entry: bits 0..5 code length, bits 16..31 the quad's nibbles.
//
// Cost per 8 weights and lane: 2 window shifts, 2 address LOP, 2 table LDS, IADD3, refill (LOP, 2 moves, LDS, add), PRMT, LOP, 1/4 of a
// pair of mma.  The limit is shared memory: 32 random lookups in 32 banks take 3.66 passes, 1.10 passes per weight and warp in all;
// the main loop runs at 97 % of that (measured), table loading and launch take the rest.
//
// Measured (NOTES.md has the table): 28672x8192, H = 2.25, 2.309 b/weight everything counted: 5.25 T weights/s, 5.45 with programmatic
// launches; torch int4pack 3.6, bf16 2.1, plain 4 bits 7.5 (7.9).  Loses to plain 4 bits (0.69) and on small matrices (prologue 4 us).
#include <cstdio>
#include <cstdlib>
#include <cstdint>
#include <cstring>
#include <vector>
#include <string>
#include <cmath>
#include <algorithm>
#include <thread>
#include <functional>
#include <numeric>
#include <cuda_runtime.h>
#define CK(x) do{cudaError_t e_=(x); if(e_!=cudaSuccess){printf("%s:%d %s\n",__FILE__,__LINE__,cudaGetErrorString(e_));exit(1);} }while(0)
typedef uint8_t u8; typedef uint32_t u32; typedef uint64_t u64; typedef int64_t i64;

// ------------------------------------------------------------------ device side
struct Head { u32 off32; u32 meta; };              // rows after the first GR groups, in units of 32 bytes; whole rows (multiple of 4) | number of patches << 16
struct Mat {
  const u8* words; const Head* head; const u64* lens; const u32* sched; const u32* far_off; const int2* far; const u32* patch_off; const u32* patches; const u8* planes;
  const u32* table; u32 table_bytes, mask, lane_mask; int junk, row_tiles, segs, tc, n, k, one, block_segs; u32 magic; // magic: division by row_tiles
};
struct Act { const uint4* frag; const int8_t* q; const int2* info; }; // frag: B fragments; q: [token][K]; info: [token][K/128] {m, 128*sum of even columns}
constexpr int GROWS = 4, GB = GROWS * 256;          // rows (of 64 words) and bytes of a ring group
constexpr int GR = 4;                               // ring groups; the first is stored twice
constexpr int RINGB = (GR + 1) * GB;                // bytes of ring per warp

__device__ __forceinline__ void mma8(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void cp4(u32 dst, const void* src) { asm volatile("cp.async.ca.shared.global [%0],[%1],4;" ::"r"(dst), "l"(src) : "memory"); }
__device__ __forceinline__ void cp8(u32 dst, const void* src) { asm volatile("cp.async.ca.shared.global [%0],[%1],8;" ::"r"(dst), "l"(src) : "memory"); }
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait_group() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
__device__ __forceinline__ u32 ldsv(u32 a) { u32 v; asm volatile("ld.shared.u32 %0,[%1];" : "=r"(v) : "r"(a) : "memory"); return v; }
__device__ __forceinline__ uint4 lds128(u32 a) { uint4 v; asm("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a)); return v; }

__device__ __forceinline__ void bar_init(u32 b) { asm volatile("mbarrier.init.shared.b64 [%0],1;" ::"r"(b) : "memory"); }
__device__ __forceinline__ void bar_expect(u32 b, u32 n) { asm volatile("mbarrier.arrive.expect_tx.shared.b64 _,[%0],%1;" ::"r"(b), "r"(n) : "memory"); }
__device__ __forceinline__ void bulk(u32 dst, const void* src, u32 n, u32 b) { asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(dst), "l"(src), "r"(n), "r"(b) : "memory"); }
__device__ __forceinline__ void bar_wait(u32 b, u32 parity) { asm volatile("{ .reg .pred p; L: mbarrier.try_wait.parity.shared.b64 p,[%0],%1; @!p bra L; }" ::"r"(b), "r"(parity) : "memory"); }

enum Mode { FUSED = 0, STORE4 = 1 };
// NT tokens (1 or a multiple of 8). NT = 1: a block is wpb consecutive tiles. NT > 1: wpb tiles of one column segment, whose x sits in shared memory.
template <int R, int NT, int MODE>
__global__ void __launch_bounds__(896, 1) quad(Mat M, Act A, i64* __restrict__ part, uint4* __restrict__ out4) {
  extern __shared__ __align__(1024) u8 sm[];
  const u32 smb = (u32)__cvta_generic_to_shared(sm);
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31, wpb = blockDim.x >> 5, S = M.tc / 128; // shfl: the compiler then knows it uniform
  constexpr bool FLAT = NT == 1;
  const int bps = FLAT ? 1 : (M.row_tiles + wpb - 1) / wpb;
  const int t = FLAT ? blockIdx.x * wpb + warp : (blockIdx.x / bps) * M.row_tiles + (blockIdx.x % bps) * wpb + warp;
  const int seg = FLAT ? (int)__umulhi(t, M.magic) : blockIdx.x / bps, rt = t - seg * M.row_tiles;
  const bool live = FLAT ? t < M.row_tiles * M.segs : rt < M.row_tiles;
  const int seg0 = FLAT ? (int)__umulhi(blockIdx.x * wpb, M.magic) : seg, nseg = min((int)M.block_segs, M.segs - seg0); // a flat block may span two segments
  const u32 xs_b = smb + M.table_bytes;                                    // B fragments of the block's segments, then {m, 128*S}
  const u32 xbytes = MODE == FUSED ? (u32)M.tc * (FLAT ? 2 : NT) : 0u, inf_b = xs_b + xbytes * M.block_segs;
  const u32 infbytes = MODE == FUSED ? (u32)S * 8 * NT * M.block_segs : 0u;
  const u32 common = inf_b + ((infbytes + 127) & ~127u), bars = common + 128 + warp * 64, ring = common + 128 + ((wpb * 64 + 127) & ~127) + warp * RINGB; // barriers: block's, warp's
  // ---- prologue, small and cold things first: behind the ring's megabytes they would wait for them
  if (threadIdx.x == 0) { // the table, by 8 bulk copies; blocks start at different places of it, lest all ask the same L2 slice at once
    bar_init(common); asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    bar_expect(common, M.table_bytes + (MODE == FUSED ? xbytes * nseg + (FLAT ? S * nseg * 8 : 0) : 0)); const u32 part8 = M.table_bytes / 8;
#pragma unroll 1
    for (u32 i = 0; i < 8; i++) { const u32 j = ((i + blockIdx.x) & 7) * part8; bulk(smb + j, (const u8*)M.table + j, part8, common); }
  }
  const int tt = live ? t : 0; const Head h = M.head[tt]; u64 sched = *(const u64*)(M.sched + (size_t)tt * 2); const u32 p0 = M.patch_off[tt], f0 = M.far_off[tt], f1 = M.far_off[tt + 1];
  const u64 lens_a = M.lens[(size_t)tt * 4 + (lane >> 4)], lens_b = M.lens[(size_t)tt * 4 + 2 + (lane >> 4)];
  // the first GR groups of a tile lie at a fixed stride, so the ring starts without waiting for the header
  const u8* src = nullptr; const u8* rag = nullptr; int len_a = 0, len_b = 0, gi = 0, slot = 0, nbulk = GR;
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");            // with programmatic launches the next kernel may begin its prologue
  u64 stream; asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(stream)); // the weights pass once: do not let them push tables and activations out
  auto fill = [&]() {                                                      // one group of 4 rows (warp-uniform)
    if (gi < nbulk) {  // the first GR groups are always whole
      const u32 dst = ring + slot * GB, b = bars + slot * 8, n = slot == 0 ? 2 * GB : GB, first = slot == 0;
      asm volatile("{ .reg .pred p, q; elect.sync _|p, 0xffffffff; setp.ne.and.u32 q,%4,0,p; @p mbarrier.arrive.expect_tx.shared.b64 _,[%2],%3;"
                   "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0],[%1],1024,[%2],%6;"
                   "@q cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%5],[%1],1024,[%2],%6; }" ::"r"(dst), "l"(src + gi * GB), "r"(b), "r"(n), "r"(first), "r"(dst + GR * GB), "l"(stream) : "memory");
    } else {
#pragma unroll 1
      for (int r = 0; r < GROWS * 2; r++) {
        const bool act = (r & 1 ? len_b : len_a) > GROWS * gi + (r >> 1); const u32 b = __ballot_sync(~0u, act);
        if (act) { const u8* s = rag + __popc(b & ((1u << lane) - 1)) * 4; const u32 d = ring + slot * GB + r * 128 + lane * 4; cp4(d, s); if (slot == 0) cp4(d + GR * GB, s); }
        rag += __popc(b) * 4;
      }
      commit();
    }
    gi++; slot = slot + 1 == GR ? 0 : slot + 1;
  };
  if (live) {
    if (lane == 0) { for (int i = 0; i < GR; i++) bar_init(bars + i * 8); asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
    src = M.words + (size_t)t * GR * GB;
    __syncwarp();
    fill(); fill();
  }
  asm volatile("griddepcontrol.wait;" ::: "memory");                         // weights above do not depend on the kernel before; activations do
  if (MODE == FUSED) {
    if (threadIdx.x == 0) { bulk(xs_b, (const u8*)A.frag + (size_t)seg0 * xbytes, xbytes * nseg, common); if (FLAT) bulk(inf_b, A.info + seg0 * S, S * nseg * 8, common); }
    if (!FLAT) for (int i = threadIdx.x; i < S * NT; i += blockDim.x) { int tk = i / S, s = i % S; cp8(inf_b + (s * NT + tk) * 8, A.info + (size_t)tk * (M.k / 128) + seg0 * S + s); }
  }
  commit();
  constexpr int PRE = 3; u32 pat[PRE]; const int npatch = h.meta >> 16;      // the first patches, on their way
#pragma unroll
  for (int i = 0; i < PRE; i++) pat[i] = live && lane + 32 * i < npatch ? __ldg(M.patches + p0 + lane + 32 * i) : ~0u << 16;
  wait_group<0>();
  __syncthreads();
  if (!live) return;
  bar_wait(common, 0);
  const int mr4 = h.meta & 0xffff; nbulk = mr4 / GROWS;
  len_a = mr4 + (int)((lens_a >> ((lane & 15) * 4)) & 15); len_b = mr4 + (int)((lens_b >> ((lane & 15) * 4)) & 15);
  rag = M.words + ((size_t)h.off32 * 32 - GR * GB) + nbulk * GB;
  const int g = lane >> 2, c = lane & 3;
  constexpr int NTL = (NT + 7) / 8, NY = NTL * (NT == 1 ? 1 : 2);
  i64 y0[NY] = {}, y1[NY] = {};                                             // rows g and g+8; batch 1: valid where c = 0
  // ---- while the ring fills: patches {nibbles, lane << 9 | quad}, spread over the lanes; sums meet in shared memory, 16 + 32 bits each, exactly
  const int8_t* xq = A.q + (size_t)seg * M.tc; const int2* info = A.info + (size_t)seg * S;
  if (MODE == FUSED) {
    u32* acc = (u32*)(sm + (ring - smb) + 2 * GB);                           // [token][32] in the two groups that are not asked for yet
    for (int tk = 0; tk < NT; tk++) acc[tk * 32 + lane] = 0;
    __syncwarp();
#pragma unroll 1
    for (int i = lane, k = 0; i < npatch; i += 32, k++) {
      const u32 v = (k == 0 ? pat[0] : k == 1 ? pat[1] : k == 2 ? pat[2] : __ldg(M.patches + p0 + i)) ^ 0x0808u, q = (v >> 16) & 511, pl_ = v >> 25, pc_ = pl_ & 3, h = (q & 1) * 16; // to two's complement
      const int vl = (int)(((v & 0x0f0fu) << 4) << h), vh = (int)((v & 0xf0f0u) << h), r = (pl_ >> 2) + (q & 2) * 4;
#pragma unroll 1
      for (int tk = 0; tk < NT; tk++) {
        const u32 xo = (xs_b - smb) + (FLAT ? (seg - seg0) * M.tc * 2 + ((q >> 3) * 8 + pc_) * 16 : (((q >> 3) * NTL + (tk >> 3)) * 32 + (tk & 7) * 4 + pc_) * 16) + ((q >> 2) & 1) * 4;
        const int d = __dp4a(vl, *(const int*)(sm + xo), __dp4a(vh, *(const int*)(sm + xo + 8), 0)) << R; // 16 * sum
        const i64 z = (i64)*(const int*)(sm + (inf_b - smb) + ((FLAT ? (seg - seg0) * S : 0) + (q >> 4)) * NT * 8 + tk * 8) * d;
        atomicAdd(acc + tk * 32 + r, (u32)z & 0xffffu); atomicAdd(acc + tk * 32 + 16 + r, (u32)(z >> 16));
      }
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < NY; j++) {
      const u32* a = acc + (FLAT ? 0 : (j >> 1) * 8 + c * 2 + (j & 1)) * 32;
      if (!FLAT || c == 0) { y0[j] = (i64)a[g] + (i64)(int)a[16 + g] * 65536; y1[j] = (i64)a[g + 8] + (i64)(int)a[24 + g] * 65536; }
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); __syncwarp();
  }
  fill(); fill();
  src = M.words + ((size_t)h.off32 * 32 - GR * GB);                           // what follows the first GR groups
  if (MODE == FUSED) {
    // ---- far symbols, very rare: {lane | weight << 5, delta of the whole symbol}; weight index = quad * 4 + i
#pragma unroll 1
    for (u32 f = f0; f < f1; f++) {
      const int2 e = M.far[f]; const int fl = e.x & 31, w = e.x >> 5, q = w >> 2, fc = fl & 3, fg = fl >> 2;
      const int col = (q >> 3) * 64 + ((q >> 2) & 1) * 32 + fc * 8 + (w & 7);
#pragma unroll
      for (int j = 0; j < NY; j++) {
        const int tk = FLAT ? 0 : (j >> 1) * 8 + c * 2 + (j & 1);
        if (fg == g && (!FLAT || c == 0)) {
          const i64 z = (i64)info[(size_t)tk * (M.k / 128) + (col >> 7)].x * (16ll * e.y * xq[(size_t)tk * M.k + col]);
          if (q & 2) y1[j] += z; else y0[j] += z; }
      }
    }
  }
  // ---- main loop
  const u32 mask = M.mask, lb = lane * 4 & M.lane_mask; // table at the start of sm
  const u32 ring_end = ring + GR * GB;
  int wslot = 0; u32 wpar = 0;
  auto arrived = [&]() { bar_wait(bars + wslot * 8, wpar); if (++wslot == GR) { wslot = 0; wpar ^= 1; } };
  arrived(); arrived();                                                     // superstep 0 needs no more than rows 0..7
  int got = 2;
  struct Stream { u32 lo, hi, nx, pos, sa; } st[2];                         // rows g and g+8; nx keeps the load off the chain
  for (int i = 0; i < 2; i++) { const u32 a = ring + i * 128 + lane * 4; st[i] = {ldsv(a), ldsv(a + 256), ldsv(a + 512), 0, a + 768}; }
  const u8* pl = M.planes + ((size_t)t * S) * 256 * R + lane * 8 * R;
  uint4 pw = {0, 0, 0, 0};
  if (R == 1) { uint2 v = *(const uint2*)pl; pw.x = v.x; pw.y = v.y; } if (R == 2) pw = *(const uint4*)pl;
  uint4* o4 = MODE == STORE4 ? out4 + ((size_t)t * S * 2) * 32 + lane : nullptr;
  const u32 xw = xs_b + (FLAT ? (seg - seg0) * M.tc * 2 + (lane & 7) * 16 : lane * 16), iw = inf_b + (FLAT ? (seg - seg0) * S * 8 : c * 16);
  const u32 one = M.one;                                                    // 1, unknown to the compiler: moves and adds as multiply-adds, off the integer pipe
  auto refill = [&](Stream& q, u32 np) { // predicated in PTX: the compiler would load into a temporary and move
    asm volatile("{ .reg .pred p; setp.ne.u32 p,%4,0; @p mad.lo.u32 %0,%1,%5,0; @p mad.lo.u32 %1,%2,%5,0; @p ld.shared.u32 %2,[%3]; @p mad.lo.u32 %3,%5,256,%3; }" : "+r"(q.lo), "+r"(q.hi), "+r"(q.nx), "+r"(q.sa) : "r"((np ^ q.pos) & 32), "r"(one));
    q.pos = np; };
  auto top_up = [&]() {                                                     // schedule: bit 0 ask for a group, bit 1 one more must have arrived
    if (sched & 2) { if (got < nbulk) arrived(); else wait_group<0>(); got++; }
    __syncwarp();
    if (sched & 1) fill();
    sched >>= 2;
    for (int i = 0; i < 2; i++) if (st[i].sa >= ring_end) st[i].sa -= GR * GB;
  };
  auto patch = [&](u32 v) { const u32 q = (v >> 16) & 511; *(uint16_t*)((u8*)(out4 + ((size_t)t * S * 2 + (q >> 3)) * 32 + (v >> 25)) + (q & 7) * 2) = (uint16_t)v; }; // same nibble order as a table entry
  uint4 xr = {};
#pragma unroll 1
  for (int s = 0; s < S; s++) {
    top_up();
    uint4 pc = pw;
    if (R > 0 && s + 1 < S) { pl += 256 * R; if (R == 1) { uint2 v = __ldg((const uint2*)pl); pw.x = v.x; pw.y = v.y; } else pw = __ldg((const uint4*)pl); }
    int al[NTL][4] = {}, ah[NTL][4] = {}, bl[NTL][4] = {}, bh[NTL][4] = {};
#pragma unroll
    for (int hb = 0; hb < 2; hb++) {
      u32 n[4];
#pragma unroll
      for (int u = 0; u < 4; u += 2) {                                       // both streams step together: two independent chains
        u32 w0[2], e0[2], w1[2], e1[2];
#pragma unroll
        for (int i = 0; i < 2; i++) { w0[i] = __funnelshift_r(st[i].lo, st[i].hi, st[i].pos); e0[i] = *(const u32*)(sm + ((w0[i] & mask) | lb)); }
#pragma unroll
        for (int i = 0; i < 2; i++) {
          w1[i] = __funnelshift_r(w0[i], 0u, e0[i]);
          e1[i] = *(const u32*)(sm + ((w1[i] & mask) | lb));
        }
#pragma unroll
        for (int i = 0; i < 2; i++) { refill(st[i], st[i].pos + e0[i] + e1[i]); n[u + i] = __byte_perm(e0[i], e1[i], 0x7632); }
      }
      if (MODE == FUSED && FLAT) // only columns 0 (lanes 0..3) and 1 (lanes 4..7) of B matter; the other lanes keep what they have
        asm volatile("{ .reg .pred p; setp.lt.u32 p,%4,8; @p ld.shared.v4.u32 {%0,%1,%2,%3},[%5]; }" : "+r"(xr.x), "+r"(xr.y), "+r"(xr.z), "+r"(xr.w) : "r"(lane), "r"(xw + (s * 2 + hb) * 128));
      if (MODE == STORE4) { *o4 = make_uint4(n[0], n[1], n[2], n[3]); o4 += 32; }
      else {
#pragma unroll
        for (int j = 0; j < NTL; j++) {
          const uint4 x = FLAT ? xr : lds128(xw + ((s * 2 + hb) * NTL + j) * 512);
          const u32 L = 0x0f0f0f0f, Hm = 0xf0f0f0f0;
          mma8(al[j], n[0] & L, n[1] & L, n[2] & L, n[3] & L, x.x, x.y);
          // batch 1: whole bytes 16*hi + lo against the high x; column 1 of the first product holds lo against the high x, to be taken off
          if (FLAT) mma8(ah[j], n[0], n[1], n[2], n[3], x.z, x.w); else mma8(ah[j], n[0] & Hm, n[1] & Hm, n[2] & Hm, n[3] & Hm, x.z, x.w);
          if (R == 1) {
            const u32 p = hb ? pc.y : pc.x, p4 = p >> 4;
            mma8(bl[j], p & 0x01010101, p & 0x02020202, p4 & 0x01010101, p4 & 0x02020202, x.x, x.y);
            mma8(bh[j], p & 0x04040404, p & 0x08080808, p4 & 0x04040404, p4 & 0x08080808, x.z, x.w);
          }
          if (R == 2) {
            const u32 p = hb ? pc.z : pc.x, q = hb ? pc.w : pc.y, p4 = p >> 4, q4 = q >> 4;
            mma8(bl[j], p & 0x03030303, p & 0x0c0c0c0c, p4 & 0x03030303, p4 & 0x0c0c0c0c, x.x, x.y);
            mma8(bl[j], q & 0x03030303, q & 0x0c0c0c0c, q4 & 0x03030303, q4 & 0x0c0c0c0c, x.z, x.w);
          }
        }
      }
    }
    if (MODE == STORE4) { // patches right behind the stores of their superstep, while those are in the L2
      __syncwarp();
#pragma unroll
      for (int i = 0; i < PRE; i++) if (((pat[i] >> 20) & 31) == (u32)s && lane + 32 * i < npatch) patch(pat[i]);
    }
    if (MODE == FUSED) {
      auto total = [&](int j, int i, int S128) {                            // i: element of the C fragment; 16 * isum
        int v = (al[j][i] * 16 + ah[j][i] - (FLAT ? al[j][i + 1] : 0) - S128) << R;
        if (R == 1) v += i < 2 ? 16 * bl[j][i] + 4 * bh[j][i] : 8 * bl[j][i] + 2 * bh[j][i];
        if (R == 2) v += i < 2 ? 16 * bl[j][i] : 4 * bl[j][i];
        return v;
      };
      if (FLAT) { int2 inf; asm("ld.shared.v2.u32 {%0,%1},[%2];" : "=r"(inf.x), "=r"(inf.y) : "r"(iw + s * 8)); y0[0] += (i64)inf.x * total(0, 0, inf.y); y1[0] += (i64)inf.x * total(0, 2, inf.y); }
      else {
#pragma unroll
        for (int j = 0; j < NTL; j++) {
          const uint4 v = lds128(iw + (s * NT + j * 8) * 8);
          y0[j * 2 % NY] += (i64)(int)v.x * total(j, 0, v.y); y0[(j * 2 + 1) % NY] += (i64)(int)v.z * total(j, 1, v.w);
          y1[j * 2 % NY] += (i64)(int)v.x * total(j, 2, v.y); y1[(j * 2 + 1) % NY] += (i64)(int)v.z * total(j, 3, v.w);
        }
      }
    }
  }
  if (MODE == STORE4) {
#pragma unroll 1
    for (int i = lane + 32 * PRE; i < npatch; i += 32) patch(M.patches[p0 + i]);
  }
  if (MODE == FUSED) {
    if (FLAT) {
      if (c == 0) { i64* p = part + (size_t)seg * M.n + rt * 16 + g; p[0] = y0[0]; p[8] = y1[0]; }
    } else {
#pragma unroll
      for (int j = 0; j < NY; j++) {
        const int tk = (j >> 1) * 8 + c * 2 + (j & 1);
        i64* p = part + ((size_t)tk * M.segs + seg) * M.n + rt * 16 + g; p[0] = y0[j]; p[8] = y1[j]; }
    }
  }
}

// Plain 4-bit GEMV over the same fragment layout: [tile][64 columns][lane] uint4. Also: the reader of the decoded form.
// U loads of 16 bytes per lane in flight while the previous U are multiplied; the first ones start before the wait for the kernel before.
template <int NT, int U>
__global__ void __launch_bounds__(128) plain4(const uint4* __restrict__ w4, Act A, i64* __restrict__ part, int row_tiles, int segs, int tc, int n, int k) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
  const int tile = blockIdx.x * 4 + warp; if (tile >= row_tiles * segs) return;
  const int seg = tile / row_tiles, rt = tile % row_tiles;
  constexpr int NTL = (NT + 7) / 8, NY = NTL * (NT == 1 ? 1 : 2);
  const uint4* p = w4 + (size_t)tile * (tc / 64) * 32 + lane;
  const uint4* xf = A.frag + (size_t)seg * tc / 64 * (NT == 1 ? 8 : 32 * NTL) + (NT == 1 ? c : lane);
  const int2* info = A.info + (size_t)seg * (tc / 128);
  i64 y0[NY] = {}, y1[NY] = {};
  uint4 nx[U];
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#pragma unroll
  for (int i = 0; i < U; i++) nx[i] = __ldcs(p + i * 32);
  asm volatile("griddepcontrol.wait;" ::: "memory");
#pragma unroll 1
  for (int b = 0; b < tc / 64; b += U) {
    uint4 v[U];
#pragma unroll
    for (int i = 0; i < U; i++) v[i] = nx[i];
    p += U * 32;
    if (b + U < tc / 64) {
#pragma unroll
      for (int i = 0; i < U; i++) nx[i] = __ldcs(p + i * 32);
    }
#pragma unroll
    for (int s = 0; s < U / 2; s++) {
      int al[NTL][4] = {}, ah[NTL][4] = {};
#pragma unroll
      for (int hb = 0; hb < 2; hb++)
#pragma unroll
        for (int j = 0; j < NTL; j++) {
          const uint4 a = v[s * 2 + hb]; const u32 L = 0x0f0f0f0f, Hm = 0xf0f0f0f0;
          const uint4 x = __ldg(xf + (size_t)(b + s * 2 + hb) * (NT == 1 ? 8 : 32 * NTL) + j * 32);
          mma8(al[j], a.x & L, a.y & L, a.z & L, a.w & L, x.x, x.y);
          mma8(ah[j], a.x & Hm, a.y & Hm, a.z & Hm, a.w & Hm, x.z, x.w);
        }
      const int ss = b / 2 + s;
      if (NT == 1) { const int2 f = __ldg(info + ss); y0[0] += (i64)f.x * (al[0][0] * 16 + ah[0][0] - f.y); y1[0] += (i64)f.x * (al[0][2] * 16 + ah[0][2] - f.y); }
      else
#pragma unroll
        for (int j = 0; j < NY; j++) {
          const int2 f = __ldg(info + (size_t)((j >> 1) * 8 + c * 2 + (j & 1)) * (k / 128) + ss);
          y0[j] += (i64)f.x * (al[j >> 1][j & 1] * 16 + ah[j >> 1][j & 1] - f.y); y1[j] += (i64)f.x * (al[j >> 1][2 + (j & 1)] * 16 + ah[j >> 1][2 + (j & 1)] - f.y);
        }
    }
  }
  if (NT == 1) { if (c == 0) { i64* o = part + (size_t)seg * n + rt * 16 + g; o[0] = y0[0]; o[8] = y1[0]; } }
  else
#pragma unroll
    for (int j = 0; j < NY; j++) { i64* o = part + ((size_t)((j >> 1) * 8 + c * 2 + (j & 1)) * segs + seg) * n + rt * 16 + g; o[0] = y0[j]; o[8] = y1[j]; }
}
__global__ void read_only(const uint4* __restrict__ p, size_t n, u32* o) {
  u32 s = 0; size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, st = (size_t)gridDim.x * blockDim.x;
  for (; i + 3 * st < n; i += 4 * st) { uint4 a = __ldcs(p + i), b = __ldcs(p + i + st), c = __ldcs(p + i + 2 * st), d = __ldcs(p + i + 3 * st); s ^= a.x ^ b.y ^ c.z ^ d.w ^ a.z; }
  if (s == 0x12345) o[0] = s;
}
// the prototype's plain 4-bit dp4a GEMV (pairhuff3.cu), kept as the yardstick: lane = row, 32 rows x 512 columns a warp, float sums
__global__ void __launch_bounds__(512) gemv4_dp4a(const uint4* __restrict__ w, const int8_t* __restrict__ x, const float* __restrict__ sc, float* __restrict__ y, int ntile, int segs) {
  constexpr int C = 512; int lane = threadIdx.x & 31, wpb = blockDim.x / 32;
  for (int t = blockIdx.x * wpb + threadIdx.x / 32; t < ntile; t += gridDim.x * wpb) {
    int seg = t % segs, rt = t / segs; const uint4* p = w + (size_t)t * (C / 32) * 32 + lane; const uint4* xp = (const uint4*)(x + seg * C); float acc = 0;
    for (int g = 0; g < C / 128; g++) { int ia = 0;
#pragma unroll
      for (int j = 0; j < 4; j++) { uint4 v = __ldg(p); p += 32; uint4 x0 = __ldg(xp++), x1 = __ldg(xp++); const u32 m = 0x0f0f0f0f;
        ia = __dp4a((int)(v.x & m), (int)x0.x, ia); ia = __dp4a((int)((v.x >> 4) & m), (int)x0.y, ia); ia = __dp4a((int)(v.y & m), (int)x0.z, ia); ia = __dp4a((int)((v.y >> 4) & m), (int)x0.w, ia);
        ia = __dp4a((int)(v.z & m), (int)x1.x, ia); ia = __dp4a((int)((v.z >> 4) & m), (int)x1.y, ia); ia = __dp4a((int)(v.w & m), (int)x1.z, ia); ia = __dp4a((int)((v.w >> 4) & m), (int)x1.w, ia); }
      acc += sc[seg * (C / 128) + g] * ia; }
    atomicAdd(&y[rt * 32 + lane], acc); }
}

// ------------------------------------------------------------------ host side: data, code construction, encoding, reference
static u64 seed0 = 88172645463325252ull;
struct Rng { u64 s; explicit Rng(u64 k) : s(seed0 ^ (k * 0x9E3779B97F4A7C15ull + 1)) { for (int i = 0; i < 8; i++) next(); }
  u64 next() { s ^= s << 13; s ^= s >> 7; s ^= s << 17; return s * 0x2545F4914F6CDD1Dull; } double uni() { return ((next() >> 11) + 0.5) * (1.0 / 9007199254740992.0); } };
static void parallel(int n, const std::function<void(int)>& f) { int T = std::max(1u, std::thread::hardware_concurrency()); if (getenv("NTHREADS")) T = atoi(getenv("NTHREADS")); std::vector<std::thread> v; for (int t = 0; t < T; t++) v.emplace_back([=, &f] { for (int i = t; i < n; i += T) f(i); }); for (auto& x : v) x.join(); }
static double entropy(const std::vector<double>& c) { double s = 0, h = 0; for (double v : c) s += v; for (double v : c) if (v > 0) h -= v / s * log2(v / s); return h; }
static double solve_step(double H) { double lo = 0.02, hi = 4; for (int it = 0; it < 60; it++) { double m = (lo + hi) / 2; std::vector<double> p; for (int k = -200; k <= 200; k++) p.push_back(0.5 * (erf((k + .5) * m / sqrt(2.)) - erf((k - .5) * m / sqrt(2.)))); (entropy(p) > H ? lo : hi) = m; } return lo; }

static std::vector<int> package_merge(const std::vector<double>& p, int W) { // lengths; p descending not required
  int n = p.size(); std::vector<int> o(n); std::iota(o.begin(), o.end(), 0); std::stable_sort(o.begin(), o.end(), [&](int a, int b) { return p[a] < p[b]; });
  std::vector<double> leaf(n); for (int i = 0; i < n; i++) leaf[i] = p[o[i]];
  std::vector<std::vector<char>> isl(W); std::vector<double> prev;
  for (int l = 0; l < W; l++) { std::vector<double> pk; for (size_t i = 0; i + 1 < prev.size(); i += 2) pk.push_back(prev[i] + prev[i + 1]); std::vector<double> mg; size_t a = 0, b = 0; while (a < leaf.size() || b < pk.size()) { if (b >= pk.size() || (a < leaf.size() && leaf[a] <= pk[b])) { mg.push_back(leaf[a++]); isl[l].push_back(1); } else { mg.push_back(pk[b++]); isl[l].push_back(0); } } prev.swap(mg); }
  std::vector<int> L(n, 0), r(n); size_t take = 2 * n - 2; for (int l = W - 1; l >= 0; l--) { int c = 0; for (size_t i = 0; i < take; i++) c += isl[l][i]; for (int i = 0; i < c; i++) L[i]++; take = 2 * (take - c); }
  for (int i = 0; i < n; i++) r[o[i]] = L[i]; return r; }

struct Book { int W; std::vector<u8> len; std::vector<uint16_t> code; std::vector<u32> lut; double bits; double pesc; int N; };
// key of a quad: nibbles n_i = h_i + 8, key = n0 | n1<<4 | n2<<8 | n3<<12
static Book make_book(const std::vector<double>& cnt, int W) {
  std::vector<int> o(65536); std::iota(o.begin(), o.end(), 0); std::stable_sort(o.begin(), o.end(), [&](int a, int b) { return cnt[a] > cnt[b]; });
  { int z = 0x8888; auto it = std::find(o.begin(), o.end(), z); std::rotate(o.begin(), it, it + 1); }
  double tot = 0; for (double c : cnt) tot += c; int nz = 0; for (double c : cnt) nz += c > 0;
  Book best; best.bits = 1e9;
  for (double b = 0.5; b < 5; b += 0.25) { int N = std::min(nz, std::max(2, (int)pow(2., W - b))); std::vector<double> p(N); double in = 0; for (int i = 0; i < N; i++) { p[i] = std::max(cnt[o[i]], 1e-3) / tot; in += cnt[o[i]] / tot; } double pe = 1 - in; p[0] += pe;
    auto L = package_merge(p, W); double bits = pe * 32; for (int i = 0; i < N; i++) bits += p[i] * L[i];
    if (bits < best.bits) { best.bits = bits; best.pesc = pe; best.N = N; best.len.assign(65536, 0); for (int i = 0; i < N; i++) best.len[o[i]] = L[i]; } }
  best.W = W; best.code.assign(65536, 0); best.lut.assign(1u << W, 0);
  std::vector<int> s; for (int i = 0; i < 65536; i++) if (best.len[i]) s.push_back(i); std::stable_sort(s.begin(), s.end(), [&](int a, int b) { return best.len[a] < best.len[b]; });
  // codes of one length are handed out in a scattered order: the first five bits of a code choose the bank, and should be equally likely
  for (size_t i = 0; i < s.size();) { size_t j = i; while (j < s.size() && best.len[s[j]] == best.len[s[i]]) j++; std::vector<int> v(s.begin() + i, s.begin() + j); std::sort(v.begin(), v.end(), [&](int a, int b) { return cnt[a] > cnt[b]; }); Rng r(j); for (size_t k = v.size(); k > 1; k--) std::swap(v[k - 1], v[r.next() % k]); std::copy(v.begin(), v.end(), s.begin() + i); i = j; }
  u32 c = 0; int pl = best.len[s[0]];
  for (int q : s) { int l = best.len[q]; c <<= l - pl; pl = l; u32 r = 0; for (int b = 0; b < l; b++) if (c >> b & 1) r |= 1u << (l - 1 - b); best.code[q] = r; c++;
    u32 sym = q ^ 0x8080; // odd positions to two's complement: h & 15 = n ^ 8
    for (u32 h = 0; h < (1u << (W - l)); h++) best.lut[r | (h << l)] = (sym << 16) | (u32)l; }
  return best; }

// programmatic: the next launch of the stream may begin (up to its griddepcontrol.wait) while this one drains
template <class... P, class... A2> static void launch(bool programmatic, void (*k)(P...), int grid, int block, size_t sm, A2... a) {
  cudaLaunchConfig_t c = {}; c.gridDim = dim3(grid); c.blockDim = dim3(block); c.dynamicSmemBytes = sm; cudaLaunchAttribute at; at.id = cudaLaunchAttributeProgrammaticStreamSerialization; at.val.programmaticStreamSerializationAllowed = 1; c.attrs = &at; c.numAttrs = programmatic; CK(cudaLaunchKernelEx(&c, k, P(a)...)); }
struct Dev { Mat m; size_t bytes; double bpw, code_bpw; int tiles; u8* blob = nullptr; size_t words_bytes; std::vector<void*> allocs; };
struct Data { int tc; int U; double H; std::vector<int16_t> q; double Hemp; };   // unique tiles: [U][16][tc]
static Data make_data(double H, int tc, int U) {
  Data d; d.tc = tc; d.U = U; d.H = H; double step = solve_step(H); d.q.resize((size_t)U * 16 * tc);
  parallel(U, [&](int u) { Rng r(1000 + u + (u64)(H * 1000)); for (size_t i = 0; i < (size_t)16 * tc; i += 2) { double a = sqrt(-2 * log(r.uni())), b = 6.283185307179586 * r.uni(); double z[2] = {a * cos(b), a * sin(b)}; for (int k = 0; k < 2; k++) { double v = z[k] / step; if ((r.next() >> 32) % 200000 == 0) v *= 100; d.q[(size_t)u * 16 * tc + i + k] = (int16_t)std::max(-30000., std::min(30000., rint(v))); } } });
  std::vector<double> c(65536); for (int16_t v : d.q) c[(uint16_t)v]++; d.Hemp = entropy(c); return d; }

struct Tile { std::vector<u32> words; u32 meta; u64 lens[4]; u64 sched = 0; std::vector<u32> patches; std::vector<u8> planes; std::vector<int2> far; u64 bits = 0; };
// columns of lane c in stream order: quad q -> row g + 8*((q>>1)&1), col (q>>3)*64 + ((q>>2)&1)*32 + c*8 + (q&1)*4
static Tile encode_tile(const int16_t* q, int tc, int R, const Book& B, int junk) {
  Tile T; int Q = tc / 8, S = tc / 128; T.planes.assign((size_t)S * 256 * R, 0);
  std::vector<std::vector<u32>> st(64); std::vector<std::vector<u32>> nr(64); // stream = lane + 32 * (row >= 8)
  for (int l = 0; l < 64; l++) { int g = (l & 31) >> 2, c = l & 3, rr = l >> 5; u64 buf = 0; int nb = junk; u64 total = 0; auto put = [&](u32 v, int n) { buf |= (u64)v << nb; nb += n; total += n; if (nb >= 32) { st[l].push_back((u32)buf); buf >>= 32; nb -= 32; } };
    nr[l].push_back(3);
    for (int z = 0; z < Q / 2; z++) { int k = (z >> 1) * 4 + rr * 2 + (z & 1), row = g + 8 * rr, col = (k >> 3) * 64 + ((k >> 2) & 1) * 32 + c * 8 + (k & 1) * 4; u32 key = 0;
      for (int i = 0; i < 4; i++) { int v = q[(size_t)row * tc + col + i], h = v >> R, hc = std::max(-8, std::min(7, h)), low = v & ((1 << R) - 1); key |= (u32)(hc + 8) << (4 * i);
        if (hc != h) T.far.push_back(make_int2((l & 31) | ((k * 4 + i) << 5), (h - hc) * (1 << R)));
        if (R) { // bit position in the plane words: block, kb, byte j = (k&1)*2 + i/2, half = i&1
          int blk = k >> 3, kb = (k >> 2) & 1, j = (k & 1) * 2 + (i >> 1), hf = i & 1; u8* p = &T.planes[((size_t)(blk >> 1) * 32 + (l & 31)) * 8 * R];
          if (R == 1) p[(blk & 1) * 4 + j] |= low << (hf * 2 + rr + 4 * kb); else p[((blk & 1) * 2 + hf) * 4 + j] |= low << (2 * rr + 4 * kb); } }
      if (!B.len[key]) { T.patches.push_back((key ^ 0x8080) | (u32)k << 16 | (u32)(l & 31) << 25); key = 0x8888; }
      put(B.code[key], B.len[key]); if (z % 8 == 7) nr[l].push_back(3 + total / 32); }
    if (nb) st[l].push_back((u32)buf); T.bits += total; }
  const int steps = S;
  int mx = 0, mn = 1 << 30; for (auto& v : st) { mx = std::max(mx, (int)v.size()); mn = std::min(mn, (int)v.size()); } int mr4 = mn / 4 * 4; if (mx - mr4 > 15) mr4 = (mx - 15 + 3) / 4 * 4; mr4 = std::max(mr4, GR * GROWS); mx = std::max(mx, mr4);
  for (int l = 0; l < 64; l++) while ((int)st[l].size() < mr4) st[l].push_back(0);
  for (u64& v : T.lens) v = 0; for (int l = 0; l < 64; l++) T.lens[l >> 4] |= (u64)(st[l].size() - mr4) << ((l & 15) * 4);
  for (int r = 0; r < mx; r++) for (int l = 0; l < 64; l++) if (r < (int)st[l].size()) T.words.push_back(st[l][r]);
  while (T.words.size() % 8) T.words.push_back(0);
  T.meta = mr4 | (u32)T.patches.size() << 16; if (S > 32 || T.patches.size() > 65535) { printf("tile too small or too large\n"); exit(1); }
  int groups = (mx + GROWS - 1) / GROWS, issued = GR, got = 2;
  for (int s = 0; s < steps; s++) { // superstep s: wait for one more group if it is needed, then ask for one if its place is free
    int need = 0; for (int l = 0; l < 64; l++) need = std::max(need, std::min((int)nr[l][s + 1], (int)st[l].size())); need = (need + GROWS - 1) / GROWS;
    if (need > got) { T.sched |= 2ull << (2 * s); got++; } if (need > got || got > issued) { printf("ring too small at superstep %d: need %d have %d issued %d\n", s, need, got, issued); exit(1); }
    if (issued < groups) { int last = GROWS * (issued - GR) + GROWS - 1; bool ok = true; for (int l = 0; l < 64; l++) ok = ok && (int)nr[l][s] > std::min(last, (int)st[l].size() - 1); if (ok) { T.sched |= 1ull << (2 * s); issued++; } } }
  return T; }

static Dev encode_matrix(const Data& D, int N, int K, int R, int W, int LR, double* stats) {
  Dev dv; int tc = D.tc, S = tc / 128;
  std::vector<double> cnt(65536); { std::vector<std::vector<double>> part(16, std::vector<double>(65536)); parallel(16, [&](int th) { for (int u = th; u < D.U; u += 16) for (size_t i = 0; i < (size_t)16 * tc; i += 4) { const int16_t* q = &D.q[(size_t)u * 16 * tc + i]; u32 key = 0; for (int k = 0; k < 4; k++) key |= (u32)(std::max(-8, std::min(7, q[k] >> R)) + 8) << (4 * k); part[th][key]++; } }); for (auto& p : part) for (int i = 0; i < 65536; i++) cnt[i] += p[i]; }
  Book B = make_book(cnt, W); int junk = 2 + LR;
  std::vector<Tile> tu(D.U); parallel(D.U, [&](int u) { tu[u] = encode_tile(&D.q[(size_t)u * 16 * tc], tc, R, B, junk); });
  int rtl = N / 16, segs = K / tc, nt = rtl * segs; std::vector<Head> head(nt); std::vector<u64> lens(nt * 4); std::vector<u64> sched(nt); std::vector<u32> fo(nt + 1), po(nt + 1), patches; std::vector<int2> far; const size_t first = GR * GB / 4; size_t off = first * nt;
  for (int t = 0; t < nt; t++) { Tile& T = tu[t % D.U]; head[t] = {(u32)(off / 8), T.meta}; std::copy(T.lens, T.lens + 4, lens.begin() + t * 4); sched[t] = T.sched; po[t] = patches.size(); patches.insert(patches.end(), T.patches.begin(), T.patches.end()); fo[t] = far.size(); far.insert(far.end(), T.far.begin(), T.far.end()); off += T.words.size() - first; } fo[nt] = far.size(); po[nt] = patches.size();
  std::vector<u32> words(off); { size_t o = first * nt; std::vector<size_t> os(nt); for (int t = 0; t < nt; t++) { os[t] = o; o += tu[t % D.U].words.size() - first; } parallel(nt, [&](int t) { auto& w = tu[t % D.U].words; std::copy(w.begin(), w.begin() + first, words.begin() + t * first); std::copy(w.begin() + first, w.end(), words.begin() + os[t]); }); }
  std::vector<u8> planes((size_t)nt * S * 256 * R + 16); if (R) parallel(nt, [&](int t) { auto& p = tu[t % D.U].planes; std::copy(p.begin(), p.end(), planes.begin() + (size_t)t * p.size()); });
  std::vector<u32> tab((size_t)1 << (W + LR)); for (size_t i = 0; i < tab.size(); i++) tab[i] = B.lut[i >> LR];
  auto up = [&](const void* p, size_t n) { void* d; CK(cudaMalloc(&d, std::max<size_t>(n, 16))); if (n) CK(cudaMemcpy(d, p, n, cudaMemcpyHostToDevice)); dv.allocs.push_back(d); return d; };
  if (far.empty()) far.push_back(make_int2(0, 0));
  size_t nw = (size_t)N * K; dv.words_bytes = off * 4; size_t side = head.size() * 8 + lens.size() * 8 + nt * 2 /* supersteps used: 2 bits each */ * ((S + 7) / 8) + fo.size() * 4 + fo[nt] * 8 + po.size() * 4 + patches.size() * 4 + (4u << W);
  dv.bytes = dv.words_bytes + side + (R ? planes.size() - 16 : 0); dv.bpw = dv.bytes * 8.0 / nw; dv.code_bpw = B.bits / 4 + R; dv.tiles = nt;
  size_t gap = (dv.words_bytes + 255) / 256 * 256; int copies = std::max<size_t>(2, (size_t)350e6 / (gap + planes.size()) + 1);
  Mat& m = dv.m; u8* wd; CK(cudaMalloc(&wd, gap * copies)); for (int i = 0; i < copies; i++) CK(cudaMemcpy(wd + gap * i, words.data(), dv.words_bytes, cudaMemcpyHostToDevice)); dv.allocs.push_back(wd);
  u8* pd; CK(cudaMalloc(&pd, planes.size() * copies)); if (R) for (int i = 0; i < copies; i++) CK(cudaMemcpy(pd + (planes.size() - 16) * i, planes.data(), planes.size() - 16, cudaMemcpyHostToDevice)); dv.allocs.push_back(pd);
  m = {wd, (Head*)up(head.data(), head.size() * 8), (u64*)up(lens.data(), lens.size() * 8), (u32*)up(sched.data(), sched.size() * 8), (u32*)up(fo.data(), fo.size() * 4), (int2*)up(far.data(), far.size() * 8), (u32*)up(po.data(), po.size() * 4), (u32*)up(patches.data(), patches.size() * 4), pd, (u32*)up(tab.data(), tab.size() * 4), (u32)tab.size() * 4, ((1u << W) - 1) << junk, ((1u << LR) - 1) * 4, junk, rtl, segs, tc, N, K, 1, 1, (u32)(((1ull << 32) + rtl - 1) / rtl)};
  stats[0] = copies; stats[1] = gap; stats[2] = planes.size() - 16; stats[3] = B.pesc; stats[4] = B.N; stats[5] = fo[nt]; return dv; }
static void release(Dev& d) { for (void* p : d.allocs) CK(cudaFree(p)); }

struct Acts { std::vector<int8_t> q; std::vector<int2> info; int NT, K; Act d; std::vector<void*> a; };
static Acts make_acts(int NT, int K, u64 seed) { Acts A; A.NT = NT; A.K = K; A.q.resize((size_t)NT * K); A.info.resize((size_t)NT * K / 128); Rng r(seed); for (auto& v : A.q) v = (int8_t)((int)(r.next() % 255) - 127);
  for (int t = 0; t < NT; t++) for (int s = 0; s < K / 128; s++) { int e = 0; for (int i = 0; i < 128; i += 2) e += A.q[(size_t)t * K + s * 128 + i]; A.info[(size_t)t * (K / 128) + s] = make_int2(1 + r.next() % 4095, 128 * e); }
  // even columns are the low nibbles. fragment of a block of 64: lane (n = token, c): b0,b1 = low nibbles' x of kb 0,1; then high ones
  int NTL = (NT + 7) / 8, LW = NT == 1 ? 8 : 32; std::vector<u32> fr((size_t)K / 64 * NTL * LW * 4); // batch 1: lanes 4..7 = column 1 = the high words first
  for (int b = 0; b < K / 64; b++) for (int j = 0; j < NTL; j++) for (int l = 0; l < LW; l++) { int c = l & 3, tk = NT == 1 ? 0 : j * 8 + (l >> 2); for (int w = 0; w < 4; w++) { int hf = NT == 1 && l >= 4 ? 1 : w >> 1, kb = w & 1; u32 v = 0; for (int k = 0; k < 4; k++) v |= (u32)(u8)A.q[(size_t)tk * K + b * 64 + kb * 32 + c * 8 + 2 * k + hf] << (8 * k); fr[(((size_t)b * NTL + j) * LW + l) * 4 + w] = v; } }
  auto up = [&](const void* p, size_t n) { void* d; CK(cudaMalloc(&d, n)); CK(cudaMemcpy(d, p, n, cudaMemcpyHostToDevice)); A.a.push_back(d); return d; };
  A.d = {(uint4*)up(fr.data(), fr.size() * 4), (int8_t*)up(A.q.data(), A.q.size()), (int2*)up(A.info.data(), A.info.size() * 8)}; return A; }
static void release(Acts& A) { for (void* p : A.a) CK(cudaFree(p)); }

static std::vector<i64> reference(const Data& D, const Acts& A, int N, int K) { // [token][N], 16x
  int rtl = N / 16, segs = K / D.tc; std::vector<i64> y((size_t)A.NT * N, 0);
  parallel(rtl, [&](int rt) { for (int tk = 0; tk < A.NT; tk++) for (int r = 0; r < 16; r++) { i64 a = 0; for (int sg = 0; sg < segs; sg++) { int t = sg * rtl + rt; const int16_t* q = &D.q[((size_t)(t % D.U) * 16 + r) * D.tc]; for (int s = 0; s < D.tc / 128; s++) { i64 is = 0; const int8_t* x = &A.q[(size_t)tk * K + sg * D.tc + s * 128]; for (int i = 0; i < 128; i++) is += (int)q[s * 128 + i] * x[i]; a += is * A.info[(size_t)tk * (K / 128) + (sg * D.tc) / 128 + s].x; } } y[(size_t)tk * N + rt * 16 + r] = 16 * a; } });
  return y; }

static int fails = 0;
static float median_ms(const std::function<void(int)>& f, int reps = 15, int inner = 6) { cudaEvent_t a, b; CK(cudaEventCreate(&a)); CK(cudaEventCreate(&b)); for (int i = 0; i < 3; i++) f(i); CK(cudaDeviceSynchronize()); std::vector<float> ts; for (int r = 0; r < reps; r++) { CK(cudaEventRecord(a)); for (int i = 0; i < inner; i++) f(r * inner + i); CK(cudaEventRecord(b)); CK(cudaEventSynchronize(b)); float ms; CK(cudaEventElapsedTime(&ms, a, b)); ts.push_back(ms / inner); } CK(cudaGetLastError()); CK(cudaEventDestroy(a)); CK(cudaEventDestroy(b)); std::sort(ts.begin(), ts.end()); return ts[reps / 2]; }
static void row(const char* name, int N, int K, double ms, double bytes, const std::string& note) { printf("%-34s %5dx%-5d %8.4f ms %6.2f Tw/s %5.2f TB/s  %s\n", name, N, K, ms, (double)N * K / ms / 1e9, bytes / ms / 1e9, note.c_str()); fflush(stdout); }
static std::string check(const std::vector<i64>& ref, const i64* dpart, int NT, int segs, int N) { std::vector<i64> p((size_t)NT * segs * N); CK(cudaMemcpy(p.data(), dpart, p.size() * 8, cudaMemcpyDeviceToHost)); size_t bad = 0; for (int t = 0; t < NT; t++) for (int i = 0; i < N; i++) { i64 s = 0; for (int g = 0; g < segs; g++) s += p[((size_t)t * segs + g) * N + i]; bad += s != ref[(size_t)t * N + i]; } if (bad) { fails++; return "WRONG " + std::to_string(bad) + "/" + std::to_string((size_t)NT * N); } return "exact"; }

template <int R, int NT> static void time_fused(const char* tag, const Dev& d, const double* st, const Acts& A, const std::vector<i64>& ref, int wpb, bool bulk) {
  Mat m = d.m; auto kf = quad<R, NT, FUSED>; const size_t rings = 128 + ((wpb * 64 + 127) & ~127) + (size_t)wpb * RINGB; const int ns = NT > 1 || m.row_tiles % wpb == 0 ? 1 : 2; m.block_segs = ns; size_t sm = m.table_bytes + (size_t)m.tc * (NT == 1 ? 2 : NT) * ns + (((size_t)m.tc / 128 * 8 * NT * ns + 127) & ~127ull) + rings; char nm[96];
  snprintf(nm, 96, "%s NT%d wpb%d", tag, NT, wpb);
  int optin; CK(cudaDeviceGetAttribute(&optin, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0)); if (sm > (size_t)optin) { printf("%-34s needs %zu bytes of shared memory\n", nm, sm); return; }
  CK(cudaFuncSetAttribute(kf, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)sm)); int grid = NT == 1 ? (m.segs * m.row_tiles + wpb - 1) / wpb : m.segs * ((m.row_tiles + wpb - 1) / wpb);
  i64* part; size_t pn = (size_t)NT * m.segs * m.n; CK(cudaMalloc(&part, pn * 8)); CK(cudaMemset(part, 0xAB, pn * 8));
  int copies = (int)st[0]; bool pdl = false; auto go = [&](int i) { Mat x = m; x.words += (size_t)st[1] * (i % copies); x.planes += (size_t)st[2] * (i % copies); launch(pdl, kf, grid, wpb * 32, sm, x, A.d, part, (uint4*)nullptr); };
  go(0); cudaError_t e = cudaDeviceSynchronize(); if (e != cudaSuccess) { printf("%s failed: %s\n", nm, cudaGetErrorString(e)); exit(1); }
  std::string ok = check(ref, part, NT, m.segs, m.n); float ms = median_ms(go); char b[160]; snprintf(b, 160, "%s  %.4f b/w all (H %+.2f%%) grid %d smem %zuK", ok.c_str(), d.bpw, (d.bpw / st[6] - 1) * 100, grid, sm >> 10); row(nm, m.n, m.k, ms, d.bytes, b); pdl = true; CK(cudaMemset(part, 0xAB, pn * 8)); ms = median_ms(go); snprintf(nm + strlen(nm), 8, " pdl"); row(nm, m.n, m.k, ms, d.bytes, check(ref, part, NT, m.segs, m.n)); pdl = false; CK(cudaFree(part));
  if (bulk && R == 0) { auto kb = quad<R, 1, STORE4>; size_t sb = m.table_bytes + rings; CK(cudaFuncSetAttribute(kb, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)sb)); uint4* o; size_t on = (size_t)m.n * m.k / 2; CK(cudaMalloc(&o, on)); CK(cudaMemset(o, 0xAB, on)); i64* p2; CK(cudaMalloc(&p2, (size_t)m.segs * m.n * 8)); CK(cudaMemset(p2, 0xAB, (size_t)m.segs * m.n * 8));
    auto gb = [&](int i) { Mat x = m; x.words += (size_t)st[1] * (i % copies); launch(pdl, kb, grid, wpb * 32, sb, x, A.d, (i64*)nullptr, o); }; gb(0); CK(cudaDeviceSynchronize());
    float mb = median_ms(gb); // checked through the plain kernel, far symbols excepted (they exist in the fused check)
    snprintf(nm, 96, "%s bulk decode to 4 bits", tag); std::string okb = "unchecked (tokens > 1)";
    if (NT == 1) { plain4<1, 4><<<(m.row_tiles * m.segs + 3) / 4, 128>>>(o, A.d, p2, m.row_tiles, m.segs, m.tc, m.n, m.k); CK(cudaDeviceSynchronize()); std::vector<i64> p((size_t)m.segs * m.n); CK(cudaMemcpy(p.data(), p2, p.size() * 8, cudaMemcpyDeviceToHost)); size_t bad = 0; for (int i = 0; i < m.n; i++) { i64 s = 0; for (int g2 = 0; g2 < m.segs; g2++) s += p[(size_t)g2 * m.n + i]; bad += s != ref[i]; } okb = std::to_string(bad) + " rows differ (rows with far symbols: <= " + std::to_string((long)st[5]) + ")"; if (bad > (size_t)st[5]) { fails++; okb = "WRONG " + okb; } }
    row(nm, m.n, m.k, mb, d.bytes + on, okb); CK(cudaFree(o)); CK(cudaFree(p2)); } }

template <int NT, int U = 4> static void time_plain(int N, int K, int tc, bool extra = false) { // random nibbles, checked against a host sum on 64 rows
  Acts A = make_acts(NT, K, 77); size_t nb = (size_t)N * K / 2; int copies = (int)(400e6 / nb) + 1; uint4* w; CK(cudaMalloc(&w, nb * copies)); std::vector<u64> h(nb / 8); parallel(16, [&](int t) { Rng r(5 + t); for (size_t i = t; i < h.size(); i += 16) h[i] = r.next(); }); for (int i = 0; i < copies; i++) CK(cudaMemcpy((u8*)w + nb * i, h.data(), nb, cudaMemcpyHostToDevice));
  int rtl = N / 16, segs = K / tc; i64* part; CK(cudaMalloc(&part, (size_t)NT * segs * N * 8)); CK(cudaMemset(part, 0xAB, (size_t)NT * segs * N * 8));
  bool pdl = false; auto go = [&](int i) { launch(pdl, plain4<NT, U>, (rtl * segs + 3) / 4, 128, 0, w + nb / 16 * (i % copies), A.d, part, rtl, segs, tc, N, K); };
  go(0); CK(cudaDeviceSynchronize()); std::vector<i64> ref((size_t)NT * N);
  parallel(rtl, [&](int rt) { for (int tk = 0; tk < NT; tk++) for (int r = 0; r < 16; r++) { i64 a = 0; for (int sg = 0; sg < segs; sg++) { const u32* p = (const u32*)h.data() + (size_t)(sg * rtl + rt) * (tc / 64) * 128; for (int b = 0; b < tc / 64; b++) { int is = 0; for (int kb = 0; kb < 2; kb++) for (int c = 0; c < 4; c++) { u32 v = p[(b * 32 + (r & 7) * 4 + c) * 4 + (r >> 3) + 2 * kb]; for (int k = 0; k < 8; k++) { int nib = v >> (4 * k) & 15; int s = k & 1 ? (nib ^ 8) - 8 : nib - 8; is += s * A.q[(size_t)tk * K + sg * tc + b * 64 + kb * 32 + c * 8 + k]; } } a += (i64)is * A.info[(size_t)tk * (K / 128) + (sg * tc + b * 64) / 128].x; } } ref[(size_t)tk * N + rt * 16 + r] = 16 * a; } });
  std::string ok = check(ref, part, NT, segs, N); char nm[64]; snprintf(nm, 64, "plain 4-bit mma NT%d tc%d U%d", NT, tc, U); row(nm, N, K, median_ms(go), nb, ok); pdl = true; CK(cudaMemset(part, 0xAB, (size_t)NT * segs * N * 8)); double mp = median_ms(go); strcat(nm, " pdl"); row(nm, N, K, mp, nb, check(ref, part, NT, segs, N)); if (extra) {
  if (NT == 1) { u32* o; CK(cudaMalloc(&o, 4)); row("read 4-bit bytes only", N, K, median_ms([&](int i) { read_only<<<132 * 8, 512>>>(w + nb / 16 * (i % copies), nb / 16, o); }), nb, ""); CK(cudaFree(o));
    std::vector<float> sc(K / 128, 0.01f); float *ds, *y; CK(cudaMalloc(&ds, sc.size() * 4)); CK(cudaMemcpy(ds, sc.data(), sc.size() * 4, cudaMemcpyHostToDevice)); CK(cudaMalloc(&y, N * 4)); row("plain 4-bit dp4a (prototype)", N, K, median_ms([&](int i) { gemv4_dp4a<<<132 * 8, 128>>>(w + nb / 16 * (i % copies), A.d.q, ds, y, N / 32 * (K / 512), K / 512); }), nb, "yardstick"); CK(cudaFree(ds)); CK(cudaFree(y)); } }
  CK(cudaFree(w)); CK(cudaFree(part)); release(A); }

template <int R> static void run(double H, int N, int K, int tc, int W, int LR, int U, std::vector<int> wpbs, bool bulk, bool multi, const Data& D) {
  double st[8]; Dev d = encode_matrix(D, N, K, R, W, LR, st); st[6] = D.Hemp; char tag[64]; snprintf(tag, 64, "quad H%.2f r%d W%d x%d", H, R, W, 1 << LR);
  printf("# %s tc%d: entropy of the sample %.4f, code %.4f b/w, %d quads, patches %.3f%% of quads, far %d, copies %d\n", tag, tc, D.Hemp, d.code_bpw, (int)st[4], st[3] * 100, (int)st[5], (int)st[0]);
  { Acts A = make_acts(1, K, 3 + W); auto ref = reference(D, A, N, K); for (int w : wpbs) time_fused<R, 1>(tag, d, st, A, ref, w, bulk && w == wpbs[0]); release(A); }
  if (multi && W == 13) { { Acts A = make_acts(8, K, 4 + W); auto ref = reference(D, A, N, K); time_fused<R, 8>(tag, d, st, A, ref, wpbs[0], false); release(A); } if (tc <= 2048) { Acts A = make_acts(16, K, 5 + W); auto ref = reference(D, A, N, K); time_fused<R, 16>(tag, d, st, A, ref, wpbs[0], false); release(A); } }
  release(d); }

int main(int argc, char** argv) {
  std::string what = argc > 1 ? argv[1] : "all"; if (getenv("SEED")) seed0 ^= strtoull(getenv("SEED"), 0, 10) * 0x9E3779B97F4A7C15ull; else seed0 ^= (u64)time(nullptr) * 0x9E3779B97F4A7C15ull;
  if (what == "encode") { for (double H : {2.25, 3.0, 3.7}) for (int W : {12, 13, 14}) { int R = H > 3.5 ? 2 : H > 2.6; Data D = make_data(H, 4096, 8); std::vector<double> cnt(65536); for (size_t i = 0; i < D.q.size(); i += 4) { u32 key = 0; for (int k = 0; k < 4; k++) key |= (u32)(std::max(-8, std::min(7, D.q[i + k] >> R)) + 8) << (4 * k); cnt[key]++; } Book B = make_book(cnt, W); size_t words = 0; u64 bits = 0; for (int u = 0; u < D.U; u++) { Tile T = encode_tile(&D.q[(size_t)u * 16 * 4096], 4096, R, B, 2); words += T.words.size() + T.patches.size(); bits += T.bits; } double w = D.q.size(); printf("H %.2f emp %.4f R %d W %d: code %.4f stream %.4f words %.4f +hdr %.4f (%+.2f%%) N %d esc %.4f\n", H, D.Hemp, R, W, B.bits / 4 + R, bits / w + R, words * 32 / w + R, words * 32 / w + R + 60 * 8 / 65536., ((words * 32 / w + R + 60 * 8 / 65536.) / D.Hemp - 1) * 100, B.N, B.pesc); } return 0; }
  cudaDeviceProp pr; CK(cudaGetDeviceProperties(&pr, 0)); printf("# %s, %d multiprocessors, %zu KB shared memory per block\n", pr.name, pr.multiProcessorCount, pr.sharedMemPerBlockOptin >> 10);
  int U = getenv("UNIQ") ? atoi(getenv("UNIQ")) : 251;
  if (what == "smoke") { Data D = make_data(2.25, 1024, 61); run<0>(2.25, 1024, 4096, 1024, 13, 0, 61, {28, 16}, true, true, D); Data E = make_data(3.0, 1024, 61); run<1>(3.0, 1024, 4096, 1024, 13, 0, 61, {28}, false, false, E); run<2>(3.7, 1024, 4096, 1024, 12, 2, 61, {28}, false, false, make_data(3.7, 1024, 61)); time_plain<1>(1024, 4096, 1024, true); printf("%s\n", fails ? "FAILED" : "all exact"); return fails != 0; }
  if (what == "plain") { for (int tc : {1024, 2048, 4096}) { time_plain<1, 2>(28672, 8192, tc, tc == 1024); time_plain<1, 4>(28672, 8192, tc); time_plain<1, 2>(14336, 4096, tc / 2, tc == 1024); time_plain<1, 4>(14336, 4096, tc / 2); } return fails != 0; }
  if (what == "one") { Data D = make_data(2.25, 4096, U); run<0>(2.25, 28672, 8192, 4096, atoi(argv[2]), atoi(argv[3]), U, {atoi(argv[4])}, false, false, D); return 0; }
  time_plain<1>(28672, 8192, 2048, true); time_plain<1>(8192, 28672, 2048, true); time_plain<1>(14336, 4096, 1024, true); time_plain<8>(28672, 8192, 2048); time_plain<16>(28672, 8192, 2048);
  { Data D = make_data(2.25, 4096, U); run<0>(2.25, 28672, 8192, 4096, 14, 0, U, {28}, true, false, D); run<0>(2.25, 28672, 8192, 4096, 13, 0, U, {28, 14}, true, true, D); run<0>(2.25, 8192, 28672, 4096, 14, 0, U, {28}, true, false, D); }
  { Data D = make_data(2.25, 2048, U); run<0>(2.25, 14336, 4096, 2048, 14, 0, U, {14}, true, false, D); run<0>(2.25, 28672, 8192, 2048, 13, 0, U, {28}, false, true, D); }
  { Data D = make_data(2.25, 1024, U); run<0>(2.25, 14336, 4096, 1024, 14, 0, U, {28}, true, false, D); }
  { Data D = make_data(2.0, 4096, U); run<0>(2.0, 28672, 8192, 4096, 14, 0, U, {28}, false, false, D); }
  { Data D = make_data(2.5, 4096, U); run<0>(2.5, 28672, 8192, 4096, 14, 0, U, {28}, false, false, D); }
  { Data D = make_data(3.0, 4096, U); run<1>(3.0, 28672, 8192, 4096, 14, 0, U, {28}, false, false, D); run<1>(3.0, 8192, 28672, 4096, 14, 0, U, {28}, false, false, D); }
  { Data D = make_data(3.7, 4096, U); run<2>(3.7, 28672, 8192, 4096, 13, 0, U, {28}, false, false, D); run<2>(3.7, 8192, 28672, 4096, 13, 0, U, {28}, false, false, D); run<1>(3.7, 28672, 8192, 4096, 14, 0, U, {28}, false, false, D); }
  printf("%s\n", fails ? "FAILED" : "all exact"); return fails != 0;
}
