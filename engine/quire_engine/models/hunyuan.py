"""Hunyuan dense: queries and keys are normed after they have turned."""

import dataclasses

from quire_kernels.norm import Norm

from quire_engine.errors import ModelError
from quire_engine.models import llama
from quire_engine.spec import Config, DecoderSpec, QKNorm


def spec(config: Config) -> DecoderSpec:
    """rope_type "dynamic" with `alpha` raises the base once and for all."""
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if given.get("rope_type", given.get("type")) == "dynamic":
        if not given.get("alpha"):
            raise ModelError("rope_scaling is dynamic and has no alpha; served is dynamic with alpha")
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        theta = given.get("rope_theta") or config.get("rope_theta", 10000.0)
        given = {"rope_type": "default", "rope_theta": theta * given["alpha"] ** (head_dim / (head_dim - 2))}
    base = llama.spec({**config, "rope_parameters": given})
    return dataclasses.replace(
        base,
        names=dataclasses.replace(base.names, q_norm="query_layernorm", k_norm="key_layernorm"),
        qk_norm=QKNorm(norm=Norm(config.get("rms_norm_eps", 1e-5)), after_rope=True),
    )
