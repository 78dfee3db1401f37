"""What an answer waits for, as a gateway tells it."""

from dataclasses import dataclass

from quire_engine.waiting import WaitsFor
from quire_protos.v1 import engine_pb2 as pb

from quire_cluster.gateway.generation import Choice

_ENDINGS = {why.value for why in (WaitsFor.ROW, WaitsFor.PAGES, WaitsFor.PREEMPTED)}  # others have to end: nobody knows


@dataclass(frozen=True, kw_only=True)
class ChoiceWait:
    """Of one of the n answers."""

    index: int
    reason: str  # in the words of WaitsFor; "": it runs
    since: float  # seconds that it has waited, or run
    estimate: float | None  # seconds until it should run, as far as is known
    tokens: int  # generated so far


def wait_of(choice: Choice, reason: str, since: float, estimate: float | None = None) -> ChoiceWait:
    """With what the gateway knows of the choice itself."""
    return ChoiceWait(index=choice.index, reason=reason, since=since, estimate=estimate, tokens=len(choice.output))


def estimate(waiting: pb.Waiting, load: pb.Load) -> float | None:
    """Seconds that a replica takes for the prompts ahead. None while something there waits for others to end, and
    before it has computed a prompt."""
    if not load.prefill_rate or waiting.reason in _ENDINGS or not _ENDINGS.isdisjoint(load.waiting_for):
        return None
    return waiting.tokens_ahead / load.prefill_rate
