"""The tensor-parallel group: an object that is passed to what needs it, never a global."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore


class TensorParallelGroup:
    """`size` ranks that hold slices of every layer. With one rank every operation is free."""

    def __init__(self, rank: int = 0, size: int = 1, process_group: dist.ProcessGroup | None = None) -> None:
        assert (size == 1) == (process_group is None), "a group of several ranks needs a process group"
        self.rank = rank
        self.size = size
        self._process_group = process_group

    @staticmethod
    def join(rank: int, size: int, address: str, port: int, device: torch.device) -> "TensorParallelGroup":
        """Meets the other ranks at rank 0's store (see `host_store`): NCCL on GPUs, gloo on CPUs."""
        if size == 1:
            return TensorParallelGroup()
        if address == "127.0.0.1":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = TCPStore(address, port, size, False, timeout=timedelta(seconds=60))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
        return TensorParallelGroup(rank, size, dist.group.WORLD)

    @staticmethod
    def host_store(size: int) -> TCPStore:
        """The rendezvous the ranks meet at; keep it while they join. Its `port` is chosen by the system."""
        return TCPStore("0.0.0.0", 0, size, True, wait_for_workers=False, timeout=timedelta(seconds=60))

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self._process_group)
        return x

    def broadcast(self, x: Tensor) -> None:
        """Rank 0's values into everyone's x."""
        if self.size > 1:
            dist.broadcast(x, group_src=0, group=self._process_group)

    def gather_columns(self, x: Tensor) -> Tensor | None:
        """Every rank's columns side by side, on rank 0; None on the others. x [N, columns] has one shape everywhere."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(x.contiguous(), parts, group=self._process_group)
        return torch.cat(parts, 1) if parts is not None else None

    def minimum(self, value: int) -> int:
        """The smallest value any rank gives."""
        if self.size == 1:
            return value
        device = "cuda" if dist.get_backend(self._process_group) == "nccl" else "cpu"
        shared = torch.tensor([value], dtype=torch.int64, device=device)
        dist.all_reduce(shared, dist.ReduceOp.MIN, group=self._process_group)
        return int(shared.item())

    def close(self) -> None:
        """Leaves the group."""
        if self.size > 1:
            dist.destroy_process_group(self._process_group)
