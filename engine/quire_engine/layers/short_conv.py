"""LFM2's gated short convolution."""

import torch
from quire_kernels.activation import Activation
from quire_kernels.backends import AttentionBatch
from quire_kernels.cache_write import Rope
from quire_kernels.quantize import Quantized, QuantizedOutput
from torch import Tensor

from quire_engine.layers.caches import LayerCache
from quire_engine.layers.linear import Builder, shard
from quire_engine.quantization.schemes import Part
from quire_engine.spec import DecoderSpec, ShortConvSpec


class ShortConv:
    """x [T, hidden] → [T, hidden]. Of three projections the first gates what the convolution sees, the second its
    result."""

    def __init__(self, build: Builder, spec: DecoderSpec, conv: ShortConvSpec, at: str) -> None:
        hidden, channels = spec.hidden_size, shard(spec.hidden_size, build.group)
        parts = [
            Part(f"{at}.in_proj", 3 * hidden, slice(i * hidden + channels.start, i * hidden + channels.stop))
            for i in range(3)
        ]
        self._ops = build.ops
        self._in = build.column_parallel(parts, hidden, conv.bias)
        self._weight = taps_of(build, f"{at}.conv", hidden, [channels], conv.taps)
        self._bias = build.weights.take(f"{at}.conv.bias", (hidden,), channels) if conv.bias else None
        self._out = build.row_parallel(f"{at}.out_proj", hidden, hidden, conv.bias)

    @property
    def input(self) -> QuantizedOutput | None:
        """The form in which the first projection wants its input."""
        return self._in.input

    def __call__(self, x: Tensor | Quantized, batch: AttentionBatch, cache: LayerCache, rope: Rope | None) -> Tensor:
        assert batch.states is not None
        before, after, seen = self._in(x).chunk(3, 1)
        mixed = self._ops.short_convolution(before * seen, self._weight, self._bias, False, cache[0], batch.states)
        mixed *= after
        wanted = self._out.input
        return self._out(mixed if wanted is None else self._ops.activate(mixed, Activation.IDENTITY, False, wanted))


def taps_of(build: Builder, name: str, channels: int, parts: list[slice], taps: int) -> Tensor:
    """[taps, channels of this rank]: a depthwise convolution's weights, in a checkpoint [channels, 1, taps]."""
    read = [build.weights.take(f"{name}.weight", (channels, 1, taps), part) for part in parts]
    return torch.cat(read)[:, 0].T.contiguous()
