"""Compresses a model at several sizes, prints what each costs, and plots bits per weight against quality.

    pip install . matplotlib tqdm
    python examples/compress_and_plot.py path/to/hf-checkpoint --text book.txt --plot quality.svg

Quality is the mean Kullback-Leibler divergence, in nats per token, of the compressed model's next-token distribution from the original's:
0 would be the same model. All models read the same tokens.
"""

import argparse
import pathlib
import tempfile

import numpy as np
import tersor
from tqdm import tqdm

# Label, arguments of tersor.quantize.
FIXED = [("affine4 (MLX's 4 bit)", {"scheme": "affine4"}), ("q4_0 (GGUF)", {"scheme": "q4_0"}), ("int4-row", {"scheme": "int4-row"})]


def log_softmax(logits):
    """(tokens, vocabulary) to float64 log-probabilities."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def windows(model, text, count, length):
    """The first tokens of a text, in runs that fit a context: (count, length)."""
    tokens = model.encode(text)
    if len(tokens) < count * length:
        raise SystemExit(f"the text has {len(tokens)} tokens, {count * length} are needed")
    return [tokens[i * length : (i + 1) * length] for i in range(count)]


def measure(model, runs, reference):
    """Mean divergence from the reference's log-probabilities, and perplexity of the text."""
    divergence, loss, tokens = 0.0, 0.0, 0
    for run, truth in zip(runs, reference):
        ours = log_softmax(model.logits(run))
        divergence += (np.exp(truth) * (truth - ours)).sum()
        loss -= ours[np.arange(len(run) - 1), run[1:]].sum()
        tokens += len(run)
    return divergence / tokens, np.exp(loss / (tokens - len(runs)))


def plot(path, curve, points):
    """Bits per weight against divergence: the curve of ecsq, and a point for each format of fixed size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot([c["bpw"] for c in curve], [c["kl"] for c in curve], "o-", label="ecsq")
    for point in points:
        axes.plot(point["bpw"], point["kl"], "s", label=point["label"])
    axes.set(xlabel="bits per weight, everything counted", ylabel="mean KL divergence, nats per token", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=pathlib.Path, help="Hugging Face directory of a Llama-family model")
    parser.add_argument("--text", type=pathlib.Path, required=True, help="text that the model was not trained on")
    parser.add_argument("--bpw", type=float, nargs="+", default=[2.5, 3.0, 3.5, 4.0, 4.5], help="sizes for ecsq")
    parser.add_argument("--windows", type=int, default=4, help="runs of tokens to measure on")
    parser.add_argument("--length", type=int, default=256, help="tokens in a run")
    parser.add_argument("--codec", default="rans")
    parser.add_argument("--plot", type=pathlib.Path, help="file for the plot, such as quality.svg")
    arguments = parser.parse_args()

    original = tersor.Model.open(arguments.checkpoint)
    text = arguments.text.read_text(errors="replace")
    runs = windows(original, text, arguments.windows, arguments.length)
    reference = [log_softmax(original.logits(run)) for run in runs]
    perplexity = measure(original, runs, reference)[1]
    print(f"{arguments.checkpoint.name}: {original.bits_per_weight:.2f} bits per weight, perplexity {perplexity:.3f}\n")
    print(f"{'':24}{'bpw':>8}{'entropy':>9}{'KL':>10}{'perplexity':>12}")

    rows = []
    sizes = [(f"ecsq {bpw:g}", {"scheme": "ecsq", "bpw": bpw}) for bpw in arguments.bpw]
    for label, options in sizes + FIXED:
        with tempfile.TemporaryDirectory() as scratch:
            directory = pathlib.Path(scratch) / "model"
            with tqdm(unit="weight", unit_scale=True, leave=False, disable=None) as bar:  # only on a terminal
                report = tersor.quantize(arguments.checkpoint, directory, codec=arguments.codec, progress=bar, **options)
            divergence, perplexity = measure(tersor.Model.open(directory, strategy="cached"), runs, reference)
        row = {"label": label, "bpw": report["bpw"], "entropy": report["entropy_bits"], "kl": divergence, "perplexity": perplexity}
        print(f"{label:24}{row['bpw']:8.3f}{row['entropy']:9.3f}{divergence:10.4f}{perplexity:12.3f}", flush=True)
        rows.append(row)
    if arguments.plot:
        plot(arguments.plot, rows[: len(sizes)], rows[len(sizes) :])
        print(f"\nplot: {arguments.plot}")


if __name__ == "__main__":
    main()
