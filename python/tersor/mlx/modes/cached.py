"""``cached``: decoded at the first call, kept from then on. Steps at the speed of MLX's own layer; memory of the decoded form."""

import mlx.core as mx

from .base import DecodeMode
from .layer_map import LayerMap


class CachedMode(DecodeMode):
    name = "cached"

    def __init__(self):
        self._decoded = LayerMap()

    def packed(self, layer) -> mx.array:
        held = self._decoded.get(layer)
        if held is None:
            held = layer.matrix.decode()
            self._decoded.put(layer, held)
            layer.matrix.give_up_bytes()
        return held

    def lookup(self, layer, ids: mx.array) -> mx.array:
        return self.packed(layer)[ids]

    def forget(self, layer) -> None:
        self._decoded.pop(layer)

    def resident_nbytes(self) -> int:
        return sum(array.nbytes for array in self._decoded.values())
