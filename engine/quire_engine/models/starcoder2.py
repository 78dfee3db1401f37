"""StarCoder2: LayerNorm, biases, a plain feed-forward layer, a window where the config has one."""

from quire_kernels.norm import Norm

from quire_engine.models.base import activation_of, base_spec, layer_windows
from quire_engine.spec import Config, DecoderSpec, Names


def spec(config: Config) -> DecoderSpec:
    """`use_bias` covers every projection."""
    bias = bool(config.get("use_bias", True))
    return base_spec(
        config,
        names=Names(gate="", up="c_fc", down="c_proj"),
        norm=Norm(config.get("norm_epsilon", 1e-5), "layer"),
        norm_bias=True,
        activation=activation_of(config, "gelu_pytorch_tanh"),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        windows=layer_windows(config, config["num_hidden_layers"], "sliding_attention"),
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
    )
