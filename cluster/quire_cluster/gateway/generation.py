"""A client's request as the gateway holds it: one token log per choice, and the text that comes of it.

The log (prompt, emitted tokens, sampling parameters, seed) is all that a replica needs to go on where another stopped.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from quire_engine.errors import InvalidParameter, QuireError
from quire_engine.request import EngineSampling
from quire_engine.step import Floats, TokenLogprobs
from quire_engine.text.output import OutputText, Shown
from quire_protos.v1 import engine_pb2 as pb

from quire_cluster.convert import sampling_to_proto
from quire_cluster.gateway.images import NO_IMAGES, SeenImages
from quire_cluster.governance.callers import ANYONE, Caller
from quire_cluster.governance.checks.filters import Verdict
from quire_cluster.policies.prefixes import Prompt
from quire_cluster.policies.quarantine import Losses


@dataclass(slots=True)
class Delta:
    """What a choice has new since it was last asked. Tokens, text and log-probabilities go together."""

    index: int
    shown: Shown
    token_ids: list[int]
    offsets: list[int]  # characters of the output before each token
    logprobs: list[TokenLogprobs]
    finish_reason: str | None
    stop_reason: str | int | None
    error: QuireError | None

    @property
    def text(self) -> str:
        """Of the content."""
        return self.shown.content


@dataclass(frozen=True, slots=True)
class Emitted:
    """What a client holds of a choice: its tokens, and whether its ending came, too."""

    tokens: Sequence[int]
    finished: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """What a client's call says beside what it wants of the model."""

    route: str  # or the method
    caller: Caller
    user: str | None = None  # of the caller's own, for the log
    request_id: str | None = None  # None: it gets one
    priority: int = 0
    deadline: float = 0.0  # in time.monotonic() seconds; 0: none
    cache_salt: str | None = None
    longest_answer: int | None = None  # tokens, where it gives no max_tokens; None: what the context leaves
    verdicts: Sequence[Verdict] = ()  # of policies on what it sends


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """What all choices of a request share."""

    request_id: str
    prompt: list[int]
    priority: int
    deadline: float  # in time.monotonic() seconds; 0: none
    cache_salt: bytes
    arrival: float  # in time.monotonic() seconds
    seen: SeenImages = NO_IMAGES
    route: str = ""
    user: str | None = None
    caller: Caller = ANYONE
    verdicts: Sequence[Verdict] = ()


@dataclass(slots=True)
class Times:
    """Moments in the life of a choice, in time.monotonic() seconds."""

    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None


class Choice:
    """One of the n answers. `accept` takes each token index once; `end` is called once."""

    def __init__(
        self,
        index: int,
        facts: RequestFacts,
        sampling: EngineSampling,
        text: OutputText,
        arrived: asyncio.Event,
    ) -> None:
        self.index = index
        self.facts = facts
        self.sampling = sampling
        self.output: list[int] = []  # the log
        self.epoch = 0  # submissions so far
        self.admitted = False  # a replica has accepted it: no other may refuse it
        self.losses = Losses()
        self.times = Times()
        self.cached_tokens = 0
        self.draft_tokens = 0  # that a replica guessed and computed,
        self.accepted_tokens = 0  # and of these, those that it drew
        self.routed = (Prompt(0), 0)  # as it was sent last; tokens that were believed to be cached there
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.error: QuireError | None = None
        self.censored = False
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.vector: Floats | None = None  # of a model that pools
        self.token_intervals: list[float] = []  # seconds, for the metrics; taken at the end
        self._text = text
        self._arrived = arrived
        self._stop_ids = frozenset(sampling.stop_token_ids)
        self._new_tokens: list[int] = []
        self._new_offsets: list[int] = []
        self._new_logprobs: list[TokenLogprobs] = []
        self._reported_end = False
        self._resumed_end: tuple[str, str | int | None, bool] | None = None  # known; the prompt's scores are to come

    @property
    def num_reasoning_tokens(self) -> int:
        """Of its output."""
        return self._text.num_reasoning_tokens

    @property
    def ended(self) -> bool:
        """Whether it has its ending."""
        return self.finish_reason is not None

    @property
    def over(self) -> bool:
        """Whether that was taken, too."""
        return self._reported_end

    def censor(self, reason: str) -> None:
        """Its ending, whatever else it would have been: nothing more of it is to be told."""
        self.finish_reason, self.stop_reason, self.error = reason, None, None
        self.censored = self._reported_end = True
        self.times.finished = self.times.finished or time.monotonic()

    def submission(self, wire_id: int, now: float) -> pb.Submit:
        """The log as a message: to a first replica, or to the next one. Times go as what has passed, or is left."""
        facts = self.facts
        whole = self._resumed_end is not None
        sampling = replace(self.sampling, max_tokens=0, min_tokens=0) if whole else self.sampling
        return pb.Submit(
            id=wire_id,
            prompt=facts.prompt,
            output=() if whole else self.output,
            sampling=sampling_to_proto(sampling),
            priority=facts.priority,
            time_left=max(facts.deadline - now, 1e-3) if facts.deadline else 0.0,
            cache_salt=facts.cache_salt,
            age=now - facts.arrival,
            resumed=self.admitted,
            images=[
                pb.ImageSpan(key=i.key, start=i.start, length=i.length, rows=i.rows, columns=i.columns)
                for i in facts.seen.spans
            ],
            tenant=facts.caller.tenant.name,
            weight=facts.caller.tenant.weight,
        )

    def admit(self) -> None:
        """A replica has accepted it."""
        self.admitted = True
        self._arrived.set()

    def accept(self, index: int, token: int, now: float) -> bool:
        """A token from a replica. False for an index that is already there (dropped) or too far (the caller's bug)."""
        output = self.output
        if index != len(output) or self.finish_reason is not None:
            return False
        output.append(token)
        times = self.times
        if times.last_token is None:
            times.first_token = now
        else:
            self.token_intervals.append(now - times.last_token)
        times.last_token = now
        stops = self._stops_at((token,))
        self._new_tokens.append(token)
        self._new_offsets.append(self._text.length)
        self._text.push(token, stops)
        if self._text.stopped_by is not None:
            self.end("stop", stop_reason=self._text.stopped_by)
        self._arrived.set()
        return True

    def resume(self, tokens: Sequence[int], *, finished: bool) -> None:
        """Goes on after tokens that the client holds, with all the text that they had shown. Nothing of them is told
        again, but for an ending that had not come yet. Raises InvalidParameter for what no answer can have been."""
        for token in tokens:
            if self._text.stopped_by is not None or self._stops_at(self.output[-1:]):
                raise InvalidParameter(f"resume has tokens of answer {self.index} after its end", "resume")
            self.output.append(token)
            self._text.push(token, self._stops_at((token,)))
        self._text.take()
        if len(self.output) > self.sampling.max_tokens:
            raise InvalidParameter(f"resume has more tokens of answer {self.index} than max_tokens", "resume")
        if finished:
            ending: tuple[str, str | int | None, bool] = ("stop", None, True)
        elif self._text.stopped_by is not None:
            ending = ("stop", self._text.stopped_by, False)
        elif self._stops_at(self.output[-1:]):
            ending = ("stop", self.output[-1], False)
        elif len(self.output) == self.sampling.max_tokens:
            ending = ("length", None, False)
        else:
            return
        if self.sampling.prompt_logprobs is not None:  # they come last, and so have not come
            self._resumed_end = ending
        else:
            self._end_as(*ending)

    def _end_as(self, reason: str, stop_reason: str | int | None, told: bool) -> None:
        """`told`: the client knows it already."""
        if told:
            self.finish_reason, self._reported_end = reason, True
            self._arrived.set()
        else:
            self.end(reason, stop_reason=stop_reason)

    def _stops_at(self, tokens: Sequence[int]) -> bool:
        """Whether the output, which these end, ends with them."""
        return any(token in self._stop_ids for token in tokens) and len(self.output) > self.sampling.min_tokens

    def start(self, cached_tokens: int, now: float) -> None:
        """A replica computes it; the first one counts."""
        if self.times.started is None:
            self.times.started = now
            self.cached_tokens = cached_tokens

    def accept_logprobs(self, scores: TokenLogprobs) -> None:
        """Of the token accepted last."""
        self._new_logprobs.append(scores)

    def accept_prompt_logprobs(self, first: int, scores: TokenLogprobs) -> None:
        """Of the prompt's positions from `first` on; those an earlier replica had reported are dropped."""
        known = sum(len(part.chosen) for part in self.prompt_logprobs)
        fresh = scores.after(max(0, known - first))
        if len(fresh.chosen):
            self.prompt_logprobs.append(fresh)

    def end(self, reason: str, *, stop_reason: str | int | None = None, error: QuireError | None = None) -> None:
        """Its one ending; a later one (the abort after a stop string, say) changes nothing."""
        if self.finish_reason is not None:
            return
        if self._resumed_end is not None and error is None and reason != "abort":
            ending, self._resumed_end = self._resumed_end, None
            self._end_as(*ending)
            return
        if self._text.stopped_by is None and reason in ("stop", "length"):
            self._text.finish()
        self.finish_reason, self.stop_reason, self.error = reason, stop_reason, error
        self.times.finished = time.monotonic()
        self._arrived.set()

    def take(self) -> Delta | None:
        """What is new; None when nothing is."""
        if self.censored:
            return None
        shown = self._text.take()
        news = self._new_tokens or shown or (self.finish_reason is not None and not self._reported_end)
        if not news:
            return None
        finish = self.finish_reason if not self._reported_end else None
        self._reported_end = self._reported_end or finish is not None
        if finish == "stop" and self._text.num_calls:
            finish = "tool_calls"
        delta = Delta(
            self.index,
            shown,
            self._new_tokens,
            self._new_offsets,
            self._new_logprobs[: len(self._new_tokens)],  # none of a token past a stop string
            finish,
            self.stop_reason if finish else None,
            self.error if finish else None,
        )
        self._new_tokens, self._new_offsets, self._new_logprobs = [], [], []
        return delta


class ShownCheck(Protocol):
    """Looks at what is shown of one choice."""

    @property
    def verdicts(self) -> Sequence[Verdict]:
        """So far."""

    async def take(self, choice: Choice, delta: Delta) -> Delta | None:
        """Of what is new what may be shown; None: nothing yet. May `censor` the choice."""


class Generation:
    """All choices of one client request. Await `deltas()` again and again; a slow reader finds them merged."""

    def __init__(self, facts: RequestFacts, samplings: list[EngineSampling], texts: list[OutputText]) -> None:
        self.facts = facts
        self.on_end: Callable[[Generation], None] = lambda generation: None  # called once, before its end is told
        # What may be shown of each choice's news, where policies look at it; and told of a choice that one has ended.
        self.checks: Sequence[ShownCheck] = ()
        self.on_stop: Callable[[Choice], None] = lambda choice: None
        self._ended = False
        self._arrived = asyncio.Event()
        self.choices = [
            Choice(index, facts, sampling, text, self._arrived)
            for index, (sampling, text) in enumerate(zip(samplings, texts, strict=True))
        ]

    def resume(self, emitted: Mapping[int, "Emitted"]) -> None:
        """What the client holds already, by choice. Raises InvalidParameter."""
        for index, one in emitted.items():
            if index >= len(self.choices):
                raise InvalidParameter(f"resume has an answer {index}, and n is {len(self.choices)}", "resume")
            self.choices[index].resume(one.tokens, finished=one.finished)

    async def deltas(self) -> list[Delta]:
        """The next batch of news, at most one Delta per choice; an empty list once everything has been told."""
        while True:
            found = [delta for choice in self.choices if (delta := choice.take()) is not None]
            if self.checks:
                found = [delta for delta in await asyncio.gather(*map(self._checked, found)) if delta is not None]
            ended = all(choice.over for choice in self.choices)
            if ended:
                self.end()
            if found or ended:
                return found
            self._arrived.clear()
            await self._arrived.wait()

    async def _checked(self, delta: Delta) -> Delta | None:
        choice = self.choices[delta.index]
        shown = await self.checks[delta.index].take(choice, delta)
        if choice.censored:
            self.on_stop(choice)
        return shown

    def end(self) -> None:
        """Nothing comes any more. Idempotent."""
        if not self._ended:
            self._ended = True
            self.on_end(self)

    async def vector(self) -> Floats:
        """Of a model that pools. Raises what it ended with."""
        while await self.deltas():
            pass
        [choice] = self.choices
        if choice.error is not None:
            raise choice.error
        assert choice.vector is not None, "it ended without a vector"
        return choice.vector

    async def admitted(self) -> None:
        """Returns once replicas have accepted every choice. Raises why one of them was refused, as soon as it is."""
        while True:
            for choice in self.choices:
                if choice.error is not None and not choice.output:
                    raise choice.error
            if all(choice.admitted or choice.ended for choice in self.choices):
                return
            self._arrived.clear()
            await self._arrived.wait()

    def verdicts(self, index: int) -> list[Verdict]:
        """Of policies, on what was sent and on one of its answers."""
        found = list(self.facts.verdicts)
        return [*found, *self.checks[index].verdicts] if self.checks else found

    @property
    def num_output_tokens(self) -> int:
        """Of all choices; a vector is none."""
        return sum(len(choice.output) for choice in self.choices if choice.vector is None)

    def call_id(self, choice: int, place: int) -> str:
        """Of a choice's call: the same whenever it is asked for."""
        what = f"{self.facts.request_id} {choice} {place}"
        return f"call_{hashlib.sha256(what.encode()).hexdigest()[:24]}"

    @property
    def num_reasoning_tokens(self) -> int:
        """Of these, tokens of reasoning."""
        return sum(choice.num_reasoning_tokens for choice in self.choices)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache."""
        return self.choices[0].cached_tokens


async def all_admitted(generations: Sequence[Generation]) -> None:
    """Returns once replicas have accepted everything. Raises the first refusal there is of any."""
    waiting = [asyncio.ensure_future(generation.admitted()) for generation in generations]
    try:
        await asyncio.gather(*waiting)
    finally:
        for one in waiting:
            one.cancel()
