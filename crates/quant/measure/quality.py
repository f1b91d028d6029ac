#!/usr/bin/env python3
"""The measurements behind ecsq's defaults, in NumPy and without our code (tables in crates/quant/src/lib.rs).

    python3 quality.py rate BOOKS_52M_DIR              bits at equal squared error: rounding, grids, centroid tables
    python3 quality.py kl BOOKS_52M_DIR TEXT [BPW ...] KL against the bf16 model: grids, finer steps for some tensors

Needs numpy; `kl` also needs tokenizers. `rate` takes minutes, `kl` about 15 s a line on two cores.
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np

WINDOWS, CONTEXT, SKIP_CHARS = 12, 512, 200_000
DB_PER_BIT = 20 * np.log10(2)


def load(directory):
    data = (Path(directory) / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    tensors = {}
    for name, info in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            begin, end = info["data_offsets"]
            half = np.frombuffer(data, np.uint16, (end - begin) // 2, 8 + size + begin)
            tensors[name] = (half.astype(np.uint32) << 16).view(np.float32).reshape(info["shape"])
    return tensors


def entropy(symbols):
    counts = np.bincount((symbols - symbols.min()).ravel())
    p = counts[counts > 0] / symbols.size
    return float(-(p * np.log2(p)).sum())


def ecsq(w, step, grid, rounding, centroids=False):
    """(restored weights, bits with scales) at a step relative to the rms of the rows or of the tensor."""
    axis = 1 if grid == "row" else None
    rms = np.sqrt(np.square(w, dtype=np.float64).mean(axis, keepdims=True))
    u = w / (step * rms).astype(np.float32)
    q = (np.sign(u) * np.floor(np.abs(u) + np.float32(rounding))).astype(np.int32)
    qf = q.astype(np.float32)
    norm = np.maximum((qf * qf).sum(axis, keepdims=True, dtype=np.float64), 1)
    scale = ((w * qf).sum(axis, keepdims=True, dtype=np.float64) / norm).astype(np.float16).astype(np.float32)
    level = qf
    if centroids:  # one table for the tensor: the mean of w / scale over each symbol
        index = (q - q.min()).ravel()
        unit = (w / np.where(scale == 0, 1, scale)).ravel()
        level = (np.bincount(index, unit) / np.maximum(np.bincount(index), 1)).astype(np.float32)[q - q.min()]
    return level * scale, entropy(q) * w.size + 16 * scale.size


def affine(w, group=64, n_bins=15):
    g = w.reshape(-1, group)
    low, high = g.min(1), g.max(1)
    scale = np.maximum((high - low) / n_bins, 1e-7)
    scale = np.where(np.abs(low) > np.abs(high), scale, -scale)
    edge = np.where(np.abs(low) > np.abs(high), low, high)
    q0 = np.rint(edge / scale)
    scale, bias = np.where(q0 != 0, edge / np.where(q0 != 0, q0, 1), scale), np.where(q0 != 0, edge, 0)
    q = np.clip(np.rint((g - bias[:, None]) / scale[:, None]), 0, n_bins)
    return (q * scale[:, None] + bias[:, None]).reshape(w.shape).astype(np.float32)


def solve(bpw, evaluate):
    """log2 of the step at which evaluate(step)[0] is bpw: the rate falls by one bit as the step doubles."""
    log_step = 2 - bpw
    for _ in range(4):
        rate = evaluate(2**log_step)[0]
        if abs(rate - bpw) < 5e-4:
            break
        log_step += rate - bpw
    return log_step


def rate(directory):
    weights = {k: w for k, w in load(directory).items() if w.ndim == 2 and ("embed" in k or k.split(".")[2] in "0 5 10".split())}
    count = sum(w.size for w in weights.values())

    def evaluate(step, *how):
        bits = error = 0.0
        for w in weights.values():
            restored, b = ecsq(w, step, *how)
            bits += b
            error += np.square(w - restored, dtype=np.float64).sum() / np.square(w, dtype=np.float64).sum() * w.size
        return bits / count, -10 * np.log10(error / count)

    print("bpw   grid    rounding          SQNR dB  bits gained at equal SQNR")
    for bpw in (2.0, 2.5, 3.0, 3.5, 3.75, 4.0):
        base = None
        for how in [("row", r) for r in (0.5, 0.46, 0.42, 0.38)] + [("row", 0.5, True), ("tensor", 0.5)]:
            got, sqnr = evaluate(2 ** solve(bpw, lambda step: evaluate(step, *how)), *how)
            sqnr += (bpw - got) * DB_PER_BIT
            base = sqnr if base is None else base
            kind = "centroids" if how[2:] else ""
            print(f"{bpw:<5} {how[0]:7} {how[1]:<5} {kind:10} {sqnr:8.3f}  {(sqnr - base) / DB_PER_BIT:+.4f}", flush=True)


class Llama:
    """A float32 forward pass of the 52 M-parameter model over WINDOWS x CONTEXT tokens."""

    def __init__(self, directory, text):
        from tokenizers import Tokenizer

        self.weights = load(directory)
        config = json.loads((Path(directory) / "config.json").read_text())
        self.layers, self.heads, self.kv_heads = (config[k] for k in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"))
        self.head_dim, self.eps = config["head_dim"], np.float32(config["rms_norm_eps"])
        tokens = Tokenizer.from_file(str(Path(directory) / "tokenizer.json")).encode(Path(text).read_text()[SKIP_CHARS : SKIP_CHARS + 90_000]).ids
        self.tokens, self.targets = np.array(tokens[: WINDOWS * CONTEXT]), np.array(tokens[1 : WINDOWS * CONTEXT + 1])
        angle = np.arange(CONTEXT)[:, None] / config["rope_theta"] ** (np.arange(self.head_dim // 2) / (self.head_dim // 2))
        self.cos, self.sin = (np.concatenate([f(angle)] * 2, 1).astype(np.float32) for f in (np.cos, np.sin))
        self.mask = np.triu(np.full((CONTEXT, CONTEXT), -1e30, np.float32), 1)

    def norm(self, x, gain):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * gain

    def rope(self, x):
        half = self.head_dim // 2
        return x * self.cos + np.concatenate([-x[..., half:], x[..., :half]], -1) * self.sin

    def log_probabilities(self, weights):
        x = weights["model.embed_tokens.weight"][self.tokens]
        for layer in range(self.layers):
            part = lambda name: weights[f"model.layers.{layer}.{name}.weight"]  # noqa: B023
            h = self.norm(x, part("input_layernorm"))
            heads = lambda name, n: (h @ part(name).T).reshape(WINDOWS, CONTEXT, n, -1).transpose(0, 2, 1, 3)  # noqa: B023
            share = self.heads // self.kv_heads
            q, k = self.rope(heads("self_attn.q_proj", self.heads)), self.rope(heads("self_attn.k_proj", self.kv_heads))
            v = np.repeat(heads("self_attn.v_proj", self.kv_heads), share, 1)
            a = q @ np.repeat(k, share, 1).transpose(0, 1, 3, 2) / np.float32(self.head_dim**0.5) + self.mask
            a = np.exp(a - a.max(-1, keepdims=True))
            o = (a / a.sum(-1, keepdims=True)) @ v
            x = x + o.transpose(0, 2, 1, 3).reshape(len(x), -1) @ part("self_attn.o_proj").T
            h = self.norm(x, part("post_attention_layernorm"))
            gate = h @ part("mlp.gate_proj").T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ part("mlp.up_proj").T)) @ part("mlp.down_proj").T
        z = self.norm(x, weights["model.norm.weight"]) @ weights["model.embed_tokens.weight"].T
        z -= z.max(1, keepdims=True)
        return z - np.log(np.exp(z).sum(1, keepdims=True))


# tensor kind -> (step multiplier, grid, rounding); "*" is every other kind
KL_CASES = [
    ("all row", {"*": (1, "row", 0.5)}),
    ("all tensor", {"*": (1, "tensor", 0.5)}),
    ("embed row, rest tensor", {"*": (1, "tensor", 0.5), "embed_tokens": (1, "row", 0.5)}),
    ("the same, embed 0.65", {"*": (1, "tensor", 0.5), "embed_tokens": (0.65, "row", 0.5)}),
    ("the same, embed 0.65, v 0.7", {"*": (1, "tensor", 0.5), "embed_tokens": (0.65, "row", 0.5), "v_proj": (0.7, "tensor", 0.5)}),
    ("the same, rounding 0.42", {"*": (1, "tensor", 0.42), "embed_tokens": (0.65, "row", 0.42), "v_proj": (0.7, "tensor", 0.42)}),
    ("all row, embed 0.65, v 0.7", {"*": (1, "row", 0.5), "embed_tokens": (0.65, "row", 0.5), "v_proj": (0.7, "row", 0.5)}),
]


def kl(directory, text, *rates):
    model = Llama(directory, text)
    reference = model.log_probabilities(model.weights)
    probabilities = np.exp(reference)

    def report(name, bpw, weights):
        got = model.log_probabilities(weights)
        divergence = (probabilities * (reference - got)).sum(1).mean()
        perplexity = np.exp(-got[np.arange(len(got)), model.targets].mean())
        print(f"{name:32} {bpw:7.4f} bpw  KL {divergence:.5f}  perplexity {perplexity:.3f}", flush=True)

    def quantized(step, case):
        weights, bits, count = dict(model.weights), 0.0, 0
        for name, w in model.weights.items():
            if w.ndim == 2:
                multiplier, grid, rounding = case.get(name.split(".")[-2], case["*"])
                weights[name], b = ecsq(w, step * multiplier, grid, rounding)
                bits, count = bits + b, count + w.size
        return bits / count, weights

    report("bf16", 16, model.weights)
    report("affine4 g64", 4.5, {k: affine(w) if w.ndim == 2 else w for k, w in model.weights.items()})
    for bpw in map(float, rates or (3.75, 3.0, 2.25)):
        for name, case in KL_CASES:
            report(name, *quantized(2 ** solve(bpw, lambda step: quantized(step, case)), case))  # noqa: B023


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("rate", "kl"):
        sys.exit(__doc__)
    {"rate": rate, "kl": kl}[sys.argv[1]](*sys.argv[2:])
