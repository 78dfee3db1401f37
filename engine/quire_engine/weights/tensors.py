"""A checkpoint as named tensors that are read slice by slice, straight from the mapped file."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quire_engine.errors import ModelError
from quire_engine.weights.json_file import read_object, refuse_pointer

ReadPart = Callable[[tuple[slice, ...]], Tensor]
WHOLE = slice(None)


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is not read yet. `part` reads a part of it, a slice for each of its first dimensions."""

    name: str
    shape: tuple[int, ...]
    part: ReadPart

    def read(self, *slices: slice) -> Tensor:
        """The part, or all of it. Slices beyond its dimensions must be of everything."""
        while slices and slices[-1] == WHOLE:
            slices = slices[:-1]
        return self.part(slices or (WHOLE,))


class Checkpoint(Protocol):
    """Weights under their Hugging Face names."""

    def names(self) -> list[str]: ...

    def tensor(self, name: str) -> LazyTensor: ...


_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_NO_PARTS = ("adapter_model", "consolidated")  # a LoRA adapter; the same weights in Mistral's own format


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Which file each tensor is in, by the index; None where there is none."""
    path = folder / _INDEX
    if not path.exists():
        return None
    try:
        found: dict[str, str] = read_object(path)["weight_map"]
        strange = [file for file in found.values() if Path(file).name != file]
    except (OSError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{_INDEX} is not a safetensors index ({error}); download it again") from error
    if strange:
        raise ModelError(f"{_INDEX} names {strange[0]!r}, which is no file beside it")
    return found


def _files(folder: Path) -> list[str]:
    """Without an index."""
    if (folder / _SINGLE).exists():
        return [_SINGLE]
    found = sorted(file.name for file in folder.glob("[!.]*.safetensors"))  # macOS leaves hidden ones of that name
    files = [name for name in found if not name.startswith(_NO_PARTS)]
    if not files:
        raise ModelError(
            f"{', '.join(found)}: an adapter, or weights in Mistral's own format, which are not served; merge the "
            f"adapter into its base model, or download {_SINGLE}"
        )
    sets = {(match[1], match[3]) if (match := _NUMBERED.fullmatch(name)) else name for name in files}
    if len(sets) != 1:
        raise ModelError(
            f"which of {', '.join(found)} are the checkpoint is not known without {_INDEX} or {_SINGLE}; download those"
        )
    [one] = sets
    if isinstance(one, str):
        return files
    return [f"{one[0]}-{number:05d}-of-{one[1]}.safetensors" for number in range(1, int(one[1]) + 1)]


def _opened(path: Path) -> Any:
    try:
        refuse_pointer(path)
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{path.name} is not a whole safetensors file ({error}); download or convert the checkpoint again"
        ) from error


class SafetensorsCheckpoint:
    """The safetensors files of a folder that are its checkpoint: those of model.safetensors.index.json, each tensor
    from the file that it names; else model.safetensors; else the one file, or the one whole set of numbered files,
    that is there. Raises ModelError for corrupt, truncated, missing or contradicting files."""

    def __init__(self, folder: Path) -> None:
        self._where: dict[str, Any] = {}
        weight_map = _weight_map(folder)
        files = _files(folder) if weight_map is None else sorted(set(weight_map.values()))
        if missing := [file for file in files if not (folder / file).is_file()]:
            raise ModelError(f"the checkpoint lacks {', '.join(missing)}; download it again")
        handles = {file: _opened(folder / file) for file in files}
        names = {file: list(handle.keys()) for file, handle in handles.items()}
        if weight_map is None:
            weight_map = {name: file for file in files for name in names[file]}
            if len(weight_map) < sum(map(len, names.values())):
                twice = next(name for file in files for name in names[file] if weight_map[name] != file)
                raise ModelError(f"tensor {twice} is in several of {', '.join(files)}; download their {_INDEX}")
        there = {file: set(names[file]) for file in files}
        held = set().union(*there.values())
        for name, file in weight_map.items():
            if name in there[file]:
                self._where[name] = handles[file]
            elif name in held:  # what no file holds (a tied head) converters from pickles leave in the index
                raise ModelError(f"{file} lacks the tensor {name}, which {_INDEX} has there; download both again")

    def names(self) -> list[str]:
        """All tensors."""
        return list(self._where)

    def tensor(self, name: str) -> LazyTensor:
        """Raises ModelError for a name the checkpoint does not have."""
        handle = self._where.get(name)
        if handle is None:
            longer = next((other for other in self._where if other.endswith(f".{name}")), None)
            hint = (
                f"it has {longer}: rename its tensors"
                if longer
                else "is it complete, and of the family its config names?"
            )
            raise ModelError(f"the checkpoint has no tensor {name}; {hint}")
        view = handle.get_slice(name)
        shape = tuple(view.get_shape())

        def part(slices: tuple[slice, ...]) -> Tensor:
            return view[slices] if shape else handle.get_tensor(name)

        return LazyTensor(name, shape, part)


class Weights(Protocol):
    """What layers read from: one rank's view of a checkpoint."""

    dtype: torch.dtype
    device: torch.device

    def __contains__(self, name: str) -> bool: ...

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: slice = WHOLE,
        columns: slice = WHOLE,
        depths: slice = WHOLE,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The part of a tensor whose whole shape must be `shape`, on the rank's device: in the rank's dtype, or in
        `dtype`; integers and 8-bit numbers must be stored as such."""

    def take_all(self, name: str) -> Tensor:
        """A small tensor of any shape, whole: fp32 on the rank's device, integers as they are."""

    def check_all_read(self, ignored: Callable[[str], bool]) -> None:
        """Raises ModelError when the checkpoint holds weights that the model did not ask for."""


class TensorReader:
    """Hands a checkpoint's tensors to the layers of one rank, and knows at the end which were never asked for."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self._checkpoint = checkpoint
        self._names = set(checkpoint.names())
        self._unread = set(self._names)
        self.progress: Callable[[], None] = lambda: None

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor. Raises ModelError when there is none."""
        return self._checkpoint.tensor(name).shape

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: slice = WHOLE,
        columns: slice = WHOLE,
        depths: slice = WHOLE,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The part of a tensor whose whole shape must be `shape`, on the rank's device: in the rank's dtype, or in
        `dtype`; integers and 8-bit numbers must be stored as such."""
        lazy = self._checkpoint.tensor(name)
        if lazy.shape != shape:
            raise ModelError(
                f"tensor {name} has shape {list(lazy.shape)}, the config asks for {list(shape)}; "
                "config and weights do not belong together"
            )
        self._note(name)
        # A copy, always: a view would keep the whole file mapped, and its pages in memory beside the weights.
        part = lazy.read(rows, columns, depths)
        exact = dtype is not None and (dtype.itemsize == 1 or not dtype.is_floating_point)
        if exact and part.dtype != dtype:
            raise ModelError(f"tensor {name} is in {part.dtype}, where {dtype} belongs")
        return part.to(self.device, dtype or self.dtype, copy=True, memory_format=torch.contiguous_format)

    def take_all(self, name: str) -> Tensor:
        """A small tensor of any shape, whole: fp32 on the rank's device, integers as they are."""
        lazy = self._checkpoint.tensor(name)
        self._note(name)
        whole = lazy.read()
        return whole.to(self.device, torch.float32 if whole.is_floating_point() else whole.dtype, copy=True)

    def _note(self, name: str) -> None:
        """Progress is in tensors, of which some are read in parts."""
        if name in self._unread:
            self._unread.discard(name)
            self.progress()

    def check_all_read(self, ignored: Callable[[str], bool]) -> None:
        """Raises ModelError when the checkpoint holds weights that the model did not ask for."""
        left = sorted(name for name in self._unread if not ignored(name) and 0 not in self.shape(name))
        if left:
            shown = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
            raise ModelError(f"the checkpoint holds weights that this family does not use: {shown}")
