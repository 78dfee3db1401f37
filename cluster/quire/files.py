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
        path = Path(given)
        try:
            if path.exists() and not path.is_file():  # devices and pipes may never end
                raise InvalidParameter(f"{what}: {given} is no file; give the path of one", "messages")
            return path.read_bytes()
        except OSError as error:
            raise InvalidParameter(f"{what}: {given} cannot be read ({error.strerror})", "messages") from error
    if hasattr(given, "save") and hasattr(given, "mode"):
        written = BytesIO()
        given.save(written, "PNG")
        return written.getvalue()
    raise InvalidParameter(f"{what} is {given!r:.60}; give a PIL image, the bytes of a file, or a path", "messages")
