"""Weights from nowhere: random ones of the shapes a model asks for (`--load-format dummy`), or shapes alone."""

import zlib
from collections.abc import Callable, Collection

import torch
from torch import Tensor

_BLOCK = 1048573  # numbers; a prime, so that the rows of a matrix begin at places of their own


class RandomWeights:
    """Stands in for a checkpoint. Every tensor repeats one block of random numbers from a place that its name gives, so
    that it is the same on every device, in every rank's part and whatever was read before. On the meta device nothing
    is made but shapes, which is how memory is planned.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, names: Collection[str] = ()) -> None:
        """`names`: of the tensors that a checkpoint is said to have."""
        self._names = names
        self.dtype = dtype
        self.device = device
        self.num_parameters = 0
        if device.type != "meta":
            generator = torch.Generator().manual_seed(0)  # a GPU's own would draw others
            self._bytes = torch.randint(256, (_BLOCK,), dtype=torch.uint8, generator=generator).to(device)
            self._numbers = torch.rand(_BLOCK, generator=generator).mul_(2).sub_(1).to(device, dtype)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: slice = slice(None),
        columns: slice = slice(None),
        depths: slice = slice(None),
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Norms are 1, scales small, everything else uniform about 0."""
        cuts = (rows, columns, depths)[: len(shape)]
        part = tuple(len(range(size)[cuts[i]]) if i < len(cuts) else size for i, size in enumerate(shape))
        kind = dtype or self.dtype
        if not name.endswith(("scale", "scale_inv", "scales", "zeros")):
            self.num_parameters += torch.Size(part).numel() * {torch.int32: 8, torch.uint8: 2}.get(kind, 1)
        if self.device.type == "meta":
            return torch.empty(part, dtype=kind, device=self.device)
        if "norm" in name:
            return torch.ones(part, dtype=kind, device=self.device)
        if "scale" in name:  # MXFP4's are exponents above -127
            return torch.full(part, 118 if kind == torch.uint8 else 2e-3, dtype=kind, device=self.device)
        width = torch.Size(shape[1:]).numel()
        first = zlib.crc32(name.encode()) + range(shape[0])[rows].start * width
        values = self._values(first, part[0] * width, kind).view(part[0], *shape[1:])
        return values[(slice(None), *cuts[1:])].contiguous()

    def _values(self, first: int, count: int, kind: torch.dtype) -> Tensor:
        if kind in (torch.int32, torch.int8, torch.uint8):
            return _repeated(self._bytes, first * kind.itemsize, count * kind.itemsize).view(kind)
        most = 0.04 if kind.itemsize > 1 else 16.0
        return _repeated(self._numbers, first, count).mul_(most).to(kind)

    def take_all(self, name: str) -> Tensor:
        """A single scale."""
        return torch.full((1,), 2e-3, device=self.device)

    def check_all_read(self, ignored: Callable[[str], bool]) -> None:
        """There is nothing to leave over."""


def _repeated(block: Tensor, first: int, count: int) -> Tensor:
    """[count] of the block, over and over, from its place `first` (round the block) on."""
    out = block.new_empty(count)
    place, at = first % _BLOCK, 0
    while at < count:
        taken = min(count - at, _BLOCK - place)
        out[at : at + taken] = block[place : place + taken]
        place, at = 0, at + taken
    return out
