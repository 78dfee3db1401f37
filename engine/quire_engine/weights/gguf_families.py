"""GGUF files as Hugging Face checkpoints: what each of llama.cpp's architectures calls its tensors and facts.

llama.cpp's converter (convert_hf_to_gguf.py) is what these undo: rotary pairs that it interleaves, norms to which it
adds one, experts that it stacks.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quire_engine.errors import ModelError
from quire_engine.weights.gguf import GGUFFile, GGUFTensorInfo
from quire_engine.weights.tensors import LazyTensor

Get = Callable[..., Any]  # (key, default) → the metadata of the architecture

_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.*.gate_proj",
    "ffn_up_exps": "mlp.experts.*.up_proj",
    "ffn_down_exps": "mlp.experts.*.down_proj",
}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.*.w1",
    "ffn_up_exps": "block_sparse_moe.experts.*.w3",
    "ffn_down_exps": "block_sparse_moe.experts.*.w2",
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True, kw_only=True)
class GGUFFamily:
    """One of llama.cpp's architectures."""

    architecture: str
    tensors: Mapping[str, str] = field(default_factory=dict)  # beyond the common ones
    facts: Callable[[Get], dict[str, Any]] = lambda get: {}
    interleaved: bool = False  # rotary pairs (0, 1), (2, 3), ... where Hugging Face keeps halves
    norms_from_one: bool = False  # norms are stored with 1 added


def _experts(get: Get) -> dict[str, Any]:
    return {
        "num_experts": get("expert_count"),
        "num_experts_per_tok": get("expert_used_count"),
        "moe_intermediate_size": get("expert_feed_forward_length", None) or get("feed_forward_length"),
    }


def _qwen2_moe(get: Get) -> dict[str, Any]:
    return _experts(get) | {
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": get("expert_shared_feed_forward_length", None) or get("feed_forward_length"),
    }


def _gemma2(get: Get) -> dict[str, Any]:
    heads, head_dim = get("attention.head_count"), get("attention.key_length", 256)
    largest = get("block_count") == 46  # the 27B model alone scales by the width of the residual
    return {
        "attn_logit_softcapping": get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": get("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": get("embedding_length") // heads if largest else head_dim,
    }


def _gemma3(get: Get) -> dict[str, Any]:
    heads, head_dim = get("attention.head_count"), get("attention.key_length", 256)
    largest = get("block_count") == 62
    return {
        "rope_local_base_freq": 10000.0,
        "sliding_window_pattern": get("attention.sliding_window_pattern", 6),
        "query_pre_attn_scalar": get("embedding_length") // heads if largest else head_dim,
    }


def _layer_norm(get: Get) -> dict[str, Any]:
    eps = get("attention.layer_norm_epsilon")
    return {"layer_norm_eps": eps, "norm_epsilon": eps, "norm_eps": eps}


def _partial_rotary(get: Get) -> dict[str, Any]:
    head_dim = get("attention.key_length", None) or get("embedding_length") // get("attention.head_count")
    return _layer_norm(get) | {"partial_rotary_factor": get("rope.dimension_count", head_dim) / head_dim}


def _granite(get: Get) -> dict[str, Any]:
    return {
        "attention_multiplier": get("attention.scale"),
        "embedding_multiplier": get("embedding_scale"),
        "residual_multiplier": get("residual_scale"),
        "logits_scaling": get("logit_scale"),
    }


FAMILIES: dict[str, GGUFFamily] = {
    "command-r": GGUFFamily(
        architecture="CohereForCausalLM", facts=lambda get: _layer_norm(get) | {"logit_scale": get("logit_scale")}
    ),
    "gemma": GGUFFamily(architecture="GemmaForCausalLM", norms_from_one=True),
    "gemma2": GGUFFamily(architecture="Gemma2ForCausalLM", tensors=_SANDWICH, facts=_gemma2, norms_from_one=True),
    "gemma3": GGUFFamily(architecture="Gemma3ForCausalLM", tensors=_SANDWICH, facts=_gemma3, norms_from_one=True),
    "granite": GGUFFamily(architecture="GraniteForCausalLM", facts=_granite, interleaved=True),
    "llama": GGUFFamily(architecture="LlamaForCausalLM", interleaved=True),
    "mistral": GGUFFamily(architecture="MistralForCausalLM", interleaved=True),
    "nemotron": GGUFFamily(architecture="NemotronForCausalLM", facts=_partial_rotary, norms_from_one=True),
    "olmo2": GGUFFamily(architecture="Olmo2ForCausalLM", tensors=_SANDWICH),
    "phi3": GGUFFamily(
        architecture="Phi3ForCausalLM", tensors={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
    ),
    "qwen2": GGUFFamily(architecture="Qwen2ForCausalLM"),
    "qwen2moe": GGUFFamily(architecture="Qwen2MoeForCausalLM", tensors=_SHARED_EXPERT, facts=_qwen2_moe),
    "qwen3": GGUFFamily(architecture="Qwen3ForCausalLM"),
    "qwen3moe": GGUFFamily(
        architecture="Qwen3MoeForCausalLM", facts=lambda get: _experts(get) | {"norm_topk_prob": True}
    ),
    "stablelm": GGUFFamily(
        architecture="StableLmForCausalLM",
        facts=lambda get: _partial_rotary(get) | {"use_parallel_residual": get("use_parallel_residual", False)},
    ),
    "starcoder2": GGUFFamily(
        architecture="Starcoder2ForCausalLM",
        tensors={"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        facts=_layer_norm,
    ),
}
_MIXTURE = GGUFFamily(
    architecture="MixtralForCausalLM",
    tensors=_MIXTRAL,
    facts=lambda get: {"num_local_experts": get("expert_count"), "num_experts_per_tok": get("expert_used_count")},
    interleaved=True,
)


def family_of(file: GGUFFile) -> GGUFFamily:
    """Raises ModelError for an architecture that is not served, or a file with what no config here says."""
    arch = file.metadata.get("general.architecture")
    if arch not in FAMILIES:
        raise ModelError(f"GGUF architecture {arch!r} is not served; served are {', '.join(sorted(FAMILIES))}")
    if strange := [name for name in file.tensors if name.startswith("rope_factors")]:
        raise ModelError(
            f"{file.path.name} has {strange[0]}: RoPE factors of {arch} are not read from GGUF; take the "
            "safetensors checkpoint"
        )
    return _MIXTURE if arch == "llama" and file.metadata.get("llama.expert_count") else FAMILIES[arch]


def config_of(file: GGUFFile) -> dict[str, Any]:
    """The Hugging Face config that a GGUF file's metadata amount to. Raises ModelError for what is missing."""
    family = family_of(file)
    arch, meta = file.metadata["general.architecture"], file.metadata
    missing = object()

    def get(key: str, default: Any = missing) -> Any:
        value = meta.get(f"{arch}.{key}", default)
        if value is missing:
            raise ModelError(f"{file.path.name} lacks {arch}.{key} in its metadata; convert it again")
        return value

    heads = get("attention.head_count")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{file.path.name} has no token_embd.weight; it is not a whole language model")
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": arch,
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length", None) or get("expert_feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", None) or get("embedding_length") // heads,
        "max_position_embeddings": get("context_length"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "use_qkv_bias": "blk.0.attn_q.bias" in file.tensors,
        "use_bias": "blk.0.attn_q.bias" in file.tensors,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in file.tensors,
        "torch_dtype": "float32",
    }
    eps = get("attention.layer_norm_rms_epsilon", None)
    config["rms_norm_eps"] = eps if eps is not None else get("attention.layer_norm_epsilon")
    if window := get("attention.sliding_window", None):
        config["sliding_window"] = window
    scaling = get("rope.scaling.type", "none")
    if scaling not in ("none", ""):
        config["rope_scaling"] = {"rope_type": scaling, "factor": get("rope.scaling.factor", 1.0)}
    for token in ("bos_token_id", "eos_token_id"):
        if (value := meta.get(f"tokenizer.ggml.{token}")) is not None:
            config[token] = value
    return config | family.facts(get)


class GGUFCheckpoint:
    """A GGUF file's tensors under their Hugging Face names."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self._family = family_of(file)
        config = config_of(file)
        self._heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        self._where: dict[str, tuple[GGUFTensorInfo, int | None]] = {}  # with the number of an expert
        for name, info in file.tensors.items():
            found = self._hugging_face_name(name)
            if found is not None and "*" in found:
                for expert in range(info.shape[0]):
                    self._where[found.replace("*", str(expert))] = info, expert
            else:
                self._where[found or name] = info, None

    def _hugging_face_name(self, name: str) -> str | None:
        known = {**_TENSORS, **self._family.tensors}
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if block and block[2] in known:
            return f"model.layers.{block[1]}.{known[block[2]]}.{kind}"
        return f"{known[stem]}.{kind}" if stem in known else None

    def names(self) -> list[str]:
        """All tensors; one that has no Hugging Face name keeps its own."""
        return list(self._where)

    def tensor(self, name: str) -> LazyTensor:
        """Raises ModelError for a name the file does not have."""
        if name not in self._where:
            raise ModelError(f"the GGUF file has no tensor for {name}; is it whole?")
        info, expert = self._where[name]
        heads = self._heads.get(name.split(".")[-2]) if self._family.interleaved else None
        less = 1.0 if self._family.norms_from_one and name.endswith("norm.weight") else 0.0
        shape = info.shape if expert is None else info.shape[1:]
        if name.endswith("shared_expert_gate.weight") and len(shape) == 1:
            shape = (1, *shape)

        def part(rows: slice, columns: slice) -> Tensor:
            if expert is not None:
                whole = self._file.read(info, slice(expert, expert + 1))[0][rows]
            elif heads is not None:
                whole = self._file.read(info, slice(None))[_halves(info, heads)][rows]
            elif len(shape) != len(info.shape):
                whole = self._file.read(info, slice(None)).view(shape)[rows]
            else:
                whole = self._file.read(info, rows)
            return whole[:, columns] if whole.dim() > 1 else whole - less

        return LazyTensor(name, shape, part)


def _halves(info: GGUFTensorInfo, heads: int) -> Tensor:
    """llama.cpp interleaves each head's rotary pairs (0, 1), (2, 3), …; Hugging Face keeps halves."""
    rows = torch.arange(info.shape[0])
    return rows.view(heads, info.shape[0] // heads // 2, 2).transpose(1, 2).reshape(-1)
