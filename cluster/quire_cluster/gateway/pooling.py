"""Embeddings, scores and rankings: from a request's body to its answer."""

import asyncio
import base64
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
from quire_engine.errors import InvalidParameter
from quire_engine.step import Floats

from quire_cluster.gateway.generation import Call, Generation
from quire_cluster.gateway.governed import leave
from quire_cluster.gateway.schema import EmbeddingRequest, RerankRequest, ScoreRequest
from quire_cluster.gateway.service import Service
from quire_cluster.governance.callers import Caller
from quire_cluster.governance.checks.policing import InputCheck

MAX_INPUTS = 2048
Text = str | list[int]


def check_count(inputs: int) -> None:
    """Raises InvalidParameter for none, or too many."""
    if not 1 <= inputs <= MAX_INPUTS:
        raise InvalidParameter(f"there are {inputs} inputs; from 1 to {MAX_INPUTS} are taken at once", "input")


async def tokens_of(service: Service, inputs: Sequence[Text], check: InputCheck | None) -> list[list[int]]:
    """Of texts, or of what is token ids already. Raises InvalidParameter for none, or too many."""
    check_count(len(inputs))
    texts = [text for text in inputs if isinstance(text, str)]
    if check is not None and len(texts) < len(inputs):
        check.no_token_ids("input")
    found = iter(await service.tokenize_all(texts, parameter="input", check=check))
    return [next(found) if isinstance(text, str) else text for text in inputs]


async def pooled(service: Service, prompts: list[list[int]], call: Call, *, scores: bool) -> list[Floats]:
    """What the model gives for each prompt. The first failure ends all of them."""
    generations: list[Generation] = []
    permit = await service.admit(call.caller, prompts)
    try:
        generations.extend(service.pool(prompt, call, scores=scores) for prompt in prompts)
        return list(await asyncio.gather(*(generation.vector() for generation in generations)))
    finally:
        for generation in generations:
            service.finished(generation)
        leave(permit, generations)


def shortened(vector: Floats, dimensions: int | None) -> Floats:
    """The first dimensions, at length 1 again (Matryoshka representations, Kusupati et al. 2022)."""
    if dimensions is None:
        return vector
    if not 1 <= dimensions <= len(vector):
        raise InvalidParameter(f"dimensions is {dimensions}; it must be from 1 to {len(vector)}", "dimensions")
    cut = vector[:dimensions]
    return cut / max(float(np.linalg.norm(cut)), 1e-12)


async def embeddings(service: Service, body: EmbeddingRequest, caller: Caller) -> dict[str, Any]:
    """POST /v1/embeddings"""
    check = service.input_check()
    tokens = await tokens_of(service, body.inputs(), check)
    call = Call(route="/v1/embeddings", caller=caller, verdicts=check.verdicts if check is not None else ())
    vectors = await pooled(service, tokens, call, scores=False)
    data = await asyncio.to_thread(embedding_objects, vectors, body)
    return {"object": "list", "data": data, "model": body.model or service.names[0], "usage": usage(tokens)}


def embedding_objects(vectors: list[Floats], body: EmbeddingRequest) -> list[orjson.Fragment]:
    """The answer's `data`, encoded one by one, so that other threads run in between."""
    data = []
    for index, vector in enumerate(vectors):
        values = shortened(vector, body.dimensions).astype("<f4")
        shown: Any = base64.b64encode(values.tobytes()).decode() if body.encoding_format == "base64" else values
        one = {"object": "embedding", "index": index, "embedding": shown}
        data.append(orjson.Fragment(orjson.dumps(one, option=orjson.OPT_SERIALIZE_NUMPY)))
    return data


async def score(service: Service, body: ScoreRequest, caller: Caller) -> dict[str, Any]:
    """POST /v1/score"""
    values, counted = await _scores(service, score_pairs(body), Call(route="/v1/score", caller=caller))
    return score_answer(body.model or service.names[0], values, counted)


def score_pairs(body: ScoreRequest) -> list[tuple[str, str]]:
    """Every text_1 with its text_2, or one text_1 with each of them."""
    firsts = [body.text_1] if isinstance(body.text_1, str) else body.text_1
    seconds = [body.text_2] if isinstance(body.text_2, str) else body.text_2
    if not firsts or len(firsts) not in (1, len(seconds)):
        raise InvalidParameter(f"text_1 has {len(firsts)} texts and text_2 {len(seconds)}", "text_1")
    return list(zip(firsts * (len(seconds) // len(firsts)), seconds, strict=True))


def score_answer(model: str, values: list[float], counted: dict[str, int]) -> dict[str, Any]:
    """As the field writes it."""
    data = [{"object": "score", "index": index, "score": value} for index, value in enumerate(values)]
    return {"object": "list", "data": data, "model": model, "usage": counted}


async def rerank(service: Service, body: RerankRequest, caller: Caller) -> dict[str, Any]:
    """POST /v1/rerank, /v2/rerank and /rerank"""
    values, counted = await _scores(service, rerank_pairs(body), Call(route="/v1/rerank", caller=caller))
    return rerank_answer(body, body.model or service.names[0], values, counted)


def rerank_pairs(body: RerankRequest) -> list[tuple[str, str]]:
    """The query with each document."""
    if body.top_n is not None and body.top_n < 1:
        raise InvalidParameter(f"top_n is {body.top_n}; it must be at least 1", "top_n")
    return [(body.query, document) for document in body.documents]


def rerank_answer(body: RerankRequest, model: str, values: list[float], counted: dict[str, int]) -> dict[str, Any]:
    """The documents, the most relevant first, as clients of Jina's and Cohere's read them."""
    order = sorted(range(len(values)), key=lambda index: -values[index])[: body.top_n]
    results: list[dict[str, Any]] = [{"index": index, "relevance_score": values[index]} for index in order]
    if body.return_documents:
        for result in results:
            result["document"] = {"text": body.documents[result["index"]]}
    return {"id": f"rerank-{uuid.uuid4().hex}", "model": model, "results": results, "usage": counted}


async def _scores(service: Service, pairs: list[tuple[str, str]], call: Call) -> tuple[list[float], dict[str, int]]:
    """A classifier's, or the cosine between two embeddings; and what was computed for them."""
    check_pairs(len(pairs))
    check = service.input_check()
    if check is not None:
        pairs = [(await check.text(first), await check.text(second)) for first, second in pairs]
        call = replace(call, verdicts=check.verdicts)
    if service.pooling is not None and service.pooling.scores:
        tokens = await service.texts.pairs(pairs, context=service.max_model_len)
        values = await pooled(service, tokens, call, scores=True)
        return [float(value[0]) for value in values], usage(tokens)
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    tokens = await tokens_of(service, texts, None)
    vectors = await pooled(service, tokens, call, scores=False)
    return cosines(pairs, texts, vectors), usage(tokens)


def check_pairs(count: int) -> None:
    """Raises InvalidParameter for none, or too many."""
    if not 1 <= count <= MAX_INPUTS:
        raise InvalidParameter(f"there are {count} pairs; from 1 to {MAX_INPUTS} are scored at once", "documents")


def cosines(pairs: list[tuple[str, str]], texts: list[str], vectors: list[Floats]) -> list[float]:
    """Of each pair, from the vectors of its texts."""
    units = {text: vector / np.linalg.norm(vector) for text, vector in zip(texts, vectors, strict=True)}
    return [float(units[first] @ units[second]) for first, second in pairs]


def usage(tokens: list[list[int]]) -> dict[str, int]:
    """What was computed."""
    count = sum(len(one) for one in tokens)
    return {"prompt_tokens": count, "total_tokens": count}
