"""Who does what in attention's grids on a chip of 132 multiprocessors: the kernels' own choice, its balance counted."""

import heapq
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from quire_kernels.hardware import CHIPS
from quire_kernels.mla.tiling import launch_of
from quire_kernels.paged_attention.pieces import cut, pick
from quire_kernels.paged_attention.tiling import PIECE_KEYS, Tiling, launches

H100 = CHIPS["sm_90"]
META = torch.device("meta")


@triton.jit
def _picks(
    out_ptr, list_ptr, most, query_starts_ptr, context_lens_ptr, num_requests,
    TILE_TOKENS: tl.constexpr, NARROW_TOKENS: tl.constexpr, NARROW: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    work, request, tile, piece, pieces = pick(
        tl.program_id(0),
        tl.num_programs(0),
        list_ptr,
        most,
        query_starts_ptr,
        context_lens_ptr,
        num_requests,
        TILE_TOKENS,
        NARROW_TOKENS,
        NARROW,
        WINDOW,
    )
    to = out_ptr + 5 * tl.program_id(0)
    tl.store(to, work.to(tl.int32))
    tl.store(to + 1, request)
    tl.store(to + 2, tile)
    tl.store(to + 3, piece)
    tl.store(to + 4, pieces)


@dataclass
class Grid:
    """A launch's programs over one key-value head, in the order in which they start, and the tiles there are."""

    launch: Tiling
    picks: list[tuple[int, int, int, int]]  # request, tile, piece, pieces
    tiles: dict[tuple[int, int], tuple[int, int]]  # (request, tile) → the keys begin .. end
    tile_keys: int

    def span(self, pick: tuple[int, int, int, int]) -> tuple[int, int]:
        """The keys that a program reads."""
        request, tile, piece, pieces = pick
        begin, end = self.tiles[request, tile]
        begin = begin // self.tile_keys * self.tile_keys
        blocks = -(-(end - begin) // self.tile_keys)
        first, last = (i * blocks // pieces * self.tile_keys for i in (piece, piece + 1))
        return begin + first, min(end, begin + last)

    @property
    def work(self) -> list[int]:
        """Keys of each program that has any."""
        return [end - begin for begin, end in map(self.span, self.picks)]


def grid(launch: Tiling, tile_keys: int, queries: list[int], contexts: list[int]) -> Grid:
    """By the kernels under the interpreter; the tiles by hand."""
    starts = torch.tensor([0, *np.cumsum(queries)], dtype=torch.int32)
    lengths = torch.tensor(contexts, dtype=torch.int32)
    pieces = cut(launch, starts, lengths, 1, 16, {})
    assert pieces is not None and launch.most is not None
    assert pieces.listed[0, 1] <= launch.most
    programs = launch.most + launch.tiles
    out = torch.empty(programs, 5, dtype=torch.int32)
    kernel: Any = _picks
    kernel[(programs,)](out, pieces.listed, launch.most, starts, lengths, len(contexts), **launch.kernel())
    tiles = {}
    for r, (count, context) in enumerate(zip(queries, contexts, strict=True)):
        if (count <= launch.narrow_tokens) == launch.narrow:
            for tile in range(-(-count // launch.tile_tokens)):
                oldest = context - count + tile * launch.tile_tokens
                begin = max(0, oldest - launch.window + 1) if launch.window else 0
                tiles[r, tile] = begin, min(context, oldest + launch.tile_tokens)
    return Grid(launch, [tuple(p) for w, *p in out.tolist() if w], tiles, tile_keys)


def grids(queries: list[int], contexts: list[int], heads: int = 32, kv_heads: int = 8, window: int = 0) -> list[Grid]:
    """Of every launch of paged attention, heads of 128 in bf16."""
    q = torch.empty(sum(queries), heads, 128, dtype=torch.bfloat16, device=META)
    cache = torch.empty(0, kv_heads, 64, 128, dtype=torch.bfloat16, device=META)
    tables = torch.empty(len(queries), -(-max(contexts) // 64), dtype=torch.int32, device=META)
    found = launches(H100, q, cache, tables, max(queries), window, False)
    return [grid(launch, tiles.keys, queries, contexts) for tiles, launch in found]


def latent_grid(queries: list[int], contexts: list[int], heads: int) -> tuple[Grid, int]:
    q = torch.empty(sum(queries), heads, 576, dtype=torch.bfloat16, device=META)
    cache = torch.empty(0, 64, 576, dtype=torch.bfloat16, device=META)
    tables = torch.empty(len(queries), -(-max(contexts) // 64), dtype=torch.int32, device=META)
    tiles, head_tiles, launch = launch_of(H100, q, cache, tables)
    return grid(launch, tiles.keys, queries, contexts), head_tiles


def check_coverage(found: Grid) -> None:
    """Every key of every tile once, and nothing else."""
    spans: dict[tuple[int, int], list[tuple[int, int]]] = {tile: [] for tile in found.tiles}
    for picked in found.picks:
        spans[picked[:2]].append(found.span(picked))
    for tile, (begin, end) in found.tiles.items():
        at = begin // found.tile_keys * found.tile_keys
        for first, last in sorted(spans[tile]):
            assert first == at < last
            at = last
        assert at == end


def makespan(work: list[int], slots: int) -> int:
    """When the last program ends, each starting in order where one ended first."""
    free = [0] * slots
    for keys in work:
        heapq.heappush(free, heapq.heappop(free) + keys)
    return max(free)


def check_balance(found: Grid, order: list[int], heads: int, resident: int) -> None:
    """`order`: the programs' keys as they start, of all heads; `resident`: programs on a multiprocessor at a time.

    Two waves of the shortest pieces are as good as it gets.
    """
    assert max(found.work) <= 2 * sum(found.work) / len(found.work)
    slots = resident * H100.multiprocessors
    ideal = max(sum(found.work) * heads / slots, max(found.work))
    assert makespan(order, slots) <= max(1.5 * ideal, 2 * 1.25 * PIECE_KEYS)


ONE_LONG = ([1] * 64, [100_000, *range(900, 1089, 3)])
BALANCED = {
    "1 x 100k + 63 x 1k": ONE_LONG,
    "1 x 100k last": (ONE_LONG[0], ONE_LONG[1][::-1]),
    "64 x 1k": ([1] * 64, [1000 + 3 * i for i in range(64)]),
    "256 x 8k": ([1] * 256, [8000 + i for i in range(256)]),
    "1 x 100k": ([1], [100_000]),
    "2 of 100k + 30 of 5k": ([1] * 32, [100_000, 90_000, *[5000] * 30]),
    "1 x 1": ([1], [1]),
    "verify": ([5] * 16, [4096 + 100 * i for i in range(16)]),
    "suffix of 100 on 100k": ([100], [100_000]),
    "suffix of 128 on 32k": ([128], [32_768]),
    "prefill of 8k": ([8192], [8192]),
}
UNCUT = {"64 x 1k", "256 x 8k", "1 x 1", "prefill of 8k"}


@pytest.mark.parametrize("mix", BALANCED)
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (8, 1)])
def test_work_is_balanced(mix: str, heads: int, kv_heads: int) -> None:
    busy = [found for found in grids(*BALANCED[mix], heads, kv_heads) if found.tiles]
    assert len(busy) == 1
    check_coverage(busy[0])
    for resident in (1, 2):
        check_balance(busy[0], busy[0].work * kv_heads, kv_heads, resident)
    if kv_heads == 8:
        assert (len(busy[0].picks) == len(busy[0].tiles)) == (mix in UNCUT)


@pytest.mark.parametrize("window", [0, 2000])
@pytest.mark.parametrize(
    ("queries", "contexts"),
    [
        ([300, 1, 0, 1, 0], [300, 100_000, 1, 70, 5]),  # requests without tokens, as padding leaves them
        ([1, 1, 0, 510], [9000, 64, 0, 510]),  # all of the padding's tokens in one request
        ([40, 3, 1, 1], [20_000, 700, 1, 513]),
    ],
)
def test_mixed_batches_are_covered(queries: list[int], contexts: list[int], window: int) -> None:
    for heads, kv_heads in ((32, 8), (9, 3)):
        for found in grids(queries, contexts, heads, kv_heads, window):
            check_coverage(found)


def test_what_never_is_cut() -> None:
    """Narrow windows and batch-invariant attention have no list; short tables have one, and room for no pieces."""
    q = torch.empty(40, 8, 64, device=META)
    cache = torch.empty(0, 2, 16, 64, device=META)
    tables = torch.empty(2, 8192, dtype=torch.int32, device=META)
    assert [launch.most for _, launch in launches(H100, q, cache, tables, 39, 128, False)] == [None, None]
    assert [launch.most for _, launch in launches(H100, q, cache, tables, 39, 0, True)] == [None]
    assert [launch.most for _, launch in launches(H100, q, cache, tables[:, :40], 39, 0, False)] == [0, 0]
    assert all(launch.most for _, launch in launches(H100, q, cache, tables, 39, 0, False))


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("mix", ["1 x 100k + 63 x 1k", "64 x 1k", "1 x 100k", "1 x 1", "suffix of 100 on 100k"])
def test_latent_attention_is_balanced(mix: str, heads: int) -> None:
    found, head_tiles = latent_grid(*BALANCED[mix], heads)
    check_coverage(found)
    order = [keys for keys in found.work for _ in range(head_tiles)]  # those of a tile follow one another
    check_balance(found, order, head_tiles, 1 if heads == 128 else 2)  # 128: 8 warps of 253 registers


def test_random_batches_stay_within_their_lists() -> None:
    """The list has room for whatever contexts there are: its length follows from shapes alone."""
    generator = np.random.default_rng(0)
    for _ in range(6):
        requests = int(generator.integers(1, 40))
        contexts = np.minimum(generator.pareto(0.4, requests) * 50 + 1, 131_072).astype(int)
        queries = np.minimum(contexts, generator.choice([0, 1, 1, 2, 30, 200], requests))
        queries[0] = 1
        for found in grids(queries.tolist(), contexts.tolist(), 32, 8, int(generator.choice([0, 3000]))):
            check_coverage(found)


def test_no_step_of_a_day_compiles_anew() -> None:
    """After one step of each kind; and the plan knows what each step allocates (checked over there)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("attention_day.py"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert {name: kinds["few"] for name, kinds in found.items()} == {
        "plain": 9,  # list, attention, merging: two narrow ones and the wide one
        "window of 128": 3,  # attention alone
        "window of 4096": 9,
        "latent": 3,
    }
    assert not [kernel for kinds in found.values() for kernel in kinds["more"]]
