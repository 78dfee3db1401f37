"""DeepSeek V2, V3, R1, and Kimi K2: latent attention, a few of many experts chosen within groups."""

from typing import Any

from quire_engine.errors import ModelError
from quire_engine.layers.rotary import mscale
from quire_engine.models.base import base_spec, need, rotary_of
from quire_engine.spec import Config, DecoderSpec, ExpertsSpec, LatentSpec, MtpSpec


def experts_of(config: Config, **facts: Any) -> ExpertsSpec:
    """V3's router, which other families have too: sigmoids, and a bias that corrects the choice alone."""
    layers, every = config["num_hidden_layers"], config.get("moe_layer_freq", 1)  # which transformers does not know
    first, inner = config["first_k_dense_replace"], config["moe_intermediate_size"]
    values: dict[str, Any] = {
        "num_experts": need(config, "n_routed_experts"),
        "top_k": need(config, "num_experts_per_tok"),
        "intermediate_size": inner,
        "score": "sigmoid",
        "renormalize": bool(config["norm_topk_prob"]),
        "scale": config["routed_scaling_factor"],
        "groups": config["n_group"] or 1,
        "top_groups": config["topk_group"] or 1,
        "correction_bias": "gate.e_score_correction_bias",
        "shared_size": inner * (config["n_shared_experts"] or 0),
        "dense_layers": frozenset(i for i in range(layers) if i < first or i % every),
    }
    return ExpertsSpec(**(values | facts))


def mtp_of(config: Config) -> MtpSpec | None:
    """V3's layer behind the last one, which other families have too."""
    layers = config["num_hidden_layers"]
    if not config.get("num_nextn_predict_layers"):
        return None
    return MtpSpec(
        layers="model.layers",
        layer=layers,
        at=f"model.layers.{layers}",
        embedding_norm="enorm",
        hidden_norm="hnorm",
        projection="eh_proj",
        norm="shared_head.norm",
        embedding="embed_tokens",
        head="shared_head.head",
    )


def deepseek_v2(config: Config) -> DecoderSpec:
    """Softmax scores; a group's is its best expert's (`topk_method` group_limited_greedy)."""
    method = config["topk_method"]
    if method not in ("greedy", "group_limited_greedy"):
        raise ModelError(f"topk_method is {method!r}; served are greedy and group_limited_greedy")
    grouped = {} if method == "group_limited_greedy" else {"groups": 1, "top_groups": 1}
    return _spec(
        config,
        experts_of(config, score="softmax", renormalize=False, correction_bias="", group_score="max", **grouped),
    )


def deepseek_v3(config: Config) -> DecoderSpec:
    """A group's score is the sum of its two best experts'."""
    if not config["rope_interleave"]:
        raise ModelError("rope_interleave is false; DeepSeek-V3 is served with neighbours that turn together")
    return _spec(config, experts_of(config))


def _spec(config: Config, experts: ExpertsSpec) -> DecoderSpec:
    plain, rotated = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    rope = rotary_of(config, rotated, interleaved=True)
    scale = None
    if rope.kind != "default" and rope.scaling.get("mscale_all_dim"):
        scale = (plain + rotated) ** -0.5 * mscale(rope.scaling["factor"], rope.scaling["mscale_all_dim"]) ** 2
    bias = bool(config["attention_bias"])
    return base_spec(
        config,
        head_dim=plain + rotated,
        rope=rope,
        attention_scale=scale,
        qkv_bias=bias,
        output_bias=bias,
        latent=LatentSpec(
            rank=config["kv_lora_rank"],
            query_rank=config["q_lora_rank"] or 0,
            plain=plain,
            rotated=rotated,
            value=config["v_head_dim"],
        ),
        experts=experts,
        extra_layers=int(config.get("num_nextn_predict_layers") or 0),
        mtp=mtp_of(config),
    )
