"""Arcee (AFM): Llama's attention, squared ReLU without a gate."""

import dataclasses

from quire_engine.models import llama
from quire_engine.spec import Config, DecoderSpec, Names


def spec(config: Config) -> DecoderSpec:
    """YaRN in the published models."""
    return dataclasses.replace(llama.spec(config), names=Names(gate=""))
