"""Policies at a real gateway over fake replicas, over HTTP and gRPC: what goes in, comes out, and is on record."""

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from aiohttp import web
from fake_replica import token_at
from gateways import TOKENS
from governed import Governed, bearer, governed
from quire_cluster.gateway.service import Service
from quire_protos.v1 import inference_pb2 as pb
from quire_protos.v1 import inference_pb2_grpc

MakeService = Callable[[], Service]
PROMPT = "w5 w17 w30"
TEXT = "".join(f"w{token_at([5, 17, 30], index)}" for index in range(TOKENS))  # the answer to it
[FORBIDDEN] = re.findall(r"^w\d+w\d+(w\d+w\d+)w", TEXT)  # two words of it, near its beginning


def rule(action: str, **changes: Any) -> dict[str, Any]:
    return {"name": "r", "check": "pattern", "patterns": [FORBIDDEN], "action": action, "on": ["output"]} | changes


async def ask(at: Governed, key: str, **changes: Any) -> tuple[httpx.Response, list[str]]:
    """A completion, and the texts that came of it, one by one where it is streamed."""
    body = {"prompt": PROMPT, "max_tokens": TOKENS} | changes
    answer = await at.client.post("/v1/completions", json=body, headers=bearer(key))
    if answer.status_code != 200 or not body.get("stream"):
        return answer, [one["text"] for one in answer.json().get("choices", [])]
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    return answer, [choice["text"] for event in events for choice in event["choices"]]


def policed(folder: Path, service: MakeService, rules: list[dict[str, Any]], work: Callable[..., Any]) -> None:
    async def running() -> None:
        async with governed(folder, service, text=json.dumps({"policies": rules})) as at:
            await at.tenant("team")
            await work(at, await at.key("team"))

    asyncio.run(running())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("action", ["redact", "stop", "flag"])
def test_what_a_rule_finds_in_an_answer(service: MakeService, tmp_path: Path, action: str, stream: bool) -> None:
    redacted, before = TEXT.replace(FORBIDDEN, "[REDACTED:r]"), TEXT.partition(FORBIDDEN)[0]
    shown = {"redact": redacted, "stop": before, "flag": TEXT}[action]

    async def work(at: Governed, key: str) -> None:
        answer, texts = await ask(at, key, stream=stream)
        assert "".join(texts) == shown
        if action != "flag":
            assert FORBIDDEN not in answer.text
        finish = "content_filter" if action == "stop" else "length"
        assert f'"finish_reason":"{finish}"' in answer.text
        assert (
            f'"content_filter_results":{{"r":[{{"detected":true,"filtered":{str(action != "flag").lower()}'
            in answer.text
        )
        await at.governor.writer.flush()
        [kept] = await at.governor.audit.list(kind="request")
        [found] = kept.values["verdicts"]
        assert [found[name] for name in ("rule", "action", "stage")] == ["r", action, "output"]
        assert kept.values["finish"] == [finish]
        assert FORBIDDEN not in kept.body.decode()
        assert len(kept.values["policies_digest"]) == 64
        await asyncio.sleep(0)
        assert at.gateway.models.num_open == 0

    policed(tmp_path, service, [rule(action)], work)


def test_an_answer_that_a_rule_ends_is_not_computed_any_further(service: MakeService, tmp_path: Path) -> None:
    async def work(at: Governed, key: str) -> None:
        replica = at.replicas["tiny"]
        _, texts = await ask(at, key, max_tokens=2000, n=2)
        assert texts == [TEXT.partition(FORBIDDEN)[0]] * 2
        assert len(replica.aborted) == 2

    policed(tmp_path, service, [rule("stop")], work)


def test_what_a_rule_finds_in_a_prompt(service: MakeService, tmp_path: Path) -> None:
    rules = [
        {"name": "cut", "check": "words", "words": ["w17"], "action": "redact", "on": ["input"]},
        {"name": "no", "check": "words", "words": ["w40"], "action": "stop", "on": ["input"]},
        {"name": "seen", "check": "words", "words": ["w5"], "action": "flag", "on": ["input"]},
    ]

    async def work(at: Governed, key: str) -> None:
        replica = at.replicas["tiny"]
        answer, _ = await ask(at, key)
        unknown = 3  # what a word-level tokenizer makes of [REDACTED:cut]
        assert list(replica.submitted[-1].prompt) == [5, unknown, 30]
        found = answer.json()["choices"][0]["content_filter_results"]
        assert {name: one[0]["action"] for name, one in found.items()} == {"cut": "redact", "seen": "flag"}
        sent = len(replica.submitted)
        refused, _ = await ask(at, key, prompt=["w6", "w40"])
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "content_filter")
        assert "w40" not in refused.text
        ids, _ = await ask(at, key, prompt=[5, 6])
        assert (ids.status_code, ids.json()["error"]["param"]) == (400, "prompt")
        for message in (
            {"role": "user", "content": "w40"},
            {"role": "user", "content": [{"type": "text", "text": "w6"}, {"type": "text", "text": "w40"}]},
            {"role": "system", "content": "w40", "name": "w6"},
            {"role": "tool", "content": "w40", "tool_call_id": "x"},
            {"role": "user", "content": "w6", "name": "w40"},
        ):
            body = {"messages": [message], "max_tokens": 2}
            chat = await at.client.post("/v1/chat/completions", json=body, headers=bearer(key))
            assert (chat.status_code, chat.json()["error"]["code"]) == (400, "content_filter"), message
        function = {
            "type": "function",
            "function": {"name": "f", "description": "w40", "parameters": {"type": "object"}},
        }
        body = {"messages": [{"role": "user", "content": "w6"}], "tools": [function]}
        chat = await at.client.post("/v1/chat/completions", json=body, headers=bearer(key))
        assert chat.status_code == 400
        async with grpc.aio.insecure_channel(at.address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            metadata = list(bearer(key).items())
            for request in (pb.GenerateRequest(text="w40"), pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]))):
                with pytest.raises(grpc.aio.AioRpcError) as failed:
                    [one async for one in stub.Generate(request, metadata=metadata)]
                assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert len(replica.submitted) == sent, "none of it was asked of the model"
        await at.governor.writer.flush()
        found = [one.values["refused"] for one in await at.governor.audit.list(kind="refused")]
        assert found.count("PolicyStop") == 8

    policed(tmp_path, service, rules, work)


def test_over_grpc_no_token_of_a_policed_answer_is_told(service: MakeService, tmp_path: Path) -> None:
    async def work(at: Governed, key: str) -> None:
        async with grpc.aio.insecure_channel(at.address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            metadata = list(bearer(key).items())
            request = pb.GenerateRequest(text=PROMPT, sampling=pb.SamplingParams(max_tokens=TOKENS))
            came = [one async for one in stub.Generate(request, metadata=metadata)]
            assert "".join(one.text for one in came) == TEXT.partition(FORBIDDEN)[0]
            assert not any(one.token_ids for one in came)
            assert [one.finish_reason for one in came if one.finish_reason] == ["content_filter"]
            [verdict] = came[-1].verdicts
            assert (verdict.policy, verdict.action, verdict.stage, verdict.count) == ("r", "stop", "output", 1)
            for wrong in (
                pb.GenerateRequest(text=PROMPT, sampling=pb.SamplingParams(logprobs=1)),
                pb.GenerateRequest(
                    text=PROMPT, sampling=pb.SamplingParams(temperature=0), resume=[pb.Emitted(index=0, token_ids=[5])]
                ),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as failed:
                    [one async for one in stub.Generate(wrong, metadata=metadata)]
                assert "under a policy" in str(failed.value.details())
        for changes in ({"logprobs": 1}, {"prompt_logprobs": 1}, {"return_token_ids": True}):
            answer, _ = await ask(at, key, **changes)
            assert answer.status_code == 400, changes
        assert at.gateway.models.num_open == 0

    policed(tmp_path, service, [rule("stop")], work)


def test_rules_are_for_some_tenants_and_models(service: MakeService, tmp_path: Path) -> None:
    async def work(at: Governed, key: str) -> None:
        await at.tenant("free")
        _, texts = await ask(at, await at.key("free"), logprobs=1)
        assert texts == [TEXT]
        _, texts = await ask(at, key)
        assert texts == [TEXT.partition(FORBIDDEN)[0]]

    rules = [rule("stop", tenants=["te*"]), rule("stop", name="other", patterns=["w"], models=["big-*"])]
    policed(tmp_path, service, rules, work)


@pytest.mark.parametrize("says", ["yes", "no", "nothing"])
@pytest.mark.parametrize("kind", ["webhook", "judge"])
def test_others_are_asked(service: MakeService, tmp_path: Path, kind: str, says: str) -> None:
    """A policy server, and a deployment that judges: here the fake one, whose answer one knows."""
    asked: list[Any] = []
    begins = f"w{token_at([3], 0)}"  # of what the model says to words that it does not know

    async def decide(request: web.Request) -> web.Response:
        asked.append((await request.json())["input"])
        if says == "nothing":
            return web.Response(status=500)
        return web.json_response({"result": says == "yes"})

    async def running() -> None:
        app = web.Application()
        app.router.add_post("/", decide)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        common = {"name": "asks", "on": ["output"], "every": 10, "timeout": 30, "on_error": "closed", "action": "stop"}
        rules = {
            "webhook": common | {"check": "webhook", "url": f"http://127.0.0.1:{port}/"},
            "judge": common
            | {
                "check": "judge",
                "model": "tiny" if says != "nothing" else "missing",
                "prompt": "{text}",
                "stop_on": begins if says == "no" else "never",
            },
        }
        async with governed(tmp_path, service, text=json.dumps({"policies": [rules[kind]]})) as at:
            await at.tenant("team")
            key = await at.key("team")
            answer, texts = await ask(at, key, stream=True, request_id="mine")
            assert "".join(texts) == (TEXT if says == "yes" else "")
            assert ("content_filter" in answer.text) == (says != "yes")
            if kind == "webhook":
                assert all(one["text"] == TEXT[: len(one["text"])] for one in asked)
                assert {(one["tenant"], one["model"], one["request_id"]) for one in asked} == {("team", "tiny", "mine")}
        await runner.cleanup()

    asyncio.run(running())
