"""How long a replica may say nothing before nothing new goes there, and before what it has goes on elsewhere."""

from dataclasses import dataclass
from enum import Enum

_HELD_UP = 0.5  # seconds; a gateway that sleeps longer between two looks was held up itself, and has read nothing


class Standing(Enum):
    """What a gateway does with a replica."""

    GOOD = "it is used"
    AVOIDED = "nothing new is sent there while others are good"
    LOST = "its requests go on elsewhere"


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Seconds of silence."""

    avoid: float = 2.0
    move: float = 10.0


class Silence:
    """Of one replica, in the time that its gateway has been awake."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self.seconds = 0.0

    def heard(self) -> None:
        """A message of the replica."""
        self.seconds = 0.0

    def passed(self, seconds: float) -> None:
        """The gateway looks again, `seconds` after its last look."""
        self.seconds += min(seconds, _HELD_UP)

    @property
    def standing(self) -> Standing:
        """As of the last look."""
        if self.seconds >= self._patience.move:
            return Standing.LOST
        return Standing.AVOIDED if self.seconds >= self._patience.avoid else Standing.GOOD
