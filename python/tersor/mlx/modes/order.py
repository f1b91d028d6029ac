"""The order in which layers are called, learned from the calls themselves."""

import weakref

from .weak_map import WeakMap


class CallOrder:
    """Remembers which layer followed which: a model calls its layers in the same order for every token."""

    def __init__(self):
        self._next = WeakMap()
        self._last: weakref.ref | None = None

    def called(self, layer):
        """Notes a call of ``layer`` and returns the layer that followed it last time, or None."""
        last = self._last() if self._last else None
        if last is not None:
            self._next.put(last, weakref.ref(layer))
        self._last = weakref.ref(layer)
        following = self._next.get(layer)
        return following() if following else None
