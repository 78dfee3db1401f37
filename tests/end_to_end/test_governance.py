"""What an operator types, what callers see, and what is on record after the server was killed."""

import asyncio
import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import RunningServer
from quire import Client
from quire_cluster.governance.chain import AuditLog
from quire_cluster.governance.config import read_governance
from quire_cluster.governance.database import Database
from quire_cluster.governance.journal import Journal
from quire_cluster.governance.writer import Writer
from web import http

POLICY = """
policies:
  - {name: secret, check: words, words: [w7], action: stop, on: [input]}
"""


def quire(folder: Path, *arguments: str) -> str:
    """What a command says, called in a folder."""
    command = [sys.executable, "-m", "quire.cli.main", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def listed(folder: Path, *arguments: str) -> Any:
    return json.loads(quire(folder, *arguments, "--json"))


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.1)


@pytest.fixture
def server(checkpoint: Callable[[str], Path], tmp_path: Path) -> Any:
    """One that governs; its tenants and keys are made as it runs."""
    (tmp_path / "governance.yaml").write_text(POLICY)
    made = RunningServer(
        str(checkpoint("llama")), "--served-model-name", "tiny", "--governance", str(tmp_path / "governance.yaml")
    )
    yield made
    if made.process.poll() is None:
        assert made.stop() == 0, made.log


def test_an_operator_s_day(server: RunningServer, tmp_path: Path) -> None:
    """Tenants and keys are made while it serves; then its process is killed amid streams, and nothing is missing."""
    quire(tmp_path, "tenants", "add", "research", "--requests-per-minute", "100000", "--models", "ti*")
    quire(tmp_path, "tenants", "add", "other", "--models", "big-*", "--concurrent-requests", "1")
    keys = {name: quire(tmp_path, "keys", "create", name).split()[0] for name in ("research", "other")}
    admin = quire(tmp_path, "keys", "create", "research", "--role", "admin").split()[0]

    def known(key: str) -> bool:
        return http.get(f"{server.url}/v1/models", headers={"x-api-key": key}).status_code == 200

    until(lambda: all(map(known, (*keys.values(), admin))))
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=keys["research"], max_retries=0)
    answer = client.completions.create(model="tiny", prompt="w5 w6", max_tokens=4)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-x", max_retries=0).models.list()
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key=keys["other"], max_retries=0)
    assert list(stranger.models.list()) == []
    with pytest.raises(openai.NotFoundError):
        stranger.completions.create(model="tiny", prompt="w5")
    with pytest.raises(openai.BadRequestError) as stopped:
        client.completions.create(model="tiny", prompt="w5 w7")
    assert stopped.value.code == "content_filter"
    with Client(server.grpc, api_key=keys["research"]) as over_grpc:
        assert len(over_grpc.generate("w5 w6", max_tokens=3, ignore_eos=True).outputs[0].token_ids) == 3
    made = http.post(
        f"{server.url}/quire.v1.Governance/CreateKey",
        headers={"authorization": f"Bearer {admin}"},
        json={"tenant": "research", "lives_seconds": 1000},
    ).json()
    until(lambda: known(made["secret"]))
    quire(tmp_path, "keys", "revoke", keys["other"][:11])
    until(lambda: not known(keys["other"]))

    def one(number: int) -> str | None:
        """The id of a request whose end its caller was told; None: it was not."""
        name = f"mine-{number}"
        body = {"model": "tiny", "prompt": "w5", "max_tokens": 1 + number % 7, "stream": True, "request_id": name}
        try:
            whole = http.post(
                f"{server.url}/v1/completions", json=body, headers={"x-api-key": made["secret"]}, timeout=60
            ).text
        except Exception:
            return None
        return name if "[DONE]" in whole else None

    told: set[str | None] = set()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for number, found in enumerate(pool.map(one, range(400))):
            told.add(found)
            if number == 100:
                os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    told.discard(None)
    assert len(told) > 100

    async def bring() -> None:
        """As the next gateway on this host does."""
        governance = read_governance(tmp_path / "governance.yaml")
        database = Database(governance.database)
        audit = AuditLog(database, governance.signing_key)
        await Writer(database, audit, Journal(governance.journal)).collect()
        await database.close()

    asyncio.run(bring())
    assert "intact" in quire(tmp_path, "audit", "verify")
    records = listed(tmp_path, "audit", "list", "--limit", "10000")
    ids = [record["request_id"] for record in records if record["kind"] == "request"]
    assert len(ids) == len(set(ids)), "each once"
    assert told <= set(ids)
    assert {"PolicyStop", "UnknownModel"} <= {record.get("refused") for record in records}
    [used] = listed(tmp_path, "usage", "--tenant", "research")
    assert used["requests"] == len(ids)
    assert used["prompt_tokens"] == sum(record["prompt_tokens"] for record in records if record["kind"] == "request")
    actions = [record["action"] for record in records if record["kind"] == "admin"]
    assert actions.count("key.create") == 4
    assert actions.count("tenant.add") == 2
