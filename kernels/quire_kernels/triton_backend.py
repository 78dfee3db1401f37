"""The GPU's kernels, all of them Triton's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quire_kernels.activation import Activation
from quire_kernels.activation.triton import activate
from quire_kernels.backends import AttentionBatch, Matmul, QuantizedMatmul
from quire_kernels.cache_write import CacheScales, HeadNorm, Rope
from quire_kernels.cache_write.triton import rope_cache_write
from quire_kernels.hardware import hardware
from quire_kernels.matmul.triton import matmul
from quire_kernels.mla.triton import latent_attention, latent_cache_write
from quire_kernels.moe import Experts, Routing
from quire_kernels.moe.int4 import grouped_int4_matmul
from quire_kernels.moe.triton import align, combine, grouped_matmul, route, rows_per_tile
from quire_kernels.norm import Norm
from quire_kernels.norm.triton import add_norm, norm_heads
from quire_kernels.paged_attention import AttentionOptions
from quire_kernels.paged_attention.triton import paged_attention
from quire_kernels.quantize import Quantized, QuantizedOutput
from quire_kernels.quantized_matmul import Int4Weight
from quire_kernels.quantized_matmul.library import fewest_rows, library_matmul
from quire_kernels.quantized_matmul.triton import int4_matmul, scaled_matmul
from quire_kernels.recurrence import Gates, StateBatch
from quire_kernels.recurrence.triton import recurrence, short_convolution
from quire_kernels.sampling import Rows
from quire_kernels.sampling.triton import draw, mask_logits, prepare

_Rest = tuple[Tensor | None, Tensor | None]  # a weight's scale and bias
INVARIANT_TILE = 64  # rows of an expert's tile, whatever the batch


class TritonBackend:
    """On a CPU only under TRITON_INTERPRET=1, which is for tests."""

    name = "triton"
    packed_experts = True

    def __init__(self, device: torch.device, *, deterministic: bool = False) -> None:
        """`deterministic`: a token's bits do not depend on what else is in the batch, nor on how it came there."""
        self._deterministic = deterministic
        self._chip = hardware(device)  # refuses what the kernels do not run on
        self.fp8 = self._chip.fp8

    def paged_attention(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        options: AttentionOptions,
    ) -> Tensor:
        return paged_attention(
            q,
            key_cache,
            value_cache,
            batch.block_tables,
            batch.query_starts,
            batch.context_lens,
            batch.longest_query,
            scale,
            options,
            invariant=self._deterministic,
            cuts=batch.cuts,
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
        scales: CacheScales | None,
    ) -> None:
        rope_cache_write(qkv, key_cache, value_cache, batch.positions, batch.slots, num_heads, rope, norm, scales)

    def add_norm(
        self,
        residual: Tensor,
        delta: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: Norm,
        output: QuantizedOutput | None = None,
    ) -> Tensor | Quantized:
        return add_norm(residual, delta, weight, bias, norm, output)

    def norm_heads(self, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm) -> None:
        norm_heads(x, weight, bias, norm)

    def activate(
        self, x: Tensor, kind: Activation, gated: bool, output: QuantizedOutput | None = None
    ) -> Tensor | Quantized:
        return activate(x, kind, gated, output)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Matmul:
        """cuBLAS (hipBLASLt), or the batch-invariant kernel."""
        if self._deterministic:
            return lambda x: matmul(x, weight, bias)
        return lambda x: F.linear(x, weight, bias)

    def scaled_linear(self, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> QuantizedMatmul:
        """torch's for many rows where it has one, else ours."""
        fewest = None if self._deterministic else fewest_rows(self._chip, weight, scale, dtype)

        def multiply(x: Quantized) -> Tensor:
            many = fewest is not None and x.values.shape[0] >= fewest
            product = library_matmul if many else scaled_matmul
            return product(x.values, x.scale, weight, scale, dtype, bias)

        return multiply

    def int4_linear(self, weight: Int4Weight, bias: Tensor | None) -> Matmul:
        return lambda x: int4_matmul(x, weight, bias)

    def experts(self, x: Tensor, router_logits: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """Two grouped products over all the tokens' choices. Choices of experts held elsewhere take no part."""
        held = experts.held
        weights, chosen = route(router_logits, routing, range(experts.first, experts.first + held))
        tile = INVARIANT_TILE if self._deterministic else rows_per_tile(chosen.numel(), router_logits.shape[1])
        alignment = align(chosen, held, tile)
        values, scale = self._narrow(x, Activation.IDENTITY, False, experts)

        def product(a: Tensor, scale: Tensor | None, w: Tensor | Int4Weight, rest: _Rest, per_row: int) -> Tensor:
            if isinstance(w, Int4Weight):
                return grouped_int4_matmul(a, w, alignment, per_row, rest[1])
            return grouped_matmul(a, w, alignment, per_row, x.dtype, scale, *rest)

        up, down = (experts.gate_up_scale, experts.gate_up_bias), (experts.down_scale, experts.down_bias)
        values, scale = self._narrow(
            product(values, scale, experts.gate_up, up, routing.top_k), experts.activation, True, experts
        )
        return combine(product(values, scale, experts.down, down, 1), weights)

    @staticmethod
    def _narrow(x: Tensor, kind: Activation, gated: bool, experts: Experts) -> tuple[Tensor, Tensor | None]:
        if experts.inputs is None and kind is Activation.IDENTITY:
            return x, None
        result = activate(x, kind, gated, experts.inputs)
        return (result, None) if isinstance(result, Tensor) else (result.values, result.scale)

    def latent_attention(self, q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, latent: int) -> Tensor:
        return latent_attention(
            q,
            cache,
            batch.block_tables,
            batch.query_starts,
            batch.context_lens,
            scale,
            latent,
            cuts=batch.cuts,
        )

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
        latent_cache_write(latent, q_rope, cache, batch.positions, batch.slots, rope.cos_sin, weight, eps)

    def short_convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, states: Tensor, batch: StateBatch
    ) -> Tensor:
        return short_convolution(x, weight, bias, silu, states, batch)

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
        return recurrence(q, k, v, dt, beta, gates, states, batch, invariant=self._deterministic)

    def mask_logits(self, logits: Tensor, places: Tensor, masks: Tensor) -> None:
        mask_logits(logits, places, masks)

    def draw(self, logits: Tensor, rows: Rows, filtered: bool) -> Tensor:
        return draw(logits, rows, prepare(logits, rows, filtered))
