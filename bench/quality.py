#!/usr/bin/env python3
"""Size and quality of every scheme and codec on a real checkpoint, as a Markdown table.

    bench/quality.py [--model ../shared/data/books-52m] [--text ../shared/data/valid_books.txt] [--tokens 6000]

Quantizes the checkpoint with every scheme (codec `rans`) and the recommended one with every codec, into a temporary
directory, then prints stored bits per weight (everything counted), the entropy of the symbols, perplexity and the mean KL divergence
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
CODECS = ["rans", "rans-precise", "huffman", "block-ans", "fixed"]


def tersor(*arguments):
    done = subprocess.run([TERSOR, *arguments, "--json"], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"tersor {' '.join(arguments)}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=os.path.join(ROOT, "../shared/data/books-52m"))
    parser.add_argument("--text", default=os.path.join(ROOT, "../shared/data/valid_books.txt"))
    parser.add_argument("--tokens", default="6000")
    options = parser.parse_args()

    reference = tersor("eval", options.model, "--text", options.text, "--tokens", options.tokens)
    print(f"Unquantized: perplexity {reference['perplexity']:.3f} on {reference['tokens']} tokens.\n")
    print("| scheme | options | codec | bpw | entropy | code | side | perplexity | mean KL | top-1 |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    runs = [(scheme, extra, "rans") for scheme, extra in SCHEMES]
    # The codec changes size, never symbols: all of them at one step, found for `rans`, so that rows compare.
    runs += [("affine4", ["--group-size", "64"], codec) for codec in CODECS[1:]]
    runs += [("ecsq", ["--bpw", "3.75"], codec) for codec in CODECS[1:]]
    with tempfile.TemporaryDirectory() as scratch:
        for number, (scheme, extra, codec) in enumerate(runs):
            out = os.path.join(scratch, str(number))
            tersor("quantize", options.model, "-o", out, "--scheme", scheme, *extra, "--codec", codec)
            sizes = tersor("inspect", out)
            coded = [t for t in sizes["tensors"] if t["entropy_bits"] is not None]
            weights = sum(t["weights"] for t in coded)
            mean = lambda key: sum(t[key] * t["weights"] for t in coded) / weights
            quality = tersor("eval", out, "--text", options.text, "--tokens", options.tokens, "--reference", options.model)
            print(
                f"| {scheme} | {' '.join(extra)} | {codec} | {sizes['bpw']:.3f} | {mean('entropy_bits'):.3f} | {mean('code_bits'):.3f} "
                f"| {mean('side_bits'):.3f} | {quality['perplexity']:.3f} | {quality['kl_mean']:.4f} | {quality['top1_agreement']:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
