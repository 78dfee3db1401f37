"""GPT-J: attention and feed-forward side by side after one norm; the first dimensions of a head turn, by neighbours."""

from quire_kernels.norm import Norm

from quire_engine.models.base import activation_of, need, rotary_of
from quire_engine.spec import Config, DecoderSpec, Names


def spec(config: Config) -> DecoderSpec:
    """Biases in the feed-forward layers and the head alone."""
    hidden, heads = need(config, "n_embd"), need(config, "n_head")
    return DecoderSpec(
        vocab_size=need(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.get("n_inner") or 4 * hidden,
        num_layers=need(config, "n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_position=need(config, "n_positions"),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
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
        norm=Norm(config.get("layer_norm_epsilon", 1e-5), "layer"),
        norm_bias=True,
        parallel=True,
        rope=rotary_of(config, hidden // heads, interleaved=True, dim=config.get("rotary_dim") or hidden // heads),
        activation=activation_of(config, "gelu_new"),
        mlp_bias=True,
        head_bias=True,
        ignored=(".attn.bias", ".attn.masked_bias"),
    )
