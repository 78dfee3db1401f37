"""Which tokens end a generation, by all the files that name some."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from greedy import engine_for, run
from layouts import rewritten
from quire_engine.text.tokenizer import Tokenizer, end_tokens
from quire_engine.weights.resolve import resolve

Make = Callable[[str], Path]


def found(folder: Path) -> tuple[int, ...]:
    files = resolve(str(folder))
    return end_tokens(files, Tokenizer.load(files))


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (7, None, (7, 2)),
        ([7, 8], None, (7, 8, 2)),
        (7, {}, (7, 2)),
        (7, {"eos_token_id": 9}, (9, 2)),
        (7, {"eos_token_id": [9, 10, 9]}, (9, 10, 2)),
        (7, {"eos_token_id": [300, 9, -1, 2**40]}, (9, 2)),
        (300, None, (2,)),
        (-1, None, (2,)),
    ],
)
def test_all_that_are_named(
    checkpoint: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, config: Any, generation: Any, expected: Any
) -> None:
    """generation_config.json's or else the config's, and the tokenizer's (2); none outside the vocabulary of 300."""
    folder = rewritten(checkpoint("qwen3"), tmp_path / "model", dict.copy, eos_token_id=config)
    path = folder / "generation_config.json"
    path.unlink()
    if generation is not None:
        path.write_text(json.dumps(generation))
    with caplog.at_level(logging.WARNING):
        assert found(folder) == expected
    named = (generation or {}).get("eos_token_id", config)
    outside = [token for token in (named if isinstance(named, list) else [named]) if not 0 <= token < 300]
    assert all(str(token) in caplog.text for token in outside)
    assert ("which the vocabulary of 300 tokens lacks; left out" in caplog.text) == bool(outside)


def test_what_the_vocabulary_lacks_does_not_reach_the_engine(checkpoint: Make, tmp_path: Path) -> None:
    """With `min_tokens` it would be looked up among the logits."""
    folder = rewritten(checkpoint("qwen3"), tmp_path / "model", dict.copy)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 5000]}))
    [tokens] = run(engine_for(folder), [[5, 6]], stop_token_ids=found(folder), min_tokens=8, max_tokens=8)
    assert len(tokens) == 8
    assert not {9, 2} & set(tokens[:7])
