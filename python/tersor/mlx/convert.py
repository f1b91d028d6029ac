"""``python -m tersor.mlx.convert``, with the names of `mlx_lm.convert`'s options."""

import argparse

from .conversion import convert


def main() -> None:
    """The command line, with the names of `mlx_lm.convert`'s options."""
    parser = argparse.ArgumentParser(description="Convert a checkpoint to a directory of entropy-coded weights")
    parser.add_argument("--hf-path", "--model", required=True, help="directory or Hugging Face repository")
    parser.add_argument("--mlx-path", default="tersor_model", help="where to save the model")
    parser.add_argument("-q", "--quantize", action="store_true", default=True, help="full precision is quantized in any case")
    parser.add_argument("--q-bits", type=int, default=4, help="bits of a weight, which must be 4")
    parser.add_argument("--q-group-size", type=int, default=64, help="group size, if the checkpoint is not quantized yet")
    parser.add_argument("--codec", default="rans", help="codec of the coded weights")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="type of parameters that are not quantized")
    parser.add_argument("--trust-remote-code", action="store_true")
    try:
        convert(**vars(parser.parse_args()))
    except (ValueError, NotImplementedError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
