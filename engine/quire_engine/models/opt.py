"""OPT: learned positions that begin at 2, LayerNorm before each part, ReLU."""

from quire_kernels.norm import Norm

from quire_engine.errors import ModelError
from quire_engine.models.base import activation_of, base_spec
from quire_engine.spec import Config, DecoderSpec, Names


def spec(config: Config) -> DecoderSpec:
    """Raises ModelError for the 350M model, whose norms come after and whose embeddings are projected."""
    if not config["do_layer_norm_before"] or config["word_embed_proj_dim"] != config["hidden_size"]:
        raise ModelError(
            "do_layer_norm_before is false or word_embed_proj_dim is not hidden_size (OPT-350M); OPT is served without"
        )
    bias = bool(config["enable_bias"])
    return base_spec(
        config,
        names=Names(
            embedding="model.decoder.embed_tokens",
            positions="model.decoder.embed_positions",
            layers="model.decoder.layers",
            norm="model.decoder.final_layer_norm",
            output="out_proj",
            mlp="",
            gate="",
            up="fc1",
            down="fc2",
            attention_norm="self_attn_layer_norm",
            mlp_norm="final_layer_norm",
        ),
        norm=Norm(1e-5, "layer"),
        norm_bias=True,
        intermediate_size=config["ffn_dim"],
        num_kv_heads=config["num_attention_heads"],
        rope=None,
        activation=activation_of(config, "activation_function"),
        position_offset=2,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
    )
