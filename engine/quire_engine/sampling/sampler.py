"""From logits to tokens. V vocabulary, S rows that draw.

Order, as in the field: log-probabilities are of the raw logits; then allowed tokens, bad words, logit bias,
min_tokens and penalties, and what grammars allow; then greedy, or temperature, min-p, top-k, top-p and a draw by
inversion of the cumulative distribution. Nothing here waits for the device but grammars, for the tokens drawn last.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from quire_kernels.backends import Backend
from quire_kernels.sampling import Rows
from torch import Tensor

from quire_engine.guidance.compiled import Guides
from quire_engine.guidance.rows import GuidedRows, Masks
from quire_engine.sampling.edits import LogitEdits
from quire_engine.step import Failure, NewRow, TokenLogprobs
from quire_engine.upload import Upload


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-probabilities of P positions as the model gave them; see TokenLogprobs."""

    chosen: Tensor  # [P]
    logprobs: Tensor  # [P]
    ranks: Tensor  # [P]
    top_ids: Tensor  # [P, width]
    top_logprobs: Tensor  # [P, width]

    def to_host(self) -> "TokenScores":
        """On their way to the host; readable once the stream has come that far."""
        return TokenScores(*(getattr(self, name).to("cpu", non_blocking=True) for name in TokenScores.__slots__))

    def read(self, part: slice, width: int) -> TokenLogprobs:
        """Some positions, with the `width` likeliest tokens of each. On the host."""
        return TokenLogprobs(
            chosen=self.chosen[part].numpy().astype(np.int32),
            logprobs=self.logprobs[part].numpy(),
            ranks=self.ranks[part].numpy().astype(np.int32),
            top_ids=self.top_ids[part, :width].numpy().astype(np.int32),
            top_logprobs=self.top_logprobs[part, :width].numpy(),
        )


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token per row, on the device; -1 where no logit was finite."""

    tokens: Tensor  # [S] int32
    scores: TokenScores | None  # of the rows below, in their order
    scored_rows: list[tuple[int, int]] = field(default_factory=list)  # row, width
    failed: dict[int, Failure] = field(default_factory=dict)  # by the row: why it cannot go on


class Sampler:
    """Keeps each row's parameters in tables, so that a step touches only what its rows ask for."""

    def __init__(
        self, num_rows: int, vocab_size: int, device: torch.device, ops: Backend, guides: Guides | None = None
    ) -> None:
        """`guides`: of a model whose outputs may have grammars."""
        self._vocab_size = vocab_size
        self._upload = Upload(device)
        self._ops = ops
        self._temperature = np.zeros(num_rows, np.float32)  # 0: greedy
        self._top_p = np.ones(num_rows, np.float32)
        self._top_k = np.zeros(num_rows, np.int32)  # 0: all
        self._min_p = np.zeros(num_rows, np.float32)
        self._seed = np.zeros(num_rows, np.int64)
        self._filters = np.zeros(num_rows, np.bool_)
        self._logprobs: dict[int, int] = {}
        self._edits = LogitEdits(num_rows, vocab_size, device)
        self._guided = GuidedRows(guides, vocab_size, device) if guides is not None else None

    def set_rows(self, news: Sequence[NewRow]) -> None:
        """Requests take these rows."""
        for new in news:
            row, params = new.row, new.params
            self._temperature[row] = 0.0 if params.greedy else params.temperature
            self._top_p[row] = params.top_p
            self._top_k[row] = params.top_k if 0 < params.top_k < self._vocab_size else 0
            self._min_p[row] = params.min_p
            self._seed[row] = np.uint64(params.seed).view(np.int64)
            self._filters[row] = not params.greedy and bool(self._top_k[row] or params.top_p < 1 or params.min_p)
            self._logprobs.pop(row, None)
            if params.logprobs is not None:
                self._logprobs[row] = params.logprobs
        self._edits.set_rows(news)
        if self._guided is not None:
            self._guided.set_rows(news)

    def warm_up(self, logits: Tensor) -> None:
        """Launches what masks need: no parameters do that by themselves. logits [1 or more, V] fp32."""
        places, bits = np.zeros(1, np.int64), np.full((1, -(-self._vocab_size // 32)), -1, np.int32)
        self._ops.mask_logits(logits, *self._upload([places, bits]))

    def tables(self, rows: NDArray[np.int32]) -> tuple[NDArray[np.generic], ...]:
        """What `Rows` holds of these rows, on the host: seeds, temperature, top-k, top-p, min-p."""
        return self._seed[rows], self._temperature[rows], self._top_k[rows], self._top_p[rows], self._min_p[rows]

    def draw(self, logits: Tensor, rows: NDArray[np.int32], parameters: Rows) -> Drawn:
        """One token per row. logits [S, V] fp32 (changed in place)."""
        filtered = bool(self._filters[rows].any())
        guided = self._guided or None
        special = self._logprobs or self._edits or guided
        places = {int(row): place for place, row in enumerate(rows)} if special else {}
        scored = [(row, self._logprobs[row]) for row in places if row in self._logprobs]
        masks = guided.masks(places) if guided is not None else Masks()
        edited = masks.places.size or any(row in self._edits for row in places)
        if not scored and not edited:
            tokens = self._ops.draw(logits, parameters, filtered)
            return Drawn(tokens, None, failed=self._follow(tokens, places))
        arrays = self._edits.arrays(places, masks.complete)
        if masks.places.size:
            arrays["masked"], arrays["masks"] = masks.places, masks.bits
        if scored:
            arrays["scored"] = np.array([places[row] for row, _ in scored], np.int64)
        step = dict(zip(arrays, self._upload(list(arrays.values())), strict=True))
        raw = logits
        if scored and (edited or len(scored) < len(rows)):
            raw = logits.index_select(0, step["scored"])
        self._edits.apply(logits, step)
        if "masks" in step:
            self._ops.mask_logits(logits, step["masked"], step["masks"])
        tokens = self._ops.draw(logits, parameters, filtered)
        self._edits.remember(tokens, step)
        failed = self._follow(tokens, places)
        if not scored:
            return Drawn(tokens, None, failed=failed)
        chosen = tokens.index_select(0, step["scored"])
        scores = token_scores(raw, chosen.clamp(min=0), max(width for _, width in scored))
        return Drawn(tokens, scores, scored, failed)

    def _follow(self, tokens: Tensor, places: Mapping[int, int]) -> dict[int, Failure]:
        """Grammars go on from what was drawn; which rows cannot, and why."""
        if not self._guided:
            return {}
        self._guided.remember(tokens, places)
        return self._guided.failures(places)


def token_scores(logits: Tensor, chosen: Tensor, width: int) -> TokenScores:
    """Of P positions: logits [P, V] raw, chosen [P]. Rank 1 is the most likely token."""
    ids = chosen.long()[:, None]
    # Softmax goes by rows; a sum (logsumexp's too) is cut up by how many rows there are, and its bits follow. A GPU's
    # starts at 16 bytes, so the rows have to.
    aligned = F.pad(logits, (0, missing), value=float("-inf")) if (missing := -logits.shape[1] % 4) else logits
    logprobs = aligned.log_softmax(-1)
    top = logits.topk(width)
    return TokenScores(
        chosen=chosen,
        logprobs=logprobs.gather(1, ids)[:, 0],
        ranks=(logits > logits.gather(1, ids)).sum(-1) + 1,
        top_ids=top.indices,
        top_logprobs=logprobs.gather(1, top.indices),
    )
