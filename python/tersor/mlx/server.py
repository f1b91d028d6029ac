"""``python -m tersor.mlx.server``: `mlx_lm.server` with coded weights."""

import sys

from . import _mlx_lm_command


def main() -> None:
    """The command line: `mlx_lm.server`'s options, ``--decode-mode`` and ``--codec``."""
    _mlx_lm_command.run("mlx_lm.server", sys.argv[1:])


if __name__ == "__main__":
    main()
