"""Mamba-2 alone, and beside attention: Bamba, Granite 4, Nemotron-H."""

import dataclasses
import math
from typing import Any

from quire_kernels.norm import Norm

from quire_engine.errors import ModelError
from quire_engine.models import granite as granite_family
from quire_engine.models import llama
from quire_engine.models.base import activation_of, base_spec, check_convolutions, head_dim_of, rotary_of
from quire_engine.spec import Config, DecoderSpec, MambaSpec, Names

_BACKBONE = Names(
    embedding="backbone.embeddings",
    layers="backbone.layers",
    norm="backbone.norm_f",
    attention="mixer",
    recurrent="mixer",
    mlp="mixer",
    gate="",
    attention_norm="norm",
    mlp_norm="norm",
)


def _mamba(config: Config) -> MambaSpec:
    """Of Bamba's fields."""
    check_convolutions(config)
    return MambaSpec(
        heads=config["mamba_n_heads"],
        head_dim=config["mamba_d_head"],
        groups=config["mamba_n_groups"],
        state=config["mamba_d_state"],
        taps=config["mamba_d_conv"],
        conv_bias=bool(config["mamba_conv_bias"]),
        bias=bool(config["mamba_proj_bias"]),
        limits=_limits(config),
    )


def _limits(config: Config) -> tuple[float, float]:
    low, high = config["time_step_limit"] or (0.0, math.inf)
    return float(low), float(high)


def bamba(config: Config) -> DecoderSpec:
    """Half of a head rotates."""
    return dataclasses.replace(
        llama.spec(config),
        names=Names(norm="model.final_layernorm", recurrent="mamba", mlp="feed_forward", mlp_norm="pre_ff_layernorm"),
        rope=rotary_of(config, head_dim_of(config), partial=True),
        recurrent=_mamba(config),
        recurrent_layers=frozenset(range(config["num_hidden_layers"])) - frozenset(config["attn_layer_indices"] or ()),
    )


def granite_hybrid(config: Config) -> DecoderSpec:
    """Attention without positions in the published models. Without experts the shared one is all there is."""
    kinds = config["layer_types"]
    recurrent: dict[str, Any] = {
        "recurrent": _mamba(config),
        "recurrent_layers": frozenset(i for i, kind in enumerate(kinds) if kind in ("mamba", "linear_attention")),
    }
    if config["position_embedding_type"] != "rope":
        recurrent["rope"] = None
    if config["num_local_experts"]:
        base = granite_family.granite_moe(config)
    else:
        base = granite_family.granite({**config, "intermediate_size": config["shared_intermediate_size"]})
        names = dataclasses.replace(base.names, mlp="shared_mlp", gate="input_linear", up="input_linear")
        base = dataclasses.replace(base, names=dataclasses.replace(names, down="output_linear"))
    return dataclasses.replace(base, names=dataclasses.replace(base.names, recurrent="mamba"), **recurrent)


def nemotron_h(config: Config) -> DecoderSpec:
    """Each layer is one of three: Mamba, attention without positions, or a feed-forward without a gate."""
    kinds = config["layers_block_type"]
    if "moe" in kinds:
        raise ModelError("layers_block_type has moe, whose experts have no gate; served are Nemotron-H without experts")
    check_convolutions(config, "mamba_hidden_act")
    layers = range(len(kinds))
    return base_spec(
        {**config, "num_hidden_layers": len(kinds)},
        names=_BACKBONE,
        norm=Norm(config["layer_norm_epsilon"]),
        rope=None,
        activation=activation_of(config, "mlp_hidden_act"),
        output_bias=False,
        mlp_bias=bool(config["mlp_bias"]),
        recurrent=MambaSpec(
            heads=config["mamba_num_heads"],
            head_dim=config["mamba_head_dim"],
            groups=config["n_groups"],
            state=config["ssm_state_size"],
            taps=config["conv_kernel"],
            conv_bias=bool(config["use_conv_bias"]),
            bias=bool(config["mamba_proj_bias"]),
            limits=_limits(config),
        ),
        recurrent_layers=frozenset(i for i in layers if kinds[i] == "linear_attention"),
        without_mixer=frozenset(i for i in layers if kinds[i] == "mlp"),
        without_mlp=frozenset(i for i in layers if kinds[i] != "mlp"),
    )


def mamba2(config: Config) -> DecoderSpec:
    """The context has no bound of its own."""
    check_convolutions(config)
    layers, heads = range(config["num_hidden_layers"]), config["num_heads"]
    head_dim = config["head_dim"]
    return DecoderSpec(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=heads * head_dim,
        num_layers=len(layers),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        max_position=config.get("max_position_embeddings") or 1 << 18,
        tie_embeddings=bool(config["tie_word_embeddings"]),
        names=_BACKBONE,
        norm=Norm(config["layer_norm_epsilon"]),
        recurrent=MambaSpec(
            heads=heads,
            head_dim=head_dim,
            groups=config["n_groups"],
            state=config["state_size"],
            taps=config["conv_kernel"],
            conv_bias=bool(config["use_conv_bias"]),
            bias=bool(config["use_bias"]),
            limits=_limits(config),
        ),
        recurrent_layers=frozenset(layers),
        without_mlp=frozenset(layers),
    )
