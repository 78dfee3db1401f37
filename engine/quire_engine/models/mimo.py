"""MiMo: Qwen2's shape, and a layer to predict a further token."""

import dataclasses

from quire_engine.models import qwen2
from quire_engine.spec import Config, DecoderSpec, MtpSpec

_MTP = MtpSpec(
    layers="model.mtp_layers",
    layer=0,
    at="model.mtp_layers.0",
    embedding_norm="token_layernorm",
    hidden_norm="hidden_layernorm",
    projection="input_proj",
    norm="final_layernorm",
    hidden_first=True,
)


def spec(config: Config) -> DecoderSpec:
    """Its own class adds nothing to Qwen2's but the number of those layers."""
    mtp = _MTP if config.get("num_nextn_predict_layers") else None
    return dataclasses.replace(qwen2.spec(config), extra_tensors=("model.mtp_layers.",), mtp=mtp)
