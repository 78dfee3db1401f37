"""A day of steps of attention, launched on meta tensors: what Triton would compile for them, and what they allocate.

Run by test_pieces.py in a process of its own, for nothing is compiled where Triton interprets. Prints JSON: how many
distinct kernels a few steps launch, and which those of the day launch beside them.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "kernels"))
from compile_ahead import recorded
from quire_engine.memory.dry_run import AllocatedBytes
from quire_kernels.hardware import CHIPS
from quire_kernels.mla import tiling as latent_tiling
from quire_kernels.mla.triton import latent_attention
from quire_kernels.paged_attention import AttentionOptions, tiling
from quire_kernels.paged_attention.triton import paged_attention
from torch import Tensor

META = torch.device("meta")
H100 = CHIPS["sm_90"]
Shape = tuple[int, int, int, int]  # tokens, requests, pages of the longest, the longest query


def ints(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=META)


def floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=META)


def llama(shape: Shape, window: int = 0) -> None:
    """32 heads over 8, of 128, in pages of 16."""
    tokens, requests, pages, longest = shape
    q, cache, tables = floats(tokens, 48, 128)[:, :32], floats(9, 8, 16, 128), ints(requests, pages)
    options = AttentionOptions(window=window)
    with AllocatedBytes() as counter:
        paged_attention(q, cache, cache, tables, ints(requests + 1), ints(requests), longest, 0.1, options)
    beside = counter.most - q.numel() * 2
    planned = tiling.parts_bytes(H100, q, cache, tables, longest, options)
    assert planned <= beside <= planned + 100_000, (shape, window, planned, beside)  # the lists and lengths are small


def deepseek(shape: Shape) -> None:
    """16 heads, as one of 8 ranks has."""
    tokens, requests, pages, _ = shape
    q, cache, tables = floats(tokens, 16, 576), floats(9, 64, 576), ints(requests, pages)
    with AllocatedBytes() as counter:
        latent_attention(q, cache, tables, ints(requests + 1), ints(requests), 0.1, 512)
    beside = counter.most - q.numel() // 576 * 512 * 2
    planned = latent_tiling.parts_bytes(H100, q, cache, tables, 512)
    assert planned <= beside <= planned + 100_000, (shape, planned, beside)


def day() -> Iterator[Shape]:
    """Any number of requests, new tokens and pages."""
    generator = np.random.default_rng(0)
    for _ in range(500):
        requests = int(generator.integers(1, 301))
        longest = int(2 ** generator.uniform(0, 13))
        tokens = min(requests - 1 + longest, 8192) if generator.integers(2) else requests * min(longest, 8)
        yield tokens, requests, int(2 ** generator.uniform(0, 13)), min(longest, tokens)


FEW: list[Shape] = [(longest, 1, 8192, longest) for longest in (1, 16, 17)]  # rows of 16 and 64; the wide launch


def kernels(step: Callable[[Shape], None], shapes: list[Shape]) -> set[str]:
    """What the steps launch, each as Triton tells kernels apart."""

    with recorded(H100) as launches:
        for shape in shapes:
            step(shape)
    return set(map(repr, launches))


def main() -> None:
    steps: dict[str, Callable[[Shape], None]] = {
        "plain": llama,
        "window of 128": lambda shape: llama(shape, 128),
        "window of 4096": lambda shape: llama(shape, 4096),
        "latent": deepseek,
    }
    found = {}
    for name, step in steps.items():
        few = kernels(step, FEW)
        found[name] = {"few": len(few), "more": sorted(kernels(step, list(day())) - few)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
