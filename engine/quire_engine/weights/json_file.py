"""JSON files of a checkpoint, whatever lies in their place."""

import codecs
import json
from pathlib import Path
from typing import Any

from quire_engine.errors import ModelError

_LFS_POINTER = b"version https://git-lfs"


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file. Raises ModelError, which says what is there instead, and OSError where nothing can be
    read."""
    refuse_pointer(path)
    data = path.read_bytes()
    if data.startswith(codecs.BOM_UTF8):
        raise ModelError(f"{path.name} begins with a byte order mark, which is no JSON; save it as UTF-8 without one")
    try:
        found = json.loads(data.decode(), object_hook=_infinities)
    except RecursionError as error:
        raise ModelError(f"{path.name} is nested too deep; download it again") from error
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path.name} is not JSON in UTF-8 ({error}); download it again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path.name} is not a JSON object; download it again")
    return found


def refuse_pointer(path: Path) -> None:
    """Raises ModelError for what Git LFS leaves in a file's place and for what is no file (a pipe would be waited for),
    and OSError where nothing can be read."""
    if path.exists() and not path.is_file():
        raise ModelError(f"{path.name} is no regular file; download it again")
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ModelError(f"{path.name} is only a pointer of Git LFS; fetch the file itself (git lfs pull)")


def _infinities(value: dict[str, Any]) -> Any:
    """As transformers writes them in JSON."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value
