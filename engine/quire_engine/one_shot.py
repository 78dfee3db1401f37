"""One-shot all-reduce of small tensors: each rank reads every other's part straight from its memory (torch's symmetric
memory), in one exchange where a ring takes one per rank. All add in the order of the ranks and so get the same bits.
"""

import logging
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger(__name__)
SYMMETRIC_BYTES = 2 << 20  # of a GPU: the buffer and its signals, in the driver's granules
_READ_BYTES = 2 << 20  # by one rank from all; beyond it a ring, where each reads less, is as fast
_TOGETHER = 8  # elements; the kernel moves 16 bytes at a time


class OneShot:
    """All-reduce through `buffer` [N], which every rank of the group has mapped."""

    def __init__(self, buffer: Tensor, group: str) -> None:
        self._buffer, self._group = buffer, group

    def takes(self, x: Tensor) -> bool:
        """Whether `x` is small enough."""
        return x.numel() <= self._buffer.numel() and x.numel() % _TOGETHER == 0 and x.dtype == self._buffer.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in a tensor of its own."""
        part = self._buffer[: x.numel()].view(x.shape)
        return torch.ops.symm_mem.one_shot_all_reduce_copy(part, x, "sum", self._group)


def one_shot(
    group: dist.ProcessGroup, dtype: torch.dtype, device: torch.device, minimum: Callable[[int], int]
) -> OneShot | None:
    """For all ranks at once; None, logged with the reason, where a library's all-reduce has to do it all.
    `minimum`: the smallest value any rank gives, so that all decide alike."""
    import torch.distributed._symmetric_memory as symmetric

    os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")  # device 0 of each rank is another GPU
    reason = "" if dtype in (torch.float32, torch.bfloat16) else f"torch's kernel does not know {dtype}"
    if not reason:
        try:
            buffer = symmetric.empty(_READ_BYTES // group.size() // dtype.itemsize, dtype=dtype, device=device)
            symmetric.rendezvous(buffer, group)
        except RuntimeError as error:
            reason = f"peers' memory cannot be mapped: {str(error).partition(chr(10))[0]}"
    if minimum(not reason):
        made = OneShot(buffer, group.group_name)
        own = ((torch.arange(1 << 12, device=device) + group.rank()) % 13).to(dtype)  # sums are exact
        expected = own.clone()
        dist.all_reduce(expected, group=group)
        if minimum(torch.equal(made(own), expected)):
            log.info("all-reduce in one shot up to %d KiB", buffer.nbytes >> 10)
            return made
        reason = "its sum was wrong"
    log.warning("all-reduce is never done in one shot: %s", reason or "another rank cannot")
    return None
