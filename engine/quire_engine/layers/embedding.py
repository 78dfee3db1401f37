"""The token embedding and the output head, sliced by vocabulary over the ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quire_engine.layers.linear import Builder, shard
from quire_engine.parallel import ParallelGroup
from quire_engine.weights.tensors import Weights

_COMPARED = 4096  # rows at once


def _padded(vocab_size: int, group: ParallelGroup) -> int:
    return -(-vocab_size // group.size) * group.size


class Embedding:
    """Token ids [T] → [T, hidden]. Each rank holds an equal part of the vocabulary, the last one padded with zeros."""

    def __init__(self, build: Builder, name: str, vocab_size: int, hidden: int) -> None:
        self._group = build.group
        self._part = shard(_padded(vocab_size, build.group), build.group)
        rows = slice(min(self._part.start, vocab_size), min(self._part.stop, vocab_size))
        table = build.weights.take(f"{name}.weight", (vocab_size, hidden), rows)
        missing = self._part.stop - self._part.start - table.shape[0]
        self.table = F.pad(table, (0, 0, 0, missing)) if missing else table
        self.vocab_size, self.hidden = vocab_size, hidden
        self._rows, self._missing = rows, missing

    def rows_of(self, name: str, weights: Weights) -> Tensor:
        """This rank's part of a vector as long as the vocabulary."""
        return F.pad(weights.take(name, (self.vocab_size,), self._rows), (0, self._missing))

    def equals(self, name: str, weights: Weights) -> bool:
        """Whether this rank's part of a tensor of the same shape is what this one holds."""
        for start in range(self._rows.start, self._rows.stop, _COMPARED):
            rows = slice(start, min(start + _COMPARED, self._rows.stop))
            part = weights.take(f"{name}.weight", (self.vocab_size, self.hidden), rows)
            if not torch.equal(part, self.table[rows.start - self._part.start : rows.stop - self._part.start]):
                return False
        return True

    def __call__(self, token_ids: Tensor) -> Tensor:
        if self._group.size == 1:
            return F.embedding(token_ids, self.table)
        local = token_ids - self._part.start
        mine = (local >= 0) & (local < self.table.shape[0])
        found = F.embedding(local.clamp(0, self.table.shape[0] - 1), self.table)
        return self._group.all_reduce(found * mine[:, None])


class OutputHead:
    """[S, hidden] → fp32 logits [S, vocabulary] on rank 0, None elsewhere. May share the embedding's table."""

    def __init__(self, build: Builder, table: Tensor, bias: Tensor | None, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._group = build.group
        self._matmul = build.ops.linear(table, bias)

    def __call__(self, hidden: Tensor, out: Tensor | None) -> Tensor | None:
        logits = self._group.gather_columns(self._matmul(hidden))
        if logits is None:
            return None
        logits = logits[:, : self._vocab_size]
        return logits.to(torch.float32) if out is None else out.copy_(logits)
