"""A GGUF file's tensors under their Hugging Face names."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from quire_engine.errors import ModelError
from quire_engine.weights.gguf.families import config_of, family_of
from quire_engine.weights.gguf.file import GGUFFile, GGUFTensorInfo
from quire_engine.weights.gguf.layouts import TENSORS, Made
from quire_engine.weights.tensors import WHOLE, LazyTensor

_READ_ELSEWHERE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # by the config


class GGUFCheckpoint:
    """What a checkpoint is, of one file."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self._family = family_of(file)
        self._config = config_of(file)
        self._stems = {**TENSORS, **self._family.tensors}
        self._where: dict[str, tuple[GGUFTensorInfo, int | None]] = {}  # with the number of an expert
        self._made: dict[str, tuple[Made, Sequence[GGUFTensorInfo]]] = {}
        parts = self._find_made()
        for name, info in file.tensors.items():
            if name in parts or name in _READ_ELSEWHERE:
                continue
            found = self._hugging_face_name(name)
            if "*" in found:
                for expert in range(info.shape[0]):
                    self._where[found.replace("*", str(expert))] = info, expert
            else:
                self._where[found] = info, None

    def _find_made(self) -> set[str]:
        """Fills in what is made; → the parts."""
        used: set[str] = set()
        tensors = self._file.tensors
        blocks = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
        for block in blocks:
            for target, made in self._family.made.items():
                names = [f"blk.{block}.{part}" for part in made.parts]
                if all(name in tensors for name in names):
                    used.update(names)
                    self._made[f"{self._family.layers}.{block}.{target}"] = made, [tensors[name] for name in names]
        return used

    def _hugging_face_name(self, name: str) -> str:
        """One that nobody knows keeps its own name within its layer."""
        stem, _, kind = name.rpartition(".")
        if block := re.fullmatch(r"blk\.(\d+)\.(.+)", stem):
            return f"{self._family.layers}.{block[1]}.{self._stems.get(block[2], block[2])}.{kind}"
        return f"{self._stems.get(stem, stem)}.{kind}"

    def names(self) -> list[str]:
        """All tensors."""
        return [*self._where, *self._made]

    def tensor(self, name: str) -> LazyTensor:
        """Raises ModelError for a name the file does not have."""
        if name in self._made:
            return self._made_tensor(name)
        if name not in self._where:
            raise ModelError(f"the GGUF file has no tensor for {name}; is it whole?")
        info, expert = self._where[name]
        less = 1.0 if self._family.norms_from_one and name.endswith("norm.weight") else 0.0
        shape = info.shape if expert is None else info.shape[1:]

        def part(slices: tuple[slice, ...]) -> Tensor:
            if expert is not None:
                return self._read(info, slice(expert, expert + 1))[0][slices]
            rows = self._read(info, slices[0])[(WHOLE, *slices[1:])]
            return rows - less if less else rows

        return LazyTensor(name, shape, part)

    def _read(self, info: GGUFTensorInfo, rows: slice) -> Tensor:
        return torch.from_numpy(self._file.read(info, rows))

    def _made_tensor(self, name: str) -> LazyTensor:
        made, infos = self._made[name]

        def make(parts: list[Tensor]) -> Tensor:
            try:
                return made.make(parts, self._config)
            except RuntimeError as error:
                shapes = ", ".join(f"{info.name} {list(info.shape)}" for info in infos)
                raise ModelError(f"{shapes} do not fit the file's metadata; convert the checkpoint again") from error

        shape = make([torch.empty(info.shape, device="meta") for info in infos]).shape

        def part(slices: tuple[slice, ...]) -> Tensor:
            return make([self._read(info, WHOLE) for info in infos])[slices]

        return LazyTensor(name, tuple(shape), part)
