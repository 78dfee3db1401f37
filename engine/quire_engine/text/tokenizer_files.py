"""Which file of a tokenizer is at fault, where transformers only says that something is."""

from pathlib import Path

from quire_engine.errors import ModelError
from quire_engine.weights.json_file import read_object, refuse_pointer

_READ_BY_TRANSFORMERS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_CAUSE = 300  # characters of it that are shown


def blame(name: str, folder: Path, error: Exception) -> ModelError:
    """What is wrong with the tokenizer of `name` in `folder`, and the mend. `error`: what transformers raised there."""
    try:
        why = _broken(folder) or _refused(folder, error)
    except (ModelError, OSError) as found:
        why = str(found)
    return ModelError(f"the tokenizer of {name} cannot be read: {why}; or give another one with --tokenizer")


def _broken(folder: Path) -> str | None:
    """A file that is not what its name says. Raises ModelError or OSError for the same."""
    from tokenizers import Tokenizer, __version__

    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name in (*_READ_BY_TRANSFORMERS, "config.json", "tokenizer.json"):
            read_object(file)
        elif file.is_file() and file.name.startswith(("tokenizer", "vocab", "merges", "spiece", "sentencepiece")):
            refuse_pointer(file)
        elif file.suffix == ".jinja":
            try:
                file.read_text("utf-8")
            except UnicodeDecodeError as error:
                return f"{file.name} is no text in UTF-8 ({error}); download it again"
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the class itself is all that tokenizers raises
        return f"tokenizer.json is not one that tokenizers {__version__} reads ({_shown(error)}); download it again"
    return None


def _refused(folder: Path, error: Exception) -> str:
    """Where each file by itself is well."""
    if not (folder / "tokenizer.json").is_file():
        return f"it has no tokenizer.json, and none could be made of what else is there ({_shown(error)}); download it"
    config = folder / "tokenizer_config.json"
    if config.is_file() and "auto_map" in read_object(config):
        return "tokenizer_config.json asks for code of its own (auto_map), which is not run; take auto_map out"
    return f"tokenizer_config.json or a file beside it has what transformers refuses ({_shown(error)}); correct it"


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:_CAUSE]}"
