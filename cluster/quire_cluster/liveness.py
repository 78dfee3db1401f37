"""Whether the process of an actor still runs, however long what it was asked for takes.

Ray tells of processes that ended and of hosts that it lost, but not of a process that is stopped.
"""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import ray
from quire_engine.errors import EngineFailure

from quire_cluster.policies.suspicion import Patience, Silence, Standing

log = logging.getLogger(__name__)
T = TypeVar("T")
FIRST_SILENCE = 600.0  # seconds until an actor's first answer: its process starts, and imports from a slow disk
SILENCE = 60.0  # seconds between two answers
LOOK = 0.25  # seconds between looks
_PAUSE = 2.0  # seconds from one question to the next: each costs both processes a call of Ray
CONTROLLER = "controller"  # the actor's name, in the namespace of its cluster
_ORPHAN_LOOK, _ORPHANED = 10.0, 3  # seconds between looks at it, and looks in a row that find none


class LivenessProbe:
    """Asks an actor's method `ping` again and again; it has to answer beside what it does."""

    def __init__(self, actor: Any, name: str, *, placed: bool = True) -> None:
        """`name`: for whom it is told. `placed`: its resources are there, so that only its start is waited for."""
        self._actor = actor
        self._name = name
        self._silence = Silence(Patience(move=FIRST_SILENCE if placed else float("inf")))
        self._looked = time.monotonic()
        self._ask(self._looked)

    def _ask(self, now: float) -> None:
        self._asked = self._actor.ping.remote().future()
        self._asked_at = now

    def check(self) -> None:
        """To be called every LOOK seconds. Raises EngineFailure when it has been silent for too long."""
        now = time.monotonic()
        self._silence.passed(now - self._looked)
        self._looked = now
        if self._asked.done():
            self._silence = Silence(Patience(move=SILENCE))
            if now - self._asked_at >= _PAUSE:
                self._ask(now)
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


def named_controller(namespace: str) -> Any:
    """The controller of a cluster. Raises ValueError where there is none; asks Ray, and waits for its answer."""
    return ray.get_actor(CONTROLLER, namespace)


def has_controller(namespace: str) -> bool:
    """Whether a cluster has one, be it about to be started again."""
    try:
        named_controller(namespace)
    except ValueError:
        return False
    return True


async def end_with_controller(namespace: str, last: Callable[[], None] = lambda: None) -> None:
    """Ends this process once Ray has no controller under that name: one that died comes back under it, and until then,
    and while Ray's head is away, whoever serves goes on. `last` is done before, in a thread."""
    missing = 0
    while missing < _ORPHANED:
        await asyncio.sleep(_ORPHAN_LOOK)
        try:
            await asyncio.to_thread(named_controller, namespace)
            missing = 0
        except ValueError:
            missing += 1
        except Exception:  # Ray's, of any kind: its head does not answer
            log.exception("the controller cannot be looked for; it is tried again")
    log.error("this cluster's controller is gone for good; so this ends, too")
    try:
        await asyncio.to_thread(last)
    finally:
        os._exit(0)
