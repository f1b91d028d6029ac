// rans_pairs: decodes chunks of the file's `rans-pairs` codec (FORMAT.md) into the plain layout, 128 symbols a step.
//
// Computes the nibbles and low bits of plain.cu, and appends symbols that leave them to a list (unordered; the host sorts it by tile). What the
// file lists beside the pairs is the host's: such a symbol is decoded as the one that stands in for it.
//
// Table.  freq | offset << 8 | pair byte << 16 | slot << 24 of each slot. With high | 1 << 8 for the second factor, dp4a makes the next state of it.
//
// Layout.  One warp decodes one chunk: thread l has the lanes l and l + 32, that is column l % 4 of the rows l / 4 and l / 4 + 8 of each
// tile of 16 rows x 4 columns, and gets the symbols of two tiles by one step. Four steps later four threads transpose their pair bytes: each
// then has eight consecutive columns of two rows, columns 0..3 in the low nibbles and 4..7 in the high ones, which is a word but for its order.
//
// What a step waits for.  The next state's low byte, the slot, is a word where the state takes one. So words are looked up before they are
// wanted: a ring holds the table's entries of the words ahead, and a lane loads either that of its slot or that of its word, never one after the
// other. Words, escapes and raw lines come through rings of bytes in shared memory; nothing waits for global memory.
//
// Needs.  sm_80.  64 readable bytes behind the words of each chunk.  Cells of the plain layout that no symbol reaches must hold symbol 0 beforehand.
// Nothing is checked inside the loop: a ring reads no further than its chunk, and after the last symbol all words and escapes must be
// used and all lanes be back at STATE_MIN, else the chunk's number plus 1 is left in `status`, which must be read before anything is
// computed with the result.
//
// Cost: 41 instructions for the 128 symbols of a step, 18 more where pairs are escaped, beside what is done once for four steps (SASS for sm_90a).

// The table's entries of the words ahead, a group of the warp at a time. Four steps take at most REACH words. Before each four steps two groups
// more are looked up if there is room, so that what the next four may take is there before they begin. The first REACH entries are stored again
// behind the last: four steps never wrap.
struct Entries {
  static constexpr u32 GROUP = 128, REACH = 256, COUNT = 1024;

  // Looks up the group of words that is next in the ring. Addresses: the table's, and the entries'.
  static __device__ __forceinline__ void look_up(Ring& words, u32 table, u32 to, int lane) {
    const u32 mine = words.at + lane * 4, four = load_shared(words.shared + mine % Ring::BYTES);
    u32 found[4];
#pragma unroll
    for (int i = 0; i < 4; i++) found[i] = load_shared(table + (four >> 8 * i & 255) * 4);
    const u32 place = to + mine % COUNT * 4;
    store(place, found);
    if (words.at % COUNT < REACH) store(place + COUNT * 4, found);
    words.at += GROUP;
  }
  static __device__ __forceinline__ void store(u32 address, const u32 (&v)[4]) {
    asm volatile("st.shared.v4.u32 [%0],{%1,%2,%3,%4};" ::"r"(address), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
  }
};

struct Room {
  u32 table[256];
  u8 words[Ring::BYTES], escapes[Ring::BYTES], raw[Ring::BYTES];
  u32 entries[Entries::COUNT + Entries::REACH];
};

// A value of the warp's threads that the compiler cannot compute anew: it would read special registers wherever it is wanted, tens of cycles each.
__device__ __forceinline__ u32 computed_once(u32 v) { return __shfl_sync(~0u, v, threadIdx.x); }

// A word of shared memory from one of two addresses. Two loads, so that the one that is known early is not late.
__device__ __forceinline__ u32 load_early(bool early, u32 address) {
  u32 v;
  asm volatile("{ .reg .pred p; setp.ne.u32 p,%2,0; @p ld.shared.u32 %0,[%1]; }" : "=r"(v) : "r"(address), "r"((u32)early) : "memory");
  return v;
}
__device__ __forceinline__ void load_late(bool early, u32& v, u32 address) {
  asm volatile("{ .reg .pred p; setp.eq.u32 p,%2,0; @p ld.shared.u32 %0,[%1]; }" : "+r"(v) : "r"(address), "r"((u32)early) : "memory");
}

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
  const u32 table = address(room.table), entries = address(room.entries);
  const int lane = computed_once(threadIdx.x), c = lane & 3;
  for (int i = lane; i < 256; i += 32) room.table[i] = J.table[i];
  const u32 below = (1u << lane) - 1, r = J.r, raw_bits = J.raw_bits, tiles = J.col_steps;
  const RansChunk chunk = J.chunks[blockIdx.x];
  const u32 lines = ((chunk.row_tiles * tiles + 1) / 2 * raw_bits + 3) / 4;
  const u8* states = J.payload + chunk.offset;
  const u8* first_escape = states + 128;
  const u8* first_line = first_escape + chunk.escapes;
  const u8* first_word = first_line + 64 * lines;
  const u8* readable = first_word + chunk.words + 16; // of the 64 bytes behind the words
  Ring escapes(first_escape, readable, address(room.escapes), lane), raw(first_line, readable, address(room.raw), lane);
  Ring words(first_word, readable, address(room.words), lane);
  const u32 escapes_end = escapes.at + chunk.escapes, words_end = words.at + chunk.words, line_start = raw.at;
  u32 taken = words.at;
  copy_async_commit();
  copy_async_wait();
  __syncwarp();
  // From here on the ring's next word is the next to be looked up. Four steps take no more than these less what lies before the first word.
  words.at = 0;
#pragma unroll 1
  for (int i = 0; i < 3; i++) Entries::look_up(words, table, entries, lane);

  // A state is the entry of its low byte, the slot, and high | 1 << 8.
  u32 ea = load_shared(table + states[lane] * 4), eb = load_shared(table + states[32 + lane] * 4), xa = states[64 + lane] | 0x100, xb = states[96 + lane] | 0x100;
  u32 word; // address of the entry of the next word
  auto step = [&](u32 (&pairs)[2]) {
    const bool za = (ea & 0xff0000) == 0, zb = (eb & 0xff0000) == 0, any = __any_sync(~0u, za || zb);
    // Pairs are shifted in from above: the first ends lowest.
    pairs[0] = __byte_perm(pairs[0], ea, 0x6321);
    pairs[1] = __byte_perm(pairs[1], eb, 0x6321);
    const u32 ya = __dp4a(ea, xa, 0u), yb = __dp4a(eb, xb, 0u);
    const bool ha = ya < 256, hb = yb < 256; // below STATE_MIN
    ea = load_early(!ha, table + (ya & 255) * 4);
    eb = load_early(!hb, table + (yb & 255) * 4);
    const u32 ba = __ballot_sync(~0u, ha), bb = __ballot_sync(~0u, hb);
    const u32 word_b = word + __popc(ba) * 4;
    load_late(!ha, ea, word + __popc(ba & below) * 4);
    load_late(!hb, eb, word_b + __popc(bb & below) * 4);
    word = word_b + __popc(bb) * 4;
    xa = __byte_perm(ya, 1, ha ? 0x5540 : 0x5541);
    xb = __byte_perm(yb, 1, hb ? 0x5540 : 0x5541);
    if (any) {
      const u32 la = __ballot_sync(~0u, za), lb = __ballot_sync(~0u, zb), of_a = __popc(la);
      // Without a branch: lanes that take no escape read one that others take.
      const u32 ca = escapes.byte(__popc(la & below)), cb = escapes.byte(of_a + __popc(lb & below));
      pairs[0] = za ? __byte_perm(pairs[0], ca, 0x4210) : pairs[0];
      pairs[1] = zb ? __byte_perm(pairs[1], cb, 0x4210) : pairs[1];
      escapes.at += of_a + __popc(lb);
    }
  };

  const u32 ones = 0x01010101, raw_mask = ((1u << raw_bits) - 1) * ones, low_mask = ((1u << r) - 1) * ones, leaves = (256 - (16u << r)) * ones;
  // What a place of the window is more than the symbol byte of nibble 0; its low seven bits are added, the eighth cannot carry.
  const u32 shift = J.base - 128 + (8u << r), shift_low = (shift & 0x7f) * ones, shift_top = (shift & 0x80) * ones;
  const u32 tile_blocks = J.tc / 64, padded_tiles = (tiles + 15) / 16 * 16;
  u32 steps = 0, half_pair[2] = {0, 0}, half_raw[2] = {0, 0}; // last pair of a row tile whose second symbol is the next row tile's
#pragma unroll 1
  for (u32 t = 0; t < chunk.row_tiles; t++) {
    const bool turned = t * tiles & 1;
    u32 tile = chunk.row_tile + t, in_tile = 0, nibbles[2] = {0, 0}, low[2] = {0, 0};
#pragma unroll 1
    for (u32 first = 0; first < padded_tiles; first += 8) {
      const int half = first / 8 & 1;
      __syncwarp(); // what was read of the rings may be overwritten
      raw.at = line_start + steps * raw_bits / 4 * 64;
      if (half == 0) {
        words.ahead(lane);
        escapes.ahead(lane);
        if (raw_bits) raw.ahead(lane);
        copy_async_commit();
        copy_async_wait_but<2>();
        __syncwarp();
      }
#pragma unroll 1
      for (int i = 0; i < 2; i++) {
        if (words.at + Entries::GROUP - taken > Entries::COUNT) break;
        Entries::look_up(words, table, entries, lane);
      }
      u32 pairs[2] = {0, 0}, rest[2] = {0, 0}; // of the rows g, g + 8; pair bytes and raw bits of four steps, first lowest
      const u32 left = first < tiles ? min((tiles - first + !turned) / 2, 4u) : 0;
      const u32 first_entry = entries + taken % Entries::COUNT * 4;
      word = first_entry;
#pragma unroll 1
      for (u32 j = 0; j < left; j++) step(pairs);
      taken += (word - first_entry) / 4;
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
      u32 places[4], outside = 0; // of the rows g, g + 8, columns 0..3 and 4..7 of eight: nibble << r | low bits, byte by byte
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (i % 2 == 0) {
          pairs[i / 2] = transpose_bytes(pairs[i / 2], c);
          if (raw_bits) rest[i / 2] = transpose_bytes(rest[i / 2], c);
        }
        const u32 nibble = pairs[i / 2] >> (i % 2 * 4) & 0x0f0f0f0f, bits = rest[i / 2] >> (i % 2 * raw_bits) & raw_mask;
        places[i] = (nibble << raw_bits | bits) + shift_low ^ shift_top;
        if (first + 8 > tiles && first + 2 * c + i % 2 >= tiles) places[i] = (8u << r) * ones; // symbol 0 beyond the last column
        outside |= places[i] & leaves;
      }
      if (__any_sync(~0u, outside)) { // rare: list what the nibbles do not hold
#pragma unroll
        for (int i = 0; i < 4; i++) {
          u32 kept_places = 0;
#pragma unroll 1
          for (int k = 0; k < 4; k++) {
            // Places were computed modulo 256; symbol bytes are in 1..=255.
            const int zero = 8 << r, place = (int)(((places[i] >> 8 * k) - zero + 128) & 255) - 128 + zero;
            const int high = place >> r, kept = min(max(high, 0), 15);
            if (high != kept) {
              const u32 weight = (in_tile * 8 + half * 4 + i) * 4 + k;
              list_far(J, tile, (u32)lane | weight << 5, (high - kept) * (1 << r));
            }
            kept_places |= (u32)(kept << r | place & ((1 << r) - 1)) << 8 * k;
          }
          places[i] = kept_places;
        }
        __syncwarp();
      }
      u32 out[2];
#pragma unroll
      for (int row = 0; row < 2; row++) {
        u32 two[2]; // nibbles of columns 0 and 1, 2 and 3 in the bytes 0 and 2
#pragma unroll
        for (int part = 0; part < 2; part++) {
          const u32 of_four = places[row * 2 + part], n = (of_four >> r & 0x0f0f0f0f) ^ 0x08000800; // odd columns in two's complement
          two[part] = n | n >> 4;
          put_low_bits(low, of_four & low_mask, r, row, part, half);
        }
        out[row] = __byte_perm(two[0], two[1], 0x6420);
      }
      if (half == 0) {
        nibbles[0] = out[0];
        nibbles[1] = out[1];
        continue;
      }
      store_block(J, tile, in_tile, lane, make_uint4(nibbles[0], nibbles[1], out[0], out[1]), low);
      low[0] = low[1] = 0;
      if (++in_tile == tile_blocks) {
        in_tile = 0;
        tile += J.row_tiles;
      }
    }
  }
  const bool good = xa == 0x101 && xb == 0x101 && (ea | eb) >> 24 == 0 && taken == words_end && escapes.at == escapes_end;
  if (!__all_sync(~0u, good) && lane == 0) atomicMax(J.status, J.first_chunk + blockIdx.x + 1);
}
