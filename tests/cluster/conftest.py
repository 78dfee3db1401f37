"""A gateway of the tiny model, and databases."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from databases import Postgres, postgres
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


@pytest.fixture(scope="module")
def postgres_server() -> Iterator[Postgres]:
    """Its folder is where its user may go, which pytest's are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    with postgres(folder / "server") as made:
        yield made
    shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'governance.db'}"
    made: Postgres = request.getfixturevalue("postgres_server")
    return made.fresh()
