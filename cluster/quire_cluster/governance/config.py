"""`governance.yaml`: where the database is, and what is kept on record."""

import base64
import contextlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from quire_engine.errors import InvalidParameter

from quire_cluster.governance.callers import Role
from quire_cluster.governance.checks.policies import Policies
from quire_cluster.governance.tokens import TokenIssuer
from quire_cluster.strict_yaml import StrictLoader

_MOST_BYTES = 1 << 20
_CONTENT_KEY = 32  # bytes, of AES-256
_NAME = "governance.yaml"
_FROM_ENVIRONMENT = re.compile(r"\$\{(\w+)\}")
VARIABLE = "QUIRE_GOVERNANCE"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ClientName(_Section):
    """Who calls with a client certificate of this name and no key: over gRPC, where `--ssl-ca-certs` asks for them."""

    name: str  # the first URI or DNS name of the certificate, or else its common name
    tenant: str
    role: Role = Role.USER


class AuditFile(_Section):
    """The audit log."""

    signing_key: str = "audit-key.pem"  # an Ed25519 private key in PEM; made where it is not there
    content_key: str | None = None  # a file with 32 bytes in base64: prompts and answers are kept, encrypted with it
    content_days: Annotated[int, Field(ge=1)] = 30  # until these are erased
    days: Annotated[int | None, Field(ge=1)] = None  # until records are; null: never


class GovernanceFile(_Section):
    """What may stand in the file. Paths are relative to its folder; ${NAME} in `database` is taken from the
    environment."""

    database: str = "sqlite:///governance.db"
    journal: str = "journal"  # a folder on each gateway's host: records on their way to the database
    grace: Annotated[float, Field(ge=0)] = 3600.0  # seconds that gateways serve without the database
    audit: AuditFile = AuditFile()
    issuers: tuple[TokenIssuer, ...] = ()  # identity providers, whose tokens are as good as keys
    clients: tuple[ClientName, ...] = ()
    policies: tuple[dict[Any, Any], ...] = ()  # see docs/policies.md

    @field_validator("clients")
    @classmethod
    def _one_of_each_name(cls, clients: tuple[ClientName, ...]) -> tuple[ClientName, ...]:
        names = [client.name for client in clients]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{min(twice)!r} is there twice; a certificate's name is one tenant's")
        return clients


@dataclass(frozen=True, kw_only=True)
class Governance:
    """A file as it was read, with what it names: gateways on other hosts need nothing else."""

    database: str = field(repr=False)  # its URL
    journal: str  # a folder
    grace: float  # seconds
    embedded: bool  # SQLite: a file of one host
    audit: AuditFile
    issuers: tuple[TokenIssuer, ...]
    clients: tuple[ClientName, ...]
    policies: tuple[dict[str, Any], ...]  # in their canonical form, with the words of files
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
        given: Any = yaml.load(text.decode(), StrictLoader)
    except Exception as error:  # PyYAML raises whatever its constructors meet
        raise InvalidParameter(f"{path} cannot be read: {error}", "governance") from error
    try:
        file = GovernanceFile.model_validate({} if given is None else given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidParameter(
            f"{path}: {where or 'it'}: {first['msg'].removeprefix('Value error, ')}", "governance"
        ) from error
    if unset := set(_FROM_ENVIRONMENT.findall(file.database)) - os.environ.keys():
        raise InvalidParameter(f"{path}: database: the environment has no {min(unset)}; set it", "governance")
    url = _FROM_ENVIRONMENT.sub(lambda found: os.environ[found[1]], file.database)
    head, separator, name = url.partition(":///")
    if separator and head.startswith("sqlite") and name and not name.startswith("/"):
        url = f"{head}:///{folder / name}"
    return Governance(
        database=url,
        journal=str(folder / file.journal),
        grace=file.grace,
        embedded=url.startswith("sqlite"),
        audit=file.audit,
        issuers=tuple(_with_path(issuer, folder) for issuer in file.issuers),
        clients=file.clients,
        policies=tuple(Policies.parse(file.policies, folder).canonical),
        signing_key=_signing_key(folder / file.audit.signing_key),
        content_key=_content_key(folder / file.audit.content_key) if file.audit.content_key is not None else None,
    )


def _with_path(issuer: TokenIssuer, folder: Path) -> TokenIssuer:
    return issuer if "://" in issuer.jwks else issuer.model_copy(update={"jwks": str(folder / issuer.jwks)})


def _content_key(path: Path) -> bytes:
    try:
        key = base64.b64decode(path.read_text().strip(), validate=True)
    except (OSError, ValueError) as error:
        raise InvalidParameter(f"audit.content_key: {path} cannot be read: {error}", "governance") from error
    if len(key) != _CONTENT_KEY:
        raise InvalidParameter(
            f"audit.content_key: {path} has {len(key)} bytes; write {_CONTENT_KEY} in base64, as `openssl rand -base64 "
            f"{_CONTENT_KEY}` does",
            "governance",
        )
    return key


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
