"""How attention's launches are cut into tiles, by shapes alone, so that a captured graph stays valid. Without Triton:
what a step allocates is planned where there is no GPU, too.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quire_kernels.hardware import Hardware
from quire_kernels.paged_attention import AttentionOptions

PIECE_KEYS = 512  # a piece of fewer costs more in merging than it wins
_PROGRAMS = 4  # for each multiprocessor: it runs one or two at a time, and the last wave is seldom full
_NARROW_ROWS = 64  # a batch whose requests all fit so many rows takes the narrow launch alone


def power_of_2(number: int) -> int:
    """The least that is not less."""
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True, slots=True)
class Tiling:
    """What is known of a launch without its numbers. A step cuts launches that are equal here once."""

    tiles: int
    tile_tokens: int
    narrow_tokens: int  # a request with no more belongs to the narrow launch
    narrow: bool  # a tile is a request
    window: int
    programs: int  # that the keys are to be dealt to, at least: 4/3 as many are the most pieces
    most: int | None  # pieces of tiles that are cut; None: no tile ever is, whatever the contexts

    def kernel(self) -> dict[str, Any]:
        """The constants of kernels that call `pick`."""
        return {
            "TILE_TOKENS": self.tile_tokens,
            "NARROW_TOKENS": self.narrow_tokens,
            "NARROW": self.narrow,
            "WINDOW": self.window,
        }


def enough_programs(chip: Hardware, heads: int) -> int:
    """For every head, so that the whole chip works."""
    return -(-_PROGRAMS * chip.multiprocessors // heads)


def tiling(
    tiles: int, tile_tokens: int, narrow_tokens: int, narrow: bool, window: int, programs: int, capacity: int,
    invariant: bool,
) -> Tiling:  # fmt: skip
    """`capacity`: keys that a request has at most. `invariant`: every tile is read by one program."""
    seen = window + tile_tokens - 1
    most: int | None = None
    if not invariant and (window == 0 or _most_of(seen) > 1):
        of_tile = _most_of(min(capacity, seen) if window else capacity)
        most = min(4 * programs // 3, tiles * of_tile) if of_tile > 1 else 0
    return Tiling(tiles, tile_tokens, narrow_tokens, narrow, window, programs, most)


def _most_of(keys: int) -> int:
    return (keys + PIECE_KEYS // 2) // PIECE_KEYS


def bytes_of_parts(launch: Tiling, heads: int, head_dim: int) -> int:
    """What `cut` allocates for a launch, but for the list."""
    return (launch.most or 0) * launch.tile_tokens * heads * (head_dim + 1) * 4


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one launch is cut."""

    rows: int
    keys: int
    warps: int
    stages: int


def narrow_tiles(chip: Hardware, rows: int, head_dim: int, cache_bytes: int) -> Tiles:
    """Few rows: the more bytes in flight the better, within half of the shared memory, for two programs at a time."""
    keys = 64 if head_dim <= 128 else 32
    tile = 2 * keys * power_of_2(head_dim) * cache_bytes
    stages = 1 if chip.amd else max(1, min(4, chip.shared_bytes // 2 // tile))
    return Tiles(rows, keys, 4, stages)


def wide_tiles(chip: Hardware, group: int, head_dim: int, element_bytes: int) -> Tiles:
    """Many rows: 128 for two warpgroups; half where fp32 or a wide head would not fit the registers."""
    padded = power_of_2(head_dim)
    rows = 128 if padded * element_bytes <= 256 else 64
    rows = max(rows, power_of_2(group))
    keys = 64 if padded <= 128 else 32
    warps = 8 if (rows >= 128 or padded >= 256) and not chip.amd else 4
    tile = 2 * keys * padded * element_bytes
    spare = chip.shared_bytes - rows * padded * element_bytes - rows * keys * element_bytes
    stages = 1 if chip.amd else max(1, min(3, spare // tile))
    return Tiles(rows, keys, warps, stages)


def launches(
    chip: Hardware, q: Tensor, key_cache: Tensor, block_tables: Tensor, longest_query: int, window: int, invariant: bool
) -> list[tuple[Tiles, Tiling]]:
    """By shapes alone, never by contexts. The narrow launch has as few rows as a token of a group takes, or 64."""
    kv_heads, block_size, head_dim = key_cache.shape[1:]
    tokens, heads = q.shape[:2]
    requests, width = block_tables.shape
    group = heads // kv_heads
    alone = longest_query * group <= max(_NARROW_ROWS, group) and not invariant
    rows = max(16, power_of_2(group))
    if alone and group * longest_query > rows:
        rows = _NARROW_ROWS
    narrow_tokens = 0 if invariant else rows // group
    enough = enough_programs(chip, kv_heads)
    found = []
    if not invariant:
        narrow = narrow_tiles(chip, rows, head_dim, key_cache.element_size())
        of_requests = tiling(
            requests, narrow_tokens, narrow_tokens, True, window, max(requests, enough), width * block_size, False
        )
        found.append((narrow, of_requests))
    if not alone:
        wide = wide_tiles(chip, group, head_dim, q.element_size())
        tile_tokens = wide.rows // group
        of_tokens = tiling(
            tokens // tile_tokens + requests, tile_tokens, narrow_tokens, False, window, enough, width * block_size,
            invariant,
        )  # fmt: skip
        found.append((wide, of_tokens))
    return found


def parts_bytes(
    chip: Hardware, q: Tensor, key_cache: Tensor, block_tables: Tensor, longest_query: int, options: AttentionOptions
) -> int:
    """What `paged_attention` allocates on a chip beside its result."""
    each = launches(chip, q, key_cache, block_tables, longest_query, options.window, False)
    return sum(bytes_of_parts(launch, q.shape[1], q.shape[2]) for _, launch in each)
