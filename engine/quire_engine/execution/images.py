"""The images of one worker: encodes them, keeps their embeddings, and finds those that a step's tokens are."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quire_engine.config import EngineConfig
from quire_engine.memory.plan import needs_images
from quire_engine.models.decoder import Embedded
from quire_engine.models.vision import TransformersTower, VisionTower, vision_tower
from quire_engine.models.vit import Features
from quire_engine.parallel import ParallelGroup
from quire_engine.spec import DecoderSpec
from quire_engine.step import Encode, Ints, StepImages
from quire_engine.weights.resolve import ModelFiles

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a step has of images."""

    embedded: Embedded | None  # tokens of the step that are embeddings
    unseen: dict[bytes, str]  # images that could not be encoded, and why
    seconds: Callable[[], float]  # that encoding took, once the device is through with it


class ImageEmbeddings:
    """By the slots that plans name. How much is kept is the scheduler's to say."""

    def __init__(self, tower: VisionTower, spec: DecoderSpec, device: torch.device, *, reports: bool) -> None:
        """`reports`: what fails is told by this rank."""
        self._tower = tower
        self._hidden, self._levels = spec.hidden_size, spec.images.deepstack if spec.images is not None else 0
        self._device = device
        self._reports = reports
        self._kept: dict[int, Features] = {}
        self.progress: Callable[[], None] = lambda: None  # called after each image

    def take(self, step: StepImages | None) -> Seen | None:
        """Does what a step says. In place of images that could not be encoded there is nothing: the requests that have
        them are going to end."""
        if step is None:
            return None
        for slot in step.forget.tolist():
            self._kept.pop(slot, None)
        unseen: dict[bytes, str] = {}
        clock = _Clock(self._device)
        for image in step.encode:
            try:
                self._kept[image.slot] = self._encoded(image)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # others' code over what a client sent: it costs this image, not the worker
                if not self._reports:
                    raise
                log.exception("an image could not be encoded")
                unseen[image.key] = f"{type(error).__name__}: {error}"[:300]
                nothing = torch.zeros((image.size, self._hidden), dtype=self._tower.dtype, device=self._device)
                self._kept[image.slot] = Features(nothing, [nothing] * self._levels)
            self.progress()
        clock.stop()
        if not len(step.places):
            return Seen(None, unseen, clock.seconds)
        sources = step.sources.tolist()
        rows = torch.cat([self._kept[slot].embeddings[first:last] for slot, first, last in sources])
        deep = [
            torch.cat([self._kept[slot].deepstack[level][first:last] for slot, first, last in sources])
            for level in range(self._levels)
        ]
        places = torch.from_numpy(step.places).to(self._device, torch.int64)
        return Seen(Embedded(places=places, rows=rows, deep=deep), unseen, clock.seconds)

    def _encoded(self, image: Encode) -> Features:
        found = self._tower.encode(image.inputs)
        if len(found.embeddings) != image.size:
            raise ValueError(
                f"the vision tower makes {len(found.embeddings)} embeddings of an image, the prompt has {image.size} "
                "tokens for it: the checkpoint's processor and its config do not belong together"
            )
        return found


class _Clock:
    """Runs on a GPU as the work does."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks = [self._mark()]

    def _mark(self) -> torch.cuda.Event | float:
        if self._device.type == "cpu":
            return time.monotonic()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def stop(self) -> None:
        """The work is launched."""
        self._marks.append(self._mark())

    def seconds(self) -> float:
        """How long it took; the device is through with it."""
        begin, end = self._marks
        if isinstance(begin, float) and isinstance(end, float):
            return end - begin
        assert isinstance(begin, torch.cuda.Event)
        assert isinstance(end, torch.cuda.Event)
        return float(begin.elapsed_time(end)) / 1e3


def image_embeddings(
    spec: DecoderSpec,
    group: ParallelGroup,
    files: ModelFiles,
    config: EngineConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> ImageEmbeddings | None:
    """Of a rank that has layers which read them. Raises ModelError."""
    if not needs_images(spec, group):
        return None
    assert spec.images is not None
    folder = None if config.load_format == "dummy" else files.folder
    tower = vision_tower(spec.images.config, folder, dtype, device)
    if isinstance(tower, TransformersTower) and group.rank == 0:
        log.warning(
            "images of %s are encoded by transformers' code: Quire's own vision transformer does not know them",
            spec.images.config["architectures"][0],
        )
    return ImageEmbeddings(tower, spec, device, reports=group.draws or group.stages == 1)


def seen_spans(positions: Tensor, spans: Ints) -> Tensor:
    """[T, 2] the positions that a token sees besides those before it: of an image all, else itself."""
    found = torch.stack((positions, positions + 1), 1)
    firsts, lasts = spans[:, 0], spans[:, 1]
    places = np.concatenate([np.arange(first, last) for first, last in zip(firsts, lasts, strict=True)])
    seen = torch.from_numpy(np.repeat(spans[:, 2:], lasts - firsts, 0)).to(found)
    return found.index_copy_(0, torch.from_numpy(places).to(found.device, torch.int64), seen)
