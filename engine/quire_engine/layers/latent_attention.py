"""Multi-head latent attention (DeepSeek-V2, 2024): keys and values are kept as one latent per token.

The projections up from the latent are absorbed: queries are brought into the latent's space and the result out of it,
so that attention reads the cache as it is. T tokens, H heads of this rank, L + E the latent and its rotated key.
"""

import torch
from quire_kernels.activation import Activation
from quire_kernels.backends import AttentionBatch
from quire_kernels.cache_write import Rope
from quire_kernels.norm import Norm
from quire_kernels.quantize import Quantized, QuantizedOutput
from quire_kernels.quantized_matmul.reference import dequantize
from torch import Tensor

from quire_engine.layers.caches import LayerCache
from quire_engine.layers.linear import Builder, shard
from quire_engine.quantization.schemes import Linear, Part
from quire_engine.spec import DecoderSpec, LatentSpec
from quire_engine.weights.tensors import WHOLE

_NORM = Norm(1e-6)


class LatentAttention:
    """x [T, hidden] → [T, hidden]; every rank computes the latents, and its own heads."""

    def __init__(self, build: Builder, spec: DecoderSpec, latent: LatentSpec, at: str) -> None:
        weights, group = build.weights, build.group
        self._ops = build.ops
        self._latent = latent
        heads, head_dim = shard(spec.num_heads, group), latent.plain + latent.rotated
        self._heads = heads.stop - heads.start
        self._scale = spec.attention_scale if spec.attention_scale is not None else head_dim**-0.5
        rows = slice(heads.start * head_dim, heads.stop * head_dim)
        entry = Part(f"{at}.kv_a_proj_with_mqa", latent.rank + latent.rotated, WHOLE)
        self._up: Linear | None = None
        if latent.query_rank:
            first = Part(f"{at}.q_a_proj", latent.query_rank, WHOLE)
            self._query_norm = weights.take(f"{at}.q_a_layernorm.weight", (latent.query_rank,))
            up = Part(f"{at}.q_b_proj", spec.num_heads * head_dim, rows)
            self._up = build.column_parallel([up], latent.query_rank, False)
            self._down = build.column_parallel([first, entry], spec.hidden_size, spec.qkv_bias)
        else:
            first = Part(f"{at}.q_proj", spec.num_heads * head_dim, rows)
            self._down = build.column_parallel([first, entry], spec.hidden_size, False)
        self._norm = weights.take(f"{at}.kv_a_layernorm.weight", (latent.rank,))
        self._key_up, self._value_up = _absorbed(build, latent, f"{at}.kv_b_proj", spec.num_heads, heads)
        inner = spec.num_heads * latent.value
        self._output = build.row_parallel(f"{at}.o_proj", spec.hidden_size, inner, spec.output_bias)

    @property
    def input(self) -> QuantizedOutput | None:
        """The form in which the first projection wants its input."""
        return self._down.input

    def __call__(self, x: Tensor | Quantized, batch: AttentionBatch, cache: LayerCache, rope: Rope | None) -> Tensor:
        ops, sizes = self._ops, self._latent
        assert rope is not None, "latent attention rotates"
        width = sizes.rank + sizes.rotated
        down = self._down(x)
        query, entry = down[:, :-width], down[:, -width:]
        if self._up is not None:
            query = self._up(ops.add_norm(query, None, self._query_norm, None, _NORM, self._up.input))
        heads = query.reshape(-1, self._heads, sizes.plain + sizes.rotated)
        q = torch.empty((heads.shape[0], self._heads, width), dtype=heads.dtype, device=heads.device)
        q[..., : sizes.rank] = torch.einsum("thn,hnl->thl", heads[..., : sizes.plain], self._key_up)
        q[..., sizes.rank :] = heads[..., sizes.plain :]
        [latents] = cache
        ops.latent_cache_write(entry, q[..., sizes.rank :], latents, batch, rope, self._norm, _NORM.eps)
        attended = ops.latent_attention(q, latents, batch, self._scale, sizes.rank)  # [T, H, L]
        flat = torch.einsum("thl,hvl->thv", attended, self._value_up).flatten(1)
        wanted = self._output.input
        return self._output(flat if wanted is None else ops.activate(flat, Activation.IDENTITY, False, wanted))


def _absorbed(build: Builder, latent: LatentSpec, name: str, num_heads: int, heads: slice) -> tuple[Tensor, Tensor]:
    """The projections from the latent to keys [H, N, L] and to values [H, V, L], in the engine's dtype."""
    each = latent.plain + latent.value
    part = Part(name, num_heads * each, slice(heads.start * each, heads.stop * each))
    stored = build.quantization.scheme_of(name).read(build.weights, part, latent.rank, WHOLE, build.ops)
    values = stored.values if stored.scale is None else dequantize(stored.values, stored.scale).to(build.weights.dtype)
    key, value = values.unflatten(0, (-1, each)).split((latent.plain, latent.value), 1)
    return key.contiguous(), value.contiguous()
