"""The step channel: shared memory that carries each step from a replica to the workers on its host, and the result
back.

One writer of plans, many readers, one writer of results (rank 0). A message is written, then its sequence number,
then a futex wakes who sleeps; readers look at the number a few times before they sleep. Messages go round in slots,
more than there are steps in flight, so that none is overwritten before the slowest reader has it. One that is larger
than a slot lies in memory of its own, and its slot holds the path; that memory lives as long as the slot's turn. All of
it is anonymous (memfd): when the last process that maps it is gone, so is it, however they died. Pickle is safe here:
only processes of the same user that were handed the descriptor's path can write to it.
"""

import ctypes
import mmap
import os
import pickle
import platform
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SYS_FUTEX = {"x86_64": 202, "aarch64": 98}
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_HEADER = 4096
_PROGRESS = 64  # where the ranks' counts of signs of life begin
MAX_RANKS = (_HEADER - _PROGRESS) // 8
_PLAN, _RESULT = 0, 1  # words of the header: how many messages were sent; "closed" follows at 8
_SLOTS = 4
_CAPACITY = 1 << 20  # of a slot, its length in the first 8 bytes
_ELSEWHERE = 1 << 63  # added to the length where the slot holds a path instead
_SPINS = 50 if platform.machine() == "x86_64" else 0  # elsewhere a plain load may pass the data it announces
_NAP = 0.05  # seconds asleep before looking whether the other side still lives


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


def encoded(message: Any) -> bytes:
    """A plan or a result as bytes."""
    return pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)


def decoded(data: bytes | memoryview) -> Any:
    """The reverse, for bytes that a worker or replica of this engine has made."""
    return pickle.loads(data)


def _size() -> int:
    return _HEADER + 2 * _SLOTS * _CAPACITY


def _slot(word: int, number: int) -> int:
    return _HEADER + (word * _SLOTS + number % _SLOTS) * _CAPACITY


def _path(descriptor: int) -> str:
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _close_all(own: int, large: dict[int, int]) -> None:
    os.close(own)
    while large:  # another thread may still send
        os.close(large.popitem()[1])


class ChannelClosed(Exception):
    """The other side is gone, or closed the channel."""


class StepChannel:
    """Made by the replica (`StepChannel.create`), opened by workers (`StepChannel.open(path)`)."""

    def __init__(self, descriptor: int) -> None:
        machine = platform.machine()
        if machine not in _SYS_FUTEX:
            raise OSError(f"the step channel knows the futex call of {', '.join(_SYS_FUTEX)}, not of {machine}")
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._number = _SYS_FUTEX[machine]
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, _size())
        self._sequence = (ctypes.c_uint32 * 2).from_buffer(self._map, 0)
        self._closed = ctypes.c_uint32.from_buffer(self._map, 8)
        self._addresses = [ctypes.addressof(self._sequence), ctypes.addressof(self._sequence) + 4]
        self._progress = (ctypes.c_uint64 * MAX_RANKS).from_buffer(self._map, _PROGRESS)
        self._seen = [0, 0]
        self._large: dict[int, int] = {}  # slot → descriptor of the memory that its message lies in
        self._release = weakref.finalize(self, _close_all, descriptor, self._large)

    @staticmethod
    def create() -> "StepChannel":
        """A fresh channel."""
        descriptor = os.memfd_create("quire-step-channel")
        os.ftruncate(descriptor, _size())
        return StepChannel(descriptor)

    @staticmethod
    def open(path: str) -> "StepChannel":
        """The channel of another process on this host, by the `path` it gave."""
        return StepChannel(os.open(path, os.O_RDWR))

    @property
    def path(self) -> str:
        """Where other processes of this user can open it until this one closes it."""
        return _path(self._descriptor)

    def send_plan(self, message: Any) -> None:
        """Replica → workers."""
        self._send(_PLAN, message)

    def receive_plan(self, alive: Callable[[], bool] = lambda: True) -> Any:
        """The next plan. Raises ChannelClosed."""
        return self._receive(_PLAN, alive)

    def send_result(self, message: Any) -> None:
        """Rank 0 → replica."""
        self._send(_RESULT, message)

    def receive_result(self, alive: Callable[[], bool] = lambda: True) -> Any:
        """The next result. Raises ChannelClosed, also within 50 ms of `alive` turning false."""
        return self._receive(_RESULT, alive)

    def mark(self, rank: int) -> None:
        """A sign of life of a worker."""
        self._progress[rank] += 1

    def progress(self, ranks: int) -> list[int]:
        """Each rank's signs of life so far."""
        return self._progress[:ranks]

    def close(self) -> None:
        """Tells the other side; the memory goes when both have forgotten it. Idempotent."""
        self._closed.value = 1
        for word in (_PLAN, _RESULT):
            self._wake(word)
        self._release()

    def _send(self, word: int, message: Any) -> None:
        data, flag = encoded(message), 0
        number = self._sequence[word]
        start = _slot(word, number)
        if (old := self._large.pop(start, None)) is not None:
            os.close(old)
        if len(data) > _CAPACITY - 8:
            self._large[start] = descriptor = os.memfd_create("quire-step-message")
            with open(descriptor, "wb", closefd=False) as memory:
                memory.write(data)
            data, flag = _path(descriptor).encode(), _ELSEWHERE
        self._map[start : start + 8] = (len(data) | flag).to_bytes(8, "little")
        self._map[start + 8 : start + 8 + len(data)] = data
        self._sequence[word] = (number + 1) & 0xFFFFFFFF
        self._wake(word)

    def _receive(self, word: int, alive: Callable[[], bool]) -> Any:
        seen = self._seen[word]
        for _ in range(_SPINS):
            if self._sequence[word] != seen:
                break
            os.sched_yield()
        while self._sequence[word] == seen:
            if self._closed.value:
                raise ChannelClosed("the step channel was closed")
            if not alive():
                raise ChannelClosed("the other side of the step channel is gone")
            self._sleep(word, seen)
        self._seen[word] = (seen + 1) & 0xFFFFFFFF
        start = _slot(word, seen)
        length = int.from_bytes(self._map[start : start + 8], "little")
        data = memoryview(self._map)[start + 8 : start + 8 + length % _ELSEWHERE]
        if length < _ELSEWHERE:
            return decoded(data)
        try:
            large = Path(bytes(data).decode()).read_bytes()
        except OSError as error:  # its memory was this process's alone
            raise ChannelClosed("the other side of the step channel is gone") from error
        return decoded(large)

    def _sleep(self, word: int, value: int) -> None:
        """Until the word differs from `value`, 50 ms at most (futex(2))."""
        nap = _Timespec(0, int(_NAP * 1e9))
        address = ctypes.c_void_p(self._addresses[word])
        self._syscall(
            ctypes.c_long(self._number),
            address,
            ctypes.c_int(_FUTEX_WAIT),
            ctypes.c_uint32(value),
            ctypes.byref(nap),
            None,
            0,
        )

    def _wake(self, word: int) -> None:
        address = ctypes.c_void_p(self._addresses[word])
        self._syscall(
            ctypes.c_long(self._number),
            address,
            ctypes.c_int(_FUTEX_WAKE),
            ctypes.c_int(1 << 30),
            None,
            None,
            0,
        )


def parent_lives(parent: int) -> Callable[[], bool]:
    """Whether process `parent` still is there; asked at most twice a second."""
    last = [time.monotonic()]

    def alive() -> bool:
        now = time.monotonic()
        if now - last[0] < 0.5:
            return True
        last[0] = now
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            return False
        return True

    return alive
