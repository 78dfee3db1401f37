"""Drafts out of the request's own log: what followed where it last stood as it ends."""

from typing import ClassVar

from quire_engine.request import Request
from quire_engine.speculation.draft import Draft
from quire_engine.speculation.index import Bounds, Index

_WALK = 16
_DOUBT = 2.0  # tokens: a single place that agrees in so many is right half the time


def chance(agree: int, of: int, length: int) -> float:
    """That a token follows which followed at `agree` `of` the places, where they agree with the log in `length`."""
    return agree / (of + _DOUBT / length)


class NgramDrafter:
    """Prompt lookup (Saxena, https://github.com/apoorvumang/prompt-lookup-decoding).

    Of the latest 16 places that agree with the end of the log in `shortest` tokens, the latest that agrees in the most,
    up to `longest`; one that agrees in `longest` is found wherever it is.
    """

    reads_logs: ClassVar[bool] = True

    def __init__(self, shortest: int, longest: int) -> None:
        self._bounds = Bounds(short=shortest, long=longest, walk=_WALK, reach=longest, enough=1)
        self._indexes: dict[int, Index] = {}  # by request

    def propose(self, request: Request, most: int) -> Draft:
        log, index = request.tokens, self._indexes.get(request.id)
        if index is None:
            index = self._indexes[request.id] = Index(self._bounds)
        found = index.search(log, log, index)
        if not found.places:
            return Draft()
        tokens = continuation(log, found.places[0], most)
        return Draft(tokens, [chance(1, 1, found.length + ahead) for ahead in range(most)])

    def forget(self, request: Request) -> None:
        self._indexes.pop(request.id, None)


def continuation(log: list[int], place: int, most: int) -> list[int]:
    """What follows a place; at the end of the log, what was drafted so far."""
    tokens = log[place : place + most]
    period = len(log) - place  # what follows the log's end is what followed its place: itself
    while len(tokens) < most:
        tokens += tokens[-period:][: most - len(tokens)]
    return tokens
