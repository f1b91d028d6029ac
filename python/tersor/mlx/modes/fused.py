"""``fused``: nothing decoded is kept, and never is a whole matrix decoded to multiply it with a few tokens.

On a GPU a kernel decodes and multiplies in registers (`kernels.description`): the one mode whose sums are not in MLX's order, so its
results differ from MLX's in the last bits. For more than `tokens_max` tokens it decodes the matrix for this one product.

On the CPU, where MLX offers no kernels of one's own, rows are decoded by blocks into two small scratch buffers, each multiplied by
`mx.quantized_matmul` while the next one is decoded. MLX computes every output row by itself, so results are bit-identical to the whole
product. Under `mx.compile` or `mx.vmap` nothing can be evaluated in between, so the matrix is decoded whole.
"""

import mlx.core as mx

from ..coded import Buffer, evaluated, started
from ..kernels import device
from .base import DecodeMode, quantized_matmul, with_gradient


class FusedMode(DecodeMode):
    name = "fused"

    def __init__(self):
        self._buffers: list[Buffer] = []

    def packed(self, layer) -> mx.array:
        return layer.matrix.decode()

    def matmul(self, layer, x: mx.array) -> mx.array:
        kernels = device.for_default_device()
        if kernels:
            return self._on_device(kernels, layer, x)
        if not evaluated(x, layer["scales"], layer["biases"]):
            return quantized_matmul(layer, x, self.packed(layer))
        return with_gradient(layer, lambda x: self._by_blocks(layer, x), x)

    def _on_device(self, kernels, layer, x: mx.array) -> mx.array:
        matrix = layer.matrix
        tokens = x.size // matrix.cols
        if not 0 < tokens <= kernels.tokens_max:
            return quantized_matmul(layer, x, kernels.decode(matrix.on_device(kernels)))
        scales, biases = layer["scales"], layer["biases"]
        dtype = mx.result_type(x, scales, biases)

        def forward(x):
            flat = x.reshape(tokens, matrix.cols).astype(dtype)
            y = kernels.gemv(matrix.on_device(kernels), scales, biases, layer.group_size, flat)
            return y.reshape(*x.shape[:-1], matrix.rows)

        return with_gradient(layer, forward, x)

    def _by_blocks(self, layer, x: mx.array) -> mx.array:
        matrix = layer.matrix
        block = matrix.block_rows
        self._fit(block * matrix.words_per_row)
        parts: list[mx.array] = []
        for index, start in enumerate(range(0, matrix.rows, block)):
            if index >= 2:
                mx.eval(parts[index - 2])  # it reads the buffer that is filled next
            stop = min(matrix.rows, start + block)
            packed = self._buffers[index % 2].fill(matrix, start, stop)
            parts.append(quantized_matmul(layer, x, packed, start, stop))
            started(parts[-1])
        mx.eval(parts)
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)

    def _fit(self, words: int) -> None:
        if not self._buffers or self._buffers[0].words < words:
            self._buffers = [Buffer(words), Buffer(words)]

    def resident_nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers)
