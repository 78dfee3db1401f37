"""Marked text to content, reasoning and calls, as it comes.

How the text is cut makes no difference: whatever may yet turn into a delimiter is held back until it is told.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from quire_engine.text.formats.bind import BoundFormat
from quire_engine.text.formats.facts import Blank, Literals, Mark, Pieces, Section, Space, Tagged, Text, leading
from quire_engine.text.formats.json_reader import JsonReader
from quire_engine.text.formats.literals import LiteralReader
from quire_engine.text.formats.matching import MAX_SPACE, Found, Reading, Source, find, firsts
from quire_engine.text.formats.tagged import read_pairs
from quire_engine.text.formats.tools import Tool

_SPACES = " \t\n\r"
Kind: TypeAlias = Literal["content", "reasoning", "call", "arguments"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an output. A "call" begins one, `text` being its whole name, that of a tool; "arguments" go on with the
    JSON of the call begun last."""

    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class _Rule:
    """A delimiter and what it does."""

    pieces: Pieces
    does: Literal["opens reasoning", "closes reasoning", "begins calls", "nothing"]
    section: Section | None = None


class OutputParser:
    """One output of a model."""

    def __init__(
        self, form: BoundFormat, tools: Sequence[Tool], *, in_reasoning: bool, only_calls: bool = False
    ) -> None:
        """No tools: calls are not looked for. `only_calls`: the output is made to have no content, so what may be the
        beginning of a delimiter is one, also where it breaks off."""
        self._only_calls = only_calls
        self.in_reasoning = in_reasoning and form.reasoning is not None
        self._tools = {tool.name: tool for tool in tools}
        self._shown = {} if tools else {letter: form.spelled[letter] for letter in form.shown}
        self._looked_for = {
            "reasoning": _looked_for(_rules_of_reasoning(form, bool(tools))),
            "begin": _looked_for(_rules(form, bool(tools), begins=True)),
            "content": _looked_for(_rules(form, bool(tools), begins=False)),
        }
        self._source = Source()
        self._told: list[Piece] = []
        self._begins = True  # no content has come yet
        self._after_delimiter = self.in_reasoning  # whose whitespace is not the text's
        self._running = self._read()

    def push(self, text: str) -> list[Piece]:
        """Marked text in, what is certain out."""
        self._source.push(text)
        next(self._running)
        return self._merged()

    def finish(self) -> list[Piece]:
        """What was held back, once it is certain that nothing follows."""
        self._source.ended = True
        for _ in self._running:
            raise AssertionError("a reader waits for more of a text that has ended")
        return self._merged()

    def _merged(self) -> list[Piece]:
        merged: list[Piece] = []
        for piece in self._told:
            if merged and merged[-1].kind == piece.kind != "call":
                merged[-1] = Piece(piece.kind, merged[-1].text + piece.text)
            else:
                merged.append(piece)
        self._told.clear()
        return merged

    def _tell(self, kind: Kind, text: str) -> None:
        if text:
            self._told.append(Piece(kind, text))

    def _tell_arguments(self, text: str) -> None:
        self._tell("arguments", text)

    def _read(self) -> Iterator[None]:
        source = self._source
        while (yield from source.more()):
            if self._after_delimiter:
                text = source.text[source.at :].lstrip(_SPACES)
                source.at = len(source.text) - len(text)
                self._after_delimiter = not text
                if not text:
                    continue
            where = "reasoning" if self.in_reasoning else "begin" if self._begins else "content"
            rules, stop = self._looked_for[where]
            place = stop.search(source.text, source.at)
            if place is None or place.start() > source.at:
                self._pass(len(source.text) if place is None else place.start())
                continue
            for rule in rules:
                found = yield from source.take(rule.pieces, self._tools)
                if found is not None:
                    yield from self._delimited(rule, found)
                    break
                if source.ended and self._is_begun(rule):
                    source.at = len(source.text)
                    break
            else:
                if source.cut and self._only_calls and not self.in_reasoning:
                    return
                self._pass(source.at + 1)

    def _is_begun(self, rule: _Rule) -> bool:
        """Whether a text that has ended breaks off in a section, before its first call's name is known: what opens it
        has come whole."""
        source = self._source
        if rule.section is None or rule.section.only_first or leading(rule.section.begin) is None:
            return False
        return find(rule.pieces, source.text, source.at, names=self._tools, ended=True) is True and isinstance(
            find((Space(""), *rule.section.begin), source.text, source.at, ended=True), Found
        )

    def _pass(self, end: int) -> None:
        """Text that is no delimiter. A token that is one, where it means nothing, is left out."""
        text = self._source.text[self._source.at : end]
        if "\ud800" <= text[0] <= "\udfff":
            text = self._shown.get(text[0], "") + text[1:]
        self._source.at = end
        self._tell("reasoning" if self.in_reasoning else "content", text)
        if not self.in_reasoning and text.strip(_SPACES):
            self._begins = False

    def _delimited(self, rule: _Rule, found: Found) -> Iterator[None]:
        ends_something = self.in_reasoning or self._begins
        self.in_reasoning = rule.does == "opens reasoning"
        if rule.section is not None:
            yield from self._calls(rule.section, found.name)
        self._begins = rule.does != "begins calls" or (rule.section is not None and rule.section.repeats)
        self._after_delimiter = rule.does != "nothing" and (rule.does != "closes reasoning" or ends_something)

    def _calls(self, section: Section, name: str) -> Iterator[None]:
        """A section from its first call's name on."""
        before, _ = head(section.call.before)
        while (yield from self._call(section, name)) and section.between is not None:
            found = yield from self._source.take(section.between + before, self._tools)
            if found is None:
                break
            name = found.name
        yield from self._source.take(section.end)
        if self._source.cut:  # in a delimiter, which is not content for being unfinished
            self._source.at = len(self._source.text)

    def _call(self, section: Section, name: str) -> Reading:
        """A call from its name on; whether it is closed."""
        self._tell("call", name)
        _, rest = head(section.call.before)
        begun = yield from self._source.take(rest)
        if begun is not None and (yield from self._arguments(section, name)):
            yield from self._source.take(section.call.after)
            return True
        if begun is None and (yield from self._source.take(section.call.after)):
            self._tell("arguments", "{}")
            return True
        return False

    def _arguments(self, section: Section, name: str) -> Reading:
        """Whether they are complete."""
        style, source = section.call.arguments, self._source
        if isinstance(style, Tagged):
            schema = self._tools[name].parameters
            return (yield from read_pairs(source, style, section.call.after, schema, self._tell_arguments))
        if isinstance(style, Literals):
            return (yield from LiteralReader(source, style, self._tell_arguments).arguments(section.call.after))
        reader = JsonReader()
        while (yield from source.more()):
            end = reader.take(source.text, source.at)
            self._tell("arguments", source.text[source.at : end])
            source.at = end
            if reader.done or end < len(source.text):
                break
        return reader.done


def head(before: Pieces) -> tuple[Pieces, Pieces]:
    """What comes up to a call's arguments, in two: up to where its name is certain, and the rest."""
    name = before.index(Blank.NAME)
    end = next((place for place, piece in enumerate(before) if place > name and isinstance(piece, Text | Mark)), name)
    return before[: end + 1], before[end + 1 :]


def _rules(form: BoundFormat, calls: bool, *, begins: bool) -> list[_Rule]:
    """The delimiters that are looked for in content, in the order in which they are. Where it begins, whitespace before
    them is none of it."""
    space: Pieces = (Space(""),) if begins else ()
    rules: list[_Rule] = []
    if calls and form.calls is not None:
        for section in form.calls.sections:
            if begins or not section.only_first:
                before, _ = head(section.call.before)
                rules.append(_Rule(space + section.begin + before, "begins calls", section))
    if (reasoning := form.reasoning) is not None:
        if begins or isinstance(leading(reasoning.begin), Mark):
            rules.append(_Rule(space + reasoning.begin, "opens reasoning"))
        if begins or not reasoning.words:
            rules.append(_Rule(space + reasoning.end, "closes reasoning"))
    dropped = (*(form.reasoning.dropped if form.reasoning else ()), *(form.calls.dropped if form.calls else ()))
    return rules + [_Rule(space + pieces, "nothing") for pieces in dropped]


def _rules_of_reasoning(form: BoundFormat, calls: bool) -> list[_Rule]:
    """The delimiters that are looked for in reasoning. A call's opener ends it where it is a token: as text, it may be
    what is reasoned about."""
    if form.reasoning is None:
        return []
    openers = [rule for rule in _rules(form, calls, begins=False) if rule.section is not None]
    tokens = [rule for rule in openers if isinstance(leading(rule.pieces), Mark)]
    return [*tokens, _Rule(form.reasoning.end, "closes reasoning")]


def _looked_for(rules: list[_Rule]) -> tuple[list[_Rule], re.Pattern[str]]:
    """Rules, and where they may begin."""
    space = f"[{_SPACES}]"
    letters = "".join(sorted({re.escape(letter) for rule in rules for letter in firsts(rule.pieces)}))
    return rules, re.compile(rf"{space}{{0,{MAX_SPACE}}}[\ud800-\udfff{letters}]|{space}{{1,{MAX_SPACE}}}\Z")
