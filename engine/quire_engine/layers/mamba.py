"""Mamba-2 (Dao and Gu 2024)."""

import torch
import torch.nn.functional as F
from quire_kernels.activation import Activation
from quire_kernels.backends import AttentionBatch
from quire_kernels.cache_write import Rope
from quire_kernels.norm import Norm
from quire_kernels.quantize import Quantized, QuantizedOutput
from quire_kernels.recurrence import Gates
from torch import Tensor

from quire_engine.layers.caches import LayerCache
from quire_engine.layers.linear import Builder, shard
from quire_engine.layers.norm import SquaredLength
from quire_engine.layers.short_conv import taps_of
from quire_engine.quantization.schemes import Part
from quire_engine.spec import DecoderSpec, MambaSpec


class Mamba:
    """x [T, hidden] → [T, hidden]: one projection to gates, inputs, what goes into the state and out of it, and time
    steps; a short convolution; the recurrence; a norm of each group, gated before."""

    def __init__(self, build: Builder, spec: DecoderSpec, mamba: MambaSpec, at: str) -> None:
        weights, group, hidden = build.weights, build.group, spec.hidden_size
        heads = shard(mamba.heads, group)
        groups = shard(mamba.groups, group) if mamba.groups > 1 else slice(0, 1)
        inner, width = mamba.heads * mamba.head_dim, mamba.groups * mamba.state
        mine = slice(heads.start * mamba.head_dim, heads.stop * mamba.head_dim)
        shared = slice(groups.start * mamba.state, groups.stop * mamba.state)
        total = 2 * inner + 2 * width + mamba.heads

        def rows(part: slice, start: int) -> slice:
            return slice(part.start + start, part.stop + start)

        convolved = [rows(mine, 0), rows(shared, inner), rows(shared, inner + width)]
        parts = [mine, *(rows(part, inner) for part in convolved), rows(heads, total - mamba.heads)]
        self._ops = build.ops
        self._group = group
        self._mamba = mamba
        self._inner, self._shared = mine.stop - mine.start, shared.stop - shared.start
        self._in = build.column_parallel([Part(f"{at}.in_proj", total, part) for part in parts], hidden, mamba.bias)
        channels = inner + 2 * width
        self._taps = taps_of(build, f"{at}.conv1d", channels, convolved, mamba.taps)
        self._conv_bias: Tensor | None = None
        if mamba.conv_bias:
            self._conv_bias = torch.cat([weights.take(f"{at}.conv1d.bias", (channels,), part) for part in convolved])

        def of_heads(name: str) -> Tensor:
            return weights.take(f"{at}.{name}", (mamba.heads,), heads, dtype=torch.float32)

        self._gates = Gates(
            decay=-of_heads("A_log").exp(), dt_bias=of_heads("dt_bias"), skip=of_heads("D"), limits=mamba.limits
        )
        self._norm = Norm(spec.norm.eps)
        self._norm_weight = weights.take(f"{at}.norm.weight", (inner,), mine).view(groups.stop - groups.start, -1)
        self._squares: SquaredLength | None = None
        if mamba.groups == 1 and group.size > 1:  # the one group is on every rank
            self._squares = SquaredLength(build.ops, self._inner, weights.device)
        self._out = build.row_parallel(f"{at}.out_proj", hidden, inner, mamba.bias)

    @property
    def input(self) -> QuantizedOutput | None:
        """The form in which the first projection wants its input."""
        return self._in.input

    def __call__(self, x: Tensor | Quantized, batch: AttentionBatch, cache: LayerCache, rope: Rope | None) -> Tensor:
        ops, mamba, inner, shared = self._ops, self._mamba, self._inner, self._shared
        assert batch.states is not None
        projected = self._in(x)
        channels = inner + 2 * shared
        convolved, steps = projected[:, inner : inner + channels], projected[:, inner + channels :]
        seen = ops.short_convolution(convolved, self._taps, self._conv_bias, True, cache[0], batch.states)
        read = ops.recurrence(
            seen[:, inner + shared :].unflatten(1, (-1, mamba.state)),
            seen[:, inner : inner + shared].unflatten(1, (-1, mamba.state)),
            seen[:, :inner].unflatten(1, (-1, mamba.head_dim)),
            steps,
            None,
            self._gates,
            cache[1],
            batch.states,
        )
        out = self._normalized(read.flatten(1).mul_(F.silu(projected[:, :inner])))
        wanted = self._out.input
        return self._out(out if wanted is None else ops.activate(out, Activation.IDENTITY, False, wanted))

    def _normalized(self, x: Tensor) -> Tensor:
        if self._squares is None:
            self._ops.norm_heads(x.unflatten(1, (self._norm_weight.shape[0], -1)), self._norm_weight, None, self._norm)
            return x
        squares = self._group.all_reduce(self._squares(x))
        shrink = torch.rsqrt(squares / (x.shape[1] * self._group.size) + self._norm.eps)
        return (x * shrink * self._norm_weight[0]).to(x.dtype)
