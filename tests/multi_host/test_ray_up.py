"""`ray up` as an operator runs it, over ssh to three hosts: it serves, and hosts are lost. Root's alone: `make
test-cluster`."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from conftest import make_checkpoint, wait_until
from hosts import ROOT, USER, Host, Hosts, setup_command, what_is_missing
from quire import AsyncClient

pytestmark = pytest.mark.timeout(1800)
KEY = "a-key-of-this-test"
STREAMS, TOKENS = 12, 2000
PATIENCE = 600.0  # seconds


class Site:
    """The hosts, and the operator's file."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.head, *self.workers = hosts.all
        home = hosts.folder / "operator"
        home.mkdir()
        self._environment = os.environ | {"HOME": str(home), "RAY_TMPDIR": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
        config = yaml.safe_load((ROOT / "deploy/ray/on-premise.yaml").read_text())
        config["provider"] |= {"head_ip": self.head.address, "worker_ips": [host.address for host in self.workers]}
        config["auth"] |= {"ssh_user": USER, "ssh_private_key": str(self.head.key)}
        config["setup_commands"] = [setup_command()]
        self._file = home / "cluster.yaml"
        self._file.write_text(yaml.safe_dump(config))
        (home / "quire-api-keys").write_text(f"{KEY}\n")
        self._ray("get-auth-token", "--generate")

    def _ray(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", *arguments]
        done = subprocess.run(
            command, env=self._environment, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert done.returncode == 0, f"{arguments}: {(done.stdout + done.stderr)[-5000:]}"

    def up(self, *options: str) -> None:
        """`ray up`, and again where Ray did not start within the half minute that it gives itself."""
        for _ in range(3):
            try:
                return self._ray("up", "--yes", "--no-config-cache", *options, str(self._file))
            except AssertionError as error:
                failure = error
        raise failure

    def deploy(self, name: str, **options: int) -> None:
        """The model, each stage with all of a host's CPUs."""
        file = self.hosts.folder / "models.yaml"
        common = {"model": str(self.hosts.folder / "model"), "cpu_threads": 1, "tensor_parallel_size": os.cpu_count()}
        file.write_text(json.dumps({name: common | options}))
        self._quire(f"deploy {file}")

    def delete(self, name: str) -> None:
        """What was deployed."""
        self._quire(f"delete {name}")

    def _quire(self, command: str, *, check: bool = True) -> str:
        return self.head.ssh(f"RAY_AUTH_MODE=token ~/quire/.venv/bin/quire {command}", check=check)

    def _status(self) -> dict[str, Any]:
        """Of no nodes while the cluster does not answer."""
        said = self._quire("status --json", check=False)
        found: dict[str, Any] = json.loads(said) if said.startswith("{") else {"nodes": [], "deployments": []}
        return found

    def addresses(self) -> set[str]:
        """Of the cluster's nodes."""
        return {node["address"] for node in self._status()["nodes"]}

    def replicas(self) -> dict[str, dict[str, Any]]:
        """Those that serve, by the addresses of the hosts where they are."""
        status = self._status()
        addresses = {node["id"]: node["address"] for node in status["nodes"]}
        serving = [one for model in status["deployments"] for one in model["replicas"] if one["phase"] == "serving"]
        return {addresses[node]: one for one in serving for node in one["nodes"] if node in addresses}

    def is_whole(self) -> bool:
        """All hosts serve."""
        return self.replicas().keys() == {host.address for host in self.hosts.all}


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if missing := what_is_missing():  # root, packages or namespaces: what this machine does not have is named
        pytest.skip(f"hosts on this machine need {missing}")
    made = Hosts(3)
    yield made
    made.close()


@pytest.fixture(scope="module")
def bystander(hosts: Hosts) -> Iterator[subprocess.Popen[bytes]]:
    """A process of this machine that is called as Ray's are, which `ray stop` ends wherever it sees it."""
    program = hosts.folder / "raylet"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "infinity"]) as process:
        yield process
        process.kill()


@pytest.fixture(scope="module")
def site(hosts: Hosts, bystander: subprocess.Popen[bytes]) -> Site:
    made = Site(hosts)
    make_checkpoint(hosts.folder / "model", "qwen3", max_position_embeddings=4096)
    made.up()
    return made


async def run_streams(site: Site, disturb: Callable[[], None] | None = None) -> list[list[int]]:
    """Tokens of each. Half of them greedy, half seeded. `disturb` runs once all have begun, and ends before any has."""
    begun = asyncio.Barrier(STREAMS + 1)
    found: list[list[int]] = [[] for _ in range(STREAMS)]

    async def one(client: AsyncClient, number: int) -> None:
        options = {"temperature": 0.9, "seed": number} if number % 2 else {"temperature": 0.0}
        prompt, tokens = [5 + number, 17, 30 + 2 * number, 99], found[number]
        async for output in client.stream(prompt, max_tokens=TOKENS, ignore_eos=True, timeout=PATIENCE, **options):
            if not tokens:
                await begun.wait()
            tokens += output.token_ids

    async with AsyncClient(f"{site.head.address}:50051", api_key=KEY) as client, asyncio.TaskGroup() as streams:
        for number in range(STREAMS):
            streams.create_task(one(client, number))
        await begun.wait()
        if disturb is not None:
            await asyncio.to_thread(disturb)
            assert max(len(tokens) for tokens in found) < TOKENS, "a stream was over before anything was lost"
    return found


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> list[list[int]]:
    """What every run must give."""
    found = asyncio.run(run_streams(site))
    assert [len(tokens) for tokens in found] == [TOKENS] * STREAMS
    return found


def lose(site: Site, host: Host, act: Callable[[], None]) -> Callable[[], None]:
    """`act`, once streams run on the host."""

    def work() -> None:
        wait_until(lambda: site.replicas()[host.address]["running"] > 0)
        act()

    return work


def test_all_hosts_join_and_serve(site: Site, bystander: subprocess.Popen[bytes]) -> None:
    """A replica takes the two CPUs of a host."""
    wait_until(lambda: len(site.addresses()) == 3, PATIENCE)
    site.deploy("replicated", min_replicas=3)
    wait_until(site.is_whole, PATIENCE)
    assert bystander.poll() is None, "`ray stop` of a host sees this machine's processes"


def test_up_again_changes_nothing(site: Site) -> None:
    before = site.replicas()
    site.up("--no-restart")
    assert site.is_whole()
    assert {one: (now["slot"], now["epoch"]) for one, now in site.replicas().items()} == {
        one: (then["slot"], then["epoch"]) for one, then in before.items()
    }


def test_a_host_that_is_cut_off_costs_no_token(site: Site, undisturbed: list[list[int]]) -> None:
    """And is one of the cluster again once it is back."""
    host = site.workers[0]
    assert asyncio.run(run_streams(site, lose(site, host, host.cut_off))) == undisturbed
    wait_until(lambda: len(site.addresses()) == 2, PATIENCE)
    assert asyncio.run(run_streams(site)) == undisturbed
    host.mend()
    wait_until(site.is_whole, PATIENCE)
    assert asyncio.run(run_streams(site)) == undisturbed


def test_a_host_that_dies_costs_no_token(site: Site, undisturbed: list[list[int]]) -> None:
    """And is one of the cluster again once it has booted, for the autoscaler starts Ray there."""
    host = site.workers[1]
    assert asyncio.run(run_streams(site, lose(site, host, host.power_off))) == undisturbed
    wait_until(lambda: len(site.addresses()) == 2, PATIENCE)
    host.boot()
    wait_until(site.is_whole, PATIENCE)
    assert asyncio.run(run_streams(site)) == undisturbed


def test_one_replica_of_all_hosts_gives_the_same_tokens(site: Site, undisturbed: list[list[int]]) -> None:
    """A stage on each."""
    site.delete("replicated")
    wait_until(lambda: not site.replicas(), PATIENCE)
    site.deploy("wide", pipeline_parallel_size=3)
    wait_until(site.is_whole, PATIENCE)
    assert asyncio.run(run_streams(site)) == undisturbed
