"""From logits to tokens. V vocabulary, S places at which rows draw.

Order, as in the field: log-probabilities are of the raw logits; then allowed tokens, bad words, logit bias,
min_tokens and penalties, and what grammars allow; then greedy, or temperature, min-p, top-k, top-p and a draw by
inversion of the cumulative distribution. Nothing here waits for the device but grammars, for the tokens drawn last.

At places behind drafts all of that is done as if the drafts had been drawn. A place is valid while each draft before it
is what was drawn at the place before: so what a row draws at valid places is what it would have drawn step by step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from quire_kernels.backends import Backend
from quire_kernels.sampling import Rows
from torch import Tensor

from quire_engine.guidance.compiled import Guides
from quire_engine.guidance.rows import GuidedRows, Masks
from quire_engine.request import EngineSampling, TokenSet
from quire_engine.sampling.edits import LogitEdits
from quire_engine.step import REJECTED, Failure, NewRow, Places, TokenLogprobs
from quire_engine.upload import Upload

_EDITS: dict[str, Any] = {
    "logit_bias": {0: 1.0},
    "allowed_token_ids": TokenSet.of((0, 1)),
    "bad_words": ((2,), (2, 3)),
    "repetition_penalty": 1.1,
}
EVERY_DRAW = (  # the ways in which a step draws
    EngineSampling(temperature=0.0),
    EngineSampling(temperature=1.0),
    EngineSampling(temperature=1.0, top_k=2, top_p=0.9, min_p=0.1),
    EngineSampling(temperature=0.0, logprobs=1, **_EDITS),
)


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
    """One token per place, on the device; -1 where no logit was finite, REJECTED at places that are not valid."""

    tokens: Tensor  # [S] int32
    scores: TokenScores | None  # of the places below, in their order, valid or not
    scored: list[tuple[int, int, range]] = field(default_factory=list)  # row, width, its places
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

    def draw(self, logits: Tensor, places: Places, parameters: Rows) -> Drawn:
        """One token per place. logits [S, V] fp32 (changed in place)."""
        filtered = bool(self._filters[places.rows].any())
        guided = self._guided or None
        by_row = places.by_row() if self._logprobs or self._edits or guided else {}
        scored = [(row, self._logprobs[row], where) for row, where in by_row.items() if row in self._logprobs]
        masks = guided.masks(places, by_row) if guided is not None else Masks()
        edited = masks.places.size or any(row in self._edits for row in by_row)
        arrays = self._edits.arrays(places, by_row, masks.complete) if edited else {}
        if masks.places.size:
            arrays["masked"], arrays["masks"] = masks.places, masks.bits
        if scored:
            arrays["scored"] = np.concatenate([np.array(where, np.int64) for _, _, where in scored])
        if places.drafted:
            arrays["expected"], arrays["firsts"] = self._expected(places, masks), places.firsts()
        step = dict(zip(arrays, self._upload(list(arrays.values())), strict=True)) if arrays else {}
        raw = logits
        if scored and (edited or len(arrays["scored"]) < len(places.rows)):
            raw = logits.index_select(0, step["scored"])
        if edited:
            self._edits.apply(logits, step)
        if "masks" in step:
            self._ops.mask_logits(logits, step["masked"], step["masks"])
        tokens = self._ops.draw(logits, parameters, filtered)
        if "expected" in step:
            tokens = verified(tokens, step["expected"], step["firsts"])
        self._edits.remember(tokens, step)
        failed = self._follow(tokens, by_row)
        if not scored:
            return Drawn(tokens, None, failed=failed)
        chosen = tokens.index_select(0, step["scored"])
        scores = token_scores(raw, chosen.clamp(min=0), max(width for _, width, _ in scored))
        return Drawn(tokens, scores, scored, failed)

    def guess(self, logits: Tensor, rows: NDArray[np.int32], parameters: Rows) -> Tensor:
        """What `draw` would give for another model's logits of these rows, without edits. logits [S, its vocabulary]
        fp32."""
        size = logits.shape[1]
        if size < self._vocab_size:
            parameters = replace(parameters, top_k=torch.where(parameters.top_k < size, parameters.top_k, 0))
        return self._ops.draw(logits, parameters, bool(self._filters[rows].any()))

    def _expected(self, places: Places, masks: Masks) -> NDArray[np.int32]:
        """The drafts, and where grammars could not follow one, a token that is never drawn."""
        if not masks.cut:
            return places.drafts
        drafts = places.drafts.copy()
        drafts[list(masks.cut)] = self._vocab_size
        return drafts

    def _follow(self, tokens: Tensor, by_row: Mapping[int, range]) -> dict[int, Failure]:
        """Grammars go on from what was drawn; which rows cannot, and why."""
        if not self._guided:
            return {}
        self._guided.remember(tokens, by_row)
        return self._guided.failures(by_row)


def verified(tokens: Tensor, drafts: Tensor, firsts: Tensor) -> Tensor:
    """Tokens [S] with REJECTED where a draft of the row up to there is not the token drawn before it. drafts [S], -1 at
    a row's first place, which is `firsts` [S] for each."""
    wrong = ((drafts >= 0) & (tokens.roll(1) != drafts)).cumsum(0)
    return torch.where(wrong == wrong.index_select(0, firsts), tokens, REJECTED)


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
