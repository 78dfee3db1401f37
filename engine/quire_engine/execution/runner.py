"""Runs a step's plan on one device: batch in, tokens out. One per worker."""

import logging
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from quire_kernels.backends import AttentionBatch, Backend, NativeBackend, TorchBackend, attention_tiles
from quire_kernels.native.build import NativeBuildError
from torch import Tensor
from tqdm import tqdm

from quire_engine import allocator
from quire_engine.config import EngineConfig, SchedulerLimits
from quire_engine.errors import InvalidParameter
from quire_engine.execution.group import TensorParallelGroup
from quire_engine.execution.plan import NewRow, StepPlan, StepResult, TokenLogprobs
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
from quire_engine.sampling.sampler import Sampler, token_logprobs
from quire_engine.weights.resolve import ModelFiles
from quire_engine.weights.tensors import TensorReader

log = logging.getLogger(__name__)
_PROMPT_LOGPROB_ROWS = 128  # positions whose logits are held at once


def choose_backend(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> Backend:
    """The kernels of `--attention-backend`, once. Says so where it falls back to something slower."""
    wanted = config.attention_backend
    native_fits = device.type == "cpu" and dtype == torch.float32
    if wanted == "auto":
        wanted = "triton" if device.type == "cuda" else "native" if native_fits else "torch"
        if wanted == "native":
            try:
                return NativeBackend()
            except NativeBuildError as error:
                log.warning("the C kernels cannot be built, attention will be slower: %s", error)
                return TorchBackend()
        if wanted == "torch":
            log.warning("%s on a CPU runs on torch's own operators; --dtype float32 has faster kernels", dtype)
    if wanted == "native":
        if not native_fits:
            raise InvalidParameter(
                f"attention_backend native is for float32 on a CPU, not {dtype} on {device.type}",
                "attention_backend",
            )
        return NativeBackend()
    if wanted == "triton":
        from quire_kernels.triton_backend import TritonBackend

        return TritonBackend(device)
    return TorchBackend()


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
        )
        longest = -(-memory.max_model_len // config.block_size)
        self._block_tables = np.zeros((config.max_num_seqs, longest), np.int32)
        self._sampler = Sampler(config.max_num_seqs, self.spec.vocab_size, self.device)
        self._prompt_logprobs: dict[int, NewRow] = {}
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

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult | None:
        """Computes the plan's tokens; rank 0 draws and returns, the other ranks return None."""
        for new in plan.new_rows:
            self._take_row(new, plan)
        self._block_tables[plan.page_rows, plan.page_indexes] = plan.page_ids
        batch, last_of_row = self._batch(plan)
        token_ids = torch.from_numpy(plan.token_ids).to(self.device)
        hidden = self._model(token_ids, batch, self._caches)
        prompt_logprobs = self._prompt_scores(plan, hidden, batch.query_starts) if self._prompt_logprobs else {}
        if not plan.draws.any():
            return StepResult(np.zeros(0, np.int32), prompt_logprobs=prompt_logprobs) if self._group.rank == 0 else None
        if plan.draws.all() and len(plan.rows) == len(plan.token_ids):
            drawing = hidden
        else:
            drawing = hidden[torch.from_numpy(last_of_row[plan.draws]).to(self.device)]
        logits = self._model.logits(drawing)
        if logits is None:
            return None
        positions = (plan.starts + plan.counts)[plan.draws].astype(np.int64)
        drawn = self._sampler.draw(logits, plan.rows[plan.draws], positions)
        return StepResult(drawn.tokens, drawn.logprobs, prompt_logprobs, drawn.failed)

    def _take_row(self, new: NewRow, plan: StepPlan) -> None:
        place = int(np.flatnonzero(plan.rows == new.row)[-1])
        computed = int(plan.starts[place] + plan.counts[place])
        self._sampler.set_row(new, len(new.tokens) or computed)
        self._prompt_logprobs.pop(new.row, None)
        if new.params.prompt_logprobs is not None:
            self._prompt_logprobs[new.row] = new

    def _batch(self, plan: StepPlan) -> tuple[AttentionBatch, NDArray[np.int64]]:
        """The step's index tensors, and each request's last token in the flat batch [R]."""
        rows, starts, counts = plan.rows, plan.starts, plan.counts
        size = self.limits.block_size
        query_starts = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(counts, out=query_starts[1:])
        context_lens = starts + counts
        if len(plan.token_ids) == len(rows):
            positions, row_of_token = starts, rows
        else:
            positions = np.arange(len(plan.token_ids), dtype=np.int32) + np.repeat(starts - query_starts[:-1], counts)
            row_of_token = np.repeat(rows, counts)
        pages = self._block_tables[row_of_token, positions // size]
        slots = pages.astype(np.int64) * size + positions % size
        width = -(-int(context_lens.max()) // size)
        tables = np.ascontiguousarray(self._block_tables[rows, :width])
        starts_list = query_starts.tolist()

        def on_device(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(self.device)

        batch = AttentionBatch(
            positions=on_device(np.ascontiguousarray(positions, np.int32)),
            slots=on_device(slots),
            block_tables=on_device(tables),
            query_starts=starts_list,
            longest_query=int(counts.max()),
            context_lens=context_lens.tolist(),
            tiles=torch.from_numpy(attention_tiles(counts.tolist(), starts_list)),
            query_starts_tensor=on_device(query_starts),
            context_lens_tensor=on_device(context_lens.astype(np.int32)),
        )
        return batch, query_starts[1:].astype(np.int64) - 1

    def _prompt_scores(self, plan: StepPlan, hidden: Tensor, query_starts: list[int]) -> dict[int, TokenLogprobs]:
        """Log-probabilities of the prompt's tokens that follow those computed now."""
        found: dict[int, TokenLogprobs] = {}
        for place, row in enumerate(plan.rows.tolist()):
            new = self._prompt_logprobs.get(row)
            if new is None:
                continue
            start = int(plan.starts[place])
            stop = min(start + int(plan.counts[place]), new.num_prompt - 1)
            parts = []
            for at in range(start, stop, _PROMPT_LOGPROB_ROWS):
                end = min(at + _PROMPT_LOGPROB_ROWS, stop)
                flat = query_starts[place] - start
                logits = self._model.logits(hidden[flat + at : flat + end])
                if logits is not None:
                    targets = np.array(new.tokens[at + 1 : end + 1], np.int32)
                    parts.append(token_logprobs(logits, targets, new.params.prompt_logprobs or 0))
            if parts:
                found[row] = TokenLogprobs(
                    *(np.concatenate([getattr(part, name) for part in parts]) for name in TokenLogprobs.__slots__)
                )
        return found

    def close(self) -> None:
        """Leaves the group; the memory goes with the object."""
        self._group.close()


def _cores() -> int:
    return len(os.sched_getaffinity(0))
