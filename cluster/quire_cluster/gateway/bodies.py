"""Requests' bodies: read as far as they could be of use, and off the event loop where they are large.

Parsing holds the interpreter's lock from the first byte to the last, so that a thread alone would not help: what is
bounded is the number of values, which is what takes the time.
"""

import asyncio
import re
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from quire_engine.errors import InvalidParameter, RequestError
from starlette.requests import Request

MAX_BODY = 32 << 20  # bytes
MAX_VALUES = (1 << 20) + 1024
_SMALL = 1 << 14  # bytes that are parsed at once
_PIECE = 1 << 16  # bytes
_INSIDE = re.compile(rb'(?:[^"\\]++|\\.)++', re.DOTALL)
Body = TypeVar("Body", bound=BaseModel)


class BodyTooLarge(RequestError):
    """More bytes, or more values, than are read."""


async def read(request: Request, kind: type[Body], most: int) -> Body:
    """The body as `kind`. Raises BodyTooLarge beyond `most` bytes, InvalidParameter for what is wrong in it."""
    data = await _read_bytes(request, min(most, MAX_BODY))
    if len(data) <= _SMALL:
        return parse(kind, data)
    return await asyncio.to_thread(_parse_large, kind, data)


def parse(kind: type[Body], data: bytes) -> Body:
    """Raises InvalidParameter, naming the field."""
    try:
        content = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidParameter(f"the body is not JSON: {error}") from error
    return validated(kind, content)


def validated(kind: type[Body], content: Any) -> Body:
    """The same of what is parsed already."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = [str(part) for part in first["loc"]]
        if unknown := first.get("ctx", {}).get("field"):
            where = [*where, unknown]
            raise InvalidParameter(f"{'.'.join(where)} {first['msg']}", where[0]) from error
        raise InvalidParameter(
            f"{'.'.join(where) or 'the body'}: {first['msg']}", where[0] if where else None
        ) from error


def _parse_large(kind: type[Body], data: bytes) -> Body:
    if _weight(data, 0, len(data)) > MAX_VALUES and _weight_outside_texts(data) > MAX_VALUES:
        raise BodyTooLarge(
            f"the body holds more than {MAX_VALUES} values, where an object or a list counts as four and a name as "
            "eight; send fewer"
        )
    return parse(kind, data)


def _weight(data: bytes, start: int, end: int) -> int:
    """By what parsing takes: every new name is a text of its own, to be hashed."""
    values, containers = data.count(b",", start, end), data.count(b"{", start, end) + data.count(b"[", start, end)
    return values + 4 * containers + 8 * data.count(b":", start, end)


def _weight_outside_texts(data: bytes) -> int:
    """Of what is not within JSON's strings; strings weigh as well. It goes in small pieces, between which other threads
    run, and no further than to what is too much."""
    weight, strings, at = 0, 0, 0
    while weight <= MAX_VALUES:
        quote = data.find(b'"', at)
        weight += _weight(data, at, quote if quote >= 0 else len(data))
        if quote < 0:
            break
        strings += 1
        if strings > 2 * MAX_VALUES:  # names and texts
            return strings
        at = quote + 1
        while (more := _INSIDE.match(data, at, at + _PIECE)) is not None:
            at = more.end()
        at += 1  # the quote that ends it
    return weight


async def _read_bytes(request: Request, most: int) -> bytes:
    """Raises BodyTooLarge as soon as it is known, without reading on."""
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > most:
        raise BodyTooLarge(f"the body has {announced} bytes; at most {most} are read")
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > most:
            raise BodyTooLarge(f"the body has more than {most} bytes, which is the most that is read")
        chunks.append(chunk)
    return b"".join(chunks)
