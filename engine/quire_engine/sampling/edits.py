"""What requests change in their logits before a token is drawn: allowed tokens, bad words, biases, penalties.

All rows of a step together: how many operations the device runs does not depend on how many rows ask for changes. And
nothing here waits for the device: what the changes depend on that the host does not know yet (the tokens of steps in
flight) is kept there. V vocabulary, R rows, n rows or entries that a step changes.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from quire_engine.request import EngineSampling
from quire_engine.step import NewRow, Places
from quire_engine.upload import Array, Upload

_FIRST_SLOTS = 8
_NONE = -1  # before a log's first token
_NOTHING = np.zeros(0, np.int64)


@dataclass(slots=True)
class _Row:
    """What is remembered of a row, on the host."""

    params: EngineSampling
    num_prompt: int
    slot: int = -1  # of the tables, where it has penalties or may draw from some tokens alone
    bias: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None
    bans: NDArray[np.int64] = field(default_factory=lambda: _NOTHING)  # bad words of one token
    words: "_Words | None" = None  # of several
    early_bans: NDArray[np.int64] = field(default_factory=lambda: _NOTHING)  # the same, and ends

    def early(self, position: int) -> bool:
        """Whether an end would come too early there."""
        return position - self.num_prompt < self.params.min_tokens


@dataclass(frozen=True, slots=True)
class _Words:
    """Bad words of several tokens. One has begun where all its tokens but the last stand `back` tokens before the next,
    which must not be its end then."""

    ends: NDArray[np.int64]  # [words]
    numbers: NDArray[np.int32]  # of its word, for each token of a beginning
    tokens: NDArray[np.int32]
    back: NDArray[np.int32]

    @staticmethod
    def of(words: list[tuple[int, ...]]) -> "_Words":
        lengths = _ints([len(word) - 1 for word in words])
        return _Words(
            ends=_ints([word[-1] for word in words]),
            numbers=np.repeat(np.arange(len(words), dtype=np.int32), lengths),
            tokens=np.array([token for word in words for token in word[:-1]], np.int32),
            back=np.concatenate([np.arange(length, 0, -1, dtype=np.int32) for length in lengths]),
        )


class LogitEdits:
    """The rows that change their logits, and which tokens appeared in those that are penalized for it."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._upload = Upload(device)
        self._rows: dict[int, _Row] = {}
        self._free: list[int] = []
        self._counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)  # how often it was generated
        self._seen = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)  # in the prompt or the output
        self._allowed = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self._last = torch.zeros((num_rows, 0), dtype=torch.int32, device=device)  # tokens: as many as words begin with

    def __contains__(self, row: int) -> bool:
        return row in self._rows

    def __bool__(self) -> bool:
        return bool(self._rows)

    def set_rows(self, news: Iterable[NewRow]) -> None:
        """Requests take these rows. How many operations the device runs does not depend on how many they are."""
        slotted: list[tuple[int, NewRow]] = []
        worded: list[tuple[NewRow, _Words]] = []
        for new in {new.row: new for new in news}.values():
            old = self._rows.pop(new.row, None)
            if old is not None and old.slot >= 0:
                self._free.append(old.slot)
            params = new.params
            if not params.edits_logits:
                continue
            row = self._rows[new.row] = _Row(params, new.num_prompt)
            bad = [word for word in params.bad_words if word[-1] < self._vocab_size]  # a tokenizer may know more tokens
            row.bans = _ints([word[0] for word in bad if len(word) == 1])
            ends = _ints([token for token in params.stop_token_ids if token < self._vocab_size])
            row.early_bans = np.concatenate((row.bans, ends))
            if params.logit_bias:
                ids, values = list(params.logit_bias), list(params.logit_bias.values())
                row.bias = np.array(ids, np.int64), np.array(values, np.float32)
            if params.penalized or params.allowed_token_ids:
                row.slot = self._take_slot()
                slotted.append((row.slot, new))
            if words := [word for word in bad if len(word) > 1]:
                row.words = _Words.of(words)
                worded.append((new, row.words))
        if slotted:
            self._fill_slots(slotted)
        if worded:
            self._keep_last(worded)

    def _fill_slots(self, slotted: list[tuple[int, NewRow]]) -> None:
        slots = _ints([slot for slot, _ in slotted])
        logs = [new.tokens.astype(np.int64) if new.params.penalized else _NOTHING for _, new in slotted]
        outputs = [log[new.num_prompt :] for log, (_, new) in zip(logs, slotted, strict=True)]
        allowed = [new.params.allowed_token_ids.ids() for _, new in slotted]
        unlimited = _ints([slot for slot, new in slotted if not new.params.allowed_token_ids])
        arrays = [slots, unlimited, *_entries(slots, logs), *_entries(slots, outputs), *_entries(slots, allowed)]
        all_slots, open_slots, *entries = self._upload(arrays)
        yes, one = self._seen.new_ones(()), self._counts.new_ones(())
        self._seen.index_fill_(0, all_slots, False).index_put_((entries[0], entries[1]), yes)
        self._counts.index_fill_(0, all_slots, 0).index_put_((entries[2], entries[3]), one, accumulate=True)
        self._allowed.index_fill_(0, all_slots, False).index_fill_(0, open_slots, True)
        self._allowed.index_put_((entries[4], entries[5]), yes)

    def _keep_last(self, worded: list[tuple[NewRow, _Words]]) -> None:
        width = max(self._last.shape[1], *(int(words.back.max()) for _, words in worded))
        if width > self._last.shape[1]:
            more = self._last.new_full((len(self._last), width - self._last.shape[1]), _NONE)
            self._last = torch.cat((more, self._last), 1)
        known = [new.tokens[-width:] for new, _ in worded]
        padded = [np.pad(tokens, (width - len(tokens), 0), constant_values=_NONE) for tokens in known]
        rows, last = self._upload([_ints([new.row for new, _ in worded]), np.stack(padded)])
        self._last.index_copy_(0, rows, last)

    def _take_slot(self) -> int:
        if not self._free:
            held = len(self._counts)
            more = max(_FIRST_SLOTS, held)
            self._counts, self._seen, self._allowed = (
                torch.cat((table, table.new_zeros((more, self._vocab_size))))
                for table in (self._counts, self._seen, self._allowed)
            )
            self._free = list(range(held + more - 1, held - 1, -1))
        return self._free.pop()

    def arrays(self, places: Places, by_row: Mapping[int, range], complete: Collection[int] = ()) -> dict[str, Array]:
        """What `apply` and `remember` take, on the host. `by_row`: row → where it has its places. `complete`: places
        where nothing but an end may come, be it too early."""
        spans = [(number, self._rows[number], where) for number, where in by_row.items() if number in self._rows]
        each = [(place, row) for _, row, where in spans for place in where]
        found: dict[str, Array] = {}
        if limited := [(place, row.slot) for place, row in each if row.params.allowed_token_ids]:
            found["limited"], found["limited_slots"] = _columns(limited)
        positions = places.positions.tolist()
        banned = [
            (place, row.early_bans if row.early(positions[place]) and place not in complete else row.bans)
            for place, row in each
            if len(row.early_bans)
        ]
        if any(len(tokens) for _, tokens in banned):
            found["banned"], found["banned_tokens"] = _entries(
                _ints([place for place, _ in banned]), [tokens for _, tokens in banned]
            )
        if worded := [(number, row.words, where) for number, row, where in spans if row.words is not None]:
            self._find_words(found, worded, places)
        if biased := [(place, *row.bias) for place, row in each if row.bias is not None]:
            found["biased"] = np.repeat(_ints([place for place, _, _ in biased]), [len(ids) for _, ids, _ in biased])
            found["biased_tokens"] = np.concatenate([ids for _, ids, _ in biased])
            found["biases"] = np.concatenate([values for _, _, values in biased])
        if penalized := [(place, row) for place, row in each if row.params.penalized]:
            found["penalized"], found["slots"] = _columns([(place, row.slot) for place, row in penalized])
            asked = [row.params for _, row in penalized]
            found["factors"] = np.array(
                [
                    [p.repetition_penalty for p in asked],
                    [p.frequency_penalty for p in asked],
                    [p.presence_penalty for p in asked],
                ],
                np.float32,
            )
            if places.drafted:
                self._count_drafts(found, places)
        return found

    def _find_words(self, found: dict[str, Array], worded: list[tuple[int, _Words, range]], places: Places) -> None:
        """Where to look for their beginnings: in what is kept of the rows' last tokens, and past that in the drafts."""
        size, width = self._last.numel(), self._last.shape[1]
        each = [(place, place - where.start, number, words) for number, words, where in worded for place in where]
        counts = [len(words.ends) for *_, words in each]
        found["kept_rows"] = _ints([number for number, _, _ in worded])
        found["kept"] = _ints([where.start for _, _, where in worded])
        found["worded"] = np.repeat(_ints([place for place, *_ in each]), counts)
        found["ends"] = np.concatenate([words.ends for *_, words in each])
        found["begun"] = np.concatenate([words.tokens for *_, words in each])
        back = np.concatenate([words.back for *_, words in each])
        lengths = [len(words.back) for *_, words in each]
        place, drafts, row = np.repeat(np.array([numbers for *numbers, _ in each], np.int32).T, lengths, 1)
        first = np.repeat(np.cumsum([0, *counts[:-1]], dtype=np.int32), lengths)
        found["begun_words"] = first + np.concatenate([words.numbers for *_, words in each])
        found["begun_places"] = np.where(back > drafts, (row + 1) * width + drafts - back, size + place + 1 - back)
        if places.drafted:
            found["kept_ends"] = _ints([where.stop for _, _, where in worded])
            found["drafts"] = places.drafts

    def _count_drafts(self, found: dict[str, Array], places: Places) -> None:
        """The drafts before each penalized place. One that the model has no logits of is none that comes."""
        where = found["penalized"]
        before = where - places.firsts()[where]
        numbers = np.arange(len(where))
        found["penalized_firsts"] = numbers - before
        found["counted"] = np.repeat(numbers, before)
        back = np.arange(len(found["counted"])) - np.repeat(np.cumsum(before) - before, before)
        found["counted_tokens"] = np.minimum(places.drafts[np.repeat(where, before) - back], self._vocab_size - 1)

    def apply(self, logits: Tensor, step: Mapping[str, Tensor]) -> None:
        """Everything before temperature, in place. logits [S, V]; `step`: `arrays` on the device."""
        impossible = logits.new_full((), float("-inf"))
        if "limited" in step:
            x = logits.index_select(0, step["limited"])
            x.masked_fill_(~self._allowed.index_select(0, step["limited_slots"]), float("-inf"))
            logits.index_copy_(0, step["limited"], x)
        if "banned" in step:
            logits.index_put_((step["banned"], step["banned_tokens"]), impossible)
        if "worded" in step:
            known = self._last.view(-1)
            known = torch.cat((known, step["drafts"])) if "drafts" in step else known
            other = known.index_select(0, step["begun_places"]) != step["begun"]
            others = torch.zeros_like(step["ends"], dtype=torch.int32).index_add_(0, step["begun_words"], other.int())
            stands = torch.where(others == 0, impossible, 0.0)
            logits.index_put_((step["worded"], step["ends"]), stands, accumulate=True)
        if "biased" in step:
            logits.index_put_((step["biased"], step["biased_tokens"]), step["biases"], accumulate=True)
        if "penalized" in step:
            self._penalize(logits, step)

    def _penalize(self, logits: Tensor, step: Mapping[str, Tensor]) -> None:
        where, slots = step["penalized"], step["slots"]
        repetition, frequency, presence = step["factors"][:, :, None].unbind(0)  # [n, 1]
        x = logits.index_select(0, where)
        seen, counts = self._seen.index_select(0, slots), self._counts.index_select(0, slots)
        if "counted" in step:
            drafts = step["counted"], step["counted_tokens"].long()
            seen.index_put_(drafts, seen.new_ones(()))
            counts.index_put_(drafts, counts.new_ones(()), accumulate=True)
        x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
        x -= frequency * counts
        x -= presence * (counts > 0)
        logits.index_copy_(0, where, x)

    def remember(self, tokens: Tensor, step: Mapping[str, Tensor]) -> None:
        """The tokens [S] that were drawn: REJECTED at places that are not valid, -1 where none could be; such a row
        ends, so it does not matter."""
        if "penalized" in step:
            drawn, slots = tokens.index_select(0, step["penalized"]), step["slots"]
            one = self._counts.new_ones(())
            if "penalized_firsts" in step:
                one = (drawn >= 0).int()
                drawn = torch.where(drawn >= 0, drawn, drawn.index_select(0, step["penalized_firsts"]))
            drawn = drawn.clamp(min=0).long()
            self._counts.index_put_((slots, drawn), one, accumulate=True)
            self._seen.index_put_((slots, drawn), self._seen.new_ones(()))
        if "kept" in step:
            rows = step["kept_rows"]
            if "kept_ends" in step:
                last = self._moved_on(tokens, rows, step["kept"], step["kept_ends"])
            else:
                drawn = tokens.index_select(0, step["kept"])
                last = torch.cat((self._last.index_select(0, rows)[:, 1:], drawn[:, None]), 1)
            self._last.index_copy_(0, rows, last)

    def _moved_on(self, tokens: Tensor, rows: Tensor, firsts: Tensor, ends: Tensor) -> Tensor:
        """The last tokens of rows that drew at the places from `firsts` to before `ends`: each moves on by how many
        are valid, and those stand first."""
        size, width = self._last.numel(), self._last.shape[1]
        came = F.pad((tokens >= 0).cumsum(0), (1, 0))
        count = came.index_select(0, ends) - came.index_select(0, firsts)
        at = count[:, None] + torch.arange(width, device=tokens.device)  # from the oldest kept so far
        where = torch.where(at < width, rows[:, None] * width + at, size + firsts[:, None] + at - width)
        return torch.cat((self._last.view(-1), tokens)).index_select(0, where.view(-1)).view(-1, width)


def _ints(numbers: list[int] | tuple[int, ...]) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


def _entries(slots: NDArray[np.int64], tokens: list[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Slot and token of each token of each slot."""
    return np.repeat(slots, [len(some) for some in tokens]), np.concatenate(tokens)


def _columns(pairs: list[tuple[int, int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    first, second = np.array(pairs, np.int64).T
    return np.ascontiguousarray(first), np.ascontiguousarray(second)
