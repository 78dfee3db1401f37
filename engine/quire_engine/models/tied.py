"""Output heads that a config ties to the embeddings, and what the checkpoint holds: as transformers reads it."""

import dataclasses
import logging

import torch

from quire_engine.spec import DecoderSpec
from quire_engine.weights.tensors import Checkpoint

log = logging.getLogger(__name__)
_ROWS = 4096  # compared at once


def as_stored(spec: DecoderSpec, checkpoint: Checkpoint) -> DecoderSpec:
    """Tied weights may lie under the head's name. A stored head that is not the embeddings is the model's head."""
    names = set(checkpoint.names())
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
