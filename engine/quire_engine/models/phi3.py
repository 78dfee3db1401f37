"""Phi-3, 3.5 and 4 (mini too): q, k and v in one tensor, gate and up in another; longrope."""

from quire_engine.models.base import base_spec, head_dim_of, layer_windows, rotary_of
from quire_engine.spec import Config, DecoderSpec, Names


def spec(config: Config) -> DecoderSpec:
    """A window on all layers, where the config has one."""
    return base_spec(
        config,
        names=Names(q="qkv_proj", gate="gate_up_proj", up="gate_up_proj"),
        qkv="stacked",
        rope=rotary_of(config, head_dim_of(config), partial=True),
        windows=layer_windows(config),
    )
