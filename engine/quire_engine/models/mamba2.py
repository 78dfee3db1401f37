"""Mamba-2 alone, and beside attention: Bamba, Granite 4, Nemotron-H."""

import dataclasses
import math
from typing import Any

from quire_kernels.norm import Norm

from quire_engine.errors import ModelError
from quire_engine.models import granite as granite_family
from quire_engine.models import llama
from quire_engine.models.base import activation_of, base_spec, need, rotary_of
from quire_engine.spec import Config, DecoderSpec, MambaSpec, Names

_LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
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


def _mamba(config: Config, prefix: str = "mamba_") -> MambaSpec:
    """Of Bamba's fields."""
    return MambaSpec(
        heads=need(config, f"{prefix}n_heads"),
        head_dim=need(config, f"{prefix}d_head"),
        groups=config.get(f"{prefix}n_groups", 1),
        state=need(config, f"{prefix}d_state"),
        taps=config.get(f"{prefix}d_conv", 4),
        conv_bias=bool(config.get(f"{prefix}conv_bias", True)),
        bias=bool(config.get(f"{prefix}proj_bias", False)),
        limits=_limits(config),
    )


def _limits(config: Config) -> tuple[float, float]:
    """Infinity is an object in configs that transformers writes."""
    low, high = config.get("time_step_limit") or (0.0, math.inf)
    return float(low), math.inf if isinstance(high, dict) else float(high)


def bamba(config: Config) -> DecoderSpec:
    """Half of a head rotates."""
    head_dim = need(config, "hidden_size") // need(config, "num_attention_heads")
    attends = config.get("attn_layer_indices") or ()
    return dataclasses.replace(
        llama.spec(config),
        names=Names(norm="model.final_layernorm", recurrent="mamba", mlp="feed_forward", mlp_norm="pre_ff_layernorm"),
        rope=rotary_of(config, head_dim, fraction=0.5),
        recurrent=_mamba(config),
        recurrent_layers=frozenset(range(need(config, "num_hidden_layers"))) - frozenset(attends),
    )


def granite_hybrid(config: Config) -> DecoderSpec:
    """Attention without positions in the published models. Without experts the shared one is all there is."""
    kinds = config.get("layer_types") or config.get("layers_block_type") or []
    recurrent: dict[str, Any] = {
        "recurrent": _mamba(config),
        "recurrent_layers": frozenset(i for i, kind in enumerate(kinds) if kind in ("mamba", "linear_attention")),
    }
    if config.get("position_embedding_type") != "rope":
        recurrent["rope"] = None
    if config.get("num_local_experts"):
        base = granite_family.granite_moe(config)
    else:
        base = granite_family.granite({**config, "intermediate_size": need(config, "shared_intermediate_size")})
        names = dataclasses.replace(base.names, mlp="shared_mlp", gate="input_linear", up="input_linear")
        base = dataclasses.replace(base, names=dataclasses.replace(names, down="output_linear"))
    return dataclasses.replace(base, names=dataclasses.replace(base.names, recurrent="mamba"), **recurrent)


def nemotron_h(config: Config) -> DecoderSpec:
    """Each layer is one of three: Mamba, attention without positions, or a feed-forward without a gate."""
    kinds = config.get("layers_block_type") or [_LETTERS[c] for c in need(config, "hybrid_override_pattern")]
    if "moe" in kinds:
        raise ModelError("layers_block_type has moe, whose experts have no gate; served are Nemotron-H without experts")
    layers = range(len(kinds))
    return base_spec(
        {"num_hidden_layers": len(kinds), **config},
        names=_BACKBONE,
        norm=Norm(config.get("layer_norm_epsilon", 1e-5)),
        rope=None,
        activation=activation_of({"hidden_act": config.get("mlp_hidden_act", "relu2")}),
        output_bias=False,
        mlp_bias=bool(config.get("mlp_bias", False)),
        recurrent=MambaSpec(
            heads=need(config, "mamba_num_heads"),
            head_dim=need(config, "mamba_head_dim"),
            groups=config.get("n_groups", 8),
            state=need(config, "ssm_state_size"),
            taps=config.get("conv_kernel", 4),
            conv_bias=bool(config.get("use_conv_bias", True)),
            bias=bool(config.get("mamba_proj_bias", False)),
            limits=_limits(config),
        ),
        recurrent_layers=frozenset(i for i in layers if kinds[i] == "linear_attention"),
        without_mixer=frozenset(i for i in layers if kinds[i] == "mlp"),
        without_mlp=frozenset(i for i in layers if kinds[i] != "mlp"),
    )


def mamba2(config: Config) -> DecoderSpec:
    """The context has no bound of its own."""
    layers, heads = range(need(config, "num_hidden_layers")), need(config, "num_heads")
    head_dim = need(config, "head_dim")
    return DecoderSpec(
        vocab_size=need(config, "vocab_size"),
        hidden_size=need(config, "hidden_size"),
        intermediate_size=heads * head_dim,
        num_layers=len(layers),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        max_position=config.get("max_position_embeddings") or 1 << 18,
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        names=_BACKBONE,
        norm=Norm(config.get("layer_norm_epsilon", 1e-5)),
        recurrent=MambaSpec(
            heads=heads,
            head_dim=head_dim,
            groups=config.get("n_groups", 8),
            state=need(config, "state_size"),
            taps=config.get("conv_kernel", 4),
            conv_bias=bool(config.get("use_conv_bias", True)),
            bias=bool(config.get("use_bias", False)),
            limits=_limits(config),
        ),
        recurrent_layers=frozenset(layers),
        without_mlp=frozenset(layers),
    )
