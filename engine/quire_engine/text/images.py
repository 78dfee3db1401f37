"""Images in prompts: what stands for them in the text, and where their tokens are."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from quire_engine.errors import InvalidParameter

if TYPE_CHECKING:
    from quire_engine.request import ImageSpan


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptImage:
    """An image as a prompt has it."""

    what: str  # how a client calls it
    key: bytes  # equal for equal files alone
    replacement: str  # its text in the prompt
    num_tokens: int  # of that text, those that its embeddings replace
    rows: int = 0  # of the embeddings, where positions have rows and columns
    columns: int = 0


def parts_of(messages: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
    """The parts of a conversation that are not texts, each with its message."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if part["type"] != "text":
                yield message, part


def check_conversation(messages: Sequence[Mapping[str, Any]], placeholder: str) -> None:
    """Raises InvalidParameter where a text has the `placeholder` that the chat template writes for an image."""
    for place, message in enumerate(messages):
        if placeholder in _text_in(message.get("content")):
            _refuse(f"message {place} holds {placeholder!r}, which stands for an image; leave it out")


def expand(text: str, images: Sequence[PromptImage], placeholder: str, lost: PromptImage | None = None) -> str:
    """A prompt with what stands for each image in place of its `placeholder`. Raises InvalidParameter where there are
    not as many; where there are fewer it is said of the `lost` one (default: the first)."""
    pieces = text.split(placeholder)
    counts = f"there are {len(images)} images, and the prompt has {len(pieces) - 1} places for them ({placeholder})"
    if len(pieces) > len(images) + 1:
        _refuse(f"{counts}; leave it out of what else is told, tools among it")
    if len(pieces) <= len(images):
        _refuse(f"{(lost or images[0]).what}: {counts}; chat templates write those of messages of role 'user'")
    return pieces[0] + "".join(image.replacement + after for image, after in zip(images, pieces[1:], strict=True))


def first_lost(messages: Iterable[Mapping[str, Any]]) -> PromptImage | None:
    """The first image that a chat template may have no place for: in no message of a user."""
    return next((part["image"] for message, part in parts_of(messages) if message["role"] != "user"), None)


def spans_of(tokens: Sequence[int], images: Sequence[PromptImage], image_token: int) -> "tuple[ImageSpan, ...]":
    """Where the images of a prompt stand. Raises InvalidParameter where its text has tokens of images besides."""
    from quire_engine.request import ImageSpan  # who only names images goes without numpy

    places = [place for place, token in enumerate(tokens) if token == image_token]
    if len(places) != sum(image.num_tokens for image in images):
        _refuse("the text holds the token that stands for a piece of an image; leave it out")
    spans, at = [], 0
    for image in images:
        first, last = places[at], places[at + image.num_tokens - 1]
        spans.append(ImageSpan(image.key, first, last + 1 - first, image.rows, image.columns))
        at += image.num_tokens
    return tuple(spans)


def _text_in(content: Any) -> str:
    if isinstance(content, list):
        return "\0".join(part["text"] for part in content if part["type"] == "text")
    return content if isinstance(content, str) else ""


def _refuse(message: str) -> NoReturn:
    raise InvalidParameter(message, "messages")
