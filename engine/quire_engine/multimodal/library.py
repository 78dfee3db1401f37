"""The images of one model that are in use: how each stands in prompts, and what the vision tower reads of it.

What takes little is remembered of many; pixels, which take many times as much as a file, of the last ones alone: they
are made again from the file where they are wanted later.
"""

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass

from quire_engine.errors import InvalidParameter
from quire_engine.multimodal.pictures import PictureLimits, read_picture
from quire_engine.multimodal.processor import ImageProcessor, ProcessedImage

_FACTS = 1 << 14  # images
_PIXELS = 256 << 20  # bytes


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """How an image stands in a prompt; see ProcessedImage."""

    replacement: str
    num_tokens: int
    rows: int
    columns: int


class ImageLibrary:
    """For any number of threads. Images go by their keys; `what` is how errors call one."""

    def __init__(self, processor: ImageProcessor) -> None:
        self.processor = processor
        self._limits = PictureLimits()
        self._lock = threading.Lock()
        self._facts: OrderedDict[bytes, ImageFacts] = OrderedDict()
        self._made: OrderedDict[bytes, ProcessedImage] = OrderedDict()
        self._size = 0  # bytes of these

    def known(self, key: bytes) -> ImageFacts | None:
        """Without a look at the image."""
        with self._lock:
            found = self._facts.get(key)
            if found is not None:
                self._facts.move_to_end(key)
            return found

    def facts(self, key: bytes, file: bytes, what: str) -> ImageFacts:
        """Raises InvalidParameter for what is no image, or none for this model."""
        found = self.known(key)
        if found is None:
            made = self.made(key, file, what)
            found = ImageFacts(made.replacement, made.num_tokens, made.rows, made.columns)
            with self._lock:
                self._facts[key] = found
                if len(self._facts) > _FACTS:
                    self._facts.popitem(last=False)
        return found

    def made(self, key: bytes, file: bytes, what: str) -> ProcessedImage:
        """With its pixels. Raises as `facts`."""
        with self._lock:
            if (found := self._made.get(key)) is not None:
                self._made.move_to_end(key)
                return found
        picture = read_picture(file, what, self._limits)
        try:
            made = self.processor.process(picture)
        except InvalidParameter as error:
            raise InvalidParameter(f"{what}: {error}", error.parameter) from error
        with self._lock:
            if key not in self._made:
                self._size += _bytes_of(made)
            self._made[key] = made
            while self._size > _PIXELS and len(self._made) > 1:
                self._size -= _bytes_of(self._made.popitem(last=False)[1])
        return made


def key_of(file: bytes, salt: bytes = b"") -> bytes:
    """Equal for equal files alone, under one salt."""
    return hashlib.sha256(salt + file).digest()


def _bytes_of(made: ProcessedImage) -> int:
    return sum(values.nbytes for values in made.inputs.values())
