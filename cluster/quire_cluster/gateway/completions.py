"""OpenAI's completions and chat completions: from a request's body to its answer, at once or as a stream of events."""

import asyncio
import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import Any

import orjson
from quire_engine.errors import InvalidParameter, QuireError, RequestError
from quire_engine.execution.plan import TokenLogprobs
from quire_engine.text.params import SamplingParams
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quire_cluster.gateway.generation import Delta, Generation
from quire_cluster.gateway.schema import ChatCompletionRequest, CompletionRequest
from quire_cluster.gateway.service import Service

MAX_PROMPTS = 256
MAX_ANSWERS = 1024  # of one call: prompts times n
_REFUSAL_PATIENCE = 0.2  # seconds a stream's headers wait, so that a refusal still gets its HTTP status


class EventStream(Response):
    """Server-sent events. The client's going away cancels the iteration, whose `finally` aborts the work."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-cache"
        self.headers["X-Accel-Buffering"] = "no"
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI wants it."""
        writer = asyncio.ensure_future(self._write(send))
        watcher = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait((writer, watcher), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watcher.cancel()
            writer.cancel()
            with suppress(asyncio.CancelledError, OSError):
                await writer

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._events.aclose()


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class _Endpoint(ABC):
    """What both kinds share: start, follow, and end the generations of one HTTP request."""

    route: str

    def __init__(self, service: Service, body: Any, request: Request) -> None:
        self._service = service
        self._body = body
        self._request = request
        self._generations: list[Generation] = []
        self._created = int(time.time())
        self._model = body.model or service.names[0]
        self._params: SamplingParams
        self._done = False

    # ---- what differs ---------------------------------------------------------------------------------------------

    @abstractmethod
    async def _prompts(self) -> list[list[int]]: ...

    @abstractmethod
    def _envelope(self, *, chunk: bool) -> dict[str, Any]: ...

    @abstractmethod
    def _chunk_choice(self, index: int, delta: Delta) -> dict[str, Any]: ...

    @abstractmethod
    def _opening(self, generation: Generation, index: int) -> dict[str, Any] | None: ...

    @abstractmethod
    def _whole_choice(self, index: int, generation: Generation, parts: list[Delta]) -> dict[str, Any]: ...

    # ---- the way through ------------------------------------------------------------------------------------------

    async def respond(self) -> Response:
        """Raises RequestError or ServerError for whatever goes wrong before the first byte."""
        self._service.check_model(self._body.model)
        self._service.check_generates()
        self._params = self._body.sampling()
        prompts = await self._prompts()
        if self._body.stream and self._params.prompt_logprobs is not None:
            raise InvalidParameter("log-probabilities of the prompt are not streamed; set stream = false", "stream")
        try:
            for number, prompt in enumerate(prompts):
                self._generations.append(self._start(prompt, number if len(prompts) > 1 else None))
            if self._body.stream:
                for generation in self._generations:
                    if (refused := await generation.refusal(_REFUSAL_PATIENCE)) is not None:
                        raise refused
                return EventStream(self._events())
            return await self._whole()
        except BaseException:
            self._end()
            raise

    def _start(self, prompt: list[int], number: int | None) -> Generation:
        body = self._body
        request_id = body.request_id
        if request_id is not None and number is not None:
            request_id = f"{request_id}-{number}"
        return self._service.start(
            prompt, self._params, priority=body.priority, cache_salt=body.cache_salt, request_id=request_id
        )

    def _end(self) -> None:
        if not self._done:
            self._done = True
            for generation in self._generations:
                self._service.finished(generation, route=self.route, user=self._body.user)

    async def _whole(self) -> Response:
        collected = asyncio.ensure_future(self._collect())
        watcher = asyncio.ensure_future(disconnected(self._request.receive))
        try:
            await asyncio.wait((collected, watcher), return_when=asyncio.FIRST_COMPLETED)
            if not collected.done():
                self._end()
                return Response(status_code=499)
            choices = collected.result()
        finally:
            watcher.cancel()
            collected.cancel()
            self._end()
        content = self._envelope(chunk=False) | {"choices": choices, "usage": self._usage()}
        return Response(orjson.dumps(content), media_type="application/json")

    async def _collect(self) -> list[dict[str, Any]]:
        choices: list[dict[str, Any]] = []
        for generation in self._generations:
            parts: list[list[Delta]] = [[] for _ in generation.choices]
            while deltas := await generation.deltas():
                for delta in deltas:
                    if delta.error is not None:
                        raise delta.error
                    parts[delta.index].append(delta)
            choices += [self._whole_choice(len(choices) + i, generation, part) for i, part in enumerate(parts)]
        return choices

    async def _events(self) -> AsyncGenerator[bytes, None]:
        """One event per delta. The envelope is encoded once; a token costs one small encoding."""
        envelope = orjson.dumps(self._envelope(chunk=True))[:-1]
        options = self._body.stream_options
        usage = options is not None and options.include_usage
        running = usage and options is not None and options.continuous_usage_stats
        per_prompt = self._params.n

        def event(choice: dict[str, Any]) -> bytes:
            tail = b',"usage":' + orjson.dumps(self._usage()) if running else b',"usage":null' if usage else b""
            return b"data: " + envelope + b',"choices":[' + orjson.dumps(choice) + b"]" + tail + b"}\n\n"

        try:
            for number, generation in enumerate(self._generations):
                for index in range(per_prompt):
                    opening = self._opening(generation, number * per_prompt + index)
                    if opening is not None:
                        yield event(opening)
            async for number, delta in self._all_deltas():
                if delta.error is not None:
                    yield b"data: " + orjson.dumps(stream_error(delta.error)) + b"\n\n"
                    return
                yield event(self._chunk_choice(number * per_prompt + delta.index, delta))
            if usage:
                yield (b"data: " + envelope + b',"choices":[],"usage":' + orjson.dumps(self._usage()) + b"}\n\n")
            yield b"data: [DONE]\n\n"
        finally:
            self._end()

    async def _all_deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Of every prompt, as they come."""
        if len(self._generations) == 1:
            while deltas := await self._generations[0].deltas():
                for delta in deltas:
                    yield 0, delta
            return
        queue: asyncio.Queue[tuple[int, list[Delta]]] = asyncio.Queue(len(self._generations))

        async def follow(number: int, generation: Generation) -> None:
            while deltas := await generation.deltas():
                await queue.put((number, deltas))
            await queue.put((number, []))

        tasks = [asyncio.ensure_future(follow(i, generation)) for i, generation in enumerate(self._generations)]
        try:
            left = len(tasks)
            while left:
                number, deltas = await queue.get()
                left -= not deltas
                for delta in deltas:
                    yield number, delta
        finally:
            for task in tasks:
                task.cancel()

    def _usage(self) -> dict[str, Any]:
        prompt = sum(len(generation.facts.prompt) for generation in self._generations)
        output = sum(generation.num_output_tokens for generation in self._generations)
        cached = sum(generation.cached_tokens for generation in self._generations)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _token(self, token: int) -> str:
        return self._service.tokenizer.token_text(token)


def stream_error(error: QuireError) -> dict[str, Any]:
    """An error after the first byte, as the SDKs expect it in a stream."""
    kind = "invalid_request_error" if isinstance(error, RequestError) else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": None, "code": type(error).__name__}}


def _joined(parts: list[Delta]) -> tuple[str, list[int], list[TokenLogprobs]]:
    return (
        "".join(part.text for part in parts),
        [token for part in parts for token in part.token_ids],
        [scores for part in parts for scores in part.logprobs],
    )


def _offsets(texts: list[str], start: int) -> list[int]:
    """Where each text begins when they follow one another from `start`; last, where they end."""
    return list(itertools.accumulate((len(text) for text in texts), initial=start))


class Completions(_Endpoint):
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
        text, tokens, scores = _joined(parts)
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


def prompt_logprobs(generation: Generation, token_text: Any) -> list[dict[str, Any] | None]:
    """One entry per prompt token: token id → its score; None for the first."""
    entries: list[dict[str, Any] | None] = [None]
    for part in generation.choices[0].prompt_logprobs:
        for at in range(len(part.chosen)):
            entry = {
                str(token): {"logprob": value, "rank": place + 1, "decoded_token": token_text(token)}
                for place, (token, value) in enumerate(
                    zip(part.top_ids[at].tolist(), part.top_logprobs[at].tolist(), strict=True)
                )
            }
            chosen = int(part.chosen[at])
            entry[str(chosen)] = {
                "logprob": float(part.logprobs[at]),
                "rank": int(part.ranks[at]),
                "decoded_token": token_text(chosen),
            }
            entries.append(entry)
    return entries


class ChatCompletions(_Endpoint):
    """POST /v1/chat/completions"""

    route = "/v1/chat/completions"
    _body: ChatCompletionRequest

    async def _prompts(self) -> list[list[int]]:
        body = self._body
        messages = [message.for_template() for message in body.messages]
        return [
            await self._service.render(
                messages,
                add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
                continue_final_message=body.continue_final_message,
                variables=body.chat_template_kwargs,
            )
        ]

    def _envelope(self, *, chunk: bool) -> dict[str, Any]:
        kind = "chat.completion.chunk" if chunk else "chat.completion"
        identity = f"chatcmpl-{self._generations[0].facts.request_id}"
        return {"id": identity, "object": kind, "created": self._created, "model": self._model}

    def _echo(self) -> str:
        last = self._body.messages[-1]
        if not self._body.echo:
            return ""
        return str(last.for_template().get("content", ""))

    def _opening(self, generation: Generation, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": self._echo()}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, tokens: list[int], scores: list[TokenLogprobs]) -> dict[str, Any] | None:
        if self._params.logprobs is None:
            return None
        return {
            "content": [self._one(token, score) for token, score in zip(tokens, scores, strict=True)],
            "refusal": None,
        }

    def _one(self, token: int, score: TokenLogprobs) -> dict[str, Any]:
        def entry(token: int, value: float) -> dict[str, Any]:
            text = self._token(token)
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        pairs = zip(score.top_ids[0].tolist(), score.top_logprobs[0].tolist(), strict=True)
        return entry(token, float(score.logprobs[0])) | {"top_logprobs": [entry(t, v) for t, v in pairs]}

    def _chunk_choice(self, index: int, delta: Delta) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "delta": {"content": delta.text} if delta.text or not delta.finish_reason else {},
            "logprobs": self._logprobs(delta.token_ids, delta.logprobs),
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason:
            choice["stop_reason"] = delta.stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def _whole_choice(self, index: int, generation: Generation, parts: list[Delta]) -> dict[str, Any]:
        text, tokens, scores = _joined(parts)
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": self._echo() + text, "refusal": None},
            "logprobs": self._logprobs(tokens, scores),
            "finish_reason": parts[-1].finish_reason,
            "stop_reason": parts[-1].stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"], choice["prompt_token_ids"] = tokens, generation.facts.prompt
        if self._params.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(generation, self._token)
        return choice
