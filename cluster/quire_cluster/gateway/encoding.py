"""Answers to JSON, in pieces between which other threads run: orjson keeps the interpreter's lock for a whole call."""

from typing import Any

import orjson

_LONG = 256  # entries of a list that are encoded at once


def in_pieces(value: Any) -> Any:
    """The same with its long lists encoded already."""
    if isinstance(value, dict):
        return {name: in_pieces(one) for name, one in value.items()}
    if isinstance(value, list) and len(value) > _LONG:
        shares = (value[start : start + _LONG] for start in range(0, len(value), _LONG))
        return orjson.Fragment(b"[" + b",".join(orjson.dumps(share)[1:-1] for share in shares) + b"]")
    return value
