"""Checkpoints written as llama.cpp's converter writes them answer like the checkpoints they come from.

Where transformers reads such a file too, it comes to the same tokens: then the writer here is right.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import make_checkpoint
from greedy import NEW_TOKENS, engine_for, prompts, run, truth
from quire_engine.errors import ModelError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

BATCH = prompts()[:4]
# family → llama.cpp's architecture, and what makes the tiny model one that its files can describe
WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": False, "mlp_bias": False, "rope_parameters": None}),
    "mixtral": ("llama", {"sliding_window": None}),
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "qwen2_moe": ("qwen2moe", {"decoder_sparse_step": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3moe", {"mlp_only_layers": []}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 32}),
    "gemma3": (
        "gemma3",
        {
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 7,
            "layer_types": None,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "phi3": ("phi3", {}),
    "granite": ("granite", {}),
    "olmo2": ("olmo2", {}),
    "cohere": ("command-r", {"use_qk_norm": False}),
    "nemotron": ("nemotron", {}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {}),
}
# transformers 5.24 reads these files to the same tokens. It reads others with sizes or factors of the published models,
# which tiny ones do not have; there the truth is the checkpoint, and the names are those of llama.cpp's own package.
READ_BY_TRANSFORMERS = {"llama", "qwen2", "nemotron", "stablelm"}


def write(path: Path, source: Path, architecture: str) -> None:
    config = json.loads((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    part = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(int(head_dim * part))
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_array("tokenizer.ggml.tokens", [f"w{i}" for i in range(config["vocab_size"])])
    for key, add in (
        ("rms_norm_eps", writer.add_layer_norm_rms_eps),
        ("layer_norm_eps", writer.add_layer_norm_eps),
        ("norm_epsilon", writer.add_layer_norm_eps),
        ("norm_eps", writer.add_layer_norm_eps),
        ("sliding_window", writer.add_sliding_window),
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ("num_experts", writer.add_expert_count),
        ("num_local_experts", writer.add_expert_count),
        ("num_experts_per_tok", writer.add_expert_used_count),
        ("moe_intermediate_size", writer.add_expert_feed_forward_length),
        ("shared_expert_intermediate_size", writer.add_expert_shared_feed_forward_length),
        ("attention_multiplier", writer.add_attention_scale),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("logits_scaling", writer.add_logit_scale),
        ("logit_scale", writer.add_logit_scale),
        ("use_parallel_residual", writer.add_parallel_residual),
    ):
        if config.get(key) is not None and f"{architecture}.{key}" not in writer.kv_data[0]:
            add(config[key])
    kind = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, layers)
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in weights.items():
        stem, _, suffix = name.rpartition(".")
        array = tensor.numpy()
        if architecture in ("llama", "granite") and (".q_proj" in name or ".k_proj" in name):
            count = heads if ".q_proj" in name else kv_heads
            array = array.reshape(count, 2, array.shape[0] // count // 2, -1).swapaxes(1, 2).reshape(array.shape)
        if architecture.startswith(("gemma", "nemotron")) and name.endswith("norm.weight"):
            array = array + 1
        pieces = stem.split(".")
        if "experts" in pieces and pieces[pieces.index("experts") + 1].isdigit():
            number = pieces.pop(pieces.index("experts") + 1)
            experts.setdefault(f"{names.get_name('.'.join(pieces))}.{suffix}", {})[int(number)] = array
            continue
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", np.ascontiguousarray(array))
    for name, parts in experts.items():
        writer.add_tensor(name, np.stack([parts[number] for number in sorted(parts)]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", WRITTEN)
def test_files_answer_like_their_checkpoints(tmp_path: Path, family: str) -> None:
    architecture, changes = WRITTEN[family]
    source = make_checkpoint(tmp_path / "source", family, **changes)
    path = tmp_path / "model.gguf"
    write(path, source, architecture)
    expected = truth(source, BATCH)
    assert run(engine_for(path), BATCH) == expected
    if family in READ_BY_TRANSFORMERS:
        model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
        out = model.generate(
            torch.tensor([BATCH[-1]]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert out[0, len(BATCH[-1]) :].tolist() == expected[-1]


def test_two_files_that_are_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    for name, tensor, named in (("mamba", "x", "'mamba' is not served"), ("phi3", "rope_factors_long", "RoPE factors")):
        writer = gguf.GGUFWriter(str(tmp_path / name), name)
        writer.add_tensor(f"{tensor}.weight", np.zeros((4, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        target = tmp_path / f"{name}.gguf"
        (tmp_path / name).rename(target)
        with pytest.raises(ModelError, match=named):
            engine_for(target)
