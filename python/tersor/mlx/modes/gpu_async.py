"""``gpu_async``: a decode kernel on a second stream runs beside the compute stream, one layer ahead.

Layer n's product is started, then layer n + 1's decoding, and only then is layer n - 1's product waited for: so the device always has
work, and no more than two layers are decoded. Where MLX computes on the CPU there is no second processor to decode on, and a thread
takes the stream's place: that is `prefetch`.
"""

import mlx.core as mx

from ..coded import started
from ..kernels import device
from .base import quantized_matmul
from .prefetch import PrefetchMode


class GpuAsyncMode(PrefetchMode):
    name = "gpu_async"

    def __init__(self):
        super().__init__()
        self._stream = None
        self._decoding: tuple[object, mx.array] | None = None  # matrix, its packed form
        self._previous: mx.array | None = None  # the last product

    def packed(self, layer) -> mx.array:
        kernels = device.for_default_device()
        return kernels.decode(layer.matrix.on_device(kernels)) if kernels else super().packed(layer)

    def matmul(self, layer, x: mx.array) -> mx.array:
        kernels = device.for_default_device()
        if not kernels:
            return super().matmul(layer, x)
        if self._stream is None:
            # Servers generate in a thread of their own, and MLX binds plain streams to the thread that made them.
            self._stream = mx.new_thread_local_stream(mx.default_device())
        matrix = layer.matrix
        decoding, self._decoding = self._decoding, None
        if decoding is not None and decoding[0] is matrix:
            packed = decoding[1]
        else:
            packed = kernels.decode(matrix.on_device(kernels), stream=self._stream)
        y = quantized_matmul(layer, x, packed)
        if not started(y):
            return y
        following = self._order.called(layer)
        if following is not None:
            ahead = kernels.decode(following.matrix.on_device(kernels), stream=self._stream)
            mx.async_eval(ahead)
            self._decoding = (following.matrix, ahead)
        if self._previous is not None:
            mx.eval(self._previous)
        self._previous = y
        return y

    def resident_nbytes(self) -> int:
        ahead = self._decoding[1].nbytes if self._decoding else 0
        return ahead + super().resident_nbytes()
