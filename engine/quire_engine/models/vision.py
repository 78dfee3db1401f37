"""The visual half of a model of images and text: transformers' own tower and projector, without its language model.

Each rank has a whole one; what it makes of an image takes the place of the image's tokens in the decoder's input.
"""

import copy
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quire_engine.errors import ModelError
from quire_engine.weights.tensors import SafetensorsCheckpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Features:
    """What is seen of an image."""

    embeddings: Tensor  # [n, hidden], one for each of its tokens
    deepstack: list[Tensor]  # each [n, hidden], added to what the first layers of the decoder give


class VisionTower:
    """Pixels to embeddings."""

    def __init__(
        self, config: Mapping[str, Any], folder: Path | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`config`: all of config.json. Weights are read from `folder`; without it they are random (on the meta device:
        shapes alone). Raises ModelError."""
        self.device = device
        made = whole_config(config)
        kind = _class_of(made)
        tower = _without_text(kind)
        if device.type == "meta":
            with torch.device(device):
                model = tower._from_config(made, dtype=dtype, attn_implementation="sdpa")
        else:
            model = _loaded(tower, made, folder, dtype)
        self.dtype = dtype
        self._model = model.to(device).eval().requires_grad_(False).model
        self._takes = frozenset(inspect.signature(self._model.get_image_features).parameters)
        self.num_parameters = sum(parameter.numel() for parameter in self._model.parameters())
        self.bytes = sum(
            tensor.numel() * tensor.element_size() for tensor in (*self._model.parameters(), *self._model.buffers())
        )

    @torch.inference_mode()
    def encode(self, inputs: Mapping[str, np.ndarray]) -> Features:
        """One image, as its processor gives it."""
        tensors = {name: self._tensor(value) for name, value in inputs.items() if name in self._takes}
        out = self._model.get_image_features(**tensors, return_dict=True)
        return Features(
            _joined(out.pooler_output), [_joined(one) for one in getattr(out, "deepstack_features", None) or ()]
        )

    def _tensor(self, value: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(value))
        if tensor.is_floating_point():
            return tensor.to(self.device, self._model.dtype)
        return tensor.to(self.device)


def _joined(features: Any) -> Tensor:
    """What families give as a tensor or as several, each [..., hidden]."""
    parts = [features] if isinstance(features, Tensor) else list(features)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def whole_config(config: Mapping[str, Any]) -> Any:
    """All of config.json as transformers has it. Raises ModelError."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ModelError(f"config.json has model_type {kind!r:.80}, which transformers does not know")
    own = {key: value for key, value in copy.deepcopy(dict(config)).items() if key != "quantization_config"}
    try:
        return CONFIG_MAPPING[kind].from_dict(own)
    except Exception as error:  # others' code, which raises nearly anything where a value is not what it expects
        raise ModelError(f"config.json is not one of {kind} in transformers: {str(error)[:300]}") from error


def _class_of(made: Any) -> Any:
    """Of the whole model."""
    import transformers

    mapping = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if type(made) not in mapping:
        raise ModelError(f"transformers has no model of images and text for model_type {made.model_type!r:.80}")
    return mapping[type(made)]


def _without_text(kind: Any) -> Any:
    """The class, under its own name (by which transformers knows its checkpoints' old names), whose models drop what is
    for text before anything is allocated."""

    def build(self: Any, config: Any) -> None:
        kind.__init__(self, config)
        text = self.get_decoder()
        for name, child in list(self.model.named_children()):
            if child is text:
                delattr(self.model, name)
        del self.lm_head
        self.all_tied_weights_keys = {}

    return type(kind.__name__, (kind,), {"__init__": build, "_tied_weights_keys": None, "__module__": kind.__module__})


def _loaded(tower: Any, config: Any, folder: Path | None, dtype: torch.dtype) -> Any:
    """On the CPU, by transformers, which knows the names that older checkpoints have."""
    with torch.device("meta"):
        parts = tuple(
            dict.fromkeys(name.split(".")[1] for name in tower._from_config(copy.deepcopy(config)).state_dict())
        )
    stored: dict[str, Tensor] = {}
    if folder is not None:
        checkpoint = SafetensorsCheckpoint(folder)
        stored = {
            name: checkpoint.tensor(name).read()
            for name in checkpoint.names()
            if name.removeprefix("model.").startswith(parts)
        }
    model, info = tower.from_pretrained(
        None,
        config=config,
        state_dict=stored,
        dtype=dtype,
        attn_implementation="sdpa",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    if folder is None:
        return model
    for name, there, asked in sorted(info["mismatched_keys"]):
        raise ModelError(
            f"tensor {name} has shape {list(there)}, the config asks for {list(asked)}; config and weights do not "
            "belong together"
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"the checkpoint has no tensor {missing[0]}; is it complete?")
    if strange := sorted(info["unexpected_keys"]):
        raise ModelError(
            f"the checkpoint has a tensor {strange[0]}, which the vision tower lacks: is the tower quantized? Take a "
            "checkpoint whose tower is not"
        )
    return model
