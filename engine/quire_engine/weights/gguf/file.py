"""GGUF files: the header is parsed here, with bounds (the `gguf` package's reader takes seconds and trusts the file);
quantized blocks are decoded by that package. Format: ggml's docs/gguf.md, versions 2 and 3."""

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quire_engine.errors import ModelError
from quire_engine.step import Floats

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_MAX_COUNT = 1 << 24
READABLE = (
    "F32",
    "F16",
    "BF16",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ3_XXS",
    "IQ3_S",
    "IQ4_NL",
    "IQ4_XS",
    "TQ1_0",
    "TQ2_0",
    "MXFP4",
)
_SPLIT_NAME = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class GGUFTensorInfo:
    """Where a tensor lies. `shape` in torch's order (rows first)."""

    name: str
    shape: tuple[int, ...]
    quantization: str
    part: int  # of a model that is split into several files
    offset: int
    num_bytes: int


class GGUFFile:
    """The metadata and the tensor table of one file, or of all files that a model is split into, found by the first's
    name. Raises ModelError for anything that is not whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        parts = [_Part(path, 0)]
        self.metadata = parts[0].metadata
        count = self.metadata.get("split.count", 1)
        if count > 1:
            if self.metadata.get("split.no", 0) != 0:
                raise ModelError(f"{path.name} is a later part of a model in {count} files; give the first")
            names = split_names(path, count)
            if names is None:
                raise ModelError(
                    f"{path.name} is one of {count}, and its name does not end in -00001-of-{count:05}.gguf"
                )
            parts += [_Part(path.with_name(name), number) for number, name in enumerate(names[1:], 1)]
        self._maps = [part.map for part in parts]
        self.tensors = {name: info for part in parts for name, info in part.tensors.items()}
        expected = self.metadata.get("split.tensors.count", len(self.tensors))
        if len(self.tensors) != expected:
            raise ModelError(
                f"{path.name} and its other parts hold {len(self.tensors)} tensors of {expected}; download them again"
            )

    def read(self, info: GGUFTensorInfo, rows: slice) -> Floats:
        """Rows of a tensor in fp32. Quantized blocks never cross a row, so only these rows are decoded."""
        from gguf import dequantize
        from gguf.constants import GGMLQuantizationType

        if info.quantization not in READABLE:
            raise ModelError(
                f"tensor {info.name} is in {info.quantization}; read are {', '.join(READABLE)}; quantize it so"
            )
        raw = np.frombuffer(self._maps[info.part], np.uint8, info.num_bytes, info.offset)
        raw = raw.reshape(info.shape[0], -1)[rows]
        if info.quantization in ("F32", "F16"):
            raw = raw.view(np.float32 if info.quantization == "F32" else np.float16)
        values = dequantize(raw, GGMLQuantizationType[info.quantization])
        return np.array(values, np.float32).reshape(-1, *info.shape[1:])


def shown(value: Any) -> str:
    """What a file says, in words short enough for an error; texts of a list without their marks."""
    if isinstance(value, list):
        return ", ".join(str(one)[:80] for one in value[:8]) + (", …" if len(value) > 8 else "")
    return repr(value)[:80]


def model_name(path: Path) -> str:
    """The file's name without its ending and the number of its part."""
    split = _SPLIT_NAME.fullmatch(path.name)
    return split["stem"] if split else path.stem


def split_names(path: Path, count: int) -> list[str] | None:
    """The names of the `count` files that a model is split into, `path` being one; None where its name says
    otherwise."""
    split = _SPLIT_NAME.fullmatch(path.name)
    if split is None or int(split["count"]) != count:
        return None
    return [f"{split['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


class _Part:
    """One file's header."""

    def __init__(self, path: Path, part: int) -> None:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        self.path = path
        try:
            with path.open("rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path.name} cannot be read: {error}") from error
        self._at = 0
        if self.map[:4] != b"GGUF":
            raise ModelError(f"{path.name} is not a GGUF file (its first bytes are not 'GGUF')")
        self._at = 4
        version = self._scalar("<I")
        if version not in (2, 3):
            raise ModelError(f"{path.name} has GGUF version {version}; versions 2 and 3 are read; convert it again")
        num_tensors, num_fields = self._count("<Q"), self._count("<Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("<I"))
        described = []
        for _ in range(num_tensors):
            name = self._string()
            dims = [self._scalar("<Q") for _ in range(self._count("<I", 8))]
            described.append((name, tuple(reversed(dims)), self._scalar("<I"), self._scalar("<Q")))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ModelError(f"{path.name}: general.alignment is {alignment!r}; the file is corrupt")
        base = -(-self._at // alignment) * alignment
        self.tensors: dict[str, GGUFTensorInfo] = {}
        for name, shape, type_id, offset in described:
            try:
                kind = GGMLQuantizationType(type_id)
            except ValueError as error:
                raise ModelError(f"{path.name}: tensor {name} has unknown type {type_id}") from error
            block, size = GGML_QUANT_SIZES[kind]
            elements = int(np.prod(shape, dtype=object)) if shape else 1
            if not elements or not shape or shape[-1] % block:
                raise ModelError(f"{path.name}: tensor {name} of shape {list(shape)} is not made of {kind.name} blocks")
            num_bytes = elements // block * size
            if base + offset + num_bytes > len(self.map):
                raise ModelError(
                    f"{path.name} is truncated: tensor {name} ends at byte {base + offset + num_bytes} of "
                    f"{len(self.map)}; download it again"
                )
            self.tensors[name] = GGUFTensorInfo(name, shape, kind.name, part, base + offset, num_bytes)

    def _take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self.map):
            raise ModelError(
                f"{self.path.name} is truncated or corrupt: its header ends in the middle; download it again"
            )
        data = self.map[self._at : end]
        self._at = end
        return data

    def _scalar(self, code: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _count(self, code: str, most: int = _MAX_COUNT) -> int:
        count = self._scalar(code)
        if count > most:
            raise ModelError(f"{self.path.name} is corrupt: its header counts {count} entries; download it again")
        return count

    def _string(self) -> str:
        return self._take(self._count("<Q", 1 << 28)).decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            element, count = self._scalar("<I"), self._count("<Q")
            if element in _SCALARS:
                code = _SCALARS[element]
                data = self._take(count * struct.calcsize(code))
                return list(struct.unpack(f"<{count}{code[1]}", data))
            return [self._value(element) for _ in range(count)]
        raise ModelError(f"{self.path.name} is corrupt: metadata of unknown type {kind}; download it again")
