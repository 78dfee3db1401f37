"""Plans and results as bytes that one host sends another: MessagePack of a closed list of types, so that whoever
reaches the port can at worst send wrong numbers, never code."""

from dataclasses import fields
from typing import Any

import msgpack
import numpy as np
from quire_engine.cache.images import Inputs
from quire_engine.request import EngineSampling, ImageSpan, TokenSet
from quire_engine.step import Encode, NewRow, StepImages, StepPlan, StepResult, TokenLogprobs

_RECORDS = (StepPlan, NewRow, EngineSampling, TokenSet, StepResult, TokenLogprobs, ImageSpan, StepImages, Encode)
_NAMES = {kind: [f.name for f in fields(kind)] for kind in _RECORDS}
_ARRAYS = ("<i4", "<i8", "<f4", "|b1", "|u1", "<f2", "<f8")
_TUPLE = len(_RECORDS)  # codes of MessagePack's extension types: a record's place in the list, then these
_ARRAY = _TUPLE + 1


def _packed(value: Any) -> Any:
    """What MessagePack does not know itself."""
    if isinstance(value, tuple):
        return msgpack.ExtType(_TUPLE, _pack(list(value)))
    if isinstance(value, np.ndarray):
        form = value.dtype.newbyteorder("<").str
        return msgpack.ExtType(_ARRAY, _pack([_ARRAYS.index(form), value.shape, value.astype(form).tobytes()]))
    if isinstance(value, np.generic):
        return value.item()
    code = _RECORDS.index(type(value))
    return msgpack.ExtType(code, _pack([getattr(value, name) for name in _NAMES[type(value)]]))


def _unpacked(code: int, data: bytes) -> Any:
    content = _unpack(data)
    if code == _TUPLE:
        return tuple(content)
    if code == _ARRAY:
        form, shape, raw = content
        return np.frombuffer(raw, _ARRAYS[form]).reshape(shape).copy()
    kind = _RECORDS[code]
    return kind(**dict(zip(_NAMES[kind], content, strict=True)))


def _pack(value: Any) -> bytes:
    return msgpack.packb(value, default=_packed, strict_types=True)


def _unpack(data: bytes) -> Any:
    return msgpack.unpackb(data, ext_hook=_unpacked, strict_map_key=False)


def to_bytes(message: StepPlan | StepResult) -> bytes:
    """A plan or a result."""
    return _pack(message)


def from_bytes(data: bytes) -> Any:
    """The reverse. Raises ValueError, TypeError or IndexError for anything else."""
    return _unpack(data)


def image_to_bytes(inputs: Inputs) -> bytes:
    """What a vision tower reads of an image."""
    return _pack(dict(inputs))


def image_from_bytes(data: bytes | bytearray) -> dict[str, Any]:
    """The reverse. Raises as `from_bytes`."""
    found = _unpack(bytes(data))
    if not isinstance(found, dict) or not all(isinstance(value, np.ndarray) for value in found.values()):
        raise ValueError("this is no image")
    return found
