"""Conversations about pictures, as transformers' processors make them and as engines take them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from quire_engine.engine import Engine
from quire_engine.multimodal.processor import ImageProcessor
from quire_engine.request import EngineSampling, ImageSpan, Request
from quire_engine.text.images import PromptImage, expand, spans_of
from quire_engine.weights.resolve import resolve
from transformers import AutoTokenizer

NEW_TOKENS = 24
Parts = Sequence[str | Image]  # of one message of a user


@dataclass(frozen=True)
class Shown:
    """A prompt with its images, and what transformers' own processor makes of the same."""

    ids: list[int]
    spans: tuple[ImageSpan, ...]
    inputs: dict[bytes, dict[str, np.ndarray]]  # of each image's key, what the tower reads
    theirs: dict[str, torch.Tensor]


class Shower:
    """Of one checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.processor = ImageProcessor.load(resolve(str(folder)))
        self._tokenizer = AutoTokenizer.from_pretrained(folder)

    def show(self, parts: Parts) -> Shown:
        pictures = [part for part in parts if not isinstance(part, str)]
        content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
        rendered = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        inputs: dict[bytes, dict[str, np.ndarray]] = {}
        images: list[PromptImage] = []
        for picture in pictures:
            made = self.processor.process(picture)
            key = hashlib.sha256(picture.tobytes()).digest()
            inputs[key] = made.inputs
            images.append(
                PromptImage(
                    what="image",
                    key=key,
                    replacement=made.replacement,
                    num_tokens=made.num_tokens,
                    rows=made.rows,
                    columns=made.columns,
                )
            )
        text = expand(rendered, images, self.processor.placeholder) if images else rendered
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        options: dict[str, Any] = {"images": pictures} if pictures else {}
        theirs = self.processor._processor(text=[rendered], return_tensors="pt", add_special_tokens=False, **options)
        return Shown(ids, spans_of(ids, images, self.processor.image_token_id), inputs, dict(theirs))


def truth(model: Any, shown: Shown) -> tuple[torch.Tensor, list[int]]:
    """transformers' logits of every position, and its greedy tokens."""
    with torch.no_grad():
        logits = model(**shown.theirs).logits[0]
        out = model.generate(
            **shown.theirs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return logits, out[0, len(shown.ids) :].tolist()


def request_of(shown: Shown, number: int, **params: Any) -> Request:
    sampling = EngineSampling(**({"temperature": 0.0, "max_tokens": NEW_TOKENS} | params))
    return Request(number, list(shown.ids), len(shown.ids), sampling, images=shown.spans)


def run_shown(engine: Engine, batch: Sequence[Shown], first_id: int = 1, **params: Any) -> list[list[int]]:
    """All together, each greedily; pixels are brought when the engine wants them."""
    requests = [request_of(shown, first_id + number, **params) for number, shown in enumerate(batch)]
    for request in requests:
        engine.add(request)
    finish(engine, {request.id: shown for request, shown in zip(requests, batch, strict=True)})
    for request in requests:
        assert request.error is None, request.error
    return [request.tokens[request.num_prompt :] for request in requests]


def finish(engine: Engine, known: dict[int, Shown]) -> None:
    """Steps until nothing is left."""
    while engine.scheduler.requests:
        for request, key in engine.step().wanted:
            engine.scheduler.provide(key, known[request.id].inputs[key])
    engine.scheduler.check_integrity()


def logits_of(engine: Engine, shown: Shown) -> torch.Tensor:
    """Of every position of the prompt but the last."""
    runner: Any = engine._executor
    model, seen = runner._model, list[torch.Tensor]()
    usual = model.logits
    model.logits = lambda hidden, out: seen.append(usual(hidden, out)) or seen[-1]
    run_shown(engine, [shown], 1000, max_tokens=1, prompt_logprobs=1)
    model.logits = usual
    return torch.cat(seen)[: len(shown.ids) - 1]
