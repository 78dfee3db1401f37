"""`governance.yaml`: where the database is, and what is kept on record."""

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from quire_engine.errors import InvalidParameter

_MOST_BYTES = 1 << 20
_NAME = "governance.yaml"
VARIABLE = "QUIRE_GOVERNANCE"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AuditFile(_Section):
    """The audit log."""

    signing_key: str = "audit-key.pem"  # an Ed25519 private key in PEM; made where it is not there
    content: Literal["none", "encrypted"] = "none"  # whether prompts and answers are kept
    content_key: str | None = None  # a file with 32 bytes in base64, which encrypts them
    content_days: Annotated[int, Field(ge=1)] = 30  # until they are erased
    days: Annotated[int | None, Field(ge=1)] = None  # until records are; null: never


class GovernanceFile(_Section):
    """What may stand in the file. Paths are relative to its folder; ${NAME} in `database` is taken from the
    environment."""

    database: str = "sqlite:///governance.db"
    journal: str = "journal"  # a folder on each gateway's host: records on their way to the database
    grace: Annotated[float, Field(ge=0)] = 3600.0  # seconds that gateways serve without the database
    audit: AuditFile = AuditFile()


@dataclass(frozen=True, kw_only=True)
class Governance:
    """A file as it was read, with what it names: gateways on other hosts need nothing else."""

    database: str = field(repr=False)  # its URL
    journal: str  # a folder
    grace: float  # seconds
    audit: AuditFile
    signing_key: bytes = field(repr=False)  # Ed25519, PEM
    content_key: bytes | None = field(default=None, repr=False)


def find_file(given: str | None) -> Path:
    """--governance, or else $QUIRE_GOVERNANCE, governance.yaml here, or in Quire's folder. Raises InvalidParameter."""
    home = Path(os.environ.get("QUIRE_HOME") or Path.home() / ".quire")
    named = given or os.environ.get(VARIABLE)
    for path in [Path(named)] if named else [Path(_NAME), home / _NAME]:
        if path.is_file():
            return path
    raise InvalidParameter(
        f"{named} is no file"
        if named
        else f"there is no {_NAME} here or in {home}; give --governance FILE (an empty file will do)",
        "governance",
    )


def read_governance(path: Path) -> Governance:
    """Makes the signing key where there is none yet. Raises InvalidParameter."""
    folder = path.resolve().parent
    try:
        with path.open("rb") as opened:
            text = opened.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        given: Any = yaml.safe_load(text.decode())
    except Exception as error:  # PyYAML raises whatever its constructors meet
        raise InvalidParameter(f"{path} cannot be read: {error}", "governance") from error
    try:
        file = GovernanceFile.model_validate({} if given is None else given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidParameter(f"{path}: {where or 'it'}: {first['msg']}", "governance") from error
    url = os.path.expandvars(file.database)
    head, separator, name = url.partition(":///")
    if separator and head.startswith("sqlite") and name and not name.startswith("/"):
        url = f"{head}:///{folder / name}"
    return Governance(
        database=url,
        journal=str(folder / file.journal),
        grace=file.grace,
        audit=file.audit,
        signing_key=_signing_key(folder / file.audit.signing_key),
    )


def _signing_key(path: Path) -> bytes:
    if not path.exists():
        made = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(made)
            with contextlib.suppress(FileExistsError):  # another process was faster
                os.link(fresh, path)
            fresh.unlink()
        except OSError as error:
            raise InvalidParameter(f"audit.signing_key: {path} cannot be written: {error}", "governance") from error
    try:
        pem = path.read_bytes()
        key = serialization.load_pem_private_key(pem, None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidParameter(f"audit.signing_key: {path} cannot be read: {error}", "governance") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidParameter(f"audit.signing_key: {path} is no Ed25519 key", "governance")
    return pem
