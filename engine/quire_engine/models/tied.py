"""What a config leaves open and a checkpoint's tensors tell: where a text part lies, how experts are stored, and
whether the output head is the embeddings, as transformers reads it."""

import dataclasses
import logging
from typing import Any

import torch

from quire_engine.spec import DecoderSpec, joined
from quire_engine.weights.tensors import Checkpoint
from quire_engine.weights.text_parts import PLACES, place_of

log = logging.getLogger(__name__)
_ROWS = 4096  # compared at once


def as_stored(spec: DecoderSpec, checkpoint: Checkpoint) -> DecoderSpec:
    """The spec by which the checkpoint can be read."""
    names = set(checkpoint.names())
    return _tied(_stacked(_moved(spec, names), names, checkpoint), names, checkpoint)


def _moved(spec: DecoderSpec, names: set[str]) -> DecoderSpec:
    """A text part has the names that its family has by itself, or others in their place."""
    (usual, usual_head), place = PLACES[0], place_of(names)
    if not spec.names.layers.startswith(f"{usual}.") or place is None or place == PLACES[0]:
        return spec
    model, head = place

    def moved(name: str) -> str:
        return model + name.removeprefix(usual) if name.startswith(f"{usual}.") else name

    of_spec, mtp = spec.names, spec.mtp
    if mtp is not None:
        mtp = dataclasses.replace(mtp, layers=moved(mtp.layers), at=moved(mtp.at))
    moving: dict[str, Any] = {field: moved(getattr(of_spec, field)) for field in ("embedding", "layers", "norm")}
    if of_spec.head == usual_head:
        moving["head"] = head
    return dataclasses.replace(spec, names=dataclasses.replace(of_spec, **moving), mtp=mtp)


def _stacked(spec: DecoderSpec, names: set[str], checkpoint: Checkpoint) -> DecoderSpec:
    """Families whose experts lie one by one may have them in one tensor, as transformers computes with them, or each
    transposed (Qwen3-VL)."""
    experts = spec.experts
    if experts is None or experts.stacked:
        return spec
    layer = next((number for number in range(spec.num_layers) if spec.has_experts(number)), 0)
    at = joined(spec.names.layers, str(layer), experts.at, experts.experts)
    if f"{at}.gate_up_proj" not in names or f"{at}.down_proj" not in names:
        return spec
    shapes = [checkpoint.tensor(f"{at}.{name}").shape[1:] for name in ("gate_up_proj", "down_proj")]
    hidden, inner = spec.hidden_size, experts.intermediate_size
    return dataclasses.replace(
        spec,
        experts=dataclasses.replace(
            experts,
            gate="gate_up_proj",
            up="gate_up_proj",
            down="down_proj",
            stacked=True,
            transposed=shapes == [(hidden, 2 * inner), (inner, hidden)],
        ),
    )


def _tied(spec: DecoderSpec, names: set[str], checkpoint: Checkpoint) -> DecoderSpec:
    """Tied weights may lie under the head's name. A stored head that is not the embeddings is the model's head."""
    embedding, head = spec.names.embedding, spec.names.head
    if not spec.tie_embeddings or spec.pooling is not None or f"{head}.weight" not in names:
        return spec
    if f"{embedding}.weight" not in names:
        embedding = embedding.partition(".")[2]  # of a checkpoint that leaves out the name of the model within
    if f"{embedding}.weight" not in names:
        return dataclasses.replace(spec, names=dataclasses.replace(spec.names, embedding=head))
    if _equal(checkpoint, f"{embedding}.weight", f"{head}.weight"):
        return spec
    log.warning("%s is not %s, to which tie_word_embeddings ties it: it is used as it is stored", head, embedding)
    return dataclasses.replace(spec, tie_embeddings=False)


def _equal(checkpoint: Checkpoint, first: str, second: str) -> bool:
    one, other = checkpoint.tensor(first), checkpoint.tensor(second)
    if one.shape != other.shape:
        return False
    parts = (slice(start, start + _ROWS) for start in range(0, one.shape[0], _ROWS))
    return all(torch.equal(one.read(part), other.read(part)) for part in parts)
