"""The families that are served, by the `architectures` entry of their config."""

from collections.abc import Callable
from typing import Any

from quire_engine.errors import ModelError
from quire_engine.models import llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from quire_engine.models.spec import DecoderSpec

FAMILIES: dict[str, Callable[[dict[str, Any]], DecoderSpec]] = {
    "LlamaForCausalLM": llama.spec,
    "MistralForCausalLM": mistral.spec,
    "MixtralForCausalLM": mixtral.spec,
    "Qwen2ForCausalLM": qwen2.spec,
    "Qwen3ForCausalLM": qwen3.spec,
    "Qwen3MoeForCausalLM": qwen3_moe.spec,
}


def spec_of(config: dict[str, Any]) -> DecoderSpec:
    """Raises ModelError for a family that is not served, naming those that are."""
    architectures = config.get("architectures") or []
    for name in architectures:
        if name in FAMILIES:
            return FAMILIES[name](config)
    raise ModelError(f"architectures is {architectures or 'missing'}; served are {', '.join(FAMILIES)}")
