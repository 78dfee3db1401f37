"""Quire's own clients over TLS, to a gateway that has no models."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import LOCAL, Authority
from quire import AsyncClient, Client
from quire.cli.config import CompleteConfig
from quire.cli.talk import complete
from quire_cluster.config import GatewayConfig
from quire_cluster.gateway.process import Gateway
from quire_engine.errors import InvalidParameter, ServerError
from web import free_port


@contextlib.asynccontextmanager
async def gateway(authority: Authority, **options: Any) -> AsyncIterator[str]:
    """Its address."""
    pair = authority.issue("server", *LOCAL)
    files = {"ssl_certfile": str(pair.certificate), "ssl_keyfile": str(pair.key)}
    served = Gateway(GatewayConfig(port=0, grpc_port=free_port(), **files, **options), None, name="test")
    served.open()
    await served.start()
    try:
        yield f"127.0.0.1:{served.grpc_port}"
    finally:
        await served.stop()


def models(address: str, **options: Any) -> list[str]:
    with Client(address, **options) as client:
        return client.models()


def test_clients_speak_tls(tmp_path: Path) -> None:
    async def main() -> None:
        authority = Authority(tmp_path)
        ca = str(authority.file)
        async with gateway(authority) as address:
            assert await asyncio.to_thread(models, address, tls=ca) == []
            async with AsyncClient(address, tls=ca) as client:
                with pytest.raises(grpc.aio.AioRpcError, match="none is served yet"):
                    await client.embed(["text"])
            for options in ({}, {"tls": True}):
                with pytest.raises(grpc.RpcError) as error:
                    await asyncio.to_thread(models, address, **options)
                assert error.value.code() is grpc.StatusCode.UNAVAILABLE
            trusting = CompleteConfig(address=address, ssl_ca_certs=ca)
            with pytest.raises(ServerError, match="none is served yet"):
                await asyncio.to_thread(complete, "text", trusting)
            with pytest.raises(ServerError, match=r"CERTIFICATE_VERIFY_FAILED.*wants --tls or --ssl-ca-certs"):
                await asyncio.to_thread(complete, "text", CompleteConfig(address=address, tls=True))

    asyncio.run(main())


def test_clients_show_certificates(tmp_path: Path) -> None:
    async def main() -> None:
        authority = Authority(tmp_path)
        ca = str(authority.file)
        pair = authority.issue("client", common_name="client")
        files = str(pair.certificate), str(pair.key)
        async with gateway(authority, ssl_ca_certs=ca) as address:
            assert await asyncio.to_thread(models, address, tls=ca, certificate=files) == []
            with pytest.raises(grpc.RpcError) as error:
                await asyncio.to_thread(models, address, tls=ca)
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
            config = CompleteConfig(address=address, ssl_ca_certs=ca, ssl_certfile=files[0], ssl_keyfile=files[1])
            with pytest.raises(ServerError, match="none is served yet"):
                await asyncio.to_thread(complete, "text", config)

    asyncio.run(main())


def test_what_no_client_can_show_is_refused(tmp_path: Path) -> None:
    words = tmp_path / "words"
    words.write_text("words")
    for options, why in (
        ({"tls": str(tmp_path / "nowhere")}, "cannot be read"),
        ({"tls": str(words)}, "is no PEM file"),
        ({"certificate": (str(words), str(words))}, "over TLS alone"),
        ({"tls": True, "certificate": (str(words), str(words))}, "is no PEM file"),
    ):
        with pytest.raises(InvalidParameter, match=why):
            Client("localhost:1", **options)
    for config in (CompleteConfig(ssl_certfile="c.pem"), CompleteConfig(ssl_keyfile="k.pem")):
        with pytest.raises(InvalidParameter, match="go together"):
            complete("text", config)
