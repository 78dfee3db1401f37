"""GPT-J: attention and feed-forward side by side after one norm; the first dimensions of a head turn, by neighbours."""

from quire_kernels.norm import Norm

from quire_engine.models.base import activation_of
from quire_engine.spec import Config, DecoderSpec, Names, Rotary


def spec(config: Config) -> DecoderSpec:
    """Biases in the feed-forward layers and the head alone."""
    hidden, heads = config["n_embd"], config["n_head"]
    return DecoderSpec(
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=config["n_inner"] or 4 * hidden,
        num_layers=config["n_layer"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_position=config["n_positions"],
        tie_embeddings=bool(config["tie_word_embeddings"]),
        names=Names(
            embedding="transformer.wte",
            layers="transformer.h",
            norm="transformer.ln_f",
            attention="attn",
            output="out_proj",
            gate="",
            up="fc_in",
            down="fc_out",
            attention_norm="ln_1",
            mlp_norm="",
        ),
        norm=Norm(config["layer_norm_epsilon"], "layer"),
        norm_bias=True,
        parallel=True,
        rope=Rotary(theta=10000.0, dim=config["rotary_dim"] or hidden // heads, interleaved=True),
        activation=activation_of(config, "activation_function"),
        mlp_bias=True,
        head_bias=True,
        ignored=(".attn.bias", ".attn.masked_bias"),
    )
