"""Tokens guessed ahead, as callers and operators see them: not at all, but for metrics and the log."""

import json
import re
import time

from conftest import RunningServer
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


def test_metrics_and_the_log(two_replicas: RunningServer) -> None:
    """A tiny model repeats itself, so its drafts are right sooner or later; whether they are computed is for the engine
    to say."""
    body = {"prompt": [5, 6, 7] * 20, "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    before, answers = counts(two_replicas), []
    until = time.monotonic() + LIMIT
    found = before
    while not found["accepted_tokens"] > before["accepted_tokens"]:
        assert time.monotonic() < until, found
        answer = http.post(f"{two_replicas.url}/v1/completions", json=body).json()
        assert answer["usage"]["completion_tokens"] == 200
        answers.append(answer["choices"][0]["text"])
        found = counts(two_replicas)
    assert len(set(answers)) == 1
    assert found["accepted_tokens"] == found["accepted_tokens_per_pos"] <= found["draft_tokens"]
    assert found["drafts"] <= found["draft_tokens"]
    lines = [json.loads(line) for line in re.findall(r"\{.*\"draft_tokens\".*\}", two_replicas.log)]
    assert lines
    assert all(0 <= line["accepted_tokens"] <= line["draft_tokens"] for line in lines)
