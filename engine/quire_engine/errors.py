"""Everything that can go wrong, in two branches: the caller's and ours.

    QuireError
    ├── RequestError            the caller's: the same call will fail again
    │   ├── InvalidParameter    a value that is malformed or out of bounds (names the parameter)
    │   ├── ContextTooLong      the prompt, with what is to be generated, does not fit the context
    │   ├── UnknownModel        no such model here
    │   ├── Unauthenticated     nobody knows who calls
    │   ├── Forbidden           it is known, and may not
    │   ├── PolicyStop          a policy refuses what was sent
    │   ├── QueueFull           admission refused: try again later
    │   ├── LimitReached        its tenant has what it may have: try again later
    │   └── DeadlineExceeded    the caller's deadline passed
    └── ServerError             ours
        ├── ModelError          a checkpoint or its configuration cannot be served (says what would be)
        ├── OutOfMemory         the model or its cache does not fit this device
        ├── Unavailable         nothing can serve this now: starting, draining or rebuilding
        └── EngineFailure       a replica failed while it computed
            └── PoisonRequest   replicas died under a request, and would again

Every message says what was wrong and how to mend it. Messages that reach clients hold no paths and no addresses.
"""


class QuireError(Exception):
    """The root."""


class RequestError(QuireError):
    """The caller's fault."""


class InvalidParameter(RequestError):
    """`parameter` is the name the caller used, or None where no single one is at fault."""

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class ContextTooLong(InvalidParameter):
    """Can never fit, whatever else runs."""


class UnknownModel(InvalidParameter):
    """No model of this name is served."""


class Unauthenticated(RequestError):
    """No key, or none that is good."""


class Forbidden(RequestError):
    """Not for this caller."""


class PolicyStop(RequestError):
    """What was sent may not be asked here."""


class QueueFull(RequestError):
    """As many requests wait as may."""


class LimitReached(RequestError):
    """`limit`: which of the tenant's, by its option's name. `retry_after`: seconds until there should be room.
    `headers`: HTTP's, that say how much is left."""

    def __init__(self, message: str, *, limit: str, retry_after: float, headers: dict[str, str]) -> None:
        super().__init__(message)
        self.limit = limit
        self.retry_after = retry_after
        self.headers = headers


class DeadlineExceeded(RequestError):
    """The deadline passed before the end."""


class ServerError(QuireError):
    """Ours."""


class ModelError(ServerError):
    """Cannot be loaded or served."""


class OutOfMemory(ServerError):
    """Does not fit."""


class Unavailable(ServerError):
    """Not now. `retry_after`: seconds until it should be, as far as is known."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineFailure(ServerError):
    """A replica failed."""


class PoisonRequest(EngineFailure):
    """Replicas died under it; trying again would cost another."""


BY_NAME: dict[str, type[QuireError]] = {
    kind.__name__: kind
    for kind in (
        InvalidParameter,
        ContextTooLong,
        UnknownModel,
        QueueFull,
        DeadlineExceeded,
        ModelError,
        OutOfMemory,
        Unavailable,
        EngineFailure,
    )
}
