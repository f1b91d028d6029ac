"""The command line, as an entry point: the same as the binary that Cargo builds."""

import sys

from ._native import command


def main():
    """Runs ``tersor`` with the process's arguments and ends with its exit code."""
    sys.exit(command(["tersor", *sys.argv[1:]]))
