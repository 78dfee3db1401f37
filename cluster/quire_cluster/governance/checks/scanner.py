"""One text, scanned by one automaton while it comes."""

from dataclasses import dataclass

from quire_cluster.governance.checks.machine import Kind, Machine, State

_MOST_CREDIT = 1 << 20  # steps: a tenth of a second
_PER_CHARACTER = 1 << 8  # steps
_LONGEST_KEPT = 16  # characters of a piece that is remembered to hold nothing


@dataclass(slots=True)
class Part:
    """Of a text: a match, or what lies between two."""

    text: str
    kind: Kind | None = None


class Scanner:
    """Divides a text into matches and what lies between.

    A match begins as early as one can, and is the longest there: of at most `longest` characters, one that its kind's
    check accepts. The next is looked for behind it, and sees what stood before. What is told does not depend on the
    pieces that the text comes in: a match is told when it can grow no longer, and everything before the first place
    where one may still begin is told at once. Nor does what it takes.
    """

    def __init__(self, machine: Machine) -> None:
        self.steps = 0  # taken so far, each counted as often as the automaton was in several places
        self.exhausted = False  # the text took too many for its length: no part of the rest was told
        self._machine = machine
        self._before = ""
        self._held = ""  # what is not told yet; a match may begin where it begins
        self._state: State | None = None  # that match's, after what was read of `_held`; None: not begun
        self._read = 0  # characters of `_held`
        self._ends: list[tuple[int, tuple[int, ...]]] = []  # of that match, from the shortest, with their kinds
        self._steps = 0  # that match's
        self._seen = 0  # characters of `_held` that were ever read
        self._credit = _MOST_CREDIT

    @property
    def held(self) -> int:
        """Characters that are not told yet: at most `longest`."""
        return len(self._held)

    def push(self, text: str, final: bool) -> list[Part]:
        """What can be told now. `final`: nothing comes after it."""
        if self._held or not text or self._credit < _MOST_CREDIT:
            return self._scan(text, final)
        first = self._machine.start(self._before)
        known = first.nothing_in.get(text)
        if known is not None:
            self.steps += known
            self._before = text[-1]
            return [Part(text)]
        before = self.steps
        parts = self._scan(text, final)
        is_plain = not self._held and self._credit == _MOST_CREDIT and len(parts) == 1 and parts[0].kind is None
        if is_plain and len(text) <= _LONGEST_KEPT:
            self._machine.remember(first, text, self.steps - before)
        return parts

    def _scan(self, text: str, final: bool) -> list[Part]:
        machine, starts = self._machine, self._machine.starts
        text = self._held + text
        size, longest = len(text), machine.longest
        parts: list[Part] = []
        told, start, before = 0, 0, self._before
        state, at = self._state, self._read
        while start < size:
            if state is None:
                state, at = starts.get(before) or machine.start(before), start
                character = text[at]
                step = state.after.get(character) or machine.step(state, character)
                self.steps += 1
                if step[0] is None:  # no match begins here, as mostly
                    start, before, state = start + 1, character, None
                    continue
                self._steps = 1
                state, at = step[0], at + 1
            reached: State | None = state
            end = min(size, start + longest)
            while at < end and reached is not None:
                character = text[at]
                self._steps += len(reached.nodes)
                reached, kinds = reached.after.get(character) or machine.step(reached, character)
                if kinds:
                    self._ends.append((at - start, kinds))
                at += 1
            if reached is not None:
                if at == size and not final:
                    state = reached
                    break
                kinds = machine.step(reached, text[at] if at < size else "")[1]
                if kinds:
                    self._ends.append((at - start, kinds))
            if not self._account(at - max(self._seen, start)):
                break
            self._seen = max(self._seen, at)
            match = self._longest(text, start)
            if match is None:
                before, start = text[start], start + 1
            else:
                if told < start:
                    parts.append(Part(text[told:start]))
                parts.append(match)
                start = told = start + len(match.text)
                before = text[start - 1]
            self._ends.clear()
            state = None
        if told < start:
            parts.append(Part(text[told:start]))
        self._before, self._held = before, text[start:]
        self._state, self._read = state, max(0, at - start)
        self._seen = max(0, self._seen - start)
        return parts

    def _longest(self, text: str, start: int) -> Part | None:
        for length, kinds in reversed(self._ends):
            matching = text[start : start + length]
            for kind in (self._machine.kinds[number] for number in kinds):
                if kind.check is None or kind.check(matching):
                    return Part(matching, kind)
        return None

    def _account(self, characters: int) -> bool:
        """Of a beginning that is decided, which read so many characters for the first time."""
        self._credit = min(_MOST_CREDIT, self._credit + max(0, characters) * _PER_CHARACTER) - self._steps
        self.steps += self._steps - 1
        self.exhausted = self._credit < 0
        return not self.exhausted
