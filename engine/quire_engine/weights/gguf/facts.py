"""A GGUF file's metadata as the facts of Hugging Face configs."""

import math
from typing import Any

from quire_engine.errors import ModelError
from quire_engine.weights.gguf.file import GGUFFile, shown

_MISSING = object()
_WHOLE_NUMBERS = (
    "count",
    "count_kv",
    "length",
    "length_mla",
    "size",
    "rank",
    "kernel",
    "l_cache",
    "interval",
    "window",
)
_SOME_LAYERS_ATTEND = ("granitehybrid", "lfm2", "lfm2moe")  # those with key-value heads


class Facts:
    """A file's metadata, without the name of its architecture before them. It remembers what it was asked for."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.architecture = str(file.metadata.get("general.architecture"))
        self.asked: set[str] = set()

    def __call__(self, key: str, default: Any = _MISSING) -> Any:
        """One value for all layers. Raises ModelError for what is missing and has no default, and for a list whose
        values differ."""
        value = self._value(key, default)
        if isinstance(value, list):
            if not value or any(other != value[0] for other in value):
                raise self.fault(key, f"differs from layer to layer ({shown(value)}), which is not served")
            value = value[0]
        if isinstance(value, list) or (isinstance(value, str) and not isinstance(default, str)):
            raise self.fault(key, f"is {shown(value)}, no number")
        if isinstance(value, float) and not math.isfinite(value):
            raise self.fault(key, f"is {value}, which is not finite")
        if key.endswith(_WHOLE_NUMBERS) and value is not None and (type(value) is not int or value < 0):
            raise self.fault(key, f"is {shown(value)}, no whole number")
        return value

    def positive(self, key: str) -> int:
        """A number of something that every model of the architecture has."""
        value = self(key)
        if type(value) is not int or value < 1:
            raise self.fault(key, f"is {shown(value)}, which no model has")
        return value

    def each(self, key: str) -> list[Any] | None:
        """Layer by layer, where the file says it so. Raises ModelError for another number of layers."""
        value = self._value(key, None)
        if not isinstance(value, list):
            return None
        if len(value) != self.layers:
            raise self.fault(key, f"has {len(value)} values for {self.layers} layers")
        if not all(type(one) in (bool, int) for one in value):
            raise self.fault(key, f"is {shown(value)}, which are not whole numbers")
        return value

    def fault(self, key: str, what: str) -> ModelError:
        """The error that names a key."""
        return ModelError(f"{self.file.path.name}: {self.architecture}.{key[:80]} {what}")

    def unread(self) -> dict[str, Any]:
        """What the file says of the architecture and nobody asked for."""
        prefix = f"{self.architecture}."
        said = {key.removeprefix(prefix): value for key, value in self.file.metadata.items() if key.startswith(prefix)}
        return {key: value for key, value in said.items() if key not in self.asked}

    def has(self, tensor: str) -> bool:
        """Whether some layer has a tensor of this name."""
        return any(name.endswith(f".{tensor}") for name in self.file.tensors)

    @property
    def layers(self) -> int:
        """Each has tensors, so there are not more than these."""
        count = self.positive("block_count")
        if count > len(self.file.tensors):
            raise self.fault("block_count", f"is {count}, but the file has {len(self.file.tensors)} tensors")
        return count

    @property
    def head_dim(self) -> int:
        """Of keys."""
        heads = self("attention.head_count") or 1  # 0: the model has no attention
        size = int(self("attention.key_length", None) or self("embedding_length") // heads)
        if size < 1:
            raise self.fault("attention.head_count", f"is {heads}, too many for vectors of {self('embedding_length')}")
        return size

    @property
    def kv_heads(self) -> int:
        """Of layers that have any, where the file says it layer by layer."""
        key = "attention.head_count_kv"
        counts = self.each(key)
        if counts is None:
            return int(self(key, self("attention.head_count")))
        allowed = {0, max(counts)} if self.architecture in _SOME_LAYERS_ATTEND else {max(counts)}
        if set(counts) - allowed:
            raise self.fault(key, f"differs from layer to layer ({shown(counts)}), which is not served")
        return int(max(counts))

    @property
    def layer_types(self) -> dict[str, Any]:
        """Which layers have a window, where the file says so: none, all but every so many, or layer by layer."""
        key = "attention.sliding_window_pattern"
        local = self.each(key)
        if not self("attention.sliding_window", None):
            local = [0] * self.layers
        if local is None:
            every = self(key, 0)
            local = [(layer + 1) % every for layer in range(self.layers)] if every else None
        if local is None:
            return {}
        return {"layer_types": ["sliding_attention" if window else "full_attention" for window in local]}

    @property
    def theta(self) -> float:
        """The base of RoPE."""
        return float(self("rope.freq_base", 10000.0))

    def _value(self, key: str, default: Any) -> Any:
        self.asked.add(key)
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if value is _MISSING:
            raise ModelError(f"{self.file.path.name} lacks {self.architecture}.{key} in its metadata; convert it again")
        return value


def experts(get: Facts) -> dict[str, Any]:
    return {
        "num_experts": get("expert_count"),
        "num_experts_per_tok": get("expert_used_count"),
        "moe_intermediate_size": get("expert_feed_forward_length", None) or get("feed_forward_length"),
    }


def mixture(get: Facts) -> dict[str, Any]:
    return {
        "num_local_experts": get("expert_count"),
        "num_experts_per_tok": get("expert_used_count"),
        "intermediate_size": get("expert_feed_forward_length", None) or get("feed_forward_length"),
    }


def deepseek_experts(get: Facts) -> dict[str, Any]:
    return {
        "n_routed_experts": get("expert_count"),
        "num_experts_per_tok": get("expert_used_count"),
        "moe_intermediate_size": get("expert_feed_forward_length"),
        "n_shared_experts": get("expert_shared_count", 0),
        "first_k_dense_replace": get("leading_dense_block_count", 0),
        "n_group": get("expert_group_count", 1),
        "topk_group": get("expert_group_used_count", 1),
        "norm_topk_prob": get("expert_weights_norm", True),
        "routed_scaling_factor": get("expert_weights_scale", 1.0),
    }


def deepseek(get: Facts) -> dict[str, Any]:
    rotated, groups = get("rope.dimension_count"), get("expert_group_count", 1)
    keys, values = get("attention.key_length"), get("attention.value_length")  # of what is cached, in newer files
    facts = deepseek_experts(get) | {
        "num_key_value_heads": get("attention.head_count"),
        "q_lora_rank": get("attention.q_lora_rank", None),
        "kv_lora_rank": get("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": (get("attention.key_length_mla", None) or keys) - rotated,
        "v_head_dim": get("attention.value_length_mla", None) or values,
        "topk_method": "group_limited_greedy" if groups > 1 else "greedy",
        "num_nextn_predict_layers": 0,
    }
    if get("rope.scaling.type", "none") == "yarn":  # the published models have both factors alike
        m = get("rope.scaling.yarn_log_multiplier", 0.0) / 0.1
        facts["rope_parameters"] = rope_parameters(get) | {"mscale": m, "mscale_all_dim": m}
    return facts


def glm4_moe(get: Facts) -> dict[str, Any]:
    extra = get("nextn_predict_layers", 0)
    return (
        deepseek_experts(get)
        | partial_rotary(get)
        | {"num_nextn_predict_layers": extra, "num_hidden_layers": get.layers - extra}
    )


def ernie_moe(get: Facts) -> dict[str, Any]:
    return experts(get) | {
        "moe_layer_start_index": get("leading_dense_block_count", 1),
        "moe_layer_interval": get("interleave_moe_layer_step", 1),
        "moe_num_shared_experts": get("expert_shared_count", 0),
    }


def qwen2_moe(get: Facts) -> dict[str, Any]:
    return experts(get) | {
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": get("expert_shared_feed_forward_length", None) or get("feed_forward_length"),
    }


def gemma2(get: Facts) -> dict[str, Any]:
    largest = get("block_count") == 46  # the 27B model alone scales by the width of the residual
    said = get("attention.sliding_window", None) is not None
    unsaid = {} if said else {"sliding_window": 4096, "layer_types": None}  # in older files: that of every other layer
    return unsaid | {
        "attn_logit_softcapping": get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": get("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": get("embedding_length") // get.positive("attention.head_count")
        if largest
        else get.head_dim,
    }


def gemma3(get: Facts) -> dict[str, Any]:
    largest = get("block_count") == 62
    return {
        "rope_parameters": apart(get, get("rope.freq_base_swa", 10000.0)),
        "query_pre_attn_scalar": get("embedding_length") // get.positive("attention.head_count")
        if largest
        else get.head_dim,
    }


def layer_norm(get: Facts) -> dict[str, Any]:
    eps = get("attention.layer_norm_epsilon")
    return {"layer_norm_eps": eps, "layer_norm_epsilon": eps, "norm_epsilon": eps, "norm_eps": eps}


def partial_rotary(get: Facts) -> dict[str, Any]:
    return {"partial_rotary_factor": get("rope.dimension_count", get.head_dim) / get.head_dim}


def granite(get: Facts) -> dict[str, Any]:
    return {
        "attention_multiplier": get("attention.scale"),
        "embedding_multiplier": get("embedding_scale"),
        "residual_multiplier": get("residual_scale"),
        "logits_scaling": get("logit_scale"),
    }


def granite_moe(get: Facts) -> dict[str, Any]:
    return granite(get) | mixture(get) | {"shared_intermediate_size": get("expert_shared_feed_forward_length", None)}


def gpt2(get: Facts) -> dict[str, Any]:
    return layer_norm(get) | {
        "n_head": get("attention.head_count"),
        "n_embd": get("embedding_length"),
        "n_layer": get("block_count"),
        "n_positions": get("context_length"),
        "n_inner": get("feed_forward_length"),
        "multi_query": get("attention.head_count_kv", None) == 1,
    }


def falcon(get: Facts) -> dict[str, Any]:
    kv_heads = get("attention.head_count_kv", 1)
    return layer_norm(get) | {
        "num_kv_heads": kv_heads,
        "new_decoder_architecture": kv_heads > 1,
        "num_ln_in_parallel_attn": 2 if get.has("attn_norm_2.weight") else 1,
        "ffn_hidden_size": get("feed_forward_length"),
    }


def mpt(get: Facts) -> dict[str, Any]:
    bias = get("attention.max_alibi_bias", 0.0)
    return layer_norm(get) | {
        "max_seq_len": get("context_length"),
        "attn_config": {
            "clip_qkv": get("attention.clamp_kqv", None),
            "alibi": bias > 0,
            "alibi_bias_max": int(bias) if bias == int(bias) else bias,
        },
    }


def qwen3_next(get: Facts) -> dict[str, Any]:
    values = get.positive("ssm.time_step_rank")
    recurrent = get.each("attention.recurrent_layers")
    facts = partial_rotary(get) | {
        "linear_num_key_heads": get("ssm.group_count"),
        "linear_num_value_heads": values,
        "linear_key_head_dim": get("ssm.state_size"),
        "linear_value_head_dim": get("ssm.inner_size") // values,
        "linear_conv_kernel_dim": get("ssm.conv_kernel"),
        "full_attention_interval": get("full_attention_interval", 4),
    }
    if recurrent:
        facts["layer_types"] = ["linear_attention" if state else "full_attention" for state in recurrent]
    return facts


def qwen3_next_moe(get: Facts) -> dict[str, Any]:
    return qwen3_next(get) | qwen2_moe(get) | {"norm_topk_prob": True}


def lfm2(get: Facts) -> dict[str, Any]:
    eps = get("attention.layer_norm_rms_epsilon")
    kinds = ["full_attention" if heads else "conv" for heads in _attending(get)]
    return {
        "norm_eps": eps,
        "layer_types": kinds,
        "conv_L_cache": get("shortconv.l_cache"),
        "conv_bias": get.has("shortconv.conv.bias"),
        "block_auto_adjust_ff_dim": False,
    }


def lfm2_moe(get: Facts) -> dict[str, Any]:
    return lfm2(get) | experts(get) | {"num_dense_layers": get("leading_dense_block_count", 0)}


def mamba2(get: Facts) -> dict[str, Any]:
    heads = get.positive("ssm.time_step_rank")
    return {
        "num_heads": heads,
        "head_dim": get("ssm.inner_size") // heads,
        "n_groups": get("ssm.group_count"),
        "state_size": get("ssm.state_size"),
        "conv_kernel": get("ssm.conv_kernel"),
        "use_conv_bias": get.has("ssm_conv1d.bias"),
        "use_bias": get.has("ssm_in.bias"),
        "layer_norm_epsilon": get("attention.layer_norm_rms_epsilon"),
    }


def granite_hybrid(get: Facts) -> dict[str, Any]:
    heads = get.positive("ssm.time_step_rank")
    return granite_moe(get) | {
        "layer_types": ["attention" if heads else "mamba" for heads in _attending(get)],
        "position_embedding_type": "rope" if get("rope.scaling.finetuned", False) else None,
        "mamba_n_heads": heads,
        "mamba_d_head": get("ssm.inner_size") // heads,
        "mamba_n_groups": get("ssm.group_count"),
        "mamba_d_state": get("ssm.state_size"),
        "mamba_d_conv": get("ssm.conv_kernel"),
        "mamba_conv_bias": get.has("ssm_conv1d.bias"),
        "mamba_proj_bias": get.has("ssm_in.bias"),
    }


def _attending(get: Facts) -> list[int]:
    """The number of key-value heads of each layer; 0: it has no attention."""
    return get.each("attention.head_count_kv") or [get.kv_heads] * get.layers


def olmo3(get: Facts) -> dict[str, Any]:
    return {"rope_parameters": apart(get, get("rope.freq_base_swa", get.theta))}


def apart(get: Facts, theta: float) -> dict[str, Any]:
    """RoPE of layers with a window, which has a base of its own and no scaling, apart from that of the others."""
    return {
        "full_attention": rope_parameters(get),
        "sliding_attention": {"rope_type": "default", "rope_theta": theta},
    }


def rope_parameters(get: Facts) -> dict[str, Any]:
    """What of it the file says."""
    given = {"rope_type": "default", "rope_theta": get.theta} | _rope_scaling(get)
    return {key: value for key, value in given.items() if value is not None}


def _rope_scaling(get: Facts) -> dict[str, Any]:
    """Empty: none."""
    tensors = get.file.tensors
    if "rope_freqs.weight" in tensors:  # llama3's scaling, frequency by frequency
        factors = _numbers(get.file, "rope_freqs.weight")
        return {
            "rope_type": "longrope",
            "long_factor": factors,
            "short_factor": factors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": get("context_length"),
        }
    if "rope_factors_long.weight" in tensors:
        return {
            "rope_type": "longrope",
            "long_factor": _numbers(get.file, "rope_factors_long.weight"),
            "short_factor": _numbers(get.file, "rope_factors_short.weight"),
            "attention_factor": get("rope.scaling.attn_factor", None),
            "original_max_position_embeddings": get("rope.scaling.original_context_length"),
        }
    kind = get("rope.scaling.type", "linear")
    factor = get("rope.scaling.factor", 0.0) or get("rope.scale_linear", 0.0) or 1.0
    if kind in ("none", "") or (kind == "linear" and factor == 1):
        return {}
    if kind not in ("linear", "yarn"):
        raise get.fault(
            "rope.scaling.type", f"is {shown(kind)}; served are none, linear and yarn, and longrope's tensors"
        )
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling |= {
            "original_max_position_embeddings": get("rope.scaling.original_context_length", None),
            "attention_factor": get("rope.scaling.yarn_attn_factor", None),
            "beta_fast": get("rope.scaling.yarn_beta_fast", None),
            "beta_slow": get("rope.scaling.yarn_beta_slow", None),
        }
    return scaling


def _numbers(file: GGUFFile, name: str) -> list[float]:
    if name not in file.tensors:
        raise ModelError(f"{file.path.name} lacks {name}; is it whole?")
    numbers: list[float] = file.read(file.tensors[name], slice(None)).tolist()
    return numbers
