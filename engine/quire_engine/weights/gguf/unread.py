"""What a GGUF file says of its architecture and no family asks for: without effect, refused, or said aloud."""

import logging
from collections.abc import Mapping
from typing import Any

from quire_engine.weights.gguf.facts import Facts
from quire_engine.weights.gguf.file import shown

log = logging.getLogger(__name__)

# Whatever they say, it changes nothing: shapes that the tensors have too, notes, and what is for images.
_WITHOUT_EFFECT = (
    "context_length",
    "embedding_length_out",
    "feed_forward_length",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "rope.dimension_sections",  # a text's positions are the same in all of them
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "tensor_data_layout",
    "vocab_size",
    "n_deepstack_layers",
    "deepstack_mapping",
)
_NO = (0, 1, False, "none", "")  # neither a factor nor a number of things that changes anything
_OFF = (0, False)
# What changes results, with the values at which it does not. "=": where it is what the config says under that name.
_CHANGES: dict[str, tuple[Any, ...] | str] = {
    "activation.situ_beta": _OFF,
    "activation.situ_linear_beta": _OFF,
    "attention.causal": (True,),
    "attention.clamp_kqv": _OFF,
    "attention.indexer.head_count": _OFF,
    "attention.key_length_swa": "=head_dim",
    "attention.max_alibi_bias": _OFF,
    "attention.output_scale": _NO,
    "attention.recurrent_layers": _OFF,
    "attention.relative_buckets_count": _OFF,
    "attention.rope_pattern": (),
    "attention.scale": _OFF,
    "attention.shared_kv_layers": _OFF,
    "attention.sliding_window": _OFF,
    "attention.sliding_window_pattern": _OFF,
    "attention.temperature_length": _OFF,
    "attention.temperature_scale": _NO,
    "attention.value_length": "=head_dim",
    "attention.value_length_swa": "=head_dim",
    "attention.value_scale": _NO,
    "attn_logit_softcapping": _OFF,
    "decoder_block_count": _OFF,
    "embedding_length_per_layer_input": _OFF,
    "embedding_scale": _NO,
    "expert_chunk_feed_forward_length": _OFF,
    "expert_count": _OFF,
    "expert_group_count": _NO,
    "expert_group_scale": _NO,
    "expert_group_used_count": _NO,
    "expert_latent_length": _OFF,
    "expert_shared_count": _OFF,
    "expert_used_count": _OFF,
    "expert_weights_norm": "=norm_topk_prob",
    "expert_weights_scale": _NO,
    "experts_per_group": _NO,
    "final_logit_softcapping": _OFF,
    "full_attention_interval": _NO,
    "hyper_connection.count": _NO,
    "interleave_moe_layer_step": _NO,
    "leading_dense_block_count": _OFF,
    "logit_scale": _NO,
    "moe_every_n_layers": _NO,
    "nextn_predict_layers": _OFF,
    "num_loops": _NO,
    "pooling_type": _OFF,
    "residual_scale": _NO,
    "rope.dimension_count": "=head_dim",
    "rope.dimension_count_swa": "=head_dim",
    "rope.freq_base": (),
    "rope.scale_linear": _NO,
    "rope.scaling.alpha": _NO,
    "rope.scaling.attn_factor": _NO,
    "rope.scaling.factor": _NO,
    "rope.scaling.type": _NO,
    "rope.scaling.yarn_attn_factor": _NO,
    "rope.scaling.yarn_beta_fast": (32,),
    "rope.scaling.yarn_beta_slow": (1,),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_log_multiplier": _OFF,
    "router_logit_softcapping": _OFF,
    "ssm.dt_b_c_rms": _OFF,
    "swiglu_clamp_exp": _OFF,
    "swiglu_clamp_shexp": _OFF,
    "swin_norm": _OFF,
    "use_parallel_residual": _OFF,
}
_GATES = {"softmax": (0, 1, 3), "sigmoid": (2,)}  # by ggml's numbers; 3: a softmax over the chosen
_SIGMOID = ("dots1", "glm4moe", "lfm2moe", "minimax-m2")


def refuse_unread(get: Facts, config: Mapping[str, Any]) -> None:
    """Raises ModelError for what would change results; warns of what is not known at all.

    `config`: what became of what was asked for.
    """
    unknown = []
    for key, value in get.unread().items():
        if key in _WITHOUT_EFFECT:
            continue
        neutral = _neutral(key, get, config)
        if neutral is None and not key.startswith("rope."):
            unknown.append(f"{get.architecture}.{key}")
        elif neutral is None or any(one not in neutral for one in (value if isinstance(value, list) else [value])):
            raise get.fault(key, f"is {shown(value)}, which is not served for this architecture")
    if unknown:
        log.warning("%s: %s is not understood and has no effect", get.file.path.name, shown(sorted(unknown)))


def _neutral(key: str, get: Facts, config: Mapping[str, Any]) -> tuple[Any, ...] | None:
    if key == "expert_gating_func":
        sigmoid = get.architecture in _SIGMOID or (get.architecture == "deepseek2" and get.has("exp_probs_b.bias"))
        return _GATES["sigmoid" if sigmoid else "softmax"]
    if key == "rope.freq_base_swa":
        return (get.theta,)
    values = _CHANGES.get(key)
    if isinstance(values, str):
        return (config.get(values.removeprefix("=")),)
    return values
