"""What the MLX tests share: skipping where MLX is missing, and small quantized models."""

import os
import pathlib

import pytest

DATA = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data"
BOOKS = DATA / "books-52m"


def required(what: str) -> bool:
    """Whether the environment demands ``what``, so that a skip would hide a failure."""
    return what in os.environ.get("TERSOR_REQUIRE", "").replace(",", " ").split()


def skip(what: str, reason: str) -> None:
    """Skips the calling test or module with a printed reason, or fails where ``what`` is demanded."""
    if required(what):
        raise RuntimeError(f"TERSOR_REQUIRE demands {what}: {reason}")
    pytest.skip(reason, allow_module_level=True)


def need_mlx() -> None:
    """Skips the calling module where MLX or mlx-lm cannot be imported."""
    try:
        import mlx.core  # noqa: F401
        import mlx_lm  # noqa: F401
    except ImportError as error:
        skip("mlx", f"MLX is missing: {error}")


def need_books() -> pathlib.Path:
    """The checkpoint books-52m, or a skip."""
    if not (BOOKS / "model.safetensors").exists():
        skip("data", f"{BOOKS} is missing")
    return BOOKS
