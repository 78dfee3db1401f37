"""What completions and chat completions share: the way from a body to an answer, whole or as a stream of events."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import orjson
from quire_engine.errors import InvalidParameter
from quire_engine.step import TokenLogprobs
from quire_engine.text.params import SamplingParams, TokenSampling
from starlette.requests import Request
from starlette.responses import Response

from quire_cluster.gateway.encoding import in_pieces
from quire_cluster.gateway.events import EventStream, stream_error, while_connected
from quire_cluster.gateway.generation import Call, Delta, Generation, all_admitted
from quire_cluster.gateway.governed import leave
from quire_cluster.gateway.images import NO_IMAGES
from quire_cluster.gateway.service import Service
from quire_cluster.governance.checks.policing import results
from quire_cluster.governance.identity import calling
from quire_cluster.governance.limits import Permit

_TOKENS, _SCORED = 4096, 128  # of an answer that is written on the event loop: without and with log-probabilities


class Endpoint(ABC):
    """Starts, follows, and ends the generations of one HTTP request."""

    route: str

    def __init__(self, service: Service, body: Any, request: Request) -> None:
        self._service = service
        self._body = body
        self._request = request
        self._caller = calling()
        self._generations: list[Generation] = []
        self._created = int(time.time())
        self._model = body.model or service.names[0]
        self._params: SamplingParams
        self._seen = NO_IMAGES  # of a conversation
        self._permit: Permit | None = None
        self._check = service.input_check()
        self._done = False

    # ---- what differs ---------------------------------------------------------------------------------------------

    @abstractmethod
    async def _prompts(self) -> list[list[int]]: ...

    async def _sampling(self, prompts: list[list[int]]) -> TokenSampling:
        return await self._service.sampling(self._params)

    @abstractmethod
    def _envelope(self, *, chunk: bool) -> dict[str, Any]: ...

    @abstractmethod
    def _chunk_choice(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """None: there is nothing to tell yet."""

    @abstractmethod
    def _opening(self, generation: Generation, index: int) -> dict[str, Any] | None: ...

    @abstractmethod
    def _whole_choice(self, index: int, generation: Generation, parts: list[Delta]) -> dict[str, Any]: ...

    # ---- the way through ------------------------------------------------------------------------------------------

    async def respond(self) -> Response:
        """Raises RequestError or ServerError for whatever goes wrong before the first byte."""
        self._service.check_generates()
        self._params = self._body.sampling()
        prompts = await self._prompts()
        if self._body.stream and self._params.prompt_logprobs is not None:
            raise InvalidParameter("log-probabilities of the prompt are not streamed; set stream = false", "stream")
        sampling = await while_connected(self._request, self._sampling(prompts))
        if sampling is None:
            return Response(status_code=499)
        try:
            self._permit = await self._service.admit(self._caller, prompts, self._params)
            for number, prompt in enumerate(prompts):
                self._generations.append(self._start(prompt, sampling, number if len(prompts) > 1 else None))
                if self._body.return_token_ids and self._generations[-1].checks:
                    raise InvalidParameter(
                        "answers are under a policy here, and return_token_ids would tell their tokens; leave it out",
                        "return_token_ids",
                    )
                await asyncio.sleep(0)  # between many prompts others get on
            answer = self._stream() if self._body.stream else self._whole()
            response = await while_connected(self._request, answer)
            if response is None:
                self._end()
                return Response(status_code=499)
            if self._permit is not None:
                response.headers.update(self._permit.headers)
            return response
        except BaseException:
            self._end()
            raise

    def _start(self, prompt: list[int], sampling: TokenSampling, number: int | None) -> Generation:
        body = self._body
        request_id = body.request_id
        if request_id is not None and number is not None:
            request_id = f"{request_id}-{number}"
        return self._service.start(
            prompt,
            sampling,
            Call(
                route=self.route,
                caller=self._caller,
                user=body.user,
                request_id=request_id,
                priority=body.priority,
                cache_salt=body.cache_salt,
                verdicts=self._check.verdicts if self._check is not None else (),
                longest_answer=self._permit.longest_answer if self._permit is not None else None,
            ),
            seen=self._seen,
        )

    def _end(self) -> None:
        if not self._done:
            self._done = True
            for generation in self._generations:
                self._service.finished(generation)
            leave(self._permit, self._generations)

    async def _stream(self) -> Response:
        """Its headers are sent once replicas have taken everything in: a refusal still gets its HTTP status."""
        await all_admitted(self._generations)
        return EventStream(self._events(), self._end)

    async def _whole(self) -> Response:
        choices = await self._collect()
        self._end()
        content = self._envelope(chunk=False) | {"choices": choices, "usage": self._usage()}
        return Response(orjson.dumps(content), media_type="application/json")

    async def _collect(self) -> list[dict[str, Any]]:
        parts: list[list[list[Delta]]] = [[[] for _ in generation.choices] for generation in self._generations]
        async with aclosing(self._all_deltas()) as all_deltas:
            async for number, delta in all_deltas:
                if delta.error is not None:
                    raise delta.error
                parts[number][delta.index].append(delta)
        choices: list[dict[str, Any]] = []
        for generation, of_choices in zip(self._generations, parts, strict=True):
            choices += await self._whole_choices(len(choices), generation, of_choices)
            await asyncio.sleep(0)
        return choices

    async def _whole_choices(
        self, first: int, generation: Generation, parts: list[list[Delta]]
    ) -> list[dict[str, Any]]:
        """Of one prompt, off the event loop where there is much to write."""

        def work() -> list[dict[str, Any]]:
            return [
                in_pieces(self._whole_choice(first + number, generation, part) | self._verdicts(generation, number))
                for number, part in enumerate(parts)
            ]

        scored = self._params.prompt_logprobs is not None or self._params.logprobs is not None
        prompt = len(generation.facts.prompt) if scored or self._body.echo or self._body.return_token_ids else 0
        tokens = prompt * len(parts) + generation.num_output_tokens
        return await asyncio.to_thread(work) if tokens > (_SCORED if scored else _TOKENS) else work()

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
                    place = number * per_prompt + index
                    if self._body.echo and len(generation.facts.prompt) > _TOKENS:
                        opening = await asyncio.to_thread(self._opening, generation, place)
                    else:
                        opening = self._opening(generation, place)
                    if opening is not None:
                        yield event(opening)
            async for number, delta in self._all_deltas():
                if delta.error is not None:
                    yield b"data: " + orjson.dumps(stream_error(delta.error)) + b"\n\n"
                    return
                choice = self._chunk_choice(number * per_prompt + delta.index, delta)
                if choice is not None:
                    if delta.finish_reason is not None:
                        choice |= self._verdicts(self._generations[number], delta.index)
                    yield event(choice)
            if usage:
                yield (b"data: " + envelope + b',"choices":[],"usage":' + orjson.dumps(self._usage()) + b"}\n\n")
            yield b"data: [DONE]\n\n"
        finally:
            self._end()

    async def _all_deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
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
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": cached}
            | ({"image_tokens": self._seen.num_tokens} if self._service.images is not None else {}),
        }
        return usage | self._usage_details()

    def _usage_details(self) -> dict[str, Any]:
        return {}

    def _verdicts(self, generation: Generation, index: int) -> dict[str, Any]:
        """What policies found of a choice, by its place among those of its prompt: nothing, where nothing was."""
        found = generation.verdicts(index)
        return {"content_filter_results": results(found)} if found else {}

    def _token(self, token: int, *, begins: bool = False) -> str:
        return self._service.tokenizer.token_text(token, begins=begins)


def joined(parts: list[Delta]) -> tuple[str, list[int], list[int], list[TokenLogprobs]]:
    """Of a choice: its content, its token ids, the characters before each of them, and their scores."""
    return (
        "".join(part.text for part in parts),
        [token for part in parts for token in part.token_ids],
        [offset for part in parts for offset in part.offsets],
        [scores for part in parts for scores in part.logprobs],
    )


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
