"""From a checkpoint to a directory of coded weights."""

import tempfile
from pathlib import Path

import tersor

from .layers import check_quantization
from .load import is_tersor_directory


def convert(
    hf_path: str,
    mlx_path: str = "tersor_model",
    quantize: bool = True,
    q_group_size: int = 64,
    q_bits: int = 4,
    *,
    codec: str = "rans",
    dtype: str | None = None,
    revision: str | None = None,
    quant_predicate=None,
    trust_remote_code: bool = False,
) -> None:
    """Writes ``hf_path`` as a Tersor directory.

    A checkpoint that is 4-bit already, in `mlx_lm`'s format, is coded losslessly. Another one is quantized by `mlx_lm.convert` first, to
    4 bits in groups of ``q_group_size``. Arguments that `mlx_lm.convert` has, too, mean the same; but without ``quantize`` only quantized
    checkpoints are accepted, and ``q_bits`` is 4.

    Raises:
        ValueError: ``mlx_path`` exists, or the checkpoint cannot be coded.
    """
    import mlx_lm
    from mlx_lm import utils

    check_quantization(q_group_size, q_bits, "affine")
    if Path(mlx_path).exists():
        raise ValueError(f"cannot save to {mlx_path}: it exists")
    source = utils._download(hf_path, revision=revision)
    if is_tersor_directory(source):
        raise ValueError(f"{hf_path} is coded already")
    config = utils.load_config(source)
    with tempfile.TemporaryDirectory(prefix="tersor-convert-") as scratch:
        if "quantization" not in config:
            if not quantize:
                raise ValueError(f"nothing to code: {hf_path} is not quantized, and quantize is False")
            quantized = Path(scratch) / "quantized"
            mlx_lm.convert(
                str(source),
                str(quantized),
                quantize=True,
                q_group_size=q_group_size,
                q_bits=q_bits,
                dtype=dtype,
                quant_predicate=quant_predicate,
                trust_remote_code=trust_remote_code,
            )
            source = quantized
        print("[INFO] Coding")
        tersor.encode_dir(source, mlx_path, codec=codec)
    stored = sum(file.stat().st_size for file in Path(mlx_path).glob("model*.safetensors"))
    plain = sum(file.stat().st_size for file in Path(source).glob("model*.safetensors")) if Path(source).exists() else None
    saving = f", {1 - stored / plain:.1%} less than before" if plain else ""
    print(f"[INFO] Coded model of {stored / 1e9:.3f} GB{saving}.")
