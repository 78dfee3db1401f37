"""What llama.cpp's architectures call their tensors, and how they keep those that Hugging Face keeps otherwise: rotary
pairs that are interleaved, experts that are stacked, projections that are taken apart."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Made:
    """A tensor that llama.cpp keeps otherwise: its tensors, by their names within a layer, and what they amount to."""

    parts: tuple[str, ...]
    make: Callable[[Sequence[Tensor], Config], Tensor]


TENSORS = {
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
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
BLOCK_SPARSE = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.*.w1",
    "ffn_up_exps": "block_sparse_moe.experts.*.w3",
    "ffn_down_exps": "block_sparse_moe.experts.*.w2",
}
SHARED_EXPERT = {
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
NORM_BETWEEN = {"post_attention_norm": "post_attention_layernorm"}
LATENT = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
}
TRANSFORMER_H = {
    "output_norm": "transformer.ln_f",
    "token_embd": "transformer.word_embeddings",
    "token_embd_norm": "transformer.word_embeddings_layernorm",
    "attn_output": "self_attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
GPT2 = {
    "output_norm": "transformer.ln_f",
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}


def _same(parts: Sequence[Tensor], config: Config) -> Tensor:
    return parts[0]


def transposed(parts: Sequence[Tensor], config: Config) -> Tensor:
    return parts[0].transpose(-1, -2)


def as_row(parts: Sequence[Tensor], config: Config) -> Tensor:
    return parts[0].reshape(1, -1)


def _flat(parts: Sequence[Tensor], config: Config) -> Tensor:
    return parts[0].flatten()


def _stacked_halves(parts: Sequence[Tensor], config: Config) -> Tensor:
    return torch.cat(list(parts), -2)


def _neighbours(parts: Sequence[Tensor], config: Config) -> Tensor:
    """Gates and ups [E, I, ...] as [E, ..., 2I], one beside the other."""
    both = torch.stack(list(parts), 2).flatten(1, 2)
    return both.transpose(1, 2) if both.dim() == 3 else both


def _halves(heads: str) -> Callable[[Sequence[Tensor], Config], Tensor]:
    """llama.cpp interleaves each head's rotary pairs (0, 1), (2, 3), …; Hugging Face keeps halves."""

    def make(parts: Sequence[Tensor], config: Config) -> Tensor:
        whole = parts[0]
        return whole.unflatten(0, (config[heads], -1, 2)).transpose(1, 2).reshape(whole.shape)

    return make


def _grouped(parts: Sequence[Tensor], config: Config) -> Tensor:
    """All queries, keys, values → one key-value head after another, each after its queries."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    both = parts[0].unflatten(0, (heads + 2 * kv_heads, -1))
    queries = both[:heads].unflatten(0, (kv_heads, -1))
    keys, values = both[heads:].unflatten(0, (2, kv_heads))
    return torch.cat((queries, keys[:, None], values[:, None]), 1).flatten(0, 2)


def keys_and_values(parts: Sequence[Tensor], config: Config) -> Tensor:
    """Keys' [heads, rank, plain] and values' [heads, value, rank] → [heads * (plain + value), rank]."""
    keys, values = parts
    return torch.cat((keys.transpose(1, 2), values), 1).flatten(0, 1)


def _taps(parts: Sequence[Tensor], config: Config) -> Tensor:
    """A depthwise convolution's [channels, taps] as [channels, 1, taps]."""
    return parts[0][:, None]


def _logarithm(parts: Sequence[Tensor], config: Config) -> Tensor:
    """llama.cpp keeps -exp(A_log)."""
    return torch.log(-parts[0]).flatten()


def _untiled(
    dim: int = 0, *, wide: bool = False, after_keys: bool = False
) -> Callable[[Sequence[Tensor], Config], Tensor]:
    """llama.cpp has the first value head of each key head, then the second of each; Hugging Face keeps together those
    of a key head. `wide`: a head is not one number, but as many as its values; `after_keys`: queries and keys come
    first."""

    def make(parts: Sequence[Tensor], config: Config) -> Tensor:
        keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
        before = 2 * keys * config["linear_key_head_dim"] if after_keys else 0
        first, heads = parts[0].split([before, parts[0].shape[dim] - before], dim)
        width = config["linear_value_head_dim"] if wide else 1
        turned = heads.unflatten(dim, (values // keys, keys, width)).transpose(dim, dim + 1).flatten(dim, dim + 2)
        return torch.cat((first, turned), dim)

    return make


def _of_both(number: int) -> Callable[[Sequence[Tensor], Config], Tensor]:
    """Each key head's rates (0) or fadings (1), which follow one another."""

    def make(parts: Sequence[Tensor], config: Config) -> Tensor:
        keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
        return parts[0].unflatten(0, (keys, 2, values // keys))[:, number].flatten(0, 1)

    return make


def _chained(*makes: Callable[[Sequence[Tensor], Config], Tensor]) -> Callable[[Sequence[Tensor], Config], Tensor]:
    def make(parts: Sequence[Tensor], config: Config) -> Tensor:
        for one in makes:
            parts = [one(parts, config)]
        return parts[0]

    return make


_KINDS = ("weight", "bias")
INTERLEAVED = {
    f"self_attn.{short}_proj.{kind}": Made((f"attn_{short}.{kind}",), _halves(heads))
    for short, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"))
    for kind in _KINDS
}
STACKED_EXPERTS = {
    "block_sparse_moe.input_linear.weight": Made(("ffn_gate_exps.weight", "ffn_up_exps.weight"), _stacked_halves),
    "shared_mlp.input_linear.weight": Made(("ffn_gate_shexp.weight", "ffn_up_shexp.weight"), _stacked_halves),
}
GPT_OSS_EXPERTS = {
    "self_attn.sinks": Made(("attn_sinks.weight",), _same),
    "mlp.experts.gate_up_proj": Made(("ffn_gate_exps.weight", "ffn_up_exps.weight"), _neighbours),
    "mlp.experts.gate_up_proj_bias": Made(("ffn_gate_exps.bias", "ffn_up_exps.bias"), _neighbours),
    "mlp.experts.down_proj": Made(("ffn_down_exps.weight",), transposed),
    "mlp.experts.down_proj_bias": Made(("ffn_down_exps.bias",), _same),
}


def grouped_qkv(name: str) -> dict[str, Made]:
    return {f"{name}.{kind}": Made((f"attn_qkv.{kind}",), _grouped) for kind in _KINDS}


def correction(name: str) -> dict[str, Made]:
    return {name: Made(("exp_probs_b.bias",), _flat)}


LFM2 = {
    "token_embd_norm": "model.embedding_norm",
    "attn_norm": "operator_norm",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
    "ffn_gate_inp": "feed_forward.gate",
    "ffn_gate_exps": "feed_forward.experts.*.w1",
    "ffn_up_exps": "feed_forward.experts.*.w3",
    "ffn_down_exps": "feed_forward.experts.*.w2",
}
LFM2_CONVOLUTION = {"conv.conv.weight": Made(("shortconv.conv.weight",), _taps)}
QWEN3_NEXT = (
    NORM_BETWEEN | SHARED_EXPERT | {"attn_qkv": "linear_attn.in_proj_qkv", "attn_gate": "linear_attn.in_proj_z"}
)
_DELTA_NET = {
    "linear_attn.norm.weight": Made(("ssm_norm.weight",), _same),  # the one norm without 1 added
    "mlp.shared_expert_gate.weight": Made(("ffn_gate_inp_shexp.weight",), as_row),
}
DELTA_NET = _DELTA_NET | {
    "linear_attn.A_log": Made(("ssm_a",), _logarithm),
    "linear_attn.dt_bias": Made(("ssm_dt.bias",), _same),
    "linear_attn.conv1d.weight": Made(("ssm_conv1d.weight",), _taps),
    "linear_attn.out_proj.weight": Made(("ssm_out.weight",), _same),
    "linear_attn.in_proj_b.weight": Made(("ssm_ba.weight",), _of_both(0)),
    "linear_attn.in_proj_a.weight": Made(("ssm_ba.weight",), _of_both(1)),
}
TILED_DELTA_NET = _DELTA_NET | {
    "linear_attn.A_log": Made(("ssm_a",), _chained(_logarithm, _untiled())),
    "linear_attn.dt_bias": Made(("ssm_dt.bias",), _untiled()),
    "linear_attn.conv1d.weight": Made(("ssm_conv1d.weight",), _chained(_untiled(wide=True, after_keys=True), _taps)),
    "linear_attn.out_proj.weight": Made(("ssm_out.weight",), _untiled(1, wide=True)),
    "linear_attn.in_proj_qkv.weight": Made(("attn_qkv.weight",), _untiled(wide=True, after_keys=True)),
    "linear_attn.in_proj_z.weight": Made(("attn_gate.weight",), _untiled(wide=True)),
    "linear_attn.in_proj_b.weight": Made(("ssm_beta.weight",), _untiled()),
    "linear_attn.in_proj_a.weight": Made(("ssm_alpha.weight",), _untiled()),
}
MAMBA2 = {
    "token_embd": "backbone.embeddings",
    "output_norm": "backbone.norm_f",
    "attn_norm": "norm",
    "ssm_in": "mixer.in_proj",
    "ssm_out": "mixer.out_proj",
    "ssm_conv1d": "mixer.conv1d",
}
GRANITE_SHARED = {"shared_mlp.input_linear.weight": Made(("ffn_gate.weight", "ffn_up.weight"), _stacked_halves)}
GRANITE_HYBRID = {
    "ffn_gate_inp": "block_sparse_moe.router.layer",
    "ffn_down_exps": "block_sparse_moe.output_linear",
    "ffn_down_shexp": "shared_mlp.output_linear",
    "ffn_down": "shared_mlp.output_linear",
    "ssm_in": "mamba.in_proj",
    "ssm_out": "mamba.out_proj",
    "ssm_conv1d": "mamba.conv1d",
}


def mamba(name: str) -> dict[str, Made]:
    """What is not a projection, of a Mamba-2 of that name."""
    return {
        f"{name}.A_log": Made(("ssm_a",), _logarithm),
        f"{name}.D": Made(("ssm_d",), _flat),
        f"{name}.dt_bias": Made(("ssm_dt.bias",), _same),
        f"{name}.norm.weight": Made(("ssm_norm.weight",), _flat),
        f"{name}.conv1d.weight": Made(("ssm_conv1d.weight",), _taps),
    }
