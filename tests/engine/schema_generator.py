"""JSON schemas drawn at random, the same ones each time."""

import random
from typing import Any

_WORDS = ("id", "name", "Größe", "a b", "x-y", "items", "type", "value", "né", "n1")
_PATTERNS = ("^[a-z]{1,4}$", "^[A-Z]\\d*$", "[xyz]", "^(ab|cd)+$", "^\\S+$", '^[^\\x00-\\x1f"]{0,6}$')
_FORMATS = ("date", "time", "date-time", "email", "ipv4", "uuid", "hostname")


def generated(count: int) -> dict[str, dict[str, Any]]:
    """So many of them, by name."""
    return {f"generated {seed}": _Draw(seed).schema(depth=3) for seed in range(count)}


class _Draw:
    """Draws one schema. What it refers to are definitions, of which the last is the plainest."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def schema(self, depth: int) -> dict[str, Any]:
        root = self._any(depth)
        if self._random.random() < 0.4 and "anyOf" not in root:
            return {"anyOf": [root, {"$ref": "#/$defs/more"}], "$defs": {"more": self._recursive()}}
        return root

    def _recursive(self) -> dict[str, Any]:
        """An object that may hold another of its kind."""
        child = {"$ref": "#/$defs/more"}
        inner = self._random.choice(
            [child, {"anyOf": [{"type": "null"}, child]}, {"type": "array", "items": child, "maxItems": 2}]
        )
        found = self._object(1)
        found["properties"]["inner"] = inner
        return found

    def _any(self, depth: int) -> dict[str, Any]:
        leaves = [self._string, self._number, self._enum, lambda: {"type": self._random.choice(["boolean", "null"])}]
        branches = [lambda: self._object(depth - 1), lambda: self._array(depth - 1), lambda: self._union(depth - 1)]
        return self._random.choice(leaves + branches * 2 if depth else leaves)()

    def _string(self) -> dict[str, Any]:
        kind = self._random.choice(["plain", "length", "pattern", "format"])
        if kind == "pattern":
            return {"type": "string", "pattern": self._random.choice(_PATTERNS)}
        if kind == "format":
            return {"type": "string", "format": self._random.choice(_FORMATS)}
        return {"type": "string"} | (self._range("minLength", "maxLength", 0, 8) if kind == "length" else {})

    def _number(self) -> dict[str, Any]:
        kind = self._random.choice(["integer", "number"])
        exclusive = self._random.random() < 0.3
        names = ("exclusiveMinimum", "exclusiveMaximum") if exclusive else ("minimum", "maximum")
        found: dict[str, Any] = {"type": kind} | self._range(*names, -200, 200, least=2)
        if self._random.random() < 0.2:
            return {
                "type": kind,
                "multipleOf": self._random.choice([2, 3, 5, 12] + ([0.5, 0.1] if kind == "number" else [])),
            }
        return found

    def _enum(self) -> dict[str, Any]:
        values = [None, True, 0, -3, 2.5, "", "yes", "ja\n", '"', "日", [], [1], {"a": 1}]
        return {"enum": self._random.sample(values, self._random.randint(1, 4))}

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._random.sample(_WORDS, self._random.randint(0, 4))
        found: dict[str, Any] = {
            "type": "object",
            "properties": {name: self._any(depth) for name in names},
            "required": [name for name in names if self._random.random() < 0.6],
        }
        if self._random.random() < 0.7:
            found["additionalProperties"] = self._random.choice([False, False, self._any(0)])
        return found

    def _array(self, depth: int) -> dict[str, Any]:
        found = {"type": "array", "items": self._any(depth)} | self._range("minItems", "maxItems", 0, 3)
        if self._random.random() < 0.3:
            found["prefixItems"] = [self._any(0) for _ in range(self._random.randint(1, 2))]
        return found

    def _union(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self._any(depth) for _ in range(self._random.randint(2, 3))]}

    def _range(self, low: str, high: str, start: int, end: int, least: int = 0) -> dict[str, int]:
        """Bounds that have at least `least` between them, or one bound, or none."""
        first = self._random.randint(start, end - least)
        found = {low: first, high: self._random.randint(first + least, end)}
        return {name: found[name] for name in found if self._random.random() < 0.7}
