"""A day of serving on a GPU that is not here (benchmarks/engine/dry_gpu.py), one JSON object for each model: what was
compiled after the start, which copies would have waited for the device, and the memory that was planned and taken.

In a process of its own, without the interpreter.
"""

import json
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "engine"))
sys.path.append(str(Path(__file__).parents[1]))

from drafters import Constant, speculation
from dry_gpu import CARD, dry_runner
from families import FAMILIES, TINY
from quire_engine.config import EngineConfig
from quire_engine.engine import Engine
from quire_engine.execution.graphs import StepGraphs
from quire_engine.memory.dry_run import AllocatedBytes, DryGroup, allocated
from quire_engine.memory.plan import GPUS
from quire_engine.memory.shapes import captured_shapes
from quire_engine.models.drafts import draft_source
from quire_engine.request import EngineSampling, Request, TokenSet
from quire_engine.speculation.draft import Drafter
from quire_engine.speculation.workers import WorkersDrafter
from quire_engine.upload import Upload
from quire_engine.weights.resolve import find_model
from quire_kernels.hardware import CHIPS
from shapes import SHAPES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 0.9, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
    {"temperature": 1.2, "logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "logprobs": 0},
    {"temperature": 0.0, "bad_words": ((5,), (6, 7), (1, 2, 3)), "logit_bias": {8: 1.5}, "min_tokens": 4},
    {"temperature": 0.8, "allowed_token_ids": TokenSet.of((5, 6, 7)), "frequency_penalty": 0.1},
    {"temperature": 0.0, "prompt_logprobs": 2},
]
_COSTLY: dict[str, Any] = {
    "top_p": 0.9,
    "repetition_penalty": 1.1,
    "allowed_token_ids": TokenSet.of((4, 5)),
    "bad_words": ((4, 5),),
    "logit_bias": {4: 1.0},
    "logprobs": 20,
}


class Copies(TorchDispatchMode):
    """Notes what takes a tensor of the host to the device other than an upload."""

    def __init__(self) -> None:
        super().__init__()
        self.uploading = False
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [*args, *(kwargs or {}).values(), *(result if isinstance(result, tuple | list) else [result])]
        kinds = {tensor.device.type for tensor in tensors if isinstance(tensor, Tensor) and tensor.ndim}
        if len(kinds) > 1 and not self.uploading:
            frames = [frame for frame in traceback.extract_stack() if "/quire_" in frame.filename]
            self.waits.append(f"{func} in {Path(frames[-1].filename).name}:{frames[-1].lineno}")
        return result


def fill(engine: Engine) -> None:
    """Steps as large as any can be, in which every row draws and asks for all that costs memory: with prompts, and then
    with as many drafts as there can be."""
    limits = engine.scheduler.limits
    run_rows(engine, limits.most_tokens // limits.most_rows, 1)
    if limits.speculation is not None:
        run_rows(engine, 2, 20)


def run_rows(engine: Engine, length: int, most: int) -> None:
    """Runs as many requests as a step can have."""
    for number in range(engine.scheduler.limits.most_rows):
        prompt = ([4 + number % 290, number // 290] * length)[:length]
        engine.add(Request(-1 - number, prompt, length, EngineSampling(max_tokens=most, **_COSTLY)))
    while engine.has_work:
        engine.step()


def live(engine: Engine, seed: int, arrivals: int, longest: int) -> None:
    """Random arrivals of every kind, few at once and many, short prompts and long ones; some leave early."""
    generator = np.random.default_rng(seed)
    for number in range(arrivals):
        length = int(min(2 ** generator.uniform(0, np.log2(longest - 40)), longest - 40))
        params = EngineSampling(
            max_tokens=int(generator.integers(1, 40)),
            seed=number,
            stop_token_ids=(2,),
            **_KINDS[int(generator.integers(0, len(_KINDS)))],
        )
        prompt = generator.integers(4, 300, length).tolist()
        engine.add(Request(number, prompt, length, params))
        if generator.random() < 0.1:
            engine.abort(int(generator.integers(0, number + 1)))
        if generator.random() < 0.5:  # they come in crowds
            for _ in range(int(generator.integers(0, 12))):
                engine.step()
    while engine.has_work:
        engine.step()


def facts_of(model: str) -> dict[str, Any]:
    """A published shape with two layers, or a tiny model of a family."""
    if model == "EAGLE-3":  # on Llama-3.1-8B with its two layers
        head = {"num_hidden_layers": 1, "draft_vocab_size": 32000, "eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
        return SHAPES["Llama-3.1-8B"] | {"architectures": ["LlamaForCausalLMEagle3"]} | head
    if model in SHAPES:
        return SHAPES[model] | {"num_hidden_layers": 2}
    config = getattr(transformers, FAMILIES[model].config)(**(TINY | FAMILIES[model].facts))
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(config)
    return json.loads(made.config.to_json_string(use_diff=False)) | {"architectures": [type(made).__name__]}


def day(model: str, arrivals: int = 300, draft: str | None = None, **options: Any) -> dict[str, Any]:
    """`draft`: what guesses beside it."""
    counter, copies = AllocatedBytes(), Copies()
    taken: dict[str, int] = {}
    capture, into = StepGraphs.capture, Upload.into

    def counted(self: StepGraphs, shapes: Any) -> None:
        before = counter.most = counter.now
        capture(self, shapes)
        taken["graphs"] = counter.most - before

    def uploading(self: Upload, buffer: Tensor, arrays: Any) -> None:
        copies.uploading = True
        into(self, buffer, arrays)
        copies.uploading = False

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if draft is not None:
            beside = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (beside / "config.json").write_text(json.dumps(facts_of(draft)))
            options["speculative_config"] = json.dumps({"model": str(beside), "num_speculative_tokens": 4})
        stack.enter_context(counter)
        stack.enter_context(mock.patch.object(StepGraphs, "capture", counted))
        stack.enter_context(mock.patch.object(Upload, "into", uploading))
        runner, launches = stack.enter_context(dry_runner(folder, facts_of(model), **options))
        warm = len(launches)
        speculative = runner.limits.speculation
        drafter: Drafter = WorkersDrafter() if speculative is not None and speculative.model else Constant()
        engine = Engine(runner, speculation(drafter) if speculative is not None else None)
        counter.most = counter.now
        fill(engine)
        most = counter.most
        with copies:
            live(engine, 0, arrivals, runner.limits.max_model_len)
        found = list(launches)[warm:]
        asked = EngineConfig(model=str(folder), **options)
        source = draft_source(asked, find_model(asked), runner.spec, runner.quantization)
        planned = allocated(
            runner.spec,
            runner.quantization,
            DryGroup(),
            runner.limits,
            chip=CHIPS[GPUS[CARD][1]],
            dtype=torch.bfloat16,
            captured=[] if options.get("enforce_eager") else captured_shapes(runner.limits),
            draft=source,
        )
        drafting = runner._drafting
        kept = runner._caches + (drafting._caches if drafting is not None else [])
        caches = sum(part.nbytes for cache in kept for part in cache)
        taken["steps"] = most - planned.weights - caches
    return {
        "model": model,
        "warm": warm,
        "compiled": [f"{launch.kernel.__name__} {launch.constants} {launch.aligned}" for launch in found],
        "waits": copies.waits,
        "taken": taken,
        "planned": {"graphs": planned.graphs, "steps": planned.step + planned.tables},
    }


if __name__ == "__main__":
    for line in sys.argv[1:]:
        print(json.dumps(day(**json.loads(line))))
