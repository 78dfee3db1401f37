"""Drafts that a model makes where the steps are computed (execution/drafting.py)."""

from typing import ClassVar

from quire_engine.request import Request
from quire_engine.speculation.draft import Draft
from quire_engine.step import TO_GUESS

_CHANCES = (0.75, 0.65, 0.55, 0.45, 0.35)  # of the first drafts, until it is known better; each is counted by itself


class WorkersDrafter:
    """Leaves the tokens open. What a request's chances are is learnt from those that came before, place by place."""

    reads_logs: ClassVar[bool] = False

    def propose(self, request: Request, most: int) -> Draft:
        chances = [*_CHANCES[:most], *[_CHANCES[-1]] * (most - len(_CHANCES))]
        return Draft([TO_GUESS] * most, chances)

    def forget(self, request: Request) -> None:
        """Nothing is kept."""
