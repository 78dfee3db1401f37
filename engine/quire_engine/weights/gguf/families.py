"""GGUF files as Hugging Face checkpoints: llama.cpp's architectures, and what its converter (convert_hf_to_gguf.py) did
that has to be undone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from quire_engine.errors import ModelError
from quire_engine.weights.gguf import facts, layouts
from quire_engine.weights.gguf.facts import Facts
from quire_engine.weights.gguf.file import GGUFFile
from quire_engine.weights.gguf.layouts import Made
from quire_engine.weights.gguf.unread import refuse_unread


@dataclass(frozen=True, kw_only=True)
class GGUFFamily:
    """One of llama.cpp's architectures."""

    architecture: str
    layers: str = "model.layers"
    tensors: Mapping[str, str] = field(default_factory=dict)  # beyond the common ones; `*` numbers the first dimension
    made: Mapping[str, Made] = field(default_factory=dict)  # by their names within a layer
    facts: Callable[[Facts], dict[str, Any]] = lambda get: {}
    norms_from_one: bool = False  # norms are stored with 1 added
    windows: bool = False  # some of its layers, or all, may have one


FAMILIES: dict[str, GGUFFamily] = {
    "arcee": GGUFFamily(architecture="ArceeForCausalLM", made=layouts.INTERLEAVED),
    "bloom": GGUFFamily(
        architecture="BloomForCausalLM",
        layers="transformer.h",
        tensors=layouts.TRANSFORMER_H,
        made=layouts.grouped_qkv("self_attention.query_key_value"),
        facts=lambda get: facts.layer_norm(get) | {"seq_length": get("context_length")},
    ),
    "chatglm": GGUFFamily(
        architecture="GlmForCausalLM", tensors={"ffn_up": "mlp.gate_up_proj"}, facts=facts.partial_rotary
    ),
    "cohere2": GGUFFamily(
        architecture="Cohere2ForCausalLM",
        facts=lambda get: facts.layer_norm(get) | {"logit_scale": get("logit_scale")},
        windows=True,
    ),
    "command-r": GGUFFamily(
        architecture="CohereForCausalLM", facts=lambda get: facts.layer_norm(get) | {"logit_scale": get("logit_scale")}
    ),
    "deepseek2": GGUFFamily(
        architecture="DeepseekV3ForCausalLM",
        tensors=layouts.LATENT,
        made=layouts.correction("mlp.gate.e_score_correction_bias")
        | {"self_attn.kv_b_proj.weight": Made(("attn_k_b.weight", "attn_v_b.weight"), layouts.keys_and_values)},
        facts=facts.deepseek,
    ),
    "dots1": GGUFFamily(
        architecture="Dots1ForCausalLM",
        made=layouts.correction("mlp.gate.e_score_correction_bias"),
        facts=facts.deepseek_experts,
    ),
    "ernie4_5": GGUFFamily(architecture="Ernie4_5ForCausalLM"),
    "ernie4_5-moe": GGUFFamily(
        architecture="Ernie4_5_MoeForCausalLM",
        made=layouts.correction("mlp.moe_statics.e_score_correction_bias"),
        facts=facts.ernie_moe,
    ),
    "exaone4": GGUFFamily(architecture="Exaone4ForCausalLM", tensors=layouts.SANDWICH, windows=True),
    "falcon": GGUFFamily(
        architecture="FalconForCausalLM",
        layers="transformer.h",
        tensors=layouts.TRANSFORMER_H,
        made=layouts.grouped_qkv("self_attention.query_key_value"),
        facts=facts.falcon,
    ),
    "gemma": GGUFFamily(architecture="GemmaForCausalLM", norms_from_one=True),
    "gemma2": GGUFFamily(
        architecture="Gemma2ForCausalLM",
        tensors=layouts.SANDWICH,
        facts=facts.gemma2,
        norms_from_one=True,
        windows=True,
    ),
    "gemma3": GGUFFamily(
        architecture="Gemma3ForCausalLM",
        tensors=layouts.SANDWICH,
        facts=facts.gemma3,
        norms_from_one=True,
        windows=True,
    ),
    "glm4": GGUFFamily(
        architecture="Glm4ForCausalLM",
        tensors={
            "ffn_up": "mlp.gate_up_proj",
            "post_attention_norm": "post_self_attn_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
        },
        facts=facts.partial_rotary,
    ),
    "glm4moe": GGUFFamily(
        architecture="Glm4MoeForCausalLM",
        tensors=layouts.NORM_BETWEEN,
        made=layouts.correction("mlp.gate.e_score_correction_bias"),
        facts=facts.glm4_moe,
    ),
    "gpt-oss": GGUFFamily(
        architecture="GptOssForCausalLM",
        tensors=layouts.NORM_BETWEEN | {"ffn_gate_inp": "mlp.router"},
        made=layouts.GPT_OSS_EXPERTS,
        facts=lambda get: facts.mixture(get) | {"rope_parameters": facts.rope_parameters(get) | {"truncate": False}},
        windows=True,
    ),
    "gpt2": GGUFFamily(
        architecture="GPT2LMHeadModel",
        layers="transformer.h",
        tensors=layouts.GPT2,
        made={
            f"{layouts.GPT2[name]}.weight": Made((f"{name}.weight",), layouts.transposed)
            for name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
        },
        facts=facts.gpt2,
    ),
    "gptneox": GGUFFamily(
        architecture="GPTNeoXForCausalLM",
        layers="gpt_neox.layers",
        tensors={
            "token_embd": "gpt_neox.embed_in",
            "output_norm": "gpt_neox.final_layer_norm",
            "output": "embed_out",
            "attn_output": "attention.dense",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
        },
        made=layouts.grouped_qkv("attention.query_key_value"),
        facts=lambda get: (
            facts.layer_norm(get)
            | {
                "rotary_pct": get("rope.dimension_count") / get.head_dim,
                "use_parallel_residual": get("use_parallel_residual", True),
            }
        ),
    ),
    "granite": GGUFFamily(architecture="GraniteForCausalLM", made=layouts.INTERLEAVED, facts=facts.granite),
    "granitemoe": GGUFFamily(
        architecture="GraniteMoeForCausalLM",
        tensors={
            "ffn_gate_inp": "block_sparse_moe.router.layer",
            "ffn_down_exps": "block_sparse_moe.output_linear",
            "ffn_down_shexp": "shared_mlp.output_linear",
        },
        made=layouts.INTERLEAVED | layouts.STACKED_EXPERTS,
        facts=facts.granite_moe,
    ),
    "granitehybrid": GGUFFamily(
        architecture="GraniteMoeHybridForCausalLM",
        tensors=layouts.GRANITE_HYBRID,
        made=layouts.INTERLEAVED | layouts.mamba("mamba") | layouts.STACKED_EXPERTS,
        facts=facts.granite_hybrid,
    ),
    "hunyuan-dense": GGUFFamily(
        architecture="HunYuanDenseV1ForCausalLM",
        tensors={"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"},
    ),
    "internlm2": GGUFFamily(
        architecture="LlamaForCausalLM", made=layouts.INTERLEAVED
    ),  # by its converter it is no other
    "lfm2": GGUFFamily(
        architecture="Lfm2ForCausalLM", tensors=layouts.LFM2, made=layouts.LFM2_CONVOLUTION, facts=facts.lfm2
    ),
    "lfm2moe": GGUFFamily(
        architecture="Lfm2MoeForCausalLM",
        tensors=layouts.LFM2,
        made=layouts.LFM2_CONVOLUTION | layouts.correction("feed_forward.expert_bias"),
        facts=facts.lfm2_moe,
    ),
    "llama": GGUFFamily(architecture="LlamaForCausalLM", made=layouts.INTERLEAVED),
    "mamba2": GGUFFamily(
        architecture="Mamba2ForCausalLM",
        layers="backbone.layers",
        tensors=layouts.MAMBA2,
        made=layouts.mamba("mixer"),
        facts=facts.mamba2,
    ),
    "minimax-m2": GGUFFamily(
        architecture="MiniMaxM2ForCausalLM",
        tensors=layouts.BLOCK_SPARSE,
        made=layouts.correction("block_sparse_moe.e_score_correction_bias"),
        facts=lambda get: (
            facts.mixture(get)
            | {"rotary_dim": get("rope.dimension_count"), "intermediate_size": get("expert_feed_forward_length")}
        ),
    ),
    "mistral": GGUFFamily(architecture="MistralForCausalLM", made=layouts.INTERLEAVED, windows=True),
    "mpt": GGUFFamily(
        architecture="MptForCausalLM",
        layers="transformer.blocks",
        tensors={
            "token_embd": "transformer.wte",
            "output_norm": "transformer.norm_f",
            "attn_norm": "norm_1",
            "attn_qkv": "attn.Wqkv",
            "attn_output": "attn.out_proj",
            "ffn_norm": "norm_2",
            "ffn_up": "ffn.up_proj",
            "ffn_down": "ffn.down_proj",
        },
        facts=facts.mpt,
    ),
    "nemotron": GGUFFamily(
        architecture="NemotronForCausalLM",
        facts=lambda get: facts.layer_norm(get) | facts.partial_rotary(get),
        norms_from_one=True,
    ),
    "olmo": GGUFFamily(
        architecture="OlmoForCausalLM",
        made=layouts.INTERLEAVED,
        facts=lambda get: {"clip_qkv": get("attention.clamp_kqv", None)},
    ),
    "olmo2": GGUFFamily(architecture="Olmo2ForCausalLM", tensors=layouts.SANDWICH, windows=True),
    "olmoe": GGUFFamily(
        architecture="OlmoeForCausalLM", facts=lambda get: facts.experts(get) | {"norm_topk_prob": False}
    ),
    "phi2": GGUFFamily(
        architecture="PhiForCausalLM",
        tensors={
            "output_norm": "model.final_layernorm",
            "attn_output": "self_attn.dense",
            "ffn_up": "mlp.fc1",
            "ffn_down": "mlp.fc2",
        },
        facts=lambda get: facts.layer_norm(get) | facts.partial_rotary(get),
    ),
    "phi3": GGUFFamily(
        architecture="Phi3ForCausalLM",
        tensors={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        facts=facts.partial_rotary,
        windows=True,
    ),
    "qwen2": GGUFFamily(architecture="Qwen2ForCausalLM"),
    "qwen2moe": GGUFFamily(
        architecture="Qwen2MoeForCausalLM",
        tensors=layouts.SHARED_EXPERT,
        made={"mlp.shared_expert_gate.weight": Made(("ffn_gate_inp_shexp.weight",), layouts.as_row)},
        facts=facts.qwen2_moe,
    ),
    "qwen3": GGUFFamily(architecture="Qwen3ForCausalLM"),
    "qwen3moe": GGUFFamily(
        architecture="Qwen3MoeForCausalLM", facts=lambda get: facts.experts(get) | {"norm_topk_prob": True}
    ),
    "qwen35": GGUFFamily(
        architecture="Qwen3_5ForCausalLM",
        tensors=layouts.NORM_BETWEEN,
        made=layouts.TILED_DELTA_NET,
        facts=facts.qwen3_next,
        norms_from_one=True,
    ),
    "qwen35moe": GGUFFamily(
        architecture="Qwen3_5MoeForCausalLM",
        tensors=layouts.QWEN3_NEXT,
        made=layouts.TILED_DELTA_NET,
        facts=facts.qwen3_next_moe,
        norms_from_one=True,
    ),
    "qwen3next": GGUFFamily(
        architecture="Qwen3_5MoeForCausalLM",  # its converter takes apart what Qwen3-Next keeps in one tensor
        tensors=layouts.QWEN3_NEXT,
        made=layouts.DELTA_NET,
        facts=facts.qwen3_next_moe,
        norms_from_one=True,
    ),
    "seed_oss": GGUFFamily(architecture="SeedOssForCausalLM", tensors=layouts.NORM_BETWEEN),
    "smollm3": GGUFFamily(architecture="SmolLM3ForCausalLM", made=layouts.INTERLEAVED),
    "stablelm": GGUFFamily(
        architecture="StableLmForCausalLM",
        tensors={
            "attn_q_norm": "self_attn.q_layernorm.norms.*",
            "attn_k_norm": "self_attn.k_layernorm.norms.*",
        },
        facts=lambda get: (
            facts.layer_norm(get)
            | facts.partial_rotary(get)
            | {
                "use_parallel_residual": get("use_parallel_residual", False),
                "qk_layernorm": get.has("attn_q_norm.weight"),
            }
        ),
    ),
    "starcoder": GGUFFamily(
        architecture="GPTBigCodeForCausalLM", layers="transformer.h", tensors=layouts.GPT2, facts=facts.gpt2
    ),
    "starcoder2": GGUFFamily(
        architecture="Starcoder2ForCausalLM",
        tensors={"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        facts=facts.layer_norm,
        windows=True,
    ),
}
_MIXTRAL = GGUFFamily(
    architecture="MixtralForCausalLM", tensors=layouts.BLOCK_SPARSE, made=layouts.INTERLEAVED, facts=facts.mixture
)
_FALCON_NORMS = {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"}


def family_of(file: GGUFFile) -> GGUFFamily:
    """Raises ModelError for an architecture that is not served."""
    arch, get = file.metadata.get("general.architecture"), Facts(file)
    if arch not in FAMILIES:
        raise ModelError(f"GGUF architecture {arch!r} is not served; served are {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[arch]
    if arch == "llama" and get("expert_count", 0):
        return _MIXTRAL
    if arch == "falcon" and get.has("attn_norm_2.weight"):
        return replace(family, tensors={**family.tensors, **_FALCON_NORMS})
    if arch == "deepseek2" and not get.has("exp_probs_b.bias"):
        return replace(family, architecture="DeepseekV2ForCausalLM")
    if arch == "granitehybrid" and not get("expert_count", 0):
        return replace(family, made={**family.made, **layouts.GRANITE_SHARED})
    if arch == "olmo2" and get("attention.sliding_window", 0):
        return replace(family, architecture="Olmo3ForCausalLM", facts=facts.olmo3)
    return family


def config_of(file: GGUFFile) -> dict[str, Any]:
    """The Hugging Face config that a GGUF file's metadata amount to. Raises ModelError for what is missing."""
    family, get, meta = family_of(file), Facts(file), file.metadata
    heads = get("attention.head_count")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{file.path.name} has no token_embd.weight; it is not a whole language model")
    bias = get.has("attn_q.bias") or get.has("attn_qkv.bias")
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": meta["general.architecture"],
        "hidden_size": get.positive("embedding_length"),
        "intermediate_size": get("feed_forward_length", None) or get("expert_feed_forward_length", 0),
        "num_hidden_layers": get.layers,
        "max_position_embeddings": get("context_length"),
        "rope_parameters": facts.rope_parameters(get),
        "sliding_window": get("attention.sliding_window", None) if family.windows else None,
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": bias,
        "attention_out_bias": get.has("attn_output.bias"),
        "mlp_bias": get.has("ffn_up.bias"),
        "use_qkv_bias": bias,
        "use_bias": bias,
        "use_qk_norm": get.has("attn_q_norm.weight"),
        "torch_dtype": "float32",
    }
    if heads:  # Mamba-2 has none
        config |= {"num_attention_heads": heads, "num_key_value_heads": get.kv_heads, "head_dim": get.head_dim}
    eps = get("attention.layer_norm_rms_epsilon", None)
    config["rms_norm_eps"] = eps if eps is not None else get("attention.layer_norm_epsilon")
    if original := config["rope_parameters"].get("original_max_position_embeddings"):
        config["original_max_position_embeddings"] = original
    if family.windows:
        config |= get.layer_types
    for token in ("bos_token_id", "eos_token_id"):
        config[token] = meta.get(f"tokenizer.ggml.{token}")
    config |= family.facts(get)
    refuse_unread(get, config)
    return config
