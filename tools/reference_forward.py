#!/usr/bin/env python3
"""Independent reference: a Llama-family forward pass in NumPy, float32 throughout.

Shares nothing with the Rust code: it has its own safetensors reader and its own reading of config.json, and follows the
modeling files of transformers (llama, mistral, qwen2, qwen3). Slow and plain on purpose.

    python3 -m venv /tmp/refenv && /tmp/refenv/bin/pip install numpy tokenizers
    /tmp/refenv/bin/python tools/reference_forward.py perplexity DIR --text FILE --tokens 6000 --window 512
    /tmp/refenv/bin/python tools/reference_forward.py golden DIR --tokens 1,2,3        # writes DIR/golden.json, DIR/golden.f32
"""

import argparse
import json
import math
import struct
from pathlib import Path

import numpy as np

DTYPES = {"F32": ("<f4", 4), "F16": ("<f2", 2), "BF16": ("<u2", 2)}


class Checkpoint:
    """All tensors of a directory, as float32, read when asked for."""

    def __init__(self, path):
        self.places = {}
        files = sorted(Path(path).glob("*.safetensors"))
        if not files:
            raise SystemExit(f"{path}: no .safetensors file")
        for file in files:
            with open(file, "rb") as f:
                (length,) = struct.unpack("<Q", f.read(8))
                header = json.loads(f.read(length))
            for name, entry in header.items():
                if name != "__metadata__":
                    self.places[name] = (file, 8 + length + entry["data_offsets"][0], entry)

    def __contains__(self, name):
        return name in self.places

    def __getitem__(self, name):
        file, offset, entry = self.places[name]
        dtype, size = DTYPES[entry["dtype"]]
        begin, end = entry["data_offsets"]
        raw = np.fromfile(file, dtype=dtype, count=(end - begin) // size, offset=offset)
        if entry["dtype"] == "BF16":
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32).reshape(entry["shape"])


def rope_inverse_frequencies(config, head_dim):
    """(head_dim / 2,) radians per position; modeling_rope_utils.py of transformers."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = scaling.get("rope_theta") or config.get("rope_theta") or 10000.0
    inverse = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "linear":
        inverse = inverse / scaling["factor"]
    elif kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        original = scaling["original_max_position_embeddings"]
        wavelength = 2 * math.pi / inverse
        smooth = (original / wavelength - low) / (high - low)
        blended = (1 - smooth) * inverse / scaling["factor"] + smooth * inverse
        inverse = np.where(
            wavelength > original / low, inverse / scaling["factor"], np.where(wavelength < original / high, inverse, blended)
        )
    elif kind != "default":
        raise SystemExit(f"rope type {kind}")
    return inverse


def layer_windows(config):
    """For each layer, how many positions (its own included) a token attends to, or None."""
    layers, kind = config["num_hidden_layers"], config["model_type"]
    if kind == "mistral":
        return [config.get("sliding_window")] * layers
    if kind in ("qwen2", "qwen3") and config.get("use_sliding_window"):
        if "layer_types" in config:
            return [config["sliding_window"] if t == "sliding_attention" else None for t in config["layer_types"]]
        return [config["sliding_window"] if i >= config["max_window_layers"] else None for i in range(layers)]
    return [None] * layers


class Model:
    def __init__(self, path):
        self.config = config = json.loads((Path(path) / "config.json").read_text())
        if config["model_type"] not in ("llama", "mistral", "qwen2", "qwen3"):
            raise SystemExit(f"model type {config['model_type']}")
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.eps = np.float32(config["rms_norm_eps"])
        self.inverse = rope_inverse_frequencies(config, self.head_dim)
        self.windows = layer_windows(config)
        checkpoint = Checkpoint(path)
        self.w = {name: checkpoint[name] for name in checkpoint.places}

    def norm(self, x, name):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.eps) * self.w[name]

    def linear(self, x, name):
        y = x @ self.w[name + ".weight"].T
        if name + ".bias" in self.w:
            y = y + self.w[name + ".bias"]
        return y

    def split(self, x, heads):
        return x.reshape(x.shape[0], heads, self.head_dim).transpose(1, 0, 2)  # (heads, tokens, head_dim)

    def rotate(self, x):
        tokens, half = x.shape[1], self.head_dim // 2
        angles = np.arange(tokens, dtype=np.float64)[:, None] * self.inverse[None, :]
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def attention(self, x, prefix, window):
        q = self.split(self.linear(x, prefix + "q_proj"), self.heads)
        k = self.split(self.linear(x, prefix + "k_proj"), self.kv_heads)
        v = self.split(self.linear(x, prefix + "v_proj"), self.kv_heads)
        if prefix + "q_norm.weight" in self.w:
            q, k = self.norm(q, prefix + "q_norm.weight"), self.norm(k, prefix + "k_norm.weight")
        q, k = self.rotate(q), self.rotate(k)
        k, v = (np.repeat(t, self.heads // self.kv_heads, axis=0) for t in (k, v))
        scores = q @ k.transpose(0, 2, 1) / np.float32(math.sqrt(self.head_dim))
        i, j = np.arange(x.shape[0])[:, None], np.arange(x.shape[0])[None, :]
        seen = (j <= i) if window is None else (j <= i) & (j > i - window)
        scores = np.where(seen[None], scores, np.float32(-np.inf))
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed = (scores @ v).transpose(1, 0, 2).reshape(x.shape[0], -1)
        return self.linear(mixed, prefix + "o_proj")

    def forward(self, tokens):
        """Logits (tokens, vocab) of a sequence that starts at position 0."""
        x = self.w["model.embed_tokens.weight"][tokens]
        for layer, window in enumerate(self.windows):
            prefix = f"model.layers.{layer}."
            x = x + self.attention(self.norm(x, prefix + "input_layernorm.weight"), prefix + "self_attn.", window)
            y = self.norm(x, prefix + "post_attention_layernorm.weight")
            gate, up = self.linear(y, prefix + "mlp.gate_proj"), self.linear(y, prefix + "mlp.up_proj")
            x = x + self.linear(gate / (1 + np.exp(-gate)) * up, prefix + "mlp.down_proj")
        x = self.norm(x, "model.norm.weight")
        tied = self.config.get("tie_word_embeddings", False)
        return x @ self.w["model.embed_tokens.weight" if tied else "lm_head.weight"].T


def perplexity(args):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(args.dir) / "tokenizer.json"))
    text = Path(args.text).read_bytes().decode("utf-8")  # read_text would turn CRLF into LF
    tokens = np.array(tokenizer.encode(text).ids[: args.tokens])
    model = Model(args.dir)
    total, count = 0.0, 0
    for start in range(0, len(tokens), args.window):
        window = tokens[start : start + args.window]
        if len(window) < 2:
            break
        logits = model.forward(window)[:-1].astype(np.float64)
        top = logits.max(axis=-1, keepdims=True)
        log_sum = np.log(np.exp(logits - top).sum(axis=-1)) + top[:, 0]
        total += float((log_sum - logits[np.arange(len(window) - 1), window[1:]]).sum())
        count += len(window) - 1
    nll = total / count
    print(json.dumps({"tokens": len(tokens), "predicted": count, "nll": nll, "perplexity": math.exp(nll)}))


def golden(args):
    tokens = [int(t) for t in args.tokens.split(",")]
    logits = Model(args.dir).forward(np.array(tokens)).astype("<f4")
    (Path(args.dir) / "golden.json").write_text(json.dumps({"tokens": tokens, "shape": list(logits.shape)}) + "\n")
    logits.tofile(Path(args.dir) / "golden.f32")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("perplexity", help="of the first tokens of a text, in non-overlapping windows")
    command.add_argument("dir")
    command.add_argument("--text", required=True)
    command.add_argument("--tokens", type=int, default=6000)
    command.add_argument("--window", type=int, default=512)
    command.set_defaults(run=perplexity)
    command = commands.add_parser("golden", help="write the logits of a token sequence beside the model")
    command.add_argument("dir")
    command.add_argument("--tokens", required=True, help="comma-separated token ids")
    command.set_defaults(run=golden)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
