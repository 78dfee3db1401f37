"""Load balancers in front of gateways that have certificates: they ask those alone that they can verify."""

import asyncio
import contextlib
import ssl
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from certificates import Authority, Pair
from cryptography.x509 import DNSName
from grpc_health.v1 import health_pb2, health_pb2_grpc
from load_balancers import RunningBalancer, StubGateway
from quire.cli.config import LoadBalancerConfig
from quire.cli.load_balancer import _trust
from quire_cluster.config import GatewayConfig
from quire_cluster.gateway.process import Gateway
from quire_cluster.load_balancer import KINDS, GatewayAddress, Trust
from quire_engine.errors import InvalidParameter
from quire_protos.v1 import control_pb2 as pb
from web import LIMIT, free_port

NAME = "gateways.test"


def context(pair: Pair) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.set_alpn_protocols(["http/1.1"])
    made.load_cert_chain(pair.certificate, pair.key)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_only_who_is_verified_is_asked(kind: str, tmp_path: Path) -> None:
    """Neither one with a certificate for another name, nor one whose CA is another."""
    (tmp_path / "other").mkdir()
    ours, other = Authority(tmp_path), Authority(tmp_path / "other")
    pairs = {
        "good": ours.issue("good", DNSName(NAME)),
        "misnamed": ours.issue("misnamed", DNSName("another.test")),
        "strange": other.issue("strange", DNSName(NAME)),
    }

    async def main() -> None:
        stubs = {name: StubGateway(name) for name in pairs}
        gateways = [await stub.start(context(pairs[name])) for name, stub in stubs.items()]
        trust = Trust(ca=str(ours.file), name=NAME)
        balancer = await asyncio.to_thread(RunningBalancer, kind, tmp_path, gateways, trust)
        try:
            async with httpx.AsyncClient(base_url=balancer.url, timeout=LIMIT) as client, asyncio.timeout(LIMIT):
                in_a_row = 0
                while in_a_row < 20:  # until it is known who is there, some are told that nobody is
                    answer = await client.post("/v1/completions", content=b"x" * 1000)
                    if answer.status_code == 200:
                        assert answer.json()["by"] == "good"
                        in_a_row += 1
                    else:
                        in_a_row = 0
                        await asyncio.sleep(0.1)
        finally:
            await asyncio.to_thread(balancer.stop)
            for stub in stubs.values():
                stub.stop()
        assert [stub.asked for name, stub in stubs.items() if name != "good"] == [0, 0]

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_calls_over_grpc_reach_a_gateway_with_a_certificate(kind: str, tmp_path: Path) -> None:
    """A real one; that it is ready is said by another, for it has no models."""
    authority = Authority(tmp_path)
    pair = authority.issue("server", DNSName(NAME))

    async def main() -> None:
        config = GatewayConfig(
            port=0, grpc_port=free_port(), ssl_certfile=str(pair.certificate), ssl_keyfile=str(pair.key)
        )
        gateway, ready = Gateway(config, None, name="test"), StubGateway("ready")
        gateway.open()
        await gateway.start()
        checked = await ready.start(context(pair))
        address = GatewayAddress(name="a", host="127.0.0.1", http_port=checked.http_port, grpc_port=gateway.grpc_port)
        trust = Trust(ca=str(authority.file), name=NAME)
        balancer = await asyncio.to_thread(RunningBalancer, kind, tmp_path, [address], trust)
        try:
            async with (
                asyncio.timeout(LIMIT),
                grpc.aio.insecure_channel(f"127.0.0.1:{balancer.grpc_port}") as channel,
            ):
                stub: Any = health_pb2_grpc.HealthStub(channel)
                while True:
                    with contextlib.suppress(grpc.aio.AioRpcError):  # until its health is known
                        said = await stub.Check(health_pb2.HealthCheckRequest())
                        assert said.status == health_pb2.HealthCheckResponse.NOT_SERVING
                        break
                    await asyncio.sleep(0.1)
        finally:
            await asyncio.to_thread(balancer.stop)
            ready.stop()
            await gateway.stop()

    asyncio.run(main())


def test_options_go_with_the_gateways() -> None:
    plain, secure = [pb.GatewayStatus(id="a")], [pb.GatewayStatus(id="a"), pb.GatewayStatus(id="b", tls=True)]
    both = LoadBalancerConfig(ssl_ca_certs="/ca.pem", ssl_server_name=NAME)
    assert _trust(plain, LoadBalancerConfig()) is None
    assert _trust(secure, both) == Trust(ca="/ca.pem", name=NAME)
    for gateways, config, why in (
        (plain, both, "have no certificates"),
        (secure, LoadBalancerConfig(), "--ssl-ca-certs FILE"),
        (secure, LoadBalancerConfig(ssl_ca_certs="/ca.pem"), "--ssl-server-name NAME"),
    ):
        with pytest.raises(InvalidParameter, match=why):
            _trust(gateways, config)
    for wrong in ({"ca": "/a b.pem"}, {"ca": '/a".pem'}, {"name": "a;b"}, {"name": "a b"}):
        with pytest.raises(InvalidParameter, match="give a"):
            Trust(**({"ca": "/ca.pem", "name": NAME} | wrong))
