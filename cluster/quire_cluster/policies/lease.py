"""The step lease: workers that show no life while a step is due have lost it."""

from collections import deque
from collections.abc import Sequence
from operator import ge, sub

LEAST = 4.0  # seconds
UNKNOWN = 60.0  # at least, for a step larger than all before: it may compile
_PATIENCE = 20  # times a usual pause
_MARGIN = 4  # times the pause of a step larger than all before, were it to grow with the size
_WEIGHT = 0.3  # of the latest pause in what is usual
_FORGOTTEN = 86400.0  # seconds of service after which a lease that ran out is forgotten; no step takes a day
_Size = tuple[int, int, int]  # binary digits of a step's tokens, of the pairs of tokens that attend to each other, and
# of the tokens of images that are encoded


class StepLease:
    """Fed with each rank's count of signs of life (a step begun, a layer launched, a result sent); asked who stalls.

    On a CPU layers are done when the next one is launched; a GPU is silent from a step's launch to its result. So what
    a lease has to last is the longest pause in a step, which grows with the step. It is remembered by the step's size;
    a larger step is allowed what that pause comes to in proportion. A step's time is at most proportional to the larger
    of its tokens and its pairs, as some of it does not grow at all.

    What ran out once is started again with more `patience` (`more_patience`), and so may be wrong about a slow step a
    few times, but not for ever.
    """

    def __init__(self, patience: float = 1.0) -> None:
        self._patience = patience
        self._due: deque[tuple[_Size, float]] = deque()  # steps under way, when they were submitted
        self._size: _Size = (0, 0, 0)  # of the step that is waited for
        self._usual: dict[_Size, float] = {}  # seconds of the longest pause
        self._signs: tuple[int, ...] = ()
        self._since = 0.0
        self._pause = 0.0
        self._ended = 0.0

    @property
    def seconds(self) -> float:
        """How long a pause may be in the step that is waited for."""
        size = self._size
        usual = self._usual.get(size)
        if usual is None:
            usual = min((s for known, s in self._usual.items() if all(map(ge, known, size))), default=None)
        if usual is not None:
            return self._patience * max(LEAST, _PATIENCE * usual)
        grown = (s * 2.0 ** max(map(sub, size, known)) for known, s in self._usual.items())
        return self._patience * max(UNKNOWN, _MARGIN * min(grown, default=0.0))

    def submit(self, now: float, tokens: int, pairs: int, image_tokens: int = 0) -> None:
        """A step is handed out: it computes `tokens` tokens, `pairs` is the sum of what each attends to, and it encodes
        images of `image_tokens`."""
        self._due.append(((tokens.bit_length(), pairs.bit_length(), image_tokens.bit_length()), now))

    def begin(self) -> None:
        """The oldest step is waited for. Its time counts from when it was submitted, or the one before came back."""
        self._size, submitted = self._due.popleft()
        self._since, self._pause = max(submitted, self._ended), 0.0

    def end(self, now: float) -> None:
        """It came back."""
        pause = max(self._pause, now - self._since)
        usual = self._usual.get(self._size, pause)
        self._usual[self._size] = usual + _WEIGHT * (pause - usual)
        self._ended = now

    def check(self, now: float, signs: Sequence[int]) -> int | None:
        """The rank that is furthest behind, if the lease has run out; else None."""
        current = tuple(signs)
        if current != self._signs:
            self._pause = max(self._pause, now - self._since)
            self._signs, self._since = current, now
            return None
        if now - self._since < self.seconds:
            return None
        return min(range(len(current)), key=current.__getitem__)


def more_patience(patience: float, served: float) -> float:
    """Of the next lease, after one with `patience` ran out, of a replica that had run for `served` seconds."""
    return 2.0 * (patience if served < _FORGOTTEN else 1.0)
