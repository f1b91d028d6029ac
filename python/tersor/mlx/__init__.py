"""Entropy-coded weights for MLX.

>>> from tersor.mlx import load, generate
>>> model, tokenizer = load("mlx-community/Llama-3.2-3B-Instruct-4bit", decode_mode="fused")
>>> generate(model, tokenizer, prompt="hello", verbose=True)

Layers (`EntropyCodedLinear`, `EntropyCodedEmbedding`) hold MLX's affine 4-bit weights losslessly coded. A decode mode decides when they are
decoded; all modes give the logits of MLX's own quantized layers. docs/mlx.md of the repository tells more.
"""

try:
    import mlx.core  # noqa: F401
except ImportError as error:
    raise ImportError('tersor.mlx needs MLX: pip install "tersor[mlx]" (on Linux also "mlx[cpu]" or "mlx[cuda13]")') from error

from .conversion import convert
from .generation import generate
from .layers import (
    EntropyCodedEmbedding,
    EntropyCodedLinear,
    coded_layers,
    entropy_code,
    entropy_decode,
    set_decode_mode,
)
from .load import load, load_model
from .modes import MODES, AutoMode, DecodeMode, LruMode
from .statistics import ModelStatistics, statistics

__all__ = [
    "MODES",
    "AutoMode",
    "DecodeMode",
    "EntropyCodedEmbedding",
    "EntropyCodedLinear",
    "LruMode",
    "ModelStatistics",
    "coded_layers",
    "convert",
    "entropy_code",
    "entropy_decode",
    "generate",
    "load",
    "load_model",
    "set_decode_mode",
    "statistics",
]
