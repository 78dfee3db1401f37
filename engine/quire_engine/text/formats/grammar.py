"""Calls as a grammar, in llguidance's Lark: made of the same facts that the parser reads by."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quire_engine.errors import InvalidParameter
from quire_engine.text.formats.bind import BoundFormat
from quire_engine.text.formats.facts import Blank, Either, Json, Mark, Maybe, Pieces, Section, Space, Style, Text
from quire_engine.text.formats.tools import Tool

_WHITESPACE = r"[ \n]{1,64}"  # in JSON where it may be: without a bound, a model may write it for ever
Opener = tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True)
class CallRules:
    """Rules of a grammar, named `calls_...`."""

    lark: str  # `calls_open` and `calls_body`: a section's opener and all the rest of it; `calls_all`: all calls
    openers: list[Opener]  # what begins a section within content: texts and token ids, one after the other
    first_openers: list[Opener]  # what does only where content begins
    repeats: bool  # whether a further section may follow one


def call_rules(form: BoundFormat, tools: Sequence[Tool], *, parallel: bool, most: int) -> CallRules:
    """Calls of these tools, `most` at most, and one where they are not `parallel`. Raises InvalidParameter for a tool
    whose schema cannot be a grammar."""
    if form.written is None or not tools:
        raise InvalidParameter(
            "this model's format has no tool calls; leave tool_choice out, or have the server started with a "
            "tool-call parser",
            "tool_choice",
        )
    return _Writer(form, tools).rules(form.written, most if parallel else 1)


class _Writer:
    """Facts to rules."""

    def __init__(self, form: BoundFormat, tools: Sequence[Tool]) -> None:
        self._form = form
        self._tools = tools
        self._tokens = form.tokens
        self._rules: dict[str, str] = {}

    def rules(self, section: Section, most: int) -> CallRules:
        """All of them, of one way to write calls."""
        opening, rest = self._opening(section)
        calls = [self._call(section, tool, place) for place, tool in enumerate(self._tools)]
        self._rules["calls_one"] = " | ".join(calls)
        more = max(most - 1, 0)
        several = ""
        if section.between is not None and more:
            several = f" ({self._sequence(section.between)} calls_one){{0,{more}}}"
        self._rules["calls_open"] = self._sequence(opening)
        self._rules["calls_body"] = f"{self._sequence(rest)} calls_one{several} {self._sequence(section.end)}"
        whole = "calls_open calls_body"
        if section.between is None and section.repeats and more:
            whole += f" ({self._sequence(section.apart)} {whole}){{0,{more}}}"
        self._rules["calls_all"] = whole
        opener = self._opener(opening)
        return CallRules(
            lark="\n".join(f"{name}: {rule}" for name, rule in self._rules.items()),
            openers=[] if section.only_first else [opener],
            first_openers=[opener] if section.only_first else [],
            repeats=section.repeats and most > 1,
        )

    def _call(self, section: Section, tool: Tool, place: int) -> str:
        call = section.call
        name = call.before.index(Blank.NAME)
        before = (*call.before[:name], Text(tool.name), *call.before[name + 1 :])
        if before and self._in_opening(section):
            before = before[len(self._in_opening(section)) :]
        self._rules[f"calls_of_{place}"] = " ".join(
            (self._sequence(before), self._arguments(call.arguments, tool, place), self._sequence(call.after))
        )
        return f"calls_of_{place}"

    def _opening(self, section: Section) -> tuple[Pieces, Pieces]:
        """A section's beginning, cut behind what tells that it is one."""
        begin = tuple(piece for piece in section.begin if not isinstance(piece, Space))
        return (
            (begin[:1], section.begin[section.begin.index(begin[0]) + 1 :])
            if begin
            else (self._in_opening(section), ())
        )

    def _in_opening(self, section: Section) -> Pieces:
        """What of a call begins its section, where nothing else does."""
        return () if section.begin else section.call.before[:1]

    def _opener(self, pieces: Pieces) -> Opener:
        return tuple(
            self._tokens[piece.text] if isinstance(piece, Mark) else piece.text
            for piece in pieces
            if isinstance(piece, Text | Mark)
        )

    def _sequence(self, pieces: Pieces) -> str:
        return " ".join(written for piece in pieces if (written := self._piece(piece))) or '""'

    def _piece(self, piece: Any) -> str:
        if isinstance(piece, Text):
            return quoted(piece.text)
        if isinstance(piece, Mark):
            return f"<[{self._tokens[piece.text]}]>"
        if isinstance(piece, Space):
            return f"{quoted(piece.usual)}?" if piece.usual else ""
        if isinstance(piece, Maybe):
            return f"({self._sequence(piece.pieces)})?"
        if isinstance(piece, Either):
            return f"({self._sequence(piece.options[0])})"
        assert piece in (Blank.INDEX, Blank.ID), "a call has one name"
        return "/[0-9]{1,3}/" if piece is Blank.INDEX else "/[a-zA-Z0-9]{9}/"

    def _arguments(self, style: Style, tool: Tool, place: int) -> str:
        assert isinstance(style, Json)
        return "%json " + json.dumps(json_schema(tool))


def json_schema(tool: Tool) -> dict[str, Any]:
    """A tool's schema as llguidance takes it. Raises InvalidParameter for one that it does not."""
    from llguidance import LLMatcher

    options: dict[str, Any] = {"whitespace_pattern": _WHITESPACE, "lenient": not tool.strict}
    schema = {key: value for key, value in tool.parameters.items() if key != "x-guidance"} | {"x-guidance": options}
    problem = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(schema))
    if problem:
        mend = "leave out strict, or what is named" if tool.strict else "mend its schema"
        raise InvalidParameter(
            f"the parameters of tool {tool.name!r} cannot be kept to: {problem[:300]}; {mend}", "tools"
        )
    return schema


def quoted(text: str) -> str:
    """A text as a literal of the grammar."""
    return json.dumps(text, ensure_ascii=False)
