"""Stop strings in a growing text."""

from bisect import bisect_left, bisect_right
from operator import itemgetter


class _State:
    """A place in the automaton of Aho and Corasick: the longest end of the text that begins a stop string."""

    __slots__ = ("depth", "fallback", "found", "held", "high", "low", "next")

    def __init__(self, depth: int, low: int, high: int, fallback: "_State | None", stops: list[str]) -> None:
        """`low` to `high`: the sorted stop strings that begin like this. `fallback`: the next shorter such end."""
        self.depth = depth
        self.low, self.high = low, high
        self.fallback = fallback
        self.next: dict[str, _State] = {}  # by the character that follows; made when it first does
        self.found: int | None = None  # the longest stop string that ends here
        self.held = depth  # characters that a longer text may turn into a stop string
        if fallback is not None:
            complete = len(stops[low]) == depth
            self.found = low if complete else fallback.found
            if complete and high == low + 1:
                self.held = fallback.held


class StopMatcher:
    """Looks for stop strings in a growing text, and holds back what may turn into one.

    Of several stop strings in what is pushed at once (with what was held back), the one that begins first ends the
    text; of those that begin at the same place, the one named first.
    """

    def __init__(self, stops: list[str], include: bool) -> None:
        """`include`: whether the text keeps the stop string that ends it."""
        self._stops = sorted(set(stops))
        self._order = [stops.index(stop) for stop in self._stops]
        self._include = include
        self._root = self._state = _State(0, 0, len(self._stops), None, self._stops)
        self._held = ""

    def push(self, text: str, *, ends: bool = True) -> tuple[str, str | None]:
        """New text in; what may be shown now, and the stop string that ended it.

        A stop string that is complete where nothing `ends` is text like any other.
        """
        if not self._stops:
            return text, None
        state = self._state
        whole = self._held + text
        first: tuple[int, int, int] | None = None  # where it begins, its place in the list, where it ends
        for end, character in enumerate(text, len(self._held) + 1):
            state = state.next.get(character) or self._follow(state, character)
            if state.found is not None and ends:
                match = (end - len(self._stops[state.found]), self._order[state.found], end)
                first = match if first is None else min(first, match)
        if first is not None:
            start, _, end = first
            self._state, self._held = self._root, ""
            return whole[: end if self._include else start], whole[start:end]
        self._state = state
        shown = len(whole) - state.held
        self._held = whole[shown:]
        return whole[:shown], None

    def flush(self) -> str:
        """What was held back, once it is certain that no stop string follows."""
        held, self._held, self._state = self._held, "", self._root
        return held

    def _follow(self, state: _State, character: str) -> _State:
        """The state after one more character, remembered. Those it passes on the way are shorter and shorter."""
        waiting: list[_State] = []  # states from which nobody went on like this yet
        at: _State | None = state
        while at is not None and character not in at.next:
            waiting.append(at)
            at = at.fallback
        reached = self._root if at is None else at.next[character]
        for one in reversed(waiting):
            here = itemgetter(slice(one.depth, one.depth + 1))
            low = bisect_left(self._stops, character, one.low, one.high, key=here)
            high = bisect_right(self._stops, character, low, one.high, key=here)
            if high > low:
                reached = _State(one.depth + 1, low, high, reached, self._stops)
            one.next[character] = reached
        return state.next[character]
