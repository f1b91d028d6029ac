"""``lru``: decoded layers stay under a byte budget; the others are decoded for each product.

A token sweeps the layers in a cycle, so plain least-recently-used eviction drops every layer just before its use. Hence the policies:
``pin`` (default) keeps what came first, ``mru`` drops the most recently used, ``lru`` is there to compare. Layers that are not kept are
multiplied at once, so that their decoded form dies with the call.
"""

import mlx.core as mx

from ..coded import evaluated
from .base import DecodeMode, quantized_matmul
from .weak_map import WeakMap

POLICIES = ("pin", "lru", "mru")


class LruMode(DecodeMode):
    name = "lru"

    def __init__(self, budget_nbytes: int = 1 << 30, policy: str = "pin"):
        if policy not in POLICIES:
            raise ValueError(f"unknown eviction policy {policy!r}: one of {', '.join(POLICIES)}")
        if budget_nbytes < 0:
            raise ValueError(f"a budget of {budget_nbytes} bytes is negative")
        self.budget_nbytes = budget_nbytes
        self.policy = policy
        self.hits = self.misses = 0
        self._decoded = WeakMap()  # by matrix

    def _settings(self) -> dict:
        return {"budget_nbytes": self.budget_nbytes, "policy": self.policy}

    def packed(self, layer) -> mx.array:
        matrix = layer.matrix
        held = self._decoded.get(matrix)
        if held is not None:
            self.hits += 1
            if self.policy != "pin":
                self._decoded.put(matrix, held)
            return held
        self.misses += 1
        nbytes = matrix.decoded_nbytes
        if nbytes <= self.budget_nbytes and self.policy != "pin":
            while self.resident_nbytes() + nbytes > self.budget_nbytes:
                self._decoded.pop_first() if self.policy == "lru" else self._decoded.pop_last()
        packed = matrix.decode()
        if self.resident_nbytes() + nbytes <= self.budget_nbytes:
            self._decoded.put(matrix, packed)
        return packed

    def matmul(self, layer, x: mx.array) -> mx.array:
        pinned = self.policy == "pin" and self._decoded.get(layer.matrix) is not None
        y = quantized_matmul(layer, x, self.packed(layer))
        # A lazy product would keep its weights alive beyond the budget, now or after a later eviction.
        if not pinned:
            evaluated(y)
        return y

    def lookup(self, layer, ids: mx.array) -> mx.array:
        held = self._decoded.get(layer.matrix)
        return held[ids] if held is not None else super().lookup(layer, ids)

    def forget(self, layer) -> None:
        self._decoded.pop(layer.matrix)

    def resident_nbytes(self) -> int:
        return sum(array.nbytes for array in self._decoded.values())
