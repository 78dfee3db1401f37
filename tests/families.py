"""Tiny models of every family, each with a random checkpoint from its own config class in transformers."""

from dataclasses import dataclass
from typing import Any

LAYERS = 3
TINY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.25,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_OLMO3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": _YARN,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": 64,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
_DEEPSEEK = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "num_key_value_heads": 4,
}
_LINEAR = {
    "initializer_range": 0.06,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]


@dataclass(frozen=True)
class Family:
    """Its config class, and what the tiny model's config says beyond TINY."""

    config: str
    facts: dict[str, Any]


def _family(config: str, **facts: Any) -> Family:
    return Family(config, facts)


FAMILIES: dict[str, Family] = {
    "llama": _family("LlamaConfig", rope_parameters=_LLAMA3_ROPE, attention_bias=True, mlp_bias=True),
    "mistral": _family("MistralConfig", sliding_window=24, head_dim=32),
    "ministral": _family("MinistralConfig", sliding_window=24, head_dim=32, layer_types=_SLIDING),
    "ministral3": _family(
        "Ministral3Config",
        head_dim=32,
        initializer_range=0.15,
        rope_parameters=_YARN | {"original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.5},
    ),
    "mixtral": _family(
        "MixtralConfig", initializer_range=0.2, num_local_experts=4, num_experts_per_tok=2, sliding_window=24
    ),
    "qwen2": _family(
        "Qwen2Config", use_sliding_window=True, sliding_window=24, max_window_layers=1, tie_word_embeddings=True
    ),
    "qwen2_moe": _family("Qwen2MoeConfig", **_EXPERTS, shared_expert_intermediate_size=48, decoder_sparse_step=2),
    "qwen3": _family("Qwen3Config", head_dim=32),
    "qwen3_moe": _family("Qwen3MoeConfig", **_EXPERTS, head_dim=32, norm_topk_prob=True, mlp_only_layers=[1]),
    "gemma": _family("GemmaConfig", head_dim=32, initializer_range=0.15),
    "gemma2": _family(
        "Gemma2Config",
        head_dim=32,
        initializer_range=0.2,
        sliding_window=24,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": _family(
        "Gemma3TextConfig",
        head_dim=32,
        initializer_range=0.15,
        sliding_window=24,
        query_pre_attn_scalar=16,
        layer_types=_SLIDING,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "phi": _family("PhiConfig"),
    "phi3": _family("Phi3Config", sliding_window=24, rope_parameters=_YARN | {"rope_type": "default"}),
    "granite": _family(
        "GraniteConfig",
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.3,
        logits_scaling=2.0,
    ),
    "granite_moe": _family(
        "GraniteMoeConfig",
        num_local_experts=4,
        num_experts_per_tok=2,
        residual_multiplier=0.4,
        logits_scaling=2.0,
        initializer_range=0.15,
    ),
    "granite_moe_shared": _family(
        "GraniteMoeSharedConfig",
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=48,
        initializer_range=0.15,
    ),
    "glm": _family("GlmConfig", head_dim=32, attention_bias=True),
    "glm4": _family("Glm4Config", head_dim=32),
    "glm4_moe": _family(
        "Glm4MoeConfig",
        head_dim=32,
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.5,
        use_qk_norm=True,
        attention_bias=True,
        first_k_dense_replace=1,
    ),
    "cohere": _family("CohereConfig", use_qk_norm=True, logit_scale=0.5),
    "cohere2": _family("Cohere2Config", sliding_window=24, layer_types=_SLIDING, logit_scale=0.5),
    "olmo": _family("OlmoConfig", clip_qkv=1.0),
    "olmo2": _family("Olmo2Config"),
    "olmo3": _family("Olmo3Config", sliding_window=24, layer_types=_SLIDING, rope_parameters=_OLMO3_ROPE),
    "olmoe": _family("OlmoeConfig", num_experts=8, num_experts_per_tok=3, clip_qkv=1.0),
    "minimax_m2": _family("MiniMaxM2Config", head_dim=32, num_local_experts=8, num_experts_per_tok=3, rotary_dim=16),
    "starcoder2": _family("Starcoder2Config", sliding_window=24),
    "stablelm": _family("StableLmConfig", use_qkv_bias=True),
    "stablelm_parallel": _family("StableLmConfig", use_parallel_residual=True, qk_layernorm=True),
    "falcon_7b": _family("FalconConfig"),
    "falcon_40b": _family("FalconConfig", new_decoder_architecture=True, num_kv_heads=2),
    "falcon_rw": _family("FalconConfig", alibi=True, multi_query=False, parallel_attn=False, bias=True),
    "gpt_neox": _family("GPTNeoXConfig", rotary_pct=0.5),
    "gpt2": _family("GPT2Config", n_embd=64, n_head=4, n_layer=LAYERS, n_positions=512),
    "gpt_bigcode": _family("GPTBigCodeConfig", n_embd=64, n_head=4, n_layer=LAYERS, n_positions=512),
    "opt": _family("OPTConfig", ffn_dim=96, word_embed_proj_dim=64),
    "bloom": _family("BloomConfig", n_head=4, n_layer=LAYERS, seq_length=512),
    "mpt": _family("MptConfig", d_model=64, n_heads=4, n_layers=LAYERS, max_seq_len=512),
    "gptj": _family(
        "GPTJConfig",
        n_embd=64,
        n_head=4,
        n_layer=LAYERS,
        n_positions=512,
        rotary_dim=8,
        tie_word_embeddings=False,
    ),
    "cwm": _family("CwmConfig", head_dim=32, sliding_window=24, layer_types=_SLIDING, rope_parameters=_LLAMA3_ROPE),
    "exaone4": _family("Exaone4Config", head_dim=32, sliding_window=24, layer_types=_SLIDING),
    "smollm3": _family("SmolLM3Config", no_rope_layers=[1, 0, 1]),
    "ernie": _family("Ernie4_5Config", use_bias=True),
    "ernie_moe": _family(
        "Ernie4_5_MoeConfig",
        moe_num_experts=8,
        moe_k=3,
        moe_intermediate_size=32,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
        moe_layer_interval=1,
    ),
    "hunyuan": _family("HunYuanDenseV1Config", head_dim=32),
    "seed_oss": _family("SeedOssConfig", head_dim=32, attention_bias=True, attention_out_bias=True),
    "nemotron": _family("NemotronConfig", initializer_range=0.2),
    "arcee": _family("ArceeConfig"),
    "qwen3_next": _family(
        "Qwen3NextConfig", **_EXPERTS, **_LINEAR, shared_expert_intermediate_size=48, decoder_sparse_step=1
    ),
    "qwen3_5": _family("Qwen3_5TextConfig", **_LINEAR),
    "qwen3_5_moe": _family("Qwen3_5MoeTextConfig", **_EXPERTS, **_LINEAR, shared_expert_intermediate_size=48),
    "lfm2": _family("Lfm2Config", layer_types=["conv", "full_attention", "conv"], block_multiple_of=32),
    "lfm2_moe": _family(
        "Lfm2MoeConfig",
        layer_types=["conv", "full_attention", "conv"],
        num_dense_layers=1,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        conv_bias=True,
    ),
    "mamba2": _family("Mamba2Config", num_heads=8, head_dim=16, state_size=16, n_groups=2),
    "bamba": _family("BambaConfig", **_MAMBA, attn_layer_indices=[1], mamba_n_groups=2),
    "granite_hybrid": _family(
        "GraniteMoeHybridConfig",
        **_MAMBA,
        layer_types=["mamba", "attention", "mamba"],
        num_local_experts=0,
        shared_intermediate_size=96,
        attention_multiplier=0.3,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        logits_scaling=2.0,
        initializer_range=0.15,
    ),
    "granite_hybrid_moe": _family(
        "GraniteMoeHybridConfig",
        **_MAMBA,
        layer_types=["mamba", "attention", "mamba"],
        mamba_n_groups=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=48,
        position_embedding_type="rope",
        initializer_range=0.15,
    ),
    "nemotron_h": _family(
        "NemotronHConfig",
        hybrid_override_pattern="M-*-",
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=2,
        head_dim=32,
    ),
    "gpt_oss": _family(
        "GptOssConfig",
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=24,
        layer_types=_SLIDING,
        rope_parameters=_YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
        head_dim=32,
    ),
    "helium": _family("HeliumConfig", head_dim=16),
    "deepseek_v2": _family(
        "DeepseekV2Config", **_DEEPSEEK, q_lora_rank=None, topk_method="group_limited_greedy", first_k_dense_replace=1
    ),
    "deepseek_v3": _family(
        "DeepseekV3Config",
        **_DEEPSEEK,
        q_lora_rank=24,
        first_k_dense_replace=1,
        rope_parameters=_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "dots1": _family(
        "Dots1Config",
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        routed_scaling_factor=2.0,
        head_dim=32,
    ),
}

FALLBACK: dict[str, Family] = {  # that the decoder does not know
    "afmoe": _family(
        "AfmoeConfig",
        head_dim=32,
        sliding_window=24,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        layer_types=_SLIDING,
    ),
    "apertus": _family("ApertusConfig"),
    "bitnet": _family("BitNetConfig"),
    "codegen": _family("CodeGenConfig", n_embd=64, n_head=4, n_layer=LAYERS, n_positions=512, rotary_dim=8),
    "exaone_moe": _family("ExaoneMoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "flex_olmo": _family("FlexOlmoConfig", num_experts=4, num_experts_per_tok=2),
    "granite_swa": _family("GraniteSWAConfig", initializer_range=0.15, sliding_window=24),
    "hunyuan_moe": _family("HunYuanMoEV1Config", num_experts=4, moe_topk=2, head_dim=16),
    "hyperclovax": _family("HyperCLOVAXConfig"),
    "jais2": _family("Jais2Config"),
    "mellum": _family("MellumConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "modernbert_decoder": _family("ModernBertDecoderConfig"),
    "nanochat": _family("NanoChatConfig"),
    "persimmon": _family("PersimmonConfig"),
    "phimoe": _family(
        "PhimoeConfig",
        num_local_experts=4,
        attention_bias=True,
        lm_head_bias=True,
        rope_parameters=LONGROPE | {"short_mscale": 1.24, "long_mscale": 1.24},
    ),
    "solar_open": _family(
        "SolarOpenConfig", n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, head_dim=16
    ),
    "vaultgemma": _family("VaultGemmaConfig", head_dim=16, sliding_window=24),
}
REFUSED: dict[str, tuple[Family, str]] = {  # and what the refusal names
    "chunked": (_family("Llama4TextConfig"), "layer_types has chunked_attention"),
    "states": (_family("JambaConfig", num_experts=2), "keep a state"),
    "twice": (_family("DiffLlamaConfig"), "attends more than once"),
    "values": (_family("JetMoeConfig"), "looks at values"),
}

ENCODERS: dict[str, Family] = {
    "bert": _family("BertConfig", max_position_embeddings=128),
    "roberta": _family("RobertaConfig", max_position_embeddings=130, pad_token_id=1, type_vocab_size=1),
    "xlm_roberta": _family("XLMRobertaConfig", max_position_embeddings=130, pad_token_id=1, type_vocab_size=1),
}
