"""Two tensor-parallel ranks give transformers' tokens, for every family. One pair of processes runs them all."""

import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from conftest import Table
from families import FAMILIES
from greedy import prompts, run, truth
from quire_engine.config import EngineConfig
from quire_engine.engine import Engine
from quire_engine.execution.group import ParallelGroup
from quire_engine.execution.plan import StepPlan, StepResult
from quire_engine.execution.runner import ModelRunner
from quire_engine.weights.resolve import find_model

BATCH = prompts()[1:4]
STOP = b""


class TwoRanks:
    """Rank 0's runner, which tells rank 1 what to do. An executor for an engine."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.limits = runner.limits

    def submit(self, plan: StepPlan) -> None:
        tell(pickle.dumps(plan))
        self._runner.submit(plan)

    def collect(self) -> StepResult:
        return self._runner.collect()


def tell(message: bytes | None = None) -> bytes:
    """From rank 0 to rank 1, which hears None."""
    box: list[Any] = [message]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def serve(rank: int, port: int, orders: Connection) -> None:
    """Folder after folder: rank 0 answers with the tokens, or what went wrong."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    group = ParallelGroup.join(rank, 2, 1, "127.0.0.1", port, device, dtype=torch.float32)
    while (folder := orders.recv()) is not None:
        try:
            config = EngineConfig(model=folder, device="cpu", kv_cache_memory_bytes=4 << 20, max_num_batched_tokens=24)
            runner = ModelRunner(config, find_model(config), group)
            if rank == 0:
                tokens = run(Engine(TwoRanks(runner)), BATCH, max_tokens=16)
                tell(STOP)
                orders.send(tokens)
            else:
                while (message := tell()) != STOP:
                    runner.execute(pickle.loads(message))
                orders.send(None)
        except Exception:
            orders.send(traceback.format_exc())
            raise
    group.close()


@pytest.fixture(scope="module")
def ranks() -> Any:
    store = ParallelGroup.host_store(2)
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(2)]
    workers = [context.Process(target=serve, args=(rank, store.port, pairs[rank][1])) for rank in range(2)]
    for worker in workers:
        worker.start()

    def ask(folder: Path) -> list[list[int]]:
        for ours, _ in pairs:
            ours.send(str(folder))
        answers = [ours.recv() for ours, _ in pairs if ours.poll(60) or pytest.fail("a rank does not answer")]
        assert isinstance(answers[0], list), answers
        return answers[0]

    yield ask
    for ours, _ in pairs:
        ours.send(None)
    for worker in workers:
        worker.join(20)
        worker.kill()


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks(
    checkpoint: Callable[[str], Path], ranks: Callable[[Path], list[list[int]]], table: Table, family: str
) -> None:
    folder = checkpoint(family)
    assert ranks(folder) == [tokens[:16] for tokens in truth(folder, BATCH)]
    table.row(family, folder)["TP 2"] = "yes"
