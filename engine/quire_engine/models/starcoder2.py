"""StarCoder2: LayerNorm, biases, a plain feed-forward layer, a window where the config has one."""

from quire_kernels.norm import Norm

from quire_engine.models.base import base_spec, layer_windows
from quire_engine.spec import Config, DecoderSpec, Names


def spec(config: Config) -> DecoderSpec:
    """`use_bias` covers every projection."""
    bias = bool(config["use_bias"])
    return base_spec(
        config,
        names=Names(gate="", up="c_fc", down="c_proj"),
        norm=Norm(config["norm_epsilon"], "layer"),
        norm_bias=True,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        windows=layer_windows(config),
    )
