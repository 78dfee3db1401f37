"""Processes are killed under load: every stream completes, as if nothing had happened."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest
from conftest import RunningServer, ancestors, processes, wait_until
from quire import AsyncClient
from web import LIMIT, http

NUM_STREAMS = 16
NUM_TOKENS = 200


async def run_streams(server: RunningServer, disturb: Callable[[], None] | None = None) -> list[list[int]]:
    """Half of them greedy, half seeded with penalties; `disturb` runs once all have begun."""
    begun = asyncio.Barrier(NUM_STREAMS + 1)

    async def one(client: AsyncClient, number: int) -> list[int]:
        options = (
            {"temperature": 0.0}
            if number % 2
            else {
                "temperature": 0.9,
                "seed": number,
                "top_p": 0.9,
                "top_k": 40,
                "presence_penalty": 0.3,
                "repetition_penalty": 1.1,
            }
        )
        tokens: list[int] = []
        finish = None
        prompt = [5 + number, 17, 30 + 2 * number, 99]
        async for output in client.stream(prompt, max_tokens=NUM_TOKENS, ignore_eos=True, timeout=LIMIT, **options):
            if not tokens:
                await begun.wait()
            tokens += output.token_ids
            finish = output.finish_reason or finish
        assert finish == "length"
        return tokens

    async with AsyncClient(server.grpc) as client:
        streams = [asyncio.ensure_future(one(client, number)) for number in range(NUM_STREAMS)]
        await begun.wait()
        if disturb is not None:
            disturb()
        return await asyncio.gather(*streams)


def both_serve(server: RunningServer) -> None:
    """Waits until both replicas do, and nothing is left of those before them."""

    def done() -> bool:
        answer = http.get(f"{server.url}/ready")
        replicas = answer.json()["replicas"] if answer.status_code == 200 else 0
        return replicas == 2 and all(len(processes(server, kind)) == 2 for kind in ("Worker", "Replica"))

    wait_until(done, 120)


@pytest.mark.parametrize("kind", ["Worker", "Replica"])
def test_a_killed_process_costs_no_token(two_replicas: RunningServer, kind: str) -> None:
    server = two_replicas
    both_serve(server)
    undisturbed = asyncio.run(run_streams(server))
    victims = processes(server, kind)
    assert len(victims) == 2
    before = set(processes(server, "Worker") + processes(server, "Replica"))
    disturbed = asyncio.run(run_streams(server, lambda: os.kill(victims[0], signal.SIGKILL)))
    assert disturbed == undisturbed
    assert "go on elsewhere" in server.log
    both_serve(server)  # the replica comes back, all of it anew
    after = set(processes(server, "Worker") + processes(server, "Replica"))
    assert len(after & before) == 2
    assert http.get(f"{server.url}/health").status_code == 200


def test_a_request_that_allows_no_token_fails_alone(two_replicas: RunningServer) -> None:
    """The next step is planned before it is known that nothing could be drawn: it must harm nobody."""
    server = two_replicas
    both_serve(server)
    undisturbed = asyncio.run(run_streams(server))
    before = processes(server, "Worker")
    answers: list[httpx.Response] = []

    def ask() -> None:
        impossible = {"model": "tiny", "prompt": [5, 6, 7], "allowed_token_ids": [5]}
        answers.extend(
            http.post(f"{server.url}/v1/completions", json=impossible | asked)
            for asked in (
                {"bad_words": ["w5 w5"], "temperature": 0},  # one token can be drawn, and then none
                {"bad_words": ["w5 w5"], "temperature": 1},
                {"bad_words": ["w5"]},
                {"repetition_penalty": 1e-300},
            )
        )

    assert asyncio.run(run_streams(server, ask)) == undisturbed
    assert [answer.status_code for answer in answers] == [400] * 4
    assert all("no token has a finite logit" in answer.text for answer in answers[:2])
    assert "rule out every one of allowed_token_ids" in answers[2].text
    assert "between 0.01 and 100" in answers[3].text
    assert processes(server, "Worker") == before


def test_a_replica_that_hangs_is_found_and_costs_no_token(two_replicas: RunningServer) -> None:
    """The process that speaks with the gateway is stopped: its connection stands, and nothing comes."""
    server = two_replicas
    both_serve(server)
    undisturbed = asyncio.run(run_streams(server))
    victim = processes(server, "Replica")[0]
    assert asyncio.run(run_streams(server, lambda: os.kill(victim, signal.SIGSTOP))) == undisturbed
    assert "says nothing for 10 s" in server.log
    wait_until(lambda: victim not in processes(server, "Replica"))
    both_serve(server)
    assert http.get(f"{server.url}/health").status_code == 200


def test_a_worker_that_hangs_is_found_and_costs_no_token(two_replicas: RunningServer) -> None:
    """Stopped, not killed: nobody tells, and its lease runs out."""
    server = two_replicas
    both_serve(server)
    undisturbed = asyncio.run(run_streams(server))
    victim = processes(server, "Worker")[0]
    assert asyncio.run(run_streams(server, lambda: os.kill(victim, signal.SIGSTOP))) == undisturbed
    assert "made no progress for 4 s; rank 0 is furthest behind" in server.log
    assert "its workers get 2 times as long" in server.log
    wait_until(lambda: victim not in processes(server, "Worker"))
    both_serve(server)


def test_both_replicas_die_and_the_streams_wait_for_the_rebuild(two_replicas: RunningServer) -> None:
    server = two_replicas
    both_serve(server)
    undisturbed = asyncio.run(run_streams(server))

    def kill_all() -> None:
        for victim in processes(server, "Replica"):
            os.kill(victim, signal.SIGKILL)

    assert asyncio.run(run_streams(server, kill_all)) == undisturbed
    both_serve(server)


def test_the_controller_dies_and_the_streams_go_on(two_replicas: RunningServer) -> None:
    """Its replicas die with it; all of it is started again, and the logs are in the gateway."""
    server = two_replicas
    both_serve(server)
    undisturbed = asyncio.run(run_streams(server))
    [controller] = processes(server, "Controller")
    assert asyncio.run(run_streams(server, lambda: os.kill(controller, signal.SIGKILL))) == undisturbed
    both_serve(server)


def children(server: RunningServer) -> set[int]:
    return {
        int(p.name)
        for p in Path("/proc").iterdir()
        if p.name.isdigit() and server.process.pid in ancestors(int(p.name))
    }


def held(pids: set[int]) -> set[Path]:
    """Folders of servers and memory segments that these processes name or map."""
    found: set[Path] = set()
    for pid in pids:
        try:
            said = Path(f"/proc/{pid}/cmdline").read_text() + Path(f"/proc/{pid}/maps").read_text()
        except OSError:  # it has ended
            continue
        found |= {Path(path) for path in re.findall(r"/tmp/quire-[^/\s\0]+|/dev/shm/\S+", said)}
    return {path for path in found if path.exists()}


def test_nothing_is_left_behind(checkpoint: Callable[[str], Path]) -> None:
    """SIGTERM during a stream: the stream finishes, and then no process, no memory segment and no folder is left."""
    server = RunningServer(str(checkpoint("llama")))
    below = children(server)
    assert len(below) > 3
    left = held(below)
    assert any(path.parent == Path("/tmp") for path in left)

    async def stream() -> int:
        count = 0
        async with AsyncClient(server.grpc) as client:
            async for output in client.stream([5, 6, 7], max_tokens=300, ignore_eos=True):
                if count == 0:
                    server.process.send_signal(signal.SIGTERM)
                count += len(output.token_ids)
        return count

    assert asyncio.run(stream()) == 300
    assert server.wait() == 0, server.log
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))
    assert not [path for path in left if path.exists()]


def test_a_dead_cluster_ends_the_server(checkpoint: Callable[[str], Path]) -> None:
    """Without Ray nothing can be started again."""
    server = RunningServer(str(checkpoint("llama")))
    raylets = [pid for pid in children(server) if "raylet/raylet" in Path(f"/proc/{pid}/cmdline").read_text()]
    for pid in raylets:
        os.kill(pid, signal.SIGKILL)
    assert raylets
    assert server.wait() == 1
    assert "the private Ray cluster died" in server.log


@contextmanager
def ray_cluster(*cpus: int, gpus: int = 0) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A cluster of one node for each number of CPUs, all on this machine: its address and the nodes' processes. The
    first is said to have `gpus` GPUs."""
    ray = str(Path(sys.executable).with_name("ray"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    common = "--block --object-store-memory 80000000 --node-ip-address 127.0.0.1"
    nodes: list[subprocess.Popen[bytes]] = []

    def start(arguments: str) -> None:
        command = [ray, "start", *f"{common} {arguments}".split()]
        nodes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    def num_nodes() -> int:
        command = [ray, "status", "--address", address]
        answer = subprocess.run(command, env=environment, capture_output=True, check=False, text=True).stdout
        return len(re.findall(r"^ 1 node_", answer, re.MULTILINE))

    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # pytest's own path is too long for a socket
        try:
            port = address.rpartition(":")[2]
            start(
                f"--head --port {port} --num-cpus {cpus[0]} --num-gpus {gpus} --include-dashboard false "
                f"--temp-dir {folder}"
            )
            wait_until(lambda: num_nodes() == 1)
            for count in cpus[1:]:
                start(f"--address {address} --num-cpus {count}")
            wait_until(lambda: num_nodes() == len(cpus))
            yield address, nodes
        finally:
            for node in reversed(nodes):
                node.terminate()
            for node in nodes:
                node.wait(120)


def both_gpus_are_taken(server: RunningServer) -> bool:
    return set(re.findall(r"rank 0 has GPU (\d)", server.log)) == {"0", "1"}


def test_a_running_cluster_is_joined_and_left_as_it_was(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its GPUs are not real, but Ray gives each worker one of them."""
    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")  # lines that differ in a number alone
    with ray_cluster(2, gpus=2) as (address, (head,)):
        for _ in range(2):  # what the first one left behind would be in the second one's way
            server = RunningServer(str(checkpoint("llama")), "-dp", "2", "--ray-address", address)
            answer = http.post(f"{server.url}/v1/completions", json={"prompt": "w5", "max_tokens": 3})
            assert answer.status_code == 200
            wait_until(partial(both_gpus_are_taken, server))
            assert server.stop() == 0, server.log
            assert head.poll() is None
        nobody = RunningServer(str(checkpoint("llama")), "--ray-address", "127.0.0.1:1", wait=False)
        assert nobody.wait() == 1
        assert "no Ray cluster answers" in nobody.log


def test_stages_on_two_hosts(checkpoint: Callable[[str], Path], two_replicas: RunningServer) -> None:
    """Nodes of one CPU each: neither holds both stages. Same tokens; a killed worker of either stage costs none."""
    alone = asyncio.run(run_streams(two_replicas))
    with ray_cluster(1, 1) as (address, nodes):
        server = RunningServer(str(checkpoint("qwen3")), "-pp", "2", "--ray-address", address)
        try:
            assert asyncio.run(run_streams(server)) == alone
            for node in nodes:
                wait_until(lambda: all(len(processes(node.pid, "Worker")) == 1 for node in nodes))
                [victim] = processes(node.pid, "Worker")
                assert asyncio.run(run_streams(server, partial(os.kill, victim, signal.SIGKILL))) == alone
        finally:
            assert server.stop() == 0, server.log
