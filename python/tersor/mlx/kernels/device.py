"""The kernels on MLX's GPU backends: Metal and CUDA.

`for_default_device` answers None where MLX computes on the CPU; decoding then goes through Rust (`tersor.mlx.coded`).
"""

from functools import cache

import mlx.core as mx

from .description import CUDA, KERNELS, METAL, TOKENS_MAX, constants, source
from .layout import LANES, DeviceLayout


class DeviceMatrix:
    """A `DeviceLayout` whose buffers are MLX arrays."""

    def __init__(self, layout: DeviceLayout):
        self.layout = layout
        self.buffers = [mx.array(layout.table), mx.array(layout.strip_starts), mx.array(layout.words)]

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes


class DeviceKernels:
    """Kernels of `description` bound to one of MLX's kernel factories (`mx.fast.metal_kernel` or `mx.fast.cuda_kernel`)."""

    tokens_max = TOKENS_MAX

    def __init__(self, dialect, factory):
        self.name = dialect.name
        self._kernels = {
            name: factory(
                name=f"tersor_{name}", input_names=inputs, output_names=outputs, source=source(name, dialect)
            )
            for name, (inputs, outputs) in KERNELS.items()
        }

    def upload(self, layout: DeviceLayout) -> DeviceMatrix:
        return DeviceMatrix(layout)

    def _launch(self, name, matrix, inputs, template, blocks, shape, dtype, stream):
        simdgroups = dict(template)["SIMDGROUPS"]
        (out,) = self._kernels[name](
            inputs=[*matrix.buffers, *inputs],
            template=template,
            grid=(LANES * blocks, simdgroups, 1),
            threadgroup=(LANES, simdgroups, 1),
            output_shapes=[shape],
            output_dtypes=[dtype],
            stream=stream,
        )
        return out

    def decode(self, matrix: DeviceMatrix, stream=None) -> mx.array:
        """MLX's packed matrix (rows, cols / 8) ``uint32``."""
        layout = matrix.layout
        shape = (layout.rows, layout.cols // 8)
        return self._launch("decode", matrix, [], constants(layout), layout.row_tiles, shape, mx.uint32, stream)

    def decode_rows(self, matrix: DeviceMatrix, ids: mx.array) -> mx.array:
        """Packed rows ``ids`` (n,): (n, cols / 8) ``uint32``. Ids must be valid: the device does not check them."""
        layout = matrix.layout
        shape = (ids.size, layout.cols // 8)
        template = constants(layout, IDS=ids.size)
        return self._launch("decode_rows", matrix, [ids.astype(mx.int32)], template, ids.size, shape, mx.uint32, None)

    def gemv(self, matrix: DeviceMatrix, scales: mx.array, biases: mx.array, group_size: int, x: mx.array) -> mx.array:
        """``x`` (tokens, cols), at most `tokens_max` tokens, times the transposed matrix: (tokens, rows) of x's type."""
        layout = matrix.layout
        # MLX's CUDA backend finds compiled kernels by name and template arguments, so every type must be among these.
        template = constants(layout, GROUP=group_size, TOKENS=x.shape[0]) + [("T", x.dtype), ("S", scales.dtype)]
        shape = (x.shape[0], layout.rows)
        return self._launch("gemv", matrix, [scales, biases, x], template, layout.row_tiles, shape, x.dtype, None)


@cache
def _metal() -> DeviceKernels:
    return DeviceKernels(METAL, mx.fast.metal_kernel)


@cache
def _cuda() -> DeviceKernels:
    return DeviceKernels(CUDA, mx.fast.cuda_kernel)


def for_default_device() -> DeviceKernels | None:
    """The kernels of MLX's default device; None if that is the CPU."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return None
    if mx.metal.is_available():
        return _metal()
    if mx.cuda.is_available():
        return _cuda()
    return None
