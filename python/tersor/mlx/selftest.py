"""``python -m tersor.mlx.selftest``: checks and times every decode mode on this machine, and prints a report to paste into an issue.

The Metal kernels were written on machines without Metal. This is how they are tested: every check compares with MLX's own quantized layer
or with the NumPy mirror of the kernels. The exit code is 1 if a check fails.
"""

import argparse
import platform
import statistics as figures
import sys
import time
import traceback

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import tersor

from .coded import on_cpu
from .kernels import device, mirror
from .kernels.layout import transcode
from .layers import EntropyCodedEmbedding, EntropyCodedLinear
from .modes import MODES


class Report:
    """Rows of checks and timings, printed as Markdown while they come."""

    def __init__(self):
        self.failed = 0

    def check(self, name: str, verdict) -> None:
        """Runs ``verdict``, which returns (passed, what was seen)."""
        try:
            passed, seen = verdict()
        except Exception as error:  # a kernel that does not compile must not end the report
            passed, seen = False, f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
            traceback.print_exc()
        self.failed += not passed
        print(f"| {name} | {'pass' if passed else 'FAIL'} | {seen} |", flush=True)


def activation_type() -> mx.Dtype:
    """What models use on a GPU; on the CPU, where MLX emulates it slowly, ``float32``."""
    return mx.float32 if on_cpu() else mx.float16


def random_layer(rows: int, cols: int, bias: bool = False) -> nn.QuantizedLinear:
    layer = nn.Linear(cols, rows, bias=bias)
    layer.weight = 0.02 * mx.random.normal((rows, cols))
    layer.set_dtype(activation_type())
    return nn.QuantizedLinear.from_linear(layer, 64, 4)


def compare(actual: mx.array, expected: mx.array, exact: bool) -> tuple[bool, str]:
    """Equal to the bit, or as near as another order of the sums may bring it."""
    if mx.array_equal(actual, expected).item():
        return True, "bit-equal"
    actual, expected = actual.astype(mx.float32), expected.astype(mx.float32)
    error = mx.abs(actual - expected).max().item() / max(mx.abs(expected).max().item(), 1e-30)
    return (not exact and error < 4e-3), f"largest difference {error:.1e} of the largest value"


def seconds(call, repeat: int = 30) -> float:
    """Median time of one evaluated call."""
    for _ in range(3):
        mx.eval(call())
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        mx.eval(call())
        times.append(time.perf_counter() - start)
    return figures.median(times)


def check_kernels(report: Report, kernels: device.DeviceKernels) -> None:
    """The kernels against the mirror, at awkward sizes: padded rows, a short last segment, more segments than SIMD groups."""
    for rows, cols, segment in ((32, 512, 512), (100, 1536, 1024), (33, 9216, 512)):
        quantized = random_layer(rows, cols)
        packed = np.array(quantized.weight)
        layout = transcode(packed, segment)
        matrix = kernels.upload(layout)
        shape = f"{rows} x {cols}, segments of {segment}"
        report.check(f"decode, {shape}", lambda: compare(kernels.decode(matrix), quantized.weight, exact=True))
        ids = mx.array([0, rows - 1, rows // 2])
        report.check(f"decode_rows, {shape}", lambda: compare(kernels.decode_rows(matrix, ids), quantized.weight[ids], exact=True))
        for tokens in (1, 3):
            x = mx.random.normal((tokens, cols)).astype(activation_type())
            scales, biases = quantized.scales, quantized.biases
            wanted = mx.array(mirror.gemv(layout, np.array(scales), np.array(biases), 64, np.array(x)))
            report.check(
                f"gemv, {shape}, {tokens} tokens",
                lambda: compare(kernels.gemv(matrix, scales, biases, 64, x), wanted, exact=False),
            )


def check_modes(report: Report) -> None:
    """Every mode against MLX's quantized layers."""
    gpu_fused = device.for_default_device() is not None
    plain = random_layer(1000, 512, bias=True)
    embedding = nn.QuantizedEmbedding(1000, 512, 64, 4)
    ids = mx.array([[3, 999, 0], [5, 5, 512]])
    for name in MODES:
        exact = not (gpu_fused and name in ("fused", "auto"))
        coded = EntropyCodedLinear.from_quantized(plain, decode_mode=name)
        coded_embedding = EntropyCodedEmbedding.from_quantized(embedding, decode_mode=name)
        for tokens in (1, 5, 64):
            x = mx.random.normal((tokens, 512)).astype(activation_type())
            # The first calls learn the order of layers, later ones run ahead.
            report.check(f"{name}, {tokens} tokens", lambda: compare([coded(x) for _ in range(3)][-1], plain(x), exact))
        report.check(f"{name}, embedding", lambda: compare(coded_embedding(ids), embedding(ids), exact=True))
        x = mx.random.normal((2, 512))
        report.check(
            f"{name}, compiled", lambda: compare(mx.compile(lambda x: coded(x))(x), mx.compile(lambda x: plain(x))(x), exact)
        )


def time_modes(rows: int, cols: int, layers: int) -> None:
    """A chain of layers, one token: MLX's own, then every mode."""
    plain = [random_layer(rows, cols) for _ in range(layers)]
    x = mx.random.normal((1, cols)).astype(activation_type())

    def chain(members):
        out = x
        for member in members:
            out = member(out)[:, :cols] * 0.1
        return out

    print(f"\n{layers} layers of {rows} x {cols}, one token:\n")
    print("| layer | ms for a layer | weights a second |\n|---|---|---|")
    for name in ("mlx", *MODES):
        try:
            members = plain
            if name != "mlx":
                decoder = MODES[name]()
                members = [EntropyCodedLinear.from_quantized(layer, decode_mode=decoder) for layer in plain]
            elapsed = seconds(lambda: chain(members), 10) / layers
        except Exception as error:
            print(f"| {name} | {type(error).__name__}: {error} | |".replace("\n", " "), flush=True)
            continue
        print(f"| {name} | {1e3 * elapsed:.3f} | {rows * cols / elapsed / 1e9:.2f} G |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--checks-only", action="store_true", help="no timings")
    arguments = parser.parse_args()
    if arguments.cols % 128 or arguments.rows < arguments.cols or arguments.layers < 1:
        parser.error("--cols must be a multiple of 128 and at most --rows; --layers at least 1")

    kernels = device.for_default_device()
    print("### tersor.mlx self-test\n")
    print(f"- tersor {tersor.__version__}, MLX {mx.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(f"- device: {mx.default_device()}, {mx.device_info().get('device_name', 'unknown')}")
    print(f"- kernels: {kernels.name if kernels else 'none on this device; decoding goes through Rust'}\n")
    print("| check | result | seen |\n|---|---|---|")
    mx.random.seed(0)
    report = Report()
    if kernels:
        check_kernels(report, kernels)
    check_modes(report)
    if not arguments.checks_only:
        time_modes(arguments.rows, arguments.cols, arguments.layers)
    verdict = f"{report.failed} checks FAILED" if report.failed else "all checks passed"
    where = "" if on_cpu() else " Please paste this report into an issue of the project."
    print(f"\n{verdict}.{where}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
