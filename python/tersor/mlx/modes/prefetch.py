"""``prefetch``: a thread decodes the next layer while this one computes, between two buffers.

The next layer is the one that followed last time (`order`), so the first pass decodes in line. A buffer is written again only after the
product that read it has been evaluated, which is why this mode evaluates every product: at most two layers are decoded at any time, and
MLX builds no graph over layers. Under `mx.compile` and `mx.vmap` layers are decoded in line.
"""

from concurrent.futures import Future, ThreadPoolExecutor

import mlx.core as mx

from ..coded import Buffer, evaluated
from .base import DecodeMode, quantized_matmul, with_gradient
from .order import CallOrder


class PrefetchMode(DecodeMode):
    name = "prefetch"

    def __init__(self):
        self._order = CallOrder()
        self._buffers: list[Buffer] = []
        self._worker: ThreadPoolExecutor | None = None
        self._ahead: tuple[object, Buffer, Future] | None = None  # matrix, where it is decoded to, its row count

    def packed(self, layer) -> mx.array:
        return layer.matrix.decode()

    def matmul(self, layer, x: mx.array) -> mx.array:
        if not evaluated(x, layer["scales"], layer["biases"]):
            return quantized_matmul(layer, x, self.packed(layer))
        return with_gradient(layer, lambda x: self._product(layer, x), x)

    def _product(self, layer, x: mx.array) -> mx.array:
        matrix = layer.matrix
        following = self._order.called(layer)
        buffer, count = self._take(matrix)
        if following is not None:
            self._start(following.matrix, buffer)
        y = quantized_matmul(layer, x, buffer.array(matrix, count))
        mx.eval(y)
        return y

    def _take(self, matrix) -> tuple[Buffer, int]:
        """The buffer that holds ``matrix`` decoded, and its row count."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead_matrix, buffer, future = ahead
            count = future.result()  # wait in any case: the thread writes into this buffer
            if ahead_matrix is matrix:
                return buffer, count
        buffer = self._free_buffer(matrix, None)
        return buffer, buffer.decode(matrix)

    def _start(self, matrix, busy: Buffer) -> None:
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="tersor-prefetch")
        buffer = self._free_buffer(matrix, busy)
        self._ahead = (matrix, buffer, self._worker.submit(buffer.decode, matrix))

    def _free_buffer(self, matrix, busy: Buffer | None) -> Buffer:
        words = matrix.rows * matrix.words_per_row
        free = sorted((buffer for buffer in self._buffers if buffer is not busy), key=lambda buffer: buffer.words)
        if free and free[-1].words >= words:
            return free[-1]
        buffer = Buffer(words)
        # Never more than two: what is too small makes room.
        kept = [busy] if busy is not None else free[-1:]
        self._buffers = [*kept, buffer]
        return buffer

    def resident_nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers)
