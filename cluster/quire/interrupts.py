"""Ctrl-C where it does no harm."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_back() -> Iterator[Callable[[], None]]:
    """Meanwhile an interrupt waits for a call of what this gives, or for the end; who cannot wait interrupts twice.

    In the main thread, where interrupts arrive, and where a handler in Python handles them; elsewhere nothing changes.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield lambda: None
        return
    waiting: list[FrameType | None] = []

    def let_in() -> None:
        if waiting:
            handler(signal.SIGINT, waiting.pop())

    def hold(_number: int, frame: FrameType | None) -> None:
        second = bool(waiting)
        waiting.append(frame)
        if second:
            let_in()

    signal.signal(signal.SIGINT, hold)
    try:
        yield let_in
    finally:
        signal.signal(signal.SIGINT, handler)
        let_in()
