"""Which replicas of a deployment are started, drained and killed. Plain data in, actions out.

Scaling down, taking a node out, and new engine options are the same act: a replica that is no longer wanted is drained
once what replaces it serves. One more than wanted is started for that, and another one when that serves. Where there is
no room for one more, a replica is drained first, and the next one only when what took its place serves: one that does
not load costs no other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

_NO_ROOM = 20.0  # seconds without a place, after which room is made for a replacement


class Phase(Enum):
    """Of a slot."""

    PAUSED = "failed, to be started again"
    PLACING = "waits for room"
    LOADING = "loads"
    SERVING = "serves"
    DRAINING = "drains"
    FAILED = "given up"


class Act(Enum):
    """What is done to a slot; a start makes a new one."""

    START = "start"
    DRAIN = "drain"
    KILL = "kill"


_PROGRESS = (Phase.FAILED, Phase.PAUSED, Phase.PLACING, Phase.LOADING, Phase.SERVING)


@dataclass(frozen=True, kw_only=True)
class SlotView:
    """What matters of a slot. `wanted`: with today's options, on a node that stays. `seconds`: in its phase, or since
    another slot gave its room back, if that is less: for that room it may be about to be placed."""

    index: int
    phase: Phase
    wanted: bool = True
    seconds: float = 0.0
    requests: int = 0


def actions(replicas: int, slots: Sequence[SlotView]) -> list[tuple[Act, int]]:
    """What is to be done so that `replicas` are there, by slot. Done, and asked again, it comes to an end."""
    found: list[tuple[Act, int]] = []
    ours = [slot for slot in slots if slot.wanted and slot.phase is not Phase.DRAINING]
    olds = [slot for slot in slots if not slot.wanted and slot.phase is not Phase.DRAINING]
    # Of those that go, what serves nobody goes at once.
    found += [(Act.KILL, slot.index) for slot in olds if slot.phase is not Phase.SERVING]
    olds = sorted((slot for slot in olds if slot.phase is Phase.SERVING), key=_requests)
    serving = sum(slot.phase is Phase.SERVING for slot in ours)

    surplus = sorted(ours, key=lambda slot: (_PROGRESS.index(slot.phase), slot.requests, -slot.index))
    for slot in surplus[: max(0, len(ours) - replicas)]:
        found.append((Act.DRAIN if slot.phase is Phase.SERVING else Act.KILL, slot.index))
        serving -= slot.phase is Phase.SERVING
        ours.remove(slot)

    unneeded = max(0, serving + len(olds) - replicas)
    crowded = any(slot.phase is Phase.PLACING and slot.seconds >= _NO_ROOM for slot in ours)
    under_way = any(slot.phase not in (Phase.PLACING, Phase.SERVING) for slot in ours)
    if crowded and not under_way and not any(slot.phase is Phase.DRAINING for slot in slots):
        unneeded = max(unneeded, 1)
    found += [(Act.DRAIN, slot.index) for slot in olds[:unneeded]]
    olds = olds[unneeded:]

    missing = replicas - len(ours)
    if olds:  # one more than wanted, and no second one before that serves
        missing = min(missing, replicas + 1 - len(ours) - len(olds))
    used = {slot.index for slot in slots}
    for _ in range(missing):
        index = next(number for number in range(len(used) + 1) if number not in used)
        used.add(index)
        found.append((Act.START, index))
    return found


def _requests(slot: SlotView) -> tuple[int, int]:
    return slot.requests, slot.index
