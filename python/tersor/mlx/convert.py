"""``python -m tersor.mlx.convert``: from a checkpoint to a directory of coded weights."""

import argparse
import tempfile
from pathlib import Path

import tersor

from .load import is_tersor_directory


def convert(
    hf_path: str,
    mlx_path: str = "tersor_model",
    *,
    q_group_size: int = 64,
    codec: str = "rans",
    dtype: str | None = None,
    revision: str | None = None,
    quant_predicate=None,
    trust_remote_code: bool = False,
) -> None:
    """Writes ``hf_path`` as a Tersor directory.

    A checkpoint that is 4-bit already, in `mlx_lm`'s format, is coded losslessly. Another one is quantized by `mlx_lm.convert` first, to
    4 bits in groups of ``q_group_size``.

    Raises:
        ValueError: ``mlx_path`` exists, or the checkpoint cannot be coded.
    """
    import mlx_lm
    from mlx_lm import utils

    if Path(mlx_path).exists():
        raise ValueError(f"cannot save to {mlx_path}: it exists")
    source = utils._download(hf_path, revision=revision)
    if is_tersor_directory(source):
        raise ValueError(f"{hf_path} is coded already")
    config = utils.load_config(source)
    with tempfile.TemporaryDirectory(prefix="tersor-convert-") as scratch:
        if "quantization" not in config:
            quantized = Path(scratch) / "quantized"
            mlx_lm.convert(
                str(source),
                str(quantized),
                quantize=True,
                q_group_size=q_group_size,
                q_bits=4,
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


def main() -> None:
    """The command line, with the names of `mlx_lm.convert`'s options."""
    parser = argparse.ArgumentParser(description="Convert a checkpoint to a directory of entropy-coded weights")
    parser.add_argument("--hf-path", "--model", required=True, help="directory or Hugging Face repository")
    parser.add_argument("--mlx-path", default="tersor_model", help="where to save the model")
    parser.add_argument("--q-group-size", type=int, default=64, help="group size, if the checkpoint is not quantized yet")
    parser.add_argument("--codec", default="rans", help="codec of the coded weights")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="type of parameters that are not quantized")
    parser.add_argument("--trust-remote-code", action="store_true")
    convert(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
