"""Arguments as pairs of keys and values between tags, read into JSON."""

import re
from collections.abc import Callable
from typing import Any

from quire_engine.text.formats.facts import Pieces, Tagged
from quire_engine.text.formats.json_reader import JsonReader
from quire_engine.text.formats.matching import Reading, Source, Waiting, firsts
from quire_engine.text.formats.schema import MAX_KEY, dumped, escaped, typed, types_of

_STRING, _NULLABLE = frozenset({"string"}), frozenset({"string", "null"})
_NULL = "null"
Tell = Callable[[str], None]


def read_pairs(source: Source, style: Tagged, after: Pieces, schema: dict[str, Any], tell: Tell) -> Reading:
    """Pairs up to where the call is closed; whether it is. What breaks off has been told as far as it is certain."""
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    comma = "{"
    while (yield from source.take(style.key)) is not None:
        key: list[str] = []
        if not (yield from _read_text(source, style.value, key.append, most=MAX_KEY)):
            return False
        name = "".join(key)
        tell(f"{comma}{dumped(name)}: ")
        comma = ", "
        types = types_of(properties.get(name, others), schema)
        if not (yield from _read_value(source, style.close, types, tell)):
            return False
    if (yield from source.find(after)) is None:
        return False
    tell("{}" if comma == "{" else "}")
    return True


def _read_value(source: Source, close: Pieces, types: frozenset[str], tell: Tell) -> Reading:
    """Strings are told as they come; others once they are whole, for only then it is certain what they are."""
    held: list[str] = []
    if types == _NULLABLE:
        while _NULL.startswith("".join(held)):
            if (yield from source.take(close)) is not None:
                tell(typed("".join(held), types))
                return True
            if source.cut or not (yield from source.more()):
                return False
            if "\ud800" <= source.text[source.at] <= "\udfff":
                return False
            held.append(source.text[source.at])
            source.at += 1
    elif types != _STRING:
        if "string" not in types:
            yield from _read_json(source, held.append)
        if not (yield from _read_text(source, close, held.append)):
            return False
        tell(typed("".join(held), types))
        return True
    tell('"' + escaped("".join(held)))
    if not (yield from _read_text(source, close, lambda text: tell(escaped(text)))):
        return False
    tell('"')
    return True


def _read_json(source: Source, tell: Tell) -> Waiting[None]:
    """A list or an object, as far as it is JSON: in its strings may stand what closes it."""
    reader = JsonReader("{[")
    while not reader.done and (yield from source.more()):
        end = reader.take(source.text, source.at)
        tell(source.text[source.at : end])
        source.at = end
        if end < len(source.text):
            break


def _read_text(source: Source, close: Pieces, tell: Tell, *, most: int | None = None) -> Reading:
    """Text as it is up to what closes it; whether that came. A token that is another delimiter breaks it off."""
    stop = re.compile(f"[{re.escape(''.join(sorted(firsts(close))))}\ud800-\udfff]")
    while (yield from source.more()):
        place = stop.search(source.text, source.at)
        end = len(source.text) if place is None else place.start()
        if end == source.at:
            if (yield from source.take(close)) is not None:
                return True
            if source.cut or "\ud800" <= source.text[source.at] <= "\udfff":
                return False
            end = source.at + 1
        if most is not None:
            most -= end - source.at
            if most < 0:
                return False
        tell(source.text[source.at : end])
        source.at = end
    return False
