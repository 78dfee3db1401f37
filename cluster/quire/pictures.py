"""Images of offline prompts: pictures, files, paths and data URLs."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from quire_cluster.config import MediaConfig
from quire_cluster.gateway.media import Media
from quire_engine.cache.images import Inputs
from quire_engine.config import EngineConfig
from quire_engine.errors import InvalidParameter
from quire_engine.multimodal.library import ImageLibrary, key_of
from quire_engine.multimodal.pictures import PictureLimits
from quire_engine.multimodal.processor import ImageProcessor
from quire_engine.pooling import pooling_of
from quire_engine.request import ImageSpan
from quire_engine.text.images import PromptImage, check_conversation, expand, first_lost, parts_of, spans_of
from quire_engine.weights.resolve import ModelFiles
from quire_engine.weights.text_parts import takes_images

from quire.files import file_of


@dataclass(frozen=True, kw_only=True, eq=False)
class OfflineImage(PromptImage):
    """An image of a prompt, with what its pixels are made of."""

    file: bytes


class OfflineImages:
    """Of one model, which may take none."""

    def __init__(self, files: ModelFiles, config: EngineConfig, media: MediaConfig) -> None:
        """`media`: which URLs are read. Raises ModelError where the model takes images and its processor is not
        there."""
        self._most = (
            config.images_per_prompt if takes_images(files.config) and pooling_of(files, config.task) is None else 0
        )
        self._library = ImageLibrary(ImageProcessor.load(files)) if self._most else None
        self._media = media

    def in_conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages whose parts of type image and image_url have become images. Raises InvalidParameter."""
        found = [dict(message) for message in messages]
        count = 0
        for place, message in enumerate(found):
            if not isinstance(message.get("content"), list):
                continue
            message["content"] = list(message["content"])
            for number, part in enumerate(message["content"]):
                kind = part.get("type") if isinstance(part, Mapping) else None
                if kind in ("image", "image_url"):
                    what, count = f"part {number} of message {place}", count + 1
                    message["content"][number] = {"type": "image", "image": self._image(part.get(kind), what, count)}
        return found

    def in_text(self, given: Any) -> tuple[OfflineImage, ...]:
        """Of a prompt that is a text: one image, or several."""
        each = given if isinstance(given, list | tuple) else [given]
        return tuple(self._image(one, f"image {number}", number + 1) for number, one in enumerate(each))

    def rendered(self, text: str, messages: Iterable[Mapping[str, Any]]) -> tuple[str, tuple[OfflineImage, ...]]:
        """A rendered conversation with what stands for its images, and these. Raises InvalidParameter."""
        messages = list(messages)
        images = tuple(part["image"] for _, part in parts_of(messages))
        if not images:
            return text, ()
        check_conversation(messages, self._known.processor.placeholder)
        return self.expanded(text, images, first_lost(messages)), images

    def expanded(self, text: str, images: Sequence[OfflineImage], lost: PromptImage | None = None) -> str:
        """See `text.images.expand`."""
        return expand(text, images, self._known.processor.placeholder, lost)

    def spans(self, tokens: Sequence[int], images: Sequence[OfflineImage]) -> tuple[ImageSpan, ...]:
        """See `text.images.spans_of`."""
        return spans_of(tokens, images, self._known.processor.image_token_id) if images else ()

    def inputs(self, image: OfflineImage) -> Inputs:
        """What the vision tower reads."""
        return self._known.made(image.key, image.file, image.what).inputs

    @property
    def _known(self) -> ImageLibrary:
        if self._library is None:
            raise InvalidParameter("the model takes no images; send text alone", "messages")
        return self._library

    def _image(self, given: Any, what: str, count: int) -> OfflineImage:
        library = self._known
        if count > self._most:
            raise InvalidParameter(
                f"{what}: at most {self._most} images are taken; send fewer, or give limit_mm_per_prompt", "messages"
            )
        file = self._file(given, what)
        key = key_of(file)
        facts = library.facts(key, file, what)
        return OfflineImage(what=what, key=key, file=file, **asdict(facts))

    def _file(self, given: Any, what: str) -> bytes:
        if isinstance(given, Mapping) and isinstance(url := given.get("url"), str):
            with ThreadPoolExecutor(1) as thread:  # the caller may run an event loop of its own
                return thread.submit(asyncio.run, _read(self._media, url, what)).result()
        return file_of(given, what)


async def _read(config: MediaConfig, url: str, what: str) -> bytes:
    media = Media(config, PictureLimits())
    try:
        return await media.read(url, what)
    finally:
        await media.close()
