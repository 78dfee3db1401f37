"""TLS of a gateway's two servers, over real sockets and with real certificates; without a model."""

import asyncio
import contextlib
import logging
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import uvloop
from certificates import LOCAL, Authority, Pair, write_key
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from grpc_health.v1 import health_pb2, health_pb2_grpc
from quire_cluster.config import GatewayConfig
from quire_cluster.gateway.process import Gateway
from quire_cluster.gateway.tls import Tls
from quire_cluster.start import absolute
from quire_engine.errors import InvalidParameter
from web import LIMIT, free_port

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def run(main: Coroutine[Any, Any, None], loop: str = "asyncio") -> None:
    async def within() -> None:
        async with asyncio.timeout(LIMIT):
            await main

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(within())


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def config_of(pair: Pair, **options: Any) -> GatewayConfig:
    files = {"ssl_certfile": str(pair.certificate), "ssl_keyfile": str(pair.key)}
    return GatewayConfig(**(files | {"port": 0, "grpc_port": free_port()} | options))


@contextlib.asynccontextmanager
async def gateway(pair: Pair, **options: Any) -> AsyncIterator[Gateway]:
    served = Gateway(config_of(pair, **options), None, name="test")
    served.open()
    await served.start()
    try:
        yield served
    finally:
        await served.stop()


def context(authority: Authority, pair: Pair | None = None) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=authority.file)
    if pair is not None:
        made.load_cert_chain(pair.certificate, pair.key)
    return made


async def get(served: Gateway, trusts: ssl.SSLContext) -> int:
    async with httpx.AsyncClient(verify=trusts, timeout=LIMIT) as client:
        return (await client.get(f"https://localhost:{served.http_port}/health")).status_code


async def check(served: Gateway, credentials: grpc.ChannelCredentials) -> int:
    """gRPC's health service: what it says."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    async with grpc.aio.secure_channel(f"localhost:{served.grpc_port}", credentials, options=options) as channel:
        return (await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())).status


def credentials(authority: Authority, pair: Pair | None = None) -> grpc.ChannelCredentials:
    key, chain = (pair.key.read_bytes(), pair.certificate.read_bytes()) if pair is not None else (None, None)
    return grpc.ssl_channel_credentials(authority.file.read_bytes(), key, chain)


# ---- who is served ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("key", [ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 2048)])
def test_both_doors_speak_tls(key: Any, loop: str, authority: Authority) -> None:
    async def main() -> None:
        async with gateway(authority.issue("server", *LOCAL, key=key)) as served:
            assert await get(served, context(authority)) == 200
            assert await check(served, credentials(authority)) == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await get(served, ssl.create_default_context())
            with pytest.raises(httpx.RemoteProtocolError):
                async with httpx.AsyncClient(timeout=LIMIT) as plain:
                    await plain.get(f"http://localhost:{served.http_port}/health")
            assert await get(served, context(authority)) == 200

    run(main(), loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_requests_that_come_with_the_end_of_the_handshake_are_answered(loop: str, authority: Authority) -> None:
    """As one piece with it, and many on one connection."""

    def talk(port: int) -> bytes:
        """With the handshake's last message held back until the first request is there, too."""
        told, heard = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = context(authority).wrap_bio(heard, told, server_hostname="localhost")
        with socket.create_connection(("127.0.0.1", port)) as to:
            while True:
                try:
                    client.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    to.sendall(told.read())
                    heard.write(to.recv(1 << 16))
            client.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 30)
            client.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            to.sendall(told.read())
            answered = b""
            while True:
                try:
                    if not (more := client.read(1 << 16)):
                        return answered
                    answered += more
                except ssl.SSLWantReadError:
                    heard.write(to.recv(1 << 16))

    async def main() -> None:
        async with gateway(authority.issue("server", *LOCAL)) as served:
            answered = await asyncio.to_thread(talk, served.http_port)
            assert answered.count(b"HTTP/1.1 200 OK") == 31

    run(main(), loop)


def test_clients_show_certificates_where_they_have_to(authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other").issue("client", common_name="client")
    known, server = authority.issue("client", common_name="client"), authority.issue("server", *LOCAL)

    async def main() -> None:
        async with gateway(server, ssl_ca_certs=str(authority.file)) as served:
            assert await get(served, context(authority, known)) == 200
            assert await check(served, credentials(authority, known)) == health_pb2.HealthCheckResponse.NOT_SERVING
            for refused in (None, stranger):
                with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
                    await get(served, context(authority, refused))
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await check(served, credentials(authority, refused))
                assert error.value.code() is grpc.StatusCode.UNAVAILABLE

    run(main())


# ---- who is not ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01\x02\x00"])
def test_who_says_nothing_is_hung_up_on(said: bytes, loop: str, authority: Authority) -> None:
    """Or begins a handshake and does not go on: over HTTP and gRPC."""

    async def main() -> None:
        async with gateway(authority.issue("server", *LOCAL), header_timeout=0.5) as served:
            for port in (served.http_port, served.grpc_port):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(said)
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""
                writer.close()
            assert await get(served, context(authority)) == 200

    run(main(), loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_who_says_nothing_counts_as_a_connection(loop: str, authority: Authority) -> None:
    """One may be there, and 64 more are told so: the next one is hung up on, until others have gone. The gateway ends
    while they are there."""

    async def main() -> None:
        async with gateway(authority.issue("server", *LOCAL), max_connections=1, header_timeout=1000.0) as served:
            open_now = [await asyncio.open_connection("127.0.0.1", served.http_port) for _ in range(65)]
            reader, writer = await asyncio.open_connection("127.0.0.1", served.http_port)
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()
            open_now[0][1].close()
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if await get(served, context(authority)) == 200:  # health is answered beyond the limit, too
                        break
                await asyncio.sleep(0.05)

    run(main(), loop)


# ---- what is renewed ----------------------------------------------------------------------------------------------


async def serial(served: Gateway, trusts: ssl.SSLContext, port: int) -> int:
    _, writer = await asyncio.open_connection("localhost", port, ssl=trusts)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return x509.load_der_x509_certificate(shown).serial_number


def move(pair: Pair, to: Pair) -> None:
    os.replace(pair.key, to.key)
    os.replace(pair.certificate, to.certificate)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_renewed_certificate_is_shown_without_a_restart(
    loop: str, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """And one that is half there, or expired, is not."""
    pair = authority.issue("server", *LOCAL)
    trusts = context(authority)
    over_grpc = context(authority)
    over_grpc.set_alpn_protocols(["h2"])

    def number_of(one: Pair) -> int:
        return x509.load_pem_x509_certificate(one.certificate.read_bytes()).serial_number

    async def until(condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.05)

    async def main() -> None:
        async with gateway(pair) as served, httpx.AsyncClient(verify=trusts, timeout=LIMIT) as kept:
            url = f"https://localhost:{served.http_port}/health"
            assert (await kept.get(url)).status_code == 200
            for _ in range(2):
                fresh = authority.issue("fresh", *LOCAL)
                expected = number_of(fresh)
                move(fresh, pair)
                for port, by in ((served.http_port, trusts), (served.grpc_port, over_grpc)):
                    while await serial(served, by, port) != expected:
                        await asyncio.sleep(0.05)
            for broken in ({"days": (-9, -1)}, {}):
                caplog.clear()
                fresh = authority.issue("fresh", *LOCAL, **broken)
                if not broken:
                    fresh.key.unlink()
                    fresh = Pair(fresh.certificate, authority.issue("other").key)
                move(fresh, pair)
                await until(lambda: "goes on until its files have changed again" in caplog.text)
                assert await serial(served, trusts, served.http_port) == expected
                assert await serial(served, over_grpc, served.grpc_port) == expected
            assert (await kept.get(url)).status_code == 200

    with caplog.at_level(logging.ERROR):
        run(main(), loop)


def test_cas_of_clients_are_renewed_too(authority: Authority, tmp_path: Path) -> None:
    """One that is no longer there is accepted no more."""
    (tmp_path / "later").mkdir()
    later = Authority(tmp_path / "later")
    before, after = authority.issue("client", common_name="x"), later.issue("client", common_name="x")
    cas = tmp_path / "cas.pem"
    cas.write_bytes(authority.file.read_bytes())

    async def accepted(served: Gateway, client: Pair) -> bool:
        try:
            over_http = await get(served, context(authority, client)) == 200
        except httpx.TransportError:
            over_http = False
        try:
            over_grpc = await check(served, credentials(authority, client)) > 0
        except grpc.aio.AioRpcError:
            over_grpc = False
        return over_http and over_grpc if client is after else over_http or over_grpc

    async def main() -> None:
        async with gateway(authority.issue("server", *LOCAL), ssl_ca_certs=str(cas)) as served:
            assert await accepted(served, before) and not await accepted(served, after)
            cas.write_bytes(later.file.read_bytes())
            while await accepted(served, before) or not await accepted(served, after):
                await asyncio.sleep(0.05)

    run(main())


# ---- what cannot be served ----------------------------------------------------------------------------------------


def refusal(pair: Pair, **options: Any) -> InvalidParameter:
    """Of a gateway that is opened."""

    async def main() -> None:
        Gateway(config_of(pair, **options), None, name="test").open()

    with pytest.raises(InvalidParameter) as error:
        asyncio.run(main())
    return error.value


def test_what_cannot_be_served_is_told_at_the_start(authority: Authority, tmp_path: Path) -> None:
    good, other = authority.issue("good", *LOCAL), authority.issue("other", *LOCAL)
    nowhere, words = tmp_path / "nowhere.pem", tmp_path / "words.pem"
    words.write_text("words")
    locked = tmp_path / "locked.pem"
    write_key(locked, ec.generate_private_key(ec.SECP256R1()), b"password")
    cases: list[tuple[Pair, str, str]] = [
        (Pair(nowhere, good.key), "ssl_certfile", "nowhere.pem cannot be read (No such file or directory)"),
        (Pair(good.certificate, nowhere), "ssl_keyfile", "nowhere.pem cannot be read (No such file or directory)"),
        (Pair(words, good.key), "ssl_certfile", "holds no certificates in PEM"),
        (Pair(good.key, good.key), "ssl_certfile", "holds no certificates in PEM"),
        (Pair(good.certificate, words), "ssl_keyfile", "holds no private key in PEM"),
        (Pair(good.certificate, other.key), "ssl_keyfile", "is not the key of"),
        (Pair(good.certificate, locked), "ssl_keyfile", "is encrypted; decrypt it with"),
        (authority.issue("old", *LOCAL, days=(-9, -1)), "ssl_certfile", "expired at"),
        (authority.issue("young", *LOCAL, days=(1, 9)), "ssl_certfile", "is not valid before"),
        (authority.issue("ed", *LOCAL, key=ed25519.Ed25519PrivateKey.generate()), "ssl_keyfile", "RSA or ECDSA"),
        (authority.issue("weak", *LOCAL, key=rsa.generate_private_key(65537, 1024)), "ssl_certfile", "too small"),
    ]
    for pair, option, why in cases:
        error = refusal(pair)
        assert why in str(error) and error.parameter == option, error
    error = refusal(good, ssl_ca_certs=str(words))
    assert "holds no certificates in PEM" in str(error) and error.parameter == "ssl_ca_certs"


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"ssl_certfile": "c.pem"}, "ssl_keyfile"),
        ({"ssl_keyfile": "k.pem"}, "ssl_certfile"),
        ({"ssl_ca_certs": "ca.pem"}, "ssl_ca_certs"),
    ],
)
def test_a_certificate_and_its_key_go_together(options: dict[str, str], missing: str) -> None:
    with pytest.raises(InvalidParameter, match="--ssl-certfile") as error:
        Tls.of(GatewayConfig(**options))
    assert error.value.parameter == missing
    assert Tls.of(GatewayConfig()) is None


def test_paths_are_meant_as_seen_by_who_starts_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = absolute(GatewayConfig(ssl_certfile="tls/c.pem", ssl_keyfile="/etc/k.pem"))
    assert (config.ssl_certfile, config.ssl_keyfile) == (str(tmp_path / "tls/c.pem"), "/etc/k.pem")
    assert config.ssl_ca_certs is None
