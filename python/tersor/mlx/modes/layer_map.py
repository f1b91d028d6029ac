"""Values by layer. MLX's modules have no hash, and a map must not keep them alive: so by identity, until the layer dies."""

import weakref
from typing import Any


class LayerMap:
    """A map from layers to values, in order of insertion."""

    def __init__(self):
        self._held: dict[int, tuple[weakref.ref, Any]] = {}

    def get(self, layer, default=None):
        entry = self._held.get(id(layer))
        return entry[1] if entry else default

    def put(self, layer, value) -> None:
        """Sets the value and makes ``layer`` the last in the order."""
        key, held = id(layer), self._held
        held.pop(key, None)
        held[key] = (weakref.ref(layer, lambda _: held.pop(key, None)), value)

    def pop(self, layer, default=None):
        entry = self._held.pop(id(layer), None)
        return entry[1] if entry else default

    def pop_first(self):
        return self._held.pop(next(iter(self._held)))[1]

    def pop_last(self):
        return self._held.popitem()[1][1]

    def values(self) -> list:
        return [value for _, value in self._held.values()]
