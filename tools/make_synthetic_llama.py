#!/usr/bin/env python3
"""Writes a synthetic 1.1 B Llama: for timing, not for reading what it says.

    tools/make_synthetic_llama.py OUT [--gguf FILE] [--layers 22]      # needs numpy; --gguf needs the package `gguf`

Shape of TinyLlama: 22 layers, hidden 2048, FFN 5632, 32 heads, 4 KV heads, vocabulary 32,000, untied. Weights are Gaussian with a
log-normal scale per row and one outlier of 8 sigma in 20,000, rounded to bfloat16. Deterministic: every tensor has its own
generator, seeded by its position. One tensor is in memory at a time; OUT takes 2.2 GB, the GGUF file as much again.

OUT is a Hugging Face directory with a byte-level tokenizer (256 bytes, <s>, </s>, then tokens that no text produces). The GGUF file
(BF16) holds the same bits, the rows of q_proj and k_proj reordered as llama.cpp rotates them.
"""
import argparse
import json
import struct
from pathlib import Path

import numpy as np

HIDDEN, FFN, HEADS, KV_HEADS, VOCAB, CONTEXT = 2048, 5632, 32, 4, 32_000, 2048
HEAD_DIM = HIDDEN // HEADS
EPS, THETA = 1e-5, 10_000.0
OUTLIER_EVERY, OUTLIER_SIGMAS, ROW_SPREAD = 20_000, 8.0, 0.25


def tensors_of(layers):
    """(name in the checkpoint, name in GGUF, shape), in the order in which both files hold them."""
    yield "model.embed_tokens.weight", "token_embd.weight", (VOCAB, HIDDEN)
    for layer in range(layers):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        yield ours + "input_layernorm.weight", theirs + "attn_norm.weight", (HIDDEN,)
        yield ours + "self_attn.q_proj.weight", theirs + "attn_q.weight", (HIDDEN, HIDDEN)
        yield ours + "self_attn.k_proj.weight", theirs + "attn_k.weight", (KV_HEADS * HEAD_DIM, HIDDEN)
        yield ours + "self_attn.v_proj.weight", theirs + "attn_v.weight", (KV_HEADS * HEAD_DIM, HIDDEN)
        yield ours + "self_attn.o_proj.weight", theirs + "attn_output.weight", (HIDDEN, HIDDEN)
        yield ours + "post_attention_layernorm.weight", theirs + "ffn_norm.weight", (HIDDEN,)
        yield ours + "mlp.gate_proj.weight", theirs + "ffn_gate.weight", (FFN, HIDDEN)
        yield ours + "mlp.up_proj.weight", theirs + "ffn_up.weight", (FFN, HIDDEN)
        yield ours + "mlp.down_proj.weight", theirs + "ffn_down.weight", (HIDDEN, FFN)
    yield "model.norm.weight", "output_norm.weight", (HIDDEN,)
    yield "lm_head.weight", "output.weight", (VOCAB, HIDDEN)


def weights(index, shape):
    """bfloat16 bits of tensor number `index`."""
    rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence([0x7E2, index])))
    if len(shape) == 1:
        values = 1.0 + 0.1 * rng.standard_normal(shape, dtype=np.float32)
    else:
        rows, cols = shape
        values = rng.standard_normal(shape, dtype=np.float32)
        flat = values.reshape(-1)
        flat[rng.integers(0, flat.size, flat.size // OUTLIER_EVERY)] *= np.float32(OUTLIER_SIGMAS)
        scale = np.exp(ROW_SPREAD * rng.standard_normal((rows, 1), dtype=np.float32)) / np.float32(np.sqrt(cols))
        values *= scale
    bits = values.view(np.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)  # nearest, ties to even
    return (bits >> 16).astype("<u2")


def as_rotated_by_llama_cpp(bits, heads):
    """Row i and row i + head_dim/2 of each head side by side: GGUF's Llama rotates neighbours."""
    rows, cols = bits.shape
    return bits.reshape(heads, 2, rows // heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)


def config(layers):
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "hidden_act": "silu",
        "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "max_position_embeddings": CONTEXT, "rms_norm_eps": EPS, "rope_theta": THETA,
        "vocab_size": VOCAB, "tie_word_embeddings": False, "bos_token_id": 256, "eos_token_id": 257,
    }


def byte_letters():
    """GPT-2's printable stand-ins for the 256 bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [b for b in range(256) if b not in kept]
    return sorted([chr(b) for b in kept] + [chr(256 + i) for i in range(len(moved))])


def tokenizer():
    letters = byte_letters()
    vocab = {letter: i for i, letter in enumerate(letters)}
    vocab |= {f"<unused{i}>": i for i in range(258, VOCAB)}
    special = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": 256, "content": "<s>", **special}, {"id": 257, "content": "</s>", **special}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": [],
        },
    }


def begin_safetensors(file, layers):
    header, offset = {}, 0
    for name, _, shape in tensors_of(layers):
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)


def begin_gguf(path, layers):
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("synthetic")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(FFN)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(THETA)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_vocab_size(VOCAB)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    # A SentencePiece vocabulary; llama-bench feeds token numbers and never reads it.
    byte = [f"<0x{b:02X}>" for b in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte, *(f"<unused{i}>" for i in range(259, VOCAB))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * (VOCAB - 259)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(VOCAB)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for _, name, shape in tensors_of(layers):
        # As llama.cpp's converter does: norms in F32.
        kind = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else gguf.GGMLQuantizationType.BF16
        size = int(np.prod(shape)) * (4 if len(shape) == 1 else 2)
        writer.add_tensor_info(name, shape, np.dtype(np.float32 if len(shape) == 1 else np.float16), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--layers", type=int, default=22)
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "config.json").write_text(json.dumps(config(options.layers), indent=1) + "\n")
    (options.out / "tokenizer.json").write_text(json.dumps(tokenizer(), ensure_ascii=False) + "\n")
    writer = begin_gguf(options.gguf, options.layers) if options.gguf else None
    count = 0
    with open(options.out / "model.safetensors", "wb") as file:
        begin_safetensors(file, options.layers)
        for index, (name, _, shape) in enumerate(tensors_of(options.layers)):
            bits = weights(index, shape)
            count += bits.size
            file.write(bits.data)
            if writer is None:
                continue
            if name.endswith("q_proj.weight"):
                bits = as_rotated_by_llama_cpp(bits, HEADS)
            elif name.endswith("k_proj.weight"):
                bits = as_rotated_by_llama_cpp(bits, KV_HEADS)
            elif len(shape) == 1:
                bits = (bits.astype(np.uint32) << 16).view(np.float32)
            writer.write_tensor_data(bits)
    if writer is not None:
        writer.close()
    print(f"{count:,} weights in {options.out}" + (f" and {options.gguf}" if writer else ""))


if __name__ == "__main__":
    main()
