"""BLOOM: ALiBi, a norm of the embeddings, each head's query, key and value one after another."""

from quire_kernels.activation import Activation
from quire_kernels.norm import Norm

from quire_engine.errors import ModelError
from quire_engine.spec import Config, DecoderSpec, Names


def spec(config: Config) -> DecoderSpec:
    """The context has no bound of its own; `seq_length` is what it was trained with."""
    if config["apply_residual_connection_post_layernorm"]:
        raise ModelError("apply_residual_connection_post_layernorm is true; BLOOM is served without it")
    hidden, heads = config["hidden_size"], config["n_head"]
    return DecoderSpec(
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_layers=config["n_layer"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_position=config.get("seq_length") or 2048,
        tie_embeddings=bool(config["tie_word_embeddings"]),
        names=Names(
            embedding="transformer.word_embeddings",
            embedding_norm="transformer.word_embeddings_layernorm",
            layers="transformer.h",
            norm="transformer.ln_f",
            attention="self_attention",
            q="query_key_value",
            output="dense",
            gate="",
            up="dense_h_to_4h",
            down="dense_4h_to_h",
        ),
        norm=Norm(config["layer_norm_epsilon"], "layer"),
        norm_bias=True,
        qkv="grouped",
        alibi=1.0,
        activation=Activation.GELU_TANH,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    )
