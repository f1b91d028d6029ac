"""Blobs: round trips, MLX's layout, products, refusals."""

import threading
import time

import numpy as np
import pytest
import tersor

CODECS = ["rans", "rans-precise", "huffman", "block-ans", "tiered", "rans-pairs", "fixed"]


def gaussian(rows, cols, spread, seed=0, dtype=np.int16):
    noise = np.random.default_rng(seed).normal(0, spread, (rows, cols))
    return np.clip(np.rint(noise), -127, 127).astype(dtype)


def nibbles(rows, cols, seed=0):
    return np.clip(gaussian(rows, cols, 2.5, seed), -8, 7)


def pack(symbols):
    """MLX's packing by its definition."""
    fields = (symbols + 8).astype(np.uint32).reshape(symbols.shape[0], -1, 8)
    return (fields << (4 * np.arange(8, dtype=np.uint32))).sum(axis=2, dtype=np.uint32)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (37, 203), (300, 512)])
@pytest.mark.parametrize("dtype", [np.int8, np.int16])
def test_decode_inverts_encode(codec, shape, dtype):
    symbols = gaussian(*shape, 3.0, dtype=dtype)
    blob = tersor.encode(symbols, codec=codec)
    assert blob.dtype == np.uint8 and blob.ndim == 1 and blob.size % 64 == 0
    decoded = tersor.decode(blob)
    assert decoded.dtype == np.int16
    np.testing.assert_array_equal(decoded, symbols)


def test_any_int16_and_any_memory_order():
    symbols = np.random.default_rng(1).integers(-32768, 32768, (40, 24), dtype=np.int16)
    np.testing.assert_array_equal(tersor.decode(tersor.encode(symbols)), symbols)
    np.testing.assert_array_equal(tersor.decode(tersor.encode(symbols.T)), symbols.T)
    np.testing.assert_array_equal(tersor.decode(tersor.encode(symbols[::2, ::3])), symbols[::2, ::3])
    np.testing.assert_array_equal(tersor.decode(tersor.encode(symbols).tobytes()), symbols)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(1, 8), (16, 128), (50, 136), (257, 1024)])
def test_affine4_is_mlx_layout(codec, shape):
    symbols = nibbles(*shape)
    packed = pack(symbols)
    blob = tersor.encode_affine4(packed, codec=codec)
    np.testing.assert_array_equal(blob, tersor.encode(symbols, codec=codec))
    np.testing.assert_array_equal(tersor.decode_affine4(blob), packed)
    out = np.zeros_like(packed)
    assert tersor.decode_affine4(blob, out) is out
    np.testing.assert_array_equal(out, packed)


def test_affine4_by_rows():
    symbols = nibbles(1000, 256)
    coded = tersor.Coded(tersor.encode(symbols))
    packed = pack(symbols)
    for start, stop in [(0, 1000), (0, 1), (255, 513), (999, 1000), (7, 7)]:
        np.testing.assert_array_equal(coded.decode_affine4(start=start, stop=stop), packed[start:stop])
    out = np.zeros_like(packed)
    for start in range(0, 1000, coded.rows_per_chunk):
        stop = min(1000, start + coded.rows_per_chunk)
        coded.decode_affine4(out[start:stop], start=start, stop=stop)
    np.testing.assert_array_equal(out, packed)


@pytest.mark.parametrize("kind", [np.float16, np.float32, "bfloat16 bits"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_products_are_those_of_the_dequantized_matrix(kind, group_size):
    rng = np.random.default_rng(2)
    symbols = nibbles(96, 512)
    real = rng.uniform(0.01, 0.02, (96, 512 // group_size)).astype(np.float32)
    real_biases = -8 * real + rng.normal(0, 0.01, real.shape).astype(np.float32)
    if kind == "bfloat16 bits":
        scales, biases = ((part.view(np.uint32) >> 16).astype(np.uint16) for part in (real, real_biases))
        real, real_biases = ((part.astype(np.uint32) << 16).view(np.float32) for part in (scales, biases))
    else:
        scales, biases = real.astype(kind), real_biases.astype(kind)
        real, real_biases = scales.astype(np.float32), biases.astype(np.float32)
    fields = (symbols + 8).reshape(96, -1, group_size)
    weights = (fields * real[..., None] + real_biases[..., None]).reshape(96, 512)
    x = rng.normal(0, 1, (5, 512)).astype(np.float32)
    blob = tersor.encode(symbols)
    y = tersor.gemv(blob, scales, biases, group_size, x)
    want = x @ weights.T
    # Activations are rounded to int8: a 250th of the largest at most, so far less of the norm.
    assert np.linalg.norm(y - want) < 0.02 * np.linalg.norm(want)
    linear = tersor.CodedLinear(tersor.Coded(blob), scales, biases, group_size)
    for token in range(5):
        np.testing.assert_array_equal(linear(x[token]), y[token])


def test_entropy_and_info():
    symbols = np.array([[0, 0, 1, 1]] * 16, dtype=np.int8)
    assert tersor.entropy(symbols) == 1.0
    assert tersor.entropy(symbols[0, :1]) == 0.0
    symbols = gaussian(512, 2048, 2.0)
    info = tersor.blob_info(blob := tersor.encode(symbols, codec="rans-precise"))
    _, counts = np.unique(symbols, return_counts=True)
    p = counts / symbols.size
    assert info["entropy_bits"] == pytest.approx(-(p * np.log2(p)).sum(), abs=1e-9)
    assert 0 < info["bits_per_weight"] - info["entropy_bits"] < 0.02
    assert (info["rows"], info["cols"], info["scheme"], info["bytes"]) == (512, 2048, "tensor", blob.size)
    assert info["codec"] == "rans/s32-w16-p12-l32"
    assert (info["symbol_min"], info["symbol_max"]) == (symbols.min(), symbols.max())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tersor.encode(np.zeros(4, np.int8)), "rows, cols"),
        (lambda: tersor.encode(np.zeros((4, 4), np.float32)), "float32"),
        (lambda: tersor.encode([[1]]), "list"),
        (lambda: tersor.encode(np.zeros((0, 4), np.int8)), "0 x 4"),
        (lambda: tersor.encode(np.zeros((4, 4), np.int8), codec="zip"), "zip"),
        (lambda: tersor.encode_affine4(np.zeros((4, 4), np.int32)), "uint32"),
        (lambda: tersor.decode(np.zeros((2, 64), np.uint8)), "one dimension"),
        (lambda: tersor.decode_affine4(tersor.encode(np.full((16, 16), 9, np.int8))), "-8 to 7"),
        (lambda: tersor.decode_affine4(tersor.encode(np.zeros((16, 12), np.int8))), "columns"),
        (lambda: tersor.decode_affine4(tersor.encode(np.zeros((16, 16), np.int8)), np.zeros((16, 3), np.uint32)), "(16, 2)"),
        (lambda: tersor.Coded(tersor.encode(np.zeros((16, 16), np.int8))).decode_affine4(start=3, stop=17), "17"),
        (lambda: tersor.gemv(tersor.encode(np.zeros((16, 64), np.int8)), np.ones((16, 2), np.float16), None, 64, np.ones(64, np.float32)), "[16, 1]"),
        (lambda: tersor.gemv(tersor.encode(np.zeros((16, 64), np.int8)), np.ones((16, 1), np.float64), None, 64, np.ones(64, np.float32)), "float64"),
        (lambda: tersor.gemv(tersor.encode(np.zeros((16, 66), np.int8)), np.ones((16, 11), np.float16), None, 6, np.ones(66, np.float32)), "multiple of 4"),
        (lambda: tersor.gemv(tersor.encode(np.zeros((16, 64), np.int8)), np.ones((16, 1), np.float16), None, 64, np.ones(65, np.float32)), "65 columns"),
    ],
)
def test_misuse_is_a_value_error_that_says_what(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert not isinstance(error.value, tersor.CorruptError)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_every_changed_byte_of_a_blob_is_refused_or_harmless():
    symbols = nibbles(16, 24)
    blob = tersor.encode(symbols)
    refused = 0
    for at in range(blob.size):
        damaged = blob.copy()
        damaged[at] ^= 0x41
        try:
            decoded = tersor.decode(damaged)
        except (ValueError, NotImplementedError):
            refused += 1
        else:
            np.testing.assert_array_equal(decoded, symbols)
    # All but the zeros that fill up, 48 to 127 of them, and the scheme's fields, which the checksum covers.
    assert refused >= blob.size - 64 - 64
    for length in range(0, blob.size, 7):
        with pytest.raises(tersor.CorruptError):
            tersor.decode(blob[:length])


def test_unsupported_versions_are_not_implemented():
    blob = tersor.encode(np.zeros((16, 16), np.int8))
    blob[4] = 9
    with pytest.raises(NotImplementedError, match="version 9"):
        tersor.decode(blob)


def test_other_threads_run_meanwhile():
    """The GIL is released: while one thread codes, this one goes on."""
    symbols = gaussian(2048, 4096, 2.0)
    worker = threading.Thread(target=lambda: [tersor.decode(tersor.encode(symbols)) for _ in range(2)])
    worker.start()
    turns = 0
    while worker.is_alive():
        time.sleep(1e-3)
        turns += 1
    # Four calls that kept the GIL would leave this thread about as many turns.
    assert turns > 20
