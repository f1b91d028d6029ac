"""Times the decode modes of tersor.mlx beside MLX's own quantized layers: tokens per second of a model, one token at a time.

    python3 bench/mlx/modes.py DIR [--tokens 20] [--repeat 3] [--modes fused,cached]

DIR is a 4-bit directory of mlx_lm. Logits of every mode are compared with MLX's first, to the bit on the CPU. Modes and MLX take turns, so
that a disturbance meets all of them; the best of the repeats is printed, and the median.
"""

import argparse
import statistics
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import compute_bits_per_weight, load_model
from tersor import mlx as tm


def rate(model, tokens: int) -> float:
    """Tokens per second after a prompt of four."""
    cache = make_prompt_cache(model)
    token = mx.argmax(model(mx.array([[1, 2, 3, 4]]), cache=cache)[:, -1:], -1)
    mx.eval(token)
    start = time.perf_counter()
    for _ in range(tokens):
        token = mx.argmax(model(token, cache=cache), -1)
        mx.eval(token)
    return tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--modes", default=",".join(tm.MODES))
    arguments = parser.parse_args()
    plain, _ = load_model(Path(arguments.directory))
    coded, _ = tm.load_model(arguments.directory)
    prompt = mx.array([[1, 2, 3, 4]])
    expected = plain(prompt)
    modes = arguments.modes.split(",")
    rates = {"mlx": [], **{mode: [] for mode in modes}}
    decoders = {mode: tm.set_decode_mode(coded, mode) for mode in modes}
    for mode in modes:
        tm.set_decode_mode(coded, decoders[mode])
        equal = mx.array_equal(coded(prompt), expected).item()
        print(f"{mode}: logits {'equal MLX to the bit' if equal else 'differ from MLX'}")
    for _ in range(arguments.repeat):
        rates["mlx"].append(rate(plain, arguments.tokens))
        for mode in modes:
            tm.set_decode_mode(coded, decoders[mode])
            rates[mode].append(rate(coded, arguments.tokens))
    print(f"MLX {mx.__version__} on {mx.default_device()}: MLX {compute_bits_per_weight(plain):.3f} bits per weight, "
          f"coded {compute_bits_per_weight(coded):.3f}")
    print("| layers | tok/s, best | tok/s, median | of MLX (medians) |\n|---|---|---|---|")
    base = statistics.median(rates["mlx"])
    for mode, seen in rates.items():
        print(f"| {mode} | {max(seen):.1f} | {statistics.median(seen):.1f} | {statistics.median(seen) / base:.2f} |")


if __name__ == "__main__":
    main()
