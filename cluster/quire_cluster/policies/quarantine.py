"""Which request is to blame for the replicas that died.

The rule: what was in a lost replica's last step is suspected. A suspect is sent on with no other suspect beside it,
until its log is longer by PROOF tokens than when its replica was lost: then it has passed what may have killed, and is
like any other. A suspect whose replica is lost again ends with an error. So only one is under trial at a replica, and
what ran beside it is never punished: it has passed its own trial, or has had none.

What only waited at the lost replica is not suspected, until that has happened BESIDE times: something may kill before
any step is announced.

Two replicas that vanish together, without a word, died of something else (their host, the controller): they count as
one.
"""

import math
from dataclasses import dataclass

PROOF = 3  # tokens: the log lags two steps in flight behind what was computed
BESIDE = 3  # replicas
_TOGETHER = 2.0  # seconds


@dataclass(slots=True)
class Losses:
    """What befell a request."""

    count: int = 0  # replicas lost under it that it has not been cleared of
    _since: float = -math.inf  # when the first of these was lost
    _length: int = 0  # of its log then, in tokens
    _forgiven: bool = False
    _beside: int = 0  # replicas lost at which it waited, ever

    @property
    def suspected(self) -> bool:
        """Whether it has to be alone."""
        return self.count > 0

    def lost(self, now: float, length: int, *, begun: bool, explained: bool) -> bool:
        """The replica that had it is gone at `now` (seconds), its log being `length` tokens long. `begun`: it was in a
        step there. `explained`: the replica said itself that it failed. True: the request is to blame."""
        if not begun:
            self._beside += 1
            if self._beside < BESIDE:
                return False
        together = not explained and now - self._since < _TOGETHER
        if self.count and (self._forgiven or not together):
            self.count += 1
            return True
        self._forgiven = self.count > 0
        if not self.count:
            self.count, self._since = 1, now
        self._length = length
        return False

    def grown(self, length: int) -> bool:
        """Its log has `length` tokens now. True: it is cleared."""
        if not self.count or length < self._length + PROOF:
            return False
        self.count, self._forgiven = 0, False
        return True
