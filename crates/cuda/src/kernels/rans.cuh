// rans: what the decoders of the file's chunks share (rans.cu, rans_pairs.cu): what they are given, rings in shared memory, the states, the plain layout.
//
// Layout.  One warp, which is a block, decodes one chunk: thread l has the lanes l and l + 32, that is column l % 4 of the rows l / 4 and l / 4 + 8 of
// each tile of 16 rows x 4 columns.
//
// Needs.  sm_80.  64 readable bytes behind what there is of each chunk.  Cells of the plain layout that no symbol reaches must hold symbol 0 beforehand.
// Nothing is checked inside the loop: a ring reads no further than its chunk, and after the last symbol all words and escapes must be
// used and all lanes be back at STATE_MIN, else the chunk's number plus 1 is left in `status`, which must be read before anything is
// computed with the result.

struct RansChunk {
  u64 offset;        // of its states in `payload`
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
  const u32* table;  // (256): entries, by the low byte of a state (`Lanes`)
  uint4* nibbles;
  u8* planes;
  FarEntry* far;
  u32* far_count;
  u32* status;
  u32 col_steps;     // tiles of 4 columns in a row tile
  u32 row_tiles;     // of the layout
  u32 tc;
  u32 r;
  u32 far_capacity;
  u32 first_chunk;   // number of chunks[0] in the tensor, for status
  u32 raw_bits;      // of the window of rans-pairs
  u32 base;          // its first symbol byte
};

// A value of the warp's threads that the compiler cannot compute anew: it would read special registers wherever it is wanted, tens of cycles each.
__device__ __forceinline__ u32 computed_once(u32 v) { return __shfl_sync(~0u, v, threadIdx.x); }

// Byte k of thread c of four becomes byte c of thread k.
__device__ __forceinline__ u32 transpose_bytes(u32 x, int c) {
  const u32 y = __shfl_xor_sync(~0u, x, 1);
  const u32 a = __byte_perm(x, y, c & 1 ? 0x3715 : 0x6240);
  const u32 z = __shfl_xor_sync(~0u, a, 2);
  return __byte_perm(a, z, c & 2 ? 0x3276 : 0x5410);
}

// Appends a symbol that leaves the nibbles; what the list does not hold is counted all the same.
__device__ __forceinline__ void list_far(const RansJob& J, u32 tile, u32 at, int delta) {
  const u32 place = atomicAdd(J.far_count, 1);
  if (place < J.far_capacity) J.far[place] = {tile, at, delta};
}

// Low bits of four columns, one a byte, to their places among those of 64 columns of two rows: row 0 or 1, part of 8 columns, half of 64.
__device__ __forceinline__ void put_low_bits(u32 (&low)[2], u32 bits, u32 r, int row, int part, int half) {
  if (r == 1) { // byte k / 2, bit 2 * (k % 2)
    const u32 v = (bits | bits >> 6) & 0x00050005;
    low[0] |= (v & 0xff | v >> 8) << (16 * part + row + 4 * half);
  }
  if (r == 2) { // word k % 2, byte k / 2
    const u32 v = bits & 0x00030003, w = bits >> 8 & 0x00030003;
    low[0] |= (v & 0xff | v >> 8) << (16 * part + 2 * row + 4 * half);
    low[1] |= (w & 0xff | w >> 8) << (16 * part + 2 * row + 4 * half);
  }
}

// Where the columns of a row tile go, 32 at a time: the thread has eight consecutive ones of the rows g, g + 8.
struct Cells {
  u32 tile, in_tile;   // in_tile: block of 64 columns
  u32 nibbles[2], low[2];

  __device__ __forceinline__ Cells(u32 first_tile) : tile(first_tile), in_tile(0), nibbles{0, 0}, low{0, 0} {}

  // Half of a block. places: of the rows g, g + 8, columns 0..3 and 4..7 of eight: nibble << r | low bits, byte by byte, modulo 256.
  __device__ __forceinline__ void put(const RansJob& J, int half, int lane, u32 (&places)[4]) {
    const u32 r = J.r, ones = 0x01010101, leaves = (256 - (16u << r)) * ones, low_mask = ((1u << r) - 1) * ones;
    if (__any_sync(~0u, (places[0] | places[1] | places[2] | places[3]) & leaves)) { // rare: list what the nibbles do not hold
#pragma unroll
      for (int i = 0; i < 4; i++) {
        u32 kept_places = 0;
#pragma unroll 1
        for (int k = 0; k < 4; k++) {
          const int zero = 8 << r, symbol = (int)(((places[i] >> 8 * k) - zero + 128) & 255) - 128, place = symbol + zero;
          const int high = place >> r, kept = min(max(high, 0), 15);
          if (high != kept && symbol != -128) { // -128, symbol byte 0: a far symbol of the file, which the host lists
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
        const u32 n = (places[row * 2 + part] >> r & 0x0f0f0f0f) ^ 0x08000800; // odd columns in two's complement
        two[part] = n | n >> 4;
      }
      out[row] = __byte_perm(two[0], two[1], 0x6420);
    }
    if (r) {
#pragma unroll
      for (int i = 0; i < 4; i++) put_low_bits(low, places[i] & low_mask, r, i / 2, i % 2, half);
    }
    if (half == 0) {
      nibbles[0] = out[0];
      nibbles[1] = out[1];
      return;
    }
    const u32 blocks = J.tc / 64;
    J.nibbles[((size_t)tile * blocks + in_tile) * 32 + lane] = make_uint4(nibbles[0], nibbles[1], out[0], out[1]);
    u32* plane = (u32*)(J.planes + ((size_t)tile * (blocks / 2) + in_tile / 2) * 256 * r + lane * 8 * r);
    if (r == 1) plane[in_tile & 1] = low[0];
    if (r == 2) {
      plane[(in_tile & 1) * 2] = low[0];
      plane[(in_tile & 1) * 2 + 1] = low[1];
    }
    low[0] = low[1] = 0;
    if (++in_tile == blocks) {
      in_tile = 0;
      tile += J.row_tiles;
    }
  }
};

__device__ __forceinline__ void copy_async_16_if(bool wanted, u32 to, const void* from) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p,%2,0; @p cp.async.cg.shared.global [%0],[%1],16; }" ::"r"(to), "l"(from), "r"((u32)wanted) : "memory");
}

// Bytes of a chunk on their way through shared memory, in groups that a warp copies together. Steps take at most 64 bytes each, so before
// eight steps a group more is asked for once there is room, and those asked for two times ago or earlier have arrived: with
// RING > bytes ahead > RING - GROUP after the request, that is more than the steps can take. The warp waits for these (`arrived`) and meets first: then all
// of it sees them, and has read what a request overwrites.
struct Ring {
  static constexpr u32 GROUP = 512, BYTES = 4 * GROUP;
  const u8* from;    // aligned to 16 bytes
  u32 at;            // next byte, counted from `from`
  u32 loaded;        // bytes asked for
  u32 end;           // bytes that may be read
  u32 shared;        // address

  __device__ __forceinline__ Ring(const u8* first, const u8* readable_end, u32 to, int lane) : shared(to) {
    at = (u32)((u64)first & 15);
    from = first - at;
    end = (u32)(readable_end - from) & ~15u;
    loaded = 0;
    for (int i = 0; i < 4; i++) request(lane);
  }
  // Without a branch, which would take longer.
  __device__ __forceinline__ void request(int lane, bool wanted = true) {
    const u32 mine = loaded + lane * 16;
    copy_async_16_if(wanted && mine < end, shared + mine % BYTES, from + mine);
    loaded += wanted ? GROUP : 0;
  }
  static __device__ __forceinline__ void arrived() {
    copy_async_wait_but<1>();
    __syncwarp();
  }
  __device__ __forceinline__ void ahead(int lane) { request(lane, loaded - at <= BYTES - GROUP); }
  __device__ __forceinline__ u32 byte(u32 behind) const {
    u32 v;
    asm volatile("ld.shared.u8 %0,[%1];" : "=r"(v) : "r"(shared + (at + behind) % BYTES) : "memory");
    return v;
  }
};

// The table's entries of the words ahead, a group of the warp at a time. Before STEPS steps, which take at most REACH words, groups are looked up while there is
// room, so that more than COUNT - GROUP entries lie ahead; at the start so many have been. That is one group at most for four steps, two for eight:
// no more bytes than have arrived in the ring. The first REACH entries are stored again behind the last: the steps never wrap.
template <u32 STEPS>
struct Entries {
  static constexpr u32 GROUP = 256, REACH = 64 * STEPS, COUNT = 1024;
  static_assert(REACH <= COUNT - GROUP && REACH % GROUP == 0 && STEPS <= 8, "what a ring holds");

  // Looks up the group of words that is next in the ring. Addresses: the table's, and the entries'.
  static __device__ __forceinline__ void look_up(Ring& words, u32 table, u32 to, int lane) {
    u32 found[2][4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const u32 four = load_shared(words.shared + (words.at + half * 128 + lane * 4) % Ring::BYTES);
#pragma unroll
      for (int i = 0; i < 4; i++) found[half][i] = load_shared(table + (four >> 8 * i & 255) * 4);
    }
    const u32 place = to + words.at % COUNT * 4 + lane * 16;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      store(place + half * 512, found[half]);
      if (words.at % COUNT < REACH) store(place + half * 512 + COUNT * 4, found[half]);
    }
    words.at += GROUP;
  }
  static __device__ __forceinline__ void store(u32 address, const u32 (&v)[4]) {
    asm volatile("st.shared.v4.u32 [%0],{%1,%2,%3,%4};" ::"r"(address), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
  }
};

// A word of shared memory from one of two addresses. Two loads, so that the one that is known early is not late.
__device__ __forceinline__ u32 load_early(bool early, u32 address) {
  u32 v;
  asm volatile("{ .reg .pred p; setp.ne.u32 p,%2,0; @p ld.shared.u32 %0,[%1]; }" : "=r"(v) : "r"(address), "r"((u32)early) : "memory");
  return v;
}
__device__ __forceinline__ void load_late(bool early, u32& v, u32 address) {
  asm volatile("{ .reg .pred p; setp.eq.u32 p,%2,0; @p ld.shared.u32 %0,[%1]; }" : "+r"(v) : "r"(address), "r"((u32)early) : "memory");
}

// The states of a chunk's lanes, two a thread, and its words and escapes.
//
// Table.  An entry for each low byte b of a state x = h << 8 | b. With p = prob_bits, slot b % 2^p:
//   freq * (x >> p) + offset = h * (freq << 8 - p) + freq * (b >> p) + offset = h * scale + rest
// where rest < scale <= 256, as offset < freq: rest fits a byte, and scale two that are added.
// Entry: min(scale, 255) | rest << 8 | symbol << 16 | scale - min(scale, 255) << 24. With the factors h, 1, 0, h, dp4a makes the next state of it.
// Entries of one symbol differ by rest: an entry tells b.
//
// What a step waits for.  The next state's low byte is a word where the state takes one. So words are looked up before they are wanted: a ring
// holds the table's entries of the words ahead, and a lane loads either that of its low byte or that of its word, never one after the other.
template <u32 STEPS>
struct Lanes {
  using Ahead = Entries<STEPS>;
  struct Room {
    u32 table[256];
    u8 words[Ring::BYTES], escapes[Ring::BYTES];
    u32 entries[Ahead::COUNT + Ahead::REACH];
  };

  Ring words, escapes; // next word: the next to be looked up
  u32 table, entries;  // addresses
  u32 below;           // of the warp's threads, those before this one
  u32 ea, eb;          // entries of the states' low bytes
  u32 xa, xb;          // factors of the states' high bytes
  u32 taken, first, word; // words before the steps; addresses of the first word's entry then, and of the next word's

  // With rings that have arrived and a table that is there, for all the warp.
  __device__ __forceinline__ Lanes(Ring of_words, Ring of_escapes, u32 table, u32 entries, const u8* states, int lane)
      : words(of_words), escapes(of_escapes), table(table), entries(entries), below((1u << lane) - 1), taken(of_words.at), first(0), word(0) {
    words.at = 0; // what lies before the first word is looked up, too
#pragma unroll 1
    for (u32 i = 0; i < Ahead::COUNT / Ahead::GROUP - 1; i++) Ahead::look_up(words, table, entries, lane);
    ea = load_shared(table + states[lane] * 4);
    eb = load_shared(table + states[32 + lane] * 4);
    xa = states[64 + lane] * 0x01000001 | 0x100;
    xb = states[96 + lane] * 0x01000001 | 0x100;
  }

  __device__ __forceinline__ u32 words_taken() const { return taken + (word - first) / 4; }

  // Before each STEPS steps, when the warp has met after those before.
  __device__ __forceinline__ void look_ahead(int lane) {
    taken = words_taken();
#pragma unroll 1
    for (u32 groups = (Ahead::COUNT + taken - words.at) / Ahead::GROUP; groups > 0; groups--) Ahead::look_up(words, table, entries, lane);
    first = word = entries + taken % Ahead::COUNT * 4;
    __syncwarp();
  }

  // A symbol of each lane is shifted in from above: the first of four ends lowest.
  __device__ __forceinline__ void step(u32 (&symbols)[2]) {
    const bool za = (ea & 0xff0000) == 0, zb = (eb & 0xff0000) == 0;
    symbols[0] = __byte_perm(symbols[0], ea, 0x6321);
    symbols[1] = __byte_perm(symbols[1], eb, 0x6321);
    const u32 ya = __dp4a(ea, xa, 0u), yb = __dp4a(eb, xb, 0u);
    const bool ha = ya < 256, hb = yb < 256; // below STATE_MIN
    ea = load_early(!ha, table + (ya & 255) * 4);
    eb = load_early(!hb, table + (yb & 255) * 4);
    const u32 ba = __ballot_sync(~0u, ha), bb = __ballot_sync(~0u, hb);
    const u32 word_b = word + __popc(ba) * 4;
    load_late(!ha, ea, word + __popc(ba & below) * 4);
    load_late(!hb, eb, word_b + __popc(bb & below) * 4);
    word = word_b + __popc(bb) * 4;
    xa = __byte_perm(ya, 1, ha ? 0x0540 : 0x1541);
    xb = __byte_perm(yb, 1, hb ? 0x0540 : 0x1541);
    // The branch asks what the ballots say, and not another vote: the assembler then moves the next step's first loads before it.
    const u32 la = __ballot_sync(~0u, za), lb = __ballot_sync(~0u, zb);
    if (la | lb) {
      const u32 of_a = __popc(la);
      // Without a branch: lanes that take no escape read one that others take.
      const u32 ca = escapes.byte(__popc(la & below)), cb = escapes.byte(of_a + __popc(lb & below));
      symbols[0] = za ? __byte_perm(symbols[0], ca, 0x4210) : symbols[0];
      symbols[1] = zb ? __byte_perm(symbols[1], cb, 0x4210) : symbols[1];
      escapes.at += of_a + __popc(lb);
    }
  }

  // If all is used and both lanes are back at STATE_MIN.
  __device__ __forceinline__ bool ended(u32 words_end, u32 escapes_end) const {
    const u32 low_byte_0 = load_shared(table);
    return xa == 0x01000101 && xb == 0x01000101 && ea == low_byte_0 && eb == low_byte_0 && words_taken() == words_end && escapes.at == escapes_end;
  }
};
