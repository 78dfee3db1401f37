"""Grouped-query attention over the paged cache, in all the forms that families give it.

T tokens of the step, H query heads and K key-value heads of this rank, D head dim.
"""

import math
from dataclasses import replace

import torch
from quire_kernels.activation import Activation
from quire_kernels.backends import AttentionBatch, unquantized
from quire_kernels.cache_write import CacheScales, HeadNorm, Rope
from quire_kernels.paged_attention import AttentionOptions
from quire_kernels.quantize import Quantized, QuantizedOutput
from torch import Tensor

from quire_engine.layers.caches import LayerCache, kv_heads_of
from quire_engine.layers.linear import Builder, shard
from quire_engine.layers.norm import SquaredLength
from quire_engine.quantization.schemes import Linear, Part
from quire_engine.spec import DecoderSpec, QKNorm


class Attention:
    """x [T, hidden] → [T, hidden]; the new keys and values go to the cache."""

    def __init__(
        self,
        build: Builder,
        spec: DecoderSpec,
        layer: int,
        at: str,
        quantized_cache: bool,
        inputs: int | None = None,
    ) -> None:
        """`at`: its name in the checkpoint. `inputs`: the width of x where that is not the model's."""
        names, inputs = spec.names, inputs or spec.hidden_size
        weights, group = build.weights, build.group
        self._ops = build.ops
        self._head_dim = spec.head_dim
        self._num_heads = spec.num_heads // group.size
        self._scale = spec.attention_scale if spec.attention_scale is not None else spec.head_dim**-0.5
        self._clip = spec.clip_qkv
        self._growth = spec.query_growth
        heads, kv_heads = shard(spec.num_heads, group), kv_heads_of(spec, group)
        self._kv_heads = kv_heads.stop - kv_heads.start
        self._cache_scales = cache_scales(build, at, self._kv_heads) if quantized_cache else None
        stored = self._cache_scales
        device = weights.device
        self._options = AttentionOptions(
            window=spec.window(layer),
            soft_cap=spec.soft_cap,
            sinks=weights.take(f"{at}.sinks", (spec.num_heads,), heads, dtype=torch.float32) if spec.sinks else None,
            alibi_slopes=(alibi_slopes(spec.num_heads)[heads] * spec.alibi).to(device) if spec.alibi else None,
            key_scale=None if stored is None else stored.key,
            value_scale=None if stored is None else stored.value,
        )
        self._qkv = build.column_parallel(qkv_parts(spec, at, heads, kv_heads), inputs, spec.qkv_bias)
        self._gate: Linear | None = None
        if spec.attention_gate:
            self._gate = build.column_parallel(_of_pairs(spec, at, heads, 1), inputs, spec.qkv_bias)
        inner = spec.num_heads * spec.head_dim
        self._output = build.row_parallel(f"{at}.{names.output}", spec.hidden_size, inner, spec.output_bias)
        self._head_norm: HeadNorm | None = None
        self._norms: list[_Norm] = []
        if spec.qk_norm is not None and spec.qk_norm.over == "head":
            q, k = (weights.take(f"{at}.{name}.weight", (spec.head_dim,)) for name in (names.q_norm, names.k_norm))
            norm = spec.qk_norm.norm
            self._head_norm = HeadNorm(
                q_weight=q, k_weight=k, eps=norm.eps, unit_offset=norm.unit_offset, after_rope=spec.qk_norm.after_rope
            )
        elif spec.qk_norm is not None:
            self._norms = [
                _Norm(build, spec.qk_norm, f"{at}.{names.q_norm}", spec.num_heads, heads, spec.head_dim),
                _Norm(build, spec.qk_norm, f"{at}.{names.k_norm}", spec.num_kv_heads, kv_heads, spec.head_dim),
            ]

    @property
    def input(self) -> QuantizedOutput | None:
        """The form in which the first projection wants its input."""
        return self._qkv.input

    def __call__(self, x: Tensor | Quantized, batch: AttentionBatch, cache: LayerCache, rope: Rope | None) -> Tensor:
        ops = self._ops
        qkv = self._qkv(x)  # [T, (H + 2K) * D]
        heads = qkv.view(qkv.shape[0], self._num_heads + 2 * self._kv_heads, self._head_dim)
        at = 0
        for norm in self._norms:
            norm(heads[:, at : at + norm.heads])
            at += norm.heads
        if self._clip is not None:
            qkv.clamp_(-self._clip, self._clip)
        if self._growth is not None:
            by, length = self._growth
            heads[:, : self._num_heads] *= (1 + by * torch.log1p(batch.positions // length))[:, None, None]
        keys, values = cache
        ops.rope_cache_write(qkv, keys, values, batch, self._num_heads, rope, self._head_norm, self._cache_scales)
        options = self._options if batch.spans is None else replace(self._options, spans=batch.spans)
        attended = ops.paged_attention(heads[:, : self._num_heads], keys, values, batch, self._scale, options)
        flat = attended.reshape(qkv.shape[0], -1)
        if self._gate is not None:
            flat = flat * unquantized(ops.activate(self._gate(x), Activation.SIGMOID, False))
        wanted = self._output.input
        return self._output(flat if wanted is None else ops.activate(flat, Activation.IDENTITY, False, wanted))


class _Norm:
    """Of queries or keys: each head with weights of its own, or all heads together. In place."""

    def __init__(self, build: Builder, spec: QKNorm, name: str, heads: int, part: slice, head_dim: int) -> None:
        weights = build.weights
        self.heads = part.stop - part.start
        self._ops = build.ops
        self._group = build.group
        self._norm = spec.norm
        self._whole = spec.over == "width"
        if self._whole:
            rows = slice(part.start * head_dim, part.stop * head_dim)
            self._weight = weights.take(f"{name}.weight", (heads * head_dim,), rows)
        elif spec.lists:
            each = [weights.take(f"{name}.norms.{head}.weight", (head_dim,)) for head in range(heads)]
            self._weight = torch.stack(each[part])
        else:
            self._weight = weights.take(f"{name}.weight", (heads, head_dim), part)
        self._width = self._weight.numel() * build.group.size  # heads that ranks share are counted by each of them
        self._squares: SquaredLength | None = None
        if self._whole and build.group.size > 1:
            self._squares = SquaredLength(build.ops, self._weight.numel(), weights.device)

    def __call__(self, x: Tensor) -> None:
        """x [T, heads, D]."""
        if not self._whole:
            self._ops.norm_heads(x, self._weight, None, self._norm)
            return
        flat = x.flatten(1)
        if self._squares is None:
            x.copy_(unquantized(self._ops.add_norm(flat, None, self._weight, None, self._norm)).view(x.shape))
            return
        squares = self._group.all_reduce(self._squares(flat))
        shrink = torch.rsqrt(squares / self._width + self._norm.eps)
        x.copy_((flat * shrink * self._weight).view(x.shape))


def qkv_parts(spec: DecoderSpec, at: str, heads: slice, kv_heads: slice) -> list[Part]:
    """Where these heads' queries, keys and values lie in the checkpoint, in this order."""
    names, size = spec.names, spec.head_dim
    total = {"q": spec.num_heads, "k": spec.num_kv_heads, "v": spec.num_kv_heads}
    if spec.qkv == "apart":
        parts = [
            Part(f"{at}.{name}", total[key] * size, slice(part.start * size, part.stop * size))
            for key, name, part in (("q", names.q, heads), ("k", names.k, kv_heads), ("v", names.v, kv_heads))
        ]
        return _of_pairs(spec, at, heads, 0) + parts[1:] if spec.attention_gate else parts

    def rows(start: int, stop: int) -> Part:
        return Part(f"{at}.{names.q}", sum(total.values()) * size, slice(start * size, stop * size))

    if spec.qkv == "stacked":
        k, v = spec.num_heads, spec.num_heads + spec.num_kv_heads
        return [
            rows(heads.start, heads.stop),
            rows(k + kv_heads.start, k + kv_heads.stop),
            rows(v + kv_heads.start, v + kv_heads.stop),
        ]
    group = spec.num_heads // spec.num_kv_heads
    stride = group + 2  # heads from one group to the next
    parts = []
    for g in range(heads.start // group, -(-heads.stop // group)):
        begin, end = max(heads.start - g * group, 0), min(heads.stop - g * group, group)
        parts.append(rows(g * stride + begin, g * stride + end))
    for offset in (group, group + 1):
        parts += [rows(g * stride + offset, g * stride + offset + 1) for g in range(kv_heads.start, kv_heads.stop)]
    return parts


def _of_pairs(spec: DecoderSpec, at: str, heads: slice, second: int) -> list[Part]:
    """Of each head's query and gate, which follow one another, the one or the other."""
    size = spec.head_dim
    return [
        Part(f"{at}.{spec.names.q}", 2 * spec.num_heads * size, slice(row * size, (row + 1) * size))
        for row in range(2 * heads.start + second, 2 * heads.stop, 2)
    ]


def cache_scales(build: Builder, at: str, heads: int) -> CacheScales:
    """What an fp8 cache's numbers stand for: as the checkpoint was calibrated, else 1."""

    def scale(name: str) -> Tensor:
        full = f"{at}.{name}_scale"
        one = torch.ones(heads, device=build.weights.device)
        return one * build.weights.take_all(full).flatten() if full in build.weights else one

    return CacheScales(key=scale("k"), value=scale("v"))


def alibi_slopes(heads: int) -> Tensor:
    """[heads]: a geometric series; where heads are no power of two, every other one of the next series follows."""
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / whole) for i in range(whole)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / whole) for i in range(heads - whole)]
    return torch.tensor(slopes)
