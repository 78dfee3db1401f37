"""Processes are killed while answers are guided, reasoned and call tools: each is the same to its readers."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import RunningServer, processes, wait_until
from conversations import MODEL, Told, conversations, same, talking_checkpoint
from readers import Readers
from web import http

CONVERSATIONS = conversations(32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking_checkpoint(tmp_path_factory.mktemp("talker"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    made = RunningServer(str(folder), "-dp", "2", "--served-model-name", MODEL, "--max-num-seqs", "32")
    yield made
    assert made.stop() == 0, made.log


@pytest.fixture(scope="module")
def readers(server: RunningServer, folder: Path) -> Readers:
    wait_until(lambda: http.get(f"{server.url}/ready").json().get("replicas") == 2)
    return Readers(folder, CONVERSATIONS, [server.url], server.grpc)


@pytest.fixture(scope="module")
def undisturbed(readers: Readers) -> list[list[Told]]:
    """What every run must give: it is what was asked for, and has something of all there is."""
    told = readers.read()
    for one, answer in zip(CONVERSATIONS, told, strict=True):
        one.check(answer)
    choices = [choice for answer in told for choice in answer]
    assert sum(len(choice.calls) > 0 for choice in choices) >= 6
    assert sum(choice.reasoning != "" for choice in choices) >= 12
    assert sum(choice.content != "" for choice in choices) >= 12
    assert {choice.finish_reason for choice in choices} == {"stop", "tool_calls", "length"}
    return told


@pytest.mark.parametrize("kind", ["Worker", "Replica"])
def test_a_killed_process_changes_nothing_that_is_read(
    server: RunningServer, readers: Readers, undisturbed: list[list[Told]], kind: str
) -> None:
    wait_until(lambda: len(processes(server, kind)) == 2)
    [victim, _] = processes(server, kind)
    moved = server.log.count("go on elsewhere")
    same(readers.read(lambda: os.kill(victim, signal.SIGKILL)), undisturbed)
    assert server.log.count("go on elsewhere") > moved
    wait_until(lambda: http.get(f"{server.url}/ready").json().get("replicas") == 2)
    assert len({victim} & set(processes(server, kind))) == 0
