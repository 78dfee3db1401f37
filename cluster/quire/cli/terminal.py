"""What the commands read from a terminal and write to it: any text, in any encoding."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from quire_engine.errors import ServerError


def prepare() -> None:
    """No character stops the program: what a terminal cannot show is escaped, what was not typed in its encoding is
    U+FFFD."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def say(text: str, end: str = "\n") -> None:
    """To standard output, as it is and at once. Raises as `flush` does."""
    with _writing():
        print(text, end=end, flush=True)


def flush() -> None:
    """What waits for standard output. Raises BrokenPipeError when nobody reads it any more, ServerError where it cannot
    be written."""
    with _writing():
        print(end="", flush=True)


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ServerError(f"the output cannot be written: {error.strerror}") from error


def ask(prompt: str) -> str | None:
    """A line that is not blank; None at the end of input."""
    if sys.stdin is None:  # it was closed before this program began
        return None
    try:
        while not (line := input(prompt).strip()):
            pass
    except (EOFError, KeyboardInterrupt):
        say("")
        return None
    return line
