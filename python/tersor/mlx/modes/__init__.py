"""Decode modes: one file each, named after it."""

from .auto import AutoMode
from .base import DecodeMode
from .cached import CachedMode
from .fused import FusedMode
from .gpu_async import GpuAsyncMode
from .lru import LruMode
from .prefetch import PrefetchMode

MODES = {mode.name: mode for mode in (FusedMode, CachedMode, PrefetchMode, LruMode, GpuAsyncMode, AutoMode)}


def make_mode(mode: "str | DecodeMode") -> DecodeMode:
    """A mode by its name, or ``mode`` itself where it carries settings, as ``LruMode(budget_nbytes=...)`` does.

    Raises:
        ValueError: no mode has this name.
    """
    if isinstance(mode, DecodeMode):
        return mode
    if mode not in MODES:
        raise ValueError(f"unknown decode mode {mode!r}: one of {', '.join(MODES)}")
    return MODES[mode]()


__all__ = [
    "MODES",
    "AutoMode",
    "CachedMode",
    "DecodeMode",
    "FusedMode",
    "GpuAsyncMode",
    "LruMode",
    "PrefetchMode",
    "make_mode",
]
