"""BERT and RoBERTa (XLM-RoBERTa too): encoders that see the whole text, for embeddings and reranking."""

import dataclasses

from quire_kernels.norm import Norm

from quire_engine.errors import ModelError
from quire_engine.models.base import base_spec, need
from quire_engine.spec import Config, DecoderSpec, Names

_NAMES = Names(
    embedding="bert.embeddings.word_embeddings",
    positions="bert.embeddings.position_embeddings",
    segments="bert.embeddings.token_type_embeddings",
    embedding_norm="bert.embeddings.LayerNorm",
    layers="bert.encoder.layer",
    norm="",
    head="",
    attention="attention",
    q="self.query",
    k="self.key",
    v="self.value",
    output="output.dense",
    mlp="",
    gate="",
    up="intermediate.dense",
    down="output.dense",
    attention_norm="attention.output.LayerNorm",
    mlp_norm="output.LayerNorm",
    classifier=("bert.pooler.dense", "classifier"),
)


def bert(config: Config) -> DecoderSpec:
    """Norms come after the sums; a pair's second text has embeddings of its own."""
    return _spec(config, _NAMES, config["max_position_embeddings"], 0)


def roberta(config: Config) -> DecoderSpec:
    """Positions begin after the padding token's id."""
    offset = need(config, "pad_token_id") + 1
    names = dataclasses.replace(
        _NAMES,
        embedding="roberta.embeddings.word_embeddings",
        positions="roberta.embeddings.position_embeddings",
        segments="roberta.embeddings.token_type_embeddings",
        embedding_norm="roberta.embeddings.LayerNorm",
        layers="roberta.encoder.layer",
        classifier=("classifier.dense", "classifier.out_proj"),
    )
    return _spec(config, names, config["max_position_embeddings"] - offset, offset)


def _spec(config: Config, names: Names, context: int, offset: int) -> DecoderSpec:
    kind = config.get("position_embedding_type", "absolute")  # of older versions of transformers
    if kind != "absolute":
        raise ModelError(f"position_embedding_type is {kind!r}; served is absolute")
    return base_spec(
        config,
        names=names,
        norm=Norm(config["layer_norm_eps"], "layer"),
        norm_bias=True,
        norm_last=True,
        num_kv_heads=config["num_attention_heads"],
        rope=None,
        bidirectional=True,
        max_position=context,
        position_offset=offset,
        num_segments=config["type_vocab_size"],
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        classifier_bias=True,
        ignored=(".position_ids", "pooler.dense.weight", "pooler.dense.bias"),
    )
