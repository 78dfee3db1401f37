"""What requests change in their logits before a token is drawn: allowed tokens, bad words, biases, penalties.

All rows of a step together: how many operations the device runs does not depend on how many rows ask for changes. V
vocabulary, n rows that do.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire_engine.execution.plan import NewRow
from quire_engine.sampling.params import EngineSampling

_FIRST_SLOTS = 8


@dataclass(slots=True)
class _Row:
    """What is remembered of a row, on the host."""

    params: EngineSampling
    num_prompt: int
    length: int  # of the whole log, in tokens
    tokens: list[int]  # the log; kept up to date where bad words have several tokens
    slot: int = -1  # of the tables of tokens that appeared, where it has penalties
    bias: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None
    allowed: Tensor | None = None  # [V] 0 where allowed, -inf elsewhere
    bans: list[int] = field(default_factory=list)  # bad words of one token


class LogitEdits:
    """The rows that change their logits, and which tokens appeared in those that are penalized for it."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._rows: dict[int, _Row] = {}
        self._free: list[int] = []
        self._counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)  # how often it was generated
        self._seen = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)  # in the prompt or the output

    def __contains__(self, row: int) -> bool:
        return row in self._rows

    def __bool__(self) -> bool:
        return bool(self._rows)

    def set_row(self, new: NewRow, length: int) -> None:
        """A request with `length` tokens in its log takes the row."""
        old = self._rows.pop(new.row, None)
        if old is not None and old.slot >= 0:
            self._free.append(old.slot)
        params = new.params
        if not params.edits_logits:
            return
        row = self._rows[new.row] = _Row(params, new.num_prompt, length, list(new.tokens))
        row.bans = [word[0] for word in params.bad_words if len(word) == 1]
        if params.logit_bias:
            ids, values = list(params.logit_bias), list(params.logit_bias.values())
            row.bias = np.array(ids, np.int64), np.array(values, np.float32)
        if params.allowed_token_ids:
            row.allowed = torch.full((self._vocab_size,), float("-inf"), device=self._device)
            row.allowed[list(params.allowed_token_ids)] = 0.0
        if params.penalized:
            row.slot = self._take_slot()
            log = torch.tensor(new.tokens, dtype=torch.int64, device=self._device)
            self._counts[row.slot] = torch.bincount(log[new.num_prompt :], minlength=self._vocab_size)
            self._seen[row.slot] = False
            self._seen[row.slot, log] = True

    def _take_slot(self) -> int:
        if not self._free:
            held = len(self._counts)
            more = max(_FIRST_SLOTS, held)
            self._counts = torch.cat((self._counts, self._counts.new_zeros((more, self._vocab_size))))
            self._seen = torch.cat((self._seen, self._seen.new_zeros((more, self._vocab_size))))
            self._free = list(range(held + more - 1, held - 1, -1))
        return self._free.pop()

    def apply(self, logits: Tensor, places: dict[int, int]) -> None:
        """Everything before temperature, in place. logits [S, V]; `places`: row → its place among them."""
        rows = [(place, self._rows[number]) for number, place in places.items() if number in self._rows]
        if masked := [(place, row.allowed) for place, row in rows if row.allowed is not None]:
            masks = torch.stack([mask for _, mask in masked])
            logits.index_add_(0, self._upload([place for place, _ in masked]), masks)
        banned = [(place, token) for place, row in rows for token in _banned(row)]
        if banned:
            where, tokens = self._upload([place for place, _ in banned]), self._upload([token for _, token in banned])
            logits.index_put_((where, tokens), logits.new_full((), float("-inf")))
        if biased := [(place, *row.bias) for place, row in rows if row.bias is not None]:
            where = self._upload(np.repeat([place for place, _, _ in biased], [len(ids) for _, ids, _ in biased]))
            tokens = self._upload(np.concatenate([ids for _, ids, _ in biased]))
            values = torch.from_numpy(np.concatenate([values for _, _, values in biased])).to(self._device)
            logits.index_put_((where, tokens), values, accumulate=True)
        if penalized := [(place, row) for place, row in rows if row.slot >= 0]:
            self._penalize(logits, penalized)

    def _penalize(self, logits: Tensor, rows: list[tuple[int, _Row]]) -> None:
        where, slots = self._upload([place for place, _ in rows]), self._upload([row.slot for _, row in rows])
        each = [row.params for _, row in rows]
        factors = np.array([(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in each], np.float32)
        repetition, frequency, presence = torch.from_numpy(factors).to(self._device)[:, :, None].unbind(1)  # [n, 1]
        x = logits.index_select(0, where)
        seen, counts = self._seen.index_select(0, slots), self._counts.index_select(0, slots)
        x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
        x -= frequency * counts
        x -= presence * (counts > 0)
        logits.index_copy_(0, where, x)

    def remember(self, tokens: Tensor, places: dict[int, int]) -> None:
        """The tokens [S] that were drawn, -1 where none could be: such a row ends, so it does not matter."""
        rows = [(place, self._rows[number]) for number, place in places.items() if number in self._rows]
        for place, row in rows:
            row.length += 1
            if any(len(word) > 1 for word in row.params.bad_words):
                row.tokens.append(int(tokens[place].item()))
        if penalized := [(place, row.slot) for place, row in rows if row.slot >= 0]:
            drawn = tokens.index_select(0, self._upload([place for place, _ in penalized])).clamp(min=0).long()
            slots = self._upload([slot for _, slot in penalized])
            self._counts.index_put_((slots, drawn), self._counts.new_ones(()), accumulate=True)
            self._seen.index_put_((slots, drawn), self._seen.new_ones(()))

    def _upload(self, numbers: list[int] | NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.asarray(numbers, np.int64)).to(self._device, non_blocking=True)


def _banned(row: _Row) -> list[int]:
    """Tokens that must not come next: of bad words whose beginning stands, and what would end the text too early."""
    words = [word for word in row.params.bad_words if len(word) > 1]
    banned = row.bans + [word[-1] for word in words if tuple(row.tokens[1 - len(word) :]) == word[:-1]]
    if row.length - row.num_prompt < row.params.min_tokens:
        banned += row.params.stop_token_ids
    return banned
