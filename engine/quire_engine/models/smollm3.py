"""SmolLM3: Llama's shape in which every fourth layer does not rotate."""

import dataclasses

from quire_engine.models import llama
from quire_engine.models.base import layer_windows, need
from quire_engine.spec import Config, DecoderSpec


def spec(config: Config) -> DecoderSpec:
    """`no_rope_layers` has a 1 for each layer that does rotate."""
    layers, every = need(config, "num_hidden_layers"), config.get("no_rope_layer_interval", 4)
    rotates = config.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]
    return dataclasses.replace(
        llama.spec(config),
        without_rope=frozenset(i for i, turned in enumerate(rotates) if not turned),
        windows=layer_windows(config, layers) if config.get("use_sliding_window") else (),
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
    )
