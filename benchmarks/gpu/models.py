"""Models by their shapes alone, with random weights, and loads for them."""

import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from quire_engine.config import EngineConfig
from quire_engine.engine import Engine
from quire_engine.execution.runner import ModelRunner
from quire_engine.request import EngineSampling, Request
from quire_engine.weights.resolve import find_model
from shapes import SHAPES


def runner_of(shape: str, device: str, kind: type[ModelRunner] = ModelRunner, **options: Any) -> ModelRunner:
    """Weights are those of the shape, whatever the device and the options."""
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
        config = EngineConfig(model=folder, device=device, load_format="dummy", **options)
        return kind(config, find_model(config))


def prompts(count: int, length: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Random, none alike."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocabulary, length).tolist() for _ in range(count)]


def add(engine: Engine, logs: list[list[int]], max_tokens: int, **params: Any) -> list[Request]:
    """Greedy requests."""
    sampling = EngineSampling(temperature=0.0, max_tokens=max_tokens, **params)
    requests = [Request(number, list(log), len(log), sampling) for number, log in enumerate(logs)]
    for request in requests:
        engine.add(request)
    return requests
