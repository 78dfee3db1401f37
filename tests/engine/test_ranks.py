"""Two tensor-parallel ranks give transformers' tokens, for every family. One pair of processes runs them all."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.multiprocessing as multiprocessing
from conftest import Table
from families import FALLBACK, FAMILIES
from greedy import truth
from quire_engine.parallel import ParallelGroup
from two_ranks import BATCH, serve

pytestmark = pytest.mark.xdist_group("families")  # their table is one process's


Answer = tuple[list[list[int]], int, int]  # tokens, and how many drafts were accepted of how many
Ask = Callable[[Path, str], Answer | str]


def pair(stages: int) -> Iterator[Ask]:
    """Two processes, which compute what they are asked."""
    store = ParallelGroup.host_store(2)
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(2)]
    workers = [context.Process(target=serve, args=(rank, store.port, pairs[rank][1], stages)) for rank in range(2)]
    for worker in workers:
        worker.start()

    def ask(folder: Path, speculative: str = "") -> Answer | str:
        for ours, _ in pairs:
            ours.send((str(folder), speculative))
        answers = [ours.recv() for ours, _ in pairs if ours.poll(60) or pytest.fail("a rank does not answer")]
        return next(answer for answer in answers if answer is not None)

    yield ask
    for ours, _ in pairs:
        ours.send(None)
    for worker in workers:
        worker.join(20)
        worker.kill()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ask]:
    yield from pair(1)


@pytest.fixture(scope="module")
def stages() -> Iterator[Ask]:
    yield from pair(2)


@pytest.mark.parametrize("family", FAMILIES | FALLBACK)
def test_two_ranks(checkpoint: Callable[[str], Path], ranks: Ask, table: Table, family: str) -> None:
    folder = checkpoint(family)
    answer = ranks(folder, "")
    if isinstance(answer, str):
        assert "ModelError" in answer
        assert "-tp 1" in answer
        table.row(family, folder)["TP 2"] = "–"
        return
    assert answer[0] == [tokens[:16] for tokens in truth(folder, BATCH)]
    table.row(family, folder)["TP 2"] = "yes"


@pytest.mark.parametrize("kind", ["ranks", "stages"])
def test_a_draft_model_on_two(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], kind: str) -> None:
    """A model that guesses for itself is always right, also where a stage has only half of it."""
    folder = checkpoint("llama")
    answer = request.getfixturevalue(kind)(folder, json.dumps({"model": str(folder), "num_speculative_tokens": 3}))
    assert not isinstance(answer, str), answer
    tokens, accepted, drafts = answer
    assert tokens == [tokens[:16] for tokens in truth(folder, BATCH)]
    assert accepted == drafts > 20
