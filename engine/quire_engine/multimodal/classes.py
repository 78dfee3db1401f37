"""transformers' classes of processors, of which only the half for images is used.

Their other half asks for packages that images do without: torchvision, and one that spells numbers.
"""

import importlib
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from quire_engine.errors import ModelError

_PIXTRAL = "transformers.models.pixtral"
_SMOLVLM = "transformers.models.smolvlm.processing_smolvlm"


def class_of(named: list[Any], config: Mapping[str, Any]) -> Any:
    """The first class of those that a checkpoint names which transformers has, or else its family's. Raises
    ModelError where there is none."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    kind = config.get("model_type")
    usual = PROCESSOR_MAPPING_NAMES.get(kind) if isinstance(kind, str) else None
    for name in (*named, usual):
        if isinstance(name, str) and (found := _found(name)) is not None:
            return found
    raise ModelError(f"transformers has no processor for model_type {kind!r:.80}; take another model for images")


@lru_cache
def _found(name: str) -> Any:
    from transformers.models.auto.processing_auto import processor_class_from_name
    from transformers.utils import is_torchvision_available

    if name == "PixtralProcessor" and not is_torchvision_available():
        return _pixtral()
    found = processor_class_from_name(name)
    if name == "SmolVLMProcessor":
        module: Any = importlib.import_module(_SMOLVLM)
        module.num2words = module.num2words or _spelled
    return found


def _pixtral() -> Any:
    """Its file imports a function from its image processor for torchvision, of which the one for Pillow has a copy."""
    name = f"{_PIXTRAL}.image_processing_pixtral"
    sys.modules[name] = importlib.import_module(f"{_PIXTRAL}.image_processing_pil_pixtral")
    try:
        return importlib.import_module(f"{_PIXTRAL}.processing_pixtral").PixtralProcessor
    finally:
        del sys.modules[name]


def _spelled(number: int) -> str:
    """In place of num2words, with which SmolVLM's processor tells how long a video is: never called for an image."""
    raise NotImplementedError("videos are not served")


def without_others(kind: Any) -> Any:
    """The class with no other parts than those for images and text: transformers' video processors want torchvision."""
    parts = [name for name in kind.get_attributes() if name in ("image_processor", "tokenizer")]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: parts)})
