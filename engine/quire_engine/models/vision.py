"""The visual half of a model of images and text: the towers of vit.py, or else transformers' own tower and projector,
without its language model.

Each rank has a whole one; what it makes of an image takes the place of the image's tokens in the decoder's input.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from quire_engine.errors import ModelError
from quire_engine.models.vit import Features, Vit
from quire_engine.models.vit_facts import vit_spec
from quire_engine.weights.random import RandomWeights
from quire_engine.weights.tensors import LazyTensor, SafetensorsCheckpoint, TensorReader, Weights


class VisionTower(Protocol):
    """Pixels to embeddings."""

    dtype: torch.dtype
    num_parameters: int
    weight_bytes: int

    def encode(self, inputs: Mapping[str, np.ndarray]) -> Features:
        """One image, as its processor gives it."""

    def activation_bytes(self, tokens: int) -> int:
        """About what encoding an image of so many tokens takes beside the weights, rather more than less."""


def vision_tower(
    config: Mapping[str, Any], folder: Path | None, dtype: torch.dtype, device: torch.device
) -> VisionTower:
    """`config`: all of config.json. Weights are read from `folder`; without it they are random (on the meta device:
    shapes alone). Raises ModelError."""
    made = whole_config(config)
    spec = vit_spec(made)
    if spec is None:
        return TransformersTower(made, folder, dtype, device)
    weights: Weights = RandomWeights(dtype, device)
    if folder is not None:
        weights = TensorReader(_TowerCheckpoint(SafetensorsCheckpoint(folder)), dtype, device)
    return Vit(spec, weights, partial(_patches, made))


class _TowerCheckpoint:
    """A checkpoint's tensors under the names that they have in transformers now. Raises ModelError for quantized ones
    of a tower."""

    def __init__(self, checkpoint: SafetensorsCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._old = {f"model.{_now(name.removeprefix('model.'))}": name for name in checkpoint.names()}

    def names(self) -> list[str]:
        return list(self._old)

    def tensor(self, name: str) -> LazyTensor:
        there = [name]
        if name not in self._old:  # packed weights have names of their own
            there = [other for other in self._old if other.startswith(name.removesuffix("weight"))]
        for one in there:
            lazy = self._checkpoint.tensor(self._old[one])
            _refuse_quantized(lazy.name, lazy.read(slice(0, 0)))
        return self._checkpoint.tensor(self._old.get(name, name))


def _now(name: str) -> str:
    old = "vision_tower.vision_model."
    return f"vision_tower.{name.removeprefix(old)}" if name.startswith(old) else name


def _refuse_quantized(name: str, tensor: Tensor) -> None:
    if tensor.dtype.itemsize == 1 or tensor.dtype == torch.int32:
        raise ModelError(
            f"tensor {name} is in {tensor.dtype}: the vision tower of this checkpoint is quantized, which is not "
            "served; take one whose tower is in bf16"
        )


class TransformersTower:
    """By transformers' code."""

    def __init__(self, config: Any, folder: Path | None, dtype: torch.dtype, device: torch.device) -> None:
        """`config`: the whole one, as transformers has it."""
        self.device = device
        self.dtype = dtype
        self._config = config
        tower = _without_text(_class_of(self._config))
        try:
            with torch.device("meta"):
                model = tower._from_config(copy.deepcopy(self._config), dtype=dtype, attn_implementation="sdpa")
        except Exception as error:  # others' code, which raises nearly anything where a value is not what it expects
            raise ModelError(
                f"transformers makes no vision tower of vision_config ({type(error).__name__}: {str(error)[:300]}); "
                "correct it"
            ) from error
        if device.type != "meta":
            stored = _random(model, dtype) if folder is None else _stored(model, folder)
            model = _loaded(tower, self._config, stored, dtype)
        self._model = model.to(device).eval().requires_grad_(False).model
        self.num_parameters = sum(parameter.numel() for parameter in self._model.parameters())
        self.weight_bytes = sum(
            tensor.numel() * tensor.element_size() for tensor in (*self._model.parameters(), *self._model.buffers())
        )

    @torch.no_grad()
    def encode(self, inputs: Mapping[str, np.ndarray]) -> Features:
        """One image, as its processor gives it."""
        tensors = {name: self._tensor(value) for name, value in inputs.items()}
        out = self._model.get_image_features(**tensors, return_dict=True)
        deepstack = getattr(out, "deepstack_features", None) or ()
        return Features(_joined(out.pooler_output), [_joined(one) for one in deepstack])

    def activation_bytes(self, tokens: int) -> int:
        """About what encoding an image of so many tokens takes beside the weights, rather more than less."""
        vision = self._config.vision_config
        hidden = _first(vision, "embed_dim", "hidden_size")
        inner = _first(vision, "intermediate_size") or int(hidden * vision.mlp_ratio)
        pixels = (
            _first(vision, "num_channels", "in_channels")
            * getattr(vision, "temporal_patch_size", 1)
            * _side(vision.patch_size) ** 2
        )
        # Queries and keys are rotated in fp32; some releases of transformers keep what each layer gives.
        kept = vision.num_hidden_layers if hasattr(self._config, "vision_feature_layer") else 0
        patches = _patches(self._config, tokens)
        total = patches * (3 * pixels + (14 + kept) * hidden + 3 * inner)
        if vision.model_type == "pixtral":  # a mask of each patch with each
            total += 2 * patches**2
        return self._model.dtype.itemsize * total

    def _tensor(self, value: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(value))
        if tensor.is_floating_point():
            return tensor.to(self.device, self._model.dtype)
        return tensor.to(self.device)


def _first(config: Any, *names: str) -> Any:
    """The field that a config has of several names; None where it has none."""
    return next((found for name in names if (found := getattr(config, name, None))), None)


def _side(size: int | Sequence[int]) -> int:
    """Of what is square, and given by one side or by both."""
    return size if isinstance(size, int) else size[0]


def _patches(config: Any, tokens: int) -> int:
    """At most so many are seen for an image of so many tokens."""
    vision = config.vision_config
    if merge := _first(vision, "spatial_merge_size") or _first(config, "spatial_merge_size"):
        return tokens * merge**2
    if scale := _first(config, "scale_factor"):
        return tokens * scale**2
    if ratio := _first(config, "downsample_ratio"):
        return math.ceil(tokens / ratio**2)
    if not hasattr(vision, "image_size") or vision.model_type == "pixtral":
        return tokens
    tile = (_side(vision.image_size) // _side(vision.patch_size)) ** 2 + 1
    if pinpoints := _first(config, "image_grid_pinpoints"):  # of a tile's edges some are cut off afterwards
        return tile * (1 + max(height * width for height, width in pinpoints) // _side(vision.image_size) ** 2)
    each = _first(config, "mm_tokens_per_image") or tokens
    return tile * math.ceil(tokens / each)


def _joined(features: Any) -> Tensor:
    """What families give as a tensor or as several, each [..., hidden]."""
    parts = [features] if isinstance(features, Tensor) else list(features)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def whole_config(config: Mapping[str, Any]) -> Any:
    """All of config.json as transformers has it. Raises ModelError."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
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


def _random(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same on every rank."""
    weights = RandomWeights(dtype, torch.device("cpu"))
    return {name: weights.take(name, tuple(there.shape)) for name, there in model.state_dict().items()}


def _stored(model: Any, folder: Path) -> dict[str, Tensor]:
    """The tower's tensors in a checkpoint, under whatever names, still in the mapped files. Raises ModelError where
    they are quantized."""
    parts = tuple({name.split(".")[1] for name in model.state_dict()})
    checkpoint = SafetensorsCheckpoint(folder)
    found: dict[str, Tensor] = {}
    for name in checkpoint.names():
        if name.removeprefix("model.").startswith(parts):
            found[name] = checkpoint.tensor(name).read()
            _refuse_quantized(name, found[name])
    return found


def _loaded(tower: Any, config: Any, stored: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """On the CPU, by transformers, which knows the names that other checkpoints have."""
    with _quiet():
        model, info = tower.from_pretrained(
            None,
            config=config,
            state_dict=stored,
            dtype=dtype,
            attn_implementation="sdpa",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    for name, there, asked in sorted(info["mismatched_keys"]):
        raise ModelError(
            f"tensor {name} has shape {list(there)}, the config asks for {list(asked)}; config and weights do not "
            "belong together"
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"the checkpoint has no tensor {missing[0]}; is it complete?")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bar, and its table of what it found wrong, which becomes an error here."""
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
