"""Checks and times the GPU kernels of tersor.mlx on a machine with an NVIDIA GPU.

    python3 bench/mlx/cuda_check.py --backend nvrtc    needs cupy, for comparison torch: the kernel text through NVRTC
    python3 bench/mlx/cuda_check.py --backend mlx      needs MLX's CUDA wheels: the same text through mx.fast.cuda_kernel

MLX's wheels are mlx (0.7 MiB) and mlx-cuda-13 (86 MiB); beside torch for CUDA 13, whose NVIDIA libraries serve both, they need nothing else:
unpack both into one folder F (python3 -m zipfile -e WHEEL F), link torch's `nvidia` folder into it, and set PYTHONPATH=F.

The first times beside torch's `_weight_int4pack_mm` and its bfloat16 product, the second beside `mx.quantized_matmul` and MLX's float16
product; both compare with NumPy, decoding to the bit. Weights are Gaussian, quantized affinely to 4 bits in groups of 64; timings rotate
over copies that exceed the level-2 cache. Neither the native module nor the rest of the package is needed. A table of the timings comes
last. Exit code 1 if a check fails.
"""

import argparse
import importlib.util
import pathlib
import signal
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

KERNELS = pathlib.Path(__file__).resolve().parents[2] / "python" / "tersor" / "mlx" / "kernels"

# By itself, because the package round it imports MLX and the native module.
spec = importlib.util.spec_from_file_location("tersor_kernels", KERNELS / "__init__.py", submodule_search_locations=[str(KERNELS)])
sys.modules["tersor_kernels"] = importlib.util.module_from_spec(spec)

from tersor_kernels import cuda_text, description, layout, mirror  # noqa: E402

GROUP = 64
TOKENS = (1, 4, 8)
AWKWARD = {(100, 1536): 1024, (33, 9216): 512}  # padded rows, a short last segment: checked, not timed; with the columns of a segment
SHAPES = [(4096, 4096), (14336, 4096), (28672, 8192)]
ROTATE_BYTES = 400e6
ROWS_AT_ONCE = 256


def quantized(rows: int, cols: int, rng: np.random.Generator):
    """Packed weights (rows, cols / 8) uint32, scales and biases (rows, cols / GROUP) float16."""
    packed = np.empty((rows, cols // 8), np.uint32)
    scales = np.empty((rows, cols // GROUP), np.float16)
    biases = np.empty((rows, cols // GROUP), np.float16)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)

    def fill(top: int, rng: np.random.Generator) -> None:
        here = slice(top, min(top + ROWS_AT_ONCE, rows))
        w = rng.standard_normal((here.stop - top, cols // GROUP, GROUP), np.float32) * np.float32(0.02)
        low, high = w.min(-1), w.max(-1)
        scales[here], biases[here] = (high - low) / 15, low
        q = np.rint((w - biases[here, :, None]) / scales[here, :, None].astype(np.float32))
        q = np.clip(q, 0, 15).astype(np.uint32).reshape(len(w), cols // 8, 8)
        packed[here] = np.bitwise_or.reduce(q << shifts, axis=-1)

    tops = range(0, rows, ROWS_AT_ONCE)
    with ThreadPoolExecutor() as pool:
        list(pool.map(fill, tops, rng.spawn(len(tops))))
    return packed, scales, biases


def product(packed, scales, biases, x) -> np.ndarray:
    """The product in double precision: (tokens, rows) float64."""
    out = np.empty((len(x), len(packed)))
    shifts = np.arange(0, 32, 4, dtype=np.uint32)

    def fill(top: int) -> None:
        here = slice(top, top + ROWS_AT_ONCE)
        q = (packed[here, :, None] >> shifts & np.uint32(15)).reshape(len(packed[here]), -1, GROUP)
        w = scales[here].astype(np.float64)[..., None] * q + biases[here].astype(np.float64)[..., None]
        out[:, here] = x.astype(np.float64) @ w.reshape(len(w), -1).T

    with ThreadPoolExecutor() as pool:
        list(pool.map(fill, range(0, len(packed), ROWS_AT_ONCE)))
    return out


def entropy(packed: np.ndarray) -> float:
    counts = np.zeros(16)
    for shift in range(0, 32, 4):
        counts += np.bincount((packed[:1024] >> np.uint32(shift) & np.uint32(15)).reshape(-1), minlength=16)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


class Results:
    def __init__(self):
        self.failed = 0
        self.times: dict[tuple[str, str], dict[str, float]] = {}  # (shape, what) -> name -> milliseconds

    def check(self, name: str, passed: bool, seen: str = "") -> None:
        self.failed += not passed
        print(f"check {name:44s} {'pass' if passed else 'FAIL'} {seen}", flush=True)

    def near(self, name: str, actual: np.ndarray, expected: np.ndarray) -> None:
        error = largest_difference(actual, expected)
        self.check(name, error < 2e-3, f"largest difference {error:.1e} of the largest value")


    def time(self, name: str, what: str, rows: int, cols: int, milliseconds: float, nbytes: float) -> None:
        """``nbytes``: what one call must move at least."""
        rate, bandwidth = rows * cols / milliseconds / 1e9, nbytes / milliseconds / 1e9
        self.times.setdefault((f"{rows} x {cols}", what), {})[name] = milliseconds
        contestant = f"{name}, {what}"
        print(f"time  {contestant:44s} {rows:5d}x{cols:<5d} {milliseconds:8.4f} ms {rate:6.2f} T weights/s {bandwidth:5.2f} TB/s", flush=True)

    def table(self) -> str:
        """Markdown: a row for each shape and number of tokens, a column for each contestant, in milliseconds."""
        names = list(dict.fromkeys(name for row in self.times.values() for name in row))
        lines = ["| ms | | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
        for (shape, what), row in self.times.items():
            cells = [f"{row[name]:.4f}" if name in row else "" for name in names]
            lines.append(f"| {shape} | {what} | " + " | ".join(cells) + " |")
        return "\n".join(lines)


def tokens_text(tokens: int) -> str:
    return "1 token" if tokens == 1 else f"{tokens} tokens"


def largest_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """As a part of the largest value."""
    return float(np.abs(actual.astype(np.float64) - expected).max() / np.abs(expected).max())


def copies_of(nbytes: float) -> int:
    return int(ROTATE_BYTES // nbytes) + 1


def run_nvrtc(results: Results, shapes) -> None:
    import cupy as cp

    device = cp.cuda.runtime.getDeviceProperties(0)["name"].decode()
    print(f"cupy {cp.__version__}, NVRTC {'.'.join(map(str, cp.cuda.nvrtc.getVersion()))}, {device}")
    folders = [pathlib.Path("/usr/local/cuda/include"), *(pathlib.Path(p) / "nvidia/cu13/include" for p in sys.path)]
    options = ["--std=c++17", *(f"-I{folder}" for folder in folders if (folder / "cuda_fp16.h").exists())]
    options += [f"-I{folder / 'cccl'}" for folder in folders if (folder / "cccl").exists()]

    def build(kernel, constants):
        text = cuda_text.translation_unit(kernel, constants, "float16")
        return cp.RawModule(code=text, options=tuple(options)).get_function(kernel)

    def median_ms(call, repeat=15, inner=8):
        for i in range(3):
            call(i)
        times = []
        for r in range(repeat):
            start, stop = cp.cuda.Event(), cp.cuda.Event()
            start.record()
            for i in range(inner):
                call(r * inner + i)
            stop.record()
            stop.synchronize()
            times.append(cp.cuda.get_elapsed_time(start, stop) / inner)
        return statistics.median(times)

    rng = np.random.default_rng(1)
    for rows, cols, segment in shapes:
        timed = (rows, cols) not in AWKWARD
        packed, scales, biases = quantized(rows, cols, rng)
        coded = layout.transcode(packed, segment)
        constants = dict(description.constants(coded))
        block = (layout.LANES, constants["SIMDGROUPS"])
        buffers = [cp.asarray(b) for b in (coded.table, coded.strip_starts, coded.words)]
        d_scales, d_biases = cp.asarray(scales), cp.asarray(biases)
        shape = f"{rows}x{cols}, segments of {coded.segment_cols}"
        print(f"\n{shape}: codes {8 * coded.nbytes / packed.size / 8:.3f} bits per weight with tables, entropy {entropy(packed):.3f}")

        decode = build("decode", description.constants(coded))
        out = cp.full((rows, cols // 8), 0xDEADBEEF, cp.uint32)
        decode((coded.row_tiles,), block, (*buffers, out))
        results.check(f"decode {shape}", bool((out == cp.asarray(packed)).all()))
        ids = np.array([0, rows - 1, rows // 2, 1], np.int32)
        decode_rows = build("decode_rows", description.constants(coded, IDS=len(ids)))
        some = cp.zeros((len(ids), cols // 8), cp.uint32)
        decode_rows((len(ids),), block, (*buffers, cp.asarray(ids), some))
        results.check(f"decode_rows {shape}", bool((some.get() == packed[ids]).all()))

        copies = copies_of(coded.nbytes) if timed else 1
        rotated = [buffers[2].copy() for _ in range(copies)]
        activations = rng.standard_normal((TOKENS[-1], cols)).astype(np.float16)
        expected = product(packed, scales, biases, activations)
        for tokens in TOKENS:
            x = activations[:tokens]
            gemv = build("gemv", description.constants(coded, GROUP=GROUP, TOKENS=tokens))
            d_x, y = cp.asarray(x), cp.full((tokens, rows), cp.nan, cp.float16)
            gemv((coded.row_tiles,), block, (*buffers, d_scales, d_biases, d_x, y))
            results.near(f"gemv {shape}, {tokens_text(tokens)}", y.get(), expected[:tokens])
            if tokens == 1 and not timed:
                same = mirror.gemv(coded, scales, biases, GROUP, x)
                results.near(f"gemv {shape}, against the mirror", y.get(), same.astype(np.float64))
            if timed:
                call = lambda i: gemv(  # noqa: E731
                    (coded.row_tiles,), block, (*buffers[:2], rotated[i % copies], d_scales, d_biases, d_x, y)
                )
                results.time("tersor", tokens_text(tokens), rows, cols, median_ms(call), coded.nbytes + 2 * scales.nbytes)
        if timed:
            call = lambda i: decode((coded.row_tiles,), block, (*buffers[:2], rotated[i % copies], out))  # noqa: E731
            results.time("tersor", "decode only", rows, cols, median_ms(call), coded.nbytes + packed.nbytes)
            del rotated
            time_torch(results, rows, cols)


def time_torch(results: Results, rows: int, cols: int) -> None:
    try:
        import torch
    except ImportError:
        print("torch is missing: no comparison")
        return

    def median_ms(call):
        times = []
        for r in range(18):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for i in range(8):
                call(8 * r + i)
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 8)
        return statistics.median(times[3:])

    copies = copies_of(rows * cols / 2)
    nibbles = torch.randint(0, 255, (rows, cols // 2), device="cuda", dtype=torch.uint8)
    weights = [torch.ops.aten._convert_weight_to_int4pack(nibbles, 8) for _ in range(copies)]
    scales = torch.rand(cols // GROUP, rows, 2, device="cuda", dtype=torch.bfloat16)
    plain = [torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16) for _ in range(copies_of(2 * rows * cols))]
    for tokens in TOKENS:
        x = torch.randn(tokens, cols, device="cuda", dtype=torch.bfloat16)
        int4 = median_ms(lambda i: torch.ops.aten._weight_int4pack_mm(x, weights[i % copies], GROUP, scales))
        results.time("torch int4pack_mm", tokens_text(tokens), rows, cols, int4, rows * cols / 2 + scales.nbytes)
        bf16 = median_ms(lambda i: torch.nn.functional.linear(x, plain[i % len(plain)]))
        results.time("torch bfloat16", tokens_text(tokens), rows, cols, bf16, 2 * rows * cols)
    torch.cuda.empty_cache()


def run_mlx(results: Results, shapes) -> None:
    import mlx.core as mx
    from tersor_kernels import device

    kernels = device.for_default_device()
    if kernels is None:
        raise SystemExit(f"MLX computes on {mx.default_device()}: no GPU kernels")
    print(f"MLX {mx.__version__}, {kernels.name} kernels, {mx.device_info().get('device_name', mx.default_device())}")

    def median_ms(call, repeat=10, inner=16):
        mx.eval([call(i) for i in range(inner)])
        times = []
        for r in range(repeat):
            start = time.perf_counter()
            mx.eval([call(r * inner + i) for i in range(inner)])
            times.append(1e3 * (time.perf_counter() - start) / inner)
        return statistics.median(times)

    rng = np.random.default_rng(1)
    for rows, cols, segment in shapes:
        timed = (rows, cols) not in AWKWARD
        packed, scales, biases = quantized(rows, cols, rng)
        coded = layout.transcode(packed, segment)
        copies = copies_of(coded.nbytes) if timed else 1
        matrices = [kernels.upload(coded) for _ in range(copies)]
        plain = [mx.array(packed) for _ in range(copies)]
        m_scales, m_biases = mx.array(scales), mx.array(biases)
        shape = f"{rows}x{cols}, segments of {coded.segment_cols}"
        print(f"\n{shape}: codes {8 * coded.nbytes / packed.size / 8:.3f} bits per weight with tables, entropy {entropy(packed):.3f}")
        results.check(f"decode {shape}", mx.array_equal(kernels.decode(matrices[0]), plain[0]).item())
        ids = mx.array([0, rows - 1, rows // 2, 1])
        results.check(f"decode_rows {shape}", mx.array_equal(kernels.decode_rows(matrices[0], ids), plain[0][ids]).item())
        activations = rng.standard_normal((TOKENS[-1], cols)).astype(np.float16)
        exact = product(packed, scales, biases, activations)
        if timed:
            weight = mx.dequantize(plain[0], m_scales, m_biases, group_size=GROUP, bits=4)
            half = [weight + 0 for _ in range(copies_of(weight.nbytes))]
            mx.eval(half)
        for tokens in TOKENS:
            m_x, expected = mx.array(activations[:tokens]), exact[:tokens]
            fused = lambda i: kernels.gemv(matrices[i % copies], m_scales, m_biases, GROUP, m_x)  # noqa: E731
            theirs = lambda i: mx.quantized_matmul(  # noqa: E731
                m_x, plain[i % copies], m_scales, m_biases, transpose=True, group_size=GROUP, bits=4
            )
            results.near(f"gemv {shape}, {tokens_text(tokens)}", np.array(fused(0)), expected)
            print(f"note  mx.quantized_matmul differs by {largest_difference(np.array(theirs(0)), expected):.1e}")
            if timed:
                side = 2 * scales.nbytes
                results.time("tersor", tokens_text(tokens), rows, cols, median_ms(fused), coded.nbytes + side)
                results.time("mx.quantized_matmul", tokens_text(tokens), rows, cols, median_ms(theirs), packed.nbytes + side)
                matmul = median_ms(lambda i: m_x @ half[i % len(half)].T)
                results.time("mx.matmul float16", tokens_text(tokens), rows, cols, matmul, 2 * rows * cols)
        if timed:
            call = lambda i: kernels.decode(matrices[i % copies])  # noqa: E731
            results.time("tersor", "decode only", rows, cols, median_ms(call), coded.nbytes + packed.nbytes)


def shape_of(text: str) -> tuple[int, int]:
    rows, cols = map(int, text.split("x"))
    return rows, cols


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["nvrtc", "mlx"], default="nvrtc")
    parser.add_argument("--shape", type=shape_of, action="append", help="ROWSxCOLS to time, instead of all; may be repeated")
    parser.add_argument("--segment", type=int, help="columns of a segment of the timed shapes, instead of the planned ones")
    parser.add_argument("--timings-only", action="store_true", help="without the awkward shapes: MLX takes seconds to compile a kernel")
    arguments = parser.parse_args()
    awkward = [] if arguments.timings_only else [(*shape, segment) for shape, segment in AWKWARD.items()]
    shapes = awkward + [(*shape, arguments.segment) for shape in arguments.shape or SHAPES]
    results = Results()
    # `timeout` sends it: what was timed until then is printed all the same.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(124))
    try:
        (run_mlx if arguments.backend == "mlx" else run_nvrtc)(results, shapes)
        print(f"\n{results.failed} checks FAILED" if results.failed else "\nall checks passed")
    finally:
        print(f"\n{results.table()}")
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
