"""torch's own operators: any device, any dtype, every option. What other backends are held against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quire_kernels.activation import Activation
from quire_kernels.activation import reference as activation_reference
from quire_kernels.backends import AttentionBatch, Matmul, QuantizedMatmul, unquantized
from quire_kernels.cache_write import CacheScales, HeadNorm, Rope
from quire_kernels.cache_write import reference as cache_write_reference
from quire_kernels.mla import reference as mla_reference
from quire_kernels.moe import Experts, Routing
from quire_kernels.moe import reference as moe_reference
from quire_kernels.norm import Norm
from quire_kernels.norm import reference as norm_reference
from quire_kernels.paged_attention import AttentionOptions
from quire_kernels.paged_attention import reference as attention_reference
from quire_kernels.quantize import Quantized, QuantizedOutput
from quire_kernels.quantize.reference import dequantize as dequantize_rows
from quire_kernels.quantized_matmul import Int4Weight
from quire_kernels.quantized_matmul.reference import dequantize, dequantize_int4
from quire_kernels.recurrence import Gates, StateBatch
from quire_kernels.recurrence import reference as recurrence_reference
from quire_kernels.sampling import Rows
from quire_kernels.sampling import reference as sampling_reference
from quire_kernels.sampling.host import draw

_TILE = 8  # rows of a deterministic product


def in_tiles(matmul: Matmul) -> Matmul:
    """The same product eight rows at a time, the last ones padded: a row's bits depend on nothing but the row.

    A library may add up in another order for another number of rows; for one number it has one order for every row.
    """

    def tiled(x: Tensor) -> Tensor:
        rows = x.shape[0]
        if missing := -rows % _TILE:
            x = F.pad(x, (0, 0, 0, missing))
        parts = [matmul(tile) for tile in x.contiguous().split(_TILE)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[:rows]

    return tiled


class TorchBackend:
    """The references. `deterministic`: products are batch-invariant; the references of attention are not."""

    name = "torch"
    fp8: torch.dtype | None = torch.float8_e4m3fn
    packed_experts = False

    def __init__(self, *, deterministic: bool = False) -> None:
        self._deterministic = deterministic

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
        scales: CacheScales | None,
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
            scales,
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
        return norm_reference.add_norm(residual, delta, weight, bias, norm, output)

    def norm_heads(self, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm) -> None:
        norm_reference.norm_heads(x, weight, bias, norm)

    def activate(
        self, x: Tensor, kind: Activation, gated: bool, output: QuantizedOutput | None = None
    ) -> Tensor | Quantized:
        return activation_reference.activate(x, kind, gated, output)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Matmul:
        """On a CPU in fp32 the weight is packed once into oneDNN's blocked layout and the original is dropped: 1.1 to
        1.7 times `F.linear` from two tokens on."""
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
            apply = torch.ops.mkldnn._linear_pointwise

            def packed_matmul(x: Tensor) -> Tensor:
                return apply(x, packed, bias, "none", [], "")

            return in_tiles(packed_matmul) if self._deterministic else packed_matmul
        return self._product(weight, bias)

    def _product(self, weight: Tensor, bias: Tensor | None = None) -> Matmul:
        def matmul(x: Tensor) -> Tensor:
            return F.linear(x, weight, bias)

        return in_tiles(matmul) if self._deterministic else matmul

    def scaled_linear(self, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> QuantizedMatmul:
        """int8 by oneDNN's integer product. A CPU has none for fp8: the weight is kept as what its values mean."""
        if weight.dtype != torch.int8:
            matmul = self.linear(dequantize(weight, scale).to(dtype), bias)
            return lambda x: matmul(dequantize_rows(x).to(dtype))
        transposed = weight.t()

        def int8_matmul(x: Quantized) -> Tensor:
            out = torch._int_mm(x.values, transposed).float().mul_(x.scale[:, None]).mul_(scale)
            return (out if bias is None else out.add_(bias)).to(dtype)

        return int8_matmul

    def int4_linear(self, weight: Int4Weight, bias: Tensor | None) -> Matmul:
        """The weight is kept as what its values mean: torch has no product for this layout."""
        return self.linear(dequantize_int4(weight).to(weight.scales.dtype), bias)

    def experts(self, x: Tensor, router_logits: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """One expert after the other, over the tokens that chose it."""
        held = range(experts.first, experts.first + experts.held)
        weights, chosen = moe_reference.route(router_logits, routing, held)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in chosen[chosen < len(held)].unique().tolist():
            token, choice = (chosen == expert).nonzero(as_tuple=True)
            inner = self._expert_product(x[token], experts.gate_up, experts.gate_up_scale, expert, experts)
            if experts.gate_up_bias is not None:
                inner = inner + experts.gate_up_bias[expert]
            activated = unquantized(activation_reference.activate(inner, experts.activation, gated=True))
            result = self._expert_product(activated, experts.down, experts.down_scale, expert, experts)
            if experts.down_bias is not None:
                result = result + experts.down_bias[expert]
            out.index_add_(0, token, result.float() * weights[token, choice, None])
        return out.to(x.dtype)

    def _expert_product(
        self, x: Tensor, w: Tensor | Int4Weight, scale: Tensor | None, expert: int, experts: Experts
    ) -> Tensor:
        assert isinstance(w, Tensor), "experts in 4 bits are kept as what they mean"
        if scale is None or experts.inputs is None:
            return self._product(w[expert])(x)
        narrow = activation_reference.activate(x, Activation.IDENTITY, False, experts.inputs)
        assert isinstance(narrow, Quantized)
        return self._product(dequantize(w[expert], scale[expert]))(dequantize_rows(narrow)).to(x.dtype)

    def latent_attention(self, q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, latent: int) -> Tensor:
        return mla_reference.latent_attention(
            q, cache, batch.block_tables, batch.query_starts, batch.context_lens, scale, latent
        )[0]

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
        mla_reference.latent_cache_write(latent, q_rope, cache, batch.positions, batch.slots, rope.cos_sin, weight, eps)

    def short_convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, states: Tensor, batch: StateBatch
    ) -> Tensor:
        return recurrence_reference.short_convolution(x, weight, bias, silu, states, batch)

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
        return recurrence_reference.recurrence(q, k, v, dt, beta, gates, states, batch)

    def mask_logits(self, logits: Tensor, places: Tensor, masks: Tensor) -> None:
        sampling_reference.mask_logits(logits, places, masks)

    def draw(self, logits: Tensor, rows: Rows, filtered: bool) -> Tensor:
        """On the host, wherever the logits are."""
        return draw(logits.cpu(), rows.cpu()).to(logits.device)
