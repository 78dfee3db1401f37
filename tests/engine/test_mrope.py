"""Tokens with positions in time, rows and columns: as transformers' text models turn them."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from greedy import engine_for
from image_text import WHOLE, whole_model
from quire_engine.errors import ModelError
from quire_engine.layers.rotary import axes_of
from quire_engine.models.base import with_sections
from quire_engine.models.families import spec_of
from quire_engine.spec import Rotary
from quire_engine.weights.hf_config import completed
from quire_kernels.backends import AttentionBatch
from quire_kernels.recurrence import StateBatch

THREE = [name for name, whole in WHOLE.items() if whole.sections is not None]
PAGES = 8


def image_like(before: int, rows: int, columns: int, after: int) -> torch.Tensor:
    """[3, T]: text, a grid that stands still in time, text that goes on behind its longer side."""
    grid = torch.cartesian_prod(torch.tensor([0]), torch.arange(rows), torch.arange(columns)).T + before
    begin = before + max(rows, columns)
    return torch.cat((torch.arange(before).expand(3, -1), grid, torch.arange(begin, begin + after).expand(3, -1)), 1)


def steps(runner: Any, tokens: torch.Tensor, angles: torch.Tensor, cuts: list[int]) -> Iterator[torch.Tensor]:
    """The logits of one request's tokens, computed in steps that end at `cuts`."""
    size = runner.limits.block_size
    pages = torch.arange(1, PAGES + 1, dtype=torch.int32)
    for begin, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        positions = torch.arange(begin, end)
        query_starts = torch.tensor([0, end - begin], dtype=torch.int32)
        states = StateBatch(
            reads=torch.tensor([0 if begin else -1], dtype=torch.int32),
            writes=torch.tensor([0], dtype=torch.int32),
            query_starts=query_starts,
            requests=torch.zeros(end - begin, dtype=torch.int32),
            longest_query=end - begin,
        )
        batch = AttentionBatch(
            positions=positions.int(),
            slots=pages[positions // size].long() * size + positions % size,
            block_tables=pages[None],
            query_starts=query_starts,
            longest_query=end - begin,
            context_lens=torch.tensor([end], dtype=torch.int32),
            states=states if runner.spec.recurrent_layers else None,
            angles=angles[:, begin:end].int(),
        )
        hidden = runner._model(tokens[begin:end].int(), batch, runner._caches)
        yield runner._model.logits(hidden, None)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, backend) for name in THREE for backend in ("torch", "native")),
        ("qwen2_vl", "triton"),
        ("glm4v", "triton"),
    ],
)
def test_positions_of_an_image(name: str, backend: str, tmp_path: Path) -> None:
    """In one step, and in several: a part of the image, the rest of it, then token by token."""
    model = whole_model(name, tmp_path)
    angles = image_like(7, 4, 5, 9)
    tokens = torch.randint(4, 300, (angles.shape[1],))
    with torch.no_grad():
        inside = model.model.language_model(input_ids=tokens[None], position_ids=angles[:, None])
        truth = model.lm_head(inside.last_hidden_state)[0]
        flat = model(input_ids=tokens[None]).logits[0]
    runner: Any = engine_for(tmp_path, attention_backend=backend)._executor
    with torch.inference_mode():
        whole = torch.cat(list(steps(runner, tokens, angles, [])))
        parts = torch.cat(list(steps(runner, tokens, angles, [16, 30, 31, 32])))
    assert (truth - flat).abs().max() > 1e-2
    assert (whole - truth).abs().max() < 1e-4
    assert (parts - truth).abs().max() < 1e-4


@pytest.mark.parametrize("name", THREE)
def test_three_equal_positions_are_one(name: str, tmp_path: Path) -> None:
    """To the last bit, so that a text beside an image is no other text."""
    whole_model(name, tmp_path)
    tokens = torch.randint(4, 300, (40,))
    runner: Any = engine_for(tmp_path)._executor
    with torch.inference_mode():
        [three] = steps(runner, tokens, torch.arange(40).expand(3, -1), [])
        runner._model._tables = [_Without(table) for table in runner._model._tables]
        [one] = steps(runner, tokens, torch.arange(40).expand(3, -1), [])
    assert torch.equal(three, one)


class _Without:
    """A table that is not told of three positions."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def of(self, batch: AttentionBatch) -> Any:
        return self._table.rope, batch


@pytest.mark.parametrize("name", THREE)
def test_sections_that_a_config_leaves_out(name: str) -> None:
    """With heads as published models have them."""
    whole = WHOLE[name]
    kind = getattr(transformers, whole.config)
    text = {"hidden_size": 4096, "num_attention_heads": 32}
    text |= {"head_dim": 256 if name.startswith("qwen3_5") else 128} if name.startswith("qwen3") else {}
    text |= {"partial_rotary_factor": 0.5} if name == "glm4v" else {}
    rope = spec_of(
        completed({"architectures": [whole.architecture], "model_type": kind.model_type, "text_config": text})
    ).rope
    assert rope is not None
    module = import_module(f"transformers.models.{kind.model_type}.modeling_{kind.model_type}")
    found = [name for name in dir(module) if name.endswith("RotaryEmbedding") and "Vision" not in name]
    theirs = getattr(module, found[0])(kind(text_config=text).text_config)
    assert list(rope.sections) == theirs.mrope_section
    positions = torch.randint(0, 1000, (3, 1, 50))
    cosine, _ = theirs(torch.zeros(1), positions)
    frequencies = 1.0 / rope.theta ** (torch.arange(0, rope.dim, 2).float() / rope.dim)
    expected = (positions[axes_of(rope), 0].T * frequencies).cos()
    got = cosine[0, :, ::2] if rope.interleaved else cosine[0, :, : rope.dim // 2]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("sections", "interleaved", "named"),
    [
        ([2, 3, 3], False, ""),
        ([2, 3], False, "must be three numbers"),
        ("2, 3, 3", True, "must be three numbers"),
        ([2.0, 3, 3], True, "must be three numbers"),
        ([2, 3, 4], False, "must add up to 8"),
    ],
)
def test_sections_are_checked(sections: Any, interleaved: bool, named: str) -> None:
    rotary = Rotary(theta=1e4, dim=16, scaling={"mrope_section": sections})
    if not named:
        assert with_sections(rotary, (8, 12, 12), interleaved).sections == (2, 3, 3)
        return
    with pytest.raises(ModelError, match=named):
        with_sections(rotary, (8, 12, 12), interleaved)
