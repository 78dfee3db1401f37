"""Whether the process of an actor still runs, however long what it was asked for takes.

Ray tells of processes that ended and of hosts that it lost, but not of a process that is stopped.
"""

import asyncio
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

from quire_engine.errors import EngineFailure

from quire_cluster.policies.suspicion import Patience, Silence, Standing

T = TypeVar("T")
FIRST_SILENCE = 600.0  # seconds until an actor's first answer: its process starts, and imports from a slow disk
SILENCE = 60.0  # seconds between two answers
LOOK = 0.25  # seconds between looks


class LivenessProbe:
    """Asks an actor's method `ping` again and again; it has to answer beside what it does."""

    def __init__(self, actor: Any, name: str, *, placed: bool = True) -> None:
        """`name`: for whom it is told. `placed`: its resources are there, so that only its start is waited for."""
        self._actor = actor
        self._name = name
        self._silence = Silence(Patience(move=FIRST_SILENCE if placed else float("inf")))
        self._looked = time.monotonic()
        self._asked = actor.ping.remote().future()

    def check(self) -> None:
        """To be called every LOOK seconds. Raises EngineFailure when it has been silent for too long."""
        now = time.monotonic()
        self._silence.passed(now - self._looked)
        self._looked = now
        if self._asked.done():
            self._silence = Silence(Patience(move=SILENCE))
            self._asked = self._actor.ping.remote().future()
        elif self._silence.standing is Standing.LOST:
            raise EngineFailure(
                f"{self._name} says nothing for {self._silence.seconds:.0f} s; its process is stopped, or its host gone"
            )


async def while_alive(call: Awaitable[T], probe: LivenessProbe) -> T:
    """What the call of an actor returns. Raises EngineFailure when the actor falls silent before."""
    asked = asyncio.ensure_future(call)
    try:
        while not (await asyncio.wait({asked}, timeout=LOOK))[0]:
            probe.check()
        return asked.result()
    finally:
        asked.cancel()
