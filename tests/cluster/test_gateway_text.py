"""The gateway's text over a real session with a replica that says what a script says: log-probabilities as OpenAI's
clients read them, for every kind of vocabulary, and messages that nobody can take."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import httpx
import pytest
from gateways import models_of
from quire_cluster.gateway.completions import Completions
from quire_cluster.gateway.http import Api
from quire_cluster.gateway.service import Service
from quire_cluster.observability.metrics import Metrics
from quire_cluster.routing_table import ReplicaEntry, RoutingTable
from quire_engine.text.tokenizer import Tokenizer
from quire_protos.v1 import engine_pb2 as pb
from quire_protos.v1 import engine_pb2_grpc
from transformers import PreTrainedTokenizerFast
from vocabularies import KINDS

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
Script = Callable[[pb.Submit], Iterator[pb.SessionUpdate]]


class ScriptedReplica(engine_pb2_grpc.EngineServicer):
    """Answers each submission with what the script makes of it."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.sessions = 0

    async def Session(self, requests: AsyncIterator[pb.SessionRequest], context: Any) -> AsyncIterator[Any]:
        self.sessions += 1
        yield pb.SessionUpdate(load=pb.Load(most_requests=1000))
        async for request in requests:
            for submit in request.submit:
                for update in self.script(submit):
                    yield update


async def talk(
    kind: str, script: Script, *calls: tuple[str, dict[str, Any]]
) -> tuple[list[httpx.Response], ScriptedReplica]:
    """The answers to (route, body), all asked at once of a gateway of one scripted replica."""
    fast = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind])
    config = {"vocab_size": KINDS[kind].get_vocab_size()}
    files: Any = SimpleNamespace(digest="", config=config, generation_config={"eos_token_id": []})
    service = Service(
        files, Tokenizer(fast, TEMPLATE), names=["m"], max_model_len=1000, max_waiting=100, metrics=Metrics()
    )
    replica = ScriptedReplica(script)
    server = grpc.aio.server()
    engine_pb2_grpc.add_EngineServicer_to_server(replica, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        transport = httpx.ASGITransport(Api(models_of(service)).app())
        service.dispatcher.update_table(RoutingTable((ReplicaEntry(0, 1, f"127.0.0.1:{port}", 1000),)))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway/v1", timeout=60) as client:
            answers = await asyncio.gather(*(client.post(route, json=body) for route, body in calls))
        return answers, replica
    finally:
        await service.dispatcher.close()
        await server.stop(0)


def scores(submit: pb.Submit, tokens: list[int], *, prompt: bool = False) -> pb.TopLogprobs:
    """The token itself and id 5, less likely."""
    return pb.TopLogprobs(
        id=submit.id,
        prompt=prompt,
        chosen=tokens,
        logprob=[-0.5] * len(tokens),
        rank=[1] * len(tokens),
        width=2,
        top_ids=[one for token in tokens for one in (token, 5)],
        top_logprobs=[-0.5, -2.0] * len(tokens),
    )


def says(tokens: list[int]) -> Script:
    """One token a message, each with its scores; those of the prompt first."""

    def script(submit: pb.Submit) -> Iterator[pb.SessionUpdate]:
        if submit.sampling.HasField("prompt_logprobs"):
            yield pb.SessionUpdate(logprobs=[scores(submit, list(submit.prompt)[1:], prompt=True)])
        for index, token in enumerate(tokens):
            yield pb.SessionUpdate(ids=[submit.id], indexes=[index], tokens=[token], logprobs=[scores(submit, [token])])
        yield pb.SessionUpdate(endings=[pb.Ending(id=submit.id, reason="length")])

    return script


def chunks(answer: httpx.Response) -> list[dict[str, Any]]:
    """The choices of a stream's events."""
    assert answer.status_code == 200, answer.text
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event)["choices"][0] for event in events]


def output_of(kind: str) -> list[int]:
    """Words, characters in parts, a special token between, and a character that stays unfinished."""
    fast = KINDS[kind]
    ids = fast.encode("the other fox's café 🌍 naïve other", add_special_tokens=False).ids
    ids = [*ids[:3], fast.token_to_id("</s>"), *ids[3:]]
    parts = {"byte_level": "ðŁĮį", "byte_fallback": ["<0xF0>", "<0x9F>", "<0x8C>", "<0x8D>"]}
    parts["byte_fallback_plain"] = parts["byte_fallback"]
    letters = [fast.token_to_id(part) for part in parts.get(kind, ())]
    return ids + letters + fast.encode(" the fox", add_special_tokens=False).ids + letters[:2]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_give_the_text(kind: str, skip: bool) -> None:
    fast, tokens = KINDS[kind], output_of(kind)
    prompt = fast.encode("fox naïve", add_special_tokens=False).ids
    both = fast.decode(prompt + tokens, skip_special_tokens=skip)
    before = fast.decode(prompt, skip_special_tokens=skip)
    assert both.startswith(before)
    after = both[len(before) :]
    if "byte_fallback" in kind:  # of the character that stays unfinished the library counts the bytes, as is done here
        assert after.endswith("\ufffd\ufffd")
    shared = {"model": "m", "skip_special_tokens": skip}
    text = shared | {"prompt": prompt, "logprobs": 2}
    chat = shared | {"messages": [{"role": "user", "content": "fox naïve"}], "logprobs": True, "top_logprobs": 2}
    answers, _ = asyncio.run(
        talk(
            kind,
            says(tokens),
            ("completions", text),
            ("completions", text | {"stream": True}),
            ("completions", text | {"echo": True}),
            ("chat/completions", chat),
            ("chat/completions", chat | {"stream": True}),
        )
    )
    whole, streamed, echoed, chatted, chat_streamed = answers
    found = whole.json()["choices"][0]
    assert found["text"] == after
    check_offsets(kind, found["text"], found["logprobs"], tokens, skip)

    pieces = [choice for choice in chunks(streamed) if choice["logprobs"]["tokens"] or choice["text"]]
    assert "".join(choice["text"] for choice in pieces) == after
    for name, values in found["logprobs"].items():
        assert [value for choice in pieces for value in choice["logprobs"][name]] == values, name

    found = echoed.json()["choices"][0]
    assert found["text"] == both
    assert found["logprobs"]["token_logprobs"] == [None] + [-0.5] * (len(prompt) + len(tokens) - 1)
    assert found["logprobs"]["top_logprobs"][0] is None
    check_offsets(kind, both, found["logprobs"], prompt + tokens, skip)

    choice = chatted.json()["choices"][0]
    assert choice["message"]["content"] == after
    check_bytes(kind, choice["logprobs"]["content"], after, tokens, skip)
    choices = chunks(chat_streamed)
    entries = [entry for one in choices if one["logprobs"] for entry in one["logprobs"]["content"]]
    assert "".join(one["delta"].get("content", "") for one in choices) == after
    assert entries == choice["logprobs"]["content"]


@pytest.mark.parametrize(("asked", "tokens"), [({"logprobs": 1}, 150), ({"return_token_ids": True}, 4200)])
def test_long_answers_are_written_in_threads(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], tokens: int
) -> None:
    """The event loop goes on meanwhile."""
    seen: set[threading.Thread] = set()
    plain = Completions._whole_choice

    def watched(self: Completions, *arguments: Any) -> dict[str, Any]:
        seen.add(threading.current_thread())
        return plain(self, *arguments)

    monkeypatch.setattr(Completions, "_whole_choice", watched)
    content = {"model": "m", "prompt": [5], "max_tokens": 900} | asked
    [answer], _ = asyncio.run(talk("byte_level", says([6] * tokens), ("completions", content)))
    assert answer.status_code == 200, answer.text
    assert len(seen) == 1
    assert threading.current_thread() not in seen


def skipped_ones(kind: str, tokens: list[int], skip: bool) -> list[bool]:
    added = KINDS[kind].get_added_tokens_decoder()
    return [skip and token in added and added[token].special for token in tokens]


def check_offsets(kind: str, text: str, logprobs: dict[str, Any], tokens: list[int], skip: bool) -> None:
    """From one offset to the next the text is the token, and every token of whole characters stands there."""
    names, offsets = logprobs["tokens"], logprobs["text_offset"]
    assert len(names) == len(offsets) == len(tokens) == len(logprobs["top_logprobs"])
    special = skipped_ones(kind, tokens, skip)
    previous_is_part = False
    for name, start, end, skipped in zip(names, offsets, [*offsets[1:], len(text)], special, strict=True):
        if skipped:
            assert start == end
        elif name.startswith("bytes:"):
            assert end - start <= 1 or text[start:end] == "\ufffd\ufffd", "a character counts where its last part comes"
        elif not previous_is_part:
            assert text[start:end] == name
        previous_is_part = name.startswith("bytes:")
    if not any(name.startswith("bytes:") for name in names):
        assert "".join(name for name, skipped in zip(names, special, strict=True) if not skipped) == text
    for name, top in zip(names, logprobs["top_logprobs"], strict=True):
        assert top is None or top[name] == -0.5 == max(top.values())


def check_bytes(kind: str, entries: list[dict[str, Any]], text: str, tokens: list[int], skip: bool) -> None:
    special = skipped_ones(kind, tokens, skip)
    written = b"".join(bytes(entry["bytes"]) for entry, skipped in zip(entries, special, strict=True) if not skipped)
    assert written.decode(errors="replace").rstrip("\ufffd") == text.rstrip("\ufffd")
    for entry in entries:
        alternatives = {top["token"]: top for top in entry["top_logprobs"]}
        assert alternatives[entry["token"]]["bytes"] == entry["bytes"]
        if not entry["token"].startswith("bytes:"):
            assert bytes(entry["bytes"]).decode() == entry["token"]


def test_what_cannot_be_taken_ends_one_choice_alone() -> None:
    """Scores that do not fit together, a vector of half a number, a token that no vocabulary has:
    at most its own choice is spoilt, and a neighbour in the same messages goes on in the same session."""
    spoilt = {
        1: lambda one: pb.SessionUpdate(logprobs=[pb.TopLogprobs(id=one, chosen=[5], width=3, top_ids=[5])]),
        2: lambda one: pb.SessionUpdate(vectors=[pb.Vector(id=one, values=b"123")]),
        3: lambda one: pb.SessionUpdate(ids=[one], indexes=[0], tokens=[2**32 - 1]),
    }
    good = KINDS["byte_fallback"].encode("the other fox").ids

    def script(submit: pb.Submit) -> Iterator[pb.SessionUpdate]:
        kind = submit.prompt[0] - 10
        for index, token in enumerate(good):
            update = pb.SessionUpdate(ids=[submit.id], indexes=[index], tokens=[token])
            if index == 1 and kind in spoilt:
                bad = spoilt[kind](submit.id)
                bad.MergeFrom(update)
                update = bad
            yield update
        yield pb.SessionUpdate(endings=[pb.Ending(id=submit.id, reason="length")])

    calls = [("completions", {"model": "m", "prompt": [10 + kind]}) for kind in (0, 1, 2, 3, 0)]
    answers, replica = asyncio.run(talk("byte_fallback", script, *calls))
    statuses = [answer.status_code for answer in answers]
    assert statuses == [200, 500, 500, 200, 200], [answer.text for answer in answers]
    assert all("internal error" in answers[place].json()["error"]["message"] for place in (1, 2))
    assert {answers[place].json()["choices"][0]["text"] for place in (0, 4)} == {" the other fox"}
    assert replica.sessions == 1, "the session stayed"
