"""docs/tools.md has every format by all its names, with a call as the family's own chat template writes it."""

from pathlib import Path
from typing import Any

import pytest
from call_formats import family
from quire_engine.text.formats.facts import Either, Mark, Maybe, Pieces, Space, Text
from quire_engine.text.formats.families import CALL_NAMES, CALLS, REASONING, REASONING_NAMES

DOCUMENT = Path(__file__).parents[2] / "docs" / "tools.md"


def code(text: str) -> str:
    """As a cell of a table has it."""
    return f"`{text.strip().replace('|', chr(92) + '|').replace(chr(10), '⏎')}`"


def others(name: str, names: dict[str, str]) -> str:
    return ", ".join(f"`{other}`" for other, meant in names.items() if meant == name != other) or "–"


def written(pieces: Pieces) -> str:
    """As it is usually written."""
    text = ""
    for piece in pieces:
        if isinstance(piece, Text | Mark):
            text += piece.text
        elif isinstance(piece, Space):
            text += piece.usual
        elif isinstance(piece, Either):
            text += written(piece.options[0])
        elif isinstance(piece, Maybe):
            text += written(piece.pieces)
    return text


def rows() -> dict[str, str]:
    arguments: dict[str, Any] = {"a": 1, "b": "x"}
    calls = "".join(
        f"| `{name}` | {others(name, CALL_NAMES)} | {code(family(name).turn('', [('f', arguments)]))} |\n"
        for name in CALLS
    )
    reasoning = "".join(
        f"| `{name}` | {others(name, REASONING_NAMES)} | {code(written(one.begin))} | {code(written(one.end))} |\n"
        for name, one in REASONING.items()
    )
    return {"--tool-call-parser": calls, "--reasoning-parser": reasoning}


def test_every_format_is_in_the_table(request: pytest.FixtureRequest) -> None:
    text = DOCUMENT.read_text()
    for option, table in rows().items():
        head, found, rest = text.partition(f"\n| `{option}` ")
        assert found
        title, rule, *lines = rest.split("\n")
        end = next(place for place, line in enumerate(lines) if not line.startswith("|"))
        shown = "".join(f"{line}\n" for line in lines[:end])
        if request.config.getoption("--write-tables"):
            text = head + found + "\n".join([title, rule]) + "\n" + table + "\n".join(lines[end:])
            DOCUMENT.write_text(text)
            shown = table
        assert shown == table, "run make formats-table"
