"""The GPU kernels step by step in NumPy: same buffers, same order, all strips and lanes at once.

This is what is checked where no GPU is: `decode` must give back MLX's packed matrix bit for bit. `gemv` sums in the kernels' order, in
``float32``; a GPU may fuse a multiplication with the addition that follows and so differ in the last bits.
"""

import numpy as np

from .layout import CODE_BITS_MAX, LANES, REFILL_BELOW, SYMBOLS_PER_REFILL, TABLE_ENTRIES, DeviceLayout

SIMDGROUPS_MAX = 16  # SIMD groups of a threadgroup, see kernels/description.py


def decode_strips(layout: DeviceLayout, strips: np.ndarray, steps: int):
    """Yields, for each of ``steps`` steps, one packed word ``uint32`` for each lane of ``strips``: (strips, 32)."""
    at = layout.strip_starts[strips].astype(np.int64)[:, None]
    window = np.zeros((len(strips), LANES), np.uint64)
    have = np.zeros((len(strips), LANES), np.int64)
    for _ in range(steps):
        packed = np.zeros((len(strips), LANES), np.uint32)
        for symbol in range(4):
            if symbol % SYMBOLS_PER_REFILL == 0:
                wants = have < REFILL_BELOW
                below = np.cumsum(wants, axis=1) - wants  # lanes before this one that ask
                taken = layout.words[np.where(wants, at + below, 0)].astype(np.uint64)
                window |= np.where(wants, taken << have.astype(np.uint64), np.uint64(0))
                have += np.where(wants, 32, 0)
                at = at + wants.sum(axis=1, keepdims=True)
            entry = layout.table[window & np.uint64(TABLE_ENTRIES - 1)]
            bits = entry >> np.uint16(8)
            packed |= (entry & np.uint16(255)).astype(np.uint32) << np.uint32(8 * symbol)
            window >>= bits.astype(np.uint64)
            have -= bits
        yield packed


def _strips_of_segment(layout: DeviceLayout, segment: int) -> np.ndarray:
    return np.arange(layout.row_tiles) * layout.segments + segment


def _steps_of_segment(layout: DeviceLayout, segment: int) -> int:
    return (min(layout.cols, (segment + 1) * layout.segment_cols) - segment * layout.segment_cols) // 8


def decode(layout: DeviceLayout) -> np.ndarray:
    """MLX's packed matrix (rows, cols / 8) ``uint32``."""
    out = np.zeros((layout.row_tiles * LANES, layout.cols // 8), np.uint32)
    for segment in range(layout.segments):
        column = segment * layout.segment_cols // 8
        steps = _steps_of_segment(layout, segment)
        for step, packed in enumerate(decode_strips(layout, _strips_of_segment(layout, segment), steps)):
            out[:, column + step] = packed.reshape(-1)
    return out[: layout.rows]


def decode_rows(layout: DeviceLayout, ids: np.ndarray) -> np.ndarray:
    """Packed rows ``ids`` (n,) of the matrix: (n, cols / 8) ``uint32``."""
    ids = np.asarray(ids, np.int64).reshape(-1)
    out = np.zeros((len(ids), layout.cols // 8), np.uint32)
    for segment in range(layout.segments):
        strips = ids // LANES * layout.segments + segment
        column = segment * layout.segment_cols // 8
        for step, packed in enumerate(decode_strips(layout, strips, _steps_of_segment(layout, segment))):
            out[:, column + step] = packed[np.arange(len(ids)), ids % LANES]
    return out


def gemv(layout: DeviceLayout, scales: np.ndarray, biases: np.ndarray, group_size: int, x: np.ndarray) -> np.ndarray:
    """``x`` (tokens, cols) times the transposed matrix: (tokens, rows) ``float32``, in the order of the kernel's sums."""
    rows_padded = layout.row_tiles * LANES
    pad = ((0, rows_padded - layout.rows), (0, 0))
    scales = np.pad(scales.astype(np.float32), pad)
    biases = np.pad(biases.astype(np.float32), pad)
    x = x.astype(np.float32)
    simdgroups = min(layout.segments, SIMDGROUPS_MAX)
    partial = np.zeros((simdgroups, len(x), rows_padded), np.float32)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    for segment in range(layout.segments):
        sums = partial[segment % simdgroups]
        dot = np.zeros((len(x), rows_padded), np.float32)
        total = np.zeros((len(x), 1), np.float32)
        steps = _steps_of_segment(layout, segment)
        for step, packed in enumerate(decode_strips(layout, _strips_of_segment(layout, segment), steps)):
            column = segment * layout.segment_cols + 8 * step
            q = (packed.reshape(-1, 1) >> shifts & np.uint32(15)).astype(np.float32)
            for k in range(8):
                dot += x[:, column + k, None] * q[None, :, k]
                total += x[:, column + k, None]
            if (column + 8) % group_size == 0:
                group = column // group_size
                sums += scales[None, :, group] * dot + biases[None, :, group] * total
                dot[:] = 0
                total[:] = 0
    y = np.zeros((len(x), rows_padded), np.float32)
    for sums in partial:
        y += sums
    return y[:, : layout.rows]


assert REFILL_BELOW == SYMBOLS_PER_REFILL * CODE_BITS_MAX
