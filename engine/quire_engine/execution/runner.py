"""Runs a step's plan on one device: batch in, tokens out. One per worker."""

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from quire_engine import allocator
from quire_engine.config import EngineConfig, SchedulerLimits
from quire_engine.execution.backend import choose_backend
from quire_engine.execution.batch import Batcher, Shape, StepBatch
from quire_engine.execution.graphs import Record, StepGraphs, decode_ladder, graph_recorder, mixed_ladder
from quire_engine.execution.group import TensorParallelGroup
from quire_engine.execution.pending import PendingStep
from quire_engine.execution.plan import NewRow, StepPlan, StepResult
from quire_engine.models.decoder import Decoder, empty_caches
from quire_engine.models.families import spec_of
from quire_engine.models.spec import DecoderSpec
from quire_engine.plan import (
    plan_memory,
    resolve_device,
    resolve_dtype,
    tokens_per_step,
    usable_bytes,
)
from quire_engine.sampling.sampler import Drawn, Sampler, TokenScores, token_scores
from quire_engine.weights.resolve import ModelFiles
from quire_engine.weights.tensors import TensorReader

log = logging.getLogger(__name__)
_PROMPT_LOGPROB_ROWS = 128  # positions whose logits are held at once


class ModelRunner:
    """The model, its slice of the paged cache, the static block tables, and (on rank 0) the sampler."""

    def __init__(
        self,
        config: EngineConfig,
        files: ModelFiles,
        group: TensorParallelGroup | None = None,
        *,
        threads: int | None = None,
        progress_bar: Callable[..., Any] = tqdm,
    ) -> None:
        """Loads the model, showing a `progress_bar` (tqdm, or what looks like it) on rank 0.

        Raises ModelError, OutOfMemory or InvalidParameter, each with its mend.
        """
        self._group = group or TensorParallelGroup()
        self.device = resolve_device(config)
        if self.device.type == "cpu":
            torch.set_num_threads(config.cpu_threads or threads or _cores())
        self.spec: DecoderSpec = spec_of(files.config)
        self.spec.check_parallel(self._group.size)
        dtype = resolve_dtype(config, files.config.get("dtype") or files.config.get("torch_dtype"), self.device)
        memory = plan_memory(config, self.spec, self.device, dtype, usable_bytes(config, self.device))
        backend = choose_backend(config, self.device, dtype)
        started = time.monotonic()
        weights = TensorReader(files.checkpoint(), dtype, self.device)
        bar = progress_bar(total=len(weights), desc=f"Loading {files.name}") if self._group.rank == 0 else None
        if bar is not None:
            weights.progress = lambda: bar.update(1)
        self._model = Decoder(self.spec, weights, self._group, backend, memory.max_model_len)
        if bar is not None:
            bar.close()
        num_pages = self._group.minimum(memory.num_pages)
        self._caches = empty_caches(
            self.spec, num_pages, config.block_size, self._group.size, dtype=dtype, device=self.device
        )
        if self.device.type == "cpu":
            allocator.return_freed_memory()
            allocator.keep_freed_memory()
        self.limits = SchedulerLimits(
            num_pages=num_pages,
            block_size=config.block_size,
            max_model_len=memory.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=tokens_per_step(config, self.device),
            max_num_queued_reqs=config.max_num_queued_reqs,
            enable_prefix_caching=config.enable_prefix_caching,
            by_priority=config.scheduling_policy == "priority",
            steps_in_flight=2 if config.async_scheduling else 1,
        )
        self._sampler = Sampler(config.max_num_seqs + 1, self.spec.vocab_size, self.device, backend)
        self._batcher = Batcher(self.limits, self.device, self._sampler)
        self._last_tokens = torch.zeros(config.max_num_seqs + 1, dtype=torch.int32, device=self.device)
        self._submitted: deque[PendingStep] = deque()
        self._prompt_logprobs: dict[int, NewRow] = {}
        self._graphs: StepGraphs | None = None
        if self.device.type != "cpu" and not config.enforce_eager:
            self.capture_graphs(graph_recorder(self.device))
        log.info(
            "%s on %s in %s, %s kernels, %d pages of %d tokens, loaded in %.1f s",
            files.name,
            self.device,
            dtype,
            backend.name,
            num_pages,
            config.block_size,
            time.monotonic() - started,
        )

    def submit(self, plan: StepPlan) -> None:
        """Starts a step, for an engine in this process. Rank 0."""
        step = self.execute(plan)
        assert step is not None, "only rank 0 has results"
        self._submitted.append(step)

    def collect(self) -> StepResult:
        """The result of the oldest step that was submitted."""
        return self._submitted.popleft().result()

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> PendingStep | None:
        """Launches the plan's step without waiting for it; rank 0 draws, the other ranks return None."""
        for new in plan.new_rows:
            self._take_row(new, plan)
        self._batcher.set_pages(plan)
        replayed = self._graphs.replay(plan) if self._graphs is not None and not self._prompt_logprobs else None
        prompt_scores: dict[int, tuple[list[TokenScores], int]] = {}
        if replayed is not None:
            batch, logits = replayed
        else:
            batch = self._eager_batch(plan)
            hidden = self._hidden(batch)
            if self._prompt_logprobs:
                prompt_scores = self._prompt_scores(plan, hidden)
            logits = self._logits(hidden, batch) if plan.draws.any() else None
        drawn = self._draw(plan, batch, logits) if plan.draws.any() else None
        return PendingStep(plan, drawn, prompt_scores, self.device) if self._group.rank == 0 else None

    def _eager_batch(self, plan: StepPlan) -> StepBatch:
        shape = self._batcher.shape(plan)
        uploaded = self._batcher.upload(self._batcher.arrays(plan, shape))
        return self._batcher.assemble(uploaded, shape, int((plan.starts + plan.counts).max()))

    def _hidden(self, batch: StepBatch) -> Tensor:
        """[T, hidden], of the tokens in the plan or, where it leaves them open, of those drawn last."""
        known = batch.token_ids
        token_ids = torch.where(known < 0, self._last_tokens.index_select(0, batch.token_rows), known)
        return self._model(token_ids, batch.attention, self._caches)

    def _logits(self, hidden: Tensor, batch: StepBatch) -> Tensor | None:
        drawing = hidden if batch.draw_places is None else hidden.index_select(0, batch.draw_places)
        return self._model.logits(drawing)

    def _draw(self, plan: StepPlan, batch: StepBatch, logits: Tensor | None) -> Drawn | None:
        """Draws on rank 0; where the next plan may leave these tokens open, every rank keeps them."""
        rows = plan.rows[plan.draws]
        drawn = None
        if self._group.rank == 0:
            assert logits is not None, "rank 0 has the logits"
            drawn = self._sampler.draw(logits[: len(rows)], rows, batch.sampling.first(len(rows)))
        if self.limits.steps_in_flight > 1:
            tokens = drawn.tokens if drawn is not None else self._last_tokens.new_empty(len(rows))
            self._group.broadcast(tokens)
            self._last_tokens.index_copy_(0, batch.draw_rows[: len(rows)].long(), tokens)
        return drawn

    @torch.inference_mode()
    def capture_graphs(self, record: Record) -> None:
        """Captures the shapes of decoding and of small mixed steps."""
        started = time.monotonic()
        limits = self.limits

        def forward(batch: StepBatch) -> Tensor | None:
            return self._logits(self._hidden(batch), batch)

        self._graphs = StepGraphs(self._batcher, forward, record, self.device, limits.max_model_len)
        shapes = [Shape(size, size, size, 1) for size in decode_ladder(limits.max_num_seqs)]
        shapes += mixed_ladder(limits.max_num_batched_tokens, limits.max_num_seqs)
        self._graphs.capture(shapes)
        log.info("%d step shapes captured in %.1f s", len(shapes), time.monotonic() - started)

    def _take_row(self, new: NewRow, plan: StepPlan) -> None:
        place = int(np.flatnonzero(plan.rows == new.row)[-1])
        computed = int(plan.starts[place] + plan.counts[place])
        self._sampler.set_row(new, len(new.tokens) or computed)
        self._prompt_logprobs.pop(new.row, None)
        if new.params.prompt_logprobs is not None:
            self._prompt_logprobs[new.row] = new

    def _prompt_scores(self, plan: StepPlan, hidden: Tensor) -> dict[int, tuple[list[TokenScores], int]]:
        """Log-probabilities of the prompt's tokens that follow those computed now; row → parts, width."""
        found: dict[int, tuple[list[TokenScores], int]] = {}
        first_places = np.cumsum(plan.counts) - plan.counts
        for place, row in enumerate(plan.rows.tolist()):
            new = self._prompt_logprobs.get(row)
            if new is None:
                continue
            start = int(plan.starts[place])
            stop = min(start + int(plan.counts[place]), new.num_prompt - 1)
            width = new.params.prompt_logprobs or 0
            parts = []
            for at in range(start, stop, _PROMPT_LOGPROB_ROWS):
                end = min(at + _PROMPT_LOGPROB_ROWS, stop)
                flat = int(first_places[place]) - start
                logits = self._model.logits(hidden[flat + at : flat + end])
                if logits is not None:
                    targets = torch.tensor(new.tokens[at + 1 : end + 1], device=self.device)
                    parts.append(token_scores(logits, targets, width))
            if parts:
                found[row] = (parts, width)
        return found

    def close(self) -> None:
        """Leaves the group; the memory goes with the object."""
        self._group.close()


def _cores() -> int:
    return len(os.sched_getaffinity(0))
