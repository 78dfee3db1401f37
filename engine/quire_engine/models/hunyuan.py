"""Hunyuan dense: queries and keys are normed after they have turned."""

import dataclasses

from quire_kernels.norm import Norm

from quire_engine.models import llama
from quire_engine.models.base import head_dim_of
from quire_engine.spec import Config, DecoderSpec, QKNorm


def spec(config: Config) -> DecoderSpec:
    """rope_type "dynamic" with `alpha` raises the base once and for all."""
    given = config["rope_parameters"]
    if given["rope_type"] == "dynamic" and given.get("alpha"):
        head_dim = head_dim_of(config)
        theta = given["rope_theta"] * given["alpha"] ** (head_dim / (head_dim - 2))
        given = {"rope_type": "default", "rope_theta": theta}
    base = llama.spec({**config, "rope_parameters": given})
    return dataclasses.replace(
        base,
        names=dataclasses.replace(base.names, q_norm="query_layernorm", k_norm="key_layernorm"),
        qk_norm=QKNorm(norm=Norm(config["rms_norm_eps"]), after_rope=True),
    )
