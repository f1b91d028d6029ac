"""``python -m tersor.mlx.generate``: `mlx_lm.generate` with coded weights, and one more line of statistics."""

import sys
from typing import Any

from . import _mlx_lm_command
from .load import coded_layers
from .statistics import statistics


def generate(model, tokenizer, prompt, verbose: bool = False, **kwargs: Any) -> str:
    """Generates a completion; arguments are those of `mlx_lm.generate`. ``verbose`` prints its statistics and ours."""
    import mlx_lm

    text = mlx_lm.generate(model, tokenizer, prompt, verbose=verbose, **kwargs)
    if verbose and coded_layers(model):
        print(statistics(model))
    return text


def main() -> None:
    """The command line: `mlx_lm.generate`'s options, ``--decode-mode`` and ``--codec``."""
    _mlx_lm_command.run("mlx_lm.generate", sys.argv[1:], generate=generate)


if __name__ == "__main__":
    main()
