"""Models of images and text, of which the text part is served: one of the decoder's families under other names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quire_engine.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """Where it lies in a checkpoint."""

    architecture: str
    moved: tuple[tuple[str, str], ...]  # beginnings of its tensors' names, and what they are here
    others: tuple[str, ...]  # beginnings of the names of everything else

    def renamed(self, name: str) -> str:
        """A tensor's name in this checkpoint."""
        for usual, here in self.moved:
            if name.startswith(usual):
                return here + name.removeprefix(usual)
        return name


def _beside(architecture: str) -> TextPart:
    """A whole language model beside a vision tower."""
    moved = (("model.", "language_model.model."), ("lm_head", "language_model.lm_head"))
    return TextPart(architecture=architecture, moved=moved, others=("vision_tower.", "multi_modal_projector."))


def _inside(architecture: str) -> TextPart:
    """Its layers are in the same model as the visual ones."""
    moved = (("model.", "model.language_model."),)
    return TextPart(architecture=architecture, moved=moved, others=("model.visual.",))


TEXT_PARTS: dict[str, TextPart] = {
    "Gemma3ForConditionalGeneration": _beside("Gemma3ForCausalLM"),
    "Mistral3ForConditionalGeneration": _beside("MistralForCausalLM"),
    "Qwen2_5_VLForConditionalGeneration": TextPart(architecture="Qwen2ForCausalLM", moved=(), others=("visual.",)),
    "Qwen3VLForConditionalGeneration": _inside("Qwen3ForCausalLM"),
    "Qwen3_5ForConditionalGeneration": _inside("Qwen3_5ForCausalLM"),
    "Qwen3_5MoeForConditionalGeneration": _inside("Qwen3_5MoeForCausalLM"),
}
_OF_THE_WHOLE = ("quantization_config", "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "tie_word_embeddings")


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text part's config, where there is one to be served, with what it leaves to transformers' defaults; else the
    config itself. `text_part_of` says of which architecture. Raises ModelError for one that transformers does not
    read."""
    name = next((name for name in config.get("architectures") or [] if name in TEXT_PARTS), None)
    if name is None:
        return dict(config)
    from transformers import CONFIG_MAPPING

    text = dict(config.get("text_config") or config)  # Qwen2.5-VL's published configs have no part of their own
    kind = text.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ModelError(f"text_config has model_type {kind!r}, which transformers does not know")
    try:
        whole = CONFIG_MAPPING[kind](**text).to_dict()
    except (ValueError, TypeError) as error:
        raise ModelError(f"text_config of {name} is not one of {kind}: {error}") from error
    whole = whole.get("text_config") or whole
    kept = {key: config[key] for key in _OF_THE_WHOLE if config.get(key) is not None}
    return whole | kept | {"architectures": [TEXT_PARTS[name].architecture], "text_part_of": name}
