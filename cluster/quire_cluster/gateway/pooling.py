"""Embeddings, scores and rankings: from a request's body to its answer."""

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from quire_engine.errors import InvalidParameter
from quire_engine.step import Floats

from quire_cluster.gateway.generation import Generation
from quire_cluster.gateway.schema import EmbeddingRequest, RerankRequest, ScoreRequest
from quire_cluster.gateway.service import Service

MAX_INPUTS = 2048
Text = str | list[int]


async def tokens_of(service: Service, inputs: Sequence[Text]) -> list[list[int]]:
    """Of texts, or of what is token ids already. Raises InvalidParameter for none, or too many."""
    if not 1 <= len(inputs) <= MAX_INPUTS:
        raise InvalidParameter(f"there are {len(inputs)} inputs; from 1 to {MAX_INPUTS} are taken at once", "input")
    return [
        await service.tokenize(text, add_special_tokens=True, parameter="input") if isinstance(text, str) else text
        for text in inputs
    ]


async def pooled(
    service: Service, prompts: list[list[int]], route: str, *, scores: bool, deadline: float = 0.0
) -> list[Floats]:
    """What the model gives for each prompt. The first failure ends all of them."""
    generations: list[Generation] = []
    try:
        generations.extend(service.pool(prompt, scores=scores, deadline=deadline) for prompt in prompts)
        return list(await asyncio.gather(*(generation.vector() for generation in generations)))
    finally:
        for generation in generations:
            service.finished(generation, route=route)


def shortened(vector: Floats, dimensions: int | None) -> Floats:
    """The first dimensions, at length 1 again (Matryoshka representations, Kusupati et al. 2022)."""
    if dimensions is None:
        return vector
    if not 1 <= dimensions <= len(vector):
        raise InvalidParameter(f"dimensions is {dimensions}; it must be from 1 to {len(vector)}", "dimensions")
    cut = vector[:dimensions]
    return cut / max(float(np.linalg.norm(cut)), 1e-12)


async def embeddings(service: Service, body: EmbeddingRequest) -> dict[str, Any]:
    """POST /v1/embeddings"""
    service.check_model(body.model)
    tokens = await tokens_of(service, body.inputs())
    data = []
    for index, vector in enumerate(await pooled(service, tokens, "/v1/embeddings", scores=False)):
        values = shortened(vector, body.dimensions).astype("<f4")
        shown: Any = values.tolist()
        if body.encoding_format == "base64":
            shown = base64.b64encode(values.tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": shown})
    return {"object": "list", "data": data, "model": body.model or service.names[0], "usage": _usage(tokens)}


async def score(service: Service, body: ScoreRequest) -> dict[str, Any]:
    """POST /v1/score: every text_1 with its text_2, or one text_1 with each of them."""
    service.check_model(body.model)
    firsts = [body.text_1] if isinstance(body.text_1, str) else body.text_1
    seconds = [body.text_2] if isinstance(body.text_2, str) else body.text_2
    if not firsts or len(firsts) not in (1, len(seconds)):
        raise InvalidParameter(f"text_1 has {len(firsts)} texts and text_2 {len(seconds)}", "text_1")
    pairs = list(zip(firsts * (len(seconds) // len(firsts)), seconds, strict=True))
    scores, usage = await _scores(service, pairs, "/v1/score")
    data = [{"object": "score", "index": index, "score": value} for index, value in enumerate(scores)]
    return {"object": "list", "data": data, "model": body.model or service.names[0], "usage": usage}


async def rerank(service: Service, body: RerankRequest) -> dict[str, Any]:
    """POST /v1/rerank: the documents, the most relevant first."""
    service.check_model(body.model)
    if body.top_n is not None and body.top_n < 1:
        raise InvalidParameter(f"top_n is {body.top_n}; it must be at least 1", "top_n")
    scores, usage = await _scores(service, [(body.query, document) for document in body.documents], "/v1/rerank")
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n]
    results: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in order]
    if body.return_documents:
        for result in results:
            result["document"] = {"text": body.documents[result["index"]]}
    return {"model": body.model or service.names[0], "results": results, "usage": usage}


async def _scores(service: Service, pairs: list[tuple[str, str]], route: str) -> tuple[list[float], dict[str, int]]:
    """A classifier's, or the cosine between two embeddings; and what was computed for them."""
    if not 1 <= len(pairs) <= MAX_INPUTS:
        raise InvalidParameter(f"there are {len(pairs)} pairs; from 1 to {MAX_INPUTS} are scored at once", "documents")
    if service.pooling is not None and service.pooling.scores:
        encode = service.tokenizer.encode_pair
        tokens = await asyncio.to_thread(lambda: [encode(*pair) for pair in pairs])
        values = await pooled(service, tokens, route, scores=True)
        return [float(value[0]) for value in values], _usage(tokens)
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    tokens = await tokens_of(service, texts)
    vectors = await pooled(service, tokens, route, scores=False)
    units = {text: vector / np.linalg.norm(vector) for text, vector in zip(texts, vectors, strict=True)}
    return [float(units[first] @ units[second]) for first, second in pairs], _usage(tokens)


def _usage(tokens: list[list[int]]) -> dict[str, int]:
    count = sum(len(one) for one in tokens)
    return {"prompt_tokens": count, "total_tokens": count}
