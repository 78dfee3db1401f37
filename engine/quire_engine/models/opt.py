"""OPT: learned positions that begin at 2, LayerNorm before each part, ReLU."""

from quire_kernels.norm import Norm

from quire_engine.errors import ModelError
from quire_engine.models.base import activation_of, base_spec, need
from quire_engine.spec import Config, DecoderSpec, Names


def spec(config: Config) -> DecoderSpec:
    """Raises ModelError for the 350M model, whose norms come after and whose embeddings are projected."""
    if not config.get("do_layer_norm_before", True) or config.get("word_embed_proj_dim") not in (
        None,
        need(config, "hidden_size"),
    ):
        raise ModelError(
            "do_layer_norm_before is false or word_embed_proj_dim is not hidden_size (OPT-350M); OPT is served without"
        )
    bias = bool(config.get("enable_bias", True))
    return base_spec(
        {**config, "intermediate_size": need(config, "ffn_dim")},
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
        num_kv_heads=need(config, "num_attention_heads"),
        rope=None,
        activation=activation_of(config, "relu"),
        position_offset=2,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
    )
