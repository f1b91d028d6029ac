#!/usr/bin/env python3
"""Size and quality of every scheme and codec on a real checkpoint, as a Markdown table.

    bench/quality.py [--model ../shared/data/books-52m] [--text ../shared/data/valid_books.txt] [--tokens 6000] [--codec rans]...

Quantizes the checkpoint with every scheme and codec into a temporary directory, then prints stored bits per weight (everything counted), the entropy of the symbols, perplexity and the mean KL divergence
from the unquantized model on the same tokens. Needs `cargo build --release` and Python's standard library.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TERSOR = os.path.join(ROOT, "target", "release", "tersor")

SCHEMES = [
    ("ecsq", ["--bpw", "4.25"]),
    ("ecsq", ["--bpw", "3.75"]),
    ("ecsq", ["--bpw", "3.25"]),
    ("ecsq", ["--bpw", "2.75"]),
    ("ecsq", ["--bpw", "2.25"]),
    ("affine4", ["--group-size", "32"]),
    ("affine4", ["--group-size", "64"]),
    ("affine4", ["--group-size", "128"]),
    ("q4_0", []),
    ("int4-row", []),
    ("int4-tensor", []),
]
CODECS = ["rans", "rans-precise", "huffman", "block-ans", "tiered", "rans-pairs", "fixed"]


def tersor(*arguments):
    """The command's JSON document, or the error's one line."""
    done = subprocess.run([TERSOR, *arguments, "--json"], capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr.strip()


def must(*arguments):
    document = tersor(*arguments)
    if isinstance(document, str):
        sys.exit(f"tersor {' '.join(arguments)}: {document}")
    return document


def row(options, out, scheme, extra, codec, quality):
    """One line of the table; `quality` is that of the same symbols under another codec, or None to measure it."""
    error = tersor("quantize", options.model, "-o", out, "--scheme", scheme, *extra, "--codec", codec, "--force")
    if isinstance(error, str):
        if "out of reach" not in error:
            sys.exit(error)
        print(f"| {scheme} {' '.join(extra)} | {codec} | out of reach | | | | | | |", flush=True)
        return quality
    sizes = must("inspect", out)
    coded = [t for t in sizes["tensors"] if t["entropy_bits"] is not None]
    weights = sum(t["weights"] for t in coded)
    mean = {key: sum(t[key] * t["weights"] for t in coded) / weights for key in ("entropy_bits", "code_bits", "side_bits")}
    if quality is None:
        text = ["--text", options.text, "--tokens", options.tokens]
        quality = must("eval", out, *text, "--reference", options.model)
    print(
        f"| {scheme} {' '.join(extra)} | {codec} | {sizes['bpw']:.3f} | {mean['entropy_bits']:.3f} | {mean['code_bits']:.3f} "
        f"| {mean['side_bits']:.3f} | {quality['perplexity']:.3f} | {quality['kl_mean']:.4f} | {quality['top1_agreement']:.4f} |",
        flush=True,
    )
    return quality


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=os.path.join(ROOT, "../shared/data/books-52m"))
    parser.add_argument("--text", default=os.path.join(ROOT, "../shared/data/valid_books.txt"))
    parser.add_argument("--tokens", default="6000")
    parser.add_argument("--codec", action="append", choices=CODECS, help="only this one; may be repeated")
    options = parser.parse_args()

    reference = must("eval", options.model, "--text", options.text, "--tokens", options.tokens)
    print(f"Unquantized: perplexity {reference['perplexity']:.3f} on {reference['tokens']} tokens.\n")
    print("| scheme | codec | bpw | entropy | code | side | perplexity | mean KL | top-1 |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        out = os.path.join(scratch, "model")
        for scheme, extra in SCHEMES:
            quality = None
            for codec in options.codec or CODECS:
                # `--bpw` finds a step for the codec, so ecsq's symbols differ from codec to codec; the other schemes' do not.
                quality = row(options, out, scheme, extra, codec, None if scheme == "ecsq" else quality)


if __name__ == "__main__":
    main()
