"""A GPU that is not here: the whole model runner on the meta device, as it would run on an H100.

Kernels are noted instead of launched, captured steps are run instead of recorded, and drawn tokens are random. Whoever
reads a tensor's values fails, as nothing has any: that is how a step is shown to wait for nothing.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from quire_engine.config import EngineConfig
from quire_engine.execution import drafting
from quire_engine.execution import runner as runner_module
from quire_engine.execution.runner import ModelRunner
from quire_engine.memory.dry_run import META
from quire_engine.memory.plan import GPUS, Target
from quire_engine.step import Ints, Places, StepResult
from quire_engine.weights.resolve import find_model

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from compile_ahead import Launch, recorded
from quire_kernels.hardware import CHIPS
from torch import Tensor

CARD = "H100"


class _Pending:
    """In place of a step's result: what a device would have drawn."""

    ready = True

    def __init__(self, places: Places, *rest: Any, **named: Any) -> None:
        self._count = len(places.rows)
        self._seed = int(places.positions.sum())

    def result(self) -> StepResult:
        """Tokens of a small vocabulary."""
        return StepResult(np.random.default_rng(self._seed).integers(4, 300, self._count).astype(np.int32))


def _recorder(device: torch.device) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def record(step: Callable[[], None]) -> Callable[[], None]:
        step()
        step()  # the recording itself
        return lambda: None

    return record


def _nothing_read(tokens: list[Tensor]) -> Ints:
    return np.zeros(sum(map(len, tokens)), np.int32)


@contextmanager
def dry_runner(folder: Path, facts: dict[str, Any], **options: Any) -> Iterator[tuple[ModelRunner, dict[Launch, None]]]:
    """A runner of a model by its config alone, and what it has launched since it was warm: kernels, specialized."""
    mebibytes, chip = GPUS[CARD]
    (folder / "config.json").write_text(json.dumps(facts))
    config = EngineConfig(model=str(folder), load_format="dummy", attention_backend="triton", **options)
    replaced = {
        "resolve_device": lambda config: META,
        "usable_bytes": lambda config, device: mebibytes << 20,
        "graph_recorder": _recorder,
        "PendingStep": _Pending,
    }
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(runner_module, name, value))
        stack.enter_context(mock.patch.object(drafting, "to_host", _nothing_read))
        stack.enter_context(mock.patch.object(Target, "of", lambda device: Target("cuda", CARD, CHIPS[chip])))
        launches = stack.enter_context(recorded(CHIPS[chip]))
        runner = ModelRunner(config, find_model(config))
        yield runner, launches
