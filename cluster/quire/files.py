"""Images as callers have them: PIL images, the bytes of files, paths."""

import os
from io import BytesIO
from pathlib import Path
from typing import Any

from quire_engine.errors import InvalidParameter


def file_of(given: Any, what: str) -> bytes:
    """The bytes of a file, which of a PIL image is a PNG. Raises InvalidParameter, naming it as `what`."""
    if isinstance(given, bytes):
        return given
    if isinstance(given, str | os.PathLike):
        try:
            return Path(given).read_bytes()
        except OSError as error:
            raise InvalidParameter(f"{what}: {given} cannot be read ({error.strerror})", "messages") from error
    if hasattr(given, "save") and hasattr(given, "mode"):
        written = BytesIO()
        given.save(written, "PNG")
        return written.getvalue()
    raise InvalidParameter(f"{what} is {given!r:.60}; give a PIL image, the bytes of a file, or a path", "messages")
