"""From logits to tokens. V vocabulary, S rows that draw.

Order, as in the field: log-probabilities are of the raw logits; then allowed tokens, bad words, logit bias,
min_tokens and penalties; then greedy, or temperature, min-p, top-k, top-p and a draw by inversion of the cumulative
distribution.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from quire_kernels.sampling.random import philox_uniform
from torch import Tensor

from quire_engine.execution.plan import NewRow, TokenLogprobs
from quire_engine.sampling.params import EngineSampling

_CANDIDATES = 1024  # top-p looks at so many before it sorts the whole vocabulary


@dataclass(slots=True)
class _EditedRow:
    """What a row that edits its logits remembers: tokens only where they matter."""

    params: EngineSampling
    num_prompt: int
    tokens: list[int]
    length: int  # of the whole log, in tokens
    counts: Tensor | None = None  # [V] how often each token was generated
    seen: Tensor | None = None  # [V] whether it is in the prompt or the output
    allowed: Tensor | None = None  # [V] 0 where allowed, -inf elsewhere


@dataclass(slots=True)
class Drawn:
    """One token per row; `failed` names rows (by place) without a single finite logit."""

    tokens: NDArray[np.int32]  # [S]
    logprobs: dict[int, TokenLogprobs]  # row → of the drawn token
    failed: dict[int, str]  # row → why


class Sampler:
    """Keeps each row's parameters in tables, so that a step touches only what its rows ask for."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._temperature = np.zeros(num_rows, np.float32)  # 0: greedy
        self._top_p = np.ones(num_rows, np.float32)
        self._top_k = np.zeros(num_rows, np.int64)  # 0: all
        self._min_p = np.zeros(num_rows, np.float32)
        self._seed = np.zeros(num_rows, np.uint64)
        self._logprobs: dict[int, int] = {}
        self._edited: dict[int, _EditedRow] = {}

    def set_row(self, new: NewRow, length: int) -> None:
        """A request with `length` tokens in its log takes the row."""
        row, params = new.row, new.params
        self._temperature[row] = 0.0 if params.greedy else params.temperature
        self._top_p[row] = params.top_p
        self._top_k[row] = params.top_k if 0 < params.top_k < self._vocab_size else 0
        self._min_p[row] = params.min_p
        self._seed[row] = params.seed
        self._logprobs.pop(row, None)
        self._edited.pop(row, None)
        if params.logprobs is not None:
            self._logprobs[row] = params.logprobs
        if params.edits_logits:
            self._edited[row] = self._edit_state(new, length)

    def _edit_state(self, new: NewRow, length: int) -> _EditedRow:
        params = new.params
        state = _EditedRow(params, new.num_prompt, list(new.tokens), length)
        if params.penalized:
            log = torch.tensor(new.tokens, dtype=torch.int64, device=self._device)
            state.counts = torch.bincount(log[new.num_prompt :], minlength=self._vocab_size).float()
            state.seen = torch.zeros(self._vocab_size, dtype=torch.bool, device=self._device)
            state.seen[log] = True
        if params.allowed_token_ids:
            state.allowed = torch.full((self._vocab_size,), float("-inf"), device=self._device)
            state.allowed[list(params.allowed_token_ids)] = 0.0
        return state

    def draw(self, logits: Tensor, rows: NDArray[np.int32], positions: NDArray[np.int64]) -> Drawn:
        """One token per row. logits [S, V] fp32 (changed in place); `positions` [S] of the tokens to be drawn."""
        places = {int(row): place for place, row in enumerate(rows)}
        raw = {row: logits[places[row]].clone() for row in places if row in self._logprobs}
        for row in self._edited.keys() & places.keys():
            self._edit(logits[places[row]], self._edited[row])
        best, greedy = logits.max(-1)
        tokens = greedy.cpu().numpy().astype(np.int32)
        finite = torch.isfinite(best).cpu().numpy()
        failed = {
            int(rows[place]): "no token has a finite logit: the parameters rule out all, or the model broke down"
            for place in np.flatnonzero(~finite)
        }
        random = np.flatnonzero((self._temperature[rows] > 0) & finite)
        if random.size:
            chosen = torch.from_numpy(random).to(self._device) if random.size < len(rows) else slice(None)
            tokens[random] = self._draw_random(logits[chosen], best[chosen], rows[random], positions[random])
        for row in self._edited.keys() & places.keys():
            self._remember(self._edited[row], int(tokens[places[row]]))
        logprobs = {
            row: token_logprobs(values[None], tokens[places[row]][None], self._logprobs[row])
            for row, values in raw.items()
        }
        return Drawn(tokens, logprobs, failed)

    # ---- edits ----------------------------------------------------------------------------------------------------

    @staticmethod
    def _edit(logits: Tensor, state: _EditedRow) -> None:
        """Everything before temperature, in place on one row [V]."""
        params = state.params
        if state.allowed is not None:
            logits += state.allowed
        for word in params.bad_words:
            before = word[:-1]
            if not before or tuple(state.tokens[-len(before) :]) == before:
                logits[word[-1]] = float("-inf")
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=logits.device)
            logits[ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
        if state.length - state.num_prompt < params.min_tokens:
            logits[list(params.stop_token_ids)] = float("-inf")
        if state.counts is not None and state.seen is not None:
            if params.repetition_penalty != 1.0:
                r = params.repetition_penalty
                logits.copy_(torch.where(state.seen, torch.where(logits > 0, logits / r, logits * r), logits))
            if params.frequency_penalty:
                logits -= params.frequency_penalty * state.counts
            if params.presence_penalty:
                logits -= params.presence_penalty * (state.counts > 0)

    @staticmethod
    def _remember(state: _EditedRow, token: int) -> None:
        state.length += 1
        if state.params.bad_words:
            state.tokens.append(token)
        if state.counts is not None and state.seen is not None:
            state.counts[token] += 1
            state.seen[token] = True

    # ---- draws ----------------------------------------------------------------------------------------------------

    def _draw_random(
        self, logits: Tensor, best: Tensor, rows: NDArray[np.int32], positions: NDArray[np.int64]
    ) -> NDArray[np.int32]:
        """logits [N, V], best [N] their maxima. Weights are e^((l - max) / temperature): the likeliest token has 1."""
        temperature = torch.from_numpy(self._temperature[rows]).to(self._device)[:, None]
        weights = ((logits - best[:, None]) / temperature).exp_()  # [N, V]
        min_p, top_k, top_p = self._min_p[rows], self._top_k[rows], self._top_p[rows]
        if min_p.any():
            weights.masked_fill_(weights < torch.from_numpy(min_p).to(self._device)[:, None], 0.0)
        for place in np.flatnonzero(top_k):
            least = weights[place].topk(int(top_k[place])).values[-1]
            weights[place].masked_fill_(weights[place] < least, 0.0)
        for place in np.flatnonzero(top_p < 1.0):
            least = self._nucleus_edge(weights[place], float(top_p[place]))
            weights[place].masked_fill_(weights[place] < least, 0.0)
        cumulative = weights.cumsum(-1)
        uniform = torch.from_numpy(philox_uniform(self._seed[rows], positions)).to(self._device)
        target = (uniform * cumulative[:, -1].double()).float()[:, None]
        # The product may round up to the total; then the search ends past the last possible token.
        target = torch.minimum(target, torch.nextafter(cumulative[:, -1:], torch.zeros_like(target)))
        found = torch.searchsorted(cumulative, target, right=True)
        return found[:, 0].cpu().numpy().astype(np.int32)

    @staticmethod
    def _nucleus_edge(weights: Tensor, top_p: float) -> Tensor:
        """The smallest weight in the nucleus: the fewest likeliest tokens that make up `top_p` (Holtzman et al.
        2020)."""
        wanted = weights.sum() * top_p
        count = min(_CANDIDATES, weights.shape[0])
        ordered = weights.topk(count).values
        cumulative = ordered.cumsum(-1)
        if cumulative[-1] < wanted and count < weights.shape[0]:
            ordered = weights.sort(descending=True).values
            cumulative = ordered.cumsum(-1)
        last = int((cumulative < wanted).sum())
        return ordered[min(last, ordered.shape[0] - 1)]


def token_logprobs(logits: Tensor, chosen: NDArray[np.int32], width: int) -> TokenLogprobs:
    """Of P positions: logits [P, V] raw, chosen [P]. Rank 1 is the most likely token."""
    ids = torch.from_numpy(chosen.astype(np.int64)).to(logits.device)[:, None]
    normalizer = logits.logsumexp(-1, keepdim=True)
    picked = logits.gather(1, ids)
    ranks = (logits > picked).sum(-1) + 1
    top = logits.topk(width) if width else None
    return TokenLogprobs(
        chosen=chosen.astype(np.int32),
        logprobs=(picked - normalizer)[:, 0].cpu().numpy(),
        ranks=ranks.cpu().numpy().astype(np.int32),
        top_ids=top.indices.cpu().numpy().astype(np.int32) if top else np.zeros((len(chosen), 0), np.int32),
        top_logprobs=(top.values - normalizer).cpu().numpy() if top else np.zeros((len(chosen), 0), np.float32),
    )
