"""Runs a step's plan on one device: batch in, tokens out. One per worker."""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from quire_kernels.backends import Backend
from torch import Tensor
from tqdm import tqdm

from quire_engine import allocator
from quire_engine.batch import Batcher, Draws, Shape, StepBatch
from quire_engine.config import EngineConfig, SchedulerLimits
from quire_engine.errors import InvalidParameter
from quire_engine.execution.backend import choose_backend
from quire_engine.execution.checks import check_served
from quire_engine.execution.drafting import Drafting
from quire_engine.execution.graphs import Record, StepGraphs, graph_recorder
from quire_engine.execution.images import image_embeddings, seen_spans
from quire_engine.execution.loading import fallback_model, opened
from quire_engine.execution.pending import PendingStep
from quire_engine.guidance.compiled import Guides
from quire_engine.layers.caches import empty_caches
from quire_engine.layers.experts import cuts_blocks
from quire_engine.layers.linear import Builder
from quire_engine.layers.pooler import PooledStates
from quire_engine.memory.plan import (
    Target,
    captures_steps,
    image_limits,
    plan_memory,
    resolve_device,
    resolve_dtype,
    tokens_per_step,
    usable_bytes,
)
from quire_engine.memory.shapes import captured_shapes
from quire_engine.models.decoder import Decoder, Embedded, Model
from quire_engine.models.draft_heads import with_stored_mtp
from quire_engine.models.drafts import Guesser, draft_source, guesses_by
from quire_engine.models.families import spec_of
from quire_engine.models.tied import as_stored
from quire_engine.parallel import ParallelGroup
from quire_engine.pooling import pooling_of
from quire_engine.quantization.config import quantization_of
from quire_engine.request import EngineSampling
from quire_engine.sampling.sampler import EVERY_DRAW, Drawn, Sampler, TokenScores, token_scores
from quire_engine.spec import DecoderSpec
from quire_engine.speculation.choice import choose
from quire_engine.step import NewRow, Places, StepPlan, StepResult
from quire_engine.text.tokenizer import Tokenizer
from quire_engine.weights.resolve import ModelFiles

log = logging.getLogger(__name__)
_PromptScores = dict[int, tuple[list[TokenScores], int]]  # row → parts, how many likeliest tokens were asked for
_PROMPT_LOGPROB_ROWS = 128  # positions whose logits are held at once


@dataclass(slots=True)
class _Launched:
    """A step up to its logits."""

    draws: Draws
    logits: Tensor | None
    hidden: Tensor | None
    prompt_scores: _PromptScores = field(default_factory=dict)
    batch: StepBatch | None = None  # of a step that was not replayed


class ModelRunner:
    """The model, its slice of the paged cache, the static block tables, and (on rank 0) the sampler."""

    def __init__(
        self,
        config: EngineConfig,
        files: ModelFiles,
        group: ParallelGroup | None = None,
        *,
        threads: int | None = None,
        progress_bar: Callable[..., Any] = tqdm,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Loads the model, showing a `progress_bar` (tqdm, or what looks like it) on rank 0. `tokenizer`: the model's,
        where it is loaded already; on the rank that draws, grammars are made of it.

        Raises ModelError, OutOfMemory or InvalidParameter, each with its mend.
        """
        self._group = group or ParallelGroup()
        self.device = resolve_device(config)
        if self.device.type == "cpu":
            torch.set_num_threads(config.cpu_threads or threads or _cores())
        pooling = pooling_of(files, config.task)
        self.spec: DecoderSpec = spec_of(files.config, pooling, images=config.images_per_prompt > 0)
        if config.load_format != "dummy" and self.spec.fallback is None:
            self.spec = with_stored_mtp(as_stored(self.spec, files.checkpoint()), files)
        group = self._group
        self.spec.check_parallel(group.size, group.stages, experts_apart=group.experts_apart)
        dtype = resolve_dtype(config, files.config.get("dtype") or files.config.get("torch_dtype"), self.device)
        quantization = self.quantization = quantization_of(files.config, config.quantization)
        target = Target.of(self.device)
        check_served(config, self.spec, target, dtype, quantization)
        source = draft_source(config, files, self.spec, quantization)
        if source is not None:
            check_served(config, source.spec, target, dtype, source.quantization)
        free = usable_bytes(config, self.device)
        memory = self.memory = plan_memory(
            config, self.spec, quantization, target, dtype, free, stage=group.stage, draft=source
        )
        if self.spec.latent is not None and self.device.type == "cpu":
            log.warning("latent attention runs on torch's own operators on a CPU: slow for long contexts")
        backend = choose_backend(config, self.spec, target, self.device, dtype)
        if (experts := self.spec.experts) is not None and quantization.in_4_bits and group.draws:
            what = f"experts in {quantization.name} are kept as what they mean, in {dtype}"
            if not backend.packed_experts:
                log.warning("%s: the %s kernels have no product for them", what, backend.name)
            elif experts.stacked and cuts_blocks(experts, group):
                log.warning("%s: ranks cut blocks of 32; use fewer (-tp), or --enable-expert-parallel", what)
        started = time.monotonic()
        quantized_cache = config.kv_cache_dtype == "fp8"
        self._model: Model
        if self.spec.fallback is not None:
            self._model = fallback_model(
                config, self.spec, group, backend, dtype, self.device, files, memory.max_model_len
            )
        else:
            with opened(config, files, dtype, self.device, progress_bar if group.draws else None) as weights:
                build = Builder(weights, group, backend, quantization)
                self._model = Decoder(build, self.spec, memory.max_model_len, quantized_cache=quantized_cache)
        self._images = image_embeddings(self.spec, group, files, config, dtype, self.device)
        guesser: Guesser | None = None
        if source is not None and group.last:
            own = source.files is not files
            ops = choose_backend(config, source.spec, target, self.device, dtype) if own else backend
            bar = progress_bar if group.draws and own else None
            with opened(config, source.files, dtype, self.device, bar) as weights:
                build = Builder(weights, group, ops, source.quantization)
                guesser = source.build(build, self._model, memory.max_model_len, quantized_cache)
            if guesser.taps:
                assert isinstance(self._model, Decoder)
                self._model.taps = guesser.taps
        num_pages = group.minimum(memory.num_pages)
        cache_dtype = cache_dtype_of(backend) if quantized_cache else dtype
        num_states = group.minimum(memory.num_states) if self.spec.recurrent_layers else 0
        caches = partial(
            empty_caches,
            num_pages=num_pages,
            block_size=config.block_size,
            num_states=num_states,
            dtype=dtype,
            cache_dtype=cache_dtype,
            device=self.device,
        )
        self._caches = caches(self.spec, group, self._model.layers)
        if self.device.type == "cpu":
            allocator.return_freed_memory()
            allocator.keep_freed_memory()
        self.limits = SchedulerLimits(
            vocab_size=self.spec.vocab_size,
            num_pages=num_pages,
            block_size=config.block_size,
            max_model_len=memory.max_model_len + (pooling is not None),  # which generates nothing
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=tokens_per_step(config, self.spec, self.device.type == "cpu"),
            max_num_queued_reqs=config.max_num_queued_reqs,
            enable_prefix_caching=config.enable_prefix_caching and _shares_prefixes(self.spec),
            whole_prompts=self.spec.bidirectional,
            by_priority=config.scheduling_policy == "priority",
            num_states=num_states,
            steps_in_flight=2 if config.async_scheduling else 1,
            speculation=choose(config, self.spec, source.method if source is not None else None),
            images=image_limits(config, self.spec, dtype, self.device.type == "cpu"),
        )
        self._guides: Guides | None = None
        if group.draws and pooling is None:
            size = self.spec.vocab_size
            self._guides = Guides(lambda: (tokenizer or _tokenizer(config, files)).for_grammars(files, size))
        self._sampler = Sampler(config.max_num_seqs + 1, self.spec.vocab_size, self.device, backend, self._guides)
        turned_apart = self.spec.rope is not None and bool(self.spec.rope.sections)
        self._batcher = Batcher(self.limits, self.device, self._sampler, turned_apart=turned_apart)
        self._last_tokens = torch.zeros(config.max_num_seqs + 1, dtype=torch.int32, device=self.device)
        self._drafting: Drafting | None = None
        if source is not None:
            kept = caches(guesser.spec, group, guesser.layers) if guesser is not None else []
            place = (dtype, self.device)
            self._drafting = Drafting(guesser, kept, group, self._batcher, self._sampler, self.limits, *place)
        self._submitted: deque[PendingStep] = deque()
        self._states: PooledStates | None = None
        if pooling is not None:
            self._states = PooledStates(pooling, config.max_num_seqs + 1, self.spec.hidden_size, self.device)
        self._prompt_logprobs: dict[int, NewRow] = {}
        self._mark: Callable[[], None] = lambda: None
        self._graphs: StepGraphs | None = None
        self._graph_logits: Tensor | None = None  # [most that draw, vocabulary], for all graphs
        self._graph_hidden: Tensor | None = None  # [most tokens, hidden], for those of a draft model
        if captures_steps(config, self.spec, self.device.type == "cpu"):
            self.capture_graphs(graph_recorder(self.device))
        if backend.name != "torch" and self.device.type != "cpu":
            self.warm_up()
        guesses = guesses_by(self.limits.speculation, source)
        log.info(
            "%s on %s in %s (quantization: %s), %s kernels, %d pages of %d tokens in %s%s%s, loaded in %.1f s",
            files.name,
            self.device,
            dtype,
            quantization.name,
            backend.name,
            num_pages,
            config.block_size,
            cache_dtype,
            f", {num_states} recurrent states" if num_states else "",
            f", guesses by {guesses}" if guesses else "",
            time.monotonic() - started,
        )

    def submit(self, plan: StepPlan) -> None:
        """Starts a step, for an engine in this process."""
        step = self.execute(plan)
        assert step is not None, "another rank draws"
        self._submitted.append(step)

    def collect(self) -> StepResult:
        """The result of the oldest step that was submitted."""
        return self._submitted.popleft().result()

    def prepare(self, guidance: str) -> "Future[Any]":
        """See `Executor`. On the rank that draws, from any thread."""
        assert self._guides is not None, "another rank draws, or nothing is drawn"
        return self._guides.prepare(guidance)

    def read_vocabulary(self) -> None:
        """Begins to, in a thread, so that the first request with a grammar does not wait for it."""
        if self._guides is not None:
            self._guides.read_vocabulary()

    def on_progress(self, mark: Callable[[], None]) -> None:
        """`mark` is called whenever a step has come further: at its beginning and after each layer."""
        self._mark = self._model.progress = mark
        if self._images is not None:
            self._images.progress = mark
        if self._drafting is not None:
            self._drafting.on_progress(mark)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> PendingStep | None:
        """Launches the plan's step without waiting for it; one rank draws, the others return None."""
        self._mark()
        self._take_rows(plan.new_rows)
        self._batcher.set_pages(plan)
        if self._states is not None:
            return self._pool(plan, self._states)
        if self._drafting is not None:
            plan = self._drafting.guess(plan)
        scored = any(row in self._prompt_logprobs for row in plan.rows.tolist()) if self._prompt_logprobs else False
        places = plan.places()
        seen = self._images.take(plan.images) if self._images is not None else None
        embedded = seen.embedded if seen is not None else None
        plain = not scored and embedded is None
        draws = self._graphs.replay(plan, places) if self._graphs is not None and plain else None
        if draws is None:
            step = self._launch(plan, places, scored, embedded)
        else:
            hidden = self._graph_hidden
            step = _Launched(draws, self._graph_logits, None if hidden is None else hidden[: len(plan.token_ids)])
        batch = known = None
        if self._drafting is not None and self._drafting.follows(plan):
            batch = step.batch or self._eager_batch(plan, places)
            known = self._known(batch)  # before other tokens are the last ones
        drawn, tokens = self._draw(places, step.draws, step.logits) if len(places.rows) else (None, None)
        if self._drafting is not None and batch is not None and known is not None:
            self._drafting.follow(plan, places, batch, known, step.hidden, tokens)
        if not self._group.draws:
            return None
        return PendingStep(places, drawn, step.prompt_scores, self.device, seen=seen)

    def _launch(self, plan: StepPlan, places: Places, scored: bool, embedded: Embedded | None) -> "_Launched":
        """Kernel by kernel, up to the logits. `scored`: prompts in it want log-probabilities."""
        batch = self._eager_batch(plan, places)
        if plan.images is not None and len(plan.images.spans):
            spans = seen_spans(batch.attention.positions, plan.images.spans)
            batch = replace(batch, attention=replace(batch.attention, spans=spans))
        hidden = self._hidden(batch, embedded)
        prompt_scores = self._prompt_scores(plan, hidden) if scored else {}
        logits = self._logits(hidden, batch) if hidden is not None and plan.draws.any() else None
        return _Launched(batch.draws, logits, self._seen(hidden), prompt_scores, batch)

    def _seen(self, hidden: Tensor | None) -> Tensor | None:
        """What a head reads of a step, whose output is `hidden`. It is kept nowhere else."""
        model = self._model
        if not isinstance(model, Decoder) or not model.taps:
            return hidden
        seen, model.tapped = model.tapped, None
        return seen

    def _pool(self, plan: StepPlan, states: PooledStates) -> PendingStep | None:
        """A step of a model that gives vectors or scores."""
        places = plan.places()
        hidden = self._hidden(self._eager_batch(plan, places))
        if hidden is None:
            return None
        pooled = states.take(hidden, plan.rows, plan.starts, plan.counts, plan.draws > 0)
        assert isinstance(self._model, Decoder)
        vectors = self._model.pooled(pooled)
        return PendingStep(places, None, {}, self.device, vectors) if self._group.draws else None

    def _eager_batch(self, plan: StepPlan, places: Places) -> StepBatch:
        return self._batch_of(plan, places, self._batcher.shape(plan), int((plan.starts + plan.counts).max()))

    def _batch_of(self, plan: StepPlan, places: Places, shape: Shape, longest_context: int) -> StepBatch:
        uploaded = self._batcher.upload(self._batcher.arrays(plan, places, shape))
        return self._batcher.assemble(uploaded, shape, longest_context)

    def _hidden(self, batch: StepBatch, embedded: Embedded | None = None) -> Tensor | None:
        """[T, hidden] on the last stage: of the plan's tokens or, where it leaves them open, of those drawn last."""
        return self._model(self._known(batch), batch.attention, self._caches, embedded)

    def _known(self, batch: StepBatch) -> Tensor:
        known = batch.token_ids
        return torch.where(known < 0, self._last_tokens.index_select(0, batch.token_rows), known)

    def _logits(self, hidden: Tensor, batch: StepBatch, out: Tensor | None = None) -> Tensor | None:
        drawing = hidden if batch.draw_places is None else hidden.index_select(0, batch.draw_places)
        return self._model.logits(drawing, out)

    def _draw(self, places: Places, draws: Draws, logits: Tensor | None) -> tuple[Drawn | None, Tensor | None]:
        """Draws on one rank; where the next plan may leave these tokens open, or a draft model starts from them, every
        rank has them.

        Where none could be drawn (-1) the next step computes something that nobody will see.
        """
        drawn, tokens, count = None, None, len(places.rows)
        if self._group.draws:
            assert logits is not None, "the rank that draws has the logits"
            drawn = self._sampler.draw(logits[:count], places, draws.parameters.first(count))
            tokens = drawn.tokens
        open_next = self.limits.steps_in_flight > 1 and not places.drafted
        if open_next or self._drafting is not None:
            tokens = tokens if tokens is not None else self._last_tokens.new_empty(count)
            self._group.share_drawn(tokens)
        if open_next:
            assert tokens is not None
            kept = tokens.clamp(0, self.spec.vocab_size - 1)
            self._last_tokens.index_copy_(0, draws.rows[:count].long(), kept)
        return drawn, tokens

    @torch.inference_mode()
    def capture_graphs(self, record: Record) -> None:
        """Captures the shapes of decoding and of small mixed steps."""
        started = time.monotonic()
        limits = self.limits
        out = None
        if self._group.draws:
            shape = (limits.most_draws, self.spec.vocab_size)
            out = self._graph_logits = torch.empty(shape, dtype=torch.float32, device=self.device)
        shapes = captured_shapes(limits)
        kept = None
        if self._drafting is not None:
            most = max(shape.tokens for shape in shapes)
            kept = self._graph_hidden = self._drafting.room(most, self.spec.hidden_size)

        def forward(batch: StepBatch) -> None:
            hidden = self._hidden(batch)
            assert hidden is not None, "stages are not captured"
            if kept is not None:
                seen = self._seen(hidden)
                assert seen is not None
                kept[: len(seen)] = seen
            self._logits(hidden, batch, None if out is None else out[: len(batch.draws.rows)])

        self._graphs = StepGraphs(self._batcher, forward, record, self.device, limits.max_model_len)
        self._graphs.capture(shapes)
        log.info("%d step shapes captured in %.1f s", len(shapes), time.monotonic() - started)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Launches what serving can launch: kernels are compiled, and libraries loaded, before a request waits for it.

        How many tokens and requests a step has, and how long they are, decides which of a kernel's few shapes runs;
        powers of two reach them all.
        """
        started = time.monotonic()
        limits = self.limits
        nothing, place = StepPlan.empty(), Places.alone(np.zeros(1, np.int32), np.full(1, 2, np.int32))
        shapes = [Shape(size, size, size, 1) for size in _powers(limits.most_rows)]
        for tokens in _powers(limits.most_tokens):
            fewest = -(-tokens // limits.max_model_len)
            shapes += [
                Shape(tokens, requests, requests, tokens)
                for requests in {fewest, max(2, fewest)}  # a prompt alone, and beside a decoding request
                if requests <= min(tokens, limits.most_rows)
            ]
        for shape in shapes:
            for longest in sorted({min(shape.longest_query, limits.max_model_len), limits.max_model_len}):
                batch = self._batch_of(nothing, nothing.places(), shape, longest)
                hidden = self._hidden(batch)
                if hidden is not None and self._states is None:
                    self._logits(hidden, batch)
                if self._drafting is not None:
                    self._drafting.warm_up(batch, self._seen(hidden))
        if self._states is None:
            batch = self._batch_of(nothing, nothing.places(), Shape(1, 1, 1, 1), 1)
            for params in EVERY_DRAW:
                if self._group.draws:
                    self._sampler.set_rows([NewRow(0, params, 1, np.zeros(2, np.int32))])
                logits = self._logits(hidden[:1], batch) if hidden is not None else None
                self._draw(place, batch.draws, logits)
                if self._drafting is not None:
                    self._drafting.warm_up_draws()
            if self._group.draws and logits is not None:
                self._sampler.warm_up(logits)
            self._sampler.set_rows([NewRow(0, EngineSampling(temperature=0.0), 1, np.zeros(0, np.int32))])
        log.info("warmed up in %.1f s", time.monotonic() - started)

    def _take_rows(self, news: Sequence[NewRow]) -> None:
        self._batcher.set_rows(news)
        if self._group.draws:
            self._sampler.set_rows(news)
        for new in news:
            self._prompt_logprobs.pop(new.row, None)
            if new.params.prompt_logprobs is not None:
                self._prompt_logprobs[new.row] = new

    def _prompt_scores(self, plan: StepPlan, hidden: Tensor | None) -> _PromptScores:
        """Log-probabilities of the prompt's tokens that follow those computed now; row → parts, width."""
        found: _PromptScores = {}
        first_places = np.cumsum(plan.counts) - plan.counts
        for place, row in enumerate(plan.rows.tolist()):
            new = self._prompt_logprobs.get(row)
            if new is None:
                continue
            start = int(plan.starts[place])
            stop = min(start + int(plan.counts[place]), new.num_prompt - 1)
            if stop == new.num_prompt - 1:
                del self._prompt_logprobs[row]  # its steps can be replayed from here on
            if hidden is None:
                continue
            width = new.params.prompt_logprobs or 0
            parts = []
            for at in range(start, stop, _PROMPT_LOGPROB_ROWS):
                end = min(at + _PROMPT_LOGPROB_ROWS, stop)
                flat = int(first_places[place]) - start
                logits = self._model.logits(hidden[flat + at : flat + end], None)
                if logits is not None:
                    [targets] = self._batcher.upload([np.array(new.tokens[at + 1 : end + 1], np.int64)])
                    parts.append(token_scores(logits, targets, width))
            if parts:
                found[row] = (parts, width)
        return found

    def close(self) -> None:
        """Leaves the group; the memory goes with the object."""
        if self._guides is not None:
            self._guides.close()
        self._group.close()


def _tokenizer(config: EngineConfig, files: ModelFiles) -> Tokenizer:
    return Tokenizer.load(files, other=config.tokenizer)


def _shares_prefixes(spec: DecoderSpec) -> bool:
    """Whether what is found in the cache need not be computed: not where later tokens matter, nor all of them."""
    return not spec.bidirectional and (spec.pooling is None or spec.pooling.kind == "last")


def cache_dtype_of(backend: Backend) -> torch.dtype:
    """Of an fp8 cache. Raises InvalidParameter where the backend has none."""
    if backend.fp8 is None:
        raise InvalidParameter("kv_cache_dtype is fp8, which this GPU does not have; leave it out", "kv_cache_dtype")
    return backend.fp8


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... and the number itself."""
    return sorted({1 << exponent for exponent in range(most.bit_length())} | {most})


def _cores() -> int:
    return len(os.sched_getaffinity(0))
