"""What all decode modes share."""

import mlx.core as mx

from ..coded import evaluated
from ..kernels import device


class DecodeMode:
    """Decides when a layer's weights are decoded and how long they stay so.

    One object serves all layers of a model, so that they share buffers and budgets. A layer calls `matmul` and `lookup`; both give exactly
    what MLX gives for the decoded weights, except `fused` on a GPU (see there).
    """

    name: str

    def packed(self, layer) -> mx.array:
        """MLX's packed weights of ``layer``: (rows, cols / 8) ``uint32``."""
        raise NotImplementedError

    def matmul(self, layer, x: mx.array) -> mx.array:
        """``x`` (..., cols) times the transposed weights: (..., rows)."""
        return quantized_matmul(layer, x, self.packed(layer))

    def lookup(self, layer, ids: mx.array) -> mx.array:
        """Packed weights of the rows ``ids`` (n,): (n, cols / 8) ``uint32``. Decodes no more than it must."""
        kernels = device.for_default_device()
        if kernels:
            return kernels.decode_rows(layer.matrix.on_device(kernels), ids)
        if not evaluated(ids):
            return self.packed(layer)[ids]
        return layer.matrix.lookup(ids)

    def forget(self, layer) -> None:
        """Drops what is held for ``layer``, which uses another mode from now on."""

    def resident_nbytes(self) -> int:
        """Bytes of decoded weights held between calls, buffers included."""
        return 0

    def _settings(self) -> dict:
        """Arguments that make an equal object."""
        return {}

    # Threads and buffers belong to one object: a copied model gets fresh ones.
    def __deepcopy__(self, memo):
        return type(self)(**self._settings())


def with_gradient(layer, forward, x: mx.array) -> mx.array:
    """``forward(x)``, a product with the layer's weights that MLX cannot differentiate by itself: its buffers do not last until the backward
    pass, or it is a kernel. The gradient decodes the weights anew."""

    @mx.custom_function
    def product(x):
        return forward(x)

    @product.vjp
    def product_vjp(x, cotangent, _):
        packed = layer.decoder.packed(layer)
        return quantized_matmul(layer, cotangent, packed, transpose=False)

    return product(x)


def quantized_matmul(layer, x: mx.array, packed: mx.array, start: int = 0, stop: int | None = None, transpose: bool = True):
    """MLX's own kernel on rows ``start`` to ``stop`` of ``layer``, whose weights are ``packed``."""
    whole = start == 0 and stop is None
    return mx.quantized_matmul(
        x,
        packed,
        scales=layer["scales"] if whole else layer["scales"][start:stop],
        biases=layer["biases"] if whole else layer["biases"][start:stop],
        transpose=transpose,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    )


