"""Two gateways and two replicas, on two nodes: whatever dies, is drained or deployed anew while answers are guided,
reasoned and call tools, each is the same to its readers."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_until
from conversations import MODEL, Told, conversations, same
from readers import Readers
from two_nodes import TwoNodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
CONVERSATIONS = conversations(32)


class Site(TwoNodes):
    """With one model, of two replicas, and two gateways."""

    def __init__(self, folder: Path, talker: Path) -> None:
        super().__init__(folder)
        self.talker = talker

    def deploy(self, **changes: Any) -> None:
        options = {"model": str(self.talker), "cpu_threads": 1, "min_replicas": 2, "max_num_seqs": 32} | changes
        path = self.folder / "models.yaml"
        path.write_text(json.dumps({MODEL: options}))
        self.run("deploy", str(path))

    def gateways(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.status()["gateways"]
        return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, talking_folder: Path) -> Iterator[Site]:
    found = Site(tmp_path_factory.mktemp("site"), talking_folder)
    try:
        found.start("--gateways", "2")
        found.deploy()
        wait_until(found.serving(MODEL, 2))
        wait_until(lambda: [one["ready"] for one in found.gateways()] == [True, True])
        yield found
    finally:
        try:
            found.run("shutdown")
        finally:
            found.close()


@pytest.fixture(scope="module")
def readers(site: Site) -> Readers:
    urls = [f"http://{one['http']}" for one in site.gateways()]
    return Readers(site.talker, CONVERSATIONS, urls, ",".join(one["grpc"] for one in site.gateways()))


@pytest.fixture(scope="module")
def undisturbed(readers: Readers) -> list[list[Told]]:
    """What every run must give."""
    return readers.read()


@pytest.mark.parametrize("kind", ["Worker", "Replica"])
def test_a_process_dies(site: Site, readers: Readers, undisturbed: list[list[Told]], kind: str) -> None:
    before = site.actors(kind)
    same(readers.read(lambda: os.kill(before[-1], signal.SIGKILL)), undisturbed)
    wait_until(lambda: len(site.actors(kind)) == 2 and before[-1] not in site.actors(kind))
    wait_until(site.serving(MODEL, 2))


def test_a_replica_is_drained(site: Site, readers: Readers, undisturbed: list[list[Told]]) -> None:
    before = site.replicas(MODEL)

    def drain() -> None:
        site.run("drain", f"{MODEL}/{before[0]['slot']}")
        wait_until(site.serving(MODEL, 2))

    for found in readers.read_during(drain):
        same(found, undisturbed)
    assert before[0]["epoch"] not in {one["epoch"] for one in site.replicas(MODEL)}


def test_the_model_is_deployed_anew(site: Site, readers: Readers, undisturbed: list[list[Told]]) -> None:
    """Fewer rows, and fewer tokens a step: prompts are computed in parts."""
    before = {one["epoch"] for one in site.replicas(MODEL)}

    def update() -> None:
        site.deploy(max_num_seqs=24, max_num_batched_tokens=48)
        wait_until(site.serving(MODEL, 2))

    for found in readers.read_during(update):
        same(found, undisturbed)
    assert not before & {one["epoch"] for one in site.replicas(MODEL)}


def test_a_gateway_dies(site: Site, readers: Readers, undisturbed: list[list[Told]]) -> None:
    """Its gRPC clients go on at the other one, each with what it holds: parts of calls and of reasoning, too."""
    before = site.actors("GatewayActor")
    same(readers.read(lambda: os.kill(before[0], signal.SIGKILL), over_http=False), undisturbed)
    wait_until(lambda: len(site.gateways()) == 2 and before[0] not in site.actors("GatewayActor"))
