"""Which request is to blame for the replicas that died.

What was in a lost replica's last step and has just come there is suspected; where nothing has, all that was in that
step. A request has just come until its log has grown by PROOF tokens there. A suspect is sent on with no other suspect
beside it, and nothing new comes to it until then: so it has passed what may have killed, and is like any other. A
suspect whose replica is lost again ends with an error, unless something else had just come there: then that is
suspected too. So what ran beside the one to blame is not punished: it has passed its own trial, or still has it before
it. (Of two that kill, one may do it late, beside a suspect that the other has left.)

What was only beside is not suspected, until that has happened BESIDE times: something may kill before any step is
announced, or late.

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
    _length: int = 0  # of its log when it was last sent, in tokens
    _forgiven: bool = False
    _beside: int = 0  # replicas lost at which it waited or had long run, ever

    @property
    def suspected(self) -> bool:
        """Whether it has to be alone."""
        return self.count > 0

    def sent(self, length: int) -> None:
        """It goes to a replica, its log being `length` tokens long."""
        self._length = length

    def proven(self, length: int) -> bool:
        """Whether it has done no harm where it is, now that its log has `length` tokens."""
        return length >= self._length + PROOF

    def lost(self, now: float, *, near: bool, explained: bool, alone: bool) -> bool:
        """The replica that had it is gone at `now` (seconds). `near`: it was in a step, and nothing else there is more
        suspicious. `explained`: the replica said itself that it failed. `alone`: nothing else is as suspicious. True:
        the request is to blame."""
        if not near:
            self._beside += 1
            if self._beside < BESIDE:
                return False
        together = not explained and now - self._since < _TOGETHER
        if self.count and alone and (self._forgiven or not together):
            self.count += 1
            return True
        self._forgiven = self._forgiven or (self.count > 0 and together)
        if not self.count:
            self.count, self._since = 1, now
        return False

    def grown(self, length: int) -> bool:
        """Its log has `length` tokens now. True: it is cleared."""
        if not self.count or not self.proven(length):
            return False
        self.count, self._forgiven = 0, False
        return True
