"""The kinds of fields that requests have. Where a value may have one of several forms, or be long, it is checked by
hand: pydantic would try every form on every item and write an error for each."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError
from quire_engine.errors import InvalidParameter
from quire_engine.text.messages import MAX_TEXT, content_of, text_of

MAX_TOKENS = 1 << 20  # token ids of one call
MAX_MESSAGES = 40_000


class Strict(BaseModel):
    """Null means left out, whatever the name: some clients send all the fields they know. Others that are unknown are
    errors."""

    model_config = ConfigDict(extra="forbid", strict=True)
    renamed: ClassVar[dict[str, str]] = {}  # names of old → what to write instead

    @model_validator(mode="before")
    @classmethod
    def _given(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            raise _wrong("it must be an object with named fields")
        given = {name: value for name, value in values.items() if value is not None}
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for name in given:
            if name in cls.renamed:
                raise _wrong(f"is not served; write {cls.renamed[name]}", field=name)
            if name not in known:
                raise _wrong("is not a parameter of this call; leave it out", field=name[:60])
        return given


def _wrong(message: str, *, field: str | None = None) -> PydanticCustomError:
    """`field`: which one is at fault, where that is not the one that is being checked: the message's subject."""
    return PydanticCustomError("wrong", "{message}", {"message": message, "field": field})


def text(value: Any) -> str:
    """A text of a length that could fit any context."""
    if not isinstance(value, str):
        raise _wrong("it must be a text")
    if len(value) > MAX_TEXT:
        raise _wrong(f"it has {len(value)} characters; at most {MAX_TEXT} are read")
    return value


def _all(kind: type, values: Iterable[Any]) -> bool:
    """Whether every one is exactly of a kind (True is no integer)."""
    return set(map(type, values)) <= {kind}


def text_or_texts(value: Any) -> str | list[str]:
    """Of a list, the first wrong item alone is told."""
    if isinstance(value, list):
        if not _all(str, value):
            raise _wrong("it must be a text or a list of texts")
        return value
    return text(value)


def prompts(value: Any) -> str | list[str] | list[int] | list[list[int]]:
    """A text, texts, token ids, or lists of token ids."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, list):
        if _all(str, value):
            return value
        if _all(int, value):
            return _token_ids(value)
        if _all(list, value):
            for one in value:
                if not _all(int, one):
                    break
                _token_ids(one)
            else:
                return value
    raise _wrong("it must be a text, a list of texts, a list of token ids, or a list of such lists")


def _token_ids(value: list[int]) -> list[int]:
    if len(value) > MAX_TOKENS:
        raise _wrong(f"it has {len(value)} token ids; at most {MAX_TOKENS} are read")
    if value and not 0 <= min(value) <= max(value) < 2**31:
        raise _wrong("it holds a number that is no token id")
    return value


def token_ids(value: Any) -> list[int]:
    """A list of them."""
    if not isinstance(value, list) or not _all(int, value):
        raise _wrong("it must be a list of token ids")
    return _token_ids(value)


@dataclass(frozen=True, slots=True)
class Message:
    """One message; what else a template may read (name, tool calls of a past turn) is passed on to it."""

    role: str
    content: str | list[dict[str, Any]] | None
    more: dict[str, Any]

    def for_template(self) -> dict[str, Any]:
        """As the chat template gets it."""
        return {"role": self.role, "content": self.content} | self.more

    def forget_images(self) -> None:
        """Their data URLs, which are long, once the images are made."""
        if isinstance(self.content, list):
            self.content[:] = [part for part in self.content if part["type"] == "text"]

    @property
    def text(self) -> str:
        """Its content as one text."""
        return text_of(self.content)


def messages(value: Any) -> list[Message]:
    """A conversation. The first thing that is wrong with it is told."""
    if not isinstance(value, list):
        raise _wrong("it must be a list of messages")
    if not 1 <= len(value) <= MAX_MESSAGES:
        raise _wrong(f"it has {len(value)} messages; from 1 to {MAX_MESSAGES} are read")
    return [_message(place, one) for place, one in enumerate(value)]


def _message(place: int, value: Any) -> Message:
    try:
        content = content_of(value, place)
    except InvalidParameter as error:
        raise _wrong(str(error)) from error
    more = {name: more for name, more in value.items() if more is not None and name not in ("role", "content")}
    return Message(value["role"], content, more)


def documents(value: Any) -> list[str]:
    """Texts, or objects that hold a text."""
    if not isinstance(value, list):
        raise _wrong("it must be a list of texts, or of objects with a text")
    return [text(one.get("text") if isinstance(one, dict) else one) for one in value]


def at_most(limit: int) -> BeforeValidator:
    """So many entries of a list or an object, counted before any is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, (list, dict)) and len(value) > limit:
            raise _wrong(f"it has {len(value)} entries; at most {limit} are allowed")
        return value

    return BeforeValidator(check)


Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Text = Annotated[str, PlainValidator(text)]
TextOrTexts = Annotated[str | list[str], PlainValidator(text_or_texts)]
Prompts = Annotated[str | list[str] | list[int] | list[list[int]], PlainValidator(prompts)]
TokenIds = Annotated[list[int], PlainValidator(token_ids)]
Messages = Annotated[list[Message], PlainValidator(messages)]
Documents = Annotated[list[str], PlainValidator(documents)]


class WithoutEffect:
    """Marks a field that asks for nothing here; docs/api.md lists them."""


Ignored = Annotated[Any, WithoutEffect()]
