"""The device-side layout of a coded matrix: byte-Huffman streams, one for each lane of a SIMD group.

The file's codecs are made for CPU registers. A GPU wants thousands of independent decoders that never wait for each other, so a
matrix is transcoded once, when it is first used on a GPU; the file stays the one source. The layout is deliberately plain:

* A *symbol* is one byte of MLX's packed 4-bit matrix, i.e. two neighbouring weights. Four symbols are one ``uint32`` of MLX's layout.
* The code is one canonical Huffman code for the whole matrix, at most `CODE_BITS_MAX` bits long, first bit lowest. So a table
  of ``2**CODE_BITS_MAX`` entries ``byte | length << 8`` decodes one symbol with one lookup.
* A *strip* is 32 rows x `segment_cols` columns, the work of one SIMD group. Each of its 32 lanes decodes one row of it, from a bit stream
  of its own. Strips are numbered from left to right, and rows of strips (*row tiles*) from top to bottom.
* Words (``uint32``) of a strip are stored in the order in which the lanes ask for them. Before every two symbols all lanes that hold
  fewer than `REFILL_BELOW` bits take one word each, in lane order. So loads of a SIMD group are always contiguous, there is no padding
  between streams, and the position of a lane's next word is a population count.

Rows are padded to a multiple of 32 with the shortest symbol. ``cols`` is a multiple of 32; the last segment may be shorter.
"""

from dataclasses import dataclass

import numpy as np

LANES = 32
CODE_BITS_MAX = 12
REFILL_BELOW = 2 * CODE_BITS_MAX  # two symbols are decoded between refills
SYMBOLS_PER_REFILL = 2
TABLE_ENTRIES = 1 << CODE_BITS_MAX

# A stream wastes about 25 bits at its end, a short one wastes more of its length; but a GPU wants tens of thousands of lanes.
SEGMENT_COLS_MIN = 512
SEGMENT_COLS_MAX = 2048
LANES_WANTED = 65536


@dataclass(frozen=True)
class DeviceLayout:
    """A coded 4-bit matrix as the GPU kernels read it. Arrays are NumPy's; the MLX backends convert them."""

    rows: int
    cols: int
    segment_cols: int  # columns of a strip, a multiple of 128; the last segment holds what is left
    table: np.ndarray  # (4096,) uint16: byte | code length << 8
    strip_starts: np.ndarray  # (strips,) uint32: index of the strip's first word
    words: np.ndarray  # (words,) uint32

    @property
    def row_tiles(self) -> int:
        return -(-self.rows // LANES)

    @property
    def segments(self) -> int:
        return -(-self.cols // self.segment_cols)

    @property
    def nbytes(self) -> int:
        """Bytes on the device, table and starts included."""
        return self.table.nbytes + self.strip_starts.nbytes + self.words.nbytes


def plan_segment_cols(rows: int, cols: int) -> int:
    """Longest segment that still leaves `LANES_WANTED` lanes, within the bounds above."""
    segment = SEGMENT_COLS_MAX
    while segment > SEGMENT_COLS_MIN and rows * -(-cols // segment) < LANES_WANTED:
        segment //= 2
    return segment


def code_lengths(counts: np.ndarray, bits_max: int = CODE_BITS_MAX) -> np.ndarray:
    """Lengths of an optimal prefix code with codes of at most ``bits_max`` bits, by package-merge.

    ``counts`` (n,) are the symbols' frequencies; symbols that do not occur get length 0. A lone symbol gets length 1.
    """
    present = [(int(count), (symbol,)) for symbol, count in enumerate(counts) if count]
    present.sort()
    lengths = np.zeros(len(counts), np.int64)
    if not present:
        return lengths
    if len(present) == 1:
        lengths[present[0][1][0]] = 1
        return lengths
    if len(present) > 1 << bits_max:
        raise ValueError(f"{len(present)} symbols do not fit codes of {bits_max} bits")
    packages: list = []
    for _ in range(bits_max):
        pairs = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(packages[0::2], packages[1::2])]
        packages = sorted(present + pairs)
    for _, symbols in packages[: 2 * len(present) - 2]:
        for symbol in symbols:
            lengths[symbol] += 1
    return lengths


def canonical_codes(lengths: np.ndarray) -> np.ndarray:
    """Canonical codes (by length, then by symbol) with their first bit in bit 0."""
    codes = np.zeros(len(lengths), np.uint32)
    code, previous = 0, 0
    for symbol in sorted(np.flatnonzero(lengths), key=lambda s: (lengths[s], s)):
        bits = int(lengths[symbol])
        code <<= bits - previous
        codes[symbol] = int(f"{code:0{bits}b}"[::-1], 2)
        code, previous = code + 1, bits
    return codes


def decode_table(lengths: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Entry ``byte | length << 8`` for every value of the window's low `CODE_BITS_MAX` bits."""
    table = np.zeros(TABLE_ENTRIES, np.uint16)
    for symbol in np.flatnonzero(lengths):
        bits = int(lengths[symbol])
        table[int(codes[symbol]) :: 1 << bits] = int(symbol) | bits << 8
    return table


def transcode(packed: np.ndarray, segment_cols: int | None = None) -> DeviceLayout:
    """Codes MLX's packed matrix ``packed`` (rows, cols / 8) ``uint32`` for the GPU kernels."""
    packed = np.ascontiguousarray(packed, dtype="<u4")
    rows, cols = packed.shape[0], packed.shape[1] * 8
    if rows == 0 or cols == 0 or cols % LANES:
        raise ValueError(f"a matrix of {rows} x {cols} has no device layout: its columns must be a positive multiple of 32")
    segment_cols = segment_cols or plan_segment_cols(rows, cols)
    if segment_cols % 128:
        raise ValueError(f"segment_cols must be a multiple of 128, not {segment_cols}")

    symbols = packed.view(np.uint8)  # (rows, cols / 2)
    lengths = code_lengths(np.bincount(symbols.reshape(-1), minlength=256))
    codes = canonical_codes(lengths)
    shortest = int(min(np.flatnonzero(lengths), key=lambda s: lengths[s]))

    words, counts = [], []
    for top in range(0, rows, LANES):
        tile = symbols[top : top + LANES]
        if len(tile) < LANES:
            fill = np.full((LANES - len(tile), tile.shape[1]), shortest, np.uint8)
            tile = np.concatenate([tile, fill])
        for left in range(0, cols, segment_cols):
            strip = tile[:, left // 2 : (left + segment_cols) // 2]
            words.append(_strip_words(strip, lengths, codes))
            counts.append(len(words[-1]))
    starts = np.concatenate([[0], np.cumsum(counts)])
    if starts[-1] >= 1 << 32:
        raise ValueError(f"{starts[-1]} words exceed the layout's 32-bit positions")
    return DeviceLayout(
        rows=rows,
        cols=cols,
        segment_cols=segment_cols,
        table=decode_table(lengths, codes),
        strip_starts=starts[:-1].astype(np.uint32),
        words=np.concatenate(words),
    )


def _strip_words(strip: np.ndarray, lengths: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Words of one strip (32, symbols) in the order of the lanes' requests."""
    lanes, count = strip.shape
    bits = lengths[strip]
    ends = np.cumsum(bits, axis=1)
    begins = ends - bits

    # Word k of a lane is requested at the first refill at which 32 k - begin < REFILL_BELOW bits are held.
    at_refill = begins[:, ::SYMBOLS_PER_REFILL]
    held_words = -(-(at_refill + REFILL_BELOW) // 32)  # words taken once this refill is done
    asks = np.diff(held_words, axis=1, prepend=0)  # 0 or 1, for codes are shorter than a word
    streams = np.zeros((lanes, int(held_words[:, -1].max()) + 1), np.uint64)

    # Every code falls into the word in which it begins, and perhaps spills into the next one. All words but the last have a beginning.
    shifted = codes[strip].astype(np.uint64) << (begins & 31).astype(np.uint64)
    flat = (np.arange(lanes)[:, None] * streams.shape[1] + begins // 32).reshape(-1)
    firsts = np.flatnonzero(np.diff(flat, prepend=-1))
    sums = np.add.reduceat(shifted.reshape(-1), firsts)
    streams.reshape(-1)[flat[firsts]] = sums & np.uint64(0xFFFFFFFF)
    streams.reshape(-1)[flat[firsts] + 1] |= sums >> np.uint64(32)

    refill, lane = np.nonzero(asks.T)
    return streams[lane, held_words[lane, refill] - 1].astype(np.uint32)
