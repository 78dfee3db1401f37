"""Whether, and when, a replica that died is started again. Plain data in, a decision out."""

from dataclasses import dataclass

_PAUSES = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0)  # seconds, by deaths in a row
_LONGEST_AFTER_SERVICE = 10.0  # seconds; what killed it may not come again, and others wait for it
_FIRST_ATTEMPTS = 3  # at loading, of a replica that never served
_ATTEMPTS = 10  # of one that did
_STEADY = 30.0  # seconds of service after which a death counts as the first


@dataclass(slots=True)
class Restarts:
    """Of one slot. Only loads that fail end it: what requests do to a replica says nothing about the next one."""

    failed_loads: int = 0  # in a row
    served: bool = False  # ever
    _deaths: int = 0  # in a row, of any kind

    def failed(self, service: float | None, *, died: bool) -> float | None:
        """Seconds until the next attempt; None: there is none.

        `service`: seconds that it served; None: it failed while it loaded. `died`: its process did; otherwise it said
        what is wrong, and where it never served that will be so the next time.
        """
        self._deaths = 1 if service is not None and service >= _STEADY else self._deaths + 1
        pause = _PAUSES[min(self._deaths, len(_PAUSES)) - 1]
        if service is not None:
            self.failed_loads, self.served = 0, True
            return min(pause, _LONGEST_AFTER_SERVICE)
        self.failed_loads += 1
        if not self.served and not died:
            return None
        return pause if self.failed_loads < (_ATTEMPTS if self.served else _FIRST_ATTEMPTS) else None
