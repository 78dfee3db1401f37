"""SmolLM3: Llama's shape in which every fourth layer does not rotate."""

import dataclasses

from quire_engine.models import llama
from quire_engine.models.base import layer_windows
from quire_engine.spec import Config, DecoderSpec


def spec(config: Config) -> DecoderSpec:
    """`no_rope_layers` has a 1 for each layer that does rotate."""
    return dataclasses.replace(
        llama.spec(config),
        without_rope=frozenset(i for i, turned in enumerate(config["no_rope_layers"]) if not turned),
        windows=layer_windows(config) if config["use_sliding_window"] else (),
    )
