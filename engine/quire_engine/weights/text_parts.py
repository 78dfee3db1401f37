"""Models of images and text, of which the text part is served: one of the decoder's families under other names."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """Where it lies in a checkpoint."""

    architecture: str
    moved: tuple[tuple[str, str], ...]  # beginnings of its tensors' names, and what they are here
    others: tuple[str, ...]  # beginnings of the names of everything else
    sections: tuple[int, int, int] | None = None  # of its rope, where a config has none; None: positions are numbers
    sections_interleaved: bool = False
    bidirectional_images: bool = False  # tokens of an image that follow one another see all of them

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


def _inside(architecture: str, sections: tuple[int, int, int]) -> TextPart:
    """Its layers are in the same model as the visual ones."""
    moved = (("model.", "model.language_model."),)
    return TextPart(
        architecture=architecture,
        moved=moved,
        others=("model.visual.",),
        sections=sections,
        sections_interleaved=True,
    )


TEXT_PARTS: dict[str, TextPart] = {
    "Gemma3ForConditionalGeneration": replace(_beside("Gemma3ForCausalLM"), bidirectional_images=True),
    "Mistral3ForConditionalGeneration": _beside("MistralForCausalLM"),
    "Qwen2_5_VLForConditionalGeneration": TextPart(
        architecture="Qwen2ForCausalLM", moved=(), others=("visual.",), sections=(16, 24, 24)
    ),
    "Qwen3VLForConditionalGeneration": _inside("Qwen3ForCausalLM", (24, 20, 20)),
    "Qwen3_5ForConditionalGeneration": _inside("Qwen3_5ForCausalLM", (11, 11, 10)),
    "Qwen3_5MoeForConditionalGeneration": _inside("Qwen3_5MoeForCausalLM", (11, 11, 10)),
}


def takes_images(config: Mapping[str, Any]) -> bool:
    """Whether a config that is made whole is that of a model of images and text."""
    return "text_part_of" in config
