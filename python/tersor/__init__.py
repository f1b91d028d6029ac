"""Entropy-coded quantized weights: codecs over NumPy arrays.

A matrix of integer *symbols* (quantized weights) becomes a *blob*: a ``uint8`` array, the coded tensor of FORMAT.md to the byte. A blob
is checked before it is used, never trusted. Long work releases the GIL and uses all cores.

Errors come by kind: ``ValueError`` for what the caller got wrong, ``NotImplementedError`` for what this version does not support,
``MemoryError``, ``OSError`` for files, and ``CorruptError`` (a ``ValueError``) for bytes that contradict the format.
"""

from ._native import Coded, CodedLinear, CorruptError, __version__, encode, encode_affine4, entropy

__all__ = [
    "Coded",
    "CodedLinear",
    "CorruptError",
    "__version__",
    "blob_info",
    "decode",
    "decode_affine4",
    "encode",
    "encode_affine4",
    "entropy",
    "gemv",
]


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
