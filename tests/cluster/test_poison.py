"""What kills replicas is found, and what ran beside it goes on."""

import asyncio
from collections.abc import Callable

import pytest
from fake_replica import FakeReplica
from gateways import PROMPTS, expected, gateway, tokens, until
from quire_engine.errors import (
    PoisonRequest,
)
from quire_engine.text.tokenizer import Tokenizer
from quire_protos.v1 import engine_pb2 as pb


@pytest.mark.parametrize("kills_at", [0, 1, 12])
@pytest.mark.parametrize("last_words", ["a worker process died", ""])
def test_what_kills_replicas_ends_and_what_ran_beside_it_goes_on(
    tokenizer: Tokenizer, kills_at: int, last_words: str
) -> None:
    """Whether at its start or at a later token: replicas are brought back, as a controller does, and few have died."""

    async def run() -> None:
        async with gateway(tokenizer, 3) as g:

            async def bring_back() -> None:
                while True:
                    await asyncio.sleep(0.7)
                    for replica in g.replicas:
                        replica.alive = True

            controller = asyncio.ensure_future(bring_back())
            for replica in g.replicas:
                replica.deadly = lambda submit, index: submit.prompt[0] == 99 and index == kills_at
                replica.last_words = last_words
            running = [g.start(prompt) for prompt in PROMPTS[:8]]
            poison = g.start([99, 1])
            running += [g.start(prompt) for prompt in PROMPTS[8:]]
            with pytest.raises(PoisonRequest, match="two replicas died"):
                await tokens(poison)
            assert [await tokens(one) for one in running] == [expected(prompt) for prompt in PROMPTS]
            assert sum(replica.deaths for replica in g.replicas) <= (3 if last_words else 4)
            controller.cancel()

    asyncio.run(run())


@pytest.mark.parametrize("replicas", [1, 3])
def test_poison_beside_a_trial_convicts_nobody_else(tokenizer: Tokenizer, replicas: int) -> None:
    """Others that kill come all the time, while what a replica was lost under is tried."""

    async def run() -> None:
        async with gateway(tokenizer, replicas, max_waiting=100) as g:

            async def bring_back() -> None:
                while True:
                    await asyncio.sleep(0.2)
                    for replica in g.replicas:
                        replica.alive = True

            controller = asyncio.ensure_future(bring_back())
            for replica in g.replicas:
                replica.deadly = lambda submit, index: submit.prompt[0] >= 99
            running, poisons = [], []
            for number in range(8):
                running += [g.start(prompt) for prompt in PROMPTS[2 * number : 2 * number + 2]]
                poisons.append(g.start([99 + number, 1]))
                deaths = sum(replica.deaths for replica in g.replicas)
                await until(lambda deaths=deaths: sum(replica.deaths for replica in g.replicas) > deaths)
            for poison in poisons:
                with pytest.raises(PoisonRequest):
                    await tokens(poison)
            assert [await tokens(one) for one in running] == [expected(prompt) for prompt in PROMPTS]
            controller.cancel()

    asyncio.run(run())


def test_a_suspect_beside_what_is_as_suspicious_is_not_convicted(tokenizer: Tokenizer) -> None:
    """There is only one replica left to send it to, where something else has just come; and that one is lost too."""

    async def run() -> None:
        async with gateway(tokenizer) as g:
            for replica in g.replicas:
                replica.holds = lambda submit: True
            other = g.start(PROMPTS[0])
            await until(lambda: any(replica.submitted for replica in g.replicas))
            there, alone = sorted(g.replicas, key=lambda replica: not replica.submitted)
            suspect = g.start(PROMPTS[1])
            await until(lambda: bool(alone.submitted and suspect.choices[0].times.started))
            alone.die("a worker process died")
            await until(lambda: len(there.submitted) == 2 and len(there._running) == 2)
            there.die("a worker process died")
            await until(lambda: not g.dispatcher.sessions)
            for replica in g.replicas:
                replica.holds = lambda submit: False
                replica.alive = True
            assert [await tokens(one) for one in (other, suspect)] == [expected(prompt) for prompt in PROMPTS[:2]]

    asyncio.run(run())


def test_what_is_new_does_not_wait_long_for_a_suspect(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may have a long prompt."""
    monkeypatch.setattr("quire_cluster.gateway.dispatcher._HELD_BACK", 1.0)

    async def run() -> None:
        async with gateway(tokenizer, 1) as g:
            [replica] = g.replicas
            replica.holds = lambda submit: submit.prompt[0] == 77
            slow = g.start([77, 1])
            await until(lambda: bool(replica.submitted))
            await until(lambda: bool(g.dispatcher.sessions[0].begun))
            replica.die()
            await until(lambda: not g.dispatcher.sessions)
            replica.alive = True
            await until(lambda: len(replica.submitted) == 2)
            new = g.start(PROMPTS[0])
            assert list(g.dispatcher.homeless) == new.choices, "it is held back"
            assert await tokens(new) == expected(PROMPTS[0])
            assert not slow.choices[0].output
            replica.holds = lambda submit: False
            assert await tokens(slow) == expected([77, 1])

    asyncio.run(run())


def test_replicas_that_vanish_together_convict_nobody(tokenizer: Tokenizer) -> None:
    """Their host died, or the controller: everything waits and goes on."""

    async def run() -> None:
        async with gateway(tokenizer) as g:
            running = [g.start(prompt) for prompt in PROMPTS]
            await until(lambda: all(one.choices[0].output for one in running))
            g.replicas[0].die()
            await until(lambda: any(one.choices[0].epoch == 2 for one in running))
            g.replicas[1].die()
            await until(lambda: not g.dispatcher.sessions)
            for replica in g.replicas:
                replica.alive = True
            assert [await tokens(one) for one in running] == [expected(prompt) for prompt in PROMPTS]

    asyncio.run(run())


def test_what_kills_replicas_before_its_start_ends_too(tokenizer: Tokenizer) -> None:
    """Nobody has said that it was in a step; what only waits beside it goes on, however many replicas are lost."""

    async def run() -> None:
        async with gateway(tokenizer, 2) as g:

            def kills(replica: FakeReplica) -> Callable[[pb.Submit], pb.Ending | None]:
                def look(submit: pb.Submit) -> None:
                    if submit.prompt[0] == 99:
                        replica.die("the engine failed")

                return look

            async def bring_back() -> None:
                while True:
                    await asyncio.sleep(0.1)
                    for replica in g.replicas:
                        replica.alive = True

            controller = asyncio.ensure_future(bring_back())
            for replica in g.replicas:
                replica.refuses = kills(replica)
            poison = g.start([99, 1])
            with pytest.raises(PoisonRequest):
                await tokens(poison)
            assert sum(replica.deaths for replica in g.replicas) <= 4
            controller.cancel()

    asyncio.run(run())
