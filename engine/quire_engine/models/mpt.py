"""MPT: ALiBi, LayerNorm without bias, queries, keys and values in one tensor."""

from quire_kernels.activation import Activation
from quire_kernels.norm import Norm

from quire_engine.errors import ModelError
from quire_engine.spec import Config, DecoderSpec, Names


def spec(config: Config) -> DecoderSpec:
    """Raises ModelError for what MptForCausalLM in transformers does not do either."""
    attention = config["attn_config"]
    if not attention["alibi"] or attention["alibi_bias_max"] != 8:
        raise ModelError("attn_config lacks alibi or its alibi_bias_max is not 8; MPT is served with those")
    if attention["qk_ln"] or attention["prefix_lm"] or attention["attn_type"] == "multiquery_attention":
        raise ModelError("attn_config has qk_ln, prefix_lm or multi-query attention; MPT is served without")
    hidden, heads = config["d_model"], config["n_heads"]
    return DecoderSpec(
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_layers=config["n_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_position=config["max_seq_len"],
        tie_embeddings=bool(config["tie_word_embeddings"]),
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
        norm=Norm(config["layer_norm_epsilon"], "layer"),
        qkv="stacked",
        clip_qkv=attention["clip_qkv"],
        attention_scale=attention["softmax_scale"],
        alibi=1.0,
        activation=Activation.GELU,
    )
