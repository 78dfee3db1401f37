"""Every fact of a family matters: a decoder without it is not the family's model any more."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from quire_engine.config import EngineConfig
from quire_engine.errors import ModelError
from quire_engine.layers.caches import empty_caches
from quire_engine.layers.linear import Builder
from quire_engine.models.decoder import Decoder
from quire_engine.models.families import spec_of
from quire_engine.parallel import ParallelGroup
from quire_engine.quantization.config import Quantization
from quire_engine.spec import DecoderSpec, ExpertsSpec, LatentSpec, QKNorm, RecurrentSpec, Rotary
from quire_engine.weights.resolve import find_model
from quire_engine.weights.tensors import TensorReader
from quire_kernels.backends import AttentionBatch
from quire_kernels.norm import Norm
from quire_kernels.recurrence import StateBatch
from quire_kernels.torch_backend import TorchBackend
from transformers import AutoModelForCausalLM

PROMPT = [(7 * i) % 290 + 5 for i in range(90)]
SIZES = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_position",
}
NOT_FACTS = SIZES | {
    "names",
    "ignored",
    "extra_layers",
    "extra_tensors",
    "latent",
    "mtp",
}  # a wrong name or form does not load


def default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def without_each(spec: DecoderSpec) -> Iterator[tuple[str, DecoderSpec]]:
    """The spec with one fact after the other left out."""
    for name, changed in _left_out(spec):
        yield name, dataclasses.replace(spec, **{name.split(".")[0]: changed})


def _left_out(part: Any) -> Iterator[tuple[str, Any]]:
    """Names of facts, and what stands in their field when they are left out."""
    for field in dataclasses.fields(part):
        value, default = getattr(part, field.name), default_of(field)
        if field.name in NOT_FACTS or default is dataclasses.MISSING:
            continue
        if isinstance(value, Rotary):
            for name, rotary in _other_rotations(value, part.head_dim, part.latent):
                yield f"{field.name}.{name}", rotary
        elif isinstance(value, ExpertsSpec | QKNorm | Norm | RecurrentSpec):
            inner = {"intermediate_size", "num_experts", "top_k", "eps", "shared_size"}
            for name, changed in _left_out(value):
                if name.split(".")[0] not in inner:
                    yield f"{field.name}.{name}", dataclasses.replace(value, **{name.split(".")[0]: changed})
        if value != default and not isinstance(value, ExpertsSpec | Norm | RecurrentSpec):
            yield field.name, default


def _other_rotations(rotary: Rotary, head_dim: int, latent: LatentSpec | None) -> Iterator[tuple[str, Rotary]]:
    if latent is None:  # whose kernels know one kind alone
        yield "interleaved", dataclasses.replace(rotary, interleaved=not rotary.interleaved)
    yield "theta", dataclasses.replace(rotary, theta=rotary.theta * 2)
    if rotary.dim < head_dim:
        yield "dim", dataclasses.replace(rotary, dim=2 * rotary.dim)
    if rotary.kind != "default":
        yield "scaling", dataclasses.replace(rotary, scaling={})


class Checkpoint:
    """A family's tiny model in transformers, and decoders of any spec over its weights."""

    def __init__(self, folder: Path) -> None:
        self._files = find_model(EngineConfig(model=str(folder)))
        self.spec = spec_of(self._files.config)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            self.truth = model(torch.tensor([PROMPT])).logits[0]

    @torch.inference_mode()
    def error(self, spec: DecoderSpec) -> float:
        """The largest difference between a decoder's logits and transformers'."""
        weights = TensorReader(self._files.checkpoint(), torch.float32, torch.device("cpu"))
        group = ParallelGroup()
        decoder = Decoder(Builder(weights, group, TorchBackend(), Quantization()), spec, spec.max_position)
        exact, length = torch.float32, len(PROMPT)
        caches = empty_caches(
            spec,
            group,
            range(spec.num_layers),
            num_pages=6,
            block_size=16,
            num_states=1,
            dtype=exact,
            cache_dtype=exact,
            device=torch.device("cpu"),
        )
        query_starts = torch.tensor([0, length], dtype=torch.int32)
        batch = AttentionBatch(
            positions=torch.arange(length, dtype=torch.int32),
            slots=torch.arange(length),
            block_tables=torch.arange(6, dtype=torch.int32)[None],
            query_starts=query_starts,
            longest_query=length,
            context_lens=torch.tensor([length], dtype=torch.int32),
            states=StateBatch(
                reads=torch.tensor([-1], dtype=torch.int32),
                writes=torch.tensor([0], dtype=torch.int32),
                query_starts=query_starts,
                requests=torch.zeros(length, dtype=torch.int32),
                longest_query=length,
            ),
        )
        hidden = decoder(torch.tensor(PROMPT, dtype=torch.int32), batch, caches)
        assert hidden is not None
        logits = decoder.logits(hidden, None)
        assert logits is not None
        return (logits - self.truth).abs().max().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_fact_matters(checkpoint: Callable[[str], Path], family: str) -> None:
    """Left out, it gives other logits, or weights that do not fit."""
    model = Checkpoint(checkpoint(family))
    assert model.error(model.spec) < 1e-4
    idle = []
    for name, spec in without_each(model.spec):
        try:
            if not model.error(spec) > 1e-3:
                idle.append(name)
        except (ModelError, RuntimeError, AssertionError, IndexError):
            continue
    assert not idle, f"left out, these change nothing: {', '.join(idle)}"
