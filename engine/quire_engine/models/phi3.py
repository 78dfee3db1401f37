"""Phi-3, 3.5 and 4 (mini too): q, k and v in one tensor, gate and up in another; longrope."""

from quire_engine.models.base import base_spec, layer_windows
from quire_engine.spec import Config, DecoderSpec, Names


def spec(config: Config) -> DecoderSpec:
    """A window on all layers, where the config has one."""
    return base_spec(
        config,
        names=Names(q="qkv_proj", gate="gate_up_proj", up="gate_up_proj"),
        qkv="stacked",
        windows=layer_windows(config),
    )
