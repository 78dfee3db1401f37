"""What the control plane costs at many replicas: the controller and gateways without Ray and without engines, and the
processes of a cluster that idles.

python benchmarks/control_plane.py controller
python benchmarks/control_plane.py gateway [--replicas 200]
python benchmarks/control_plane.py table
python benchmarks/control_plane.py idle
"""

import argparse
import asyncio
import contextlib
import json
import logging
import multiprocessing
import os
import pickle
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from host_side import null_checkpoint
from quire_cluster.controller import ClusterConfig, Controller
from quire_cluster.deployment import Deployment, DeploymentConfig
from quire_cluster.gateway.models import Models
from quire_cluster.observability.metrics import Metrics
from quire_cluster.policies.reconcile import Phase
from quire_cluster.reports import GatewayReport, ModelReport, ReplicaReport
from quire_cluster.routing_table import ClusterTable, ReplicaEntry, RoutingTable, Served
from quire_cluster.slot import Needs
from quire_cluster.store import Record, Store
from quire_engine.config import EngineConfig

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from fake_replica import FakeReplica, Updates
from quire_protos.v1 import engine_pb2 as pb

DEPLOYMENTS, GATEWAYS = 20, 4
_IDLE = 30.0  # seconds that are looked at
_HEARTBEAT = 0.25  # seconds between the reports of a replica
_SERVERS = 4  # that all fake replicas share


def deployments(folder: str = "none", *, replicas: int = 0) -> list[Deployment]:
    """As many as there are."""
    config = DeploymentConfig(min_replicas=replicas)
    return [Deployment(f"model-{number}", EngineConfig(model=folder), config) for number in range(DEPLOYMENTS)]


def entry_of(slot: int, epoch: int = 1, address: str = "10.0.0.1:50000") -> ReplicaEntry:
    """A line of the routing table, of the size that it has."""
    return ReplicaEntry(slot, epoch, address, 4096, 60.0, "0" * 64)


def cluster_table(served: list[Deployment], entries: list[ReplicaEntry], version: int = 1) -> ClusterTable:
    """The replicas dealt out to the deployments."""
    each = len(entries) // len(served)
    parts = [tuple(entries[each * number : each * (number + 1)]) for number in range(len(served))]
    tables = [RoutingTable(part, slots=frozenset(entry.slot for entry in part)) for part in parts]
    return ClusterTable(version, tuple(Served(one, table) for one, table in zip(served, tables, strict=True)))


# ---- the controller -------------------------------------------------------------------------------------------------


class Forgetful(Store):
    """In place of Ray's store."""

    async def write(self, record: Record) -> None:
        """Nowhere."""


class Rehearsed(Controller):
    """Without Ray: its replicas are there, and none is started."""

    def __init__(self, replicas: int) -> None:
        super().__init__(ClusterConfig(name="benchmark"))
        self._home: Any = None
        self._store = Forgetful("benchmark")
        each = replicas // DEPLOYMENTS
        for deployment in deployments(replicas=each):
            keeper = self._keeper(Record(deployment=deployment, needs=Needs(gpu=False, threads=1), epoch=1))
            for index in range(each):
                slot = keeper._slot(deployment, index)
                slot.epoch, slot.entry, slot.nodes, slot._phase = 1, entry_of(index), ["0" * 56], Phase.SERVING
                keeper.slots.append(slot)
            self.keepers[deployment.name] = keeper

    async def _start(self) -> None:
        pass

    def report_of(self, gateway: int) -> GatewayReport:
        """What a gateway says of all of it."""
        waits = {"a row": 3, "pages": 1}
        facts = {"running": 8, "waiting": 4, "queued_tokens": 900, "prefill_rate": 5e3, "waiting_for": waits}
        models = {
            name: ModelReport(
                replicas=tuple(
                    ReplicaReport(
                        key=slot.entry.key, age=0.1 * gateway, pages_used=10, pages_total=99, rows=64, **facts
                    )
                    for slot in keeper.slots
                    if slot.entry is not None
                )
            )
            for name, keeper in self.keepers.items()
        }
        where = {"node": "0" * 56, "pid": 1, "host": "10.0.0.1", "http_port": 8000, "grpc_port": 50051}
        return GatewayReport(identity=f"gateway:{gateway}", ready=True, open_requests=1, models=models, **where)

    async def look(self) -> None:
        """What the loop does each time."""
        self._reconcile()
        await self._publish()


async def controller(replicas: int) -> None:
    """Its look with nothing new, and where each time one replica is."""
    made = Rehearsed(replicas)
    for gateway in range(GATEWAYS):
        await made.report(made.report_of(gateway))
    report = pickle.dumps(made.report_of(0))
    slot = made.keepers["model-7"].slots[3]

    async def changed() -> None:
        slot.epoch += 1
        slot.entry = entry_of(3, slot.epoch)
        await made.look()

    async def taken() -> None:
        await made.report(pickle.loads(report))

    print(f"{replicas} replicas, {DEPLOYMENTS} deployments, {GATEWAYS} gateways")
    print(f"  a look, nothing new:       {await median(made.look) * 1e3:6.2f} ms")
    version = made._table.version
    print(f"  a look, one replica is new:{await median(changed) * 1e3:6.2f} ms")
    assert made._table.version > version, "it was published"
    print(f"  a gateway's report:        {await median(taken) * 1e3:6.2f} ms, {len(report) / 1024:.0f} KiB", flush=True)


async def median(work: Callable[[], Awaitable[object]], times: int = 100) -> float:
    """Seconds of one."""
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        await work()
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


# ---- a gateway ------------------------------------------------------------------------------------------------------


class Quiet(FakeReplica):
    """Reports as often as a real one."""

    async def _beat(self, updates: Updates) -> None:
        while True:
            updates.put_nowait(pb.SessionUpdate(load=pb.Load(running=3, pages_total=99, block_size=16, rows=64)))
            await asyncio.sleep(_HEARTBEAT)


async def _serve(tell: Any) -> None:
    tell.send([(await Quiet().start()).port for _ in range(_SERVERS)])
    await asyncio.Event().wait()


def serve_fakes(tell: Any) -> None:
    """The other process: servers that all replicas share, whose ports it tells."""
    asyncio.run(_serve(tell))


@contextlib.contextmanager
def fake_replicas(count: int) -> Iterator[list[ReplicaEntry]]:
    """In a process of their own."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve_fakes, args=(theirs,), daemon=True)
    process.start()
    try:
        ports = ours.recv()
        yield [entry_of(slot, address=f"127.0.0.1:{ports[slot % _SERVERS]}") for slot in range(count)]
    finally:
        process.kill()
        process.join()


async def gateway(replicas: int) -> None:
    """All of its sessions are opened; then it idles, and tells the controller how that goes once a second."""
    with tempfile.TemporaryDirectory() as folder, fake_replicas(replicas) as entries:
        null_checkpoint(Path(folder))
        served = deployments(folder)
        models = Models(Metrics())
        services = [models.read(one) for one in served]
        begun, used = time.perf_counter(), time.process_time()
        models.follow(cluster_table(served, entries), services)
        while models.replicas < replicas:
            await asyncio.sleep(0.01)
        took, used = time.perf_counter() - begun, time.process_time() - used
        print(f"{replicas} replicas, {DEPLOYMENTS} deployments")
        print(f"  sessions are open after:   {took:6.2f} s ({used:.2f} s of CPU)")
        begun, used, told = time.perf_counter(), time.process_time(), 0.0
        for _ in range(10):
            await asyncio.sleep(1.0)
            telling = time.process_time()
            models.look()
            pickle.dumps(models.reports())
            told += time.process_time() - telling
        share = (time.process_time() - used) / (time.perf_counter() - begun)
        print(f"  idle:                      {share:6.1%} of a core, {told / 10:.1%} of it for the controller's report")
        tables = [cluster_table(served, [replace(entries[0], draining=odd), *entries[1:]]) for odd in (True, False)]

        async def follow() -> None:
            models.follow(tables[0])
            tables.reverse()

        print(f"  a new table is followed in {await median(follow) * 1e3:6.2f} ms", flush=True)
        await models.close()


# ---- the table ------------------------------------------------------------------------------------------------------


def table(replicas: int) -> None:
    """As it goes from the controller to a gateway."""
    whole = cluster_table(deployments("org/a-model-of-some-size"), [entry_of(slot) for slot in range(replicas)])
    times: dict[str, list[float]] = {"packed": [], "unpacked": []}
    for _ in range(100):
        begun = time.perf_counter()
        packed = pickle.dumps(whole, 5)
        middle = time.perf_counter()
        pickle.loads(packed)
        times["packed"].append(middle - begun)
        times["unpacked"].append(time.perf_counter() - middle)
    shown = ", ".join(f"{name} in {statistics.median(found) * 1e3:.2f} ms" for name, found in times.items())
    print(f"{replicas} replicas: {len(packed) / 1024:.0f} KiB, {shown}", flush=True)


# ---- a cluster that idles -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ray_head(port: int) -> Iterator[psutil.Process]:
    """Of a Ray cluster of its own; its processes are below this one."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    ray = str(Path(sys.executable).with_name("ray"))
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        options = f"--head --block --port {port} --temp-dir {folder} --num-cpus 2 --num-gpus 0"
        options += " --object-store-memory 80000000 --include-dashboard false"
        head = subprocess.Popen([ray, "start", *options.split()], stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            yield psutil.Process(head.pid)
        finally:
            head.send_signal(signal.SIGTERM)
            head.wait()


def quire(*arguments: str) -> str:
    """A command's output."""
    return subprocess.run(
        [sys.executable, "-m", "quire.cli.main", *arguments], check=True, capture_output=True, text=True
    ).stdout


def idle(port: int) -> None:
    """A controller, a gateway and one replica of the smallest model, which nobody asks anything."""
    with ray_head(port) as head, tempfile.TemporaryDirectory() as folder:
        os.environ["QUIRE_HOME"] = folder
        null_checkpoint(Path(folder, "model"))
        Path(folder, "models.yaml").write_text("tiny: {model: model, cpu_threads: 1}")
        given = {"--port": 1, "--grpc-port": 2, "--admin-port": 3, "--admin-grpc-port": 4}
        ports = [part for option, further in given.items() for part in (option, str(port + further))]
        while True:
            with contextlib.suppress(subprocess.CalledProcessError):
                quire("start", "--ray-address", f"127.0.0.1:{port}", *ports)
                break
            time.sleep(1.0)  # Ray's head is not there yet
        quire("deploy", f"{folder}/models.yaml")
        while json.loads(quire("status", "--json"))["deployments"][0]["state"] != "ready":
            time.sleep(1.0)
        time.sleep(10.0)
        before = {process: sum(process.cpu_times()[:2]) for process in head.children(recursive=True)}
        time.sleep(_IDLE)
        for process, used in sorted(before.items(), key=lambda one: one[0].pid):
            share = (sum(process.cpu_times()[:2]) - used) / _IDLE
            print(f"  {title(process):24s} {share:6.1%} of a core", flush=True)
        quire("shutdown")


def title(process: psutil.Process) -> str:
    """Of an actor its class, of others the program."""
    command = process.cmdline()
    script = next((Path(part).name for part in command if part.endswith(".py")), "")
    return command[0] if command[0].startswith("ray::") else script or process.name()


def machine() -> str:
    """Its processors."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    kind = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")
    return f"{len(os.sched_getaffinity(0))} cores of {kind}; load {os.getloadavg()[0]:.1f}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="What the control plane costs.")
    parser.add_argument("part", choices=["controller", "gateway", "table", "idle"])
    parser.add_argument("--replicas", type=int, default=200)
    parser.add_argument("--port", type=int, default=6390, help="of the Ray cluster that idles; four more are used")
    arguments = parser.parse_args()
    print(machine(), flush=True)
    logging.disable(logging.INFO)
    if arguments.part == "controller":
        asyncio.run(controller(arguments.replicas))
    elif arguments.part == "gateway":
        asyncio.run(gateway(arguments.replicas))
    elif arguments.part == "table":
        table(1000)
    else:
        idle(arguments.port)


if __name__ == "__main__":
    main()
