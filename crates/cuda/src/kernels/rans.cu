// rans: decodes chunks of the file's `rans` codec (16-bit states, 8-bit words, 64 lanes; FORMAT.md) into the plain layout, 64 symbols a step.
//
// Computes the nibbles and low bits of plain.cu, and appends symbols that leave them to a list (unordered; the host sorts it by tile). Far symbols of
// the file are the host's: such a one is decoded as the least symbol of the nibbles, low bits 0.
//
// Layout.  Eight steps, of a tile each, then four threads transpose their symbol bytes, those of even tiles and those of odd ones: each then has
// eight consecutive columns of two rows, which is a word of nibbles.
//
// States, what a step waits for, what is needed and what is checked: rans.cuh.
//
// Cost: 40 instructions for the 64 symbols of a step, 16 more where symbols are escaped, and 160 to 200 once for eight steps (SASS for sm_90a). Where a warp is alone
// on its scheduler, by the assembler's stalls and the units' latencies, not measured: 110 cycles a step, 90 more with escapes, 65 for its share of the rest.

// A block is one warp, for the compiler to know what all its threads have in common.
extern "C" __global__ void __launch_bounds__(32) rans_decode(RansJob J) {
  __shared__ __align__(16) Lanes<8>::Room room;
  const u32 start = computed_once(shared_address(&room));
  const auto address = [&](const void* part) { return start + (u32)((const u8*)part - (const u8*)&room); };
  const int lane = computed_once(threadIdx.x), c = lane & 3;
  for (int i = lane; i < 256; i += 32) room.table[i] = J.table[i];
  const u32 tiles = J.col_steps;
  const RansChunk chunk = J.chunks[blockIdx.x];
  const u8* states = J.payload + chunk.offset;
  const u8* first_word = states + 128;
  const u8* first_escape = first_word + chunk.words;
  const u8* readable = first_escape + chunk.escapes + 16; // of the 64 bytes behind the escapes
  Ring words(first_word, readable, address(room.words), lane), escapes(first_escape, readable, address(room.escapes), lane);
  const u32 words_end = words.at + chunk.words, escapes_end = escapes.at + chunk.escapes;
  copy_async_commit();
  copy_async_wait();
  __syncwarp();
  Lanes<8> lanes(words, escapes, address(room.table), address(room.entries), states, lane);

  const u32 ones = 0x01010101, zero = (8u << J.r) * ones;
#pragma unroll 1
  for (u32 t = 0; t < chunk.row_tiles; t++) {
    Cells cells(chunk.row_tile + t);
    u32 rest = tiles;
#pragma unroll 1
    for (u32 halves = (tiles + 15) / 16 * 2; halves > 0; halves--) {
      Ring::arrived();
      lanes.words.ahead(lane);
      lanes.escapes.ahead(lane);
      copy_async_commit();
      lanes.look_ahead(lane);
      const u32 left = min(rest, 8u);
      rest -= left;
      u32 even[2] = {128 * ones, 128 * ones}, odd[2] = {128 * ones, 128 * ones}; // bytes of the even and odd tiles; rows g, g + 8
#pragma unroll 1
      for (u32 couples = left / 2; couples > 0; couples--) {
        lanes.step(even);
        lanes.step(odd);
      }
      if (left < 8) { // those that there are lie above symbols 0
        if (left & 1) lanes.step(even);
#pragma unroll
        for (int row = 0; row < 2; row++) {
          even[row] = __funnelshift_r(even[row], even[row], (4 - (left + 1) / 2) * 8);
          odd[row] = __funnelshift_r(odd[row], odd[row], (4 - left / 2) * 8);
        }
      }
      u32 places[4]; // of the rows g, g + 8, columns 0..3 and 4..7 of eight: nibble << r | low bits, byte by byte
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const u32 bytes = transpose_bytes(i % 2 ? odd[i / 2] : even[i / 2], c);
        // + (8 << r) - 128 in each byte: the low seven bits are added, the eighth is another 1.
        places[i] = (bytes & 127 * ones) + zero ^ ~bytes & 128 * ones;
      }
      cells.put(J, halves & 1, lane, places);
    }
  }
  if (!__all_sync(~0u, lanes.ended(words_end, escapes_end)) && lane == 0) atomicMax(J.status, J.first_chunk + blockIdx.x + 1);
}
