"""A tenant beside another one's flood, on the demo model. How long it waits is counted in tokens that the engine
computes; benchmarks/fairness.py has it in seconds."""

import random
import statistics

from quire import LLM
from quire_engine.engine import Engine
from quire_engine.request import EngineSampling, Request


def add(engine: Engine, tenant: str, count: int, output: int, drawn: random.Random) -> list[Request]:
    """Requests of 64 tokens that nobody else has."""
    requests = []
    for _ in range(count):
        tokens = [drawn.randrange(1000, 40000) for _ in range(64)]
        params = EngineSampling(max_tokens=output, temperature=0.0)
        requests.append(Request(drawn.getrandbits(60), tokens, 64, params, tenant=tenant))
        engine.add(requests[-1])
    return requests


def until_first(engine: Engine, requests: list[Request]) -> float:
    """The mean of the tokens computed until each has its first one."""
    first: dict[int, int] = {}
    computed = 0
    while len(first) < len(requests):
        outcome = engine.step()
        computed += outcome.num_tokens
        wanted = {request.id for request in requests} - first.keys()
        first |= {request.id: computed for request in outcome.requests if request.id in wanted}
    return statistics.mean(first.values())


def clear(engine: Engine) -> None:
    for request_id in list(engine.scheduler.requests):
        engine.abort(request_id)
    while engine.has_work:
        engine.step()


def test_ten_requests_beside_a_flood_of_two_hundred() -> None:
    """Their first tokens come after at most twice of what they come after alone, with a server's options."""
    drawn = random.Random(5)
    with LLM() as llm:
        engine = llm.engine
        alone = until_first(engine, add(engine, "b", 10, 8, drawn))
        clear(engine)
        flood = add(engine, "a", 200, 64, drawn)
        for _ in range(12):
            engine.step()
        beside = until_first(engine, add(engine, "b", 10, 8, drawn))
        assert not all(request.num_output for request in flood), "the flood was over its prompts"
        clear(engine)
    assert alone < beside <= 2 * alone
