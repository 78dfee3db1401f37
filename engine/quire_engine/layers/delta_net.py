"""Gated DeltaNet (Yang et al. 2024) as Qwen3-Next and Qwen3.5 have it."""

import torch
import torch.nn.functional as F
from quire_kernels.activation import Activation
from quire_kernels.backends import AttentionBatch, unquantized
from quire_kernels.cache_write import Rope
from quire_kernels.norm import Norm
from quire_kernels.quantize import Quantized
from quire_kernels.recurrence import Gates
from torch import Tensor

from quire_engine.layers.caches import LayerCache
from quire_engine.layers.linear import Builder, shard
from quire_engine.layers.short_conv import taps_of
from quire_engine.quantization.schemes import Part
from quire_engine.spec import DecoderSpec, DeltaNetSpec


class DeltaNet:
    """x [T, hidden] → [T, hidden]: queries, keys and values through a short convolution, the recurrence, and a norm of
    each head that a projection of x gates."""

    input = None  # the rates and the fading want it as it is

    def __init__(self, build: Builder, spec: DecoderSpec, net: DeltaNetSpec, at: str) -> None:
        weights, hidden = build.weights, spec.hidden_size
        keys, values = shard(net.key_heads, build.group), shard(net.value_heads, build.group)
        all_keys, all_values = net.key_heads * net.key_dim, net.value_heads * net.value_dim
        self._ops = build.ops
        self._net = net
        self._keys = (keys.stop - keys.start) * net.key_dim
        self._values = values.stop - values.start
        key_rows, value_rows = _scaled(keys, net.key_dim), _scaled(values, net.value_dim)
        channels = [key_rows, _moved(key_rows, all_keys), _moved(value_rows, 2 * all_keys)]
        if net.grouped:
            self._in = build.column_parallel(_grouped_rows(net, f"{at}.in_proj_qkvz", keys), hidden, False)
            rates = _grouped_rates(net, f"{at}.in_proj_ba", keys)
        else:
            total = 2 * all_keys + all_values
            parts = [Part(f"{at}.in_proj_qkv", total, rows) for rows in channels]
            self._in = build.column_parallel([*parts, Part(f"{at}.in_proj_z", all_values, value_rows)], hidden, False)
            rates = [Part(f"{at}.in_proj_{name}", net.value_heads, values) for name in ("b", "a")]
        read = [weights.take(f"{part.name}.weight", (part.outputs, hidden), part.rows) for part in rates]
        self._rates = build.ops.linear(torch.cat(read), None)
        self._taps = taps_of(build, f"{at}.conv1d", 2 * all_keys + all_values, channels, net.taps)
        heads = (net.value_heads,)
        self._gates = Gates(
            decay=-weights.take(f"{at}.A_log", heads, values, dtype=torch.float32).exp(),
            dt_bias=weights.take(f"{at}.dt_bias", heads, values, dtype=torch.float32),
        )
        self._norm = Norm(spec.norm.eps)
        self._norm_weight = weights.take(f"{at}.norm.weight", (net.value_dim,))
        self._out = build.row_parallel(f"{at}.out_proj", hidden, all_values, False)

    def __call__(self, x: Tensor | Quantized, batch: AttentionBatch, cache: LayerCache, rope: Rope | None) -> Tensor:
        ops, net, keys = self._ops, self._net, self._keys
        assert batch.states is not None
        x, wanted = unquantized(x), self._in.input
        mixed = self._in(x if wanted is None else ops.activate(x, Activation.IDENTITY, False, wanted))
        channels = 2 * keys + self._values * net.value_dim
        seen = ops.short_convolution(mixed[:, :channels], self._taps, None, True, cache[0], batch.states)
        rate, fading = self._rates(x).split(self._values, 1)
        read = ops.recurrence(
            seen[:, :keys].unflatten(1, (-1, net.key_dim)),
            seen[:, keys : 2 * keys].unflatten(1, (-1, net.key_dim)),
            seen[:, 2 * keys :].unflatten(1, (-1, net.value_dim)),
            fading,
            rate,
            self._gates,
            cache[1],
            batch.states,
        )
        ops.norm_heads(read, self._norm_weight, None, self._norm)
        out = read.flatten(1).mul_(F.silu(mixed[:, channels:]))
        wanted = self._out.input
        return self._out(out if wanted is None else ops.activate(out, Activation.IDENTITY, False, wanted))


def _scaled(heads: slice, size: int) -> slice:
    return slice(heads.start * size, heads.stop * size)


def _moved(rows: slice, by: int) -> slice:
    return slice(rows.start + by, rows.stop + by)


def _grouped_rows(net: DeltaNetSpec, name: str, keys: slice) -> list[Part]:
    """All queries, keys, values and gates of these key heads, each of which has its own side by side."""
    values = net.value_heads // net.key_heads * net.value_dim
    stride = 2 * net.key_dim + 2 * values
    parts, at = [], 0
    for size in (net.key_dim, net.key_dim, values, values):
        parts += [
            Part(name, net.key_heads * stride, slice(h * stride + at, h * stride + at + size)) for h in _all(keys)
        ]
        at += size
    return parts


def _grouped_rates(net: DeltaNetSpec, name: str, keys: slice) -> list[Part]:
    share = net.value_heads // net.key_heads
    return [
        Part(name, 2 * net.value_heads, slice((2 * h + i) * share, (2 * h + i + 1) * share))
        for i in range(2)
        for h in _all(keys)
    ]


def _all(heads: slice) -> range:
    return range(heads.start, heads.stop)
