"""Policies of others: a server of the test's own that is asked by HTTP, and judges that answer by chat."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from quire_cluster.governance.checks.asking import Unanswered
from quire_cluster.governance.checks.filters import OutputFilter, Piece
from quire_cluster.governance.checks.policies import Policies, RuleSet
from quire_cluster.governance.checks.rules import MOST_SEEN
from quire_cluster.governance.checks.webhook import Webhooks

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """Answers each path as it is told, and remembers what it was asked."""

    def __init__(self, **handlers: Handler | object) -> None:
        self.asked: list[dict[str, Any]] = []
        self._handlers = handlers

    async def __aenter__(self) -> "Server":
        application = web.Application(client_max_size=1 << 24)
        application.router.add_route("*", "/{name}", self._serve)
        self._runner = web.AppRunner(application, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        self.webhooks = Webhooks()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.webhooks.close()
        await self._runner.cleanup()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        assert request.method == "POST"
        self.asked.append((await request.json())["input"])
        said = self._handlers[request.match_info["name"]]
        return await said(request) if callable(said) else web.json_response(said)


class Asking:
    """As a gateway asks."""

    request_id = "req-7"

    def __init__(self, webhooks: Webhooks | None = None, judge: Callable[[str], str] | None = None) -> None:
        self.prompts: list[tuple[str, str]] = []
        self._webhooks = webhooks
        self._judge = judge

    async def webhook(self, url: str, body: Mapping[str, object], timeout: float) -> Mapping[str, object]:
        assert self._webhooks is not None
        return await self._webhooks.post(url, body, timeout)

    async def judge(self, model: str, prompt: str, timeout: float) -> str:
        assert self._judge is not None
        self.prompts.append((model, prompt))
        return self._judge(prompt)


def rules(*fields: dict[str, Any]) -> RuleSet:
    return Policies.parse([{"name": f"r{n}", "action": "stop", **one} for n, one in enumerate(fields)], Path()).for_(
        "t", "m"
    )


def asks(server: Server, name: str, **fields: Any) -> dict[str, Any]:
    return {"check": "webhook", "url": f"{server.url}/{name}", **fields}


async def out(filter: OutputFilter, *texts: str) -> list[str]:
    """What has come out after each text, and at the end."""
    outs = ["".join(piece.text for piece in await filter.push("content", text)) for text in texts if not filter.stopped]
    if not filter.stopped:
        outs.append("".join(piece.text for piece in await filter.finish()))
    return outs


def kinds(filter: OutputFilter) -> list[tuple[str, str, str, int]]:
    return [(verdict.rule, verdict.action, verdict.kind, verdict.count) for verdict in filter.verdicts]


async def slow(request: web.Request) -> web.Response:
    await asyncio.sleep(3600)
    raise AssertionError("it is not waited for that long")


async def broken(request: web.Request) -> web.Response:
    return web.Response(status=500, text='{"result": true}')


async def garbage(request: web.Request) -> web.Response:
    return web.Response(text='{"result": tr')


async def packed(request: web.Request) -> web.Response:
    return web.Response(text='{"result": true}', headers={"Content-Encoding": "gzip"})


async def huge(request: web.Request) -> web.StreamResponse:
    """It would never end."""
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b'{"result": true, "more": "')
    try:
        while True:
            await response.write(b"x" * 65536)
    except (ConnectionError, aiohttp.ClientError):
        return response


async def deep(request: web.Request) -> web.Response:
    return web.Response(text="[" * 500_000)


async def elsewhere(request: web.Request) -> web.Response:
    raise web.HTTPTemporaryRedirect("/yes")


async def half(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "100"})
    await response.prepare(request)
    await response.write(b'{"result":')
    assert request.transport is not None
    request.transport.abort()
    return response


YES: dict[str, object] = {"result": True}
NO: dict[str, object] = {"result": {"allow": False, "reason": "because of 'it'"}}
HANDLERS: dict[str, Handler | object] = {
    "yes": YES,
    "no": NO,
    "slow": slow,
    "broken": broken,
    "garbage": garbage,
    "packed": packed,
    "huge": huge,
    "deep": deep,
    "elsewhere": elsewhere,
    "half": half,
    "undefined": {},
    "list": [True],
    "number": {"result": 1},
    "more": {"result": {"allow": True, "because": "of it"}},
    "null": {"result": {"allow": None}},
    "text": {"result": {"allow": True, "text": "other"}},
}
UNUSABLE = sorted(HANDLERS.keys() - {"yes", "no", "slow"})


def test_what_a_webhook_is_told_and_when() -> None:
    async def run() -> None:
        async with Server(**HANDLERS) as server:
            found = rules(asks(server, "yes", every=10))
            ask = Asking(server.webhooks)
            filter = found.output(ask)
            assert filter is not None
            assert await out(filter, "one two", " three", " four", "", " and more", "!") == [
                "",
                "one two three",
                "",
                "",
                " four and more",
                "",
                "!",
            ]
            common = {"stage": "output", "tenant": "t", "model": "m", "request_id": "req-7"}
            assert server.asked == [
                {"text": "one two three", "held": 13, **common},
                {"text": "one two three four and more", "held": 14, **common},
                {"text": "one two three four and more!", "held": 1, **common},
            ]
            assert filter.verdicts == ()
            server.asked.clear()
            text = "a prompt" * 10_000
            assert (await found.check_input(text, ask)).text == text
            assert server.asked == [{"text": text, "held": len(text), **common, "stage": "input"}]

    asyncio.run(run())


def test_a_webhook_sees_the_end_of_a_long_answer() -> None:
    async def run() -> None:
        async with Server(**HANDLERS) as server:
            filter = rules(asks(server, "yes")).output(Asking(server.webhooks))
            assert filter is not None
            first, second, third = "a" * MOST_SEEN, "b" * 500, "c" * (MOST_SEEN + 9)
            assert await out(filter, first, second, third) == [first, second, third, ""]
            assert [asked["text"] for asked in server.asked] == [first, (first + second)[500:], third]

    asyncio.run(run())


def test_a_webhook_says_no() -> None:
    async def run() -> None:
        async with Server(**HANDLERS) as server:
            for action, shown in [("stop", ""), ("flag", "held"), ("redact", "[REDACTED:r0]")]:
                found = rules(asks(server, "no", action=action))
                filter = found.output(Asking(server.webhooks))
                assert filter is not None
                assert "".join(await out(filter, "he", "ld")) == shown
                assert filter.stopped == (action == "stop")
                assert kinds(filter) == [("r0", action, "webhook", 1)]
                verdict = await found.check_input("held", Asking(server.webhooks))
                assert (verdict.text, verdict.stopped) == (shown, action == "stop")

    asyncio.run(run())


def test_a_webhook_writes_something_else() -> None:
    async def polite(request: web.Request) -> web.Response:
        asked = (await request.json())["input"]
        held = asked["text"][-asked["held"] :]
        return web.json_response({"result": {"allow": True, "text": held.replace("damn", "d…")}})

    async def run() -> None:
        async with Server(polite=polite) as server:
            filter = rules(asks(server, "polite", action="redact", every=6)).output(Asking(server.webhooks))
            assert filter is not None
            assert await out(filter, "oh, damn", "! and", " then", " damn") == ["oh, d…", "", "! and then", "", " d…"]
            assert kinds(filter) == [("r0", "redact", "webhook", 2)]
            assert [asked["text"] for asked in server.asked] == [
                "oh, damn",
                "oh, d…! and then",
                "oh, d…! and then damn",
            ]

    asyncio.run(run())


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_is_no_answer_ends_the_text_or_is_noted(name: str) -> None:
    async def run() -> None:
        async with Server(**HANDLERS) as server:
            for on_error, expected in [("closed", ("stop", "")), ("open", ("flag", "text"))]:
                found = rules(asks(server, name, on_error=on_error, timeout=60))
                filter = found.output(Asking(server.webhooks))
                assert filter is not None
                shown = "".join(await out(filter, "text"))
                assert (kinds(filter), shown) == ([("r0", expected[0], "unchecked", 1)], expected[1])
                assert (await found.check_input("text", Asking(server.webhooks))).stopped == (on_error == "closed")
            assert len(server.asked) == 4, "it was not asked twice, nor led on"

    asyncio.run(run())


@pytest.mark.parametrize("on_error", ["closed", "open"])
def test_what_takes_too_long_is_no_answer(on_error: str) -> None:
    async def run() -> None:
        async with Server(**HANDLERS) as server:
            filter = rules(asks(server, "slow", on_error=on_error, timeout=0.05)).output(Asking(server.webhooks))
            assert filter is not None
            assert "".join(await out(filter, "text")) == ("" if on_error == "closed" else "text")
            assert kinds(filter) == [("r0", "stop" if on_error == "closed" else "flag", "unchecked", 1)]

    asyncio.run(run())


def test_nobody_there_is_no_answer() -> None:
    async def run() -> None:
        async with Server(**HANDLERS) as server:
            pass
        webhooks = Webhooks()
        with pytest.raises(Unanswered, match="cannot be reached"):
            await webhooks.post(f"{server.url}/yes", {}, 60.0)
        await webhooks.close()

    asyncio.run(run())


def test_who_leaves_is_not_asked_about_any_more() -> None:
    async def run() -> None:
        gone = asyncio.Event()
        arrived = asyncio.Event()

        async def waits(request: web.Request) -> web.Response:
            arrived.set()
            while request.transport is not None and not request.transport.is_closing():
                await asyncio.sleep(0.01)
            gone.set()
            return web.json_response(YES)

        async with Server(waits=waits) as server:
            filter = rules(asks(server, "waits", timeout=60)).output(Asking(server.webhooks))
            assert filter is not None
            task = asyncio.create_task(filter.push("content", "x" * 300))
            await arrived.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await gone.wait()
            assert filter.verdicts == ()

    asyncio.run(run())


def test_a_webhook_reads_what_rules_before_it_left() -> None:
    async def run() -> None:
        async with Server(**HANDLERS) as server:
            filter = rules(
                {"check": "pii", "kinds": ["email"], "action": "redact"},
                asks(server, "yes", every=30),
                {"check": "words", "words": ["secret"]},
            ).output(Asking(server.webhooks))
            assert filter is not None
            outs = await out(filter, *"write to me@example.org, which is a secret, or not")
            assert "".join(outs) == "write to [REDACTED:email], which is a "
            assert filter.stopped
            assert [asked["text"] for asked in server.asked] == [
                "write to [REDACTED:email], which ",  # what may become an address comes later
                "write to [REDACTED:email], which is a secret, or not",
            ]
            assert kinds(filter) == [("r0", "redact", "email", 1), ("r2", "stop", "words", 1)]

    asyncio.run(run())


JUDGE = {
    "check": "judge",
    "model": "guard",
    "prompt": "Is <{text}> safe? {not a field} {text}",
    "stop_on": "Unsafe",
    "every": 5,
}


@pytest.mark.parametrize(
    ("said", "shown", "found"),
    [
        ("safe", "held", []),
        ("It is unsafe", "held", []),
        ("\n UNSAFE\nS1", "", [("r0", "stop", "judge", 1)]),
        (" \n", "", [("r0", "stop", "unchecked", 1)]),
    ],
)
def test_a_judge(said: str, shown: str, found: list[tuple[str, str, str, int]]) -> None:
    async def run() -> None:
        ask = Asking(judge=lambda prompt: said)
        filter = rules(JUDGE).output(ask)
        assert filter is not None
        assert "".join(await out(filter, "he", "ld")) == shown
        assert kinds(filter) == found
        assert ask.prompts == [("guard", "Is <held> safe? {not a field} held")]
        assert (await rules(JUDGE).check_input("held", ask)).text == shown

    asyncio.run(run())


def test_a_judge_that_fails_and_one_that_is_broken() -> None:
    async def run(error: Exception) -> list[tuple[str, str, str, int]]:
        def fails(prompt: str) -> str:
            raise error

        filter = rules(JUDGE | {"on_error": "open"}).output(Asking(judge=fails))
        assert filter is not None
        assert await filter.push("content", "x" * 5) == [Piece("content", "x" * 5)]
        return kinds(filter)

    assert asyncio.run(run(Unanswered("the guard is not served"))) == [("r0", "flag", "unchecked", 1)]
    assert asyncio.run(run(TimeoutError())) == [("r0", "flag", "unchecked", 1)]
    with pytest.raises(KeyError):  # a mistake of the caller's own is none of a judge's
        asyncio.run(run(KeyError("x")))
