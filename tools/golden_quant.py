#!/usr/bin/env python3
"""Golden vectors for crates/quant, made without our code.

affine4.json  by MLX itself (mx.quantize on its CPU backend)
q4_0.json     by a NumPy form of GGML's quantize_row_q4_0_ref
ecsq.json     by a NumPy form of the formulas in crates/quant's documentation

    python3 -m venv /tmp/mlxenv && /tmp/mlxenv/bin/pip install numpy "mlx[cpu]==0.32.4"
    /tmp/mlxenv/bin/python tools/golden_quant.py            # writes crates/quant/tests/golden/*.json

Arrays are hex strings of little-endian elements.
"""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np

OUT = Path(__file__).resolve().parent.parent / "crates/quant/tests/golden"
COLS = 128


def rows_of_every_kind(rng):
    """(rows, COLS) float32: ordinary rows and the corners of the algorithms."""
    gauss = rng.standard_normal((16, COLS)).astype(np.float32) * np.float32(0.02)
    gauss[1] = np.abs(gauss[1])  # one sign only: the edge is the maximum
    gauss[2] = -np.abs(gauss[2])
    gauss[3] = 0
    gauss[4] = -0.0
    gauss[5] = 0.375  # constant
    gauss[6, :64] = -0.375
    gauss[7] *= rng.random(COLS) < 0.02  # nearly empty
    gauss[8, 17] = 1.0  # outlier
    gauss[9, 90] = -3.0
    gauss[10] *= np.float32(1e-6)  # scales near fp16's subnormals and MLX's 1e-7
    gauss[11] *= np.float32(1e-4)
    gauss[12] = 5 + gauss[12] * np.float32(1e-3)  # a range far from zero
    gauss[13] = (np.arange(COLS) % 33 - 16) / np.float32(32)  # on a lattice: ties, and +-max of equal magnitude
    gauss[14] = np.where(np.arange(COLS) % 2, 1, -1) * np.float32(0.5)
    gauss[15] *= np.float32(1e4)
    return gauss


def hexed(array):
    return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes().hex()


def bits(array):
    """An MLX float array's bits as a NumPy array."""
    if array.dtype == mx.float32:
        return np.array(array)
    return np.array(array.view(mx.uint16))


def affine4(weights):
    cases = []
    for name, dtype in (("f16", mx.float16), ("bf16", mx.bfloat16), ("f32", mx.float32)):
        for group_size in (32, 64, 128):
            w = mx.array(weights).astype(dtype)
            words, scales, biases = mx.quantize(w, group_size=group_size, bits=4)
            assert scales.dtype == dtype and biases.dtype == dtype
            cases.append(
                {
                    "dtype": name,
                    "group_size": group_size,
                    "rows": w.shape[0],
                    "cols": w.shape[1],
                    "weights": hexed(bits(w)),
                    "words": hexed(np.array(words)),
                    "scales": hexed(bits(scales)),
                    "biases": hexed(bits(biases)),
                }
            )
    return {"mlx": mx.__version__, "cases": cases}


def q4_0(weights):
    blocks = weights.reshape(-1, 32)
    extreme = blocks[np.arange(len(blocks)), np.abs(blocks).argmax(1)]  # argmax: the first of equals, as GGML's `<`
    extreme = np.where(extreme == 0, np.float32(0), extreme)  # +0 even among -0.0, so d = -0.0
    d = (extreme / np.float32(-8)).astype(np.float32)
    with np.errstate(divide="ignore"):
        inverse = np.where(d != 0, np.float32(1) / d, np.float32(0)).astype(np.float32)
    shifted = (blocks * inverse[:, None]).astype(np.float32) + np.float32(8.5)
    nibbles = np.minimum(np.trunc(shifted), 15).astype(np.uint8)
    packed = np.empty((len(blocks), 18), np.uint8)
    packed[:, :2] = d.astype(np.float16).view(np.uint8).reshape(-1, 2)
    packed[:, 2:] = nibbles[:, :16] | nibbles[:, 16:] << 4
    return {"rows": weights.shape[0], "cols": weights.shape[1], "weights": hexed(weights), "blocks": hexed(packed)}


def ecsq(weights):
    cases = []
    w = weights.astype(np.float64)
    for grid in ("row", "tensor"):
        for relative_step, rounding in ((0.3, 0.5), (1.0, 0.5), (0.5, 0.375), (0.01, 0.5)):
            axis = 1 if grid == "row" else None
            rms = np.sqrt((w * w).mean(axis, keepdims=True))
            step = np.float64(np.float32(relative_step)) * rms
            with np.errstate(divide="ignore"):
                inverse = np.where(step > 0, 1 / step, 0).astype(np.float32)
            u = weights * inverse
            q = np.trunc(np.abs(u) + np.float32(rounding)) * np.sign(u)
            norm = (q.astype(np.float64) ** 2).sum(axis)
            scale = step.reshape(norm.shape) * (u * q.astype(np.float64)).sum(axis) / np.where(norm > 0, norm, 1)
            positive = scale[scale > 0]
            exponent = 0
            if positive.size and (positive.min() < 2.0**-14 or positive.max() > 65504):
                exponent = int(np.floor(np.log2(positive.max()))) - 14
            cases.append(
                {
                    "grid": grid,
                    "relative_step": relative_step,
                    "rounding": rounding,
                    "symbols": hexed(q.astype(np.int16)),
                    "scales": hexed(np.atleast_1d(scale * 2.0**-exponent).astype(np.float16)),
                    "scale_exponent": exponent,
                }
            )
    return {"rows": weights.shape[0], "cols": weights.shape[1], "weights": hexed(weights), "cases": cases}


def main():
    mx.set_default_device(mx.cpu)
    weights = rows_of_every_kind(np.random.default_rng(20261124))
    for name, golden in (("affine4", affine4(weights)), ("q4_0", q4_0(weights)), ("ecsq", ecsq(weights[[0, 3, 7, 8, 11, 13]]))):
        (OUT / f"{name}.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
