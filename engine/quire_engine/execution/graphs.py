"""CUDA graphs (HIP graphs on AMD): a step's kernels recorded once per padded shape and launched as one.

A step of few tokens is over before Python has launched its kernels one by one. Decoding is captured at a ladder of
batch sizes; small steps that mix prompts with decoding at a ladder of token counts. The largest is captured first, so
that all the others fit into the memory it took (one pool). Nothing that a graph makes outlives it but the logits, which
all of them write to the same buffer: a step's are drawn from before the next step's are there.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quire_engine.batch import Batcher, Draws, Shape, StepBatch
from quire_engine.step import Places, StepPlan
from quire_engine.upload import layout, views

Forward = Callable[[StepBatch], None]  # to logits, which it knows a place for
Record = Callable[[Callable[[], None]], Callable[[], None]]  # a step → its replay


@dataclass(slots=True)
class _Captured:
    shape: Shape
    inputs: Tensor  # bytes; every array of a step has its place in them
    draws: Draws  # views of the inputs
    replay: Callable[[], None]


def graph_recorder(device: torch.device) -> Record:
    """Records on a GPU, into one pool of memory: what the largest shape took serves the smaller ones."""
    stream = torch.cuda.Stream(device)
    pool = torch.cuda.graph_pool_handle()

    def record(step: Callable[[], None]) -> Callable[[], None]:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            step()
        return graph.replay

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
        """Runs each shape once (which compiles what it needs), then records it; in the order given."""
        for shape in shapes:
            captured = self._capture_one(shape)
            if shape.longest_query == 1:
                self._decode[shape.tokens] = captured
            else:
                self._mixed.append(captured)
        self._decode_sizes = sorted(self._decode)
        self._mixed.sort(key=lambda captured: (captured.shape.tokens, captured.shape.longest_query))

    def replay(self, plan: StepPlan, places: Places) -> Draws | None:
        """The step by a captured graph, up to its logits, which are padded; None where no shape fits."""
        captured = self._fitting(self._batcher.shape(plan))
        if captured is None:
            return None
        self._batcher.upload.into(captured.inputs, self._batcher.arrays(plan, places, captured.shape))
        captured.replay()
        return captured.draws

    def _fitting(self, shape: Shape) -> _Captured | None:
        if shape.longest_query == 1 and shape.draws == shape.tokens:
            place = bisect.bisect_left(self._decode_sizes, shape.tokens)
            return self._decode[self._decode_sizes[place]] if place < len(self._decode_sizes) else None
        for captured in self._mixed:
            padded = captured.shape
            fits = shape.tokens <= padded.tokens and shape.requests < padded.requests and shape.draws <= padded.draws
            if fits and shape.longest_query <= padded.longest_query:
                return captured
        return None

    def _capture_one(self, shape: Shape) -> _Captured:
        nothing = StepPlan.empty()
        arrays = self._batcher.arrays(nothing, nothing.places(), shape)
        inputs = torch.empty(layout(arrays)[1], dtype=torch.uint8, device=self._device)
        self._batcher.upload.into(inputs, arrays)
        uploaded = views(inputs, arrays)

        def step() -> None:
            self._forward(self._batcher.assemble(uploaded, shape, self._longest_context))

        return _Captured(shape, inputs, self._batcher.draws(uploaded), self._record(step))
