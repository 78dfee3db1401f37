"""Two tensor-parallel ranks give transformers' tokens, for every family. One pair of processes runs them all."""

import json
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as multiprocessing
from conftest import Table
from drafters import speculation
from families import FALLBACK, FAMILIES
from greedy import run, truth
from heads import eagle_folder, mtp_folders, with_embeddings
from layouts import rewritten
from quire_engine.config import EngineConfig
from quire_engine.engine import Engine
from quire_engine.execution.runner import ModelRunner
from quire_engine.parallel import ParallelGroup
from quire_engine.speculation.workers import WorkersDrafter
from quire_engine.weights.resolve import find_model
from shown import Shower
from shown import truth as seen_truth
from two_ranks import BATCH, PARTS, SEEN, serve
from vlm_families import NATIVE
from vlms import VLMS, make_vlm

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
        answers, left, patience = [], [ours for ours, _ in pairs], 60.0
        while left and (ready := wait(left, patience)):
            answers += [left.pop(left.index(connection)).recv() for connection in ready]
            if any(isinstance(answer, str) for answer in answers):  # the other may wait for it in vain
                patience = 5.0
        assert not left, f"a rank does not answer; of the other: {answers}"
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


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(pytest.param(name, "ranks", marks=() if name in NATIVE else pytest.mark.slow) for name in VLMS),
        *(pytest.param(name, "stages", marks=() if name == "qwen3_vl" else pytest.mark.slow) for name in VLMS),
    ],
)
def test_images_on_two(request: pytest.FixtureRequest, tmp_path: Path, kind: str, name: str) -> None:
    """Every rank has the tower; of stages the first one, and with deepstack whichever it reaches."""
    model = make_vlm(name, tmp_path)
    answer = request.getfixturevalue(kind)(tmp_path, SEEN)
    assert not isinstance(answer, str), answer
    assert answer[0] == [seen_truth(model, Shower(tmp_path).show(PARTS))[1]]


@pytest.mark.parametrize("kind", ["ranks", "stages"])
def test_a_draft_model_on_two(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], kind: str) -> None:
    """A model that guesses for itself is always right, also where a stage has only half of it."""
    folder = checkpoint("llama")
    answer = request.getfixturevalue(kind)(folder, json.dumps({"model": str(folder), "num_speculative_tokens": 3}))
    assert not isinstance(answer, str), answer
    tokens, accepted, drafts = answer
    assert tokens == [tokens[:16] for tokens in truth(folder, BATCH)]
    assert accepted == drafts > 20


@pytest.mark.parametrize("kind", ["ranks", "stages"])
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_next", "eagle", "eagle3"])
def test_heads_on_two(
    request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], tmp_path: Path, kind: str, name: str
) -> None:
    """Guesses are those of one rank, right and wrong alike: as many are accepted."""
    asked: dict[str, Any] = {"num_speculative_tokens": 3}
    if name == "eagle3":
        folder = checkpoint("llama")
        asked["model"] = str(eagle_folder(tmp_path, 3, eagle_aux_hidden_state_layer_ids=[0, 1, 2]))
    elif name == "eagle":
        folder = checkpoint("llama")
        asked["model"] = str(rewritten(eagle_folder(tmp_path, 1), tmp_path / "head", with_embeddings))
    else:
        folder = mtp_folders(tmp_path, name)[1]
    given = json.dumps(asked)
    answer = request.getfixturevalue(kind)(folder, given)
    if name == "eagle3" and kind == "stages":
        assert "reads layers of several stages; set pipeline_parallel_size 1" in answer
        return
    assert not isinstance(answer, str), answer
    config = EngineConfig(
        model=str(folder),
        device="cpu",
        kv_cache_memory_bytes=4 << 20,
        max_num_batched_tokens=24,
        speculative_config=given,
    )
    engine = Engine(ModelRunner(config, find_model(config)), speculation(WorkersDrafter()))
    alone = run(engine, BATCH, max_tokens=16)
    stats = engine.scheduler.stats
    assert answer == (alone, stats.accepted_tokens, stats.draft_tokens)
