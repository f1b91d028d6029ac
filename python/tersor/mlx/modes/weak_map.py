"""A map by identity that does not keep its keys alive: MLX's modules have no hash, and matrices come and go with `load_weights`."""

import weakref
from typing import Any


class WeakMap:
    """Values by key (a layer or a matrix), in order of insertion, until the key dies."""

    def __init__(self):
        self._held: dict[int, tuple[weakref.ref, Any]] = {}

    def get(self, key, default=None):
        entry = self._held.get(id(key))
        return entry[1] if entry else default

    def put(self, key, value) -> None:
        """Sets the value and makes ``key`` the last in the order."""
        number, held = id(key), self._held
        held.pop(number, None)
        held[number] = (weakref.ref(key, lambda _: held.pop(number, None)), value)

    def pop(self, key, default=None):
        entry = self._held.pop(id(key), None)
        return entry[1] if entry else default

    def pop_first(self):
        return self._held.pop(next(iter(self._held)))[1]

    def pop_last(self):
        return self._held.popitem()[1][1]

    def values(self) -> list:
        return [value for _, value in self._held.values()]
