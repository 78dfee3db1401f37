"""What a rule looks for, as an automaton that reads a character at a time.

An automaton knows after each character whether what began somewhere can still become a match, which no library for
regular expressions tells reliably. It reads no character twice for one beginning, so there is nothing that could take
exponential time. What it does in a state for a character is worked out once and kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Test = Callable[[str], bool]  # of one character; "" stands for what is before a text's first and behind its last

_MOST_KEPT = 1 << 15  # what is done for a character in a state; then all is forgotten and worked out anew


@dataclass(frozen=True, slots=True)
class Char:
    """Goes on over a character."""

    test: Test
    then: int


@dataclass(frozen=True, slots=True)
class Fork:
    """Goes on in several places."""

    then: list[int]


@dataclass(frozen=True, slots=True)
class Look:
    """Goes on if the characters on both sides are so."""

    behind: int | None  # which of the program's tests
    ahead: Test | None
    then: int


@dataclass(frozen=True, slots=True)
class Folded:
    """Goes on over characters that are the same but for their case, one of which may be several (ß, ss)."""

    then: dict[str, int] = field(default_factory=dict)  # by characters as `fold` writes them
    ends: list[int] = field(default_factory=list)  # where it goes on without any


@dataclass(frozen=True, slots=True)
class Accept:
    """What was read is a match of this kind."""

    kind: int


Node = Char | Fork | Look | Folded | Accept


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Of matches."""

    name: str
    check: Test | None = None  # of the matching text: whether it really is one; None: always


class Program:
    """An automaton while it is put together."""

    def __init__(self, most_nodes: int) -> None:
        self.nodes: list[Node] = []
        self.behind: list[Test] = []
        self.tests: dict[tuple[str, int], Test] = {}  # by what they test, and a pattern's flags
        self._most = most_nodes

    def add(self, node: Node) -> int:
        """Its number. Raises ValueError where there are too many."""
        if len(self.nodes) == self._most:
            raise ValueError(f"it has more than {self._most} steps when its repetitions are written out")
        self.nodes.append(node)
        return len(self.nodes) - 1

    def look_behind(self, test: Test) -> int:
        """The number of a test of the character before."""
        if test not in self.behind:
            self.behind.append(test)
        return self.behind.index(test)


@dataclass(slots=True, eq=False)
class State:
    """Where the automaton may be, and what the character before was."""

    nodes: frozenset[int]
    behind: int  # a bit for each test that the character before passed
    after: dict[str, "Step"] = field(default_factory=dict)  # by the next character
    nothing_in: dict[str, int] = field(default_factory=dict)  # pieces in which no match begins: the steps they take


Step = tuple[
    State | None, tuple[int, ...]
]  # None: no match can follow; the kinds whose match ends before the character


def fold(character: str) -> str:
    """The same for characters that differ in their case only, or are white space: one to three characters."""
    return " " if character.isspace() else character.casefold()


class Machine:
    """A finished automaton. Not for several threads."""

    def __init__(self, program: Program, start: int, kinds: Sequence[Kind], longest: int) -> None:
        """`longest`: the most characters of a match."""
        self.kinds = tuple(kinds)
        self.longest = longest
        self._nodes = tuple(program.nodes)
        self._tests = tuple(program.behind)
        self._start = frozenset([start])
        self._states: dict[tuple[frozenset[int], int], State] = {}
        self._kept = 0
        self.starts: dict[str, State] = {}  # those that `start` was asked for

    def start(self, before: str) -> State:
        """Where a match would begin, after a character or, "", at the text's beginning."""
        state = self.starts.get(before)
        if state is None:
            state = self.starts[before] = self._state(self._start, before)
        return state

    def remember(self, start: State, piece: str, steps: int) -> None:
        """That no match begins in a piece, nor may one at its end."""
        start.nothing_in[piece] = steps
        self._count()

    def step(self, state: State, character: str) -> Step:
        """`character`: the next, or "" at the text's end."""
        step = state.after.get(character)
        if step is None:
            step = self._work_out(state, character)
            state.after[character] = step
            self._count()
        return step

    def _count(self) -> None:
        """What is kept, which is all forgotten when it has become too much."""
        self._kept += 1
        if self._kept > _MOST_KEPT:
            self.starts.clear()
            self._states.clear()
            self._kept = 0

    def _state(self, nodes: frozenset[int], before: str) -> State:
        behind = sum(1 << number for number, test in enumerate(self._tests) if test(before))
        return self._states.setdefault((nodes, behind), State(nodes, behind))

    def _work_out(self, state: State, character: str) -> Step:
        seen: set[int] = set()
        todo = list(state.nodes)
        then: set[int] = set()
        kinds: set[int] = set()
        while todo:
            number = todo.pop()
            if number in seen:
                continue
            seen.add(number)
            match self._nodes[number]:
                case Char(test, after):
                    if test(character):
                        then.add(after)
                case Fork(several):
                    todo.extend(several)
                case Look(behind, ahead, after):
                    if (behind is None or state.behind >> behind & 1) and (ahead is None or ahead(character)):
                        todo.append(after)
                case Folded(_, ends):
                    todo.extend(ends)
                    after_it = self._walk(number, fold(character)) if character else None
                    if after_it is not None:
                        then.add(after_it)
                case Accept(kind):
                    kinds.add(kind)
        return (self._state(frozenset(then), character) if then else None), tuple(sorted(kinds))

    def _walk(self, number: int, folded: str) -> int | None:
        """Where all of a character's folded ones lead."""
        for one in folded:
            node = self._nodes[number]
            following = node.then.get(one) if isinstance(node, Folded) else None
            if following is None:
                return None
            number = following
        return number
