"""MPT: ALiBi, LayerNorm without bias, queries, keys and values in one tensor."""

from quire_kernels.activation import Activation
from quire_kernels.norm import Norm

from quire_engine.errors import ModelError
from quire_engine.models.base import need
from quire_engine.spec import Config, DecoderSpec, Names


def spec(config: Config) -> DecoderSpec:
    """Raises ModelError for what MptForCausalLM in transformers does not do either."""
    attention = dict(config.get("attn_config") or {})
    if not attention.get("alibi", True) or attention.get("alibi_bias_max", 8) != 8:
        raise ModelError("attn_config lacks alibi or its alibi_bias_max is not 8; MPT is served with those")
    if attention.get("qk_ln") or attention.get("prefix_lm") or attention.get("attn_type") == "multiquery_attention":
        raise ModelError("attn_config has qk_ln, prefix_lm or multi-query attention; MPT is served without")
    hidden, heads = need(config, "d_model", "hidden_size"), need(config, "n_heads", "num_attention_heads")
    return DecoderSpec(
        vocab_size=need(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_layers=need(config, "n_layers", "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_position=need(config, "max_seq_len"),
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
        names=Names(
            embedding="transformer.wte",
            layers="transformer.blocks",
            norm="transformer.norm_f",
            attention="attn",
            q="Wqkv",
            output="out_proj",
            mlp="ffn",
            gate="",
            attention_norm="norm_1",
            mlp_norm="norm_2",
        ),
        norm=Norm(config.get("layer_norm_epsilon", 1e-5), "layer"),
        qkv="stacked",
        clip_qkv=attention.get("clip_qkv"),
        attention_scale=attention.get("softmax_scale"),
        alibi=1.0,
        activation=Activation.GELU,
    )
