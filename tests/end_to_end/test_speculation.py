"""Tokens guessed ahead, as callers and operators see them: not at all, but for metrics and the log."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import RunningServer, wait_until
from web import LIMIT, http

SERIES = ("drafts", "draft_tokens", "accepted_tokens", "accepted_tokens_per_pos")


def counts(server: RunningServer) -> dict[str, float]:
    """The sum of each series over its labels."""
    text = http.get(f"{server.url}/metrics").text
    found = {}
    for name in SERIES:
        values = re.findall(rf"^quire:spec_decode_num_{name}_total\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
        found[name] = sum(map(float, values))
    return found


@pytest.fixture(scope="module")
def guessing(checkpoint: Callable[[str], Path]) -> Iterator[RunningServer]:
    config = json.dumps({"method": "suffix", "num_speculative_tokens": 4})
    server = RunningServer(str(checkpoint("qwen3")), "--speculative-config", config, "--deterministic")
    yield server
    assert server.stop() == 0, server.log


def test_metrics_and_the_log(guessing: RunningServer) -> None:
    """A tiny model repeats itself, so its drafts are right sooner or later; whether they are computed is for the engine
    to say."""
    body = {"prompt": [5, 6, 7] * 20, "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    answers: list[str] = []
    until = time.monotonic() + LIMIT
    while not counts(guessing)["accepted_tokens"]:
        assert time.monotonic() < until, guessing.log
        answer = http.post(f"{guessing.url}/v1/completions", json=body).json()
        assert answer["usage"]["completion_tokens"] == 200
        answers.append(answer["choices"][0]["text"])
    assert len(set(answers)) == 1

    def settled() -> bool:
        found = counts(guessing)
        return 0 < found["accepted_tokens"] == found["accepted_tokens_per_pos"] <= found["draft_tokens"]

    wait_until(settled)
    assert counts(guessing)["drafts"] <= counts(guessing)["draft_tokens"]
    lines = [json.loads(line) for line in re.findall(r"\{.*\"draft_tokens\".*\}", guessing.log)]
    assert lines
    assert all(0 <= line["accepted_tokens"] <= line["draft_tokens"] for line in lines)
