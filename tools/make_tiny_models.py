#!/usr/bin/env python3
"""Writes the tiny random models of crates/runtime/tests/golden and their reference logits.

    /tmp/refenv/bin/python tools/make_tiny_models.py          # needs numpy and tokenizers

One directory per configuration that the Rust model implements. Weights are random but far from tiny, so that every part
(biases, norms, window, rotation) visibly moves the logits. Deterministic: the same numpy gives the same files.
"""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "crates/runtime/tests/golden"
TOKENS = [3, 17, 42, 5, 5, 60, 11, 29, 0, 33, 8, 51, 14, 2, 63, 47, 20, 9, 38, 26, 1, 55, 31, 12]

COMMON = {
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
    "eos_token_id": 2,
}

MODELS = {
    # Untied, no grouped queries, float32, two shards.
    "llama2": dict(
        model_type="llama", architectures=["LlamaForCausalLM"], num_key_value_heads=4, rope_theta=10000.0,
        tie_word_embeddings=False, torch_dtype="float32",
    ),
    # Head of 16: wavelengths 6.3, 20, 63, 199, ... with limits 16 and 64 fall into all three zones.
    "llama3": dict(
        model_type="llama", architectures=["LlamaForCausalLM"], head_dim=16, rope_theta=10000.0, tie_word_embeddings=True,
        rope_scaling=dict(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
        ),
        eos_token_id=[2, 7], torch_dtype="bfloat16",
    ),
    # The older spelling of the scaling, and biases on all four attention projections.
    "llama-linear": dict(
        model_type="llama", architectures=["LlamaForCausalLM"], rope_theta=10000.0, attention_bias=True,
        rope_scaling=dict(type="linear", factor=2.5), tie_word_embeddings=True, torch_dtype="float16",
    ),
    # The window is shorter than the golden sequence.
    "mistral": dict(
        model_type="mistral", architectures=["MistralForCausalLM"], num_key_value_heads=1, rope_theta=1000000.0,
        sliding_window=7, tie_word_embeddings=False, torch_dtype="bfloat16",
    ),
    # The second layer only has the window.
    "qwen2": dict(
        model_type="qwen2", architectures=["Qwen2ForCausalLM"], rope_theta=1000000.0, use_sliding_window=True, sliding_window=6,
        max_window_layers=1, tie_word_embeddings=True, torch_dtype="bfloat16",
    ),
    # heads * head_dim is not the hidden size; theta under the newer key.
    "qwen3": dict(
        model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=12, rms_norm_eps=1e-6, attention_bias=False,
        rope_parameters=dict(rope_theta=1000000.0, rope_type="default"), use_sliding_window=False, sliding_window=None,
        tie_word_embeddings=False, torch_dtype="bfloat16",
    ),
}


def tensors_of(config, rng):
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)

    def matrix(rows, cols):
        return rng.standard_normal((rows, cols)) * 1.2 / np.sqrt(cols)

    def norm(length):
        return 1.0 + 0.3 * rng.standard_normal(length)

    tensors = {"model.embed_tokens.weight": rng.standard_normal((vocab, hidden)) * 0.7}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        attention = dict(q_proj=(heads * head_dim, hidden), k_proj=(kv_heads * head_dim, hidden),
                         v_proj=(kv_heads * head_dim, hidden), o_proj=(hidden, heads * head_dim))
        for name, (rows, cols) in attention.items():
            tensors[f"{prefix}self_attn.{name}.weight"] = matrix(rows, cols)
            qwen2 = config["model_type"] == "qwen2" and name != "o_proj"
            if qwen2 or config.get("attention_bias"):
                tensors[f"{prefix}self_attn.{name}.bias"] = 0.5 * rng.standard_normal(rows)
        if config["model_type"] == "qwen3":
            tensors[f"{prefix}self_attn.q_norm.weight"] = norm(head_dim)
            tensors[f"{prefix}self_attn.k_norm.weight"] = norm(head_dim)
        tensors[f"{prefix}mlp.gate_proj.weight"] = matrix(ffn, hidden)
        tensors[f"{prefix}mlp.up_proj.weight"] = matrix(ffn, hidden)
        tensors[f"{prefix}mlp.down_proj.weight"] = matrix(hidden, ffn)
        tensors[f"{prefix}input_layernorm.weight"] = norm(hidden)
        tensors[f"{prefix}post_attention_layernorm.weight"] = norm(hidden)
    tensors["model.norm.weight"] = norm(hidden)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(vocab, hidden) * 2
    return tensors


def stored(array, dtype):
    """Little-endian bytes of the array in a safetensors dtype."""
    array = array.astype(np.float32)
    if dtype == "float32":
        return "F32", array.astype("<f4").tobytes()
    if dtype == "float16":
        return "F16", array.astype("<f2").tobytes()
    bits = array.view(np.uint32).astype(np.uint64)
    return "BF16", ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()  # nearest, ties to even


def write_safetensors(path, tensors, dtype):
    header, blob = {}, b""
    for name, array in tensors.items():
        kind, data = stored(array, dtype)
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [len(blob), len(blob) + len(data)]}
        blob += data
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + blob)


def write_model(directory, config, rng):
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tensors, dtype = tensors_of(config, rng), config["torch_dtype"]
    if dtype != "float32":
        write_safetensors(directory / "model.safetensors", tensors, dtype)
        return
    names = list(tensors)
    shards = {"model-00001-of-00002.safetensors": names[: len(names) // 2],
              "model-00002-of-00002.safetensors": names[len(names) // 2 :]}
    weight_map = {}
    for file, members in shards.items():
        write_safetensors(directory / file, {name: tensors[name] for name in members}, dtype)
        weight_map |= {name: file for name in members}
    size = sum(4 * array.size for array in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def write_byte_tokenizer(path):
    """One token per byte, so that a test can cut characters anywhere; begins every sequence with <s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tokenizer.to_str(pretty=False) + "\n")


def main():
    for seed, (name, special) in enumerate(MODELS.items()):
        write_model(OUT / name, COMMON | special, np.random.default_rng(1000 + seed))
        script = ROOT / "tools/reference_forward.py"
        tokens = ",".join(map(str, TOKENS))
        subprocess.run([sys.executable, script, "golden", OUT / name, "--tokens", tokens], check=True)
    write_byte_tokenizer(OUT / "byte-tokenizer/tokenizer.json")


if __name__ == "__main__":
    main()
