"""Writes an 8 B-shaped Llama with one layer (bf16, random weights with rows of slightly different scale) for `tersor quantize` and
`tools/repeat_layers.py`. Needs PyTorch and a GPU; no tokenizer, for `tersor bench` needs none.

usage: make_model.py OUT"""

import json
import pathlib
import sys

import torch
from safetensors.torch import save_file

HIDDEN, FFN, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 4096, 14336, 128256, 32, 8, 128


def matrix(rows, cols):
    spread = torch.exp(0.05 * torch.randn(rows, 1, device="cuda"))
    return (torch.randn(rows, cols, device="cuda") * spread / cols**0.5).to(torch.bfloat16).cpu()


def main():
    out = pathlib.Path(sys.argv[1])
    out.mkdir(parents=True)
    torch.manual_seed(1)
    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    layer = "model.layers.0."
    tensors = {
        "model.embed_tokens.weight": matrix(VOCAB, HIDDEN),
        layer + "input_layernorm.weight": ones.clone(),
        layer + "self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
        layer + "self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
        layer + "self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
        layer + "self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
        layer + "post_attention_layernorm.weight": ones.clone(),
        layer + "mlp.gate_proj.weight": matrix(FFN, HIDDEN),
        layer + "mlp.up_proj.weight": matrix(FFN, HIDDEN),
        layer + "mlp.down_proj.weight": matrix(HIDDEN, FFN),
        "model.norm.weight": ones.clone(),
        "lm_head.weight": matrix(VOCAB, HIDDEN),
    }
    save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
