"""``auto``: `cached` for layers while a budget lasts, in the order of their first calls, and `fused` for the rest.

Decoding costs time with every token and a cached layer costs none, so memory that is free is best spent on cached layers; once it is spent,
`fused` adds nothing to it. The default budget is a quarter of the memory that MLX reports, or of the machine's.
"""

import os

import mlx.core as mx

from .base import DecodeMode
from .cached import CachedMode
from .fused import FusedMode
from .weak_map import WeakMap


def default_budget_nbytes() -> int:
    """A quarter of the memory of MLX's default device."""
    info = mx.device_info()
    total = info.get("max_recommended_working_set_size") or info.get("memory_size") or info.get("total_memory")
    if not total:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(total) // 4


class AutoMode(DecodeMode):
    name = "auto"

    def __init__(self, budget_nbytes: int | None = None):
        self.budget_nbytes = default_budget_nbytes() if budget_nbytes is None else budget_nbytes
        if self.budget_nbytes < 0:
            raise ValueError(f"a budget of {self.budget_nbytes} bytes is negative")
        self._cached = CachedMode()
        self._fused = FusedMode()
        self._choices = WeakMap()  # by matrix: the mode and the bytes of the budget that it takes

    def _settings(self) -> dict:
        return {"budget_nbytes": self.budget_nbytes}

    def choice(self, layer) -> DecodeMode:
        """The mode that serves ``layer``."""
        matrix = layer.matrix
        chosen = self._choices.get(matrix)
        if chosen is None:
            nbytes = matrix.decoded_nbytes
            spent = sum(nbytes for _, nbytes in self._choices.values())
            chosen = (self._cached, nbytes) if spent + nbytes <= self.budget_nbytes else (self._fused, 0)
            self._choices.put(matrix, chosen)
        return chosen[0]

    def packed(self, layer) -> mx.array:
        return self.choice(layer).packed(layer)

    def matmul(self, layer, x: mx.array) -> mx.array:
        return self.choice(layer).matmul(layer, x)

    def lookup(self, layer, ids: mx.array) -> mx.array:
        return self.choice(layer).lookup(layer, ids)

    def forget(self, layer) -> None:
        self._choices.pop(layer.matrix)
        self._cached.forget(layer)

    def resident_nbytes(self) -> int:
        return self._cached.resident_nbytes() + self._fused.resident_nbytes()
