// rans: decodes chunks of the file's `rans` codec (16-bit states, 8-bit words, 64 lanes; FORMAT.md) into the plain layout.
//
// Computes the nibbles and low bits of plain.cu, and appends symbols that leave them to a list (unordered; the host sorts it by tile).
//
// Layout.  One warp decodes one chunk: thread l has the lanes l and l + 32, that is column l % 4 of the rows l / 4 and l / 4 + 8 of each
// tile of 16 rows x 4 columns.  Eight tiles later four threads transpose their bytes, and each has eight consecutive columns of two rows:
// the word that it stores.  Words and escapes are read in lane order: a ballot and a popc find each lane's. They come
// through rings in shared memory: read from global memory where they were wanted, each step waited several times as long.
//
// Table.  freq | offset << 12 | symbol byte << 24 of each slot.
//
// Needs.  sm_80.  64 readable bytes behind each chunk.  Cells of the plain layout that no symbol reaches must hold symbol 0 beforehand.
// Nothing is checked inside the loop: a ring reads no further than its chunk, and after the last symbol all words and escapes must be
// used and all lanes be back at STATE_MIN, else the chunk's number plus 1 is left in `status`, which must be read before anything is
// computed with the result.
//
// Cost: 88 instructions for 64 symbols, 413 cycles where a warp is alone on its scheduler (H200). It only has to keep up with PCIe: it
// takes half of the copy's time where there are 1,792 chunks, 1.2 times as long where there are 512.  Measured: bench/RESULTS.md, "CUDA".

constexpr int RANS_WARPS = 4;

extern "C" __global__ void __launch_bounds__(RANS_WARPS * 32) rans_decode(RansJob J) {
  __shared__ u32 table[256];
  __shared__ __align__(16) u8 rings[RANS_WARPS][2][Ring::BYTES];
  for (u32 i = threadIdx.x; i < 1u << J.prob_bits; i += blockDim.x) table[i] = J.table[i];
  __syncthreads();
  const u32 index = blockIdx.x * RANS_WARPS + (threadIdx.x >> 5);
  if (index >= J.chunk_count) return;
  const int lane = threadIdx.x & 31, c = lane & 3;
  const u32 below = (1u << lane) - 1, slots = (1u << J.prob_bits) - 1, p = J.prob_bits, r = J.r;
  const RansChunk chunk = J.chunks[index];
  const u8* states = J.payload + chunk.offset + 8;
  const u8* first_word = states + 128;
  const u8* first_escape = first_word + chunk.words;
  const u8* readable = first_escape + chunk.escapes + 16; // of the 64 bytes behind the chunk
  const u32 room = shared_address(rings[threadIdx.x >> 5]);
  Ring words(first_word, readable, room, lane), escapes(first_escape, readable, room + Ring::BYTES, lane);
  const u32 words_end = words.at + chunk.words, escapes_end = escapes.at + chunk.escapes;
  copy_async_commit();
  copy_async_wait();
  __syncwarp();
  u32 xa = states[lane] | (u32)states[64 + lane] << 8, xb = states[32 + lane] | (u32)states[96 + lane] << 8;
  auto step = [&](u32& a, u32& b) {
    const u32 ea = table[xa & slots], eb = table[xb & slots];
    xa = (ea & 0xfff) * (xa >> p) + (ea >> 12 & 0xfff);
    xb = (eb & 0xfff) * (xb >> p) + (eb >> 12 & 0xfff);
    const bool ha = xa < 256, hb = xb < 256; // below STATE_MIN
    const u32 ba = __ballot_sync(~0u, ha), bb = __ballot_sync(~0u, hb), of_a = __popc(ba);
    // Without a branch: lanes that take no word read one that others take.
    const u32 wa = words.byte(__popc(ba & below)), wb = words.byte(of_a + __popc(bb & below));
    xa = ha ? xa << 8 | wa : xa;
    xb = hb ? xb << 8 | wb : xb;
    words.at += of_a + __popc(bb);
    a = ea >> 24;
    b = eb >> 24;
    const u32 za = __ballot_sync(~0u, a == 0), zb = __ballot_sync(~0u, b == 0);
    if (za | zb) {
      const u32 ya = escapes.byte(__popc(za & below)), yb = escapes.byte(__popc(za) + __popc(zb & below));
      a = a == 0 ? ya : a;
      b = b == 0 ? yb : b;
      escapes.at += __popc(za) + __popc(zb);
    }
  };
  const u32 tile_blocks = J.tc / 64;
  const u32 ones = 0x01010101, least = ((128 >> r) - 8) * ones, low_mask = ((1u << r) - 1) * ones; // of high + (128 >> r), byte by byte
#pragma unroll 1
  for (u32 t = 0; t < chunk.row_tiles; t++) {
#pragma unroll 1
    for (u32 block = 0; block * 16 < J.col_steps; block++) {
      const u32 seg = block / tile_blocks, in_tile = block - seg * tile_blocks, tile = seg * J.row_tiles + chunk.row_tile + t;
      u32 out[4], low[2] = {0, 0};
#pragma unroll
      for (int half = 0; half < 2; half++) {
        u32 even[2] = {0, 0}, odd[2] = {0, 0}; // bytes of the even and odd tiles; rows g, g + 8
        const u32 first = block * 16 + half * 8;
        __syncwarp(); // what was read of the rings may be overwritten
        words.ahead(lane);
        escapes.ahead(lane);
        copy_async_commit();
        copy_async_wait_but<2>();
        __syncwarp();
#pragma unroll 1
        for (u32 j = 0; j < 4; j++) { // rolled: the code of all steps of a block would not fit the instruction cache
          u32 a = 128, b = 128, c0 = 128, c1 = 128;
          if (first + 2 * j < J.col_steps) step(a, b);
          if (first + 2 * j + 1 < J.col_steps) step(c0, c1);
          // Shifted in from above: the first byte ends lowest.
          even[0] = even[0] >> 8 | a << 24;
          even[1] = even[1] >> 8 | b << 24;
          odd[0] = odd[0] >> 8 | c0 << 24;
          odd[1] = odd[1] >> 8 | c1 << 24;
        }
#pragma unroll
        for (int row = 0; row < 2; row++) {
          u32 nibbles = 0, outside = 0;
#pragma unroll
          for (int part = 0; part < 2; part++) { // columns 0..3, 4..7
            const u32 bytes = transpose_bytes(part ? odd[row] : even[row], c);
            const u32 high = bytes >> r & (0xffu >> r) * ones;
            const u32 kept = __vminu4(__vmaxu4(high, least), least + 15 * ones);
            outside |= high ^ kept;
            const u32 n = (kept - least) ^ 0x08000800; // odd columns in two's complement
            const u32 pairs = (n | n >> 4) & 0x00ff00ff;
            nibbles |= (pairs & 0xff | pairs >> 8) << (16 * part);
            const u32 bits = bytes & low_mask;
            put_low_bits(low, bits, r, row, part, half);
          }
          out[half * 2 + row] = nibbles;
          if (__any_sync(~0u, outside)) { // rare: list what the nibbles do not hold
#pragma unroll 1
            for (int k = 0; k < 8; k++) {
              const u32 byte = transpose_bytes(k < 4 ? even[row] : odd[row], c) >> ((k & 3) * 8) & 255;
              const int high = (int)(byte >> r) - (int)((128 >> r) - 8), kept = min(max(high, 0), 15);
              if (high != kept && byte != 0) { // byte 0: a far symbol of the file, which the host lists
                const u32 weight = (in_tile * 8 + half * 4 + row * 2 + (k >> 2)) * 4 + (k & 3);
                list_far(J, tile, (u32)lane | weight << 5, (high - kept) * (1 << r));
              }
              __syncwarp();
            }
          }
        }
      }
      store_block(J, tile, in_tile, lane, make_uint4(out[0], out[1], out[2], out[3]), low);
    }
  }
  const bool good = xa == 256 && xb == 256 && words.at == words_end && escapes.at == escapes_end;
  if (!__all_sync(~0u, good) && lane == 0) atomicMax(J.status, J.first_chunk + index + 1);
}
