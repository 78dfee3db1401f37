"""The step lease: workers that make no progress while a step is due have lost it."""

from collections.abc import Sequence

LEAST = 4.0  # seconds
_PATIENCE = 20  # times a usual pause
_WEIGHT = 0.1  # of the latest pause in what is usual
_UNKNOWN = 60.0  # until a step has shown what is usual


class StepLease:
    """Fed with each rank's count of signs of life (a step begun, a layer done, a result sent); asked who stalls.

    A model whose layers take long has a longer lease: what counts is how long its pauses usually are.
    """

    def __init__(self) -> None:
        self._seen: tuple[int, ...] = ()
        self._since = 0.0
        self._usual_pause = _UNKNOWN / _PATIENCE
        self._known = False

    @property
    def seconds(self) -> float:
        """How long a pause may be."""
        return max(LEAST, _PATIENCE * self._usual_pause)

    def begin(self, now: float) -> None:
        """A step is due from now on."""
        self._since = now

    def end(self) -> None:
        """The step came back; from the first one on it is known what is usual."""
        if not self._known:
            self._known = True
            self._usual_pause = 0.0

    def check(self, now: float, progress: Sequence[int]) -> int | None:
        """The rank that is furthest behind, if the lease has run out; else None."""
        current = tuple(progress)
        if current != self._seen:
            if self._known:
                self._usual_pause += _WEIGHT * (now - self._since - self._usual_pause)
            self._seen, self._since = current, now
            return None
        if now - self._since < self.seconds:
            return None
        return min(range(len(current)), key=current.__getitem__)
