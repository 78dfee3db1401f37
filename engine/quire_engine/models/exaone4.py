"""EXAONE 4: norms after attention and feed-forward; in models with windows only the layers that have one rotate."""

from quire_kernels.norm import Norm

from quire_engine.models.base import base_spec, layer_windows
from quire_engine.spec import Config, DecoderSpec, Names, QKNorm


def spec(config: Config) -> DecoderSpec:
    """`sliding_window` is null in the small model: all layers are full, and all rotate."""
    kinds = config["layer_types"] if config["sliding_window"] is not None else ()
    return base_spec(
        config,
        names=Names(
            attention_norm="",
            after_attention="post_attention_layernorm",
            mlp_norm="",
            after_mlp="post_feedforward_layernorm",
        ),
        qk_norm=QKNorm(norm=Norm(config["rms_norm_eps"])),
        windows=layer_windows(config),
        without_rope=frozenset(i for i, kind in enumerate(kinds) if kind == "full_attention"),
    )
