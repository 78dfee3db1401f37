"""Drafts out of the request's own log, and of what its tenant was answered lately."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import ClassVar

from quire_engine.request import Request
from quire_engine.speculation.draft import Draft
from quire_engine.speculation.index import Bounds, Index
from quire_engine.speculation.ngram import chance, continuation
from quire_engine.speculation.outputs import END, Outputs, OutputStore

BOUNDS = Bounds(short=2, long=8, walk=8, reach=16, enough=8)
_LEAST = 0.1  # chance that all of a draft is right


@dataclass(slots=True)
class _Match:
    """Of a request: the places that agreed with its log in the most tokens when it was last asked about."""

    index: Index  # of the log
    places: list[int] = field(default_factory=list)  # the latest first
    length: int = 0  # tokens they agree in
    end: int = 0  # the length of the log
    outputs: Outputs | None = None  # whose text the places are in; None: the log itself
    cuts: int = 0  # of the outputs, at the search


class SuffixDrafter:
    """Suffix decoding (Oliaro and others, arXiv 2411.04975), with hash chains in place of suffix trees.

    At the places that agree with the end of the log in the most tokens, in the log or else in outputs of its tenant,
    what most went on with. Places that keep being right are followed without a search.
    """

    reads_logs: ClassVar[bool] = True

    def __init__(
        self,
        *,
        bounds: Bounds = BOUNDS,
        tenants: int = 256,
        tenant_tokens: int = 64 * 1024,
        tokens: int = 2 * 1024 * 1024,
    ) -> None:
        self.store = OutputStore(bounds, tenants=tenants, tenant_tokens=tenant_tokens, tokens=tokens)
        self._bounds = bounds
        self._matches: dict[int, _Match] = {}  # by request

    def propose(self, request: Request, most: int) -> Draft:
        match = self._matches.get(request.id)
        if match is None:
            match = self._matches[request.id] = _Match(Index(self._bounds))
        if not _follow(match, request.tokens):
            self._search(match, request)
        return _draft(match, request.tokens, most) if match.places else Draft()

    def forget(self, request: Request) -> None:
        self._matches.pop(request.id, None)
        self.store.add(request.cache_salt, request.tokens[request.num_prompt :])

    def _search(self, match: _Match, request: Request) -> None:
        log = request.tokens
        match.end, match.outputs = len(log), None
        found = match.index.search(log, log, match.index)
        outputs = self.store.of(request.cache_salt)
        if outputs is not None:
            elsewhere = outputs.index.search(outputs.text, log, match.index)
            if elsewhere.length > found.length:
                found, match.outputs, match.cuts = elsewhere, outputs, outputs.cuts
        match.places, match.length = found.places, found.length


def _follow(match: _Match, log: list[int]) -> bool:
    """Whether some of the places went on as the log did: no other that was there at the search agrees in more."""
    if match.outputs is not None and match.outputs.cuts != match.cuts:
        return False
    text = log if match.outputs is None else match.outputs.text
    places = match.places
    for end in range(match.end, len(log)):
        if not places:
            return False
        token = log[end]
        places = [place + 1 for place in places if text[place] == token]
    match.places, match.length, match.end = places, match.length + len(log) - match.end, len(log)
    return bool(places)


def _draft(match: _Match, log: list[int], most: int) -> Draft:
    if match.outputs is None:
        after: list[Sequence[int]] = [continuation(log, place, most) for place in match.places]
    else:
        after = [match.outputs.text[place : place + most] for place in match.places]
    tokens, chances, length, sure = list[int](), list[float](), match.length, 1.0
    right: Sequence[int] = range(len(after))  # the places whose tokens are those drafted so far
    for row in zip_longest(*after, fillvalue=END):
        following: Sequence[int] = row if len(right) == len(row) else [row[place] for place in right]
        token = following[0]
        agree = following.count(token)
        if agree < len(following):
            token = max(following, key=following.count)  # of equals the first: the latest place
            agree = following.count(token)
            right = [place for place in right if row[place] == token]
        likely = chance(agree, len(following), length)
        sure *= likely
        if token == END or sure < _LEAST:
            break
        tokens.append(token)
        chances.append(likely)
        length += 1
    return Draft(tokens, chances)
