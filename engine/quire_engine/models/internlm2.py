"""InternLM 2 and 2.5: Llama's shape under names of its own, queries, keys and values in one tensor, group by group."""

import dataclasses

from quire_engine.models import llama
from quire_engine.spec import Config, DecoderSpec, Names

_DEFAULTS = {  # of its own config class, which is not in transformers
    "vocab_size": 103168,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bias": True,
    "rope_theta": 10000,
    "rope_scaling": None,
}


def spec(config: Config) -> DecoderSpec:
    """`bias` is for every projection of the attention."""
    config = {**_DEFAULTS, **config}
    rope = {"rope_theta": config["rope_theta"], **(config["rope_scaling"] or {})}
    config |= {
        "num_key_value_heads": config["num_key_value_heads"] or config["num_attention_heads"],
        "attention_bias": config["bias"],
        "rope_parameters": config.get("rope_parameters") or rope,
    }
    return dataclasses.replace(
        llama.spec(config),
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
