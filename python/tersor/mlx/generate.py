"""``python -m tersor.mlx.generate``: `mlx_lm.generate` with coded weights, and one more line of statistics."""

import sys

from . import _mlx_lm_command
from .generation import generate


def main() -> None:
    """The command line: `mlx_lm.generate`'s options, ``--decode-mode`` and ``--codec``."""
    _mlx_lm_command.run("mlx_lm.generate", sys.argv[1:], generate=generate)


if __name__ == "__main__":
    main()
