"""How latent attention is cut into tiles, by shapes alone: see `paged_attention.tiling`."""

from torch import Tensor

from quire_kernels.hardware import Hardware
from quire_kernels.paged_attention.tiling import Tiles, Tiling, bytes_of_parts, enough_programs, power_of_2, tiling


def _tiles(chip: Hardware, heads: int, element_bytes: int) -> Tiles:
    """The accumulator [rows, 512] takes half of the registers; keys are few so that the rest does not spill."""
    if chip.amd or element_bytes == 4 or heads <= 16:
        return Tiles(16, 16 if chip.amd else 32, 4, 1 if chip.amd else 2)
    if chip.warpgroup_matrices and heads > 32:
        return Tiles(64, 16, 8, 2)
    return Tiles(32, 32, 8, 2)


def launch_of(chip: Hardware, q: Tensor, cache: Tensor, block_tables: Tensor) -> tuple[Tiles, int, Tiling]:
    """→ (tiles, tiles over the heads, their tokens). By shapes alone, never by contexts."""
    tokens, heads = q.shape[:2]
    requests, width = block_tables.shape
    tiles = _tiles(chip, heads, q.element_size())
    of_token = min(tiles.rows, power_of_2(heads))
    tile_tokens = tiles.rows // of_token
    head_tiles = -(-heads // of_token)
    programs = max(requests, enough_programs(chip, head_tiles))
    launch = tiling(tokens // tile_tokens + requests, tile_tokens, 0, False, 0, programs, width * cache.shape[1], False)
    return tiles, head_tiles, launch


def parts_bytes(chip: Hardware, q: Tensor, cache: Tensor, block_tables: Tensor, latent: int) -> int:
    """What `latent_attention` allocates on a chip beside its result."""
    return bytes_of_parts(launch_of(chip, q, cache, block_tables)[2], q.shape[1], latent)
