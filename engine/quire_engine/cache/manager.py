"""What requests hold of the cache: pages, recurrent states, and the hashes under which others find them."""

from array import array
from collections.abc import Iterable, Mapping, Sequence

from quire_engine.cache.images import ImageCache
from quire_engine.cache.pages import PagePool, block_hash
from quire_engine.cache.states import StatePages
from quire_engine.config import SchedulerLimits
from quire_engine.errors import InvalidParameter
from quire_engine.request import Request


class CacheManager:
    """Owns the pages. Pure bookkeeping; who is to have them is the scheduler's."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.pool = PagePool(limits.num_pages)
        self.states = StatePages(limits.num_states) if limits.num_states else None
        self.images: ImageCache | None = None
        if limits.images is not None:
            self.images = ImageCache(limits.images, limits.max_num_batched_tokens)
        self._block_size = limits.block_size
        self._draft_model = limits.draft_model
        self._read: set[int] = set()  # pages all of whose tokens a draft model has read
        self._shares = limits.enable_prefix_caching

    def accept_images(self, request: Request) -> None:
        """Raises InvalidParameter for images that can never be seen."""
        if self.images is not None:
            self.images.accept(request)
        elif request.images:
            raise InvalidParameter("the model takes no images; leave them out", "images")

    def find_prefix(self, request: Request) -> list[int]:
        """Pages that hold the request's first blocks; at least one token is always left to compute."""
        if not self._shares or request.params.prompt_logprobs is not None:
            return []
        count = (len(request.tokens) - 1) // self._block_size
        found: list[int] = []
        for index in range(count):
            page = self.pool.knows(self._hashes(request, index + 1)[index])
            if page is None:
                break
            found.append(page)
        if self.states is not None:
            hashes, known = request.block_hashes, len(found)
            while found and self.states.pool.knows(hashes[len(found) - 1]) is None:
                found.pop()
            request.checkpoint = known * self._block_size if known > len(found) else 0
        return found

    def has_room(self, request: Request, prefix: list[int], spare: int) -> bool:
        """Whether all its tokens so far find pages beside `prefix`, and leave `spare` pages."""
        if self.states is not None and not self.states.has_room:
            return False
        return self.needed(request, prefix) + spare <= self.pool.num_free

    def needed(self, request: Request, prefix: list[int]) -> int:
        """Free pages that all its tokens so far take beside `prefix`."""
        needed = -(-len(request.tokens) // self._block_size) - len(prefix)
        return needed + sum(self.pool.is_idle(page) for page in prefix)

    def own_pages(self, request: Request) -> int:
        """Pages that nobody else holds."""
        return sum(self.pool.is_own(page) for page in request.pages)

    def take_prefix(self, request: Request, prefix: list[int]) -> None:
        """The request begins with those pages, and counts as computed up to their end."""
        for index, page in enumerate(prefix):
            self.pool.find(request.block_hashes[index])
            request.pages.append(page)
        if self.states is not None and prefix:
            request.state_page = self.states.start(request.block_hashes[len(prefix) - 1])
        request.num_computed = len(prefix) * self._block_size
        request.num_registered = len(prefix)
        request.begun_at = len(request.tokens)
        unread = (index for index, page in enumerate(prefix) if page not in self._read)
        request.num_read = next(unread, len(prefix)) * self._block_size

    def allocate(self) -> int | None:
        """A page that nothing is known of; None: there is none."""
        page = self.pool.allocate()
        if page is not None:
            self._read.discard(page)
        return page

    def note_read(self, request: Request, computed: int, end: int) -> None:
        """The draft model, if there is one, reads the tokens between as the model computes them. Where it lacks some
        before, it will read all from there on."""
        if request.num_read >= computed:
            request.num_read = end
            self._keep_read(request, computed)

    def _keep_read(self, request: Request, start: int) -> None:
        """Whoever finds the pages need not read them again."""
        if self._draft_model:
            self._read.update(request.pages[start // self._block_size : request.num_read // self._block_size])

    def chunk(self, request: Request, budget: int) -> int:
        """How many tokens of a prompt to compute next: with recurrent states, up to where one is worth keeping."""
        computed, length = request.num_computed, len(request.tokens)
        end = min(length, computed + budget)
        if self.states is not None and self._shares:
            if computed < request.checkpoint < end:
                end = request.checkpoint
            elif end < length and end // self._block_size * self._block_size > computed:
                end -= end % self._block_size
        return end - computed

    def register(self, request: Request, computed: int) -> None:
        """Lets blocks full of computed tokens be found.

        This runs while the plan is made: a layer writes the keys and values of the whole batch before any of its
        attention reads, so even a request of the same step may share them.
        """
        if not self._shares:
            return
        full = computed // self._block_size
        if full > request.num_registered:
            hashes = self._hashes(request, full)
            for index in range(request.num_registered, full):
                self.pool.register(request.pages[index], hashes[index])
            request.num_registered = full
            if self.states is not None and request.num_computed == full * self._block_size:
                self.states.leave(request, hashes[full - 1])

    def room_behind(
        self, request: Request, length: int, count: int, spare: int, entries: list[tuple[int, int, int]]
    ) -> int:
        """How many of `count` tokens behind `length` find pages. More are taken while they leave `spare` of them, and
        put down in `entries` (row, place, page)."""
        pages, size = request.pages, self._block_size
        while len(pages) * size < length + count and self.pool.num_free > spare:
            page = self.allocate()
            assert page is not None, "a free page is none"
            entries.append((request.row, len(pages), page))
            pages.append(page)
        return min(count, len(pages) * size - length)

    def judge(self, request: Request, drafts: int, accepted: int) -> None:
        """Of the drafts that were computed behind its last token so many were drawn: it has computed as much as they
        confirm. A state that has seen others as well is dropped, and what was drawn is computed again from the one
        before."""
        request.num_read += min(accepted, drafts - 1)
        if self.states is None:
            request.num_computed += accepted
        elif accepted == drafts:
            self.states.decide(request, right=True)
            request.num_computed += accepted
            request.again = 0
        else:
            self.states.decide(request, right=False)
            request.num_computed -= 1 + request.again
            request.again += accepted + 1
        self.trim(request)

    def trim(self, request: Request) -> None:
        """The request gives back the pages behind what is computed of it."""
        needed = -(-request.num_computed // self._block_size)
        if needed < len(request.pages):
            self.pool.release(reversed(request.pages[needed:]))
            del request.pages[needed:]

    def lose_images(self, unseen: Mapping[bytes, str], requests: Iterable[Request]) -> list[tuple[Request, str]]:
        """Images could not be encoded: of requests that have one nobody is to find what was computed from their first
        image on. → these requests, and why."""
        lost = self.images.failed(unseen, requests) if self.images is not None else []
        for request, _ in lost:
            for hash_ in request.block_hashes[request.images[0].start // self._block_size :]:
                self.pool.disown(hash_)
                if self.states is not None:
                    self.states.pool.disown(hash_)
        return lost

    def release(self, request: Request) -> None:
        """The request gives everything back, and has nothing computed."""
        self._keep_read(request, 0)
        self.pool.release(reversed(request.pages))
        if self.states is not None:
            self.states.release(request)
        request.pages = []
        request.num_registered = request.num_computed = request.again = 0

    def _hashes(self, request: Request, count: int) -> list[bytes]:
        hashes, size = request.block_hashes, self._block_size
        while (at := len(hashes) * size) < count * size:
            previous = hashes[-1] if hashes else request.cache_salt
            seen = [image for image in request.images if image.start < at + size and image.end > at]
            shown = b"".join(image.key + array("i", (image.start - at, image.length)).tobytes() for image in seen)
            hashes.append(block_hash(previous, request.tokens[at : at + size], shown))
        return hashes

    def slots(self, running: Sequence[Request]) -> tuple[int, int]:
        """Token slots of held pages, and how many of them hold nothing (PagedAttention's only waste)."""
        size = self._block_size
        return self.pool.num_used * size, sum(len(r.pages) * size - r.num_computed for r in running)

    def check_integrity(self, running: Sequence[Request]) -> None:
        """Raises AssertionError unless pages and states are what these requests hold."""
        self.pool.check_integrity(request.pages for request in running)
        if self.states is not None:
            self.states.pool.check_integrity(self.states.held(request) for request in running)
        if self.images is not None:
            self.images.check_integrity()
        for request in running:
            assert len(request.pages) * self._block_size >= request.num_computed, "tokens without a page"
