"""How gateways let requests of tenants in: with real tasks on a loop whose time goes on only where all of them wait."""

import asyncio
import random
import selectors
from collections.abc import Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import grpc
import httpx
import openai
import pytest
import ray
from quire_cluster.controller import ClusterConfig, Controller, actor_options
from quire_cluster.gateway.connection import Limits
from quire_cluster.gateway.grpc_api import GrpcServer, retry_details
from quire_cluster.gateway.http import error_response
from quire_cluster.governance.callers import Tenant, TenantLimits
from quire_cluster.governance.limits import Limiter, Permit, duration
from quire_cluster.leases import Leases
from quire_cluster.local_ray import start_private_cluster
from quire_cluster.policies.quota import Ask, Grants, LeasedRate, LeasedSlots, TenantAsk
from quire_engine.errors import ContextTooLong, InvalidParameter, LimitReached, ServerError
from quire_protos.v1 import inference_pb2 as pb
from quire_protos.v1 import inference_pb2_grpc

NOVEMBER = datetime(2026, 11, 29, 12, tzinfo=UTC).timestamp()
PATIENCE = 0.05


class _Skipping(selectors.DefaultSelector):
    """Waits for nothing: it says how long it would have waited."""

    def __init__(self, skip: Callable[[float], None]) -> None:
        super().__init__()
        self._skip = skip

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "every task waits for another one"
        self._skip(timeout)
        return super().select(0)


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Its time is the test's."""

    def __init__(self) -> None:
        self._now = 1000.0
        super().__init__(_Skipping(self._pass))

    def _pass(self, seconds: float) -> None:
        self._now += max(0.0, seconds)

    def time(self) -> float:
        return self._now


def simulate(test: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        runner.run(test)


def now() -> float:
    return asyncio.get_running_loop().time()


class Far:
    """A controller behind delays. `broken`: it cannot be reached; `stuck`: it does not answer."""

    def __init__(self, gateways: int, seed: int = 0) -> None:
        self.leases = Leases(now() - 60)
        self.gateways = gateways
        self.calls = 0
        self.most_calls = 0  # of one gateway at a time
        self.broken = False
        self.free = asyncio.Event()
        self.free.set()
        self._random = random.Random(seed)

    def lease(self) -> Callable[[Ask], Any]:
        """For one gateway."""
        under_way = 0

        async def lease(ask: Ask) -> Grants:
            nonlocal under_way
            under_way += 1
            self.calls += 1
            self.most_calls = max(self.most_calls, under_way)
            try:
                await asyncio.sleep(self._random.uniform(0, 0.005))
                await self.free.wait()
                if self.broken:
                    raise ConnectionError("it is away")
                grants = self.leases.lease(ask, now(), self.gateways)
                await asyncio.sleep(self._random.uniform(0, 0.005))
                return grants
            finally:
                under_way -= 1

        return lease

    def restart(self) -> None:
        self.leases = Leases(now())


@asynccontextmanager
async def limiters(far: Far, count: int = 1, used: Callable[[str], int] = lambda tenant: 0) -> Any:
    made = [
        Limiter(f"gateway {at}", far.lease(), used=used, revision=lambda: 0, wall=lambda: NOVEMBER)
        for at in range(count)
    ]
    running = [asyncio.ensure_future(limiter.run()) for limiter in made]
    yield made
    for task in running:
        assert not task.done(), task
        task.cancel()


def tenant(**limits: int) -> Tenant:
    return Tenant(name="team", limits=TenantLimits(**limits))


async def admitted(limiter: Limiter, of: Tenant, prompt: int = 1, answer: int = 1) -> Permit | LimitReached:
    try:
        return await limiter.admit(of, [prompt], answer, given=True)
    except LimitReached as error:
        return error


@dataclass
class Crowd:
    """Callers that send one request after the other, and what was seen of them."""

    of: Tenant
    begun: list[float] = field(default_factory=list)
    tokens: list[tuple[float, int]] = field(default_factory=list)  # reserved, or given back
    running: int = 0
    most: int = 0
    refused: list[LimitReached] = field(default_factory=list)
    longest_wait: float = 0.0

    async def call(self, limiter: Limiter, generator: random.Random, until: float) -> None:
        await asyncio.sleep(generator.uniform(0, 0.02))
        while now() < until:
            asked, prompt, answer = now(), generator.randrange(1, 50), generator.randrange(1, 200)
            found = await admitted(limiter, self.of, prompt, answer)
            self.longest_wait = max(self.longest_wait, now() - asked)
            if isinstance(found, LimitReached):
                self.refused.append(found)
                await asyncio.sleep(generator.uniform(0.2, 1.0))
                continue
            self.begun.append(now())
            self.tokens.append((now(), prompt + answer))
            self.running += 1
            self.most = max(self.most, self.running)
            await asyncio.sleep(generator.expovariate(1.0))
            self.running -= 1
            if generator.random() < 0.9:  # the others fail
                came_to = prompt + generator.randrange(answer + 1)
                self.tokens.append((now(), came_to - prompt - answer))
                found.settle(came_to)
            found.release()

    def above(self, limit: int, amounts: list[tuple[float, int]]) -> float:
        """By how much the worst window has more than limit × (1 + t / 60): the largest rise of what was let in less
        what flowed, over the least of it before."""
        total, lowest, worst = 0.0, 0.0, 0.0
        for at, amount in sorted(amounts, key=lambda one: one[0]):
            level = total - at * limit / 60
            lowest = min(lowest, level) if total else level
            total += amount
            worst = max(worst, level + amount - lowest)
        return worst - limit


def test_five_hundred_callers_at_each_of_three_gateways() -> None:
    """No request waits longer than 50 ms, no limit is exceeded, and all of it is there again in the end."""

    async def run() -> None:
        far = Far(3)
        team = tenant(requests_per_minute=1200, tokens_per_minute=90_000, concurrent_requests=100)
        crowd = Crowd(team)
        async with limiters(far, 3) as three:
            until = now() + 20
            calls = [crowd.call(three[at % 3], random.Random(at), until) for at in range(1500)]
            await asyncio.gather(*calls)
            assert crowd.longest_wait <= PATIENCE
            assert crowd.most == 100, "and not one more, or less"
            assert crowd.above(1200, [(at, 1) for at in crowd.begun]) <= 0
            assert crowd.above(90_000, crowd.tokens) <= 3 * 90_000 / 32
            assert {error.limit for error in crowd.refused} == {
                "concurrent_requests",
                "requests_per_minute",
                "tokens_per_minute",
            }
            assert 10 * far.calls < len(crowd.begun) + len(crowd.refused), "one ask is for many requests"
            assert far.most_calls == 1
            await asyncio.sleep(75)
            await check_all_is_there(three[2], team)

    simulate(run())


def test_no_gateway_starves() -> None:
    """Of a small limit, where ten times as many callers come to one gateway as to the others."""

    async def run() -> None:
        far = Far(3)
        team = tenant(requests_per_minute=60)
        crowds = [Crowd(team) for _ in range(3)]
        async with limiters(far, 3) as three:
            until = now() + 240
            numbers = [at for at, callers in enumerate((50, 5, 5)) for _ in range(callers)]
            await asyncio.gather(
                *(crowds[at].call(three[at], random.Random(place), until) for place, at in enumerate(numbers))
            )
        counts = [len(crowd.begun) for crowd in crowds]
        assert 290 <= sum(counts) <= 301, "a minute's limit at once, and four minutes"
        parts = [count / sum(counts) * 60 / callers for count, callers in zip(counts, (50, 5, 5), strict=True)]
        assert min(parts) >= 0.5, "each has about as large a part of what is let in as of the callers"

    simulate(run())


async def check_all_is_there(limiter: Limiter, of: Tenant) -> None:
    """One gateway gets the whole limit."""
    found = await asyncio.gather(*(admitted(limiter, of) for _ in range(150)))
    permits = [one for one in found if isinstance(one, Permit)]
    assert len(permits) == 100
    remaining = [int(permit.headers["x-ratelimit-remaining-requests"]) for permit in permits]
    assert min(remaining) == of.limits.requests_per_minute - 100
    for permit in permits:
        permit.release()


@pytest.mark.parametrize("how", ["broken", "stuck"])
def test_gateways_go_on_with_their_shares(how: str) -> None:
    """While the controller is away; then what they used so is charged. No request waits for it longer than 50 ms."""

    async def run() -> None:
        far = Far(3)
        team = tenant(requests_per_minute=600, concurrent_requests=90)
        async with limiters(far, 3) as three:
            for limiter in three:
                (await limiter.admit(team, [1], 1, given=True)).release()
            await asyncio.sleep(5.0)
            assert not any(limiter.alone for limiter in three)
            if how == "broken":
                far.broken = True
            else:
                far.free.clear()
            crowd = Crowd(team)
            began = now()
            await asyncio.gather(*(crowd.call(three[at % 3], random.Random(at), began + 60) for at in range(90)))
            assert all(limiter.alone for limiter in three)
            assert crowd.longest_wait <= PATIENCE + 1e-6
            assert crowd.most <= 90
            assert crowd.above(600, [(at, 1) for at in crowd.begun]) <= 0, "the shares are of one limit"
            assert len(crowd.begun) > 600
            far.broken = False
            far.free.set()
            await asyncio.sleep(1.5)
            for limiter in three:
                await admitted(limiter, team)
            await asyncio.sleep(1.5)
            assert not any(limiter.alone for limiter in three)
            at_once = await asyncio.gather(*(admitted(three[0], team) for _ in range(600)))
            let_in = sum(isinstance(one, Permit) for one in at_once)
            assert let_in + len(crowd.begun) <= 600 * (1 + (now() - began) / 60) + 1

    simulate(run())


@pytest.mark.parametrize("limit", ["concurrent_requests", "requests_per_minute"])
def test_nobody_waits_behind_those_that_need_all_there_is(limit: str) -> None:
    """The controller is about to answer: those that it can let in wait for it, and the others hear at once."""

    async def test() -> None:
        far = Far(gateways=3)
        async with limiters(far) as [limiter]:
            await asyncio.sleep(1)
            far.free.clear()
            asked = [asyncio.ensure_future(admitted(limiter, tenant(**{limit: 12}))) for _ in range(20)]
            begun = now()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert now() == begun
            refused = [task.result() for task in asked if task.done()]
            assert len(refused) == 8
            assert all(isinstance(one, LimitReached) for one in refused)
            far.free.set()
            found = [await task for task in asked]
            assert sum(isinstance(one, Permit) for one in found) == 12

    simulate(test())


def test_a_quiet_gateway_hears_of_others() -> None:
    """It was started first, and nothing was asked of it until the controller answers no more."""

    async def test() -> None:
        far = Far(gateways=1)
        async with limiters(far) as [limiter]:
            await asyncio.sleep(30)
            far.gateways = 3
            await asyncio.sleep(10)
            far.free.clear()
            found = [await admitted(limiter, tenant(concurrent_requests=12)) for _ in range(12)]
            assert sum(isinstance(one, Permit) for one in found) == 4

    simulate(test())


def test_a_controller_that_is_started_again_hears_what_runs() -> None:
    async def run() -> None:
        far = Far(2)
        team = tenant(concurrent_requests=40, requests_per_minute=6000)
        async with limiters(far, 2) as (first, second):
            permits = [await first.admit(team, [1], 1, given=True) for _ in range(30)]
            far.restart()
            await asyncio.sleep(5.0)
            found = await asyncio.gather(*(admitted(second, team) for _ in range(40)))
            more = [one for one in found if isinstance(one, Permit)]
            assert len(more) == 10
            for permit in (*permits, *more):
                permit.release()
                permit.release()
            await asyncio.sleep(2.0)
            found = await asyncio.gather(*(admitted(first, team) for _ in range(50)))
            assert sum(isinstance(one, Permit) for one in found) == 40

    simulate(run())


def test_a_tenant_without_limits_costs_nothing() -> None:
    async def run() -> None:
        async with limiters(far := Far(1)) as [limiter]:
            call = limiter.admit(tenant(), [10], 500, given=False)
            with pytest.raises(StopIteration) as ended:
                call.send(None)
            permit = ended.value.value
            assert (permit.longest_answer, permit.headers) == (500, {})
            permit.settle(20)
            permit.release()
            await asyncio.sleep(10)
            assert far.calls <= 1 + 10 / 4, "how many gateways there are, and nothing is asked for"

    simulate(run())


def test_most_requests_are_decided_where_they_come() -> None:
    """A hundred a second, of a limit of twice as many: and what is held is given back a while after the last,
    when gateways ask for nothing any more, every four seconds."""

    async def run() -> None:
        async with limiters(far := Far(1)) as [limiter]:
            team = tenant(requests_per_minute=12_000)
            waited = 0
            for _ in range(1000):
                before = now()
                (await limiter.admit(team, [1], 1, given=True)).release()
                waited += now() > before
                await asyncio.sleep(0.01)
            assert waited == 1
            assert far.calls < 100
            await asyncio.sleep(2.5)
            calls = far.calls
            await asyncio.sleep(60)
            assert far.calls <= calls + 60 / 4

    simulate(run())


def test_clients_that_leave_take_nothing_with_them() -> None:
    """While they wait, or at the moment at which they are let in."""

    async def run() -> None:
        async with limiters(Far(1)) as [limiter]:
            team = tenant(concurrent_requests=5, tokens_per_minute=5000, requests_per_minute=10**6)
            for step in range(200):
                calls = [asyncio.ensure_future(limiter.admit(team, [500], 500, given=True)) for _ in range(4)]
                leaving = calls[step % 4]
                while not calls[0].done():
                    if now() % 0.02 > step / 10_000:
                        leaving.cancel()
                    await asyncio.sleep(0.0003)
                leaving.cancel()
                for one in await asyncio.gather(*calls, return_exceptions=True):
                    if isinstance(one, Permit):
                        one.settle(0)
                        one.release()
            await asyncio.sleep(3.0)
            found = await asyncio.gather(*(admitted(limiter, team, 500, 500) for _ in range(6)))
            assert sum(isinstance(one, Permit) for one in found) == 5

    simulate(run())


def test_one_that_was_just_let_in_and_leaves() -> None:
    """Its task is cancelled in the very step of the loop in which it is let in."""

    async def run() -> None:
        calls: list[asyncio.Task[Permit]] = []
        leases = Leases(now())

        async def lease(ask: Ask) -> Grants:
            grants = leases.lease(ask, now(), 1)
            if ask.tenants:
                asyncio.get_running_loop().call_soon(lambda: [call.cancel() for call in calls])
            return grants

        limiter = Limiter("a", lease, used=lambda tenant: 0, revision=lambda: 0)
        running = asyncio.ensure_future(limiter.run())
        team = tenant(concurrent_requests=1)
        calls.append(asyncio.ensure_future(limiter.admit(team, [1], 1, given=True)))
        assert [type(one) for one in await asyncio.gather(*calls, return_exceptions=True)] == [asyncio.CancelledError]
        calls.clear()
        await asyncio.sleep(1.0)
        assert isinstance(await admitted(limiter, team), Permit)
        running.cancel()

    simulate(run())


def test_tokens_are_reserved_and_settled() -> None:
    async def run() -> None:
        async with limiters(Far(1)) as [limiter]:
            team = tenant(tokens_per_minute=6000)
            permit = await limiter.admit(team, [1000, 500], 500, given=True, choices=3)
            assert permit.headers["x-ratelimit-remaining-tokens"] == "1500"
            with pytest.raises(LimitReached, match="6000 tokens a minute") as refused:
                await limiter.admit(team, [1000], 1000, given=True)
            assert refused.value.limit == "tokens_per_minute"
            assert 4.8 <= refused.value.retry_after <= 5.0, "500 are missing, and 100 come in a second"
            permit.settle(1500)
            permit.release()
            await asyncio.sleep(0.1)
            other = await limiter.admit(team, [4000], 0, given=True)
            other.settle(4200)
            other.settle(9500)  # it ran on
            other.release()
            await asyncio.sleep(0.1)
            with pytest.raises(LimitReached) as refused:
                await limiter.admit(team, [1], 0, given=True)
            assert 48 <= refused.value.retry_after <= 50, "5000 too many"
            await asyncio.sleep(refused.value.retry_after)
            await limiter.admit(team, [1], 0, given=True)

    simulate(run())


def test_what_is_reserved_for_an_answer_of_any_length() -> None:
    async def run() -> None:
        async with limiters(Far(1)) as [limiter]:

            async def left(of: Tenant, answer: int) -> tuple[int, int]:
                permit = await limiter.admit(of, [100], answer, given=False)
                used = of.limits.tokens_per_minute - int(permit.headers["x-ratelimit-remaining-tokens"])
                permit.settle(0)
                await asyncio.sleep(1.5)
                return used, permit.longest_answer

            assert await left(tenant(tokens_per_minute=9000), 30_000) == (1124, 30_000)
            assert await left(tenant(tokens_per_minute=9000), 600) == (700, 600), "the context leaves no more"
            assert await left(tenant(tokens_per_minute=9000, longest_answer=3000), 30_000) == (3100, 3000)
            assert await left(tenant(tokens_per_minute=500), 30_000) == (500, 30_000), "it can only be all there is"

    simulate(run())


def test_what_can_never_be_let_in() -> None:
    async def run() -> None:
        async with limiters(Far(1)) as [limiter]:
            for limits, kind, parameter in (
                ({"longest_prompt": 99}, ContextTooLong, "prompt"),
                ({"longest_answer": 49}, InvalidParameter, "max_tokens"),
                ({"tokens_per_minute": 149}, InvalidParameter, "max_tokens"),
                ({"tokens_per_minute": 99}, InvalidParameter, "prompt"),
            ):
                with pytest.raises(kind, match=f"{next(iter(limits))}.* is {next(iter(limits.values()))}") as refused:
                    await limiter.admit(tenant(**limits), [100], 50, given=True)
                assert refused.value.parameter == parameter
            fits = tenant(longest_prompt=100, longest_answer=50, tokens_per_minute=150)
            await limiter.admit(fits, [100], 50, given=True)

    simulate(run())


def test_the_month_s_tokens() -> None:
    """Those that are on record, and those that are reserved."""

    async def run() -> None:
        used = {"team": 800}
        async with limiters(Far(1), used=used.__getitem__) as [limiter]:
            team = tenant(monthly_tokens=1000)
            permit = await limiter.admit(team, [50], 100, given=True)
            with pytest.raises(LimitReached) as refused:
                await limiter.admit(team, [50], 1, given=True)
            assert refused.value.limit == "monthly_tokens"
            assert refused.value.retry_after == datetime(2026, 12, 1, tzinfo=UTC).timestamp() - NOVEMBER
            permit.settle(60)
            used["team"] += 60
            permit.release()
            await limiter.admit(team, [50], 90, given=True)

    simulate(run())


def test_the_month_s_tokens_hold_for_those_that_wait_together() -> None:
    """The first come is let in; the controller has leased enough for all."""

    async def run() -> None:
        async with limiters(Far(1)) as [limiter]:
            team = tenant(monthly_tokens=250, requests_per_minute=100)
            found = await asyncio.gather(*(admitted(limiter, team, 50, 50) for _ in range(4)))
            assert [isinstance(one, Permit) for one in found] == [True, True, False, False]
            assert {one.limit for one in found if isinstance(one, LimitReached)} == {"monthly_tokens"}

    simulate(run())


def test_limits_that_operators_change() -> None:
    async def run() -> None:
        async with limiters(Far(1)) as [limiter]:
            permits = [await limiter.admit(tenant(requests_per_minute=100), [1], 1, given=True) for _ in range(3)]
            assert isinstance(await admitted(limiter, tenant(concurrent_requests=3)), LimitReached), "three run"
            found = await asyncio.gather(*(admitted(limiter, tenant(concurrent_requests=5)) for _ in range(3)))
            assert sum(isinstance(one, Permit) for one in found) == 2
            for permit in permits:
                permit.release()
            await asyncio.sleep(0.1)
            assert isinstance(await admitted(limiter, tenant(concurrent_requests=5)), Permit)

    simulate(run())


def test_durations_are_spelt_as_openai_spells_them() -> None:
    spelt = {0: "0s", 0.0123: "13ms", 1: "1s", 59.2: "1m0s", 360: "6m0s", 3600: "1h0m0s", 90061: "25h1m1s"}
    assert {seconds: duration(seconds) for seconds in spelt} == spelt


def reached(limit: str, wait: float) -> LimitReached:
    return LimitReached("no more", limit=limit, retry_after=wait, headers={"x-ratelimit-remaining-requests": "0"})


@pytest.mark.parametrize(
    ("limit", "kind", "code", "calls"),
    [
        ("requests_per_minute", "rate_limit_error", "rate_limit_exceeded", 2),
        ("monthly_tokens", "insufficient_quota", "insufficient_quota", 1),
    ],
)
def test_openai_s_client_reads_a_refusal(limit: str, kind: str, code: str, calls: int) -> None:
    """And comes again by itself only where that is of use."""
    sent = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        response = error_response(reached(limit, 0.3))
        headers = dict(response.headers) | {"retry-after-ms": "1"}  # so that the client does not wait for a second
        return httpx.Response(response.status_code, headers=headers, content=bytes(response.body))

    transport = httpx.Client(transport=httpx.MockTransport(answer))
    client = openai.OpenAI(api_key="k", base_url="http://a/v1", http_client=transport, max_retries=1)
    with pytest.raises(openai.RateLimitError) as raised:
        client.models.list()
    assert (raised.value.type, raised.value.code) == (kind, code)
    assert raised.value.response.headers["x-ratelimit-remaining-requests"] == "0"
    assert raised.value.response.headers["Retry-After"] == "1"
    assert len(sent) == calls


def test_grpc_says_when_to_come_again() -> None:
    """The bytes are those that Google's own google.rpc.Status and RetryInfo of 2.5 s come to."""
    expected = (
        b"\x08\x08\x12\x07no more\x1a6\n(type.googleapis.com/google.rpc.RetryInfo\x12\n\n"
        b"\x08\x08\x02\x10\x80\xca\xb5\xee\x01"
    )
    assert retry_details(reached("requests_per_minute", 2.5)) == expected

    async def run() -> None:
        async def find(model: str, caller: object) -> None:
            raise reached("requests_per_minute", 2.5)

        models: Any = SimpleNamespace(find=find, refused=lambda error, **about: None)
        server = GrpcServer(models, Limits(100, 10.0, 10.0, 10.0), identity=None)
        port = await server.start("127.0.0.1", 0)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            for call in (stub.Tokenize(pb.TokenizeRequest()), stub.Chat(pb.ChatRequest()).read()):
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await call
                assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert dict(raised.value.trailing_metadata())["grpc-status-details-bin"] == expected
        await server.stop(0)

    asyncio.run(run())


def test_the_controller_leases_over_ray() -> None:
    """In a process of its own."""

    async def run() -> None:
        made = ray.remote(Controller).options(**actor_options("quire-limits"))
        controller = made.remote(ClusterConfig(name="quire-limits", host="127.0.0.1", private=True))
        await controller.ready.remote()

        def ask(gateway: str, number: int) -> Ask:
            slots = LeasedSlots(50).ask(30, 0.0, more_to_come=False)
            requests = LeasedRate(1000, 0.0).ask(30, 0.0, more_to_come=False)
            tenants = {"team": TenantAsk(revision=0, requests=requests, tokens=None, slots=slots)}
            return Ask(gateway=gateway, number=number, gateways=1, tenants=tenants)

        for gateway, slots in (("a", 30), ("b", 20)):
            grants: Grants = await controller.lease.remote(ask(gateway, 1))
            grant = grants.tenants["team"]
            assert (grant.slots.granted, grant.requests.granted) == (slots, 30)
        assert grants.gateways == 2
        with pytest.raises(ServerError, match="something newer"):
            await controller.lease.remote(ask("a", 1))

        async def lease(ask: Ask) -> Grants:
            grants: Grants = await controller.lease.remote(ask)
            answers.put_nowait(grants)
            return grants

        answers: asyncio.Queue[Grants] = asyncio.Queue()
        limiter = Limiter("c", lease, used=lambda tenant: 0, revision=lambda: 0)
        running = asyncio.ensure_future(limiter.run())
        assert (await answers.get()).gateways == 3
        permit = await limiter.admit(tenant(requests_per_minute=1000), [1], 1, given=True)
        assert (await answers.get()).tenants["team"].requests.granted == 1 + 1000 // 32
        permit.release()
        running.cancel()
        ray.kill(controller)

    cluster = start_private_cluster(num_workers=1)
    try:
        asyncio.run(run())
    finally:
        cluster.stop()
