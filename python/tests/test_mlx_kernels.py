"""The GPU layout and kernels, without a GPU: the NumPy mirror against the packed matrix, the kernels' text on CPU threads, and its CUDA form
through NVRTC."""

import ctypes
import itertools
import pathlib
import shutil
import subprocess

import numpy as np
import pytest
from mlx_models import need_mlx, skip

need_mlx()

from tersor.mlx.kernels import cuda_text, description, layout, mirror  # noqa: E402


def packed_matrix(rows: int, cols: int, deviation: float = 2.9, seed: int = 0) -> np.ndarray:
    """MLX's packed form of rounded Gaussian nibbles."""
    rng = np.random.default_rng(seed)
    q = np.clip(np.rint(rng.normal(7.5, deviation, (rows, cols // 8, 8))), 0, 15).astype(np.uint32)
    return np.bitwise_or.reduce(q << np.arange(0, 32, 4, dtype=np.uint32), axis=-1)


def nibbles(packed: np.ndarray) -> np.ndarray:
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    return (packed[..., None] >> shifts & np.uint32(15)).reshape(len(packed), -1)


# Padded rows, one group, a short last segment, more segments than SIMD groups of a threadgroup.
SHAPES = [(32, 512, 512), (1, 32, None), (40, 544, 512), (100, 1536, 1024), (33, 9216, 512)]


@pytest.mark.parametrize("rows, cols, segment", SHAPES)
def test_mirror_decodes_to_the_packed_matrix(rows, cols, segment):
    packed = packed_matrix(rows, cols)
    coded = layout.transcode(packed, segment)
    assert np.array_equal(mirror.decode(coded), packed)
    ids = np.array([0, rows - 1, rows // 2, 0])
    assert np.array_equal(mirror.decode_rows(coded, ids), packed[ids])


@pytest.mark.parametrize("packed", [np.zeros((3, 4), np.uint32), np.full((64, 8), 0xFEDCBA98, np.uint32)])
def test_mirror_decodes_constant_matrices(packed):
    assert np.array_equal(mirror.decode(layout.transcode(packed)), packed)


def test_mirror_decodes_every_byte_at_the_longest_codes():
    # Frequencies that fall by halves would want codes of up to 255 bits.
    counts = [max(1, 2000 >> i) for i in range(256)]
    symbols = np.repeat(np.arange(256, dtype=np.uint8), counts)
    symbols = np.random.default_rng(0).permutation(np.resize(symbols, 32 * 256))
    packed = symbols.reshape(32, -1).view("<u4")
    coded = layout.transcode(packed)
    assert (coded.table >> 8).max() == layout.CODE_BITS_MAX
    assert np.array_equal(mirror.decode(coded), packed)


@pytest.mark.parametrize(
    "rows, cols, segment, group_size", [(*shape, group) for shape in SHAPES for group in (32, 64) if shape[1] % group == 0]
)
def test_mirror_gemv_is_the_product(rows, cols, segment, group_size):
    rng = np.random.default_rng(1)
    packed = packed_matrix(rows, cols)
    scales = rng.normal(0.01, 0.002, (rows, cols // group_size)).astype(np.float32)
    biases = (-8 * scales).astype(np.float32)
    x = rng.standard_normal((2, cols)).astype(np.float32)
    w = np.repeat(scales, group_size, 1).astype(np.float64) * nibbles(packed) + np.repeat(biases, group_size, 1)
    y = mirror.gemv(layout.transcode(packed, segment), scales, biases, group_size, x)
    expected = x.astype(np.float64) @ w.T
    assert np.abs(y - expected).max() < 1e-5 * np.abs(expected).max()


def test_code_lengths_are_optimal_and_limited():
    counts = np.array([1, 1, 2, 4, 8, 16, 32, 64])
    assert layout.code_lengths(counts).tolist() == [7, 7, 6, 5, 4, 3, 2, 1]
    limited = layout.code_lengths(counts, bits_max=4)
    assert limited.max() == 4 and sum(2.0**-bits for bits in limited) == 1
    # By trying all: no complete code of at most 4 bits is shorter.
    costs = [
        sum(a * b for a, b in zip(counts, lengths))
        for lengths in itertools.product(range(1, 5), repeat=8)
        if sum(2.0**-bits for bits in lengths) <= 1
    ]
    assert int(counts @ limited) == min(costs)


def test_size_is_near_the_entropy():
    packed = packed_matrix(256, 2048)
    counts = np.bincount(nibbles(packed).reshape(-1)) / (packed.size * 8)
    entropy = -(counts * np.log2(counts)).sum()
    coded = layout.transcode(packed, 2048)
    bits = 8 * coded.words.nbytes / (packed.size * 8)
    # Huffman codes of pairs lose 0.02 to 0.03 bit; the ends of streams 25 / 2048.
    assert entropy < bits < entropy + 0.05


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4, 3)])
def test_refuses_shapes_without_a_layout(shape):
    with pytest.raises(ValueError, match="multiple of 32"):
        layout.transcode(np.zeros(shape, np.uint32))


def test_metal_and_cuda_texts_differ_by_their_dialect_alone():
    for kernel in description.KERNELS:
        metal = description.source(kernel, description.METAL)
        cuda = description.source(kernel, description.CUDA)
        assert "$" not in metal and "$" not in cuda
        for field in ("shared", "lane", "simdgroup", "threadgroup", "ballot", "popcount", "barrier", "unroll"):
            cuda = cuda.replace(getattr(description.CUDA, field), getattr(description.METAL, field))
        without_spaces = lambda text: text.replace("device ", "").replace(" ", "")  # noqa: E731
        assert without_spaces(cuda) == without_spaces(metal)


# A third dialect: one CPU thread for each lane, ballots by barriers. So the text itself runs, not only its mirror.
HOST = description.Dialect(
    name="host",
    shared="static",
    device="",
    lane="host_lane",
    simdgroup="host_simdgroup",
    threadgroup="host_threadgroup",
    ballot="host_ballot(wants)",
    popcount="__builtin_popcount",
    barrier="host_barrier()",
    unroll="",
)

HOST_PROGRAM = """
#include <barrier>
#include <cstdint>
#include <thread>
#include <vector>
{constants}
using T = float;
static thread_local uint32_t host_lane, host_simdgroup, host_threadgroup;
static std::barrier<>* all_lanes;
static std::barrier<>* simdgroup_lanes[SIMDGROUPS];
static bool asks[SIMDGROUPS][32];
static void host_barrier() {{ all_lanes->arrive_and_wait(); }}
static uint32_t host_ballot(bool wants) {{
  asks[host_simdgroup][host_lane] = wants;
  simdgroup_lanes[host_simdgroup]->arrive_and_wait();
  uint32_t mask = 0;
  for (int lane = 0; lane < 32; ++lane) mask |= uint32_t(asks[host_simdgroup][lane]) << lane;
  simdgroup_lanes[host_simdgroup]->arrive_and_wait();
  return mask;
}}
static void kernel({parameters}) {{
{source}
}}
extern "C" void launch(int threadgroups, {parameters}) {{
  all_lanes = new std::barrier<>(32 * SIMDGROUPS);
  for (auto& barrier : simdgroup_lanes) barrier = new std::barrier<>(32);
  for (int block = 0; block < threadgroups; ++block) {{
    std::vector<std::thread> threads;
    for (int i = 0; i < 32 * SIMDGROUPS; ++i)
      threads.emplace_back([=] {{
        host_lane = i % 32; host_simdgroup = i / 32; host_threadgroup = block;
        kernel({names});
      }});
    for (auto& thread : threads) thread.join();
  }}
}}
"""


def run_on_host(folder, kernel: str, coded: layout.DeviceLayout, inputs: dict, output: np.ndarray, **own: int) -> np.ndarray:
    """Compiles the kernel's text with the C++ compiler and runs it, a thread for each lane."""
    compiler = shutil.which("c++") or skip("c++", "there is no C++ compiler")
    buffers = {"lut": coded.table, "starts": coded.strip_starts, "words": coded.words, **inputs}
    input_names, (output_name,) = description.KERNELS[kernel]
    types = {"lut": "uint16_t", "starts": "uint32_t", "words": "uint32_t", "packed": "uint32_t", "ids": "int32_t"}
    parameters = [f"const {types.get(name, 'float')}* {name}" for name in input_names]
    parameters.append(f"{types.get(output_name, 'float')}* {output_name}")
    program = HOST_PROGRAM.format(
        constants="\n".join(f"constexpr int {name} = {value};" for name, value in description.constants(coded, **own)),
        parameters=", ".join(parameters),
        names=", ".join([*input_names, output_name]),
        source=description.source(kernel, HOST),
    )
    (folder / "kernel.cpp").write_text(program)
    library = folder / "kernel.so"
    command = [compiler, "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", str(folder / "kernel.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    arrays = [np.ascontiguousarray(buffers[name]) for name in input_names]
    threadgroups = own.get("IDS", coded.row_tiles)
    ctypes.CDLL(str(library)).launch(threadgroups, *(ctypes.c_void_p(a.ctypes.data) for a in [*arrays, output]))
    return output


@pytest.mark.parametrize("rows, cols, segment", [(40, 544, 512), (33, 384, 128)])
def test_kernel_text_decodes_on_the_cpu(rows, cols, segment, tmp_path):
    packed = packed_matrix(rows, cols)
    coded = layout.transcode(packed, segment)
    out = np.full_like(packed, 0xDEADBEEF)
    assert np.array_equal(run_on_host(tmp_path, "decode", coded, {}, out), packed)


def test_kernel_text_looks_rows_up_on_the_cpu(tmp_path):
    packed = packed_matrix(70, 384)
    coded = layout.transcode(packed, 128)
    ids = np.array([69, 0, 33], np.int32)
    out = np.zeros((3, 48), np.uint32)
    assert np.array_equal(run_on_host(tmp_path, "decode_rows", coded, {"ids": ids}, out, IDS=3), packed[ids])


def test_kernel_text_multiplies_on_the_cpu(tmp_path):
    rng = np.random.default_rng(2)
    packed = packed_matrix(40, 320)
    coded = layout.transcode(packed, 128)
    scales = rng.normal(0.01, 0.002, (40, 5)).astype(np.float32)
    biases = (-8 * scales).astype(np.float32)
    x = rng.standard_normal((2, 320)).astype(np.float32)
    y = np.full((2, 40), np.nan, np.float32)
    run_on_host(tmp_path, "gemv", coded, {"scales": scales, "biases": biases, "x": x}, y, GROUP=64, TOKENS=2)
    expected = mirror.gemv(coded, scales, biases, 64, x)
    assert np.abs(y - expected).max() < 1e-6 * np.abs(expected).max()


def nvrtc_folder() -> pathlib.Path:
    try:
        import nvidia
    except ImportError:
        skip("nvrtc", "nvidia-cuda-nvrtc is missing")
    for root in nvidia.__path__:
        folder = pathlib.Path(root) / "cu13"
        if (folder / "lib" / "libnvrtc.so.13").exists() and (folder / "include" / "cuda_fp16.h").exists():
            return folder
    skip("nvrtc", "nvidia-cuda-nvrtc 13.0, nvidia-cuda-runtime 13.0 or nvidia-cuda-cccl 13.0 is missing")


@pytest.mark.parametrize("dtype", list(cuda_text.FLOATS))
@pytest.mark.parametrize("kernel", list(description.KERNELS))
def test_cuda_text_compiles(kernel, dtype):
    folder = nvrtc_folder()
    ctypes.CDLL(str(folder / "lib" / "libnvrtc-builtins.so.13.0"), ctypes.RTLD_GLOBAL)
    nvrtc = ctypes.CDLL(str(folder / "lib" / "libnvrtc.so.13"))
    own = {"gemv": {"GROUP": 64, "TOKENS": 3}, "decode": {}, "decode_rows": {"IDS": 5}}[kernel]
    coded = layout.transcode(packed_matrix(40, 1536), 1024)
    text = cuda_text.translation_unit(kernel, description.constants(coded, **own), dtype)
    program = ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None) == 0
    include = folder / "include"
    options = ["--gpu-architecture=sm_90", "--std=c++17", f"--include-path={include}", f"--include-path={include}/cccl"]
    arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    code = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert code == 0, log.value.decode()
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    assert size.value > 1000
