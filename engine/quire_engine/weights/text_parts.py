"""Models of images and text: which family of the decoder's their text part is, and what else a checkpoint holds."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

# Where a text part may lie: its model, and its output head. The first one is also that of a text model by itself.
PLACES = (
    ("model", "lm_head"),
    ("model.language_model", "lm_head"),
    ("language_model.model", "language_model.lm_head"),
    ("model.text_model", "lm_head"),
)


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """What is known of an architecture."""

    family: str | None = None  # its text's architecture; None: what the text's model type has for language models
    vision: tuple[str, ...]  # how names of all other tensors begin; newer checkpoints have "model." before it
    fixed: Mapping[str, Any] = field(default_factory=dict)  # fields of the family that this one's code does not read
    sections: tuple[int, int, int] | None = None  # of M-RoPE, where a config has none; None: positions are numbers
    sections_interleaved: bool = False
    bidirectional_images: bool = False  # tokens of an image see all of it

    @property
    def others(self) -> tuple[str, ...]:
        """Beginnings of the names of all tensors that are not the text's."""
        return (*self.vision, *(f"model.{name}" for name in self.vision))


_LLAVA = ("vision_tower.", "multi_modal_projector.")
_IDEFICS = TextPart(vision=("vision_model.", "connector."))
_QWEN2_VL = TextPart(family="Qwen2ForCausalLM", vision=("visual.",), sections=(16, 24, 24))


def _qwen3(family: str, sections: tuple[int, int, int], **fixed: Any) -> TextPart:
    return TextPart(family=family, vision=("visual.",), fixed=fixed, sections=sections, sections_interleaved=True)


def _glm(family: str, **fixed: Any) -> TextPart:
    return TextPart(family=family, vision=("visual.",), fixed=fixed, sections=(8, 12, 12))


TEXT_PARTS: dict[str, TextPart] = {
    "DeepseekVLForConditionalGeneration": TextPart(vision=("vision_model.", "aligner.")),
    "Exaone4_5_ForConditionalGeneration": TextPart(vision=("visual.",)),
    "Gemma3ForConditionalGeneration": TextPart(
        family="Gemma3ForCausalLM", vision=_LLAVA, fixed={"final_logit_softcapping": None}, bidirectional_images=True
    ),
    "Glm4vForConditionalGeneration": _glm("Glm4ForCausalLM", attention_bias=True),
    "Glm4vMoeForConditionalGeneration": _glm("Glm4MoeForCausalLM", use_qk_norm=False),
    "Idefics3ForConditionalGeneration": _IDEFICS,
    "InternVLForConditionalGeneration": TextPart(vision=_LLAVA),
    "LightOnOcrForConditionalGeneration": TextPart(vision=("vision_encoder.", "vision_projection.")),
    "LlavaForConditionalGeneration": TextPart(vision=_LLAVA),
    "LlavaNextForConditionalGeneration": TextPart(vision=(*_LLAVA, "image_newline")),
    "LlavaOnevisionForConditionalGeneration": TextPart(vision=(*_LLAVA, "image_newline")),
    "Mistral3ForConditionalGeneration": TextPart(vision=_LLAVA),
    "Qwen2VLForConditionalGeneration": _QWEN2_VL,
    "Qwen2_5_VLForConditionalGeneration": _QWEN2_VL,
    "Qwen3VLForConditionalGeneration": _qwen3("Qwen3ForCausalLM", (24, 20, 20)),
    "Qwen3VLMoeForConditionalGeneration": _qwen3("Qwen3MoeForCausalLM", (24, 20, 20), norm_topk_prob=True),
    "Qwen3_5ForConditionalGeneration": _qwen3("Qwen3_5ForCausalLM", (11, 11, 10)),
    "Qwen3_5MoeForConditionalGeneration": _qwen3("Qwen3_5MoeForCausalLM", (11, 11, 10)),
    "SmolVLMForConditionalGeneration": _IDEFICS,
    "VideoLlama3ForConditionalGeneration": TextPart(vision=("vision_model.", "projector.")),
    "VipLlavaForConditionalGeneration": TextPart(vision=_LLAVA),
}


def place_of(names: Collection[str]) -> tuple[str, str] | None:
    """Where a checkpoint with tensors of these names has its layers; None: in none of the places."""
    for model, head in PLACES:
        if any(name.startswith(f"{model}.layers.") for name in names):
            return model, head
    return None


def takes_images(config: Mapping[str, Any]) -> bool:
    """Whether a config that is made whole is that of a model of images and text."""
    return "text_part_of" in config
