"""The GPU kernels, written once. `source` gives the body of a kernel in Metal or in CUDA; the texts differ by a `Dialect` only.

Three kernels share one loop, which decodes a strip (see `layout.py`) with one SIMD group, one row to a lane, and differ in what they do
with a decoded word of eight weights:

========== =========================================================== =====================================
kernel      inputs                                                      outputs
========== =========================================================== =====================================
gemv        lut, starts, words, scales, biases (ROWS, COLS / GROUP),    y (TOKENS, ROWS) of type T
            x (TOKENS, COLS) of type T
decode      lut, starts, words                                          packed (ROWS, COLS / 8) uint32
decode_rows lut, starts, words, ids (IDS) int32                         packed (IDS, COLS / 8) uint32
========== =========================================================== =====================================

Constants of all kernels, as template arguments: ROWS, COLS, SEGMENT (columns of a strip), SEGMENTS (strips in a row), SIMDGROUPS (of a
threadgroup); gemv also GROUP, TOKENS, T; decode_rows IDS.

Threadgroup (32, SIMDGROUPS): one row tile (gemv, decode) or one id (decode_rows); SIMD group s takes segments s, s + SIMDGROUPS, ...
Memory of a threadgroup: the table, 8 KiB; gemv also 128 * SIMDGROUPS * TOKENS bytes of sums. Cost of the loop for four weights: one
ballot, two population counts, at most one load, two lookups, about ten integer operations; gemv adds eight multiply-adds.
gemv's sums are ordered by column within a segment and by SIMD group after that: deterministic, and independent of the device.
"""

from dataclasses import dataclass
from string import Template

from .layout import LANES, REFILL_BELOW, SYMBOLS_PER_REFILL, TABLE_ENTRIES, DeviceLayout
from .mirror import SIMDGROUPS_MAX

KERNELS = {
    "gemv": (["lut", "starts", "words", "scales", "biases", "x"], ["y"]),
    "decode": (["lut", "starts", "words"], ["packed"]),
    "decode_rows": (["lut", "starts", "words", "ids"], ["packed"]),
}

TOKENS_MAX = 8  # gemv keeps two sums a token in registers; more tokens are cheaper by decode and a matrix product


@dataclass(frozen=True)
class Dialect:
    """What the two languages spell differently."""

    name: str
    shared: str  # qualifier of threadgroup memory
    device: str  # qualifier of pointers to device memory
    lane: str
    simdgroup: str
    threadgroup: str
    ballot: str  # of `wants`, as a 32-bit mask
    popcount: str
    barrier: str
    unroll: str


METAL = Dialect(
    name="metal",
    shared="threadgroup",
    device="device",
    lane="thread_position_in_threadgroup.x",
    simdgroup="thread_position_in_threadgroup.y",
    threadgroup="threadgroup_position_in_grid.x",
    ballot="uint32_t(static_cast<simd_vote::vote_t>(simd_ballot(wants)))",
    popcount="popcount",
    barrier="threadgroup_barrier(mem_flags::mem_threadgroup)",
    unroll="_Pragma(\"clang loop unroll(full)\")",
)

CUDA = Dialect(
    name="cuda",
    shared="__shared__",
    device="",
    lane="threadIdx.x",
    simdgroup="threadIdx.y",
    threadgroup="blockIdx.x",
    ballot="__ballot_sync(0xffffffffu, wants)",
    popcount="__popc",
    barrier="__syncthreads()",
    unroll="_Pragma(\"unroll\")",
)

# Every lane of a SIMD group takes part in every ballot: trip counts are uniform, and lanes of padding rows decode too.
_PROLOGUE = """
  const uint32_t lane = $lane;
  const uint32_t simdgroup = $simdgroup;
  const uint32_t lanes_below = (1u << lane) - 1u;
  $shared uint16_t table[$TABLE_ENTRIES];
  for (uint32_t i = simdgroup * $LANES + lane; i < $TABLE_ENTRIES; i += $LANES * SIMDGROUPS) {
    table[i] = lut[i];
  }
  $barrier;
"""

_SEGMENT_LOOP = """
  for (uint32_t segment = simdgroup; segment < SEGMENTS; segment += SIMDGROUPS) {
    uint32_t at = starts[tile * SEGMENTS + segment];  // the strip's next word
    uint64_t window = 0;                              // this lane's next bits, lowest first
    uint32_t have = 0;                                // how many of them are valid
    const uint32_t column_end = segment + 1 < SEGMENTS ? (segment + 1) * SEGMENT : COLS;
    $body
  }
"""

# Eight weights into `word`, MLX's packed order.
_DECODE_WORD = """
      uint32_t word = 0;
      $unroll
      for (uint32_t symbol = 0; symbol < 4; ++symbol) {
        if (symbol % $SYMBOLS_PER_REFILL == 0) {
          const bool wants = have < $REFILL_BELOW;
          const uint32_t asking = $ballot;
          if (wants) {
            window |= uint64_t(words[at + $popcount(asking & lanes_below)]) << have;
            have += 32;
          }
          at += $popcount(asking);
        }
        const uint32_t entry = table[uint32_t(window) & $TABLE_MASK];
        word |= (entry & 255u) << (8 * symbol);
        window >>= entry >> 8;
        have -= entry >> 8;
      }
"""

_GEMV = """
  struct alignas(4 * sizeof(T)) Four { T v[4]; };
  $shared float sums[SIMDGROUPS * TOKENS * $LANES];
  const uint32_t tile = $threadgroup;
  const uint32_t row = tile * $LANES + lane;
  const uint32_t scale_row = (row < ROWS ? row : ROWS - 1) * (COLS / GROUP);
  float y_lane[TOKENS];
  $unroll
  for (uint32_t t = 0; t < TOKENS; ++t) { y_lane[t] = 0.0f; }
""" + Template(_SEGMENT_LOOP).safe_substitute(body="""
    for (uint32_t column = segment * SEGMENT; column < column_end; column += GROUP) {
      float dot[TOKENS];
      float total[TOKENS];
      $unroll
      for (uint32_t t = 0; t < TOKENS; ++t) { dot[t] = 0.0f; total[t] = 0.0f; }
      for (uint32_t c = column; c < column + GROUP; c += 8) {
        $decode_word
        $unroll
        for (uint32_t t = 0; t < TOKENS; ++t) {
          const $device Four* x4 = (const $device Four*)(x + t * COLS + c);
          const Four low = x4[0];
          const Four high = x4[1];
          $unroll
          for (uint32_t k = 0; k < 8; ++k) {
            const float value = static_cast<float>(k < 4 ? low.v[k & 3] : high.v[k & 3]);
            dot[t] += value * static_cast<float>((word >> (4 * k)) & 15u);
            total[t] += value;
          }
        }
      }
      const float scale = static_cast<float>(scales[scale_row + column / GROUP]);
      const float bias = static_cast<float>(biases[scale_row + column / GROUP]);
      $unroll
      for (uint32_t t = 0; t < TOKENS; ++t) { y_lane[t] += scale * dot[t] + bias * total[t]; }
    }
""") + """
  $unroll
  for (uint32_t t = 0; t < TOKENS; ++t) { sums[(simdgroup * TOKENS + t) * $LANES + lane] = y_lane[t]; }
  $barrier;
  if (simdgroup == 0 && row < ROWS) {
    for (uint32_t t = 0; t < TOKENS; ++t) {
      float sum = 0.0f;
      for (uint32_t s = 0; s < SIMDGROUPS; ++s) { sum += sums[(s * TOKENS + t) * $LANES + lane]; }
      y[t * ROWS + row] = static_cast<T>(sum);
    }
  }
"""

# Four words are stored at once: rows lie apart, and partial writes of a memory sector are dear.
_DECODE = """
  struct alignas(16) Store { uint32_t v[4]; };
  const uint32_t tile = $tile;
  const uint32_t row = $row;
  const bool writes = $writes;
""" + Template(_SEGMENT_LOOP).safe_substitute(body="""
    for (uint32_t column = segment * SEGMENT; column < column_end; column += 32) {
      Store four;
      $unroll
      for (uint32_t i = 0; i < 4; ++i) {
        $decode_word
        four.v[i] = word;
      }
      if (writes) {
        *($device Store*)(packed + row * (COLS / 8) + column / 8) = four;
      }
    }
""")

_BODIES = {
    "gemv": _GEMV,
    "decode": Template(_DECODE).safe_substitute(
        tile="$threadgroup", row="tile * $LANES + lane", writes="row < ROWS"
    ),
    "decode_rows": Template(_DECODE).safe_substitute(
        tile="uint32_t(ids[$threadgroup]) / $LANES",
        row="$threadgroup",
        writes="uint32_t(ids[$threadgroup]) % $LANES == lane",
    ),
}


def source(kernel: str, dialect: Dialect) -> str:
    """Body of ``kernel`` (a key of `KERNELS`) in ``dialect``, as `mx.fast.metal_kernel` and `mx.fast.cuda_kernel` take it."""
    text = _PROLOGUE + _BODIES[kernel]
    text = Template(text).safe_substitute(decode_word=_DECODE_WORD)
    values = dict(
        LANES=LANES,
        REFILL_BELOW=REFILL_BELOW,
        SYMBOLS_PER_REFILL=SYMBOLS_PER_REFILL,
        TABLE_ENTRIES=TABLE_ENTRIES,
        TABLE_MASK=f"{TABLE_ENTRIES - 1}u",
    )
    words = {f: getattr(dialect, f) for f in Dialect.__dataclass_fields__}
    return Template(text).substitute(**words, **values)


def constants(layout: DeviceLayout, **more: int) -> list[tuple[str, int]]:
    """Template arguments of a kernel on ``layout``; ``more`` are the kernel's own (GROUP, TOKENS, IDS)."""
    simdgroups = min(layout.segments, SIMDGROUPS_MAX)
    values = dict(ROWS=layout.rows, COLS=layout.cols, SEGMENT=layout.segment_cols, SEGMENTS=layout.segments)
    return list({**values, "SIMDGROUPS": simdgroups, **more}.items())
