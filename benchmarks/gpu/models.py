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
from quire_engine.request import EngineSampling, ImageSpan, Request
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


def shown(shape: str, logs: list[list[int]]) -> dict[int, tuple[ImageSpan, dict[str, np.ndarray]]]:
    """By the prompt, where it has an image from its ninth token on, and the image; of shapes without images nothing."""
    vision = SHAPES[shape].get("vision_config")
    if vision is None:
        return {}
    generator, found = np.random.default_rng(0), {}
    rows, columns, patch, channels = 2, 4, 16, 3 * 2
    for number, log in enumerate(logs):
        log[8 : 8 + rows * columns] = [SHAPES[shape]["image_token_id"]] * (rows * columns)
        pixels = generator.standard_normal((4 * rows * columns, channels * patch**2), np.float32)
        grid = np.array([[1, 2 * rows, 2 * columns]])
        span = ImageSpan(number.to_bytes(4), 8, rows * columns, rows, columns)
        found[number] = span, {"pixel_values": pixels, "image_grid_thw": grid}
    return found


def add(
    engine: Engine, logs: list[list[int]], max_tokens: int, spans: dict[int, ImageSpan] | None = None, **params: Any
) -> list[Request]:
    """Greedy requests."""
    sampling, spans = EngineSampling(temperature=0.0, max_tokens=max_tokens, **params), spans or {}
    requests = [
        Request(number, list(log), len(log), sampling, images=(spans[number],) if number in spans else ())
        for number, log in enumerate(logs)
    ]
    for request in requests:
        engine.add(request)
    return requests
