"""MiniMax M2: a sigmoid router with a correction bias, queries and keys normed over their full width."""

from quire_kernels.norm import Norm

from quire_engine.models.base import base_spec, need, rotary_of
from quire_engine.spec import Config, DecoderSpec, ExpertsSpec, QKNorm


def spec(config: Config) -> DecoderSpec:
    """`rotary_dim` of a head turn."""
    head_dim = config.get("head_dim") or 128
    experts = ExpertsSpec(
        num_experts=need(config, "num_local_experts", "num_experts"),
        top_k=need(config, "num_experts_per_tok"),
        intermediate_size=need(config, "intermediate_size"),
        score="sigmoid",
        at="block_sparse_moe",
        correction_bias="e_score_correction_bias",
        gate="w1",
        up="w3",
        down="w2",
    )
    return base_spec(
        config,
        head_dim=head_dim,
        rope=rotary_of(config, head_dim, dim=config.get("rotary_dim")),
        qk_norm=QKNorm(norm=Norm(config.get("rms_norm_eps", 1e-6)), over="width"),
        experts=experts,
        extra_layers=config.get("num_mtp_modules") or 0,
    )
