"""The rows of a step that have a grammar, and their masks. V vocabulary, M such rows of those that draw.

The masks of a step depend on the tokens of the step before, which the host may not know when the step is launched. So
they are made after that: the device computes the step meanwhile, and they go to it in time for the draw.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire_engine.errors import QuireError, ServerError
from quire_engine.guidance.compiled import Guides
from quire_engine.guidance.cursor import Cursor, GrammarFailure
from quire_engine.guidance.grammars import reason
from quire_engine.step import Failure, NewRow

log = logging.getLogger(__name__)
_MOST_THREADS = 8
_QUICK = 0.1  # seconds


_NO_PLACES, _NO_BITS = np.zeros(0, np.int64), np.zeros((0, 0), np.int32)


@dataclass(frozen=True, slots=True)
class Masks:
    """What the constrained rows of a step may draw."""

    places: NDArray[np.int64] = field(default_factory=lambda: _NO_PLACES)  # [M] among those that draw
    bits: NDArray[np.int32] = field(default_factory=lambda: _NO_BITS)  # [M, V / 32 rounded up]: see `mask_logits`
    complete: frozenset[int] = frozenset()  # rows where nothing but an end may come


class GuidedRows:
    """Each guided row's cursor. What goes wrong with one is that row's own affair."""

    def __init__(self, guides: Guides, vocab_size: int, device: torch.device) -> None:
        self._guides = guides
        self._vocab_size = vocab_size
        self._words = -(-vocab_size // 32)
        self._device = device
        self._cursors: dict[int, Cursor] = {}
        self._begun: dict[int, tuple[str, list[int]]] = {}  # row → its spec, and the tokens that have come
        self._failed: dict[int, Failure] = {}  # row → why it cannot go on
        self._drawn: tuple[list[tuple[Cursor, int, int]], Tensor, torch.Event | None] | None = None
        self._threads: Any = None

    def __contains__(self, row: int) -> bool:
        return row in self._cursors or row in self._failed

    def __bool__(self) -> bool:
        return bool(self._cursors or self._failed)

    def set_rows(self, news: Sequence[NewRow]) -> None:
        """Requests take these rows; what they have written already is gone through."""
        for new in news:
            self._cursors.pop(new.row, None)
            self._failed.pop(new.row, None)
            self._begun.pop(new.row, None)
            if new.params.guidance:
                self._begin(new.row, new.params.guidance, new.tokens[new.num_prompt :].tolist())

    def masks(self, places: Mapping[int, int]) -> Masks:
        """Waits for the tokens drawn last. `places`: row → its place among those that draw."""
        self._follow()
        asked: list[tuple[int, int, Any, tuple[int, ...]]] = []  # row, place, matcher, tokens besides
        told: list[tuple[int, tuple[int, ...], bool]] = []  # place, tokens, whether those may come or all others
        complete: set[int] = set()
        for row, place in places.items():
            if (cursor := self._cursors.get(row)) is None:
                continue
            try:
                if cursor.complete:
                    complete.add(row)
                if cursor.matcher is not None:
                    asked.append((row, place, cursor.matcher, cursor.besides))
                elif (only := cursor.only) is not None:
                    told.append((place, only, True))
                elif never := cursor.never:
                    told.append((place, never, False))
            except Exception as error:
                self._fail(row, error)
        if not asked and not told:
            return Masks()
        masks = np.zeros((len(asked) + len(told), self._words), np.int32)
        if asked:
            self._fill(masks, [matcher for _, _, matcher, _ in asked])
        for number, (row, _, matcher, besides) in enumerate(asked):
            if matcher.is_error() and self._restarted(row, GrammarFailure(matcher.get_error())):
                matcher = self._cursors[row].matcher
                self._fill(masks[number : number + 1], [matcher])
                if matcher.is_error():
                    self._fail(row, GrammarFailure(matcher.get_error()))
            _allow(masks[number], besides)
        for number, (_, tokens, these) in enumerate(told, len(asked)):
            _allow(masks[number], tokens)
            if not these:
                np.invert(masks[number], out=masks[number])
        places_masked = [place for _, place, _, _ in asked] + [place for place, _, _ in told]
        return Masks(np.array(places_masked, np.int64), masks, frozenset(complete))

    def remember(self, tokens: Tensor, places: Mapping[int, int]) -> None:
        """What was drawn, [S] on the device."""
        drawn = [
            (cursor, row, place) for row, place in places.items() if (cursor := self._cursors.get(row)) is not None
        ]
        if not drawn:
            return
        copied = None
        host = tokens.to("cpu", non_blocking=True)
        if self._device.type != "cpu":
            copied = torch.Event(self._device)
            copied.record()
        self._drawn = (drawn, host, copied)

    def failures(self, places: Mapping[int, int]) -> dict[int, Failure]:
        """Why rows of these cannot go on."""
        return {row: self._failed[row] for row in places if row in self._failed} if self._failed else {}

    def _follow(self) -> None:
        """Advances the cursors by what was drawn last."""
        if self._drawn is None:
            return
        (drawn, host, copied), self._drawn = self._drawn, None
        if copied is not None:
            copied.synchronize()
        tokens = host.tolist()
        for cursor, row, place in drawn:
            if self._cursors.get(row) is cursor and tokens[place] >= 0:
                self._begun[row][1].append(tokens[place])
                try:
                    cursor.advance(tokens[place])
                except Exception as error:
                    self._restarted(row, error)

    def _begin(self, row: int, spec: str, output: list[int]) -> None:
        """From the start through what has been written."""
        self._begun[row] = (spec, output)
        try:
            cursor = self._cursors[row] = Cursor(self._guides.prepare(spec).result())
            for token in output:
                cursor.advance(token)
        except Exception as error:
            self._fail(row, error)

    def _restarted(self, row: int, error: Exception) -> bool:
        """Whether a row whose matcher gave up goes on: with a grammar compiled anew, where that may help and the step
        can wait for it."""
        guide = self._cursors[row].guide
        if _is_full(error) and guide.seconds < _QUICK:
            spec, output = self._begun[row]
            self._guides.drop(spec, guide)
            self._begin(row, spec, output)
        else:
            self._fail(row, error)
        return row in self._cursors

    def _fill(self, masks: NDArray[np.int32], matchers: list[Any]) -> None:
        if self._threads is None:
            from llguidance import LLExecutor

            # On a CPU the threads that compute the step spin on its cores: beside them one more is faster than several.
            alone = self._device.type == "cpu"
            self._threads = LLExecutor(1 if alone else min(_MOST_THREADS, len(os.sched_getaffinity(0))))
        numbered = [(matcher, number) for number, matcher in enumerate(matchers)]
        self._threads.unsafe_compute_mask_ptr(numbered, masks.ctypes.data, self._words * 4, len(masks))

    def _fail(self, row: int, error: Exception) -> None:
        cursor = self._cursors.pop(row, None)
        if cursor is not None and _is_full(error):
            self._guides.drop(self._begun[row][0], cursor.guide)
        if isinstance(error, QuireError):
            self._failed[row] = (str(error), isinstance(error, ServerError))
        elif isinstance(error, GrammarFailure):
            why = f"the grammar cannot be followed any further ({reason(str(error))}); simplify it"
            self._failed[row] = (why, False)
        else:
            log.error("a grammar failed", exc_info=error)
            self._failed[row] = ("the grammar failed: an internal error, which is in the server's log", True)


def _is_full(error: Exception) -> bool:
    """Whether a grammar's lexer has no room for more states: each row adds some, and all have them in common."""
    return isinstance(error, GrammarFailure) and str(error).startswith("lexer error")


def _allow(mask: NDArray[np.int32], tokens: Sequence[int]) -> None:
    words = mask.view(np.uint32)
    for token in tokens:
        words[token // 32] |= np.uint32(1 << (token % 32))
