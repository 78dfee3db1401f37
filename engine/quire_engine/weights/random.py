"""Weights from nowhere: random ones of the shapes a model asks for (`--load-format dummy`), or shapes alone."""

from collections.abc import Callable

import torch
from torch import Tensor


class RandomWeights:
    """Stands in for a checkpoint. On the meta device nothing is made but shapes, which is how memory is planned."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self._generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
        self.num_parameters = 0

    def __contains__(self, name: str) -> bool:
        return False

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
        """Norms are 1, scales small, everything else uniform about 0; each rank makes its own."""
        cuts = (rows, columns, depths)
        part = tuple(len(range(size)[cuts[i]]) if i < 3 else size for i, size in enumerate(shape))
        kind = dtype or self.dtype
        if not name.endswith(("scale", "scale_inv", "scales", "zeros")):
            self.num_parameters += torch.Size(part).numel() * {torch.int32: 8, torch.uint8: 2}.get(kind, 1)
        if self.device.type == "meta":
            return torch.empty(part, dtype=kind, device=self.device)
        if "norm" in name:
            return torch.ones(part, dtype=kind, device=self.device)
        if "scale" in name:
            return torch.full(part, 2e-3, dtype=kind, device=self.device)
        if kind in (torch.int32, torch.int8, torch.uint8):
            limits = torch.iinfo(kind)
            wide = torch.empty(part, dtype=kind, device=self.device)
            return wide.random_(limits.min, limits.max, generator=self._generator)
        most = 0.04 if kind.itemsize > 1 else 16.0
        wide = torch.empty(part, dtype=self.dtype, device=self.device)
        return wide.uniform_(-most, most, generator=self._generator).to(kind)

    def take_all(self, name: str) -> Tensor:
        """A single scale."""
        return torch.full((1,), 2e-3, device=self.device)

    def check_all_read(self, ignored: Callable[[str], bool]) -> None:
        """There is nothing to leave over."""
