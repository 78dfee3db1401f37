"""What layers keep between steps: pages of keys and values, of latents, or of recurrent states."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quire_engine.layers.linear import shard
from quire_engine.parallel import ParallelGroup
from quire_engine.spec import DecoderSpec, DeltaNetSpec, ShortConvSpec

LayerCache = tuple[Tensor, ...]  # of one layer; see page_shapes and state_shapes


def kv_heads_of(spec: DecoderSpec, group: ParallelGroup) -> slice:
    """The key-value heads of a rank; with more ranks than heads several ranks hold the same one."""
    if spec.num_kv_heads >= group.size:
        return shard(spec.num_kv_heads, group)
    head = group.rank * spec.num_kv_heads // group.size
    return slice(head, head + 1)


def page_shapes(spec: DecoderSpec, group: ParallelGroup, block_size: int) -> list[tuple[int, ...]]:
    """One page of a layer's cache on a rank: keys and values [K, block size, D] or, with latent attention, the latents
    [block size, rank + rotated], which every rank holds."""
    if spec.latent is not None:
        return [(block_size, spec.latent.rank + spec.latent.rotated)]
    heads = kv_heads_of(spec, group)
    return [(heads.stop - heads.start, block_size, spec.head_dim)] * 2


def state_shapes(
    spec: DecoderSpec, group: ParallelGroup, dtype: torch.dtype
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """One request's states of a recurrent layer on a rank: the last inputs of its convolution and, but for LFM2, the
    matrix of each head in fp32."""
    recurrent, size = spec.recurrent, group.size
    assert recurrent is not None, "the family has no recurrent layers"
    if isinstance(recurrent, ShortConvSpec):
        return [((recurrent.taps - 1, spec.hidden_size // size), dtype)]
    if isinstance(recurrent, DeltaNetSpec):
        heads, rows, columns = recurrent.value_heads // size, recurrent.key_dim, recurrent.value_dim
        channels = 2 * recurrent.key_heads // size * rows + heads * columns
    else:
        heads, rows, columns = recurrent.heads // size, recurrent.state, recurrent.head_dim
        groups = recurrent.groups // size if recurrent.groups > 1 else 1
        channels = heads * columns + 2 * groups * rows
    return [((recurrent.taps - 1, channels), dtype), ((heads, rows, columns), torch.float32)]


def page_bytes(
    spec: DecoderSpec, group: ParallelGroup, layers: Sequence[int], block_size: int, dtype: torch.dtype
) -> int:
    """One page of all these layers."""
    of_layer = sum(math.prod(shape) for shape in page_shapes(spec, group, block_size)) * dtype.itemsize
    return of_layer * sum(spec.attends(layer) for layer in layers)


def state_bytes(spec: DecoderSpec, group: ParallelGroup, layers: Sequence[int], dtype: torch.dtype) -> int:
    """One request's states of all these layers."""
    count = sum(layer in spec.recurrent_layers for layer in layers)
    if not count:
        return 0
    return count * sum(math.prod(shape) * kind.itemsize for shape, kind in state_shapes(spec, group, dtype))


def empty_caches(
    spec: DecoderSpec,
    group: ParallelGroup,
    layers: Sequence[int],
    *,
    num_pages: int,
    block_size: int,
    num_states: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    device: torch.device,
) -> list[LayerCache]:
    """The caches of these layers on a rank; the states have one page more, which padding writes.

    A CPU's is not cleared, so that memory is taken only as pages are used: no kernel reads a slot before it is written.
    A GPU's is, for the padding of captured steps reads page 0 and must find numbers there.
    """
    make = torch.empty if device.type != "cuda" else torch.zeros
    pages = page_shapes(spec, group, block_size)
    caches: list[LayerCache] = []
    for layer in layers:
        if layer in spec.recurrent_layers:
            states = state_shapes(spec, group, dtype)
            caches.append(tuple(make((num_states + 1, *shape), dtype=kind, device=device) for shape, kind in states))
        elif layer in spec.without_mixer:
            caches.append(())
        else:
            caches.append(tuple(make((num_pages, *shape), dtype=cache_dtype, device=device) for shape in pages))
    return caches
