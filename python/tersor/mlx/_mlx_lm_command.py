"""Runs a command of `mlx_lm` with this package's `load` in the place of its own."""

import argparse
import functools
import importlib
import sys
from unittest import mock

from .load import load
from .modes import MODES


def run(module_name: str, arguments: list[str], **replacements) -> None:
    """Runs ``main`` of the `mlx_lm` module.

    Args:
        arguments: the command's own; ``--decode-mode`` and ``--codec`` are taken out of them.
        replacements: what else is put in the place of the module's globals.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--decode-mode", choices=list(MODES), default="auto")
    parser.add_argument("--codec", default="rans")
    if "-h" in arguments or "--help" in arguments:
        print(f"--decode-mode {{{','.join(MODES)}}}  when weights are decoded (default: auto)")
        print("--codec CODEC  for weights that are coded while loading (default: rans)")
        print("and the options of", module_name)
    own, rest = parser.parse_known_args(arguments)
    # `mlx_lm` has functions of the same names as its modules.
    module = importlib.import_module(module_name)
    module = sys.modules[module_name]
    coded_load = functools.partial(load, decode_mode=own.decode_mode, codec=own.codec)
    with mock.patch.multiple(module, load=coded_load, **replacements), mock.patch.object(sys, "argv", [module_name, *rest]):
        module.main()
