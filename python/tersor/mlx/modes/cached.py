"""``cached``: decoded at the first call, kept from then on. Steps at the speed of MLX's own layer; memory of the decoded form."""

import mlx.core as mx

from .base import DecodeMode
from .weak_map import WeakMap


class CachedMode(DecodeMode):
    name = "cached"

    def __init__(self):
        self._decoded = WeakMap()  # by matrix

    def packed(self, layer) -> mx.array:
        matrix = layer.matrix
        held = self._decoded.get(matrix)
        if held is None:
            held = matrix.decode()
            self._decoded.put(matrix, held)
            matrix.give_up_bytes()
        return held

    def lookup(self, layer, ids: mx.array) -> mx.array:
        return self.packed(layer)[ids]

    def forget(self, layer) -> None:
        self._decoded.pop(layer.matrix)

    def resident_nbytes(self) -> int:
        return sum(array.nbytes for array in self._decoded.values())
