"""The rules of a `policies:` list, as they are written."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from quire_engine.errors import InvalidParameter
from yarl import URL

from quire_cluster.governance.checks.patterns import MOST_LONGEST

Action = Literal["redact", "stop", "flag"]
OnError = Literal["closed", "open"]
PiiKind = Literal["credit_card", "iban", "email", "us_ssn", "phone", "ip_address"]

MOST_SEEN = 16_000  # characters of an answer that a call about it sees, unless more are held
_MOST_RULES = 100
_MOST_PATTERNS = 100
_MOST_WORDS = 10_000
_MOST_FILE = 1 << 20  # bytes

Text = Annotated[str, Field(min_length=1)]
Globs = Annotated[list[Text], Field(min_length=1)]
Seconds = Annotated[float, Field(gt=0, le=60)]
Every = Annotated[int, Field(ge=1, le=MOST_SEEN)]


class _Rule(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    on: Annotated[list[Literal["input", "output"]], Field(min_length=1)] = ["input", "output"]
    action: Action  # redact: something else stands there; stop: nothing more comes; flag: it is noted
    tenants: Globs = ["*"]
    models: Globs = ["*"]


class PiiRule(_Rule):
    """What is personal, by its form."""

    check: Literal["pii"]
    kinds: Annotated[list[PiiKind], Field(min_length=1)]


class PatternRule(_Rule):
    """Regular expressions."""

    check: Literal["pattern"]
    patterns: Annotated[list[Text], Field(min_length=1, max_length=_MOST_PATTERNS)]
    longest: Annotated[int | None, Field(ge=1, le=MOST_LONGEST)] = None  # characters of a match


class WordsRule(_Rule):
    """Whole words, whatever their case."""

    check: Literal["words"]
    words: Annotated[list[Text], Field(min_length=1, max_length=_MOST_WORDS)]


class WebhookRule(_Rule):
    """A policy of one's own, asked by HTTP."""

    check: Literal["webhook"]
    url: Annotated[str, Field(max_length=2048)]
    timeout: Seconds = 2.0
    on_error: OnError = "closed"  # closed: nothing more comes; open: it is noted
    every: Every = 200  # characters of an answer between calls

    @field_validator("url")
    @classmethod
    def _is_whole(cls, given: str) -> str:
        mend = "write http:// or https://, a host and a path, without a name, a password and a #"
        try:
            url = URL(given)
        except ValueError as error:
            raise ValueError(f"{error}; {mend}") from error
        if url.scheme not in ("http", "https") or not url.host or "@" in url.raw_authority or url.fragment:
            raise ValueError(mend)
        return given


class JudgeRule(_Rule):
    """Another deployment, asked by chat."""

    check: Literal["judge"]
    model: Text
    prompt: Annotated[str, Field(max_length=MOST_SEEN)]
    stop_on: Text
    timeout: Seconds = 10.0
    on_error: OnError = "closed"
    every: Every = 400

    @field_validator("prompt")
    @classmethod
    def _asks(cls, given: str) -> str:
        if "{text}" not in given:
            raise ValueError("write {text} where the text that is judged shall stand")
        return given

    @field_validator("stop_on")
    @classmethod
    def _says_something(cls, given: str) -> str:
        if not given.strip():
            raise ValueError("write what the answer begins with where the text shall not pass")
        return given


Rule = Annotated[PiiRule | PatternRule | WordsRule | WebhookRule | JudgeRule, Field(discriminator="check")]
AnyRule = PiiRule | PatternRule | WordsRule | WebhookRule | JudgeRule
_RULE: TypeAdapter[AnyRule] = TypeAdapter(Rule)


def read_rules(given: Sequence[Mapping[Any, Any]], folder: Path) -> tuple[AnyRule, ...]:
    """The rules, with the words of their files, which are named as seen from the folder. Raises InvalidParameter."""
    if len(given) > _MOST_RULES:
        raise InvalidParameter(f"policies: there are {len(given)}, and {_MOST_RULES} may be; join some", "governance")
    rules = tuple(_read(number, one, folder) for number, one in enumerate(given))
    names = [rule.name for rule in rules]
    for name in names:
        if names.count(name) > 1:
            raise refused(name, "name", "another rule has it too; give each its own")
    return rules


def refused(rule: str, field: str, why: str) -> InvalidParameter:
    """A rule that cannot be kept to."""
    return InvalidParameter(f"policies: rule {rule}: {field}: {why}", "governance")


def _read(number: int, given: Mapping[Any, Any], folder: Path) -> AnyRule:
    if not isinstance(given, Mapping):
        raise refused(f"number {number + 1}", "it", "it is no mapping; write `- name: ...` and its fields below")
    fields = dict(given)
    name = fields["name"] if isinstance(fields.get("name"), str) else f"number {number + 1}"
    if True in fields:  # YAML 1.1 takes the word `on` for true
        if "on" in fields:
            raise refused(name, "on", "it is there twice; leave one out")
        fields["on"] = fields.pop(True)
    if fields.get("check") == "words" and "file" in fields:
        if "words" in fields:
            raise refused(name, "file", "there are `words`, too; leave one out, or make two rules of it")
        fields["words"] = _words_of(name, folder, fields.pop("file"))
    try:
        return _RULE.validate_python(fields)
    except ValidationError as error:
        raise _explained(name, error) from error


def _words_of(name: str, folder: Path, file: object) -> list[str]:
    if not isinstance(file, str):
        raise refused(name, "file", "it is no name of a file; write `file: words.txt`")
    try:
        with (folder / file).open("rb") as opened:
            content = opened.read(_MOST_FILE + 1)
        if len(content) > _MOST_FILE:
            raise ValueError(f"it has more than {_MOST_FILE} bytes; make two rules of it")
        text = content.decode()
    except (OSError, ValueError) as error:
        raise refused(name, "file", f"{file} cannot be read: {error}; one word stands on a line, in UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _explained(name: str, error: ValidationError) -> InvalidParameter:
    first = error.errors()[0]
    place = [str(step) for step in first["loc"]]
    if place and place[0] in ("pii", "pattern", "words", "webhook", "judge"):
        place = place[1:]
    why = re.sub("^Value error, ", "", first["msg"])
    field = ".".join(place)
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return refused(name, "check", "write one of pii, pattern, words, webhook, judge")
    if first["type"] == "extra_forbidden":
        return refused(name, field, "there is no such field for this check; leave it out, or mend its spelling")
    if first["type"] == "missing":
        return refused(name, field, "it is missing; write it")
    if isinstance(first["input"], bool):
        why += f'; YAML takes such a word for {str(first["input"]).lower()}: put it in quotes, as in "no"'
    return refused(name, field, why)
