"""Heads that guess tokens ahead give what plain torch computes of the published tensors, without a cache."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import LAYERS
from heads import GUESSES, HIDDEN, MTP, Mtp, built, guesses, mtp_folders
from layouts import Tensors
from quire_engine.parallel import ParallelGroup
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

TOKENS = [(7 * i) % 290 + 5 for i in range(21)]
ALONE = ParallelGroup()


@dataclass
class Reference:
    """A head over whole texts."""

    states: Callable[[Tensor, Tensor], Tensor]  # tokens [T], states [T, H] → states for the next guess
    logits: Callable[[Tensor], Tensor]
    vocabulary: Tensor | None = None

    @torch.no_grad()
    def guesses(self, tokens: list[int], states: Tensor) -> Tensor:
        """[T + GUESSES, vocabulary]: of the text, then of each guess, computed anew from the beginning."""
        tokens = list(tokens)
        out = self.states(torch.tensor(tokens), states)
        logits = self.logits(out)
        for _ in range(GUESSES):
            best = int(logits[-1].argmax())
            tokens.append(best if self.vocabulary is None else int(self.vocabulary[best]))
            states = torch.cat((states, out[-1:]))
            out = self.states(torch.tensor(tokens), states)
            logits = torch.cat((logits, self.logits(out[-1:])))
        return logits


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight + offset)


def in_full(model: Any, layer: Any, x: Tensor, **options: Any) -> Tensor:
    """A layer of transformers (or its attention) over a whole text."""
    length = x.shape[0]
    places = torch.arange(length)[None]
    mask = torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)
    turns = model.model.rotary_emb(x[None], places)
    out = layer(x[None], position_embeddings=turns, attention_mask=mask, position_ids=places, **options)
    return (out[0] if isinstance(out, tuple) else out).view(length, -1)


def mtp_reference(mtp: Mtp, plain: Path, tensors: Tensors) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    layer = model.model.layers[LAYERS]
    eps, offset = model.config.rms_norm_eps, float(mtp.unit_offset)

    def norm(name: str, x: Tensor) -> Tensor:
        return rms_norm(x, tensors[f"{name}.weight"], eps, offset)

    def states_of(tokens: Tensor, states: Tensor) -> Tensor:
        embedded = norm(mtp.embedding_norm, tensors["model.embed_tokens.weight"][tokens])
        states = norm(mtp.hidden_norm, states)
        both = (states, embedded) if mtp.hidden_first else (embedded, states)
        x = in_full(model, layer, torch.cat(both, -1) @ tensors[f"{mtp.projection}.weight"].T)
        return norm(mtp.norm, x) if mtp.normalized else x

    def logits_of(states: Tensor) -> Tensor:
        return F.linear(states if mtp.normalized else norm(mtp.norm, states), tensors["lm_head.weight"])

    return Reference(states_of, logits_of)


@pytest.mark.parametrize("name", MTP)
def test_mtp(tmp_path: Path, name: str) -> None:
    plain, folder = mtp_folders(tmp_path, name)
    truth = mtp_reference(MTP[name], plain, load_file(folder / "model.safetensors"))
    states = torch.randn(len(TOKENS), HIDDEN)
    wanted = truth.guesses(TOKENS, states)
    head = built(folder, ALONE)[1]
    for cut in (0, 8):
        found = torch.cat(guesses(head, ALONE, TOKENS, states, cut))
        assert found.dtype == torch.float32
        assert (found - wanted).abs().max() < 1e-4
