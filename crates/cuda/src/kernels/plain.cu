// plain: products with the decoded form, 4 + R bits a weight.
//
// Computes what quad.cu computes, to the bit.
//
// Layout.  (segments, row tiles, blocks of 64 columns, lanes) of 16 bytes: the words that quad.cu's main loop decodes, so that its
// bulk decoder writes this layout directly; R raw low bits as planes and far symbols as in the quad layout.
// A warp takes a tile, or with `split` > 1 a run of its columns; four warps a block.  Each lane has U loads of 16 bytes in flight while the
// previous U are multiplied; the first ones start before the wait for the kernel before.
//
// Needs sm_80.  Cost: bound by reading the weights (0.82 of the read bandwidth of an H200 at one token and 28672x8192, 0.87 with
// programmatic launches; launch and ramp dominate small matrices).  Measured: bench/RESULTS.md, "CUDA".

template <int R, int NT, int U>
__device__ __forceinline__ void plain(const Plain& M, const Act& A, i64* __restrict__ sums) {
  __shared__ u64 far_sums[4][NT * TILE_ROWS];
  constexpr int NTL = (NT + 7) / 8, NY = NTL * (NT == 1 ? 1 : 2), LANES = NT == 1 ? 8 : 32 * NTL;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, c = lane & 3;
  const int task = blockIdx.x * (blockDim.x >> 5) + warp;
  if (task >= M.row_tiles * M.segs * M.split) return;
  const int p = task / M.row_tiles, row_tile = task - p * M.row_tiles; // p: (segment, run of columns)
  const int seg = p / M.split, run = p - seg * M.split, tile = seg * M.row_tiles + row_tile;
  const int blocks = M.tc / 64 / M.split; // even
  const uint4* w = M.nibbles + ((size_t)tile * (M.tc / 64) + run * blocks) * 32 + lane;
  const size_t first_block = (size_t)seg * (M.tc / 64) + run * blocks;
  const uint4* x = A.frag + first_block * LANES + (NT == 1 ? c : lane);
  const int2* info = A.info + first_block / 2;
  const u8* plane = M.planes + ((size_t)tile * (M.tc / SUPERSTEP) + run * blocks / 2) * 256 * R + lane * 8 * R;
  i64 y0[NY] = {}, y1[NY] = {};
  uint4 next[U], next_low[R ? U / 2 : 1];
  auto load = [&](int b) { // blocks b.. of 64 columns; those beyond the run are not used
#pragma unroll
    for (int i = 0; i < U; i++) if (b + i < blocks) next[i] = __ldcs(w + (size_t)(b + i) * 32);
    if (R > 0) {
#pragma unroll
      for (int i = 0; i < U / 2; i++)
        if (b / 2 + i < blocks / 2) {
          if (R == 1) { const uint2 v = __ldcs((const uint2*)(plane + (size_t)(b / 2 + i) * 256)); next_low[i].x = v.x; next_low[i].y = v.y; }
          else next_low[i] = __ldcs((const uint4*)(plane + (size_t)(b / 2 + i) * 512));
        }
    }
  };
  launch_dependents();
  load(0);
  const u32 first_far = run == 0 ? __ldg(M.far_off + tile) : 0, end_far = run == 0 ? __ldg(M.far_off + tile + 1) : 0;
  wait_for_kernel_before();
  add_far<NT>(first_far, end_far, M.far, OfSegment(A, seg, M.tc, M.k), far_sums[warp], y0, y1);
#pragma unroll 1
  for (int b = 0; b < blocks; b += U) {
    uint4 v[U], low[R ? U / 2 : 1];
#pragma unroll
    for (int i = 0; i < U; i++) v[i] = next[i];
    if (R > 0) {
#pragma unroll
      for (int i = 0; i < U / 2; i++) low[i] = next_low[i];
    }
    load(b + U);
#pragma unroll
    for (int s = 0; s < U / 2; s++) {
      if (b + s * 2 >= blocks) break;
      int al[NTL][4] = {}, ah[NTL][4] = {}, bl[NTL][4] = {}, bh[NTL][4] = {};
#pragma unroll
      for (int hb = 0; hb < 2; hb++) {
        const uint4 a = v[s * 2 + hb];
        const u32 L = 0x0f0f0f0f, H = 0xf0f0f0f0;
#pragma unroll
        for (int j = 0; j < NTL; j++) {
          const uint4 f = __ldg(x + (size_t)(b + s * 2 + hb) * LANES + j * 32);
          mma(al[j], a.x & L, a.y & L, a.z & L, a.w & L, f.x, f.y);
          mma(ah[j], a.x & H, a.y & H, a.z & H, a.w & H, f.z, f.w);
          if (R == 1) {
            const u32 q = hb ? low[s].y : low[s].x, q4 = q >> 4;
            mma(bl[j], q & 0x01010101, q & 0x02020202, q4 & 0x01010101, q4 & 0x02020202, f.x, f.y);
            mma(bh[j], q & 0x04040404, q & 0x08080808, q4 & 0x04040404, q4 & 0x08080808, f.z, f.w);
          }
          if (R == 2) {
            const u32 q = hb ? low[s].z : low[s].x, r = hb ? low[s].w : low[s].y, q4 = q >> 4, r4 = r >> 4;
            mma(bl[j], q & 0x03030303, q & 0x0c0c0c0c, q4 & 0x03030303, q4 & 0x0c0c0c0c, f.x, f.y);
            mma(bl[j], r & 0x03030303, r & 0x0c0c0c0c, r4 & 0x03030303, r4 & 0x0c0c0c0c, f.z, f.w);
          }
        }
      }
      auto total = [&](int j, int i, int even) { // i: element of the C fragment; 16 * the integer sum
        int z = (al[j][i] * 16 + ah[j][i] - even) << R;
        if (R == 1) z += i < 2 ? 16 * bl[j][i] + 4 * bh[j][i] : 8 * bl[j][i] + 2 * bh[j][i];
        if (R == 2) z += i < 2 ? 16 * bl[j][i] : 4 * bl[j][i];
        return z;
      };
      const int superstep = b / 2 + s;
#pragma unroll
      for (int j = 0; j < NY; j++) {
        const int token = NT == 1 ? 0 : (j >> 1) * 8 + c * 2 + (j & 1);
        const int2 f = __ldg(info + (size_t)token * (M.k / SUPERSTEP) + superstep);
        y0[j] += (i64)f.x * total(j >> 1, j & 1, f.y);
        y1[j] += (i64)f.x * total(j >> 1, 2 + (j & 1), f.y);
      }
    }
  }
  add_sums<NT>(sums, M.n, row_tile, y0, y1);
}

#define PLAIN(R, NT, U) \
  extern "C" __global__ void __launch_bounds__(128) plain_r##R##_t##NT(Plain M, Act A, i64* sums) { plain<R, NT, U>(M, A, sums); }
PLAIN(0, 1, 4) PLAIN(0, 8, 4) PLAIN(0, 16, 4) PLAIN(0, 32, 4)
PLAIN(1, 1, 4) PLAIN(1, 8, 4) PLAIN(1, 16, 4) PLAIN(1, 32, 4)
PLAIN(2, 1, 4) PLAIN(2, 8, 4) PLAIN(2, 16, 4) PLAIN(2, 32, 4)
