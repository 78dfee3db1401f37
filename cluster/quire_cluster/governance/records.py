"""What is put on record: of a request, of a refusal, of what an administrator did."""

import base64
import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class UsageDelta:
    """What one request adds to the usage of its tenant, key and model, in tokens."""

    model: str
    prompt_tokens: int
    cached_tokens: int  # of these, found in the cache
    output_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One entry of the audit log, and what it adds to usage."""

    kind: str  # request, refused, admin
    at: int  # seconds since 1970
    tenant: str
    key: str  # the id of a key, or another name of who called
    body: dict[str, Any]  # of JSON's values
    usage: UsageDelta | None = None
    content: bytes | None = None  # what is kept encrypted: the prompt, and the answers

    @property
    def whole_body(self) -> dict[str, Any]:
        """With what the log finds it by."""
        return self.body | {"kind": self.kind, "at": self.at, "tenant": self.tenant, "key": self.key}

    def to_bytes(self) -> bytes:
        """For a journal."""
        content = base64.b64encode(self.content).decode() if self.content is not None else None
        return canonical(asdict(self) | {"content": content})

    @staticmethod
    def from_bytes(data: bytes) -> "Record":
        """The inverse."""
        values = json.loads(data)
        if values["usage"] is not None:
            values["usage"] = UsageDelta(**values["usage"])
        if values["content"] is not None:
            values["content"] = base64.b64decode(values["content"])
        return Record(**values)


def canonical(values: Any) -> bytes:
    """JSON with one way to write everything."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode(
        "utf-8", "surrogatepass"
    )
