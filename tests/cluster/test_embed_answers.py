"""gRPC's Embed computes no vectors that its one answer could not hold."""

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from gateways import models_of
from quire_cluster.gateway.grpc_api import MAX_ANSWER, InferenceService
from quire_cluster.gateway.pooling import MAX_INPUTS
from quire_cluster.gateway.service import Service
from quire_cluster.observability.metrics import Metrics
from quire_engine.pooling import Pooling
from quire_engine.text.tokenizer import Tokenizer
from quire_protos.v1 import inference_pb2 as pb
from transformers import PreTrainedTokenizerFast
from vocabularies import KINDS


class Refused(Exception):
    """What the caller is told."""


class Context:
    """Of a call."""

    @staticmethod
    def time_remaining() -> None:
        return None

    @staticmethod
    async def abort(code: grpc.StatusCode, why: str) -> None:
        raise Refused(code, why)


def embed(size: int, count: int, **options: Any) -> str:
    """What is answered to `count` inputs by a model of vectors of `size` numbers that has no replica."""
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=KINDS["words"]))
    config = {"vocab_size": tokenizer.size, "hidden_size": size}
    files: Any = SimpleNamespace(digest="", config=config, generation_config={"eos_token_id": []})
    pooling = Pooling(kind="mean", normalize=True)
    service = Service(
        files, tokenizer, names=["m"], max_model_len=100, max_waiting=1, metrics=Metrics(), pooling=pooling
    )
    request = pb.EmbedRequest(inputs=[pb.EmbedInput(text="fox")] * count, **options)
    with pytest.raises(Refused) as refused:
        asyncio.run(InferenceService(models_of(service), 1.0).Embed(request, Context()))
    code, why = refused.value.args
    assert code is (grpc.StatusCode.UNAVAILABLE if "no replica" in why else grpc.StatusCode.INVALID_ARGUMENT)
    return str(why)


@pytest.mark.parametrize("size", [5000, 16_384, 100_000])
def test_as_many_vectors_as_an_answer_holds(size: int) -> None:
    why = embed(size, MAX_INPUTS)
    assert f"{MAX_INPUTS} vectors of {size} numbers are more than one answer holds" in why
    most = int(why.partition("send at most ")[2].split()[0])
    one = pb.Embedding(values=np.full(size, 0.5, np.float32))
    full = pb.EmbedResponse(embeddings=[one] * most, usage=pb.Usage(prompt_tokens=2**31 - 1)).ByteSize()
    assert 0.99 * MAX_ANSWER - one.ByteSize() < full <= MAX_ANSWER
    assert "no replica" in embed(size, most)
    assert "answer holds" in embed(size, most + 1)
    assert "no replica" in embed(size, MAX_INPUTS, dimensions=32), "shorter ones fit"


def test_vectors_of_usual_models_fit() -> None:
    assert "no replica" in embed(4000, MAX_INPUTS)
