"""A backend is the set of kernels one worker calls. It is chosen once, at start; nothing is dispatched in a step."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire_kernels.activation import Activation
from quire_kernels.cache_write import CacheScales, HeadNorm, Rope
from quire_kernels.moe import Experts, Routing
from quire_kernels.norm import Norm
from quire_kernels.paged_attention import AttentionOptions
from quire_kernels.quantize import Quantized, QuantizedOutput
from quire_kernels.quantized_matmul import Int4Weight
from quire_kernels.recurrence import Gates, StateBatch
from quire_kernels.sampling import Rows

ATTENTION_TILE = 8

Matmul = Callable[[Tensor], Tensor]  # [T, K] → [T, N]
QuantizedMatmul = Callable[[Quantized], Tensor]


@dataclass(frozen=True, kw_only=True)
class AttentionBatch:
    """Which tokens of a flat batch belong to which request. T tokens, R requests."""

    positions: Tensor  # [T] int32, which rows of a rope's table the tokens read
    slots: Tensor  # [T] int64, page * block size + offset; -1: not written
    block_tables: Tensor  # [R, max pages] int32
    query_starts: Tensor  # [R + 1] int32
    longest_query: int  # new tokens of the request that has most
    context_lens: Tensor  # [R] int32, the new tokens included
    spans: Tensor | None = None  # [T, 2] int32: see AttentionOptions
    states: StateBatch | None = None  # of models with recurrent layers
    angles: Tensor | None = None  # [3, T] int32: positions in time, rows and columns; None: all are `positions`

    @cached_property
    def tiles(self) -> Tensor:
        """[tiles, 4] int32: request, first flat token, tokens (at most ATTENTION_TILE), the first one's position. For
        the C kernel."""
        return torch.from_numpy(attention_tiles(self.query_starts.numpy(), self.context_lens.numpy()))

    @cached_property
    def cuts(self) -> dict[Hashable, Tensor]:
        """How the step's first layer cut long contexts, for the others: see `paged_attention.pieces`."""
        return {}


def unquantized(x: Tensor | Quantized) -> Tensor:
    """The result of an operation that was asked for no quantized one."""
    assert isinstance(x, Tensor), "no quantized result was asked for"
    return x


class Backend(Protocol):
    """What a decoder layer needs. The contracts stand in the operations' packages.

    `linear`, `scaled_linear` and `int4_linear` are asked once per layer, at load, and may lay the weight out anew.
    """

    name: str
    fp8: torch.dtype | None  # e4m3 as the device has it; None: it has none
    packed_experts: bool  # whether it multiplies with experts in MXFP4 and int4 as they are

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
        scales: CacheScales | None,
    ) -> None: ...

    def add_norm(
        self,
        residual: Tensor,
        delta: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: Norm,
        output: QuantizedOutput | None = None,
    ) -> Tensor | Quantized: ...

    def norm_heads(self, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm) -> None: ...

    def activate(
        self, x: Tensor, kind: Activation, gated: bool, output: QuantizedOutput | None = None
    ) -> Tensor | Quantized: ...

    def linear(self, weight: Tensor, bias: Tensor | None) -> Matmul:
        """x @ weight.T + bias. weight [N, K], bias [N]."""

    def scaled_linear(self, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> QuantizedMatmul:
        """The same of fp8 or int8 values; see `quantized_matmul`. The result is in `dtype`."""

    def int4_linear(self, weight: Int4Weight, bias: Tensor | None) -> Matmul:
        """The same of a weight in 4 bits."""

    def experts(self, x: Tensor, router_logits: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """A mixture-of-experts layer: x [T, H], router_logits [T, E] → [T, H], the sum over the experts held here."""

    def latent_attention(self, q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, latent: int) -> Tensor:
        """See `mla`."""

    def latent_cache_write(
        self,
        latent: Tensor,
        q_rope: Tensor,
        cache: Tensor,
        batch: AttentionBatch,
        rope: Rope,
        weight: Tensor,
        eps: float,
    ) -> None:
        """See `mla`."""

    def short_convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, states: Tensor, batch: StateBatch
    ) -> Tensor: ...

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
    ) -> Tensor: ...

    def mask_logits(self, logits: Tensor, places: Tensor, masks: Tensor) -> None: ...

    def draw(self, logits: Tensor, rows: Rows, filtered: bool) -> Tensor: ...


def attention_tiles(query_starts: NDArray[np.int32], context_lens: NDArray[np.int32]) -> NDArray[np.int32]:
    """Cuts every request's new tokens, the last ones of its context, into tiles; see `AttentionBatch.tiles`."""
    starts, lengths = query_starts[:-1], np.diff(query_starts)
    tiles = -(-lengths // ATTENTION_TILE)
    request = np.repeat(np.arange(len(lengths), dtype=np.int32), tiles)
    first = np.cumsum(tiles) - tiles
    offset = (np.arange(len(request)) - first[request]) * ATTENTION_TILE
    position = (context_lens - lengths)[request] + offset
    rows = (request, starts[request] + offset, np.minimum(ATTENTION_TILE, lengths[request] - offset), position)
    return np.ascontiguousarray(np.stack(rows, 1), np.int32)
