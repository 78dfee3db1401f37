"""Where the patches of an image lie, and what follows from it: all on the host, as numbers that are few."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from quire_engine.models.vit_spec import Rope, Tiles

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Grid:
    """How the patches of an image lie: B pieces (frames, tiles) of N = height * width patches."""

    pieces: int
    height: int
    width: int
    rows: Array  # [N] of each patch
    columns: Array
    order: Array | None = None  # of blocks, where they do not follow each other as in the image
    windows: Sequence[tuple[int, int]] = ()  # how many of how many patches, one after another
    seen: Array | None = None  # [B, height, width] where there are patches that are padding


def blocks_of(pieces: int, height: int, width: int, side: int, window: int) -> Grid:
    """Patches that come in blocks of side x side; with windows of so many blocks down and across, those of a window
    follow each other, and windows of one size."""
    down, across = height // side, width // side
    places = np.arange(height * width).reshape(down, side, across, side).swapaxes(1, 2).reshape(-1, side**2)
    order, windows = None, []
    if window:
        blocks = np.arange(down * across).reshape(down, across)
        cut = [
            blocks[i : i + window, j : j + window].ravel()
            for i, j in itertools.product(range(0, down, window), range(0, across, window))
        ]
        cut.sort(key=len, reverse=True)
        windows = [(len(list(same)), size * side**2) for size, same in itertools.groupby(map(len, cut))]
        order = np.concatenate(cut)
        places = places[order]
    rows, columns = np.divmod(places.ravel(), width)
    return Grid(pieces, height, width, rows, columns, order, windows)


def rows_of(pieces: int, height: int, width: int, side: int, pixels: Array | None) -> Grid:
    """Patches of `side` pixels that come row by row. `pixels`: [..., B, tall, broad], where there is an image."""
    rows, columns = np.divmod(np.arange(height * width), width)
    seen = None
    if pixels is not None:
        found = pixels.reshape(pieces, *pixels.shape[-2:])[:, : height * side, : width * side] != 0
        found = found.reshape(pieces, height, side, width, side).any((2, 4))
        seen = None if found.all() else found
    return Grid(pieces, height, width, rows, columns, seen=seen)


def frequencies_of(rope: Rope, size: int) -> tuple[Tensor, Tensor]:
    """Of rows and of columns: [size / 4] each."""
    wide = size if rope.alternating else size // 2
    each = 1.0 / (rope.theta ** (torch.arange(0, wide, 2, dtype=torch.float32) / wide))
    return (each[0::2], each[1::2]) if rope.alternating else (each, each)


def taps_of(count: int, side: int, kind: str) -> tuple[Tensor, Tensor]:
    """What `count` places along an axis are made of, of a table's `side`: [taps, count] places, and shares in fp32.
    Bilinear, with corners on corners; else bicubic (Keys, a = -0.75), pixels being squares."""
    index = np.arange(count, dtype=np.float32)
    if kind == "bilinear":
        source = index * (side - 1) / np.float32(max(count - 1, 1))
        offsets = np.arange(2)[:, None]
    else:
        source = (index + np.float32(0.5)) * side / np.float32(count) - np.float32(0.5)
        offsets = np.arange(-1, 3)[:, None]
    floor = np.floor(source)
    away = np.abs(source - floor - offsets.astype(np.float32))
    if kind == "bilinear":
        shares = (1 - away).clip(0)
    else:
        near = ((1.25 * away - 2.25) * away) * away + 1
        far = ((-0.75 * away + 3.75) * away - 6.0) * away + 3.0
        shares = np.where(away <= 1, near, far)
    places = (floor.astype(np.int64) + offsets).clip(0, side - 1)
    return torch.from_numpy(places), torch.from_numpy(shares.astype(np.float32))


def fractions_of(seen: Array, side: int) -> Array:
    """Rows of a table of side x side for patches [B, height, width], padding among them, by how far down and across the
    image they are: [B, height * width]."""
    edges = torch.arange(1 / side, 1.0, 1 / side).numpy()

    def places(count: int, known: int) -> Array:
        far = np.arange(count, dtype=np.float32) * (np.float32(1.0) / np.float32(max(known, 1)))
        return np.searchsorted(edges, np.minimum(far, np.float32(1.0 - 1e-6)), side="right")

    found = []
    for piece in seen:
        down, across = (places(len(line), int(line.sum())) for line in (piece[:, 0], piece[0]))
        found.append(np.where(piece, down[:, None] * side + across, 0).ravel())
    return np.stack(found)


def put_together(x: Tensor, newline: Tensor, size: tuple[int, int], tiles: Tiles) -> Tensor:
    """[B, side * side, hidden], the whole image and its pieces → [n, hidden]: the whole, then its pieces as one,
    without what was added to make them full. `size`: of the image in pixels, height and width."""
    if len(x) == 1:
        return torch.cat((x[0], newline[None]))
    height, width = max(tiles.pinpoints, key=lambda pinpoint: _fit(size, pinpoint))
    down, across, side = height // tiles.pixels, width // tiles.pixels, tiles.side
    whole = x[1:].view(down, across, side, side, -1).transpose(1, 2).reshape(down * side, across * side, -1)
    whole = _without_margins(whole, size)
    if tiles.most is not None:
        ratio = math.sqrt(whole.shape[0] * whole.shape[1] / (tiles.most * side**2))
        if ratio > 1.1:
            smaller = [int(length // ratio) for length in whole.shape[:2]]
            whole = F.interpolate(whole.permute(2, 0, 1)[None], smaller, mode="bilinear")[0].permute(1, 2, 0)
    rows = torch.cat((whole, newline.expand(len(whole), 1, -1)), 1)
    return torch.cat((x[0], rows.flatten(0, 1)))


def _fit(size: tuple[int, int], pinpoint: tuple[int, int]) -> tuple[int, int]:
    """How well an image's pixels are shown, and how few are wasted."""
    scale = min(pinpoint[1] / size[1], pinpoint[0] / size[0])
    shown = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
    return shown, shown - pinpoint[0] * pinpoint[1]


def _without_margins(whole: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = whole.shape[:2]
    if size[1] / size[0] > width / height:
        margin = (height - int(round(size[0] * (width / size[1]), 7))) // 2
        return whole[margin : height - margin]
    margin = (width - int(round(size[1] * (height / size[0]), 7))) // 2
    return whole[:, margin : width - margin]
