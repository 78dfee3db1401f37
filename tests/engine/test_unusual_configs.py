"""Configs that are legal and that no published model has: computed as transformers does, or refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_checkpoint
from greedy import engine_for, prompt_logits, prompts
from quire_engine.errors import InvalidParameter
from transformers import AutoModelForCausalLM

_HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
_FULL = ["full_attention"] * 3


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, _HALF) for family in ("qwen3", "mistral", "ernie", "gemma", "phi3", "glm4_moe", "bamba")),
        ("ernie_moe", {"use_bias": True}),  # which the head has too, though its weight is the embeddings'
        ("exaone4", {"layer_types": _FULL}),  # none of which turns, where the config has a window
        ("deepseek_v3", {"n_shared_experts": 0}),
        ("qwen3", {"head_dim": 288}),  # beyond the C kernels' arrays, as are those that follow
        ("qwen3_5", {"linear_key_head_dim": 260}),
        ("mamba2", {"state_size": 300}),
        ("mamba2", {"conv_kernel": 9}),
        ("gemma3", {"attn_logit_softcapping": 0.5}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_logits(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    folder = make_checkpoint(tmp_path / family, family, **changes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch = prompts()[2:]
    for prompt, ours in zip(batch, prompt_logits(engine_for(folder), batch), strict=True):
        with torch.no_grad():
            theirs = model(torch.tensor([prompt])).logits[0]
        assert (ours - theirs).abs().max() < 1e-4


def test_what_the_c_kernels_cannot_hold_is_refused_where_they_are_asked_for(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "wide", "qwen3", head_dim=288)
    for options in ({"attention_backend": "native"}, {"deterministic": True}):
        with pytest.raises(InvalidParameter, match="at most 256 dimensions, and this model has 288"):
            engine_for(folder, **options)
