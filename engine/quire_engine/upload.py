"""Host arrays to a device, without waiting for it."""

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
_ALIGNMENT = 16


def layout(arrays: Sequence[Array]) -> tuple[list[int], int]:
    """Where each array starts in a buffer that holds them all, and the buffer's size, in bytes."""
    starts, at = [], 0
    for array in arrays:
        starts.append(at)
        at += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    return starts, at


def views(buffer: Tensor, arrays: Sequence[Array]) -> list[Tensor]:
    """The tensors in a buffer that was filled with such arrays."""
    return [
        buffer[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
        for start, array in zip(layout(arrays)[0], arrays, strict=True)
    ]


class Upload:
    """All of a call's arrays in one copy. On a CPU they stay where they are.

    A copy from pageable memory waits for all that the device has to do; from pinned memory it takes its turn. torch's
    allocator of pinned memory gives none out again before the copies from it are done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, arrays: Sequence[Array]) -> list[Tensor]:
        """The arrays on the device, in memory of their own."""
        if self._device.type == "cpu":
            return [torch.from_numpy(array) for array in arrays]
        buffer = torch.empty(layout(arrays)[1], dtype=torch.uint8, device=self._device)
        self.into(buffer, arrays)
        return views(buffer, arrays)

    def into(self, buffer: Tensor, arrays: Sequence[Array]) -> None:
        """The arrays into given bytes of the device, each in its place of `layout`."""
        starts, size = layout(arrays)
        host = torch.empty(size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        bytes_ = host.numpy()
        for start, array in zip(starts, arrays, strict=True):
            bytes_[start : start + array.nbytes].view(array.dtype)[:] = array.reshape(-1)
        buffer[:size].copy_(host, non_blocking=True)
