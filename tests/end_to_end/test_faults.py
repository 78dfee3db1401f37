"""Processes are killed under load: every stream completes, as if nothing had happened."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import RunningServer, held, processes, wait_until
from quire import AsyncClient
from web import LIMIT, free_port, http

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


@pytest.fixture(scope="module")
def undisturbed(two_replicas: RunningServer) -> list[list[int]]:
    """What every run must give."""
    return asyncio.run(run_streams(two_replicas))


def both_serve(server: RunningServer, *roots: int) -> None:
    """Waits until both replicas do, and nothing is left of those before them. `roots`: what their processes are below,
    where it is not the server."""

    def done() -> bool:
        answer = http.get(f"{server.url}/ready")
        replicas = answer.json()["replicas"] if answer.status_code == 200 else 0
        return replicas == 2 and all(
            sum(len(processes(root, kind)) for root in roots or [server]) == 2 for kind in ("Worker", "Replica")
        )

    wait_until(done)


@pytest.mark.parametrize("kind", ["Worker", "Replica"])
def test_a_killed_process_costs_no_token(two_replicas: RunningServer, undisturbed: list[list[int]], kind: str) -> None:
    server = two_replicas
    both_serve(server)
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


def test_a_request_that_allows_no_token_fails_alone(two_replicas: RunningServer, undisturbed: list[list[int]]) -> None:
    """The next step is planned before it is known that nothing could be drawn: it must harm nobody."""
    server = two_replicas
    both_serve(server)
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


def test_a_replica_that_hangs_is_found_and_costs_no_token(
    two_replicas: RunningServer, undisturbed: list[list[int]]
) -> None:
    """The process that speaks with the gateway is stopped: its connection stands, and nothing comes."""
    server = two_replicas
    both_serve(server)
    victim = processes(server, "Replica")[0]
    assert asyncio.run(run_streams(server, lambda: os.kill(victim, signal.SIGSTOP))) == undisturbed
    wait_until(lambda: "says nothing for 10 s" in server.log)
    wait_until(lambda: victim not in processes(server, "Replica"))
    both_serve(server)
    assert http.get(f"{server.url}/health").status_code == 200


def test_a_worker_that_hangs_is_found_and_costs_no_token(
    two_replicas: RunningServer, undisturbed: list[list[int]]
) -> None:
    """Stopped, not killed: nobody tells, and its lease runs out."""
    server = two_replicas
    both_serve(server)
    victim = processes(server, "Worker")[0]
    assert asyncio.run(run_streams(server, lambda: os.kill(victim, signal.SIGSTOP))) == undisturbed
    assert "made no progress for 4 s; rank 0 is furthest behind" in server.log
    assert "its workers get 2 times as long" in server.log
    wait_until(lambda: victim not in processes(server, "Worker"))
    both_serve(server)


def test_both_replicas_die_and_the_streams_wait_for_the_rebuild(
    two_replicas: RunningServer, undisturbed: list[list[int]]
) -> None:
    server = two_replicas
    both_serve(server)

    def kill_all() -> None:
        for victim in processes(server, "Replica"):
            os.kill(victim, signal.SIGKILL)

    assert asyncio.run(run_streams(server, kill_all)) == undisturbed
    both_serve(server)


def test_the_controller_dies_and_the_streams_go_on(two_replicas: RunningServer, undisturbed: list[list[int]]) -> None:
    """Ray starts it again, and it looks after the replicas that are there."""
    server = two_replicas
    both_serve(server)
    [controller] = processes(server, "Controller")
    before = processes(server, "Worker") + processes(server, "Replica")
    resumed = server.log.count("go on elsewhere")
    assert asyncio.run(run_streams(server, lambda: os.kill(controller, signal.SIGKILL))) == undisturbed
    wait_until(lambda: len(processes(server, "Controller")) == 1 and processes(server, "Controller") != [controller])
    both_serve(server)
    assert processes(server, "Worker") + processes(server, "Replica") == before
    assert server.log.count("go on elsewhere") == resumed, "no stream has noticed"
    os.kill(processes(server, "Replica")[0], signal.SIGKILL)
    wait_until(lambda: http.get(f"{server.url}/ready").json()["replicas"] < 2)
    both_serve(server)


def test_a_worker_is_killed_amid_drafts(checkpoint: Callable[[str], Path]) -> None:
    """What guesses has learnt from the first streams, and the engine after the kill has not."""
    server = RunningServer(str(checkpoint("qwen3")), "--speculative-config", "{}", "--deterministic")
    before = asyncio.run(run_streams(server))
    victim = processes(server, "Worker")[0]
    assert asyncio.run(run_streams(server, lambda: os.kill(victim, signal.SIGKILL))) == before
    assert processes(server, "Worker") != [victim]
    assert server.stop() == 0, server.log


@pytest.mark.parametrize("kind", ["raylet", pytest.param("gcs_server", marks=pytest.mark.slow)])
def test_a_dead_cluster_ends_the_server(checkpoint: Callable[[str], Path], kind: str) -> None:
    """Without Ray nothing can be started again."""
    server = RunningServer(str(checkpoint("llama")))
    below = psutil.Process(server.process.pid).children(recursive=True)
    left = held(below)
    [victim] = [process for process in below if process.name() == kind]
    victim.kill()
    assert server.wait() == 1
    assert "the private Ray cluster died" in server.log
    wait_until(lambda: not any(process.is_running() for process in below))
    assert not [path for path in left if path.exists()]


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A cluster of two nodes on this machine, with a CPU and a GPU each (which is not real, but Ray gives it to a
    worker): its address and the nodes' processes."""
    ray = str(Path(sys.executable).with_name("ray"))
    address = f"127.0.0.1:{(port := free_port())}"
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    environment["RAY_worker_niceness"] = "1"  # with the 15 that Ray sets else, whatever else runs here starves them
    common = "--block --num-cpus 1 --num-gpus 1 --object-store-memory 80000000 --node-ip-address 127.0.0.1"
    nodes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # pytest's own path is too long for a socket

        def start(arguments: str) -> None:
            said = Path(folder, f"said-{len(nodes)}")
            with said.open("wb") as output:
                command = [ray, "start", *f"{common} {arguments}".split()]
                nodes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
            wait_until(lambda: "Ray runtime started" in said.read_text() or nodes[-1].poll() is not None)
            assert nodes[-1].poll() is None, said.read_text()

        try:
            ports = f"--port {port} --ray-client-server-port {free_port()}"
            start(f"--head {ports} --include-dashboard false --temp-dir {folder}")
            start(f"--address {address}")
            yield address, nodes
        finally:
            for node in reversed(nodes):
                node.terminate()
            for node in nodes:
                node.wait(120)


def test_a_running_cluster_is_joined(
    checkpoint: Callable[[str], Path],
    two_hosts: tuple[str, list[subprocess.Popen[bytes]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A replica on each of its hosts, which takes all that this has. The next test wants it as it was."""
    address, nodes = two_hosts
    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")  # lines that differ in a number alone
    server = RunningServer(str(checkpoint("llama")), "-dp", "2", "--ray-address", address)
    try:
        answer = http.post(f"{server.url}/v1/completions", json={"prompt": "w5", "max_tokens": 3})
        assert answer.status_code == 200
        both_serve(server, *(node.pid for node in nodes))
        for said in ("has GPU 0", "runs at nice 1: .* RAY_worker_niceness=0"):
            wait_until(lambda said=said: len(set(re.findall(rf"pid=(\d+).* rank 0 {said}", server.log))) == 2)
    finally:
        assert server.stop() == 0, server.log
    assert [node.poll() for node in nodes] == [None, None]


@pytest.mark.slow  # stages start three times
def test_stages_on_two_hosts(
    checkpoint: Callable[[str], Path],
    two_hosts: tuple[str, list[subprocess.Popen[bytes]]],
    undisturbed: list[list[int]],
) -> None:
    """Neither holds both stages. Same tokens; a killed worker of either stage costs none."""
    address, nodes = two_hosts
    server = RunningServer(str(checkpoint("qwen3")), "-pp", "2", "--ray-address", address)
    try:
        for node in nodes:
            wait_until(lambda: all(len(processes(node.pid, "Worker")) == 1 for node in nodes))
            [victim] = processes(node.pid, "Worker")
            assert asyncio.run(run_streams(server, partial(os.kill, victim, signal.SIGKILL))) == undisturbed
    finally:
        assert server.stop() == 0, server.log
