"""Drafters whose drafts are right or wrong as a test wants them, and a value that computes all of them."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from quire_engine.request import Request
from quire_engine.speculation.draft import Draft
from quire_engine.speculation.speculation import Speculation


class Oracle:
    """Knows what comes next, and says something else as often as it is told to."""

    reads_logs = True

    def __init__(self, following: Callable[[Request, int], list[int]], wrong: float, seed: int = 0) -> None:
        """`following`: so many tokens that will follow a request's log. `wrong`: the share of tokens that are not."""
        self._following = following
        self._wrong = wrong
        self._random = np.random.default_rng(seed)

    def propose(self, request: Request, most: int) -> Draft:
        """Sometimes nothing, and sometimes more than was asked for."""
        if self._random.random() < 0.1:
            return Draft()
        tokens = self._following(request, most + int(self._random.integers(0, 3)))
        said = [int(self._random.integers(4)) if self._random.random() < self._wrong else token for token in tokens]
        return Draft(said, [0.5] * len(said))

    def forget(self, request: Request) -> None:
        """Nothing is kept."""


def told(prompts: Iterable[Sequence[int]], outputs: Iterable[Sequence[int]], wrong: float, seed: int = 0) -> Oracle:
    """Of requests with these prompts, whose outputs are known."""
    known = {tuple(prompt): list(output) for prompt, output in zip(prompts, outputs, strict=True)}

    def following(request: Request, count: int) -> list[int]:
        output = known[tuple(request.tokens[: request.num_prompt])]
        return output[request.num_output : request.num_output + count]

    return Oracle(following, wrong, seed)


class Constant:
    """Says the same of whatever it is asked about."""

    reads_logs = True

    def propose(self, request: Request, most: int) -> Draft:
        return Draft([5] * most, [0.5] * most)

    def forget(self, request: Request) -> None:
        """Nothing is kept."""


class Everything:
    """In place of `Value`: all drafts that there is room for."""

    def __init__(self) -> None:
        self.computed = self.accepted = 0

    def possible(self, rows: int, certain: int) -> bool:
        return 0 < rows <= certain

    def worth_waiting(
        self, requests: Sequence[Request], drafts: Sequence[Draft], rows: int, certain: int, *, unknown: bool
    ) -> bool:
        return True

    def choose(
        self, requests: Sequence[Request], drafts: Sequence[Draft], rows: int, certain: int, room: int
    ) -> list[int]:
        counts = []
        for draft in drafts:
            counts.append(min(len(draft.tokens), room))
            room -= counts[-1]
        return counts

    def compare(self, request: Request, draft: Draft, right: bool) -> None:
        assert draft.tokens

    def learn(self, request: Request, draft: Draft, computed: int, accepted: int) -> None:
        assert 0 <= accepted <= computed <= len(draft.tokens)
        self.computed += computed
        self.accepted += accepted

    def timed(self, tokens: int, prompts: int, seconds: float, waited: float) -> None:
        assert tokens > 0 and 0 <= prompts <= tokens

    def forget(self, request: Request) -> None:
        pass


def speculation(drafter: object, most: int = 4) -> Speculation:
    """With every draft computed."""
    return Speculation(drafter, Everything(), most)
