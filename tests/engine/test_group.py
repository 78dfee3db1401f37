"""How ranks sum: which all-reduce takes what, and what is said where peers cannot read each other."""

import socket
from collections.abc import Iterator

import psutil
import pytest
import torch
import torch.distributed as dist
from quire_engine.one_shot import SYMMETRIC_BYTES, OneShot, one_shot
from quire_engine.parallel import COMMUNICATOR_BYTES, group_bytes, interface_to


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_small_tensors_go_in_one_shot() -> None:
    """Shapes alone: the kernel needs a GPU, and torch knows what it would return."""
    reduce = OneShot(torch.empty(4096, dtype=torch.bfloat16, device="meta"), "0")
    whole = torch.empty((2, 2048), dtype=torch.bfloat16, device="meta")
    assert reduce.takes(whole)
    assert not reduce.takes(whole.new_empty(4104)), "larger than the buffer"
    assert not reduce.takes(whole.new_empty(12)), "ends within 16 bytes"
    assert not reduce.takes(whole.float()), "another dtype than the buffer"
    out = reduce(whole)
    assert (out.shape, out.dtype, out.device) == (whole.shape, whole.dtype, whole.device)


@pytest.mark.parametrize(
    ("dtype", "reason"), [(torch.float32, "memory cannot be mapped: "), (torch.float16, "does not know torch.float16")]
)
def test_where_one_shot_is_impossible_it_is_said(
    alone: dist.ProcessGroup, caplog: pytest.LogCaptureFixture, dtype: torch.dtype, reason: str
) -> None:
    """The CPU has no symmetric memory."""
    assert one_shot(alone, dtype, torch.device("cpu"), int) is None
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "never done in one shot" in record.message
    assert reason in record.message


def test_a_rank_that_cannot_tells_the_others(alone: dist.ProcessGroup) -> None:
    asked: list[int] = []

    def minimum(value: int) -> int:
        asked.append(value)
        return 0

    assert one_shot(alone, torch.float32, torch.device("cpu"), minimum) is None
    assert asked == [0]


def test_bytes_of_the_groups() -> None:
    assert group_bytes(1, 1) == 0
    assert group_bytes(4, 1) == COMMUNICATOR_BYTES + SYMMETRIC_BYTES, "the stage's group is everyone's"
    assert group_bytes(1, 2) == COMMUNICATOR_BYTES
    assert group_bytes(2, 2) == 2 * COMMUNICATOR_BYTES + SYMMETRIC_BYTES


def test_gloo_is_told_the_network_between_the_hosts() -> None:
    """A host reaches each of its own addresses by the interface that has it, as the system's own list says."""
    first = {
        name: next((one.address for one in addresses if one.family == socket.AF_INET), None)
        for name, addresses in psutil.net_if_addrs().items()
    }
    assert first["lo"] == "127.0.0.1"
    for name, address in first.items():
        if address is not None:
            assert interface_to(address) == name
    assert interface_to("::1") is None
