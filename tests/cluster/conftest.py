"""A gateway of the tiny model."""

from collections.abc import Callable
from pathlib import Path

import pytest
from quire_cluster.gateway.service import Service
from quire_cluster.observability.metrics import Metrics
from quire_engine.config import EngineConfig
from quire_engine.text.tokenizer import Tokenizer
from quire_engine.weights.resolve import find_model


@pytest.fixture(scope="module")
def service(checkpoint: Callable[[str], Path]) -> Callable[[], Service]:
    """A gateway of the tiny model, without a replica yet."""
    config = EngineConfig(model=str(checkpoint("llama")), max_num_queued_reqs=8)
    files = find_model(config)
    tokenizer = Service.load(files, config, names=["tiny"], chat_template=None, metrics=Metrics()).tokenizer
    return lambda: Service(files, tokenizer, names=["tiny"], max_model_len=4096, max_waiting=8, metrics=Metrics())


@pytest.fixture(scope="module")
def tokenizer(service: Callable[[], Service]) -> Tokenizer:
    return service().tokenizer
