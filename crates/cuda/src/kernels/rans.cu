// rans: decodes chunks of the file's `rans` codec (16-bit states, 8-bit words, 64 lanes; FORMAT.md) into the plain layout.
//
// Computes the nibbles and low bits of plain.cu, and appends symbols that leave them to a list (unordered; the host sorts it by tile).
//
// Layout.  One warp decodes one chunk: thread l has the lanes l and l + 32, that is column l % 4 of the rows l / 4 and l / 4 + 8 of each
// tile of 16 rows x 4 columns.  Eight tiles later four threads transpose their bytes, and each has eight consecutive columns of two rows:
// the word that it stores.  Words and escapes are read in lane order: a ballot and a popc find each lane's.
//
// Needs.  sm_80.  64 readable bytes behind each chunk.  Cells of the plain layout that no symbol reaches must hold symbol 0 beforehand.
// Nothing is checked inside the loop: pointers are clamped, and after the last symbol all words and escapes must be used and all lanes be
// back at STATE_MIN, else the chunk's number plus 1 is left in `status`, which must be read before anything is computed with the result.
//
// Cost: about 35 instructions for two symbols of a thread.  It only has to keep up with PCIe.  Measured: bench/RESULTS.md, "CUDA".

struct RansChunk {
  u64 offset;        // of the chunk in `payload`
  u32 words;         // bytes of words
  u32 escapes;       // bytes of escapes
  u32 row_tile;      // first, in the matrix of the layout
  u32 row_tiles;
};

struct FarEntry {
  u32 tile;
  u32 at;            // lane | weight << 5
  int delta;
};

struct RansJob {
  const u8* payload;
  const RansChunk* chunks;
  const u32* table;  // (2^prob_bits): freq | offset << 12 | symbol byte << 24
  uint4* nibbles;
  u8* planes;
  FarEntry* far;
  u32* far_count;
  u32* status;
  u32 chunk_count;
  u32 prob_bits;
  u32 col_steps;     // tiles of 4 columns in a row tile
  u32 row_tiles;     // of the layout
  u32 tc;
  u32 r;
  u32 far_capacity;
  u32 first_chunk;   // number of chunks[0] in the tensor, for status
};

// Byte k of thread c of four becomes byte c of thread k.
__device__ __forceinline__ u32 transpose_bytes(u32 x, int c) {
  const u32 y = __shfl_xor_sync(~0u, x, 1);
  const u32 a = __byte_perm(x, y, c & 1 ? 0x3715 : 0x6240);
  const u32 z = __shfl_xor_sync(~0u, a, 2);
  return __byte_perm(a, z, c & 2 ? 0x3276 : 0x5410);
}

extern "C" __global__ void __launch_bounds__(128) rans_decode(RansJob J) {
  __shared__ u32 table[256];
  for (u32 i = threadIdx.x; i < 1u << J.prob_bits; i += blockDim.x) table[i] = J.table[i];
  __syncthreads();
  const u32 index = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
  if (index >= J.chunk_count) return;
  const int lane = threadIdx.x & 31, c = lane & 3;
  const u32 below = (1u << lane) - 1, slots = (1u << J.prob_bits) - 1, p = J.prob_bits, r = J.r;
  const RansChunk chunk = J.chunks[index];
  const u8* states = J.payload + chunk.offset + 8;
  const u8* words = states + 128;
  const u8* escapes = words + chunk.words;
  u32 xa = states[lane] | (u32)states[64 + lane] << 8, xb = states[32 + lane] | (u32)states[96 + lane] << 8;
  u32 word = 0, escape = 0;
  auto step = [&](u32& a, u32& b) {
    const u32 ea = table[xa & slots], eb = table[xb & slots];
    xa = (ea & 0xfff) * (xa >> p) + (ea >> 12 & 0xfff);
    xb = (eb & 0xfff) * (xb >> p) + (eb >> 12 & 0xfff);
    const bool ha = xa < 256, hb = xb < 256; // below STATE_MIN
    const u32 ba = __ballot_sync(~0u, ha), bb = __ballot_sync(~0u, hb);
    if (ha) xa = xa << 8 | words[min(word + __popc(ba & below), chunk.words)];
    word += __popc(ba);
    if (hb) xb = xb << 8 | words[min(word + __popc(bb & below), chunk.words)];
    word += __popc(bb);
    a = ea >> 24;
    b = eb >> 24;
    const u32 za = __ballot_sync(~0u, a == 0), zb = __ballot_sync(~0u, b == 0);
    if (za | zb) {
      if (a == 0) a = escapes[min(escape + __popc(za & below), chunk.escapes)];
      escape += __popc(za);
      if (b == 0) b = escapes[min(escape + __popc(zb & below), chunk.escapes)];
      escape += __popc(zb);
    }
  };
  const u32 tile_blocks = J.tc / 64, bias = (128 >> r) - 8;
#pragma unroll 1
  for (u32 t = 0; t < chunk.row_tiles; t++) {
#pragma unroll 1
    for (u32 block = 0; block * 16 < J.col_steps; block++) {
      const u32 seg = block / tile_blocks, in_tile = block - seg * tile_blocks, tile = seg * J.row_tiles + chunk.row_tile + t;
      u32 out[4], low[2] = {0, 0};
#pragma unroll
      for (int half = 0; half < 2; half++) {
        u32 even[2] = {0, 0}, odd[2] = {0, 0}; // bytes of the even and odd tiles; rows g, g + 8
#pragma unroll
        for (int j = 0; j < 8; j++) {
          u32 a = 128, b = 128;
          if (block * 16 + half * 8 + j < J.col_steps) step(a, b);
          u32(&to)[2] = j & 1 ? odd : even;
          to[0] |= a << (j / 2 * 8);
          to[1] |= b << (j / 2 * 8);
        }
#pragma unroll
        for (int row = 0; row < 2; row++) {
          const u32 bytes[2] = {transpose_bytes(even[row], c), transpose_bytes(odd[row], c)}; // columns 0..3, 4..7
          u32 nibbles = 0;
#pragma unroll
          for (int k = 0; k < 8; k++) {
            const u32 byte = bytes[k >> 2] >> ((k & 3) * 8) & 255, low_bits = byte & ((1u << r) - 1);
            const int high = (int)(byte >> r) - (int)bias, kept = min(max(high, 0), 15); // biased by 8
            nibbles |= (u32)(k & 1 ? kept ^ 8 : kept) << (4 * k);
            if (r == 1) low[0] |= low_bits << ((k >> 1) * 8 + (k & 1) * 2 + row + 4 * half);
            if (r == 2) low[k & 1] |= low_bits << ((k >> 1) * 8 + 2 * row + 4 * half);
            if (high != kept && byte != 0) { // byte 0: a far symbol of the file, which the host lists
              const u32 at = atomicAdd(J.far_count, 1);
              const u32 weight = (in_tile * 8 + half * 4 + row * 2 + (k >> 2)) * 4 + (k & 3);
              if (at < J.far_capacity) J.far[at] = {tile, (u32)lane | weight << 5, (high - kept) * (1 << r)};
            }
          }
          out[half * 2 + row] = nibbles;
        }
      }
      J.nibbles[((size_t)tile * tile_blocks + in_tile) * 32 + lane] = make_uint4(out[0], out[1], out[2], out[3]);
      u32* plane = (u32*)(J.planes + ((size_t)tile * (tile_blocks / 2) + in_tile / 2) * 256 * r + lane * 8 * r);
      if (r == 1) plane[in_tile & 1] = low[0];
      if (r == 2) {
        plane[(in_tile & 1) * 2] = low[0];
        plane[(in_tile & 1) * 2 + 1] = low[1];
      }
    }
  }
  const bool good = xa == 256 && xb == 256 && word == chunk.words && escape == chunk.escapes;
  if (!__all_sync(~0u, good) && lane == 0) atomicMax(J.status, J.first_chunk + index + 1);
}
