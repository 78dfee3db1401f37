"""What is put on record: of a request, of a refusal, of what an administrator did."""

import base64
import json
from dataclasses import dataclass, fields
from typing import Any

_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
_ASCII = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class UsageDelta:
    """What one request adds to the usage of its tenant, key and model, in tokens."""

    model: str
    prompt_tokens: int
    cached_tokens: int  # of these, found in the cache
    output_tokens: int


_USAGE = tuple(field.name for field in fields(UsageDelta))


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One entry of the audit log, and what it adds to usage."""

    kind: str  # request, refused, admin
    at: int  # seconds since 1970
    tenant: str
    key: str  # the id of a key, or another name of who called
    body: dict[str, Any]  # of JSON's values
    usage: UsageDelta | None = None
    content: bytes | None = None  # the prompt and the answers, encrypted

    @property
    def whole_body(self) -> dict[str, Any]:
        """With what the log finds it by."""
        found_by = self._found_by
        assert not found_by.keys() & self.body.keys(), "what the body says would be lost"
        return self.body | found_by

    @property
    def _found_by(self) -> dict[str, Any]:
        return {"kind": self.kind, "at": self.at, "tenant": self.tenant, "key": self.key}

    def to_bytes(self) -> bytes:
        """For a journal."""
        content = base64.b64encode(self.content).decode() if self.content is not None else None
        usage = {name: getattr(self.usage, name) for name in _USAGE} if self.usage is not None else None
        return canonical(self._found_by | {"body": self.body, "usage": usage, "content": content})

    @staticmethod
    def from_bytes(data: bytes) -> "Record":
        """The inverse. Raises ValueError for what is no record to this version of Quire."""
        values = json.loads(data)
        try:
            if values["usage"] is not None:
                values["usage"] = UsageDelta(**values["usage"])
            if values["content"] is not None:
                values["content"] = base64.b64decode(values["content"])
            return Record(**values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"a record of another version of Quire: {error}") from error


def canonical(values: Any) -> bytes:
    """JSON with one way to write everything. Raises ValueError for what JSON has no way for, as NaN."""
    try:
        return _ENCODER.encode(values).encode()
    except UnicodeEncodeError:  # lone surrogates, which a client may send: UTF-8 has none
        return _ASCII.encode(values).encode()
