"""A backend is the set of kernels one worker calls. It is chosen once, at start; nothing is dispatched in a step."""

import ctypes
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire_kernels.activation import Activation
from quire_kernels.activation import reference as activation_reference
from quire_kernels.cache_write import HeadNorm, Rope
from quire_kernels.cache_write import reference as cache_write_reference
from quire_kernels.native import build
from quire_kernels.norm import Norm
from quire_kernels.norm import reference as norm_reference
from quire_kernels.paged_attention import AttentionOptions
from quire_kernels.paged_attention import reference as attention_reference
from quire_kernels.quantize import Quantized
from quire_kernels.sampling import Rows
from quire_kernels.sampling.host import draw as draw_on_host

ATTENTION_TILE = 8


@dataclass(frozen=True, kw_only=True)
class AttentionBatch:
    """Which tokens of a flat batch belong to which request. T tokens, R requests."""

    positions: Tensor  # [T] int32
    slots: Tensor  # [T] int64, page * block size + offset; -1: not written
    block_tables: Tensor  # [R, max pages] int32
    query_starts: Tensor  # [R + 1] int32
    longest_query: int  # new tokens of the request that has most
    context_lens: Tensor  # [R] int32, the new tokens included

    @cached_property
    def tiles(self) -> Tensor:
        """[tiles, 3] int32: request, first flat token, tokens (at most ATTENTION_TILE). For the C kernel."""
        return torch.from_numpy(attention_tiles(self.query_starts.numpy()))


def unquantized(x: Tensor | Quantized) -> Tensor:
    """The result of an operation that was asked for no fp8."""
    assert isinstance(x, Tensor), "no fp8 result was asked for"
    return x


class Backend(Protocol):
    """What a decoder layer needs. The contracts stand in the operations' packages."""

    name: str

    def paged_attention(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        options: AttentionOptions,
    ) -> Tensor: ...

    def rope_cache_write(
        self,
        qkv: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        num_heads: int,
        rope: Rope | None,
        norm: HeadNorm | None,
    ) -> None: ...

    def add_norm(self, residual: Tensor, delta: Tensor | None, weight: Tensor, norm: Norm) -> Tensor: ...

    def silu_mul(self, x: Tensor) -> Tensor: ...

    def draw(self, logits: Tensor, rows: Rows, filtered: bool) -> Tensor: ...


class TorchBackend:
    """The references: any device, any dtype."""

    name = "torch"

    def paged_attention(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        options: AttentionOptions,
    ) -> Tensor:
        return attention_reference.paged_attention(
            q,
            key_cache,
            value_cache,
            batch.block_tables,
            batch.query_starts,
            batch.context_lens,
            scale,
            options,
        )

    def rope_cache_write(
        self,
        qkv: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        num_heads: int,
        rope: Rope | None,
        norm: HeadNorm | None,
    ) -> None:
        cache_write_reference.rope_cache_write(
            qkv,
            key_cache,
            value_cache,
            batch.positions,
            batch.slots,
            num_heads,
            rope,
            norm,
        )

    def add_norm(self, residual: Tensor, delta: Tensor | None, weight: Tensor, norm: Norm) -> Tensor:
        return unquantized(norm_reference.add_norm(residual, delta, weight, None, norm))

    def silu_mul(self, x: Tensor) -> Tensor:
        return unquantized(activation_reference.activate(x, Activation.SILU, gated=True))

    def draw(self, logits: Tensor, rows: Rows, filtered: bool) -> Tensor:
        return draw_on_host(logits, rows)


def _pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


class NativeBackend:
    """The C kernels: fp32 on a CPU. Raises build.NativeBuildError where they cannot be built."""

    name = "native"

    def __init__(self) -> None:
        library = build.load()
        self._attention = library.paged_attention
        self._cache_write = library.rope_cache_write
        self._norm = library.add_rms_norm
        self._silu_mul = library.silu_mul
        for function in (self._attention, self._cache_write, self._norm, self._silu_mul):
            function.restype = None

    def paged_attention(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        options: AttentionOptions,
    ) -> Tensor:
        kv_heads, block_size, head_dim = key_cache.shape[1:]
        group = q.shape[1] // kv_heads
        assert q.stride(1) == head_dim, "heads of a token are consecutive"
        assert options == AttentionOptions(window=options.window), "kernels.c knows windows alone"
        assert head_dim <= 256, "kernels.c: MAX_DIM"
        assert group <= 16, "kernels.c: MAX_GROUP"
        assert block_size <= 64, "kernels.c: MAX_BLOCK"
        out = torch.empty(q.shape)
        self._attention(
            _pointer(q),
            ctypes.c_int64(q.stride(0)),
            _pointer(out),
            ctypes.c_int64(out.stride(0)),
            _pointer(key_cache),
            _pointer(value_cache),
            _pointer(batch.block_tables),
            ctypes.c_int64(batch.block_tables.stride(0)),
            _pointer(batch.positions),
            _pointer(batch.tiles),
            ctypes.c_int64(batch.tiles.shape[0]),
            kv_heads,
            group,
            head_dim,
            block_size,
            options.window,
            ctypes.c_float(scale),
        )
        return out

    def rope_cache_write(
        self,
        qkv: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        num_heads: int,
        rope: Rope | None,
        norm: HeadNorm | None,
    ) -> None:
        kv_heads, block_size, head_dim = key_cache.shape[1:]
        assert rope is not None, "kernels.c rotates"
        assert not rope.interleaved and rope.axes is None, "kernels.c rotates by halves"
        assert norm is None or not norm.unit_offset, "kernels.c multiplies by the weight itself"
        self._cache_write(
            _pointer(qkv),
            ctypes.c_int64(qkv.stride(0)),
            _pointer(key_cache),
            _pointer(value_cache),
            _pointer(batch.positions),
            _pointer(batch.slots),
            _pointer(rope.cos_sin),
            _pointer(None if norm is None else norm.q_weight),
            _pointer(None if norm is None else norm.k_weight),
            ctypes.c_float(0.0 if norm is None else norm.eps),
            ctypes.c_int64(qkv.shape[0]),
            num_heads,
            kv_heads,
            head_dim,
            block_size,
            rope.cos_sin.shape[-1],
        )

    def add_norm(self, residual: Tensor, delta: Tensor | None, weight: Tensor, norm: Norm) -> Tensor:
        assert norm == Norm(norm.eps), "kernels.c has RMSNorm alone"
        out = torch.empty_like(residual)
        self._norm(
            _pointer(residual),
            _pointer(delta),
            _pointer(weight),
            _pointer(out),
            ctypes.c_float(norm.eps),
            ctypes.c_int64(residual.shape[0]),
            ctypes.c_int64(residual.shape[1]),
        )
        return out

    def silu_mul(self, x: Tensor) -> Tensor:
        out = torch.empty(x.shape[0], x.shape[1] // 2)
        self._silu_mul(_pointer(x), _pointer(out), ctypes.c_int64(x.shape[0]), ctypes.c_int64(out.shape[1]))
        return out

    def draw(self, logits: Tensor, rows: Rows, filtered: bool) -> Tensor:
        return draw_on_host(logits, rows)


def attention_tiles(query_starts: NDArray[np.int32]) -> NDArray[np.int32]:
    """Cuts every request's new tokens into tiles [tiles, 3] (request, first flat token, tokens) for the C kernel."""
    starts, lengths = query_starts[:-1], np.diff(query_starts)
    tiles = -(-lengths // ATTENTION_TILE)
    request = np.repeat(np.arange(len(lengths), dtype=np.int32), tiles)
    first = np.cumsum(tiles) - tiles
    offset = (np.arange(len(request)) - first[request]) * ATTENTION_TILE
    rows = (request, starts[request] + offset, np.minimum(ATTENTION_TILE, lengths[request] - offset))
    return np.ascontiguousarray(np.stack(rows, 1), np.int32)
