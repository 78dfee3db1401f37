"""MiniMax M2: a sigmoid router with a correction bias, queries and keys normed over their full width."""

from quire_kernels.norm import Norm

from quire_engine.models.base import base_spec, rotary_of
from quire_engine.spec import Config, DecoderSpec, ExpertsSpec, QKNorm


def spec(config: Config) -> DecoderSpec:
    """`rotary_dim` of a head turn; older versions of transformers leave that field alone."""
    experts = ExpertsSpec(
        num_experts=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        intermediate_size=config["intermediate_size"],
        score="sigmoid",
        at="block_sparse_moe",
        correction_bias="e_score_correction_bias",
        gate="w1",
        up="w3",
        down="w2",
    )
    return base_spec(
        config,
        rope=rotary_of(config, config["head_dim"], dim=config.get("rotary_dim")),
        qk_norm=QKNorm(norm=Norm(config["rms_norm_eps"]), over="width"),
        experts=experts,
        extra_layers=int(config.get("num_mtp_modules") or 0),
    )
