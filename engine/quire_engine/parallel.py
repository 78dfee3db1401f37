"""The ranks of one engine: an object that is passed to what needs it, never a global.

Ranks are numbered stage by stage: rank = stage * size + the rank within the stage. Within a stage, tensor parallelism
slices every layer; from stage to stage, pipeline parallelism hands the activations on.
"""

import fcntl
import os
import socket
from copy import copy
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from quire_engine.one_shot import SYMMETRIC_BYTES, OneShot, one_shot

_MEETING = timedelta(minutes=5)  # ranks import torch at their own speed,
_LOADING = timedelta(hours=1)  # and read their weights so; a rank that fails is told by its worker, not by a timeout
_FOREVER = timedelta(days=365)  # idle engines wait for plans
_SIOCGIFADDR = 0x8915  # of Linux: an interface's own IPv4 address
COMMUNICATOR_BYTES = 704 << 20
"""What NCCL takes of a GPU for one communicator: 544 MiB of two A100s and 688 of four were seen (its issue 964), in
buffers of 4 MiB (NCCL_BUFFSIZE) and those of two low-latency protocols, for each channel and neighbour."""


def group_bytes(size: int, stages: int) -> int:
    """What the groups of `size` tensor-parallel ranks of `stages` stages take of each GPU."""
    if size * stages == 1:
        return 0
    communicators = 2 if size > 1 and stages > 1 else 1
    return communicators * COMMUNICATOR_BYTES + (SYMMETRIC_BYTES if size > 1 else 0)


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
        self._one_shot: OneShot | None = None

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
        there is a group for messages between hosts besides (`control`). Returns once all have spoken."""
        everyone = size * stages
        if everyone == 1:
            return ParallelGroup()
        if address == "127.0.0.1":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        elif (network := interface_to(address)) is not None:
            # gloo goes by the host's own name, which often leads to loopback, where other hosts do not come.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", network)
        store = TCPStore(address, port, everyone, False, timeout=_MEETING)
        on_gpus = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpus else "gloo",
            store=store,
            rank=rank,
            world_size=everyone,
            timeout=_LOADING,
            device_id=device if on_gpus else None,
        )
        stage, own = divmod(rank, size)
        tensor_group = dist.group.WORLD
        if stages > 1:  # else the ranks of the stage are all there are
            groups = [
                dist.new_group([other * size + i for i in range(size)], timeout=_LOADING)
                for other in range(stages if size > 1 else 0)
            ]
            tensor_group = groups[stage] if groups else None
        group = ParallelGroup(
            own,
            size,
            stage=stage,
            stages=stages,
            experts_apart=experts_apart,
            deterministic=deterministic,
            tensor_group=tensor_group,
            world=dist.group.WORLD,
            control=dist.new_group(backend="gloo", timeout=_FOREVER) if across_hosts else None,
            dtype=dtype,
        )
        group.minimum(0)  # what is broken between the ranks shows before they have loaded
        if on_gpus and tensor_group is not None and not deterministic:
            group._one_shot = one_shot(tensor_group, dtype, device, group.minimum)
        return group

    @staticmethod
    def host_store(size: int, address: str = "127.0.0.1") -> TCPStore:
        """The rendezvous the ranks meet at; keep it while they join. Its `port` is chosen by the system.

        Neither it nor gloo and NCCL can ask who connects: `address` is the only one of this host that it listens on,
        and between hosts the network must be one's own.
        """
        listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        port = listener.getsockname()[1]
        return TCPStore(
            address, port, size, True, wait_for_workers=False, timeout=_MEETING, master_listen_fd=listener.detach()
        )

    def of_stage(self) -> "ParallelGroup":
        """The ranks of this stage alone, for a model that only they compute."""
        alone = copy(self)
        alone.stage, alone.stages = 0, 1
        return alone

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
        """The sum over the ranks of the stage, in place or in a tensor of its own. A library adds in an order that
        depends on the size."""
        if self.size == 1:
            return x
        if self._deterministic:
            parts = [torch.empty_like(x) for _ in range(self.size)]
            dist.all_gather(parts, x.contiguous(), group=self._tensor_group)
            x.copy_(parts[0])
            for part in parts[1:]:
                x += part
            return x
        if self._one_shot is not None and self._one_shot.takes(x):
            return self._one_shot(x)
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


def interface_to(address: str) -> str | None:
    """The network interface by which this host reaches an IPv4 address; None: it is not known."""
    if ":" in address:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # which sends nothing
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe, _SIOCGIFADDR, name.encode().ljust(40, b"\0"))
            except OSError:  # one without an address
                continue
            if found[20:24] == own:
                return name
    return None
