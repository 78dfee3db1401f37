"""POST /v1/completions"""

import itertools
from typing import Any

from quire_engine.errors import InvalidParameter
from quire_engine.step import TokenLogprobs
from quire_engine.text.params import SamplingParams
from starlette.requests import Request

from quire_cluster.gateway.endpoint import Endpoint, joined, prompt_logprobs
from quire_cluster.gateway.generation import Delta, Generation
from quire_cluster.gateway.schema import CompletionRequest
from quire_cluster.gateway.service import Service

MAX_PROMPTS = 256
MAX_ANSWERS = 1024  # of one call: prompts times n


def _offsets(texts: list[str], start: int) -> list[int]:
    """Where each text begins when they follow one another from `start`; last, where they end."""
    return list(itertools.accumulate((len(text) for text in texts), initial=start))


class Completions(Endpoint):
    """POST /v1/completions"""

    route = "/v1/completions"
    _body: CompletionRequest

    def __init__(self, service: Service, body: CompletionRequest, request: Request) -> None:
        super().__init__(service, body, request)
        self._shown: dict[int, int] = {}  # choice → characters of its tokens so far

    async def _prompts(self) -> list[list[int]]:
        given: Any = self._body.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not given:
            raise InvalidParameter("prompt is empty", "prompt")
        if len(given) > MAX_PROMPTS:
            raise InvalidParameter(f"prompt has {len(given)} entries; at most {MAX_PROMPTS} are allowed", "prompt")
        if self._body.echo and self._params.logprobs is not None:
            self._params = SamplingParams(**(vars(self._params) | {"prompt_logprobs": self._params.logprobs}))
        if len(given) * self._params.n > MAX_ANSWERS:
            raise InvalidParameter(
                f"{len(given)} prompts times n make more than {MAX_ANSWERS} answers; ask for fewer", "n"
            )
        special = self._body.add_special_tokens
        return [
            await self._service.tokenize(one, add_special_tokens=special) if isinstance(one, str) else list(one)
            for one in given
        ]

    def _envelope(self, *, chunk: bool) -> dict[str, Any]:
        identity = f"cmpl-{self._generations[0].facts.request_id}"
        return {"id": identity, "object": "text_completion", "created": self._created, "model": self._model}

    def _echo(self, generation: Generation) -> str:
        if not self._body.echo:
            return ""
        return self._service.tokenizer.decode(
            generation.facts.prompt, skip_special_tokens=self._params.skip_special_tokens
        )

    def _opening(self, generation: Generation, index: int) -> dict[str, Any] | None:
        if not self._body.echo:
            return None
        return {"index": index, "text": self._echo(generation), "logprobs": None, "finish_reason": None}

    def _logprobs(self, index: int, tokens: list[int], scores: list[TokenLogprobs]) -> dict[str, Any] | None:
        if self._params.logprobs is None:
            return None
        texts = [self._token(token) for token in tokens]
        offsets = _offsets(texts, self._shown.get(index, 0))
        self._shown[index] = offsets.pop()
        return {
            "tokens": texts,
            "token_logprobs": [float(score.logprobs[0]) for score in scores],
            "top_logprobs": [self._top(score, 0) for score in scores],
            "text_offset": offsets,
        }

    def _top(self, score: TokenLogprobs, position: int) -> dict[str, float]:
        top = {self._token(int(score.chosen[position])): float(score.logprobs[position])}
        for token, value in zip(score.top_ids[position].tolist(), score.top_logprobs[position].tolist(), strict=True):
            top[self._token(token)] = value
        return top

    def _chunk_choice(self, index: int, delta: Delta) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "text": delta.text,
            "logprobs": self._logprobs(index, delta.token_ids, delta.logprobs),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def _whole_choice(self, index: int, generation: Generation, parts: list[Delta]) -> dict[str, Any]:
        text, tokens, scores = joined(parts)
        logprobs = self._logprobs(index, tokens, scores)
        if self._body.echo and logprobs is not None:
            logprobs = self._with_prompt(generation, tokens, scores)
        choice: dict[str, Any] = {
            "index": index,
            "text": self._echo(generation) + text,
            "logprobs": logprobs,
            "finish_reason": parts[-1].finish_reason,
            "stop_reason": parts[-1].stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"], choice["prompt_token_ids"] = tokens, generation.facts.prompt
        if self._params.prompt_logprobs is not None and not self._body.echo:
            choice["prompt_logprobs"] = prompt_logprobs(generation, self._token)
        return choice

    def _with_prompt(self, generation: Generation, tokens: list[int], scores: list[TokenLogprobs]) -> dict[str, Any]:
        """Log-probabilities of prompt and output together; the first token has none."""
        prompt = generation.facts.prompt
        found = generation.choices[0].prompt_logprobs
        before = [(part, at) for part in found for at in range(len(part.chosen))]
        everything = before + [(score, 0) for score in scores]
        texts = [self._token(token) for token in prompt + tokens]
        return {
            "tokens": texts,
            "token_logprobs": [None] + [float(score.logprobs[at]) for score, at in everything],
            "top_logprobs": [None] + [self._top(score, at) for score, at in everything],
            "text_offset": _offsets(texts, 0)[:-1],
        }
