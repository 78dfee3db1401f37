"""Where built kernels and converted tokenizers are kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$QUIRE_CACHE`, else `quire` in the XDG cache folder."""
    if chosen := os.environ.get("QUIRE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quire"
