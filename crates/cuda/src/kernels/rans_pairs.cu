// rans_pairs: decodes chunks of the file's `rans-pairs` codec (FORMAT.md) into the plain layout, 128 symbols a step.
//
// Computes the nibbles and low bits of plain.cu, and appends symbols that leave them to a list (unordered; the host sorts it by tile). What the
// file lists beside the pairs is the host's: such a symbol is decoded as the one that stands in for it.
//
// Layout.  A thread gets the symbols of two tiles by one step. Four steps later four threads transpose their pair bytes: each then has eight
// consecutive columns of two rows, columns 0..3 in the low nibbles and 4..7 in the high ones, which is a word but for its order.
//
// States, what a step waits for, what is needed and what is checked: rans.cuh. Raw lines come through a ring of bytes, too; nothing waits for global memory.
//
// Cost: 42 instructions for the 128 symbols of a step, 16 more where pairs are escaped, beside what is done once for four steps (SASS for sm_90a).

struct Room {
  Lanes<4>::Room lanes;
  u8 raw[Ring::BYTES];
};

// The raw bits of four steps, 2 * raw_bits of them in each byte: first symbol, then second.
__device__ __forceinline__ u32 spread_raw_bits(u32 bits, u32 raw_bits) {
  if (raw_bits == 1) {
    const u32 halves = bits & 0x0f | (bits & 0xf0) << 12;
    return (halves | halves << 6) & 0x03030303;
  }
  const u32 halves = bits & 0xff | (bits & 0xff00) << 8;
  return (halves | halves << 4) & 0x0f0f0f0f;
}

// Moves fields of `bits` bits by one: a byte has two, the first of these is the second of the byte before, of byte 0 that of `before`.
__device__ __forceinline__ u32 turn(u32 bytes, u32 before, u32 bits) {
  const u32 field = ((1u << bits) - 1) * 0x01010101;
  return (bytes << 8 | before) >> bits & field | (bytes & field) << bits;
}

// A block is one warp, for the compiler to know what all its threads have in common.
extern "C" __global__ void __launch_bounds__(32) rans_pairs_decode(RansJob J) {
  __shared__ __align__(16) Room room;
  const u32 start = computed_once(shared_address(&room));
  const auto address = [&](const void* part) { return start + (u32)((const u8*)part - (const u8*)&room); };
  const int lane = computed_once(threadIdx.x), c = lane & 3;
  for (int i = lane; i < 256; i += 32) room.lanes.table[i] = J.table[i];
  const u32 r = J.r, raw_bits = J.raw_bits, tiles = J.col_steps;
  const RansChunk chunk = J.chunks[blockIdx.x];
  const u32 lines = ((chunk.row_tiles * tiles + 1) / 2 * raw_bits + 3) / 4;
  const u8* states = J.payload + chunk.offset;
  const u8* first_escape = states + 128;
  const u8* first_line = first_escape + chunk.escapes;
  const u8* first_word = first_line + 64 * lines;
  const u8* readable = first_word + chunk.words + 16; // of the 64 bytes behind the words
  Ring escapes(first_escape, readable, address(room.lanes.escapes), lane), raw(first_line, readable, address(room.raw), lane);
  Ring words(first_word, readable, address(room.lanes.words), lane);
  const u32 escapes_end = escapes.at + chunk.escapes, words_end = words.at + chunk.words, line_start = raw.at;
  copy_async_commit();
  copy_async_wait();
  __syncwarp();
  Lanes<4> lanes(words, escapes, address(room.lanes.table), address(room.lanes.entries), states, lane);

  const u32 ones = 0x01010101, raw_mask = ((1u << raw_bits) - 1) * ones;
  // What a place of the window is more than the symbol byte of nibble 0; its low seven bits are added, the eighth cannot carry.
  const u32 shift = J.base - 128 + (8u << r), shift_low = (shift & 0x7f) * ones, shift_top = (shift & 0x80) * ones;
  const u32 padded_tiles = (tiles + 15) / 16 * 16;
  u32 steps = 0, half_pair[2] = {0, 0}, half_raw[2] = {0, 0}; // last pair of a row tile whose second symbol is the next row tile's
#pragma unroll 1
  for (u32 t = 0; t < chunk.row_tiles; t++) {
    const bool turned = t * tiles & 1;
    Cells cells(chunk.row_tile + t);
#pragma unroll 1
    for (u32 first = 0; first < padded_tiles; first += 8) {
      const int half = first / 8 & 1;
      Ring::arrived();
      raw.at = line_start + steps * raw_bits / 4 * 64;
      if (half == 0) {
        lanes.words.ahead(lane);
        lanes.escapes.ahead(lane);
        if (raw_bits) raw.ahead(lane);
        copy_async_commit();
      }
      lanes.look_ahead(lane);
      u32 pairs[2] = {0, 0}, rest[2] = {0, 0}; // of the rows g, g + 8; pair bytes and raw bits of four steps, first lowest
      const u32 left = first < tiles ? min((tiles - first + !turned) / 2, 4u) : 0;
#pragma unroll 1
      for (u32 j = 0; j < left; j++) lanes.step(pairs);
      if (raw_bits) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
          u32 bits = raw.byte(lane + 32 * row) | raw.byte(lane + 32 * row + 64) << 8;
          if (raw_bits == 2) bits |= raw.byte(lane + 32 * row + 128) << 16;
          rest[row] = spread_raw_bits(bits >> (steps * raw_bits * 2 & 7), raw_bits);
        }
      }
      steps += left;
      if (left < 4) {
#pragma unroll
        for (int row = 0; row < 2; row++) pairs[row] = left ? pairs[row] >> (32 - 8 * left) : 0;
      }
      if (tiles & 1) { // pairs of two row tiles
#pragma unroll
        for (int row = 0; row < 2; row++) {
          const u32 last = 8 * left - 8, last_pair = left ? pairs[row] >> last & 255 : half_pair[row], last_raw = left ? rest[row] >> last & 255 : half_raw[row];
          if (turned) {
            pairs[row] = turn(pairs[row], half_pair[row], 4);
            if (raw_bits) rest[row] = turn(rest[row], half_raw[row], raw_bits);
          }
          half_pair[row] = last_pair;
          half_raw[row] = last_raw;
        }
      }
      u32 places[4]; // of the rows g, g + 8, columns 0..3 and 4..7 of eight: nibble << r | low bits, byte by byte
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (i % 2 == 0) {
          pairs[i / 2] = transpose_bytes(pairs[i / 2], c);
          if (raw_bits) rest[i / 2] = transpose_bytes(rest[i / 2], c);
        }
        const u32 nibble = pairs[i / 2] >> (i % 2 * 4) & 0x0f0f0f0f, bits = rest[i / 2] >> (i % 2 * raw_bits) & raw_mask;
        places[i] = (nibble << raw_bits | bits) + shift_low ^ shift_top;
        if (first + 8 > tiles && first + 2 * c + i % 2 >= tiles) places[i] = (8u << r) * ones; // symbol 0 beyond the last column
      }
      cells.put(J, half, lane, places);
    }
  }
  if (!__all_sync(~0u, lanes.ended(words_end, escapes_end)) && lane == 0) atomicMax(J.status, J.first_chunk + blockIdx.x + 1);
}
