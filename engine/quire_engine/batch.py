"""A step's plan as tensors. T tokens of R requests, S of which draw a token at the end."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from quire_kernels.backends import AttentionBatch
from quire_kernels.recurrence import StateBatch
from quire_kernels.sampling import Rows
from torch import Tensor

from quire_engine.config import SchedulerLimits
from quire_engine.request import ImageSpan
from quire_engine.sampling.sampler import Sampler
from quire_engine.step import Ints, NewRow, Places, StepPlan
from quire_engine.upload import Array, Upload

_DRAWS, _STATES = 10, 15  # where what is known of those that draw, and of states, begins in a batch's arrays


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """What the sampler reads, on the device."""

    rows: Tensor  # [S] int32
    parameters: Rows


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """What the model reads, on the device, and for whom it draws."""

    token_ids: Tensor  # [T] int32; -1: the token drawn last for the row
    token_rows: Tensor  # [T] int32
    attention: AttentionBatch
    draw_places: Tensor | None  # [S] int32, of the tokens whose logits are sampled; None: all
    draws: Draws


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a batch, after padding. Batches of one shape have one layout, which is what a graph needs."""

    tokens: int
    requests: int
    draws: int
    longest_query: int  # at most


class Batcher:
    """Keeps the block tables, which plans update, and turns plans into batches."""

    def __init__(
        self, limits: SchedulerLimits, device: torch.device, sampler: Sampler, *, turned_apart: bool = False
    ) -> None:
        """`turned_apart`: the model's positions have a time, a row and a column (M-RoPE)."""
        longest = -(-limits.max_model_len // limits.block_size)
        self._block_size = limits.block_size
        self._device = device
        self._sampler = sampler
        self._spare_row = limits.max_num_seqs  # padding's: its pages are all page 0, which padding only reads
        self._spare_state = limits.num_states  # which padding writes
        self.upload = Upload(device)
        self._host_tables = np.zeros((limits.max_num_seqs + 1, longest), np.int32)
        self._tables = torch.from_numpy(self._host_tables).to(device)  # on a CPU the same memory
        self._turned_apart = turned_apart
        self._images: dict[int, Ints] = {}  # row → positions [3, n] of its tokens up to its last image
        self._shifts = np.zeros(limits.max_num_seqs + 1, np.int32)  # of positions behind that, against places

    def set_rows(self, news: Sequence[NewRow]) -> None:
        """Requests that take a row."""
        for new in news if self._turned_apart else ():
            self._images.pop(new.row, None)
            self._shifts[new.row] = 0
            if new.images:
                self._images[new.row], self._shifts[new.row] = image_positions(new.images)

    def set_pages(self, plan: StepPlan) -> None:
        """The plan's entries of the block tables, here and on the device."""
        if not len(plan.page_rows):
            return
        self._host_tables[plan.page_rows, plan.page_indexes] = plan.page_ids
        if self._device.type != "cpu":
            places = plan.page_rows.astype(np.int64) * self._host_tables.shape[1] + plan.page_indexes
            where, pages = self.upload([places, np.ascontiguousarray(plan.page_ids)])
            self._tables.view(-1).index_put_((where,), pages)

    def shape(self, plan: StepPlan) -> Shape:
        """Of the plan as it is."""
        requests = len(plan.rows)
        return Shape(len(plan.token_ids), requests, int(plan.draws.sum()), int(plan.counts.max()))

    def arrays(self, plan: StepPlan, places: Places, shape: Shape) -> list[Array]:
        """The batch on the host, padded to `shape`; see `assemble` for their order. `places`: the plan's."""
        size, spare = self._block_size, self._spare_row
        rows, starts, counts = plan.rows, plan.starts, plan.counts
        token_ids = plan.token_ids
        requests, tokens = len(rows), len(token_ids)
        if shape.requests > requests:
            rows = np.append(rows, np.full(shape.requests - requests, spare, np.int32))
            starts = np.append(starts, np.zeros(shape.requests - requests, np.int32))
            share, left = divmod(shape.tokens - tokens, shape.requests - requests)
            more = np.full(shape.requests - requests, share, np.int32)
            more[:left] += 1
            counts = np.append(counts, more)
        if shape.tokens > tokens:
            token_ids = np.append(token_ids, np.zeros(shape.tokens - tokens, np.int32))
        query_starts = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(counts, out=query_starts[1:])
        assert query_starts[-1] == shape.tokens, "padding tokens belong to a padding request"
        if shape.longest_query == 1:
            assert shape.requests == shape.tokens, "a request without a token has no place among tokens"
            positions, token_rows = starts, rows
        else:
            positions = np.arange(len(token_ids), dtype=np.int32) + np.repeat(starts - query_starts[:-1], counts)
            token_rows = np.repeat(rows, counts)
        slots = self._host_tables[token_rows, positions // size].astype(np.int64) * size + positions % size
        if shape.tokens > tokens:
            slots[tokens:] = -1
        context_lens = starts + counts
        draw_places = plan.draw_places()
        draw_rows, draw_positions = places.rows, places.positions.astype(np.int64)
        if shape.draws > len(draw_rows):
            missing = shape.draws - len(draw_rows)
            draw_places = np.append(draw_places, np.zeros(missing, np.int32))
            draw_rows = np.append(draw_rows, np.full(missing, spare, np.int32))
            draw_positions = np.append(draw_positions, np.zeros(missing, np.int64))
        states: list[Array] = []
        if self._spare_state:
            missing = len(rows) - len(plan.state_reads)
            states = [
                np.append(plan.state_reads, np.full(missing, -1, np.int32)),
                np.append(plan.state_writes, np.full(missing, self._spare_state, np.int32)),
                np.repeat(np.arange(len(rows), dtype=np.int32), counts),
            ]
        if self._turned_apart:
            states.append(self._angles(plan, positions, token_rows, query_starts))
        seeds, *parameters = self._sampler.tables(draw_rows)
        return [
            slots,
            seeds,
            draw_positions,
            token_ids,
            token_rows,
            np.ascontiguousarray(positions, np.int32),
            query_starts,
            context_lens,
            rows,
            draw_places,
            draw_rows,
            *parameters,
            *states,
        ]

    def _angles(self, plan: StepPlan, positions: Ints, token_rows: Ints, query_starts: Ints) -> Ints:
        """[3, T] the time, row and column of each token."""
        found = np.repeat((positions + self._shifts[token_rows])[None], 3, 0).astype(np.int32)
        for place, row in enumerate(plan.rows.tolist()) if self._images else ():
            known, start = self._images.get(row), int(plan.starts[place])
            if known is not None and start < known.shape[1]:
                seen = known[:, start : start + int(plan.counts[place])]
                first = int(query_starts[place])
                found[:, first : first + seen.shape[1]] = seen
        return found

    def assemble(self, uploaded: list[Tensor], shape: Shape, longest_context: int) -> StepBatch:
        """What `upload` made of `arrays`, with the block tables. All on the device, so it can be captured."""
        slots, _, _, token_ids, token_rows, positions, query_starts, context_lens, rows, draw_places = uploaded[:_DRAWS]
        states = uploaded[_STATES:]
        angles = states.pop() if self._turned_apart else None
        pages = -(-longest_context // self._block_size)
        attention = AttentionBatch(
            positions=positions,
            slots=slots,
            block_tables=self._tables[:, :pages].index_select(0, rows),
            query_starts=query_starts,
            longest_query=shape.longest_query,
            context_lens=context_lens,
            angles=angles,
            states=StateBatch(
                reads=states[0],
                writes=states[1],
                query_starts=query_starts,
                requests=states[2],
                longest_query=shape.longest_query,
            )
            if states
            else None,
        )
        return StepBatch(
            token_ids=token_ids,
            token_rows=token_rows,
            attention=attention,
            draw_places=None if shape.draws == shape.tokens and shape.longest_query == 1 else draw_places,
            draws=self.draws(uploaded),
        )

    @staticmethod
    def draws(uploaded: list[Tensor]) -> Draws:
        """The sampler's part of the same."""
        seeds, positions = uploaded[1:3]
        rows, temperature, top_k, top_p, min_p = uploaded[_DRAWS:_STATES]
        return Draws(
            rows=rows,
            parameters=Rows(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                seeds=seeds,
                positions=positions,
            ),
        )


def image_positions(images: Sequence[ImageSpan]) -> tuple[Ints, int]:
    """M-RoPE (Qwen2-VL, arXiv 2409.12191): of a prompt's tokens up to the end of its last image the time, row and
    column [3, n]; and how far positions of what follows are behind places. An image is at one time; after it positions
    go on from the larger of its sides."""
    parts: list[Ints] = []
    place = position = 0
    for image in images:
        text = np.arange(position, position + image.start - place, dtype=np.int32)
        parts.append(np.repeat(text[None], 3, 0))
        position += len(text)
        if image.rows:
            grid = np.indices((1, image.rows, image.columns), np.int32).reshape(3, -1)
            parts.append(grid + np.int32(position))
            position += max(image.rows, image.columns)
        else:
            parts.append(np.repeat(np.arange(position, position + image.length, dtype=np.int32)[None], 3, 0))
            position += image.length
        place = image.end
    return np.concatenate(parts, 1), position - place
