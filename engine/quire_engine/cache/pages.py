"""The pages of the key-value cache, counted by reference (PagedAttention, Kwon et al. 2023), and the prefix index.

A page is free (blank), cached (unreferenced, but the index knows what it holds; evicted least recently used first), or
owned by at least one request. The three add up to the capacity, always; `check_integrity` says so.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable


def block_hash(previous: bytes, tokens: list[int], images: bytes = b"") -> bytes:
    """The hash of a full block, of the `images` in it (which, and where), and of all that precedes it. 16 bytes of
    BLAKE2b: two prefixes never meet by chance."""
    return hashlib.blake2b(previous + array("I", tokens).tobytes() + images, digest_size=16).digest()


class PagePool:
    """Hands out pages by number. Pure bookkeeping: the memory itself is the workers'."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._blank = list(range(num_pages - 1, -1, -1))  # a stack: recently freed pages are warm in the CPU's caches
        self._cached: OrderedDict[int, None] = OrderedDict()  # unreferenced pages with known content, oldest first
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that can be handed out: blank and cached."""
        return len(self._blank) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Pages that requests hold."""
        return self.num_pages - self.num_free

    def allocate(self) -> int | None:
        """A page to write to, with one reference; None when all are held. May evict the oldest cached page."""
        if self._blank:
            page = self._blank.pop()
        elif self._cached:
            page, _ = self._cached.popitem(last=False)
            del self._page_of[self._hash_of.pop(page)]
        else:
            return None
        self._references[page] = 1
        return page

    def release(self, pages: Iterable[int]) -> None:
        """Drops one reference to each. Give a block table in reverse, so that a prefix outlives its continuations."""
        for page in pages:
            count = self._references[page] - 1
            assert count >= 0, f"page {page} is released more often than it was taken"
            self._references[page] = count
            if count == 0:
                if page in self._hash_of:
                    self._cached[page] = None
                else:
                    self._blank.append(page)

    def find(self, hash_: bytes) -> int | None:
        """The page that holds the block, with one more reference; None when unknown."""
        page = self._page_of.get(hash_)
        if page is None:
            return None
        if self._references[page] == 0:
            del self._cached[page]
        self._references[page] += 1
        return page

    def knows(self, hash_: bytes) -> int | None:
        """The page that holds the block, without taking a reference."""
        return self._page_of.get(hash_)

    def is_named(self, page: int) -> bool:
        """Whether the index knows what it holds: then it must not be written."""
        return page in self._hash_of

    def forget(self, page: int) -> None:
        """The index does not know the page any more; its only owner may write it."""
        assert self._references[page] == 1, f"page {page} is not one request's alone"
        del self._page_of[self._hash_of.pop(page)]

    def drop(self, hash_: bytes) -> None:
        """A block that nobody holds is not worth keeping."""
        page = self._page_of.get(hash_)
        if page is not None and self._references[page] == 0:
            del self._page_of[hash_], self._hash_of[page], self._cached[page]
            self._blank.append(page)

    def disown(self, hash_: bytes) -> None:
        """A block whose content is wrong is not found any more."""
        page = self._page_of.pop(hash_, None)
        if page is not None:
            del self._hash_of[page]
            if self._references[page] == 0:
                del self._cached[page]
                self._blank.append(page)

    def is_idle(self, page: int) -> bool:
        """Whether no request holds it: taking it makes one fewer free."""
        return self._references[page] == 0

    def is_own(self, page: int) -> bool:
        """Whether one request alone holds it."""
        return self._references[page] == 1

    def register(self, page: int, hash_: bytes) -> None:
        """The page is full and will not change: let it be found. The first page with a content keeps the name."""
        if hash_ not in self._page_of and page not in self._hash_of:
            self._page_of[hash_] = page
            self._hash_of[page] = hash_

    def check_integrity(self, owners: Iterable[list[int]] = ()) -> None:
        """Raises AssertionError unless every page is exactly one of blank, cached, owned, and counts match `owners`."""
        held = [0] * self.num_pages
        for pages in owners:
            for page in pages:
                held[page] += 1
        assert held == self._references, "reference counts differ from the block tables"
        blank, cached = set(self._blank), set(self._cached)
        owned = {page for page, count in enumerate(held) if count}
        assert len(blank) == len(self._blank), "a page is blank twice"
        assert not (blank & cached or blank & owned or cached & owned), "a page is in two states"
        assert len(blank) + len(cached) + len(owned) == self.num_pages, "a page is lost"
        assert all(self._page_of[h] == page for page, h in self._hash_of.items()), "index and pages disagree"
        assert len(self._page_of) == len(self._hash_of), "the index names a page twice"
        assert cached <= self._hash_of.keys(), "a cached page has no name"
        assert not blank & self._hash_of.keys(), "a blank page has a name"
