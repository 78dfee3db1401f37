"""CUDA graphs (HIP graphs on AMD): a step's kernels recorded once per padded shape and launched as one.

A step of few tokens is over before Python has launched its kernels one by one. Decoding is captured at a ladder of
batch sizes; small steps that mix prompts with decoding at a ladder of token counts. The largest is captured first, so
that all the others fit into the memory it took (one pool).
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quire_engine.execution.batch import Batcher, Shape, StepBatch, layout, views
from quire_engine.execution.plan import StepPlan

Forward = Callable[[StepBatch], Tensor | None]  # → logits [S, V] on the rank that draws
Recorded = tuple[StepBatch, Tensor | None]
Record = Callable[[Callable[[], Recorded]], tuple[Recorded, Callable[[], None]]]  # a step → its outputs, its replay
MIXED_TOKENS = (16, 32, 64, 128, 256, 512)
_MIXED_REQUESTS = 32


def decode_ladder(most: int) -> list[int]:
    """Batch sizes to capture: fine where a step is short, in steps of at most an eighth above."""
    sizes, size = [1, 2, 4], 8
    while size < most:
        sizes.append(size)
        size += 8 if size < 64 else size // 8 // 8 * 8
    return sorted({min(size, most) for size in [*sizes, most]})


def mixed_ladder(most_tokens: int, most_requests: int) -> list[Shape]:
    """Shapes of small steps with prompts in them. One request more than can come holds the padding.

    `most_tokens`: no more than a request may have, for the padding may be all.
    """
    requests = min(_MIXED_REQUESTS, most_requests)
    return [Shape(tokens, requests + 1, requests, tokens) for tokens in MIXED_TOKENS if tokens <= most_tokens]


@dataclass(slots=True)
class _Captured:
    shape: Shape
    inputs: Tensor  # bytes; every array of a step has its place in them
    batch: StepBatch
    logits: Tensor | None
    replay: Callable[[], None]


def graph_recorder(device: torch.device) -> Record:
    """Records on a GPU, into one pool of memory: what the largest shape took serves the smaller ones."""
    stream = torch.cuda.Stream(device)
    pool = torch.cuda.graph_pool_handle()

    def record(step: Callable[[], Recorded]) -> tuple[Recorded, Callable[[], None]]:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            recorded = step()
        return recorded, graph.replay

    return record


class StepGraphs:
    """The captured shapes of one worker."""

    def __init__(
        self, batcher: Batcher, forward: Forward, record: Record, device: torch.device, longest_context: int
    ) -> None:
        self._batcher = batcher
        self._forward = forward
        self._device = device
        self._longest_context = longest_context
        self._record = record
        self._decode: dict[int, _Captured] = {}
        self._mixed: list[_Captured] = []
        self._decode_sizes: list[int] = []

    def capture(self, shapes: list[Shape]) -> None:
        """Runs each shape once (which compiles what it needs), then records it."""
        for shape in sorted(shapes, key=lambda shape: -shape.tokens):
            captured = self._capture_one(shape)
            if shape.longest_query == 1:
                self._decode[shape.tokens] = captured
            else:
                self._mixed.insert(0, captured)
        self._decode_sizes = sorted(self._decode)

    def replay(self, plan: StepPlan) -> tuple[StepBatch, Tensor | None] | None:
        """The step by a captured graph, its logits still padded; None where none fits."""
        captured = self._fitting(self._batcher.shape(plan))
        if captured is None:
            return None
        self._batcher.upload.into(captured.inputs, self._batcher.arrays(plan, captured.shape))
        captured.replay()
        return captured.batch, captured.logits

    def _fitting(self, shape: Shape) -> _Captured | None:
        if shape.longest_query == 1 and shape.draws == shape.tokens:
            place = bisect.bisect_left(self._decode_sizes, shape.tokens)
            return self._decode[self._decode_sizes[place]] if place < len(self._decode_sizes) else None
        for captured in self._mixed:
            padded = captured.shape
            if shape.tokens <= padded.tokens and shape.requests < padded.requests and shape.draws <= padded.draws:
                return captured
        return None

    def _capture_one(self, shape: Shape) -> _Captured:
        arrays = self._batcher.arrays(StepPlan.empty(), shape)
        inputs = torch.empty(layout(arrays)[1], dtype=torch.uint8, device=self._device)
        self._batcher.upload.into(inputs, arrays)
        uploaded = views(inputs, arrays)

        def step() -> Recorded:
            batch = self._batcher.assemble(uploaded, shape, self._longest_context)
            return batch, self._forward(batch)

        (batch, logits), replay = self._record(step)
        return _Captured(shape, inputs, batch, logits, replay)
