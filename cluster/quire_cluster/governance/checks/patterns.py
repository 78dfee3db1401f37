"""Regular expressions in Python's notation, and words, as automata.

Characters, sets, repetitions, alternatives and groups mean what they mean in `re`, which tells what single characters
match. What would need more than the next character to be decided, or the order in which alternatives are tried, is
refused.
"""

import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from quire_cluster.governance.checks.machine import Accept, Char, Folded, Fork, Kind, Look, Machine, Program, Test, fold

_PARSER: Any = importlib.import_module("re._parser")  # what `re` itself reads patterns with
_COMPILER: Any = importlib.import_module("re._compiler")

MOST_LONGEST = 4096  # characters
_MOST_CHARACTERS = 4096  # of a pattern
_MOST_NODES = 4096  # of a pattern
_MOST_WORD_NODES = 1 << 18  # of a list of words

_SINGLE = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
_INSTEAD = {
    "MIN_REPEAT": "a lazy repetition: a match is the longest there is; leave out its ? and say which characters may "
    'stand within, as in "[^"]*"',
    "POSSESSIVE_REPEAT": "a possessive repetition: nothing is tried in an order here; leave out its second +",
    "ATOMIC_GROUP": "an atomic group: nothing is tried in an order here; write (?:...)",
    "GROUPREF": "a reference to a group: write out what may stand there",
    "GROUPREF_EXISTS": "a condition on a group: write the two cases as alternatives, with |",
}


def pattern_machine(patterns: Sequence[tuple[str, Kind]], longest: int | None) -> Machine:
    """Finds matches of any of them. Of one that begins where another does the longer counts, then the first in order.

    `longest`: the most characters of a match; None: what the patterns' own bounds say. Raises ValueError, which says
    what to write instead.
    """
    program = Program(_MOST_NODES * len(patterns))
    starts, widths = [], []
    for number, (pattern, _) in enumerate(patterns):
        try:
            read, width = _read(pattern, longest)
            starts.append(_Builder(program, read.state.flags).sequence(read, program.add(Accept(number))))
        except ValueError as error:
            raise ValueError(f"{pattern!r:.200}: {error}") from error
        widths.append(width)
    return Machine(program, program.add(Fork(starts)), [kind for _, kind in patterns], max(widths))


def _read(pattern: str, longest: int | None) -> tuple[Any, int]:
    """As `re` reads it, and the most characters of a match."""
    if len(pattern) > _MOST_CHARACTERS:
        raise ValueError(f"it has more than {_MOST_CHARACTERS} characters; make several of it")
    try:
        read = _PARSER.parse(pattern)
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"it is no regular expression of Python's re: {error}") from error
    least, most = read.getwidth()
    if least == 0:
        raise ValueError("it matches where there is nothing; write + in place of *, or leave out what is optional")
    if longest is None and most > MOST_LONGEST:
        raise ValueError(
            f"its matches have no bound, or one of more than {MOST_LONGEST} characters; give `longest: 80`, the most "
            "characters that a match can have, or write {1,80} in place of + and *"
        )
    if longest is not None and longest < least:
        raise ValueError(
            f"its shortest match has {least} characters, so that `longest: {longest}` finds none; raise it"
        )
    return read, min(most, longest or MOST_LONGEST)


class _Builder:
    """Adds a pattern's nodes to a program, from its end to its beginning."""

    def __init__(self, program: Program, flags: int) -> None:
        self._program = program
        self._flags = flags

    def sequence(self, items: Any, then: int) -> int:
        """The first node of items after each other, the last of which leads to `then`."""
        for code, value in reversed(list(items)):
            then = self._item(code, value, then)
        return then

    def _item(self, code: Any, value: Any, then: int) -> int:
        name = code.name
        if name in _SINGLE:
            return self._program.add(Char(self._test(code, value), then))
        if name == "BRANCH":
            return self._program.add(Fork([self.sequence(items, then) for items in value[1]]))
        if name == "SUBPATTERN":
            return self._group(value, then)
        if name == "MAX_REPEAT":
            return self._repeat(value, then)
        if name == "AT":
            return self._at(value.name, then)
        if name in ("ASSERT", "ASSERT_NOT"):
            return self._look(name == "ASSERT", value, then)
        raise ValueError(f"it has {_INSTEAD[name]}")

    def _group(self, value: Any, then: int) -> int:
        _, added, removed, items = value
        outer, self._flags = self._flags, _within(self._flags, added, removed)
        then = self.sequence(items, then)
        self._flags = outer
        return then

    def _repeat(self, value: Any, then: int) -> int:
        least, most, items = value
        if most is _PARSER.MAXREPEAT:
            fork = Fork([then])
            then = self._program.add(fork)
            fork.then.append(self.sequence(items, then))
        else:
            end = then
            for _ in range(most - least):
                then = self._program.add(Fork([self.sequence(items, then), end]))
        for _ in range(least):
            then = self.sequence(items, then)
        return then

    def _at(self, where: str, then: int) -> int:
        lines = self._flags & re.MULTILINE
        if where == "AT_BEGINNING" and lines:
            return self._looks(_begins_line, None, then)
        if where in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return self._looks(_is_edge, None, then)
        if where == "AT_END" and lines:
            return self._looks(None, _begins_line, then)
        if where == "AT_END":
            raise ValueError(r"it has $, which may stand before a last line break too; write \Z, or (?m) for line ends")
        if where == "AT_END_STRING":
            return self._looks(None, _is_edge, then)
        word = self._test(_PARSER.IN, [(_PARSER.CATEGORY, _PARSER.CATEGORY_WORD)])
        other = self._negated(word)
        pairs = [(word, other), (other, word)] if where == "AT_BOUNDARY" else [(word, word), (other, other)]
        return self._program.add(Fork([self._looks(behind, ahead, then) for behind, ahead in pairs]))

    def _look(self, wanted: bool, value: Any, then: int) -> int:
        """One character ahead or behind."""
        direction, items = value
        outer = self._flags
        while len(items) == 1 and items[0][0].name == "SUBPATTERN":
            _, added, removed, items = items[0][1]
            self._flags = _within(self._flags, added, removed)
        if len(items) != 1 or items[0][0].name not in _SINGLE:
            raise ValueError(
                "it looks ahead or behind at more than one character; write a single one or a set, as in (?![0-9])"
            )
        test = self._test(*items[0])
        self._flags = outer
        if not wanted:
            test = self._negated(test)
        return self._looks(test, None, then) if direction < 0 else self._looks(None, test, then)

    def _looks(self, behind: Test | None, ahead: Test | None, then: int) -> int:
        number = None if behind is None else self._program.look_behind(behind)
        return self._program.add(Look(number, ahead, then))

    def _test(self, code: Any, value: Any) -> Test:
        """As `re` itself tells of one character."""
        return self._kept(f"{code} {value}", lambda: _single(code, value, self._flags))

    def _negated(self, test: Test) -> Test:
        """True at the text's edges, too."""
        return self._kept(f"not {id(test)}", lambda: lambda character: not test(character))

    def _kept(self, name: str, make: Callable[[], Test]) -> Test:
        key = name, self._flags
        if key not in self._program.tests:
            self._program.tests[key] = make()
        return self._program.tests[key]


def _within(flags: int, added: int, removed: int) -> int:
    """What counts in a group that adds and removes some. ASCII and Unicode are one or the other."""
    if added & (re.ASCII | re.UNICODE):
        flags &= ~(re.ASCII | re.UNICODE)
    return (flags | added) & ~removed


def _single(code: Any, value: Any, flags: int) -> Test:
    state = _PARSER.State()
    state.flags = flags
    compiled = _COMPILER.compile(_PARSER.SubPattern(state, [(code, value)]), flags)
    return lambda character: compiled.fullmatch(character) is not None


def _is_edge(character: str) -> bool:
    return not character


def _begins_line(character: str) -> bool:
    return character in ("", "\n")


def _is_no_word_character(character: str) -> bool:
    return not (character.isalnum() or character == "_")


def word_machine(words: Iterable[str], kind: Kind) -> Machine:
    """Finds words that are no part of longer ones, by Unicode's case folding. A blank in one stands for any character
    of white space. Raises ValueError."""
    program = Program(_MOST_WORD_NODES)
    ending = program.add(Look(None, _is_no_word_character, program.add(Accept(0))))
    root = Folded()
    first = program.add(root)
    longest = 0
    for word in words:
        folded = " ".join("".join(map(fold, word)).split())
        if not 0 < len(folded) <= MOST_LONGEST:
            raise ValueError(f"{word!r:.80} has not 1 to {MOST_LONGEST} characters")
        node = root
        for character in folded:
            if character not in node.then:
                node.then[character] = program.add(Folded())
            following = program.nodes[node.then[character]]
            assert isinstance(following, Folded)
            node = following
        if not node.ends:
            node.ends.append(ending)
        longest = max(longest, len(folded))
    start = program.add(Look(program.look_behind(_is_no_word_character), None, first))
    return Machine(program, start, [kind], longest)
