"""InternLM 2 and 2.5: Llama's shape under names of its own, queries, keys and values in one tensor, group by group."""

import dataclasses

from quire_engine.models import llama
from quire_engine.spec import Config, DecoderSpec, Names


def spec(config: Config) -> DecoderSpec:
    """Their rope type "dynamic" changes nothing within the context that the model was trained with, which is served."""
    scaling = config.get("rope_scaling") or {}
    if scaling.get("type", scaling.get("rope_type")) == "dynamic":
        config = {**config, "rope_scaling": None}
    bias = bool(config.get("bias", False))
    return dataclasses.replace(
        llama.spec({**config, "attention_bias": bias}),
        names=Names(
            embedding="model.tok_embeddings",
            head="output",
            attention="attention",
            q="wqkv",
            output="wo",
            mlp="feed_forward",
            gate="w1",
            up="w3",
            down="w2",
            attention_norm="attention_norm",
            mlp_norm="ffn_norm",
        ),
        qkv="grouped",
    )
