"""What clients are told over HTTP of replicas that are full, silent or gone."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_replica import FakeReplica
from gateways import PROMPTS, body, http, models_of, until
from quire_cluster.gateway.http import Api
from quire_cluster.gateway.service import Service
from quire_cluster.routing_table import RoutingTable
from quire_engine.errors import (
    QueueFull,
)
from quire_protos.v1 import engine_pb2 as pb


@pytest.mark.parametrize("stream", [True, False])
def test_at_overload_the_gateway_refuses_before_sending(service: Callable[[], Service], stream: bool) -> None:
    async def run() -> None:
        async with http(service(), most_requests=3) as (client, replica):
            replica.holds = lambda submit: True
            busy = [
                asyncio.ensure_future(client.post("/v1/completions", json=body(prompt, stream=stream)))
                for prompt in PROMPTS[:3]
            ]
            await until(lambda: len(replica.submitted) == 3)
            for one_more in (PROMPTS[4], PROMPTS[4:6]):
                answer = await client.post("/v1/completions", json=body(one_more, stream=stream))
                assert answer.status_code == 429, answer.text
                assert answer.headers["retry-after"] == "1"
                assert answer.json()["error"]["type"] == "rate_limit_error"
            assert len(replica.submitted) == 3, "nothing of it was sent"
            replica.holds = lambda submit: False
            assert [(await one).status_code for one in busy] == [200] * 3
            assert (await client.post("/v1/completions", json=body(PROMPTS[4], stream=stream))).status_code == 200

    asyncio.run(run())


@pytest.mark.parametrize("first", ["holds", "ponders"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_refused_second_prompt_refuses_the_call_at_once(
    service: Callable[[], Service], stream: bool, first: str
) -> None:
    """While the first one runs, or waits to be taken, and would for ever."""

    async def run() -> None:
        async with http(service()) as (client, replica):
            setattr(replica, first, lambda submit: submit.prompt[0] == PROMPTS[0][0])
            refusal = {"reason": "error", "error_kind": QueueFull.__name__, "error": "too many wait"}
            replica.refuses = lambda submit: (
                pb.Ending(id=submit.id, **refusal) if submit.prompt[0] == PROMPTS[1][0] else None
            )
            answer = await client.post("/v1/completions", json=body(PROMPTS[:2], stream=stream))
            assert (answer.status_code, answer.json()["error"]["message"]) == (429, "too many wait")
            [other] = [submit for submit in replica.submitted if submit.prompt[0] == PROMPTS[0][0]]
            await until(lambda: other.id in replica.aborted)

    asyncio.run(run())


def test_headers_of_many_prompts_wait_for_their_admission_alone(service: Callable[[], Service]) -> None:
    """256 of them: each is accepted, and none gets further."""

    async def run() -> None:
        gate = service()
        async with http(gate) as (_, replica):
            replica.holds = lambda submit: True
            app = Api(models_of(gate)).app()
            begun, left = asyncio.Event(), asyncio.Event()
            content = httpx.Request("POST", "http://x", json=body(PROMPTS * 16, stream=True)).content
            messages = iter([{"type": "http.request", "body": content, "more_body": False}])

            async def receive() -> Any:
                if (message := next(messages, None)) is not None:
                    return message
                await left.wait()
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                assert message["type"] == "http.response.start"
                assert message["status"] == 200
                begun.set()

            scope = {
                "type": "http",
                "method": "POST",
                "path": "/v1/completions",
                "headers": [],
                "query_string": b"",
                "http_version": "1.1",
                "scheme": "http",
            }
            call = asyncio.ensure_future(app(scope, receive, send))
            async with asyncio.timeout(300):
                await begun.wait()
            assert len(replica.submitted) == 256
            left.set()
            await call
            await until(lambda: len(replica.aborted) == 256)

    asyncio.run(run())


def test_health_and_readiness_follow_the_replicas(service: Callable[[], Service]) -> None:
    async def run() -> None:
        gate = service()
        async with http(gate) as (client, replica):
            assert (await client.get("/health")).json() == {"status": "ok"}
            assert (await client.get("/ready")).status_code == 200
            replica.die()
            await until(lambda: not gate.ready)
            answer = await client.get("/health")
            assert (answer.status_code, answer.json()) == (503, {"status": "no replica"})
            assert (await client.get("/ready")).status_code == 503
            replica.alive = True
            await until(lambda: gate.ready)
            assert (await client.get("/health")).status_code == 200
            second = await FakeReplica().start()
            table = RoutingTable((replica.entry(), second.entry()))
            gate.dispatcher.update_table(table)
            await until(lambda: len(gate.dispatcher.sessions) == 2)
            await second.stop()
            await until(lambda: len(gate.dispatcher.sessions) == 1)
            assert (await client.get("/health")).status_code == 200, "it may come back"

    asyncio.run(run())


def test_health_says_which_replica_is_gone_silent_or_stalled(
    service: Callable[[], Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire_cluster.gateway.service._SILENCE", 0.5)
    monkeypatch.setattr("quire_cluster.policies.admission._LEAST_WAIT", 0.3)

    async def run() -> None:
        gate = service()
        async with http(gate) as (client, replica):
            second = await FakeReplica().start()
            gate.dispatcher.update_table(RoutingTable((replica.entry(), second.entry())))
            await until(lambda: len(gate.dispatcher.sessions) == 2)

            async def becomes(status: str) -> None:
                await until(lambda: (gate.trouble or "ok") == status)
                answer = await client.get("/health")
                assert answer.json()["status"] == status
                assert answer.status_code == (200 if status == "ok" else 503)

            await becomes("ok")
            replica.silent = True
            await becomes(f"silent: replica {replica.slot}")
            replica.silent = False
            await becomes("ok")
            second.step_age = 11.0
            await becomes(f"stalled: replica {second.slot}")
            second.step_age = 9.0
            await becomes("ok")
            await second.stop()
            await becomes(f"gone: replica {second.slot}")
            assert (await client.get("/ready")).status_code == 200, "the other one serves"

    asyncio.run(run())
