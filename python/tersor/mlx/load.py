"""Loading models: Tersor's directories, and the 4-bit directories of `mlx_lm`."""

import glob
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import utils as mlx_lm_utils

import tersor

from .layers import GROUP_SIZES, EntropyCodedEmbedding, EntropyCodedLinear, coded_layers, entropy_code, is_codable
from .modes import DecodeMode, make_mode

# Offsets in a blob's header, FORMAT.md.
_SCALE_EXPONENT_AT = 54


def load(
    path_or_hf_repo: str,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    decode_mode: str | DecodeMode = "auto",
    codec: str = "rans",
):
    """Model and tokenizer, as `mlx_lm.load` returns them, with coded layers.

    Args:
        path_or_hf_repo: a directory that `tersor` wrote, or any directory or repository that `mlx_lm` loads. Affine 4-bit
            layers of the latter are coded while loading, losslessly; other layers stay what they are.
        decode_mode: of all coded layers.
        codec: for layers that are coded while loading.
        The other arguments are `mlx_lm.load`'s.

    Raises:
        ValueError: a model type that `mlx_lm` does not know, nothing to code, corrupt weights.
        FileNotFoundError: no configuration or no weights.
    """
    path = mlx_lm_utils._download(path_or_hf_repo, revision=revision)
    model, config = load_model(
        path, lazy, model_config=model_config, trust_remote_code=trust_remote_code, decode_mode=decode_mode, codec=codec
    )
    if adapter_path is not None:
        model = mlx_lm_utils.load_adapters(model, adapter_path)
        model.eval()
    tokenizer = mlx_lm_utils.load_tokenizer(path, tokenizer_config, eos_token_ids=config.get("eos_token_id"))
    return (model, tokenizer, config) if return_config else (model, tokenizer)


def load_model(
    path: str | Path,
    lazy: bool = False,
    *,
    model_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    decode_mode: str | DecodeMode = "auto",
    codec: str = "rans",
) -> tuple[nn.Module, dict]:
    """Model and configuration of a directory; see `load`."""
    path = Path(path)
    decoder = make_mode(decode_mode)
    if is_tersor_directory(path):
        reader = _DirectoryReader(path, decoder)
        model, config = mlx_lm_utils.load_model(
            path,
            lazy=True,
            # The original's own quantization is not that of the coded tensors.
            model_config={"quantization": None, **(model_config or {})},
            get_model_classes=reader.model_classes,
            trust_remote_code=trust_remote_code,
        )
        config.pop("quantization", None)
        if reader.dense:
            print(f"[INFO] {reader.dense} coded tensors are outside of MLX's 4-bit layout and were dequantized.")
    else:
        model, config = mlx_lm_utils.load_model(
            path, lazy=True, model_config=model_config, trust_remote_code=trust_remote_code
        )
        entropy_code(model, decode_mode=decoder, codec=codec, class_predicate=lambda _, module: is_codable(module))
    if not lazy:
        _evaluate(model)
    return model, config


def is_tersor_directory(path: str | Path) -> bool:
    """Whether ``path`` holds a model that Tersor wrote."""
    try:
        config = json.loads((Path(path) / "config.json").read_text())
    except (OSError, ValueError):
        return False
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == "tersor"


def _evaluate(model: nn.Module) -> None:
    """Reads all parameters, except coded bytes that layers read by themselves."""
    blobs = {id(layer["coded"]) for _, layer in coded_layers(model)}
    leaves = [array for _, array in tree_flatten(model.parameters()) if id(array) not in blobs]
    mx.eval(leaves)


class _DirectoryReader:
    """Puts coded layers into a model while `mlx_lm` loads it: after the model's own `sanitize`, before names are compared."""

    def __init__(self, path: Path, decoder: DecodeMode):
        self._decoder = decoder
        self._files: dict[str, str] = {}
        for file in sorted(glob.glob(str(path / "model*.safetensors"))):
            self._files.update(dict.fromkeys(mx.load(file), file))
        self.dense = 0

    def model_classes(self, config: dict):
        model_class, args_class = mlx_lm_utils._get_classes(config)
        reader = self

        class Model(model_class):
            def sanitize(self, weights):
                inherited = getattr(super(), "sanitize", None)
                weights = inherited(weights) if inherited else weights
                return reader.insert_layers(self, weights)

        Model.__module__ = model_class.__module__
        Model.__qualname__ = model_class.__qualname__
        return Model, args_class

    def insert_layers(self, model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Replaces the modules whose weights are coded. Returns the weights as the model now names them."""
        weights = dict(weights)
        modules = dict(model.named_modules())
        replaced = []
        for name in [name for name in weights if name.endswith(".coded")]:
            path = name.removesuffix(".coded")
            module = modules.get(path)
            if not isinstance(module, (nn.Linear, nn.Embedding)):
                raise ValueError(f"{name}: the model has no linear layer or embedding {path}")
            replaced.append((path, self._layer(path, module, weights)))
        model.update_modules(tree_unflatten(replaced))
        return weights

    def _layer(self, path: str, module: nn.Module, weights: dict[str, mx.array]) -> nn.Module:
        coded = weights.pop(f"{path}.coded")
        scales, biases = weights[f"{path}.scales"], weights.get(f"{path}.biases")
        handle = tersor.Coded(np.array(coded, copy=False))
        try:
            affine = _affine_scales(handle, coded, scales, biases)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if affine is None:
            weight = _dequantized(handle, coded, scales, biases)
            self.dense += 1
            for part in ("scales", "biases"):
                weights.pop(f"{path}.{part}", None)
            weights[f"{path}.weight"] = weight
            return module
        scales, biases, group_size = affine
        cls = EntropyCodedEmbedding if isinstance(module, nn.Embedding) else EntropyCodedLinear
        file = self._files.get(f"{path}.coded")
        reload = (lambda: mx.load(file)[f"{path}.coded"]) if file else None
        layer = cls.from_coded(
            coded,
            scales,
            biases,
            weights.get(f"{path}.bias"),
            group_size=group_size,
            decode_mode=self._decoder,
            reload=reload,
        )
        weights.update({f"{path}.{part}": layer[part] for part in ("coded", "scales", "biases")})
        return layer


def _affine_scales(handle, coded: mx.array, scales: mx.array, biases: mx.array | None):
    """Scales, biases and group size of the same weights in MLX's affine 4-bit form; None if they have none.

    A symmetric weight ``scale * symbol`` is ``scale * (symbol + 8) - 8 * scale``, exactly: the last term differs from the scale by a power
    of two. Scales of rows and tensors are repeated for every group.
    """
    rows, cols = handle.shape
    try:
        handle.decode_affine4(start=0, stop=0)
    except ValueError:
        return None
    if handle.scheme == "group affine":
        group_size = handle.group_size
    elif handle.scheme == "group symmetric":
        group_size = handle.group_size
        biases = -8 * scales
    else:
        group_size = next((size for size in reversed(GROUP_SIZES) if cols % size == 0), 0)
        if not group_size:
            return None
        real = scales.astype(mx.float32) * 2.0 ** _scale_exponent(coded)
        scales = mx.broadcast_to(real.reshape(-1, 1), (rows, cols // group_size))
        biases = -8 * scales
    if group_size not in GROUP_SIZES or cols % group_size:
        return None
    return scales, biases, group_size


def _dequantized(handle, coded: mx.array, scales: mx.array, biases: mx.array | None) -> mx.array:
    """The real weights (rows, cols), of the scales' type for groups and ``float16`` otherwise."""
    symbols = handle.decode().astype(np.float32)
    real = np.array(scales.astype(mx.float32))
    dtype = scales.dtype
    if handle.scheme in ("group affine", "group symmetric"):
        real = np.repeat(real, handle.group_size, axis=1)[:, : symbols.shape[1]]
        if handle.scheme == "group affine":
            shift = np.repeat(np.array(biases.astype(mx.float32)), handle.group_size, axis=1)[:, : symbols.shape[1]]
            return mx.array(real * (symbols + 8) + shift).astype(dtype)
        return mx.array(real * symbols).astype(dtype)
    return mx.array(real.reshape(-1, 1) * 2.0 ** _scale_exponent(coded) * symbols).astype(dtype)


def _scale_exponent(coded: mx.array) -> int:
    return int(coded[_SCALE_EXPONENT_AT : _SCALE_EXPONENT_AT + 1].view(mx.int8).item())
