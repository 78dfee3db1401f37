"""Steps across hosts: a stage of the pipeline on another host gets its plans from rank 0, and rank 0 the results.

Shared memory ends at the host. Rank 0, which sits beside the replica, reads each plan from the step channel and sends
it on over gloo, in a group of their own; where the rank that draws is elsewhere, its results come back the same way.
A message is one tensor, or two where it is long.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from quire_cluster.channel import ChannelClosed, StepChannel
from quire_cluster.wire import from_bytes, to_bytes

_FIRST = 1 << 16  # bytes of a message's first tensor; its own length is in the first 8
_PLANS, _RESULTS = 0, 1  # tags
_CLOSED = (1 << 63) - 1  # a length that says: no more
_LONGEST = 1 << 30  # bytes of a message


def _send(data: bytes | None, to: int, tag: int, group: dist.ProcessGroup) -> None:
    length = _CLOSED if data is None else len(data)
    first = torch.zeros(_FIRST, dtype=torch.uint8)
    first[:8] = torch.frombuffer(bytearray(length.to_bytes(8, "little")), dtype=torch.uint8)
    if data:
        whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        first[8 : 8 + len(data)] = whole[: _FIRST - 8]
    dist.send(first, group_dst=to, group=group, tag=tag)
    if data is not None and len(data) > _FIRST - 8:
        dist.send(whole[_FIRST - 8 :].contiguous(), group_dst=to, group=group, tag=tag)


def _receive(source: int, tag: int, group: dist.ProcessGroup) -> bytes:
    """Raises ChannelClosed when the other side says so, or is gone."""
    first = torch.empty(_FIRST, dtype=torch.uint8)
    try:
        dist.recv(first, group_src=source, group=group, tag=tag)
        raw = first.numpy().tobytes()
        length = int.from_bytes(raw[:8], "little")
        if length == _CLOSED:
            raise ChannelClosed("rank 0 closed the relay")
        if length > _LONGEST:
            raise ChannelClosed(f"rank {source} announced a message of {length} bytes")
        if length <= _FIRST - 8:
            return raw[8 : 8 + length]
        rest = torch.empty(length - (_FIRST - 8), dtype=torch.uint8)
        dist.recv(rest, group_src=source, group=group, tag=tag)
    except RuntimeError as error:
        raise ChannelClosed(f"rank {source} is gone: {error}") from error
    return raw[8:] + rest.numpy().tobytes()


class RemoteChannel:
    """The step channel as a worker on another host sees it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def receive_plan(self, alive: Callable[[], bool] = lambda: True) -> Any:
        """The next plan. Raises ChannelClosed."""
        return from_bytes(_receive(0, _PLANS, self._group))

    def send_result(self, message: Any) -> None:
        """The rank that draws → rank 0."""
        _send(to_bytes(message), 0, _RESULTS, self._group)

    def mark(self, rank: int) -> None:
        """Signs of life stay on the host: that this rank stalls shows in those that wait for it."""

    def close(self) -> None:
        """Tells rank 0 that no result will come."""
        _send(None, 0, _RESULTS, self._group)


class RelayingChannel:
    """Rank 0's step channel, which it shares with ranks on other hosts."""

    def __init__(
        self, channel: StepChannel, group: dist.ProcessGroup, remote: Sequence[int], drawing: int | None
    ) -> None:
        """`drawing`: the rank whose results come from another host, if it is on one."""
        self._channel = channel
        self._group = group
        self._remote = remote
        if drawing is not None:
            threading.Thread(target=self._bring_results, args=(drawing,), daemon=True, name="relay").start()

    def receive_plan(self, alive: Callable[[], bool] = lambda: True) -> Any:
        """The next plan, which the other hosts have then too. Raises ChannelClosed."""
        try:
            plan = self._channel.receive_plan(alive)
        except ChannelClosed:
            for rank in self._remote:
                _send(None, rank, _PLANS, self._group)
            raise
        data = to_bytes(plan)
        for rank in self._remote:
            _send(data, rank, _PLANS, self._group)
        return plan

    def _bring_results(self, drawing: int) -> None:
        try:
            while True:
                self._channel.send_result(from_bytes(_receive(drawing, _RESULTS, self._group)))
        except ChannelClosed:
            pass
        finally:  # whatever it was, nobody waits for a result that will not come
            self._channel.close()

    def send_result(self, message: Any) -> None:
        """Where rank 0 draws itself."""
        self._channel.send_result(message)

    def mark(self, rank: int) -> None:
        """A sign of life."""
        self._channel.mark(rank)

    def close(self) -> None:
        """Tells everyone."""
        self._channel.close()
