"""Which images' embeddings the workers hold, and which they make next. Pure bookkeeping.

An image is wanted (its pixels were asked for), here (they have come), or held (a step that was planned encodes it, or
has). Room is counted in tokens. Each step requests claim the images that they come to, the most important request
first; what nobody has claimed in a step may be evicted, least recently used first. So the most important request always
finds room, and nobody has to give any back.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire_engine.config import ImageLimits
from quire_engine.errors import InvalidParameter
from quire_engine.request import ImageSpan, Request, State
from quire_engine.step import Encode, Ints, StepImages

Inputs = Mapping[str, NDArray[Any]]  # what a vision tower reads of one image
_Key = tuple[bytes, int]  # of the image, and its tokens


@dataclass(eq=False, slots=True)
class _Image:
    key: bytes
    size: int  # tokens
    slot: int  # how workers call it
    asking: list[Request]  # that wait for its pixels; the first one was told to bring them
    inputs: Inputs | None = None
    held: bool = False


class ImageCache:
    """Of one engine."""

    def __init__(self, limits: ImageLimits, most_tokens: int) -> None:
        """`most_tokens`: that a step encodes, unless one image alone has more."""
        self._limits = limits
        self._most_tokens = most_tokens
        self._images: OrderedDict[_Key, _Image] = OrderedDict()  # least recently used first
        self._free = limits.room
        self._claimed: set[_Key] = set()
        self._encoding: list[_Image] = []
        self._budget = most_tokens
        self._evicted: list[int] = []  # slots that workers still hold
        self._wanted: list[tuple[Request, bytes]] = []
        self._reached: list[_Key] = []  # what the last request that looked has claimed,
        self._full = False  # and whether it found no room for another
        self._parked: dict[Request, list[_Key]] = {}  # what those that wait for pixels have claimed
        self._crowded: list[Request] = []  # those that wait for room, which is taken by what others wait for
        self._next_slot = 0
        self._at: list[Ints] = []
        self._sources: list[tuple[int, int, int]] = []
        self._spans: list[tuple[int, int, int, int]] = []
        self.queries = self.hits = 0  # images that a request came to, and of these those that were held already

    def accept(self, request: Request) -> None:
        """Finds the tokens that embeddings replace. Raises InvalidParameter for images that can never be seen."""
        tokens = np.array(request.tokens[: request.images_end], np.int64)
        for image in request.images:
            places = np.flatnonzero(tokens[image.start : image.end] == self._limits.token).astype(np.int32)
            if not len(places):
                raise InvalidParameter("an image has no token in the prompt that stands for it", "images")
            if len(places) > self._limits.room:
                raise InvalidParameter(
                    f"an image has {len(places)} tokens; at most {self._limits.room} are held: send a smaller one, or "
                    "start the server with a larger --encoder-cache-memory-bytes",
                    "images",
                )
            request.image_places.append(places + image.start)

    def begin(self) -> None:
        """A step is going to be planned. Nothing is claimed yet."""
        self._claimed = {key for keys in self._parked.values() for key in keys}
        self._encoding, self._budget = [], self._most_tokens
        self._at, self._sources, self._spans = [], [], []

    def reach(self, request: Request, computed: int, end: int) -> int:
        """How far, at most to `end`, the request can be computed in this step from `computed` on: up to the first image
        that is not here. Has the others before `end` encoded, and asks for those that it lacks and for the next one."""
        end, missing = min(end, len(request.tokens)), None
        self._reached, self._full = [], False
        for image, places in zip(request.images, request.image_places, strict=True):
            if places[-1] < computed:
                continue
            first = int(places[np.searchsorted(places, computed)])
            if first >= end:
                self._claim(request, image, len(places))
                break
            usable = self._usable(request, image, len(places))
            if missing is None and not usable:
                missing = first
            elif missing is None and self._limits.whole:
                end = _whole_runs(places, computed, end)
        return end if missing is None else missing

    def park(self, request: Request) -> bool:
        """Whether the request that looked last has to wait for pixels, of its own images or of others that take the
        room: until `provide` or `forget` gives it back. What it has claimed is kept for it."""
        if any(request in self._images[key].asking for key in self._reached):
            self._parked[request] = self._reached
            return True
        if self._full and any(image.asking for image in self._images.values()):
            self._crowded.append(request)
            return True
        return False

    def _usable(self, request: Request, image: ImageSpan, size: int) -> bool:
        found = self._claim(request, image, size)
        if found is None:
            return False
        if found.held or found in self._encoding:
            return True
        if found.inputs is None:
            if request not in found.asking:
                found.asking.append(request)
            return False
        if self._encoding and size > self._budget:
            return False
        self._encoding.append(found)
        self._budget -= size
        return True

    def _claim(self, request: Request, image: ImageSpan, size: int) -> _Image | None:
        """Its entry; None: there is no room for it now."""
        key = (image.key, size)
        found = self._images.get(key)
        if found is None:
            if not self._make_room(size, fair=request.state is State.RUNNING):
                self._full = True
                return None
            found = self._images[key] = _Image(image.key, size, self._next_slot, [request])
            self._next_slot += 1
            self._free -= size
            self._wanted.append((request, image.key))
        self._images.move_to_end(key)
        self._claimed.add(key)
        self._reached.append(key)
        return found

    def _make_room(self, size: int, *, fair: bool) -> bool:
        """By evicting what nobody claims. Not for those behind one that waits for room, unless it is `fair`."""
        if self._crowded and not fair:
            return False
        idle = [key for key, one in self._images.items() if not one.asking and key not in self._claimed]
        if self._free + sum(self._images[key].size for key in idle) < size:
            return False
        for key in idle:
            if self._free >= size:
                break
            self._evict(key)
        return True

    def _evict(self, key: _Key) -> None:
        image = self._images.pop(key)
        self._free += image.size
        if image.held:
            self._evicted.append(image.slot)

    def take_wanted(self) -> list[tuple[Request, bytes]]:
        """Images whose pixels are wanted, each from the client of a request, since this was last asked."""
        wanted, self._wanted = self._wanted, []
        asked = {(image.asking[0], image.key) for image in self._images.values() if image.asking} if wanted else ()
        return [one for one in dict.fromkeys(wanted) if one in asked]  # others have come since, or nobody waits

    def provide(self, key: bytes, inputs: Inputs) -> list[Request]:
        """Pixels have come. → parked requests that may look again. What nobody waits for any more is dropped."""
        for (known, _), image in self._images.items():
            if known == key and image.asking:
                image.inputs, image.asking = inputs, []
        return self._unparked()

    def _unparked(self) -> list[Request]:
        asking = {request for image in self._images.values() for request in image.asking}
        found = [request for request in self._parked if request not in asking] + self._crowded
        self._crowded = []
        for request in found:
            self._parked.pop(request, None)
        return found

    def forget(self, request: Request) -> list[Request]:
        """It has ended: whoever else waits for an image that it was to bring is asked instead. → as `provide`."""
        self._parked.pop(request, None)
        for key, image in list(self._images.items()):
            if request in image.asking:
                asked = image.asking[0] is request
                image.asking.remove(request)
                if not image.asking:
                    self._evict(key)
                elif asked:
                    self._wanted.append((image.asking[0], key[0]))
        return [other for other in self._unparked() if other is not request]

    def compute(self, request: Request, start: int, end: int, flat: int) -> None:
        """The step computes these tokens of a request, the first of them at `flat` among the step's."""
        for image, places in zip(request.images, request.image_places, strict=True):
            first, last = np.searchsorted(places, (start, end)).tolist()
            if first == last:
                continue
            entry = self._images[image.key, len(places)]
            self.queries += first == 0
            self.hits += first == 0 and entry.held
            self._at.append(places[first:last] + (flat - start))
            self._sources.append((entry.slot, first, last))
            if self._limits.whole:
                self._spans += [
                    (flat + max(begin, start) - start, flat + min(stop, end) - start, begin, stop)
                    for begin, stop in _runs(places)
                    if begin < end and stop > start
                ]

    def planned(self) -> StepImages | None:
        """The step's part of this. It is on its way now: what it encodes is held."""
        if not (self._sources or self._encoding or self._evicted):
            return None
        found = StepImages(
            forget=np.array(self._evicted, np.int32),
            encode=[Encode(image.slot, image.key, image.size, dict(image.inputs or {})) for image in self._encoding],
            places=np.concatenate([np.zeros(0, np.int32), *self._at]),
            sources=np.array(self._sources, np.int32).reshape(-1, 3),
            spans=np.array(self._spans, np.int32).reshape(-1, 4),
        )
        for image in self._encoding:
            image.held, image.inputs = True, None
        self._evicted = []
        return found

    def failed(self, unseen: Mapping[bytes, str], requests: Iterable[Request]) -> list[tuple[Request, str]]:
        """Images that could not be encoded, and why, are not held. → which of the requests have one, and why again."""
        if not unseen:
            return []
        for key in [key for key in self._images if key[0] in unseen]:
            self._evict(key)
        told = {request: [unseen[image.key] for image in request.images if image.key in unseen] for request in requests}
        return [(request, why[0]) for request, why in told.items() if why]

    def check_integrity(self) -> None:
        """Raises AssertionError unless the room adds up."""
        assert self._free + sum(image.size for image in self._images.values()) == self._limits.room, "room is lost"
        assert self._free >= 0, "more images are held than there is room for"


def _runs(places: Ints) -> list[tuple[int, int]]:
    """Where tokens of an image follow one another: the first, and the one behind the last."""
    breaks = np.flatnonzero(np.diff(places) > 1)
    firsts, lasts = places[np.append(0, breaks + 1)], places[np.append(breaks, len(places) - 1)]
    return list(zip(firsts.tolist(), (lasts + 1).tolist(), strict=True))


def _whole_runs(places: Ints, computed: int, end: int) -> int:
    """`end`, or the start of the run that it would cut; `computed` where nothing is left."""
    for begin, stop in _runs(places):
        if begin < end < stop:
            return max(begin, computed)
    return end
