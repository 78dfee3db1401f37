"""Processes are killed while answers are guided, reasoned and call tools: each is the same to its readers."""

import os
import signal
from pathlib import Path

import pytest
from conftest import RunningServer, processes, wait_until
from conversations import Told, conversations, same
from readers import Readers
from web import http

CONVERSATIONS = conversations(32)


@pytest.fixture(scope="module")
def readers(talker: RunningServer, talking_folder: Path) -> Readers:
    wait_until(lambda: http.get(f"{talker.url}/ready").json().get("replicas") == 2)
    return Readers(talking_folder, CONVERSATIONS, [talker.url], talker.grpc)


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
    talker: RunningServer, readers: Readers, undisturbed: list[list[Told]], kind: str
) -> None:
    wait_until(lambda: len(processes(talker, kind)) == 2)
    [victim, _] = processes(talker, kind)
    moved = talker.log.count("go on elsewhere")
    same(readers.read(lambda: os.kill(victim, signal.SIGKILL)), undisturbed)
    assert talker.log.count("go on elsewhere") > moved
    wait_until(lambda: http.get(f"{talker.url}/ready").json().get("replicas") == 2)
    assert len({victim} & set(processes(talker, kind))) == 0
