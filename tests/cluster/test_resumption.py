"""What gateways keep when replicas vanish is sent on exactly, and does not wait for ever."""

import asyncio
import time

import pytest
from gateways import PROMPTS, expected, gateway, tokens, until
from quire_engine.errors import (
    DeadlineExceeded,
    Unavailable,
)
from quire_engine.text.tokenizer import Tokenizer
from quire_protos.v1 import engine_pb2 as pb


def test_what_was_admitted_is_resumed_exactly(tokenizer: Tokenizer) -> None:
    """As such (no queue is too full for it), with its log, what is left of its time, and in the order of arrival."""

    async def run() -> None:
        async with gateway(tokenizer, 1) as g:
            [replica] = g.replicas
            replica.holds = lambda submit: True
            until_when = time.monotonic() + 1000
            first = [g.start(prompt, deadline=until_when) for prompt in PROMPTS[:5]]
            for one in first:
                await one.admitted()
            replica.most_requests = 0  # its queue is full of others' requests
            replica.die()
            await until(lambda: not g.dispatcher.sessions)
            new = [g.start(prompt) for prompt in PROMPTS[5:8]]
            replica.submitted.clear()
            replica.holds = lambda submit: False
            replica.alive = True
            assert [await tokens(one) for one in first + new] == [expected(prompt) for prompt in PROMPTS[:8]]
            again = {tuple(submit.prompt): submit for submit in replica.submitted}
            assert all(again[tuple(prompt)].resumed for prompt in PROMPTS[:5])
            assert not any(again[tuple(prompt)].resumed for prompt in PROMPTS[5:8])
            assert all(0 < again[tuple(prompt)].time_left <= 1000 for prompt in PROMPTS[:5])
            assert all(submit.time_left == 0 for submit in replica.submitted if not submit.resumed)
            order = [tuple(submit.prompt) for submit in replica.submitted]
            for these in (PROMPTS[:5], PROMPTS[5:8]):
                places = [order.index(tuple(prompt)) for prompt in these]
                assert places == sorted(places)
            assert min(submit.age for submit in replica.submitted) > 0

    asyncio.run(run())


def test_what_waits_for_a_replica_is_bounded_and_ends(tokenizer: Tokenizer) -> None:
    async def run() -> None:
        async with gateway(tokenizer, 1) as g:
            [replica] = g.replicas
            replica.die()
            await until(lambda: not g.dispatcher.sessions)
            waiting = [g.start(prompt) for prompt in PROMPTS[:7]]
            hurried = g.start([5, 5], deadline=time.monotonic() + 0.1)
            with pytest.raises(Unavailable, match="8 requests wait"):
                g.start([6, 6])
            with pytest.raises(DeadlineExceeded):
                await tokens(hurried)
            g.dispatcher.give_up("no replica could be started: the disk is gone")
            for one in waiting:
                with pytest.raises(Unavailable, match="the disk is gone"):
                    await tokens(one)
            assert not (g.dispatcher._place or g.dispatcher._homeless or g.dispatcher._suspects)

    asyncio.run(run())


def test_who_waits_for_a_replica_is_told_in_time_that_none_came(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire_cluster.policies.admission._LEAST_WAIT", 0.3)

    async def run() -> None:
        async with gateway(tokenizer, 1) as g:
            g.replicas[0].die()
            await until(lambda: not g.dispatcher.sessions)
            for one in [g.start(prompt) for prompt in PROMPTS[:3]]:
                with pytest.raises(Unavailable, match="came back in time"):
                    await tokens(one)

    asyncio.run(run())


def test_a_replica_that_drains_is_asked_once(tokenizer: Tokenizer) -> None:
    async def run() -> None:
        async with gateway(tokenizer) as g:
            first, second = g.replicas
            first.refuses = lambda submit: pb.Ending(
                id=submit.id, reason="error", error_kind="Unavailable", error="this replica is draining"
            )
            running = [g.start(prompt) for prompt in PROMPTS]
            assert [await tokens(one) for one in running] == [expected(prompt) for prompt in PROMPTS]
            assert len(second.submitted) == len(PROMPTS)
            assert len(first.submitted) <= len(PROMPTS)

    asyncio.run(run())
