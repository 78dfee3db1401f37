"""Limits of tenants: what a decision costs, and how long a refusal takes where three gateways have 500 requests each.

    python benchmarks/limits.py

The controller and each gateway's side are processes of their own, under Ray. What more was let in than the limits say
ends it without figures.
"""

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

import ray
from quire_cluster.controller import ClusterConfig, Controller, actor_options
from quire_cluster.governance.callers import Tenant, TenantLimits
from quire_cluster.governance.limits import Limiter, Permit
from quire_cluster.local_ray import start_private_cluster
from quire_cluster.policies.quota import Ask, Grants
from quire_engine.errors import LimitReached

GATEWAYS, CALLERS, ROUNDS = 3, 500, 20
PAUSE = 0.2  # seconds between rounds
DECISIONS = 20_000
NAME = "quire-limits"


class Side:
    """A gateway's."""

    def __init__(self, name: str, controller: Any) -> None:
        """In an actor, on its loop."""

        async def lease(ask: Ask) -> Grants:
            return await controller.lease.remote(ask)

        self.limiter = Limiter(name, lease, used=lambda tenant: 0, revision=lambda: 0)
        self.running = asyncio.ensure_future(self.limiter.run())

    async def ready(self) -> None:
        """Once it has heard of all gateways."""
        tenant = Tenant(name="first", limits=TenantLimits(requests_per_minute=10**6))
        for _ in range(20):
            (await self.limiter.admit(tenant, [1], 1, given=True)).release()
            await asyncio.sleep(PAUSE)

    async def decisions(self, name: str, limits: TenantLimits) -> float:
        """A second, one after the other, with each permit settled and released."""
        tenant = Tenant(name=name, limits=limits)
        (await self.limiter.admit(tenant, [100], 100, given=True)).release()
        await asyncio.sleep(PAUSE)
        begun = time.perf_counter()
        for _ in range(DECISIONS):
            permit = await self.limiter.admit(tenant, [100], 100, given=True)
            permit.settle(150)
            permit.release()
        return DECISIONS / (time.perf_counter() - begun)

    async def crowd(self, name: str, limits: TenantLimits) -> tuple[int, list[float], int]:
        """All callers at once, again and again; nobody releases anything. How many were let in, the seconds of each
        refusal, and in how many rounds the controller took too long."""
        tenant = Tenant(name=name, limits=limits)
        permits: list[Permit] = []
        waits: list[float] = []
        alone = 0

        async def call() -> None:
            nonlocal alone
            asked = time.perf_counter()
            try:
                permits.append(await self.limiter.admit(tenant, [100], 100, given=True))
            except LimitReached:
                waits.append(time.perf_counter() - asked)
            alone += self.limiter.alone

        rounds_alone = 0
        for _ in range(ROUNDS):
            before = alone
            await asyncio.gather(*(call() for _ in range(CALLERS)))
            rounds_alone += alone > before
            await asyncio.sleep(PAUSE)
        return len(permits), waits, rounds_alone


def measure() -> dict[str, Any]:
    """The figures. Times are in seconds."""
    made = ray.remote(Controller).options(**actor_options(NAME))
    controller = made.remote(ClusterConfig(name=NAME, host="127.0.0.1", private=True))
    ray.get(controller.ready.remote())
    sides = [ray.remote(Side).options(num_cpus=0).remote(f"gateway {at}", controller) for at in range(GATEWAYS)]
    ray.get([side.ready.remote() for side in sides])
    figures: dict[str, Any] = {}
    for name, limits in (
        ("without limits", TenantLimits()),
        (
            "with three limits",
            TenantLimits(requests_per_minute=10**8, tokens_per_minute=10**10, concurrent_requests=10**5),
        ),
    ):
        figures[name] = ray.get(sides[0].decisions.remote(name, limits))
        print(f"{figures[name]:10,.0f} decisions a second, of a tenant {name}")
    for name, limits in (
        ("requests a minute", TenantLimits(requests_per_minute=600)),
        ("requests at a time", TenantLimits(requests_per_minute=10**6, concurrent_requests=300)),
    ):
        begun = time.perf_counter()
        found = ray.get([side.crowd.remote(name, limits) for side in sides])
        minutes = (time.perf_counter() - begun) / 60
        let_in = sum(count for count, _, _ in found)
        waits = sorted(wait for _, waits, _ in found for wait in waits)
        alone = sum(rounds for _, _, rounds in found)
        most = limits.concurrent_requests or (limits.requests_per_minute or 0) * (1 + minutes)
        if let_in > (2 if alone else 1) * most + GATEWAYS:
            raise SystemExit(f"{let_in} were let in; the limits are {limits}")
        figures[name] = {
            "let_in": let_in,
            "refused": len(waits),
            "median": waits[len(waits) // 2],
            "p99": waits[len(waits) * 99 // 100],
            "longest": waits[-1],
            "rounds_alone": alone,
        }
        print(
            f"{len(waits):6d} refused by {name}: after {waits[len(waits) // 2] * 1e3:.1f} ms (median), "
            f"{waits[len(waits) * 99 // 100] * 1e3:.1f} (p99), {waits[-1] * 1e3:.1f} (longest); {let_in} let in; "
            f"in {alone} of {GATEWAYS * ROUNDS} rounds the controller took too long"
        )
    return figures


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="What limits of tenants cost.")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    cluster = start_private_cluster(num_workers=1)
    try:
        figures = measure()
    finally:
        cluster.stop()
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
