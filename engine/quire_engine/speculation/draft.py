"""What a drafter says, and what it is asked."""

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from quire_engine.request import Request


@dataclass(frozen=True, slots=True)
class Draft:
    """What a request's text may go on with. Two lists, side by side."""

    tokens: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)  # of each, that it follows if those before it do


class Drafter(Protocol):
    """Asked on the engine's thread: what it does there, every step waits for."""

    reads_logs: ClassVar[bool]  # drafts come out of token logs

    def propose(self, request: Request, most: int) -> Draft:
        """At most `most` tokens to follow `request.tokens`, which may have grown since the last call."""

    def forget(self, request: Request) -> None:
        """The request has ended; one that was never asked about is fine."""
