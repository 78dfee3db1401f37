"""Checkpoints in layouts that transformers has no class to write."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

Tensors = dict[str, torch.Tensor]
MXFP4_CONFIG = {
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
}
_INTERNLM2 = {
    "model.embed_tokens": "model.tok_embeddings",
    "lm_head": "output",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def rewritten(folder: Path, target: Path, change: Callable[[Tensors], Tensors], **facts: Any) -> Path:
    """A copy of a checkpoint with other tensors and other facts in its config."""
    shutil.copytree(folder, target)
    save_file(change(load_file(folder / "model.safetensors")), target / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | facts))
    return target


def as_internlm2(tensors: Tensors) -> Tensors:
    """Llama's weights (4 heads of 16, 2 for keys and values) under InternLM2's names, queries, keys and values of each
    group one after another."""
    heads, kv_heads, dim = 4, 2, 16
    out = {}
    for name, tensor in tensors.items():
        if "q_proj" in name:
            k, v = (tensors[name.replace("q_proj", other)] for other in ("k_proj", "v_proj"))
            groups = tensor.unflatten(0, (kv_heads, heads // kv_heads, dim))
            parts = [groups, k.unflatten(0, (kv_heads, 1, dim)), v.unflatten(0, (kv_heads, 1, dim))]
            out[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(parts, 1).flatten(0, 2)
        elif "k_proj" not in name and "v_proj" not in name:
            for old, new in _INTERNLM2.items():
                name = name.replace(old, new)
            out[name] = tensor.contiguous()
    return out


def in_mxfp4(tensors: Tensors) -> Tensors:
    """gpt-oss with other experts: random numbers in MXFP4."""
    generator = torch.Generator().manual_seed(0)
    out = {}
    for name, tensor in tensors.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = tensor.shape
            shape = (experts, outputs, inputs // 32)
            out[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
            out[f"{name}_scales"] = torch.randint(121, 126, shape, dtype=torch.uint8, generator=generator)
        else:
            out[name] = tensor
    return out


def from_mxfp4(tensors: Tensors) -> Tensors:
    """What those numbers mean, by transformers' own decoding."""
    out = {name: tensor for name, tensor in tensors.items() if not name.endswith(("_blocks", "_scales"))}
    for name in (name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")):
        out[name] = convert_moe_packed_tensors(
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32
        )
    return out
