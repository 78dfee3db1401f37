"""TLS of the servers that clients reach: a certificate and its key, in files that may be renewed while they serve."""

import asyncio
import logging
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from quire_engine.errors import InvalidParameter

from quire_cluster.config import GatewayConfig

log = logging.getLogger(__name__)
_LOOK = 1.0  # seconds between two looks at the files
_MOST_BYTES = 1 << 20  # of a file
_Stamp = tuple[tuple[int, int, int] | None, ...]


@dataclass(frozen=True)
class _Served:
    """What connections that begin now are met with."""

    http: ssl.SSLContext
    grpc: grpc.ServerCertificateConfiguration


class Tls:
    """`follow` takes up files that are renewed. What has begun goes on as it began."""

    def __init__(self, certificate: str, key: str, client_ca: str | None = None) -> None:
        """Files in PEM: a certificate with those that lead to its CA, its private key, and the CAs whose clients alone
        may connect (None: all). Raises InvalidParameter, which names the option."""
        self._certificate, self._key, self._client_ca = Path(certificate), Path(key), client_ca and Path(client_ca)
        self._stamp = self._look()
        self._served = self._read()
        self._told = self._served.grpc

    @staticmethod
    def of(config: GatewayConfig) -> "Tls | None":
        """None where the options name no certificate. Raises InvalidParameter."""
        if config.ssl_certfile is None and config.ssl_keyfile is None:
            if config.ssl_ca_certs is None:
                return None
            raise InvalidParameter(
                "clients show certificates over TLS alone; give --ssl-certfile and --ssl-keyfile with --ssl-ca-certs",
                "ssl_ca_certs",
            )
        if config.ssl_certfile is None or config.ssl_keyfile is None:
            raise InvalidParameter(
                "a certificate and its key go together; give both --ssl-certfile and --ssl-keyfile, or neither",
                "ssl_keyfile" if config.ssl_keyfile is None else "ssl_certfile",
            )
        return Tls(config.ssl_certfile, config.ssl_keyfile, config.ssl_ca_certs)

    @property
    def context(self) -> ssl.SSLContext:
        """For an HTTP connection that begins now."""
        return self._served.http

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Of one gRPC server."""
        return grpc.dynamic_ssl_server_credentials(
            self._served.grpc, self._renewed, require_client_authentication=self._client_ca is not None
        )

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Asked by gRPC, on a thread of its own, before each handshake. None: as before."""
        now = self._served.grpc
        if now is self._told:
            return None
        self._told = now
        return now

    async def follow(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(_LOOK)
            await asyncio.to_thread(self.renew)

    def renew(self) -> None:
        """Takes up what has changed. Files that do not work together are logged, and what was read before them holds:
        the next change is looked at again."""
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._served = self._read()
            log.info("%s was renewed", self._certificate)
        except InvalidParameter as error:
            log.error("the certificate that was read before goes on until its files have changed again: %s", error)

    def _look(self) -> _Stamp:
        """Which changes with the files. Taken before they are read: what changes meanwhile is read again."""
        return tuple(_stamp_of(path) for path in (self._certificate, self._key, self._client_ca) if path)

    def _read(self) -> _Served:
        chain_pem, key_pem = _read(self._certificate, "ssl_certfile"), _read(self._key, "ssl_keyfile")
        certificate = _certificates(chain_pem, self._certificate, "ssl_certfile")[0]
        self._check(certificate, key_pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["http/1.1"])
        try:
            # A key that is encrypted was refused; were it so by now, OpenSSL would ask at the terminal.
            context.load_cert_chain(self._certificate, self._key, password="")
        except OSError as error:
            raise InvalidParameter(
                f"--ssl-certfile {self._certificate} cannot be used: {error}; have a new one issued", "ssl_certfile"
            ) from error
        client_ca: bytes | None = None
        if self._client_ca:
            client_ca = _read(self._client_ca, "ssl_ca_certs")
            for one in _certificates(client_ca, self._client_ca, "ssl_ca_certs"):
                context.load_verify_locations(cadata=one.public_bytes(serialization.Encoding.DER))
            context.verify_mode = ssl.CERT_REQUIRED
        return _Served(context, grpc.ssl_server_certificate_configuration([(key_pem, chain_pem)], client_ca))

    def _check(self, certificate: x509.Certificate, key_pem: bytes) -> None:
        """What users meet, in words. Raises InvalidParameter."""
        now = datetime.now(UTC)
        if certificate.not_valid_after_utc < now:
            raise InvalidParameter(
                f"--ssl-certfile {self._certificate} expired at {certificate.not_valid_after_utc}; renew it",
                "ssl_certfile",
            )
        if certificate.not_valid_before_utc > now:
            raise InvalidParameter(
                f"--ssl-certfile {self._certificate} is not valid before {certificate.not_valid_before_utc}; set this "
                "machine's clock, or have another one issued",
                "ssl_certfile",
            )
        try:
            key = serialization.load_pem_private_key(key_pem, None)
        except TypeError as error:
            raise InvalidParameter(
                f"--ssl-keyfile {self._key} is encrypted; decrypt it with `openssl pkey -in {self._key} -out FILE`, "
                "readable by this user alone",
                "ssl_keyfile",
            ) from error
        except (ValueError, UnsupportedAlgorithm) as error:
            raise InvalidParameter(
                f"--ssl-keyfile {self._key} holds no private key in PEM: {error}", "ssl_keyfile"
            ) from error
        if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
            raise InvalidParameter(
                f"--ssl-keyfile {self._key} holds another key than RSA or ECDSA, which gRPC does not speak; have a "
                "certificate issued for one of those",
                "ssl_keyfile",
            )
        if key.public_key() != certificate.public_key():
            raise InvalidParameter(
                f"--ssl-keyfile {self._key} is not the key of --ssl-certfile {self._certificate}, whose first "
                "certificate has to be the server's own; give the two that belong together",
                "ssl_keyfile",
            )


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:  # what is wrong is told where it is read
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _read(path: Path, name: str) -> bytes:
    option = "--" + name.replace("_", "-")
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise InvalidParameter(
            f"{option} {path} cannot be read ({error.strerror}); every host of a gateway has to have it", name
        ) from error
    if len(content) > _MOST_BYTES:
        raise InvalidParameter(f"{option} {path} has more than {_MOST_BYTES} bytes; give a PEM file", name)
    return content


def _certificates(pem: bytes, path: Path, name: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        option = "--" + name.replace("_", "-")
        raise InvalidParameter(f"{option} {path} holds no certificates in PEM: {error}", name) from error
