"""`quire load-balancer`, over a cluster that says what the test has it say."""

import logging
import time
from pathlib import Path
from typing import Any

import pytest
from quire.cli import load_balancer as module
from quire.cli.config import LoadBalancerConfig
from quire.cli.load_balancer import load_balancer
from quire_engine.errors import QuireError
from quire_protos.v1 import control_pb2 as pb


class Cluster:
    """In place of a connection to one: from the second look on another gateway is there."""

    looks = 0

    def __init__(self, config: LoadBalancerConfig) -> None:
        pass

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def call(self, method: str, request: Any) -> pb.StatusResponse:
        Cluster.looks += 1
        number = min(Cluster.looks, 2)
        gateway = pb.GatewayStatus(id=f"gateway:n:{number}", http=f"10.0.0.1:{number}", grpc=f"10.0.0.2:{number}")
        return pb.StatusResponse(gateways=[gateway])


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    Cluster.looks = 0
    monkeypatch.setattr(module, "Control", Cluster)


@pytest.mark.parametrize(
    ("reload", "why"),
    [
        ("/no/such/program -x", "/no/such/program -x cannot be run"),
        ("kill 'it", "cannot be run: No closing quotation"),
        ("sh -c 'echo not today >&2; exit 3'", "failed: not today"),
        ("false", "failed: it ended with 1"),
    ],
)
def test_a_load_balancer_that_cannot_be_told_is_an_error(reload: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "made.cfg"
    with pytest.raises(QuireError, match=why):
        load_balancer("haproxy", LoadBalancerConfig(output=str(path), reload=reload), watch=False)
    assert "10.0.0.1:1" in path.read_text()


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(QuireError, match="cannot be written"):
        load_balancer("haproxy", LoadBalancerConfig(output=str(tmp_path / "folder")), watch=False)
    assert [one.name for one in tmp_path.iterdir()] == ["folder"]


def test_who_watches_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Enough(Exception):
        pass

    told = tmp_path / "told"
    lines: list[list[str]] = []

    def sleep(seconds: float) -> None:
        """The load balancer is away for the second and the third time that it is told."""
        lines.append(told.read_text().splitlines())
        reached = len(lines)
        if reached in (1, 2):
            script.write_text("exit 1")
        else:
            script.write_text(f"echo told >> {told}")
        if reached == 4:
            raise Enough

    script = tmp_path / "reload.sh"
    script.write_text(f"echo told >> {told}")
    told.touch()
    monkeypatch.setattr(time, "sleep", sleep)
    config = LoadBalancerConfig(output=str(tmp_path / "made.cfg"), reload=f"sh {script}")
    with caplog.at_level(logging.WARNING), pytest.raises(Enough):
        load_balancer("haproxy", config, watch=True)
    assert [len(one) for one in lines] == [1, 1, 1, 2]
    assert sum("it is tried again" in record.message for record in caplog.records) == 2
