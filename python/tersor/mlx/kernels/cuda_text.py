"""A whole CUDA translation unit round a kernel's body, as MLX's CUDA backend builds it.

`mx.fast.cuda_kernel` takes the body and writes the signature and the constants. Where MLX's CUDA wheel is missing (the compile test on a
machine without a GPU, and bench/mlx/cuda_check.py) this does the same, so that the same text reaches NVRTC.
"""

from .description import CUDA, KERNELS, source

# The kernels need half types and fixed-width integers; MLX includes these headers, too (the last brings the integers).
_HEADER = "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n#include <cooperative_groups.h>\n"

_TYPES = {
    "lut": "uint16_t",
    "starts": "uint32_t",
    "words": "uint32_t",
    "packed": "uint32_t",
    "ids": "int32_t",
}

FLOATS = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}


def translation_unit(kernel: str, constants: list[tuple[str, int]], dtype: str = "float32") -> str:
    """Program text with one ``extern "C"`` function named ``kernel``; scales, biases, x and y are of ``dtype`` (a key of `FLOATS`)."""
    inputs, outputs = KERNELS[kernel]
    parameters = [f"    const {_TYPES.get(name, FLOATS[dtype])}* {name}" for name in inputs]
    parameters += [f"    {_TYPES.get(name, FLOATS[dtype])}* {name}" for name in outputs]
    lines = [_HEADER, "namespace mlx::core::cu {", f'extern "C" __global__ void {kernel}(']
    lines += [",\n".join(parameters) + ") {"]
    lines += [f"  constexpr int {name} = {value};" for name, value in constants]
    lines += [f"  using T = {FLOATS[dtype]};", source(kernel, CUDA), "}", "}  // namespace mlx::core::cu", ""]
    return "\n".join(lines)
