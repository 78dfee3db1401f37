"""The ranks of one engine: an object that is passed to what needs it, never a global.

Ranks are numbered stage by stage: rank = stage * size + the rank within the stage. Within a stage, tensor parallelism
slices every layer; from stage to stage, pipeline parallelism hands the activations on.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

_FOREVER = timedelta(days=365)  # idle engines wait for plans


class ParallelGroup:
    """Where one rank stands among `size` tensor-parallel ranks of `stages` stages. Alone, every operation is free."""

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        stage: int = 0,
        stages: int = 1,
        experts_apart: bool = False,
        deterministic: bool = False,
        tensor_group: dist.ProcessGroup | None = None,
        world: dist.ProcessGroup | None = None,
        control: dist.ProcessGroup | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`experts_apart`: each rank holds whole experts. `deterministic`: sums are taken in the order of the ranks.
        `dtype`: of the activations that stages hand on."""
        self.rank = rank
        self.size = size
        self.stage = stage
        self.stages = stages
        self.experts_apart = experts_apart and size > 1
        self._deterministic = deterministic
        self._tensor_group = tensor_group
        self._world = world
        self._control = control
        self._dtype = dtype

    @staticmethod
    def join(
        rank: int,
        size: int,
        stages: int,
        address: str,
        port: int,
        device: torch.device,
        *,
        dtype: torch.dtype,
        experts_apart: bool = False,
        deterministic: bool = False,
        across_hosts: bool = False,
    ) -> "ParallelGroup":
        """Meets the other ranks at rank 0's store (see `host_store`): NCCL on GPUs, gloo on CPUs. With `across_hosts`
        there is a group for messages between hosts besides (`control`)."""
        everyone = size * stages
        if everyone == 1:
            return ParallelGroup()
        if address == "127.0.0.1":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = TCPStore(address, port, everyone, False, timeout=timedelta(seconds=60))
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=everyone)
        stage, own = divmod(rank, size)
        groups = [dist.new_group([other * size + i for i in range(size)]) for other in range(stages)]
        return ParallelGroup(
            own,
            size,
            stage=stage,
            stages=stages,
            experts_apart=experts_apart,
            deterministic=deterministic,
            tensor_group=groups[stage] if size > 1 else None,
            world=dist.group.WORLD,
            control=dist.new_group(backend="gloo", timeout=_FOREVER) if across_hosts else None,
            dtype=dtype,
        )

    @staticmethod
    def host_store(size: int) -> TCPStore:
        """The rendezvous the ranks meet at; keep it while they join. Its `port` is chosen by the system."""
        return TCPStore("0.0.0.0", 0, size, True, wait_for_workers=False, timeout=timedelta(seconds=60))

    @property
    def first(self) -> bool:
        """Whether this stage embeds."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether this stage has the output head."""
        return self.stage == self.stages - 1

    @property
    def draws(self) -> bool:
        """Whether this rank samples and reports: rank 0 of the last stage."""
        return self.last and self.rank == 0

    @property
    def drawing_rank(self) -> int:
        """That rank's number among all."""
        return (self.stages - 1) * self.size

    @property
    def control(self) -> dist.ProcessGroup:
        """Carries messages between hosts."""
        assert self._control is not None, "the ranks share a host"
        return self._control

    @property
    def everyone(self) -> int:
        """Ranks of all stages."""
        return self.size * self.stages

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks of the stage, in place. A library adds in an order that depends on the size."""
        if self.size > 1 and self._deterministic:
            parts = [torch.empty_like(x) for _ in range(self.size)]
            dist.all_gather(parts, x.contiguous(), group=self._tensor_group)
            x.copy_(parts[0])
            for part in parts[1:]:
                x += part
        elif self.size > 1:
            dist.all_reduce(x, group=self._tensor_group)
        return x

    def gather_columns(self, x: Tensor) -> Tensor | None:
        """Every rank's columns side by side, on rank 0; None on the others. x [N, columns] has one shape everywhere."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(x.contiguous(), parts, group=self._tensor_group, group_dst=0)
        return torch.cat(parts, 1) if parts is not None else None

    def share_drawn(self, tokens: Tensor) -> None:
        """What the rank that draws has drawn, into everyone's `tokens`."""
        if self.everyone > 1:
            dist.broadcast(tokens, group_src=self.drawing_rank, group=self._world)

    def send(self, x: Tensor) -> None:
        """To the same rank of the next stage."""
        dist.send(x, group_dst=(self.stage + 1) * self.size + self.rank, group=self._world)

    def receive(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """What the same rank of the stage before sent."""
        x = torch.empty((rows, columns), dtype=self._dtype, device=device)
        dist.recv(x, group_src=(self.stage - 1) * self.size + self.rank, group=self._world)
        return x

    def minimum(self, value: int) -> int:
        """The smallest value any rank gives."""
        if self.everyone == 1:
            return value
        device = "cuda" if dist.get_backend(self._world) == "nccl" else "cpu"
        shared = torch.tensor([value], dtype=torch.int64, device=device)
        dist.all_reduce(shared, dist.ReduceOp.MIN, group=self._world)
        return int(shared.item())

    def close(self) -> None:
        """Leaves the group."""
        if self.everyone > 1:
            dist.destroy_process_group()
