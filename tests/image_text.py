"""Tiny models of images and text, each random, of its own class in transformers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import add_tokenizer
from families import FAMILIES, TINY
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
_QWEN = {"hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64, "depth": 1}
_QWEN2 = {"embed_dim": 32, "hidden_size": 64, "num_heads": 2, "depth": 1, "mlp_ratio": 1}
_QWEN3 = _QWEN | {"deepstack_visual_indexes": [0]}


@dataclass(frozen=True)
class Whole:
    """What the configs of its text and of the rest say, the text's beyond TINY and its family's; with fields that the
    family reads and the whole's code does not."""

    architecture: str
    config: str
    family: str
    text: dict[str, Any]
    vision: dict[str, Any]
    sections: tuple[int, int, int] | None = None


def _llava(name: str, family: str, tower: str, **vision: Any) -> Whole:
    """The text's model type says what it is."""
    kind = {"model_type": tower} if tower else {}
    return Whole(
        f"{name}ForConditionalGeneration", f"{name}Config", family, {"model_type": family}, _TOWER | kind | vision
    )


def _three(
    name: str, family: str, vision: dict[str, Any], sections: tuple[int, int, int], partial: float = 0, **text: Any
) -> Whole:
    """Its tokens have three positions."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}
    rope |= {"partial_rotary_factor": partial} if partial else {}
    text = {"rope_parameters": rope} | text
    return Whole(f"{name}ForConditionalGeneration", f"{name}Config", family, text, vision, sections)


WHOLE: dict[str, Whole] = {
    "deepseek_vl": _llava("DeepseekVL", "llama", "siglip_vision_model"),
    "exaone4_5": Whole(
        "Exaone4_5_ForConditionalGeneration", "Exaone4_5_Config", "exaone4", {"model_type": "exaone4"}, _QWEN
    ),
    "gemma3": Whole(
        "Gemma3ForConditionalGeneration", "Gemma3Config", "gemma3", {"final_logit_softcapping": 3.0}, _TOWER
    ),
    "glm4v": _three("Glm4v", "glm4", _QWEN, (1, 1, 2), 0.5, head_dim=16, attention_bias=False),
    "glm4v_moe": _three("Glm4vMoe", "glm4_moe", _QWEN, (2, 3, 3), 0.5, use_qk_norm=True),
    "idefics3": _llava("Idefics3", "llama", ""),
    "internvl": _llava("InternVL", "qwen2", ""),
    "internvl_qwen3": _llava("InternVL", "qwen3", ""),
    "internvl_qwen3_moe": _llava("InternVL", "qwen3_moe", ""),
    "internvl_gpt_oss": _llava("InternVL", "gpt_oss", ""),
    "lighton_ocr": _llava("LightOnOcr", "qwen3", "pixtral"),
    "llava": _llava("Llava", "llama", "clip_vision_model"),
    "llava_next": _llava("LlavaNext", "mistral", "clip_vision_model"),
    "llava_onevision": _llava("LlavaOnevision", "qwen2", "siglip_vision_model"),
    "llava_qwen2": _llava("Llava", "qwen2", "siglip_vision_model"),
    "mistral3": _llava("Mistral3", "mistral", "pixtral", head_dim=16),
    "mistral3_ministral3": _llava("Mistral3", "ministral3", "pixtral"),
    "pixtral": _llava("Llava", "mistral", "pixtral", head_dim=16),
    "qwen2_vl": _three("Qwen2VL", "qwen2", _QWEN2, (2, 3, 3), use_sliding_window=False),
    "qwen2_5_vl": _three("Qwen2_5_VL", "qwen2", _QWEN, (2, 3, 3)),
    "qwen3_vl": _three("Qwen3VL", "qwen3", _QWEN3, (3, 3, 2), head_dim=16),
    "qwen3_vl_moe": _three("Qwen3VLMoe", "qwen3_moe", _QWEN3, (6, 5, 5), norm_topk_prob=False),
    "qwen3_5": _three("Qwen3_5", "qwen3_5", _QWEN, (2, 1, 1), 0.25),
    "qwen3_5_moe": _three("Qwen3_5Moe", "qwen3_5_moe", _QWEN, (2, 1, 1), 0.25),
    "smolvlm": _llava("SmolVLM", "llama", ""),
    "video_llama_3": _llava("VideoLlama3", "qwen2", ""),
    "vipllava": _llava("VipLlava", "llama", "clip_vision_model"),
}


def whole_config(name: str) -> Any:
    """Of transformers' class."""
    whole = WHOLE[name]
    text = TINY | FAMILIES[whole.family].facts | whole.text
    return getattr(transformers, whole.config)(text_config=text, vision_config=whole.vision)


def whole_model(name: str, folder: Path, *, renamed: bool = False) -> Any:
    """A random one, saved as it is published or, `renamed`, with the names that its tensors have in transformers."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(whole_config(name), dtype=torch.float32).eval()
    model.save_pretrained(folder)
    if renamed:
        tensors = {key: tensor.clone().contiguous() for key, tensor in model.state_dict().items()}
        for tied in model._tied_weights_keys if model.config.tie_word_embeddings else ():
            del tensors[tied]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    add_tokenizer(folder, TINY["vocab_size"])
    return model
