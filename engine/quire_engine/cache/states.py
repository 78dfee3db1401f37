"""The pages of recurrent states: one for each request that runs, and those left at the ends of blocks.

A state is not a list to which tokens are added, as keys and values are: it is overwritten. So a request that comes to
the end of a block leaves the page it was on to whoever begins with the same tokens, and goes on in another. Such pages
are left where a prompt's chunk ends, where a later request was seen to branch off (Pan et al. 2025, Marconi), and at
the newest block that decoding has filled.
"""

from quire_engine.cache.pages import PagePool
from quire_engine.request import Request


class StatePages:
    """Says which page of state a request's step reads and which it writes. Pure bookkeeping."""

    def __init__(self, num_states: int) -> None:
        self.pool = PagePool(num_states)
        self._read: list[int] = []  # by the plan that is being made: nobody may write them in the same step
        self._named: list[tuple[int, bytes]] = []  # written by that plan: nobody may read them in the same step

    def advance(self, request: Request) -> tuple[int, int]:
        """The pages that the request's next step reads (-1: none) and writes. One is free, or it has its own: a state
        that it left is lost to others where there is no other page."""
        page = request.state_page
        if page >= 0 and not self.pool.is_named(page):
            return page, page
        fresh = self.pool.allocate()
        if fresh is None:
            assert page >= 0, "an admitted request found no state"
            self.pool.forget(page)
            return page, page
        if page >= 0:
            self._read.append(page)
        request.state_page = fresh
        return page, fresh

    def try_on(self, request: Request) -> tuple[int, int]:
        """As `advance`, for a step of which part may turn out to be wrong: the state before it stays as it is. There
        has to be room."""
        fresh = self.pool.allocate()
        assert fresh is not None, "there is no room for a state after drafts"
        request.draft_page = fresh
        return request.state_page, fresh

    def decide(self, request: Request, *, right: bool) -> None:
        """The request goes on from the state after such a step, or from the one before it."""
        wrong = request.draft_page
        if right:
            wrong, request.state_page = request.state_page, request.draft_page
        self.pool.release((wrong,))
        request.draft_page = -1

    def start(self, hash_: bytes) -> int:
        """The page of that state, which a request will go on from."""
        page = self.pool.find(hash_)
        assert page is not None, "a state was evicted between lookup and admission"
        return page

    def leave(self, request: Request, hash_: bytes) -> None:
        """The request's state after the planned step can be found by this hash, once the plan is made."""
        self._named.append((request.state_page, hash_))
        if request.left_state:
            self.pool.drop(request.left_state)
        request.left_state = hash_ if request.num_computed > request.num_prompt else b""

    def settle(self) -> None:
        """The plan is made: what it wrote may be found, what it read may be written."""
        for page, hash_ in self._named:
            self.pool.register(page, hash_)
        self.pool.release(self._read)
        self._named, self._read = [], []

    def release(self, request: Request) -> None:
        """The request gives its pages back."""
        self.pool.release(self.held(request))
        request.state_page, request.draft_page, request.left_state = -1, -1, b""

    @staticmethod
    def held(request: Request) -> list[int]:
        """Its pages."""
        return [page for page in (request.state_page, request.draft_page) if page >= 0]

    @property
    def has_room(self) -> bool:
        """Whether a request can be admitted. The page of a state that it goes on from will do, if nobody holds it."""
        return self.pool.num_free > 0
