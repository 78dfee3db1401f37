"""The drafts of an engine's steps: what a drafter proposes, as far as it is worth computing."""

from collections.abc import Sequence

from quire_engine.config import SchedulerLimits
from quire_engine.request import Request
from quire_engine.speculation.draft import Draft, Drafter
from quire_engine.speculation.value import Value

_MOST_AGAIN = 16  # tokens of a request that are computed again beside drafts; then a step without any catches up


class Speculation:
    """Asked before each step for its drafts; told what became of them."""

    def __init__(self, drafter: Drafter, value: Value, most: int) -> None:
        """`most`: drafts of a request in a step."""
        self._drafter = drafter
        self._value = value
        self._most = most
        self._waiting = False  # for the step in flight to end
        self._asked: dict[Request, Draft] = {}  # whose drafts are in flight
        self._seen: dict[Request, tuple[int, Draft]] = {}  # the last drafts that were only looked at, behind which log

    def guesses(
        self, running: Sequence[Request], limits: SchedulerLimits, *, in_flight: bool
    ) -> dict[Request, list[int]] | None:
        """What to compute behind the last token of requests that lack no other; nothing where one of those that run
        does. None: there may be something once no step is in flight, for then that token is known."""
        decoding, rows, certain = [], 0, 0
        for request in running:
            length = len(request.tokens) + request.pending
            lacking = length - request.num_computed
            if lacking > 1 + request.again:
                return {}
            if lacking > 0 and request.again <= _MOST_AGAIN and length > request.begun_at:
                decoding.append(request)
            rows += lacking > 0
            certain += lacking
        room = max(0, min(limits.max_num_batched_tokens - certain, limits.most_drafts))
        return self._choose(decoding, rows, certain, room, in_flight=in_flight)

    def _choose(
        self, decoding: Sequence[Request], rows: int, certain: int, room: int, *, in_flight: bool
    ) -> dict[Request, list[int]] | None:
        """`rows`: tokens that the step draws; `certain`: that it computes without drafts; `room`: for all drafts."""
        waited, self._waiting = self._waiting, False
        if not room or not decoding or not (waited or self._value.possible(rows, certain)):
            return {}
        unknown = in_flight and self._drafter.reads_logs
        asked, drafts = [], []
        for request in decoding:
            most = min(self._most, request.end_length - len(request.tokens) - request.pending - 1)
            self._compare(request)
            if most > 0 and (draft := self._draft(request, most + unknown)).tokens:
                asked.append(request)
                drafts.append(draft)
        self._seen = {}
        if self._drafter.reads_logs:
            self._seen = {request: (len(request.tokens), draft) for request, draft in zip(asked, drafts, strict=True)}
        if in_flight:
            self._waiting = self._value.worth_waiting(asked, drafts, rows, certain, unknown=unknown)
            return None if self._waiting else {}
        counts = self._value.choose(asked, drafts, rows, certain, room)
        chosen = [one for one in zip(asked, drafts, counts, strict=True) if one[2]]
        self._asked = {request: draft for request, draft, _ in chosen}
        for request in self._asked:
            self._seen.pop(request, None)
        return {request: draft.tokens[:count] for request, draft, count in chosen}

    def _draft(self, request: Request, most: int) -> Draft:
        draft = self._drafter.propose(request, most)
        return Draft(draft.tokens[:most], draft.chances[:most])

    def _compare(self, request: Request) -> None:
        """What has come in place of a draft that was not computed."""
        length, draft = self._seen.pop(request, (0, None))
        if draft is not None and length < len(request.tokens):
            self._value.compare(request, draft, draft.tokens[0] == request.tokens[length])

    def learn(self, request: Request, computed: int, accepted: int) -> None:
        """Of a request's drafts so many were computed, and of these so many drawn."""
        self._value.learn(request, self._asked[request], computed, accepted)

    def timed(self, tokens: int, prompts: int, seconds: float, waited: float) -> None:
        """A step of so many tokens, so many of them of prompts, ended so long after the one before it. `waited`: of
        that, how long nothing was computed because it could not be planned earlier."""
        self._value.timed(tokens, prompts, seconds, waited)

    def forget(self, request: Request) -> None:
        """It has ended."""
        self._drafter.forget(request)
        self._value.forget(request)
        self._asked.pop(request, None)
        self._seen.pop(request, None)
