"""POST /v1/completions"""

from typing import Any, NamedTuple

from quire_engine.errors import InvalidParameter
from quire_engine.step import TokenLogprobs
from starlette.requests import Request

from quire_cluster.gateway.endpoint import Endpoint, joined, prompt_logprobs
from quire_cluster.gateway.generation import Delta, Generation
from quire_cluster.gateway.schema import CompletionRequest
from quire_cluster.gateway.service import Service

MAX_PROMPTS = 256
MAX_ANSWERS = 1024  # of one call: prompts times n


class _Echo(NamedTuple):
    """A prompt in front of its output."""

    text: str
    offsets: list[int]  # characters before each token
    first: int  # the place of the token that begins the text


class Completions(Endpoint):
    """POST /v1/completions"""

    route = "/v1/completions"
    _body: CompletionRequest

    def __init__(self, service: Service, body: CompletionRequest, request: Request) -> None:
        super().__init__(service, body, request)
        self._echoes: dict[int, _Echo] = {}  # by the prompt's place

    async def _prompts(self) -> list[list[int]]:
        given: Any = self._body.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not given:
            raise InvalidParameter("prompt is empty", "prompt")
        if len(given) > MAX_PROMPTS:
            raise InvalidParameter(f"prompt has {len(given)} entries; at most {MAX_PROMPTS} are allowed", "prompt")
        if len(given) * self._params.n > MAX_ANSWERS:
            raise InvalidParameter(
                f"{len(given)} prompts times n make more than {MAX_ANSWERS} answers; ask for fewer", "n"
            )
        if isinstance(given[0], str):
            return await self._service.tokenize_all(
                given, add_special_tokens=self._body.add_special_tokens, check=self._check
            )
        if self._check is not None:
            self._check.no_token_ids("prompt")
        return given

    def _envelope(self, *, chunk: bool) -> dict[str, Any]:
        identity = f"cmpl-{self._generations[0].facts.request_id}"
        return {"id": identity, "object": "text_completion", "created": self._created, "model": self._model}

    def _echo(self, index: int) -> _Echo:
        """Of the prompt of a choice. An unfinished character at its end is the output's to finish."""
        if not self._body.echo:
            return _Echo("", [], 0)
        place = index // self._params.n
        if place not in self._echoes:
            stream = self._service.tokenizer.stream(
                skip_special_tokens=self._params.skip_special_tokens,
                spaces_between_special_tokens=self._params.spaces_between_special_tokens,
            )
            pieces, offsets, first = [], [], 0
            for token in self._generations[place].facts.prompt:
                first += not stream.begun
                offsets.append(stream.length)
                pieces.append(stream.step(token))
            self._echoes[place] = _Echo("".join(pieces), offsets, first - 1)
        return self._echoes[place]

    def _opening(self, generation: Generation, index: int) -> dict[str, Any] | None:
        if not self._body.echo:
            return None
        return {"index": index, "text": self._echo(index).text, "logprobs": None, "finish_reason": None}

    def _logprobs(
        self, index: int, tokens: list[int], offsets: list[int], scores: list[TokenLogprobs]
    ) -> dict[str, Any] | None:
        if self._params.logprobs is None:
            return None
        before = len(self._echo(index).text)
        return {
            "tokens": [self._token(token) for token in tokens],
            "token_logprobs": [float(score.logprobs[0]) for score in scores],
            "top_logprobs": [self._top(score, 0) for score in scores],
            "text_offset": [before + offset for offset in offsets],
        }

    def _top(self, score: TokenLogprobs, position: int, *, begins: bool = False) -> dict[str, float]:
        """Two tokens of one text are one entry: the chosen one's, or the likelier one's."""
        top = {self._token(int(score.chosen[position]), begins=begins): float(score.logprobs[position])}
        for token, value in zip(score.top_ids[position].tolist(), score.top_logprobs[position].tolist(), strict=True):
            top.setdefault(self._token(token, begins=begins), value)
        return top

    def _chunk_choice(self, index: int, delta: Delta) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "text": delta.text,
            "logprobs": self._logprobs(index, delta.token_ids, delta.offsets, delta.logprobs),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def _whole_choice(self, index: int, generation: Generation, parts: list[Delta]) -> dict[str, Any]:
        text, tokens, offsets, scores = joined(parts)
        logprobs = self._logprobs(index, tokens, offsets, scores)
        if self._body.echo and logprobs is not None:
            of_prompt = self._prompt_logprobs(index, generation)
            logprobs = {name: of_prompt[name] + values for name, values in logprobs.items()}
        choice: dict[str, Any] = {
            "index": index,
            "text": self._echo(index).text + text,
            "logprobs": logprobs,
            "finish_reason": parts[-1].finish_reason,
            "stop_reason": parts[-1].stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"], choice["prompt_token_ids"] = tokens, generation.facts.prompt
        if self._params.prompt_logprobs is not None and not self._body.echo:
            choice["prompt_logprobs"] = prompt_logprobs(generation, self._token)
        return choice

    def _prompt_logprobs(self, index: int, generation: Generation) -> dict[str, list[Any]]:
        """Of an echoed prompt; its first token has none."""
        prompt, echo = generation.facts.prompt, self._echo(index)
        found = generation.choices[0].prompt_logprobs
        scores = [(part, at) for part in found for at in range(len(part.chosen))]
        tops = [self._top(part, at, begins=place == echo.first) for place, (part, at) in enumerate(scores, 1)]
        return {
            "tokens": [self._token(token, begins=place == echo.first) for place, token in enumerate(prompt)],
            "token_logprobs": [None] + [float(part.logprobs[at]) for part, at in scores],
            "top_logprobs": [None, *tops],
            "text_offset": echo.offsets,
        }
