"""Whether, and when, a replica that died is started again. Plain data in, a decision out."""

from dataclasses import dataclass

_PAUSES = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0)  # seconds, by failures in a row
_FIRST_ATTEMPTS = 3  # of a replica that never served
_ATTEMPTS = 10  # of one that did
_STEADY = 30.0  # seconds of service after which a failure counts as the first


@dataclass(slots=True)
class Restarts:
    """Of one slot."""

    failures: int = 0  # in a row
    served: bool = False  # ever

    def failed(self, service: float | None, *, died: bool) -> float | None:
        """Seconds until the next attempt; None: there is none.

        `service`: seconds that it served; None: it failed while it loaded. `died`: its process did; otherwise it said
        what is wrong, and where it never served that will be so the next time.
        """
        self.served = self.served or service is not None
        self.failures = 1 if service is not None and service >= _STEADY else self.failures + 1
        if not self.served and not died:
            return None
        if self.failures >= (_ATTEMPTS if self.served else _FIRST_ATTEMPTS):
            return None
        return _PAUSES[min(self.failures - 1, len(_PAUSES) - 1)]
