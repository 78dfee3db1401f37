"""The rows of a step that have a grammar, and their masks. V vocabulary, M such rows of those that draw.

The masks of a step depend on the tokens of the step before, which the host may not know when the step is launched. So
they are made after that: the device computes the step meanwhile, and they go to it in time for the draw.
"""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
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
from quire_engine.step import Failure, Ints, NewRow, Places

log = logging.getLogger(__name__)
_MOST_THREADS = 8
_QUICK = 0.1  # seconds
_NO_PLACES, _NO_BITS = np.zeros(0, np.int64), np.zeros((0, 0), np.int32)


@dataclass(frozen=True, slots=True)
class Masks:
    """What the constrained places of a step may draw."""

    places: NDArray[np.int64] = field(default_factory=lambda: _NO_PLACES)  # [M] among those that draw
    bits: NDArray[np.int32] = field(default_factory=lambda: _NO_BITS)  # [M, V / 32 rounded up]: see `mask_logits`
    complete: frozenset[int] = frozenset()  # places where nothing but an end may come
    cut: tuple[int, ...] = ()  # places that nothing is known of, for the draft before them; nor of the row's later ones


@dataclass(slots=True)
class _Stand:
    """Where a row's cursor stands, or a fork of it behind some of the row's drafts."""

    row: int
    places: range
    cursor: Cursor
    drafts: int = 0  # that it has followed
    mask: NDArray[np.int32] | None = None  # None: all may come

    @property
    def place(self) -> int:
        return self.places[self.drafts]


@dataclass(slots=True)
class _Making:
    """The masks of a step, in the making."""

    bits: NDArray[np.int32]  # for all places of guided rows, from the first on as many as have a mask
    places: list[int] = field(default_factory=list)
    complete: set[int] = field(default_factory=set)
    cut: list[int] = field(default_factory=list)


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
        self._drawn: tuple[list[tuple[Cursor, int, range]], Tensor, torch.Event | None] | None = None
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

    def masks(self, places: Places, by_row: Mapping[int, range]) -> Masks:
        """Waits for the tokens drawn last. `by_row`: row → where it has its places.

        First those of all rows' first places, then of their second ones, for which a row's cursor is forked: once, for
        a copy of it takes the longer the more has been written.
        """
        self._follow()
        stands = [
            _Stand(row, where, cursor)
            for row, where in by_row.items()
            if (cursor := self._cursors.get(row)) is not None
        ]
        made = _Making(np.zeros((sum(len(stand.places) for stand in stands), self._words), np.int32))
        while stands:
            going = self._ask(stands, made)
            stands = [stand for stand in going if self._follows(stand, places.drafts, made)]
        if self._failed and places.drafted:
            made.cut += [where[1] for row, where in by_row.items() if row in self._failed and len(where) > 1]
        if not made.places and not made.cut:
            return Masks()
        where = np.array(made.places, np.int64)
        return Masks(where, made.bits[: len(where)], frozenset(made.complete), tuple(made.cut))

    def _ask(self, stands: list[_Stand], made: _Making) -> list[_Stand]:
        """The masks of where they stand; which of them may go on."""
        asked: list[tuple[_Stand, Any, tuple[int, ...]]] = []  # matcher, tokens besides
        told: list[tuple[_Stand, tuple[int, ...], bool]] = []  # tokens, whether those may come or all others
        failed: set[int] = set()
        for stand in stands:
            cursor, stand.mask = stand.cursor, None
            try:
                if cursor.complete:
                    made.complete.add(stand.place)
                if cursor.matcher is not None:
                    asked.append((stand, cursor.matcher, cursor.besides))
                elif (only := cursor.only) is not None:
                    told.append((stand, only, True))
                elif never := cursor.never:
                    told.append((stand, never, False))
            except Exception as error:
                failed.add(stand.row)
                self._give_up(stand, error, made)
        masks = made.bits[len(made.places) : len(made.places) + len(asked) + len(told)]
        for mask, (stand, _, _) in zip(masks, [*asked, *told], strict=True):
            stand.mask = mask
        if asked:
            self._fill(masks, [matcher for _, matcher, _ in asked])
        for number, (stand, matcher, besides) in enumerate(asked):
            if matcher.is_error() and not self._filled_anew(stand, matcher, masks[number : number + 1], made):
                failed.add(stand.row)
            _allow(masks[number], besides)
        for number, (_, tokens, these) in enumerate(told, len(asked)):
            _allow(masks[number], tokens)
            if not these:
                np.invert(masks[number], out=masks[number])
        made.places += [stand.place for stand, _, _ in asked] + [stand.place for stand, _, _ in told]
        return [stand for stand in stands if stand.row not in failed]

    def _filled_anew(self, stand: _Stand, matcher: Any, mask: NDArray[np.int32], made: _Making) -> bool:
        """Whether a row whose matcher gave up has its mask after all."""
        error = GrammarFailure(matcher.get_error())
        if stand.drafts:
            self._give_up(stand, error, made)
            return False
        if not self._restarted(stand.row, error):
            return False
        stand.cursor = self._cursors[stand.row]
        self._fill(mask, [stand.cursor.matcher])
        if stand.cursor.matcher.is_error():
            self._give_up(stand, GrammarFailure(stand.cursor.matcher.get_error()), made)
            return False
        return True

    def _follows(self, stand: _Stand, drafts: Ints, made: _Making) -> bool:
        """Whether it has a next place, and gets there."""
        if stand.drafts + 1 == len(stand.places):
            return False
        place = stand.places[stand.drafts + 1]
        draft = int(drafts[place])
        try:
            if draft < self._vocab_size and (stand.mask is None or _allows(stand.mask, draft)):
                if not stand.drafts:
                    stand.cursor = stand.cursor.fork()
                stand.cursor.advance(draft)
                stand.drafts += 1
                return True
        except Exception as error:  # if the draft is what is drawn, the row's own cursor meets the same
            log.debug("a draft cannot be followed", exc_info=error)
        made.cut.append(place)
        return False

    def _give_up(self, stand: _Stand, error: Exception, made: _Making) -> None:
        """A place has no mask. Where that is the row's first, the row cannot go on; behind drafts it may never come."""
        if stand.drafts:
            made.cut.append(stand.place)
        else:
            self._fail(stand.row, error)

    def remember(self, tokens: Tensor, by_row: Mapping[int, range]) -> None:
        """What was drawn, [S] on the device."""
        drawn = [
            (cursor, row, where) for row, where in by_row.items() if (cursor := self._cursors.get(row)) is not None
        ]
        if not drawn:
            return
        copied = None
        host = tokens.to("cpu", non_blocking=True)
        if self._device.type != "cpu":
            copied = torch.Event(self._device)
            copied.record()
        self._drawn = (drawn, host, copied)

    def failures(self, rows: Iterable[int]) -> dict[int, Failure]:
        """Why rows of these cannot go on."""
        return {row: self._failed[row] for row in rows if row in self._failed} if self._failed else {}

    def _follow(self) -> None:
        """Advances the cursors by what was drawn last."""
        if self._drawn is None:
            return
        (drawn, host, copied), self._drawn = self._drawn, None
        if copied is not None:
            copied.synchronize()
        tokens = host.tolist()
        for cursor, row, where in drawn:
            if self._cursors.get(row) is not cursor:
                continue
            came = [token for token in tokens[where.start : where.stop] if token >= 0]
            self._begun[row][1].extend(came)
            try:
                for token in came:
                    cursor.advance(token)
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


def _allows(mask: NDArray[np.int32], token: int) -> bool:
    return bool(mask[token // 32] >> (token % 32) & 1)


def _allow(mask: NDArray[np.int32], tokens: Sequence[int]) -> None:
    words = mask.view(np.uint32)
    for token in tokens:
        words[token // 32] |= np.uint32(1 << (token % 32))
