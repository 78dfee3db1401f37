"""What requests change in their logits before a token is drawn: allowed tokens, bad words, biases, penalties.

All rows of a step together: how many operations the device runs does not depend on how many rows ask for changes. And
nothing here waits for the device: what the changes depend on that the host does not know yet (the tokens of steps in
flight) is kept there. V vocabulary, R rows, n rows or entries that a step changes.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire_engine.request import EngineSampling
from quire_engine.step import NewRow
from quire_engine.upload import Array, Upload

_FIRST_SLOTS = 8
_NONE = -1  # before a log's first token


@dataclass(slots=True)
class _Row:
    """What is remembered of a row, on the host."""

    params: EngineSampling
    num_prompt: int
    length: int  # of the whole log, in tokens
    slot: int = -1  # of the tables, where it has penalties or may draw from some tokens alone
    bias: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None
    bans: list[int] = field(default_factory=list)  # bad words of one token
    words: "_Words | None" = None  # of several
    ends: list[int] = field(default_factory=list)

    @property
    def early(self) -> bool:
        """Whether an end would come too early."""
        return self.length - self.num_prompt < self.params.min_tokens


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
            row = self._rows[new.row] = _Row(params, new.num_prompt, len(new.tokens))
            row.ends = [token for token in params.stop_token_ids if token < self._vocab_size]
            bad = [word for word in params.bad_words if word[-1] < self._vocab_size]  # a tokenizer may know more tokens
            row.bans = [word[0] for word in bad if len(word) == 1]
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
        logs = [new.tokens.astype(np.int64) if new.params.penalized else _ints(()) for _, new in slotted]
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

    def arrays(self, places: Mapping[int, int], complete: Collection[int] = ()) -> dict[str, Array]:
        """What `apply` and `remember` take, on the host. `places`: row → its place among those that draw. `complete`:
        rows where nothing but an end may come, be it too early."""
        rows = [(place, number, self._rows[number]) for number, place in places.items() if number in self._rows]
        found: dict[str, Array] = {}
        if limited := [(place, row.slot) for place, _, row in rows if row.params.allowed_token_ids]:
            found["limited"], found["limited_slots"] = _columns(limited)
        early = {number for _, number, row in rows if row.early and number not in complete}
        if banned := [
            (place, token)
            for place, number, row in rows
            for token in (row.bans + row.ends if number in early else row.bans)
        ]:
            found["banned"], found["banned_tokens"] = _columns(banned)
        if worded := [(place, number, row.words) for place, number, row in rows if row.words is not None]:
            width = self._last.shape[1]
            counts = [len(words.ends) for _, _, words in worded]
            firsts = np.cumsum([0, *counts[:-1]], dtype=np.int32)
            found["kept"], found["kept_rows"] = _columns([(place, number) for place, number, _ in worded])
            found["worded"] = np.repeat(found["kept"], counts)
            found["ends"] = np.concatenate([words.ends for _, _, words in worded])
            found["begun"] = np.concatenate([words.tokens for _, _, words in worded])
            found["begun_words"] = np.concatenate(
                [first + words.numbers for first, (_, _, words) in zip(firsts, worded, strict=True)]
            )
            found["begun_places"] = np.concatenate([(row + 1) * width - words.back for _, row, words in worded])
        if biased := [(place, *row.bias) for place, _, row in rows if row.bias is not None]:
            found["biased"] = np.repeat(_ints([place for place, _, _ in biased]), [len(ids) for _, ids, _ in biased])
            found["biased_tokens"] = np.concatenate([ids for _, ids, _ in biased])
            found["biases"] = np.concatenate([values for _, _, values in biased])
        if penalized := [(place, row) for place, _, row in rows if row.params.penalized]:
            found["penalized"], found["slots"] = _columns([(place, row.slot) for place, row in penalized])
            each = [row.params for _, row in penalized]
            found["factors"] = np.array(
                [
                    [p.repetition_penalty for p in each],
                    [p.frequency_penalty for p in each],
                    [p.presence_penalty for p in each],
                ],
                np.float32,
            )
        for _, _, row in rows:
            row.length += 1
        return found

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
            other = self._last.view(-1).index_select(0, step["begun_places"]) != step["begun"]
            others = torch.zeros_like(step["ends"], dtype=torch.int32).index_add_(0, step["begun_words"], other.int())
            stands = torch.where(others == 0, impossible, 0.0)
            logits.index_put_((step["worded"], step["ends"]), stands, accumulate=True)
        if "biased" in step:
            logits.index_put_((step["biased"], step["biased_tokens"]), step["biases"], accumulate=True)
        if "penalized" in step:
            self._penalize(logits, step["penalized"], step["slots"], step["factors"])

    def _penalize(self, logits: Tensor, where: Tensor, slots: Tensor, factors: Tensor) -> None:
        repetition, frequency, presence = factors[:, :, None].unbind(0)  # [n, 1]
        x = logits.index_select(0, where)
        seen, counts = self._seen.index_select(0, slots), self._counts.index_select(0, slots)
        x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
        x -= frequency * counts
        x -= presence * (counts > 0)
        logits.index_copy_(0, where, x)

    def remember(self, tokens: Tensor, step: Mapping[str, Tensor]) -> None:
        """The tokens [S] that were drawn, -1 where none could be: such a row ends, so it does not matter."""
        if "penalized" in step:
            drawn, slots = tokens.index_select(0, step["penalized"]).clamp(min=0).long(), step["slots"]
            self._counts.index_put_((slots, drawn), self._counts.new_ones(()), accumulate=True)
            self._seen.index_put_((slots, drawn), self._seen.new_ones(()))
        if "kept" in step:
            rows, drawn = step["kept_rows"], tokens.index_select(0, step["kept"])
            last = self._last.index_select(0, rows)
            self._last.index_copy_(0, rows, torch.cat((last[:, 1:], drawn[:, None]), 1))


def _ints(numbers: list[int] | tuple[int, ...]) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


def _entries(slots: NDArray[np.int64], tokens: list[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Slot and token of each token of each slot."""
    return np.repeat(slots, [len(some) for some in tokens]), np.concatenate(tokens)


def _columns(pairs: list[tuple[int, int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    first, second = np.array(pairs, np.int64).T
    return np.ascontiguousarray(first), np.ascontiguousarray(second)
