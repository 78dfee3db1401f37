"""The C kernels: fp32 on a CPU."""

import ctypes

import torch
from torch import Tensor

from quire_kernels.activation import Activation
from quire_kernels.backends import AttentionBatch
from quire_kernels.cache_write import CacheScales, HeadNorm, Rope
from quire_kernels.native import build
from quire_kernels.norm import Norm
from quire_kernels.paged_attention import AttentionOptions
from quire_kernels.quantize import Quantized, QuantizedOutput
from quire_kernels.recurrence import NORM_EPS, Gates, StateBatch
from quire_kernels.torch_backend import TorchBackend

MAX_DIM = 256  # of a head and of a recurrent state, as in kernels.c
MAX_TAPS = 8  # of a short convolution


def _pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


class NativeBackend(TorchBackend):
    """What C does not have (products of matrices, experts, draws, quantized results) is torch's.

    Raises build.NativeBuildError where the kernels cannot be built.
    """

    name = "native"

    def __init__(self, *, deterministic: bool = False) -> None:
        super().__init__(deterministic=deterministic)
        library = build.load()
        self._attention = library.paged_attention
        self._cache_write = library.rope_cache_write
        self._norm = library.add_rms_norm
        self._silu_mul = library.silu_mul
        self._convolution = library.short_convolution
        self._recurrence = library.recurrence
        self._mask_logits = library.mask_logits
        for function in (
            self._attention,
            self._cache_write,
            self._norm,
            self._silu_mul,
            self._convolution,
            self._recurrence,
            self._mask_logits,
        ):
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
        assert options.key_scale is None, "kernels.c has no scales"
        assert head_dim <= MAX_DIM
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
            _pointer(batch.tiles),
            ctypes.c_int64(batch.tiles.shape[0]),
            kv_heads,
            group,
            head_dim,
            block_size,
            options.window,
            ctypes.c_float(scale),
            ctypes.c_float(options.soft_cap),
            _pointer(options.sinks),
            _pointer(options.alibi_slopes),
            _pointer(options.spans),
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
        scales: CacheScales | None,
    ) -> None:
        kv_heads, block_size, head_dim = key_cache.shape[1:]
        assert scales is None, "kernels.c stores fp32"
        self._cache_write(
            _pointer(qkv),
            ctypes.c_int64(qkv.stride(0)),
            _pointer(key_cache),
            _pointer(value_cache),
            _pointer(batch.positions),
            _pointer(batch.slots),
            _pointer(None if rope is None else rope.cos_sin),
            _pointer(None if norm is None else norm.q_weight),
            _pointer(None if norm is None else norm.k_weight),
            ctypes.c_float(0.0 if norm is None else norm.eps),
            ctypes.c_float(norm is not None and norm.unit_offset),
            norm is not None and norm.after_rope,
            ctypes.c_int64(qkv.shape[0]),
            num_heads,
            kv_heads,
            head_dim,
            block_size,
            0 if rope is None else rope.cos_sin.shape[-1],
            rope is not None and rope.interleaved,
        )

    def add_norm(
        self,
        residual: Tensor,
        delta: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: Norm,
        output: QuantizedOutput | None = None,
    ) -> Tensor | Quantized:
        if output is not None or norm.kind != "rms" or bias is not None or weight is None:
            return super().add_norm(residual, delta, weight, bias, norm, output)
        out = torch.empty(residual.shape)
        self._norm(
            _pointer(residual),
            _pointer(delta),
            _pointer(weight),
            _pointer(out),
            ctypes.c_float(norm.eps),
            ctypes.c_float(norm.unit_offset),
            ctypes.c_int64(residual.shape[0]),
            ctypes.c_int64(residual.shape[1]),
            ctypes.c_int64(residual.stride(0)),
            ctypes.c_int64(0 if delta is None else delta.stride(0)),
        )
        return out

    def activate(
        self, x: Tensor, kind: Activation, gated: bool, output: QuantizedOutput | None = None
    ) -> Tensor | Quantized:
        if kind is Activation.SIGMOID and not gated and output is None:
            return 1.0 / (1.0 + torch.exp(-x))  # torch.sigmoid has other bits where elements fill no whole vector
        if kind is not Activation.SILU or not gated or output is not None:
            return super().activate(x, kind, gated, output)
        out = torch.empty(x.shape[0], x.shape[1] // 2)
        self._silu_mul(_pointer(x), _pointer(out), ctypes.c_int64(x.shape[0]), ctypes.c_int64(out.shape[1]))
        return out

    def short_convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, states: Tensor, batch: StateBatch
    ) -> Tensor:
        assert x.stride(1) == 1
        assert weight.shape[0] <= MAX_TAPS
        out = torch.empty(x.shape)
        self._convolution(
            _pointer(x),
            ctypes.c_int64(x.stride(0)),
            _pointer(weight),
            _pointer(bias),
            _pointer(out),
            _pointer(states),
            _pointer(batch.reads),
            _pointer(batch.writes),
            _pointer(batch.query_starts),
            ctypes.c_int64(batch.reads.shape[0]),
            ctypes.c_int64(x.shape[1]),
            weight.shape[0],
            silu,
        )
        return out

    def recurrence(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dt: Tensor,
        beta: Tensor | None,
        gates: Gates,
        states: Tensor,
        batch: StateBatch,
    ) -> Tensor:
        assert all(x.stride(1) == x.shape[2] and x.stride(2) == 1 for x in (q, k, v)), "a token's heads follow on"
        assert max(q.shape[2], v.shape[2]) <= MAX_DIM
        out = torch.empty(v.shape)
        self._recurrence(
            _pointer(q),
            ctypes.c_int64(q.stride(0)),
            _pointer(k),
            ctypes.c_int64(k.stride(0)),
            _pointer(v),
            ctypes.c_int64(v.stride(0)),
            _pointer(dt),
            ctypes.c_int64(dt.stride(0)),
            _pointer(beta),
            ctypes.c_int64(0 if beta is None else beta.stride(0)),
            _pointer(gates.decay),
            _pointer(gates.dt_bias),
            _pointer(gates.skip),
            ctypes.c_float(gates.limits[0]),
            ctypes.c_float(gates.limits[1]),
            _pointer(out),
            _pointer(states),
            _pointer(batch.reads),
            _pointer(batch.writes),
            _pointer(batch.query_starts),
            ctypes.c_int64(batch.reads.shape[0]),
            v.shape[1],
            k.shape[1],
            k.shape[2],
            v.shape[2],
            ctypes.c_float(NORM_EPS),
        )
        return out

    def mask_logits(self, logits: Tensor, places: Tensor, masks: Tensor) -> None:
        vocabulary = logits.shape[1]
        assert logits.dtype == torch.float32
        assert masks.dtype == torch.int32
        assert masks.shape == (len(places), -(-vocabulary // 32)), "a bit for each token"
        assert logits.stride(1) == masks.stride(1) == 1, "tokens of a row follow on"
        rows = places.long().contiguous()
        self._mask_logits(
            _pointer(logits),
            ctypes.c_int64(logits.stride(0)),
            _pointer(rows),
            _pointer(masks),
            ctypes.c_int64(masks.stride(0)),
            ctypes.c_int64(len(places)),
            ctypes.c_int64(vocabulary),
        )
