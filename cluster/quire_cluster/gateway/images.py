"""The images of requests to one model: fetched, checked, and made into what a prompt and a vision tower need.

The log of a request keeps an image's file. Its pixels are sent where a replica wants them: one that holds the image's
embeddings, or its part of the prompt, never does.
"""

import asyncio
import sys
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from quire_engine.errors import InvalidParameter, QueueFull, Unavailable
from quire_engine.multimodal.library import ImageFacts, ImageLibrary, key_of
from quire_engine.multimodal.processor import ImageProcessor
from quire_engine.request import ImageSpan
from quire_engine.text.images import PromptImage

from quire_cluster.gateway.media import Media
from quire_cluster.wire import image_to_bytes

_THREADS = 2  # that decode and scale
_FILES = 1 << 30  # bytes of files that requests under way may have, of all models together
_SECONDS = 30.0  # that an image may take to become pixels


@dataclass(frozen=True, kw_only=True, eq=False)
class GatewayImage(PromptImage):
    """An image of a request under way."""

    file: "_File"
    maker: "Images"

    async def pixels(self) -> bytes:
        """What the vision tower reads, for a session. Raises InvalidParameter."""
        return await self.maker.pixels(self)


@dataclass(frozen=True, slots=True)
class SeenImages:
    """Of a prompt: where they stand, and what they are."""

    spans: tuple[ImageSpan, ...] = ()
    images: tuple[GatewayImage, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Of the prompt, embeddings of images."""
        return sum(image.num_tokens for image in self.images)

    def of(self, key: bytes) -> GatewayImage | None:
        """The one that a replica wants."""
        return next((image for image in self.images if image.key == key), None)

    def told_apart(self, prompt: list[int]) -> list[int]:
        """The prompt with tokens in which other images are other numbers, for routing by prefixes."""
        if not self.spans:
            return prompt
        told = list(prompt)
        for span in self.spans:
            told[span.start : span.end] = [int.from_bytes(span.key[:4])] * span.length
        return told


NO_IMAGES = SeenImages()


@contextmanager
def without_triton() -> Iterator[None]:
    """Where transformers' processors are imported, torch looks for Triton: 70 MB that a gateway has no use for, and
    which say at the process's end that they leak."""
    hidden: dict[str, Any] = sys.modules  # None in it: an import fails
    if "triton" in hidden:
        yield
        return
    hidden["triton"] = None
    try:
        yield
    finally:
        del hidden["triton"]


class Images:
    """Of one model."""

    def __init__(self, processor: ImageProcessor, media: Media, most: int) -> None:
        """`most`: images of a request."""
        self.processor = processor
        self._library = ImageLibrary(processor)
        self._media = media
        self._most = most
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="images")
        self._under_way: dict[bytes, _Reading] = {}

    def close(self) -> None:
        """No image is taken any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def found(self, messages: Sequence[dict[str, Any]], salt: bytes) -> list[dict[str, Any]]:
        """A conversation with the images that its parts name. Raises InvalidParameter for the first that is none;
        QueueFull where requests under way hold too much."""
        parts = [
            (place, number, part)
            for place, message in enumerate(messages)
            for number, part in enumerate(message["content"] if isinstance(message.get("content"), list) else ())
            if part["type"] != "text"
        ]
        if len(parts) > self._most:
            raise InvalidParameter(
                f"there are {len(parts)} images; at most {self._most} are taken: send fewer, or start the server with "
                "a larger --limit-mm-per-prompt",
                "messages",
            )
        named = [self._file(part, f"part {number} of message {place}") for place, number, part in parts]
        tasks = [asyncio.ensure_future(one) for one in named]
        try:
            files = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        made = []  # one after the other: the images of one request keep no other's waiting for more than one of them
        for (place, number, _), file in zip(parts, files, strict=True):
            made.append(await self._image(file, f"part {number} of message {place}", salt))
        found = [dict(message) for message in messages]
        for place in {place for place, _, _ in parts}:
            found[place]["content"] = list(found[place]["content"])
        for (place, number, _), image in zip(parts, made, strict=True):
            found[place]["content"][number] = {"type": "image", "image": image}
        return found

    async def _file(self, part: dict[str, Any], what: str) -> "_File":
        if part["type"] == "image":
            return _File(part["image"])
        return _File(await self._media.read(part["image_url"]["url"], what))

    async def _image(self, file: "_File", what: str, salt: bytes) -> GatewayImage:
        key = await asyncio.to_thread(key_of, file.content, salt)
        facts = self._library.known(key) or await self._read(key, file.content, what)
        return GatewayImage(
            what=what,
            key=key,
            file=file,
            maker=self,
            **asdict(facts),
        )

    async def _read(self, key: bytes, content: bytes, what: str) -> ImageFacts:
        """Whoever sends an image that is being read waits for it. One that nobody waits for any more is not begun."""
        reading = self._under_way.get(key)
        if reading is None:
            work = self._pool.submit(self._library.facts, key, content, what)
            reading = self._under_way[key] = _Reading(work, asyncio.wrap_future(work))
            reading.done.add_done_callback(lambda done: self._forget(key, done))
        reading.waiting += 1
        try:
            return await asyncio.wait_for(asyncio.shield(reading.done), _SECONDS)
        except TimeoutError:
            raise Unavailable(
                f"{what}: it was not read within {_SECONDS:.0f} s, so many images come; try again later", 1.0
            ) from None
        finally:
            reading.waiting -= 1
            if not reading.waiting and reading.work.cancel():  # who comes next has it read anew
                self._forget(key, reading.done)

    def _forget(self, key: bytes, done: "asyncio.Future[ImageFacts]") -> None:
        reading = self._under_way.get(key)
        if reading is not None and reading.done is done:
            del self._under_way[key]
        if done.done() and not done.cancelled():
            done.exception()  # it may be that nobody waits to hear of it

    async def pixels(self, image: GatewayImage) -> bytes:
        """See `GatewayImage.pixels`. Not in the queue of those that are read for the first time."""
        content = image.file.content
        return await asyncio.to_thread(
            lambda: image_to_bytes(self._library.made(image.key, content, image.what).inputs)
        )


class _File:
    """A file of a request under way, which counts as long as anybody holds it. Raises QueueFull where there are too
    many."""

    held = 0  # bytes of all of them, of all models

    def __init__(self, content: bytes) -> None:
        if _File.held + len(content) > _FILES:
            raise QueueFull("requests under way hold as many images as there is room for; try again later")
        self.content = content
        _File.held += len(content)
        weakref.finalize(self, _let_go, len(content))


@dataclass(slots=True)
class _Reading:
    """An image that is read, or is going to be."""

    work: Future[ImageFacts]
    done: "asyncio.Future[ImageFacts]"
    waiting: int = 0


def _let_go(size: int) -> None:
    _File.held -= size
