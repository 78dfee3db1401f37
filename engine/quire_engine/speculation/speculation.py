"""The drafts of an engine's steps: what a drafter proposes, as far as it is worth computing."""

from collections.abc import Sequence

from quire_engine.request import Request
from quire_engine.speculation.draft import Draft, Drafter
from quire_engine.speculation.value import Value


class Speculation:
    """Asked before each step for its drafts; told what became of them."""

    def __init__(self, drafter: Drafter, value: Value, most: int) -> None:
        """`most`: drafts of a request in a step."""
        self._drafter = drafter
        self._value = value
        self._most = most
        self._asking = False  # drafters are asked as soon as no step is in flight
        self._asked: dict[Request, Draft] = {}  # whose drafts are in flight

    def guesses(
        self, decoding: Sequence[Request], beside: int, room: int, *, in_flight: bool
    ) -> dict[Request, list[int]] | None:
        """What to compute behind the last token of these requests, which lack no other. None: there may be something
        once no step is in flight, for then that token is known. `beside`: tokens of the step besides; `room`: for all
        drafts."""
        self._asking = self._asking or (room > 0 and self._value.worth_asking(len(decoding), beside))
        if not self._asking:
            return {}
        if in_flight:
            return None
        self._asking = False
        asked, drafts = [], []
        for request in decoding:
            most = min(self._most, request.end_length - len(request.tokens) - 1)
            if most > 0 and (draft := self._draft(request, most)).tokens:
                asked.append(request)
                drafts.append(draft)
        counts = self._value.choose(asked, drafts, len(decoding), beside, room)
        chosen = [one for one in zip(asked, drafts, counts, strict=True) if one[2]]
        self._asked = {request: draft for request, draft, _ in chosen}
        return {request: draft.tokens[:count] for request, draft, count in chosen}

    def _draft(self, request: Request, most: int) -> Draft:
        draft = self._drafter.propose(request, most)
        return Draft(draft.tokens[:most], draft.chances[:most])

    def learn(self, request: Request, computed: int, accepted: int) -> None:
        """Of a request's drafts so many were computed, and of these so many drawn."""
        self._value.learn(request, self._asked[request], computed, accepted)

    def timed(self, tokens: int, seconds: float, waited: float) -> None:
        """A step of so many tokens ended so long after the one before it. `waited`: of that, how long nothing was
        computed because it could not be planned earlier."""
        self._value.timed(tokens, seconds, waited)

    def forget(self, request: Request) -> None:
        """It has ended."""
        self._drafter.forget(request)
        self._value.forget(request)
        self._asked.pop(request, None)
