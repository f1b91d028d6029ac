"""Language models with entropy-coded weights: codecs and quantizers over NumPy arrays, model directories, generation.

A matrix of integer *symbols* (quantized weights) becomes a *blob*: a ``uint8`` array, the coded tensor of FORMAT.md to the byte. A blob
is checked before it is used, never trusted. Long work releases the GIL and uses all cores.

Errors come by kind: ``ValueError`` for what the caller got wrong, ``NotImplementedError`` for what this version does not support,
``MemoryError`` for memory and budgets, ``OSError`` for files, ``CorruptError`` (a ``ValueError``) for bytes that contradict the format, and
``RuntimeError`` for what the machine lacks or fails in, such as a GPU.

``progress`` is told how long work gets on: either a callable ``progress(done, total)``, called for each tensor in the units of the
phase (weights or bytes), or a tqdm bar, whose total, description and count are set. What it raises ends the work, and so does Ctrl-C;
nothing half-written is left.
"""

import sys
from typing import NamedTuple, Optional

import numpy as np

from . import _native
from ._native import (
    Coded,
    CodedLinear,
    CorruptError,
    Model,
    Stream,
    __version__,
    encode,
    encode_affine4,
    encode_dir,
    entropy,
    export,
    inspect,
    quantize,
)

__all__ = [
    "Coded",
    "CodedLinear",
    "CorruptError",
    "Model",
    "Quantized",
    "Stream",
    "__version__",
    "blob_info",
    "decode",
    "decode_affine4",
    "encode",
    "encode_affine4",
    "encode_dir",
    "entropy",
    "export",
    "gemv",
    "inspect",
    "quantize",
    "quantize_array",
]

if sys.executable:
    _native.set_launcher([sys.executable, "-m", "tersor"])


class Quantized(NamedTuple):
    """A quantized matrix."""

    symbols: np.ndarray
    """int16, (rows, cols)"""
    scales: np.ndarray
    """float32: (1) for the whole matrix, (rows), or (rows, groups)"""
    biases: Optional[np.ndarray]
    """float32, (rows, groups), for affine4; then w = scale * (symbol + 8) + bias, else w = scale * symbol"""
    dequantized: np.ndarray
    """float32, (rows, cols): the weights that symbols and scales stand for"""


def quantize_array(w, *, scheme="ecsq", bpw=None, group_size=None):
    """Quantizes a matrix: float16, float32, or bfloat16 (``ml_dtypes.bfloat16``, or its bits as uint16), (rows, cols).

    ``scheme``: ``ecsq``, ``affine4`` (MLX's, bit for bit), ``q4_0`` (GGML's), ``int4-row``, ``int4-tensor``. ``bpw``, for ``ecsq``: bits
    per weight of symbols (at their entropy) and scales together, 4.0 unless given. ``group_size``, for ``affine4``: 32, 64 or 128.
    """
    return Quantized(*_native.quantize_array(w, scheme=scheme, bpw=bpw, group_size=group_size))


def decode(blob):
    """The symbols of a blob: int16, (rows, cols).

    Use :class:`Coded` to decode the same blob often without checking it each time.
    """
    return Coded(blob).decode()


def decode_affine4(blob, out=None):
    """The symbols of a blob in MLX's layout: uint32, (rows, cols / 8).

    Nibble ``i`` of a word, lowest bits first, is the symbol of column ``8 * word + i`` plus 8: what ``mx.quantized_matmul`` takes as its
    weights. Decodes by the SIMD kernels. ``out``, if given, is filled and returned.

    Raises ``ValueError`` if a symbol is outside of -8..=7 or the columns are not a multiple of 8.
    """
    return Coded(blob).decode_affine4(out)


def gemv(blob, scales, biases, group_size, x):
    """The product ``x @ w.T`` with ``w = scales * (symbols + 8) + biases``, decoding while it multiplies: nothing is materialized.

    ``scales`` and ``biases``: (rows, cols / group_size); ``biases`` may be ``None``, then ``w = scales * symbols``. ``x``: float32,
    (cols) or (tokens, cols). Returns float32, (rows) or (tokens, rows). Tersor's arithmetic: activations are rounded to int8 with one
    scale for each group, so the result is not the bits of ``mx.quantized_matmul``.

    Use :class:`CodedLinear` to multiply with the same matrix often.
    """
    return CodedLinear(blob, scales, biases, group_size)(x)


def blob_info(blob):
    """What a blob holds: rows, cols, scheme, group_size, codec, chunks, rows_per_chunk, bytes, bits_per_weight (all bytes of the blob),
    entropy_bits (per weight; the blob is decoded for it), symbol_min and symbol_max (clamped to int8)."""
    return Coded(blob).info()
