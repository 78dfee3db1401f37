"""Two tensor-parallel ranks in processes of their own, which run an engine over one checkpoint after another."""

import pickle
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from drafters import speculation
from greedy import prompts, run
from quire_engine.config import EngineConfig
from quire_engine.engine import Engine
from quire_engine.execution.runner import ModelRunner
from quire_engine.parallel import ParallelGroup
from quire_engine.speculation.suffix import SuffixDrafter
from quire_engine.step import StepPlan, StepResult
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
            config = EngineConfig(
                model=folder,
                device="cpu",
                kv_cache_memory_bytes=4 << 20,
                max_num_batched_tokens=24,
                speculative_config='{"num_speculative_tokens": 4}',
            )
            runner = ModelRunner(config, find_model(config), group)
            if rank == 0:
                tokens = run(Engine(TwoRanks(runner), speculation(SuffixDrafter())), BATCH, max_tokens=16)
                tell(STOP)
                orders.send(tokens)
            else:
                while (message := tell()) != STOP:
                    runner.execute(pickle.loads(message))
                orders.send(None)
        except Exception:  # the test shows it, whatever it is
            orders.send(traceback.format_exc())
    group.close()
