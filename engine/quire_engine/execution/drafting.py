"""A draft model or head beside the model on a worker: it reads whatever the model computes, and guesses before a step
the tokens that the plan leaves open.

B requests with drafts, T tokens of a step, S places at which a token is drawn.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire_engine.batch import Batcher, StepBatch
from quire_engine.config import SchedulerLimits
from quire_engine.layers.caches import LayerCache
from quire_engine.models.drafts import Guesser
from quire_engine.parallel import ParallelGroup
from quire_engine.sampling.sampler import Sampler
from quire_engine.step import REJECTED, TO_GUESS, Ints, Places, StepPlan


class Drafting:
    """On every rank, for what is guessed is told to all; the guesser is on the last stage.

    A head stands one token behind (EAGLE, Li et al., arXiv 2401.15077): at the place of token i it reads the model's
    state there and token i + 1, and what it makes of them tells token i + 2. The pages of a prefix that requests share
    therefore end in a place that has read the first one's next token. That is a guess's only harm: it may be wrong.
    """

    def __init__(
        self,
        guesser: Guesser | None,
        caches: list[LayerCache],
        group: ParallelGroup,
        batcher: Batcher,
        sampler: Sampler,
        limits: SchedulerLimits,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`group`: of all stages. `dtype`: of states."""
        self._guesser = guesser
        self._caches = caches
        self._group = group
        self._batcher = batcher
        self._sampler = sampler
        self._vocab_size = limits.vocab_size
        self._states: Tensor | None = None  # [rows + 1, hidden] what a row's first guess is made from
        if guesser is not None and guesser.reads_states:
            size = (limits.max_num_seqs + 1, guesser.spec.hidden_size)
            self._states = torch.zeros(size, dtype=dtype, device=device)

    def on_progress(self, mark: Callable[[], None]) -> None:
        """`mark` is called after each layer."""
        if self._guesser is not None:
            self._guesser.progress = mark

    def room(self, tokens: int, hidden: int) -> Tensor | None:
        """For what `follow` reads of so many tokens of a captured step, of a model of that width."""
        if self._states is None or self._guesser is None:
            return None
        return self._states.new_zeros((tokens, hidden * max(1, len(self._guesser.taps))))

    def follows(self, plan: StepPlan) -> bool:
        """Whether the guesser, which is here, reads that step: a head does, and a draft model no more than it has to
        before it guesses."""
        return self._guesser is not None and (self._states is not None or plan.with_prompts)

    def warm_up(self, batch: StepBatch, states: Tensor | None) -> None:
        """Launches what a step of that shape will."""
        nothing = replace(StepPlan.empty(), with_prompts=True)
        self.follow(nothing, nothing.places(), batch, batch.token_ids, states, None)

    def warm_up_draws(self) -> None:
        """Launches what it takes to guess twice for row 0, as its parameters have it."""
        row, start, count = (np.array([number], np.int32) for number in (0, 1, 1))
        states = self._read(row, start, count, row) if self._states is None else self._states[:1]
        self._guessed(row, start, count + 1, states)

    def guess(self, plan: StepPlan) -> StepPlan:
        """The plan with the tokens that it leaves open. Waits for the device where there are some."""
        reads = plan.read_rows, plan.read_starts, plan.read_counts, plan.read_ids
        if not (plan.token_ids == TO_GUESS).any():
            if len(plan.read_rows):
                self._read(*reads)
            return plan
        drafted = np.flatnonzero(plan.draws > 1)
        order = drafted[np.argsort(-plan.draws[drafted], kind="stable")]  # so that those that go on are the first
        rows, draws = plan.rows[order], plan.draws[order]
        ends = np.cumsum(plan.counts, dtype=np.int32)[order] - draws  # their last certain tokens
        positions = plan.starts[order] + plan.counts[order] - draws
        if self._states is None:
            states = self._read(*reads)
            if states is not None:
                places = dict(zip(plan.read_rows.tolist(), range(len(plan.read_rows)), strict=True))
                [where] = self._batcher.upload([np.array([places[row] for row in rows.tolist()], np.int32)])
                states = states.index_select(0, where)
        else:
            [where] = self._batcher.upload([rows])
            states = self._states.index_select(0, where)
        found = self._guessed(rows, positions, draws - 1, states)
        token_ids = plan.token_ids.copy()
        token_ids[np.concatenate([ends[: len(tokens)] + step for step, tokens in enumerate(found, 1)])] = to_host(found)
        return replace(plan, token_ids=token_ids)

    def _read(self, rows: Ints, starts: Ints, counts: Ints, token_ids: Ints) -> Tensor | None:
        """By tokens alone: what each row has further → states [D, hidden] behind it; None: the guesser is elsewhere, or
        goes by the model's states."""
        if self._guesser is None or self._guesser.reads_states:
            return None
        batch = self._batch_of(rows, starts, counts, token_ids, starts + counts)
        states = self._guesser(batch.token_ids, None, batch.attention, self._caches)
        [ends] = self._batcher.upload([np.cumsum(counts, dtype=np.int32) - 1])
        return states.index_select(0, ends)

    def _guessed(self, rows: Ints, positions: Ints, lengths: Ints, states: Tensor | None) -> list[Tensor]:
        """For rows, those with most drafts first, the tokens behind their last ones at these positions: first drafts,
        second ones, and so on. [B], and ever fewer. states [B, hidden]: what the first are guessed from, where the
        guesser is."""
        guesser, found = self._guesser, list[Tensor]()
        for step in range(int(lengths[0])):
            count = int(np.count_nonzero(lengths > step))
            if guesser is None:
                [following] = self._batcher.upload([np.zeros(count, np.int32)])
            else:
                assert states is not None
                behind = int(guesser.reads_states)
                at, each = positions[:count] + step, np.ones(count, np.int32)
                batch = self._batch_of(rows[:count], at - behind, each, 0 * each, at + 1)
                if step:
                    states = guesser(found[-1][:count], states[:count], batch.attention, self._caches)
                logits = guesser.logits(states[:count])
                following = batch.token_ids if logits is None else self._drawn(guesser, logits, rows[:count], batch)
            self._group.share_drawn(following)
            found.append(following)
        return found

    def _batch_of(self, rows: Ints, starts: Ints, counts: Ints, token_ids: Ints, drawn: Ints) -> StepBatch:
        """Tokens of rows, behind the last of which one is drawn for the position `drawn`."""
        draws = np.ones(len(rows), np.int32)
        plan = replace(StepPlan.empty(), rows=rows, starts=starts, counts=counts, token_ids=token_ids, draws=draws)
        shape = self._batcher.shape(plan)
        arrays = self._batcher.arrays(plan, Places.alone(rows, drawn), shape)
        return self._batcher.assemble(self._batcher.upload(arrays), shape, int((starts + counts).max()))

    def _drawn(self, guesser: Guesser, logits: Tensor, rows: Ints, batch: StepBatch) -> Tensor:
        """With the random numbers that the sampler will draw by, so that like distributions give the same token."""
        if guesser.vocabulary is None and logits.shape[1] > self._vocab_size:
            logits = logits[:, : self._vocab_size].contiguous()
        tokens = self._sampler.guess(logits, rows, batch.draws.parameters).clamp(min=0)
        return tokens if guesser.vocabulary is None else guesser.vocabulary.index_select(0, tokens)

    def follow(
        self,
        plan: StepPlan,
        places: Places,
        batch: StepBatch,
        known: Tensor,
        states: Tensor | None,
        drawn: Tensor | None,
    ) -> None:
        """Reads a step that was computed: its tokens [T], states [T, taps * hidden] of the model, and what was drawn
        [S], if anything was."""
        guesser = self._guesser
        if guesser is None or not self.follows(plan):
            return
        if self._states is None:
            guesser(known, None, batch.attention, self._caches)
            return
        assert states is not None, "the guesser is on the last stage"
        arrays = (self._following(plan, len(known)), _ends(places), plan.draw_places(), places.rows)
        following, ends, at, rows = self._batcher.upload(arrays)
        if drawn is not None:
            following.index_copy_(0, at.long(), drawn.clamp(0, self._vocab_size - 1))
        made = guesser(following, guesser.combined(states), batch.attention, self._caches)
        if drawn is not None:
            valid = drawn != REJECTED
            last = valid & (ends | ~valid.roll(-1))
            to = torch.where(last, rows, len(self._states) - 1)
            self._states.index_copy_(0, to.long(), made.index_select(0, at))

    @staticmethod
    def _following(plan: StepPlan, tokens: int) -> Ints:
        """[T] the token behind each, where the plan knows it, padded with zeros."""
        following = np.zeros(tokens, np.int32)
        count = len(plan.token_ids)
        if count:
            following[: count - 1] = plan.token_ids[1:]
            ends = np.cumsum(plan.counts) - 1
            following[ends[plan.draws == 0]] = plan.next_ids
        return np.maximum(following, 0)


def to_host(tokens: list[Tensor]) -> Ints:
    """All of them, on the host."""
    return torch.cat(tokens).cpu().numpy()


def _ends(places: Places) -> NDArray[np.bool_]:
    """[S] whether a place is its row's last."""
    return np.append(places.drafts[1:], np.full(min(len(places.drafts), 1), -1, np.int32)) < 0
