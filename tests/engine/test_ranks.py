"""Two tensor-parallel ranks give transformers' tokens, for every family. One pair of processes runs them all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as multiprocessing
from conftest import Table
from families import FALLBACK, FAMILIES
from greedy import truth
from quire_engine.parallel import ParallelGroup
from two_ranks import BATCH, serve

pytestmark = pytest.mark.xdist_group("families")  # their table is one process's


@pytest.fixture(scope="module")
def ranks() -> Any:
    store = ParallelGroup.host_store(2)
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(2)]
    workers = [context.Process(target=serve, args=(rank, store.port, pairs[rank][1])) for rank in range(2)]
    for worker in workers:
        worker.start()

    def ask(folder: Path) -> list[list[int]] | str:
        for ours, _ in pairs:
            ours.send(str(folder))
        answers = [ours.recv() for ours, _ in pairs if ours.poll(60) or pytest.fail("a rank does not answer")]
        return answers[0]

    yield ask
    for ours, _ in pairs:
        ours.send(None)
    for worker in workers:
        worker.join(20)
        worker.kill()


@pytest.mark.parametrize("family", FAMILIES | FALLBACK)
def test_two_ranks(
    checkpoint: Callable[[str], Path], ranks: Callable[[Path], list[list[int]] | str], table: Table, family: str
) -> None:
    folder = checkpoint(family)
    answer = ranks(folder)
    if isinstance(answer, str):
        assert "ModelError" in answer
        assert "-tp 1" in answer
        table.row(family, folder)["TP 2"] = "–"
        return
    assert answer == [tokens[:16] for tokens in truth(folder, BATCH)]
    table.row(family, folder)["TP 2"] = "yes"
