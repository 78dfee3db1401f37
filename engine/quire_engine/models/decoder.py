"""The decoder that all families share.

Shapes: T tokens of the step, H query heads and K key-value heads of this rank, D head dim, S rows that draw a token.
"""

from typing import Any

import torch
from quire_kernels.backends import AttentionBatch, Backend
from quire_kernels.cache_write import HeadNorm, Rope
from quire_kernels.norm import Norm
from quire_kernels.paged_attention import AttentionOptions
from torch import Tensor

from quire_engine.execution.group import TensorParallelGroup
from quire_engine.layers.embedding import Embedding, OutputHead
from quire_engine.layers.linear import column_parallel, row_parallel, shard
from quire_engine.layers.rotary import cos_sin_table
from quire_engine.models.spec import DecoderSpec
from quire_engine.weights.tensors import TensorReader

KVCache = tuple[Tensor, Tensor]  # keys and values of one layer, [pages, K, block size, D] each


class Attention:
    """Grouped-query attention over the paged cache."""

    def __init__(
        self, spec: DecoderSpec, layer: int, weights: TensorReader, group: TensorParallelGroup, ops: Backend
    ) -> None:
        at = f"model.layers.{layer}.self_attn"
        self._ops = ops
        self._head_dim = spec.head_dim
        self._num_heads = spec.num_heads // group.size
        self._kv_heads = spec.num_kv_heads // group.size
        self._scale = spec.head_dim**-0.5
        self._options = AttentionOptions(window=spec.window(layer))
        q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        parts = [(f"{at}.{name}_proj", size, shard(size, group)) for name, size in (("q", q), ("k", kv), ("v", kv))]
        self._qkv = column_parallel(weights, parts, spec.hidden_size, spec.qkv_bias)
        self._output = row_parallel(weights, f"{at}.o_proj", spec.hidden_size, q, spec.output_bias, group)
        self._norm: HeadNorm | None = None
        if spec.qk_norm:
            q_weight, k_weight = (weights.take(f"{at}.{name}_norm.weight", (spec.head_dim,)) for name in ("q", "k"))
            self._norm = HeadNorm(q_weight=q_weight, k_weight=k_weight, eps=spec.norm_eps)

    def __call__(self, x: Tensor, batch: AttentionBatch, cache: KVCache, rope: Rope) -> Tensor:
        qkv = self._qkv(x)  # [T, (H + 2K) * D]
        self._ops.rope_cache_write(qkv, *cache, batch, self._num_heads, rope, self._norm)
        heads = qkv.view(qkv.shape[0], self._num_heads + 2 * self._kv_heads, self._head_dim)
        attended = self._ops.paged_attention(heads[:, : self._num_heads], *cache, batch, self._scale, self._options)
        return self._output(attended.reshape(qkv.shape[0], -1))


class FeedForward:
    """down(silu(gate(x)) * up(x))."""

    def __init__(
        self, spec: DecoderSpec, layer: int, weights: TensorReader, group: TensorParallelGroup, ops: Backend
    ) -> None:
        at = f"model.layers.{layer}.mlp"
        self._ops = ops
        inner, part = spec.intermediate_size, shard(spec.intermediate_size, group)
        parts = [(f"{at}.gate_proj", inner, part), (f"{at}.up_proj", inner, part)]
        self._gate_up = column_parallel(weights, parts, spec.hidden_size, spec.mlp_bias)
        self._down = row_parallel(weights, f"{at}.down_proj", spec.hidden_size, inner, spec.mlp_bias, group)

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(self._ops.silu_mul(self._gate_up(x)))


class Decoder:
    """Token ids to logits. Building it reads the weights, each straight into this rank's slice."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: TensorReader,
        group: TensorParallelGroup,
        ops: Backend,
        max_model_len: int,
    ) -> None:
        spec.check_parallel(group.size)
        self.spec = spec
        self._ops = ops

        def norm(name: str) -> Tensor:
            return weights.take(f"model.{name}.weight", (spec.hidden_size,))

        self._embedding = Embedding(weights, "model.embed_tokens", spec.vocab_size, spec.hidden_size, group)
        self._layers = [
            (
                norm(f"layers.{i}.input_layernorm"),
                Attention(spec, i, weights, group, ops),
                norm(f"layers.{i}.post_attention_layernorm"),
                FeedForward(spec, i, weights, group, ops),
            )
            for i in range(spec.num_layers)
        ]
        self._norm = norm("norm")
        tied = spec.tie_embeddings
        head = self._embedding if tied else Embedding(weights, "lm_head", spec.vocab_size, spec.hidden_size, group)
        self._head = OutputHead(head.table, spec.vocab_size, group)
        cos_sin = cos_sin_table(
            theta=spec.rope_theta,
            rotary_dim=spec.head_dim,
            scaling=spec.rope_scaling,
            max_position=max_model_len,
            model_max_position=spec.max_position,
        )
        self._rope = Rope(cos_sin=cos_sin.to(weights.device))
        weights.check_all_read(lambda name: name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"))

    def __call__(self, token_ids: Tensor, batch: AttentionBatch, caches: list[KVCache]) -> Tensor:
        """Token ids [T] → the last layer's normalized output [T, hidden]."""
        ops, kind = self._ops, Norm(self.spec.norm_eps)
        residual = self._embedding(token_ids)
        delta: Tensor | None = None
        for (attention_norm, attention, mlp_norm, mlp), cache in zip(self._layers, caches, strict=True):
            x = ops.add_norm(residual, delta, attention_norm, kind)
            x = ops.add_norm(residual, attention(x, batch, cache, self._rope), mlp_norm, kind)
            delta = mlp(x)
        return ops.add_norm(residual, delta, self._norm, kind)

    def logits(self, hidden: Tensor) -> Tensor | None:
        """[S, hidden] → fp32 [S, vocabulary] on rank 0."""
        return self._head(hidden)


def empty_caches(spec: DecoderSpec, num_pages: int, block_size: int, ranks: int, **tensor: Any) -> list[KVCache]:
    """This rank's slice of the paged cache: one pair of tensors per layer.

    Not cleared: no kernel reads a slot before it is written, and a CPU's memory is taken only as pages are used.
    """
    shape = (num_pages, spec.num_kv_heads // ranks, block_size, spec.head_dim)
    return [(torch.empty(shape, **tensor), torch.empty(shape, **tensor)) for _ in range(spec.num_layers)]
