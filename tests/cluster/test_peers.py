"""The names of gRPC's clients, by certificates that a server has verified."""

import asyncio
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import LOCAL, Authority
from cryptography.x509 import DNSName, GeneralName, IPAddress, RFC822Name, UniformResourceIdentifier
from quire_cluster.gateway.tls import Tls
from quire_cluster.governance.peers import peer_name

METHOD = "/test.Peers/Name"


async def name_of(authority: Authority, names: Sequence[GeneralName], common_name: str | None, *, asked: bool) -> str:
    """As the server sees it. `asked`: whether it asks for certificates."""
    server_pair = authority.issue("server", *LOCAL)
    ca = str(authority.file) if asked else None
    tls = Tls(str(server_pair.certificate), str(server_pair.key), ca)

    async def answer(request: bytes, context: Any) -> bytes:
        return repr(peer_name(context)).encode()

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Peers", {"Name": handler}),))
    port = server.add_secure_port("127.0.0.1:0", tls.grpc_credentials())
    await server.start()
    pair = authority.issue("client", *names, common_name=common_name)
    credentials = grpc.ssl_channel_credentials(
        authority.file.read_bytes(), pair.key.read_bytes(), pair.certificate.read_bytes()
    )
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials, options=options) as channel:
        said: bytes = await channel.unary_unary(METHOD)(b"", timeout=300)
    await server.stop(0)
    return said.decode()


URI, DNS = UniformResourceIdentifier("spiffe://example.org/team-a"), DNSName("team-a.example.org")
MAIL, IP = RFC822Name("a@example.org"), IPAddress(ip_address("10.0.0.1"))


@pytest.mark.parametrize(
    ("names", "common_name", "expected"),
    [
        ([URI], "common", "spiffe://example.org/team-a"),
        ([DNS], "common", "team-a.example.org"),
        ([DNS, URI], "common", "team-a.example.org"),
        ([URI, DNS], "common", "spiffe://example.org/team-a"),
        ([MAIL, IP, DNS], "common", "team-a.example.org"),
        ([MAIL, IP], "common", "common"),
        ([], "common", "common"),
        ([IP], None, None),
        ([], None, None),
    ],
)
def test_a_verified_client_is_known_by_its_name(
    names: list[GeneralName], common_name: str | None, expected: str | None, tmp_path: Path
) -> None:
    assert asyncio.run(name_of(Authority(tmp_path), names, common_name, asked=True)) == repr(expected)


def test_a_name_that_nobody_verified_is_none(tmp_path: Path) -> None:
    assert asyncio.run(name_of(Authority(tmp_path), [URI], "common", asked=False)) == "None"


def test_a_call_without_tls_has_no_name() -> None:
    async def main() -> str:
        async def answer(request: bytes, context: Any) -> bytes:
            return repr(peer_name(context)).encode()

        server = grpc.aio.server()
        handler = grpc.unary_unary_rpc_method_handler(answer)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Peers", {"Name": handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            said: bytes = await channel.unary_unary(METHOD)(b"", timeout=300)
        await server.stop(0)
        return said.decode()

    assert asyncio.run(main()) == "None"
