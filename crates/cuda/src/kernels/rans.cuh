// rans: what the decoders of the file's chunks share (rans.cu, rans_pairs.cu): what they are given, rings in shared memory, the plain layout.

struct RansChunk {
  u64 offset;        // in `payload`: of the chunk (rans), of its states (rans-pairs)
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
  const u32* table;  // (2^prob_bits): what a kernel looks up by slot
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
  u32 raw_bits;      // of the window of rans-pairs
  u32 base;          // its first symbol byte
};

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

// A block of 64 columns of a tile: the thread's words and low bits.
__device__ __forceinline__ void store_block(const RansJob& J, u32 tile, u32 in_tile, int lane, uint4 nibbles, const u32 (&low)[2]) {
  const u32 blocks = J.tc / 64;
  J.nibbles[((size_t)tile * blocks + in_tile) * 32 + lane] = nibbles;
  u32* plane = (u32*)(J.planes + ((size_t)tile * (blocks / 2) + in_tile / 2) * 256 * J.r + lane * 8 * J.r);
  if (J.r == 1) plane[in_tile & 1] = low[0];
  if (J.r == 2) {
    plane[(in_tile & 1) * 2] = low[0];
    plane[(in_tile & 1) * 2 + 1] = low[1];
  }
}

// Bytes of a chunk on their way through shared memory, in groups that a warp copies together. Steps take at most 64 bytes each, so before
// eight steps a group more is asked for once there is room, and those asked for two times ago or earlier have arrived: with
// RING > bytes ahead > RING - GROUP after the request, that is more than the steps can take.
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
  __device__ __forceinline__ void request(int lane) {
    const u32 mine = loaded + lane * 16;
    if (mine < end) copy_async_16(shared + mine % BYTES, from + mine);
    loaded += GROUP;
  }
  __device__ __forceinline__ void ahead(int lane) {
    if (loaded - at <= BYTES - GROUP) request(lane);
  }
  __device__ __forceinline__ u32 byte(u32 behind) const {
    u32 v;
    asm volatile("ld.shared.u8 %0,[%1];" : "=r"(v) : "r"(shared + (at + behind) % BYTES) : "memory");
    return v;
  }
};
