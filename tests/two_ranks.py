"""Two ranks in processes of their own, of one stage or of two, which run an engine over one model after another."""

import pickle
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from drafters import speculation
from greedy import prompts, run
from quire_engine.config import EngineConfig
from quire_engine.engine import Engine
from quire_engine.execution.runner import ModelRunner
from quire_engine.parallel import ParallelGroup
from quire_engine.speculation.draft import Drafter
from quire_engine.speculation.suffix import SuffixDrafter
from quire_engine.speculation.workers import WorkersDrafter
from quire_engine.step import StepPlan, StepResult
from quire_engine.weights.resolve import find_model
from shown import Shower, run_shown
from vlms import picture

BATCH = prompts()[1:4]
STOP = b""
SEEN = "images"  # what is asked is about PARTS
PARTS = ["One: ", picture(1, 96, 60), " two: ", picture(2, 50, 120), " differ in?"]


class TwoRanks:
    """The runner of the rank that draws, which tells the other what to do. An executor for an engine."""

    def __init__(self, runner: ModelRunner, rank: int) -> None:
        self._runner = runner
        self._rank = rank
        self.limits = runner.limits

    def submit(self, plan: StepPlan) -> None:
        tell(self._rank, pickle.dumps(plan))
        self._runner.submit(plan)

    def collect(self) -> StepResult:
        return self._runner.collect()


def tell(rank: int, message: bytes | None = None) -> bytes:
    """From that rank to the other, which hears None."""
    box: list[Any] = [message]
    dist.broadcast_object_list(box, src=rank)
    return box[0]


def serve(rank: int, port: int, orders: Connection, stages: int = 1) -> None:
    """Order after order (a folder, and a model that guesses, or SEEN): the rank that draws answers with the tokens and
    how many drafts were accepted of how many, or with what went wrong."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    group = ParallelGroup.join(rank, 2 // stages, stages, "127.0.0.1", port, device, dtype=torch.float32)
    drawing = group.drawing_rank
    while (order := orders.recv()) is not None:
        folder, speculative = order
        seeing = speculative == SEEN
        try:
            config = EngineConfig(
                model=folder,
                device="cpu",
                kv_cache_memory_bytes=4 << 20,
                max_num_batched_tokens=None if seeing else 24,
                tensor_parallel_size=2 // stages,
                pipeline_parallel_size=stages,
                speculative_config=None if seeing else speculative or '{"num_speculative_tokens": 4}',
            )
            runner = ModelRunner(config, find_model(config), group)
            if rank == drawing and seeing:
                tokens = run_shown(Engine(TwoRanks(runner, rank)), [Shower(Path(folder)).show(PARTS)])
                tell(rank, STOP)
                orders.send((tokens, 0, 0))
            elif rank == drawing:
                drafter: Drafter = WorkersDrafter() if speculative else SuffixDrafter()
                engine = Engine(TwoRanks(runner, rank), speculation(drafter))
                tokens = run(engine, BATCH, max_tokens=16)
                stats = engine.scheduler.stats
                tell(rank, STOP)
                orders.send((tokens, stats.accepted_tokens, stats.draft_tokens))
            else:
                while (message := tell(drawing)) != STOP:
                    runner.execute(pickle.loads(message))
                orders.send(None)
        except Exception:  # the test shows it, whatever it is
            orders.send(traceback.format_exc())
    group.close()
