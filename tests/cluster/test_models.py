"""Several models behind one gateway, over fake replicas: what names lead to while deployments come, change and go."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from fake_replica import FakeReplica
from gateways import TOKENS, body, expected, until
from quire_cluster.deployment import Deployment, DeploymentConfig
from quire_cluster.gateway.generation import Call
from quire_cluster.gateway.http import Api
from quire_cluster.gateway.models import Models
from quire_cluster.gateway.service import Service
from quire_cluster.governance.callers import ANYONE
from quire_cluster.observability.metrics import Metrics
from quire_cluster.routing_table import ClusterTable, ReplicaEntry, RoutingTable, Served
from quire_engine.config import EngineConfig
from quire_engine.errors import ModelError, Unavailable, UnknownModel
from quire_engine.text.params import SamplingParams

MAX_WAITING = 3


def deployment(name: str, *, aliases: str | None = None, model: str = "m", least: int = 1) -> Deployment:
    return Deployment(name, EngineConfig(model=model), DeploymentConfig(aliases=aliases, min_replicas=least))


class Cluster:
    """A gateway's models, and what the test says in the controller's place."""

    def __init__(self, make: Callable[[], Service]) -> None:
        self.silent: list[Any] = []
        self.waited: list[str] = []
        self.unreadable: set[str] = set()  # models
        self.read = 0
        self.busy = False  # something is read
        self.gate = threading.Event()  # which is waited for there
        self.gate.set()
        self.replicas: list[FakeReplica] = []
        self._make = make
        self._version = 0
        outer = self

        class Read(Models):
            def read(self, deployment: Deployment) -> Service:
                outer.read += 1
                assert not outer.busy, "transformers' modules are imported by one thread at a time"
                outer.busy = True
                outer.gate.wait(60)
                outer.busy = False
                if deployment.engine.model in outer.unreadable:
                    raise ModelError("its files are gone")
                made = outer._make()
                made.names = list(deployment.names)
                made.dispatcher._max_waiting = MAX_WAITING
                return made

        self.models = Read(
            Metrics(), on_silence=lambda name, key: self.silent.append((name, key)), on_wait=self.waited.append
        )
        transport = httpx.ASGITransport(Api(self.models).app())
        self.client = httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=60)

    async def replica(self) -> FakeReplica:
        self.replicas.append(await FakeReplica().start())
        return self.replicas[-1]

    def follow(self, *served: Served) -> None:
        self._version += 1
        self.models.follow(ClusterTable(self._version, served))

    async def becomes(self, name: str, state: str) -> None:
        """As its users see it."""

        def seen() -> bool:
            self.models.look()
            return name in self.models.names(ANYONE) and bool(self.models.described(name, ANYONE)["state"] == state)

        await until(seen)

    async def ask(self, model: str | None, prompt: list[int], **options: Any) -> httpx.Response:
        sent = body(prompt, stream=False) | ({"model": model} if model else {}) | options
        return await self.client.post("/v1/completions", json=sent)

    async def asked(self, model: str, prompt: list[int], replica: FakeReplica) -> "asyncio.Task[httpx.Response]":
        """A request that has come to a replica."""
        before = len(replica.submitted)
        task = asyncio.ensure_future(self.ask(model, prompt))
        await until(lambda: len(replica.submitted) > before)
        return task

    async def states(self) -> dict[str, tuple[str, int]]:
        listed = (await self.client.get("/v1/models")).json()["data"]
        return {one["id"]: (one["state"], one["replicas"]) for one in listed}


def served(what: Deployment, *replicas: FakeReplica | ReplicaEntry, **table: Any) -> Served:
    entries = tuple(one.entry() if isinstance(one, FakeReplica) else one for one in replicas)
    return Served(what, RoutingTable(entries, **table))


def run(make: Callable[[], Service], work: Callable[[Cluster], Any]) -> None:
    @asynccontextmanager
    async def cluster() -> AsyncIterator[Cluster]:
        made = Cluster(make)
        try:
            async with asyncio.timeout(120):
                yield made
        finally:
            await made.models.close()
            await made.client.aclose()
            await asyncio.gather(*(replica.stop() for replica in made.replicas))

    async def go() -> None:
        async with cluster() as made:
            await work(made)

    asyncio.run(go())


def text(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def words(prompt: list[int]) -> str:
    return "".join(f"w{token}" for token in expected(prompt))


def test_each_model_by_its_names(service: Callable[[], Service]) -> None:
    async def work(cluster: Cluster) -> None:
        small, large = await cluster.replica(), await cluster.replica()
        assert (await cluster.ask("small", [5])).status_code == 404
        assert "none is served yet" in (await cluster.ask(None, [5])).json()["error"]["message"]
        cluster.follow(
            served(deployment("small", aliases="s, org/s"), small), served(deployment("large", model="l"), large)
        )
        await cluster.becomes("small", "ready")
        await cluster.becomes("large", "ready")
        for name in ("small", "s", "org/s", "large"):
            there, other = (large, small) if name == "large" else (small, large)
            before = len(there.submitted), len(other.submitted)
            assert text(await cluster.ask(name, [5, 6])) == words([5, 6])
            assert (len(there.submitted), len(other.submitted)) == (before[0] + 1, before[1])
        ready = ("ready", 1)
        assert await cluster.states() == {"small": ready, "s": ready, "org/s": ready, "large": ready}
        for name in ("small", "org/s"):
            assert (await cluster.client.get(f"/v1/models/{name}")).json()["id"] == name
        for route in ("/v1/models/none", "/v1/models/smal"):
            assert (await cluster.client.get(route)).status_code == 404
        for name in ("none", "Small", "x" * 5000):
            refused = await cluster.ask(name, [5])
            assert refused.status_code == 404
            assert refused.json()["error"]["code"] == "model_not_found"
            assert "served is small, s, org/s, large" in refused.json()["error"]["message"]
            assert len(refused.text) < 1000
        unnamed = await cluster.ask(None, [5])
        assert unnamed.status_code == 404
        assert "name the model; served is small" in unnamed.json()["error"]["message"]
        assert len(small.submitted) + len(large.submitted) == 4

    run(service, work)


def test_of_many_models_only_some_are_named(service: Callable[[], Service]) -> None:
    """A gRPC status that is too long reaches its caller as another one."""

    async def work(cluster: Cluster) -> None:
        names = [f"{number}" + "é" * 190 for number in range(100)]
        cluster.follow(*(served(deployment(name)) for name in names))
        for asked in ("none", None):
            with pytest.raises(UnknownModel, match="100 in all") as refused:
                await cluster.models.find(asked, ANYONE)
            assert names[0] in str(refused.value)
            assert len(quote(str(refused.value))) < 8192

    run(service, work)


def test_one_model_needs_no_name(service: Callable[[], Service]) -> None:
    async def work(cluster: Cluster) -> None:
        cluster.follow(served(deployment("small", aliases="s"), await cluster.replica()))
        await cluster.becomes("small", "ready")
        assert text(await cluster.ask(None, [5])) == words([5])

    run(service, work)


def test_states(service: Callable[[], Service]) -> None:
    """One that fails is its own."""

    async def work(cluster: Cluster) -> None:
        ready = await cluster.replica()
        cluster.follow(
            served(deployment("ready"), ready),
            served(deployment("starting")),
            served(deployment("sleeping", least=0)),
            served(deployment("waking", least=0), ready_at=time.time() + 100),
            served(deployment("failed"), failure="its weights do not fit"),
        )
        await cluster.becomes("ready", "ready")
        await until(lambda: cluster.read == 5)
        await asyncio.sleep(0.05)
        assert await cluster.states() == {
            "ready": ("ready", 1),
            "starting": ("starting", 0),
            "sleeping": ("sleeping", 0),
            "waking": ("starting", 0),
            "failed": ("failed", 0),
        }
        refused = await cluster.ask("failed", [5])
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "60")
        assert "can be started" in refused.text
        assert "weights" not in refused.text, "its operator's affair"
        early = asyncio.ensure_future(cluster.ask("starting", [5]))
        assert text(await cluster.ask("ready", [5])) == words([5])
        assert (await cluster.client.get("/ready")).status_code == 200
        await until(lambda: cluster.models.reports()["starting"].at_gateway == 1)
        cluster.follow(served(deployment("starting"), await cluster.replica()))
        assert text(await early) == words([5])

    run(service, work)


def test_a_model_that_sleeps_is_woken_and_its_requests_wait(service: Callable[[], Service]) -> None:
    async def work(cluster: Cluster) -> None:
        asleep = deployment("a", least=0)
        cluster.follow(served(asleep))
        await cluster.becomes("a", "sleeping")
        await until(lambda: cluster.models.ready)  # the first request starts it
        first = asyncio.ensure_future(cluster.ask("a", [5]))
        await until(lambda: cluster.waited == ["a"])
        cluster.follow(served(asleep, ready_at=time.time() + 40.0))
        others = [asyncio.ensure_future(cluster.ask("a", [6 + number])) for number in range(MAX_WAITING - 1)]
        await until(lambda: len(cluster.waited) == MAX_WAITING)
        assert cluster.models.reports()["a"].at_gateway == MAX_WAITING
        refused = await cluster.ask("a", [9])
        assert refused.status_code == 503
        assert 35 <= int(refused.headers["retry-after"]) <= 40, "when it should be there"
        assert f"{MAX_WAITING} requests wait" in refused.json()["error"]["message"]
        assert not first.done()
        cluster.follow(served(asleep, await cluster.replica()))
        for number, answer in enumerate(await asyncio.gather(first, *others)):
            assert text(answer) == words([5 + number])
        assert cluster.models.reports()["a"].at_gateway == 0
        cluster.follow(served(asleep))
        await cluster.becomes("a", "sleeping")
        assert (await cluster.client.get("/health")).status_code == 200, "nothing is wrong with it"

    run(service, work)


def test_a_model_that_is_replaced_answers_until_the_new_one_does(service: Callable[[], Service]) -> None:
    """What was begun is ended by what began it."""

    async def work(cluster: Cluster) -> None:
        old, new = await cluster.replica(), await cluster.replica()
        before, after = deployment("a"), deployment("a", model="other", aliases="b")
        cluster.follow(served(before, old))
        await cluster.becomes("a", "ready")
        old.holds = lambda submit: list(submit.prompt) == [5]
        running = await cluster.asked("a", [5], old)
        cluster.follow(Served(after, RoutingTable(), {before.model_revision: RoutingTable((old.entry(),))}))
        await until(lambda: cluster.read == 2)
        assert text(await cluster.ask("b", [6])) == words([6])
        assert await cluster.states() == {"a": ("ready", 1), "b": ("ready", 1)}
        new_one = Served(after, RoutingTable((new.entry(),)), {before.model_revision: RoutingTable((old.entry(),))})
        cluster.follow(new_one)

        def switched() -> bool:
            cluster.models.look()
            active = cluster.models._entries["a"].active
            return active is not None and {one.key for one in active.dispatcher.sessions} == {new.entry().key}

        await until(switched)
        assert text(await cluster.ask("a", [7])) == words([7])
        assert [list(submit.prompt) for submit in new.submitted] == [[7]]
        leaving = replace(old.entry(), draining=True)
        cluster.follow(replace(new_one, others={before.model_revision: RoutingTable((leaving,))}))
        cluster.models.look()
        assert cluster.models.num_open == 1
        old.holds = lambda submit: False
        assert text(await running) == words([5])
        assert len(new.submitted) == 1, "it was not begun anew by another model"
        cluster.follow(served(after, new))
        cluster.models.look()
        assert len(list(cluster.models._services)) == 1, "nobody needs the old one"
        await until(lambda: old.num_sessions == 1 and not old._sessions)

    run(service, work)


def test_another_chat_template_is_served_by_the_replicas_that_are_there(service: Callable[[], Service]) -> None:
    async def work(cluster: Cluster) -> None:
        replica = await cluster.replica()
        before = deployment("a")
        after = replace(before, chat_template="other")
        slot = replica.entry()  # of a deployment as it was when the replica was started
        cluster.follow(served(before, slot))
        await cluster.becomes("a", "ready")
        replica.holds = lambda submit: list(submit.prompt) == [5]
        running = await cluster.asked("a", [5], replica)
        old = await cluster.models.find("a", ANYONE)
        assert after.model_revision == before.model_revision, "the controller tells of its replicas as of the new one's"
        cluster.follow(served(after, slot))

        def switched() -> bool:
            cluster.models.look()
            return cluster.models._entries["a"].active is not old

        await until(switched)
        assert text(await cluster.ask("a", [6])) == words([6])
        replica.holds = lambda submit: False
        assert text(await running) == words([5])
        cluster.models.look()
        assert len(list(cluster.models._services)) == 1, "nobody needs the old one"

    run(service, work)


def test_what_a_replaced_model_cannot_end_is_not_gone_on_with_by_another(service: Callable[[], Service]) -> None:
    async def work(cluster: Cluster) -> None:
        old, new = await cluster.replica(), await cluster.replica()
        before, after = deployment("a"), deployment("a", model="other")
        cluster.follow(served(before, old))
        await cluster.becomes("a", "ready")
        old.holds = lambda submit: True
        running = await cluster.asked("a", [5], old)
        cluster.follow(served(after, new))
        await until(lambda: len(cluster.models._entries["a"].services) == 2)
        old.die()

        def ended() -> bool:
            cluster.models.look()
            return running.done()

        await until(ended)
        assert (await running).status_code == 503
        assert "replaced by another" in (await running).json()["error"]["message"]
        assert not new.submitted

    run(service, work)


def test_a_model_is_deleted_and_what_it_has_begun_ends(service: Callable[[], Service]) -> None:
    async def work(cluster: Cluster) -> None:
        first, second = await cluster.replica(), await cluster.replica()
        a, b = deployment("a"), deployment("b")
        cluster.follow(served(a, first), served(b, second))
        await cluster.becomes("a", "ready")
        await cluster.becomes("b", "ready")
        first.holds = lambda submit: True
        running = await cluster.asked("a", [5], first)
        cluster.follow(served(b, second))
        assert (await cluster.ask("a", [6])).status_code == 404
        assert await cluster.states() == {"b": ("ready", 1)}
        assert cluster.models.num_open == 1
        assert text(await cluster.ask(None, [6])) == words([6]), "the only one that is left"
        first.holds = lambda submit: False
        assert text(await running) == words([5])
        cluster.models.look()
        assert len(list(cluster.models._services)) == 1
        cluster.follow(served(b, second), served(a, await cluster.replica()))
        await cluster.becomes("a", "ready")
        assert text(await cluster.ask("a", [8])) == words([8])

    run(service, work)


@pytest.mark.parametrize("after", [None, "other"], ids=["deleted", "replaced"])
def test_who_is_late_for_a_model_is_told(service: Callable[[], Service], after: str | None) -> None:
    """A request whose prompt is still read when nothing else of its model is left: it would wait for ever."""

    async def work(cluster: Cluster) -> None:
        cluster.follow(served(deployment("a"), await cluster.replica()))
        await cluster.becomes("a", "ready")
        found = await cluster.models.find("a", ANYONE)
        sampling = await found.sampling(SamplingParams(max_tokens=1))
        cluster.follow(*([served(deployment("a", model=after), await cluster.replica())] if after else []))

        def left() -> bool:
            cluster.models.look()
            return found not in cluster.models._services

        await until(left)
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="deleted or replaced meanwhile"):
            found.start([5], sampling, Call(route="", caller=ANYONE))

    run(service, work)


def test_a_replica_that_drains_gets_nothing_new_and_is_no_loss(service: Callable[[], Service]) -> None:
    """However often that befalls a request: a replica that ends as it should is not one that the request killed."""

    async def work(cluster: Cluster) -> None:
        a = deployment("a")
        replicas = [await cluster.replica() for _ in range(4)]
        cluster.follow(served(a, replicas[0]))
        await cluster.becomes("a", "ready")
        replicas[0].holds = lambda submit: True
        running = await cluster.asked("a", [5], replicas[0])
        dispatcher = (await cluster.models.find("a", ANYONE)).dispatcher
        for leaving, there in pairwise(replicas):
            there.holds = lambda submit, last=there is replicas[-1]: not last and list(submit.prompt) == [5]
            cluster.follow(served(a, replace(leaving.entry(), draining=True), there))
            await until(lambda there=there: [s.key for s in dispatcher.sessions] == [there.entry().key])
            before = len(leaving.submitted)
            assert text(await cluster.ask("a", [6])) == words([6])
            assert len(leaving.submitted) == before
            assert not running.done()
            leaving.die()  # its time is over
            await until(lambda there=there: any(list(submit.prompt) == [5] for submit in there.submitted))
            [choice] = [choice for session in dispatcher.sessions for choice in session.live.values()] or [None]
            assert choice is None or choice.losses.count == 0
            cluster.follow(served(a, there))
        assert text(await running) == words([5])

    run(service, work)


def test_a_model_that_cannot_be_read_yet_is_tried_again(
    service: Callable[[], Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire_cluster.gateway.models._RETRY", 0.05)

    async def work(cluster: Cluster) -> None:
        cluster.unreadable = {"m"}
        cluster.follow(served(deployment("a"), await cluster.replica()), served(deployment("b", model="n")))
        await until(lambda: cluster.read >= 4)
        with pytest.raises(Unavailable, match="cannot be read at this gateway"):
            await cluster.models.find("a", ANYONE)
        with pytest.raises(UnknownModel):
            await cluster.models.find("c", ANYONE)
        assert not cluster.models.ready
        cluster.unreadable = set()
        await cluster.becomes("a", "ready")
        assert len(text(await cluster.ask("a", [5])).split("w")) == TOKENS + 1

    run(service, work)


def test_a_model_that_is_being_read_is_waited_for_and_stops_no_other(service: Callable[[], Service]) -> None:
    async def work(cluster: Cluster) -> None:
        first = served(deployment("a"), await cluster.replica())
        second = served(deployment("b"), await cluster.replica())
        cluster.gate.clear()
        cluster.follow(first)
        early = asyncio.ensure_future(cluster.ask("a", [5]))
        await until(lambda: cluster.busy)
        assert not cluster.models.ready, "it has just begun"
        cluster.gate.set()
        assert text(await early) == words([5])
        await until(lambda: cluster.models.ready)
        cluster.gate.clear()
        cluster.follow(first, second)
        early = asyncio.ensure_future(cluster.ask("b", [6]))
        await until(lambda: cluster.busy)
        cluster.models.look()
        assert cluster.models.ready
        assert text(await cluster.ask("a", [7])) == words([7])
        cluster.gate.set()
        assert text(await early) == words([6])

    run(service, work)


def test_a_model_that_takes_long_to_read_is_not_waited_for_without_end(
    service: Callable[[], Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire_cluster.gateway.models._READ", 0.05)

    async def work(cluster: Cluster) -> None:
        cluster.gate.clear()
        cluster.follow(served(deployment("a"), await cluster.replica()))
        refused = await cluster.ask("a", [5])
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
        assert "still being read" in refused.text
        cluster.gate.set()
        await cluster.becomes("a", "ready")
        assert text(await cluster.ask("a", [5])) == words([5])

    run(service, work)


def test_a_model_that_is_deleted_while_it_is_read(service: Callable[[], Service]) -> None:
    async def work(cluster: Cluster) -> None:
        first, second = served(deployment("a"), await cluster.replica()), served(deployment("b"))
        cluster.follow(first)
        await cluster.becomes("a", "ready")
        cluster.gate.clear()
        cluster.follow(first, second)
        early = asyncio.ensure_future(cluster.ask("b", [6]))
        await until(lambda: cluster.busy)
        cluster.follow(first)
        assert (await early).status_code == 404
        cluster.gate.set()

    run(service, work)


def test_who_is_silent_is_told_with_its_deployment(service: Callable[[], Service]) -> None:
    async def work(cluster: Cluster) -> None:
        first, quiet = await cluster.replica(), await cluster.replica()
        cluster.follow(served(deployment("a"), first), served(deployment("b"), quiet))
        await cluster.becomes("a", "ready")
        await cluster.becomes("b", "ready")
        [session] = (await cluster.models.find("b", ANYONE)).dispatcher.sessions
        quiet.silent = True
        session.silence.seconds = 9.9
        await until(lambda: bool(cluster.silent))
        quiet.silent = False
        assert cluster.silent == [("b", quiet.entry().key)]

    run(service, work)
