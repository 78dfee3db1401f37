"""Tiny models of images and text, each with a random checkpoint, processor files and a chat template as its family's
published ones, and pictures to show them."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, TINY
from PIL import Image, ImageDraw

SIZE = 352  # of the vocabulary: all bytes, and what the families add
_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_LOUD = {"initializer_range": 0.1}  # of towers, for pictures to be seen in the logits
_SMALL = {"image_size": 32, "patch_size": 8}
_PIXTRAL = _TOWER | _LOUD | {"model_type": "pixtral", "head_dim": 16, "image_size": 96, "patch_size": 8}
_CLIP = _TOWER | _LOUD | _SMALL | {"model_type": "clip_vision_model", "projection_dim": 32}
_SIGLIP = _TOWER | _LOUD | {"image_size": 64, "patch_size": 8}
_QWEN = _LOUD | {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 14,
}
_QWEN3 = _QWEN | {"patch_size": 16, "num_position_embeddings": 64}
_GLM = _QWEN | {"image_size": 112, "spatial_merge_size": 2}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_MROPE = {"rope_parameters": _ROPE | {"mrope_section": [2, 3, 3]}}
_INTERLEAVED = {"head_dim": 32, "rope_parameters": _ROPE | {"mrope_section": [6, 5, 5], "mrope_interleaved": True}}
_PARTIAL = {
    "rope_parameters": _ROPE | {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.25}
}
_GLM_ROPE = {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True}
_CHATML = ("<|im_start|>", "<|im_end|>")
_QWEN_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
_GLM_TOKENS = {
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}
_TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
_IMAGENET = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_OPENAI = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_DONE = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}


def _template(before: str, image: str, after: str, end: str, *, first: str = "") -> str:
    """Of one form: what stands before a turn (of `role`), in an image's place, after the turn, before an answer;
    `before`, `after` and `first` in Jinja."""
    return (
        first
        + "{%- for message in messages %}{% set role = message.role %}"
        + before
        + "{%- if message.content is string %}{{ message.content }}{% else %}"
        + "{%- for part in message.content %}"
        + "{%- if part.type == 'image' %}{{ "
        + repr(image)
        + " }}"
        + "{%- elif part.type == 'text' %}{{ part.text }}{% endif %}"
        + "{%- endfor %}{% endif %}"
        + after
        + "{% endfor %}"
        + "{%- if add_generation_prompt %}{{ "
        + repr(end)
        + " }}{% endif %}"
    )


def _chatml(image: str) -> str:
    return _template("{{ '<|im_start|>' + role + '\\n' }}", image, "{{ '<|im_end|>\\n' }}", "<|im_start|>assistant\n")


_QWEN_TEMPLATE = _chatml("<|vision_start|><|image_pad|><|vision_end|>")
_INST = _template(
    "{{ '[INST]' if role == 'user' else '' }}",
    "[IMG]",
    "{{ '[/INST]' if role == 'user' else eos_token }}",
    "",
    first="{{ bos_token }}",
)
_IDEFICS = _template(
    "{{ role | capitalize }}{{ ':' if message.content[0].type == 'image' else ': ' }}",
    "<image>",
    "{{ '<end_of_utterance>\\n' }}",
    "Assistant:",
    first="<|im_start|>",
)
_GLM_TEMPLATE = _template(
    "{{ '<|' + role + '|>\\n' }}",
    "<|begin_of_image|><|image|><|end_of_image|>",
    "",
    "<|assistant|>\n",
    first="[gMASK]<sop>",
)


@dataclass(frozen=True)
class Vlm:
    """What one family's checkpoints have."""

    config: str  # its class in transformers
    text: dict[str, Any]
    vision: dict[str, Any]
    tokens: dict[str, str]  # field of the config → spelling of the token that it names
    files: dict[str, dict[str, Any]]  # of the processor, by name
    template: str
    whole: dict[str, Any] = field(default_factory=dict)  # more fields of the config
    added: tuple[str, ...] = ()  # more special tokens
    named: dict[str, str] = field(default_factory=dict)  # special tokens that the tokenizer itself has names for


def _qwen_files(processor: str, patch: int, kind: str = "Qwen2VLImageProcessor", **more: Any) -> dict[str, Any]:
    pixels = {"min_pixels": 4 * (2 * patch) ** 2, "max_pixels": 36 * (2 * patch) ** 2}
    size = {"shortest_edge": pixels["min_pixels"], "longest_edge": pixels["max_pixels"]}
    return {
        "preprocessor_config.json": _DONE
        | _OPENAI
        | {
            "image_processor_type": kind,
            "processor_class": processor,
            "patch_size": patch,
            "temporal_patch_size": 2,
            "merge_size": 2,
        }
        | (pixels if processor == "Qwen2VLProcessor" else {"size": size})
        | more
    }


def _qwen3(config: str, text: dict[str, Any], **of_vision: Any) -> Vlm:
    return Vlm(
        config,
        text=text,
        vision=_QWEN3 | of_vision,
        tokens=_QWEN_TOKENS,
        files=_qwen_files("Qwen3VLProcessor", 16, "Qwen2VLImageProcessorFast", **_IMAGENET),
        template=_QWEN_TEMPLATE,
        added=_CHATML,
    )


def _files(processor: str, of_images: dict[str, Any], **of_both: Any) -> dict[str, dict[str, Any]]:
    return {
        "preprocessor_config.json": {"processor_class": processor} | _DONE | of_images,
        "processor_config.json": {"processor_class": processor} | of_both,
    }


def _pixtral_files(merge: int) -> dict[str, dict[str, Any]]:
    side = {"height": 8, "width": 8}
    return _files(
        "PixtralProcessor",
        _OPENAI
        | {"image_processor_type": "PixtralImageProcessor", "patch_size": side, "size": {"longest_edge": 64 * merge}},
        image_token="[IMG]",
        image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]",
        patch_size=8,
        spatial_merge_size=merge,
    )


def _llava_files(processor: str, of_images: dict[str, Any], strategy: str, **more: Any) -> dict[str, dict[str, Any]]:
    return _files(processor, of_images, image_token="<image>", vision_feature_select_strategy=strategy, **more)


def _tiled_files(processor: str, kind: str) -> dict[str, dict[str, Any]]:
    return _files(
        processor,
        _IMAGENET
        | {
            "image_processor_type": kind,
            "do_image_splitting": True,
            "do_pad": True,
            "do_convert_rgb": True,
            "resample": 1,
            "size": {"longest_edge": 96},
            "max_image_size": {"longest_edge": 32},
        },
        image_seq_len=4,
    )


_PINPOINTS = [[32, 64], [64, 32], [64, 64]]
_CROPPED = _OPENAI | {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
_SLIDING = {"use_sliding_window": False}
VLMS: dict[str, Vlm] = {
    "qwen2_vl": Vlm(
        "Qwen2VLConfig",
        text=_MROPE,
        vision=_LOUD
        | {"embed_dim": 32, "hidden_size": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14},
        tokens=_QWEN_TOKENS,
        files=_qwen_files("Qwen2VLProcessor", 14),
        template=_QWEN_TEMPLATE,
        added=_CHATML,
    ),
    "qwen2_5_vl": Vlm(
        "Qwen2_5_VLConfig",
        text=_MROPE,
        vision=_QWEN | {"window_size": 56, "fullatt_block_indexes": [1]},
        tokens=_QWEN_TOKENS,
        files=_qwen_files("Qwen2_5_VLProcessor", 14),
        template=_QWEN_TEMPLATE,
        added=_CHATML,
    ),
    "qwen3_vl": _qwen3("Qwen3VLConfig", _INTERLEAVED, deepstack_visual_indexes=[0, 2]),
    "qwen3_vl_moe": _qwen3("Qwen3VLMoeConfig", _INTERLEAVED | _EXPERTS, deepstack_visual_indexes=[0, 2]),
    "qwen3_5": _qwen3("Qwen3_5Config", FAMILIES["qwen3_5"].facts | _PARTIAL | {"initializer_range": 0.045}),
    "qwen3_5_moe": _qwen3("Qwen3_5MoeConfig", FAMILIES["qwen3_5_moe"].facts | _PARTIAL | {"initializer_range": 0.045}),
    "gemma3": Vlm(
        "Gemma3Config",
        text=FAMILIES["gemma3"].facts,
        vision=_SIGLIP | {"vision_use_head": False},
        tokens={"image_token_index": "<image_soft_token>"},
        named={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        files=_files(
            "Gemma3Processor",
            _IMAGENET
            | {
                "image_processor_type": "Gemma3ImageProcessor",
                "do_convert_rgb": None,
                "do_pan_and_scan": None,
                "pan_and_scan_max_num_crops": None,
                "pan_and_scan_min_crop_size": None,
                "pan_and_scan_min_ratio_to_activate": None,
                "image_seq_length": 16,
                "resample": 2,
                "size": {"height": 64, "width": 64},
            },
            image_seq_length=16,
        ),
        template=_template(
            "{{ '<start_of_turn>' + ('model' if role == 'assistant' else role) + '\\n' }}",
            "<start_of_image>",
            "{{ '<end_of_turn>\\n' }}",
            "<start_of_turn>model\n",
            first="{{ bos_token }}",
        ),
        whole={"mm_tokens_per_image": 16},
        added=("<start_of_turn>", "<end_of_turn>"),
    ),
    "mistral3": Vlm(
        "Mistral3Config",
        text={"model_type": "mistral", "head_dim": 32, "sliding_window": None},
        vision=_PIXTRAL,
        tokens={"image_token_index": "[IMG]"},
        files=_pixtral_files(2),
        template=_INST,
        whole={"spatial_merge_size": 2, "vision_feature_layer": -1},
        added=("[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"),
    ),
    "pixtral": Vlm(
        "LlavaConfig",
        text={"model_type": "mistral", "head_dim": 32, "sliding_window": None},
        vision=_PIXTRAL,
        tokens={"image_token_index": "[IMG]"},
        files=_pixtral_files(1),
        template=_INST,
        whole={"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        added=("[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"),
    ),
    "llava": Vlm(
        "LlavaConfig",
        text={"model_type": "llama"},
        vision=_CLIP,
        tokens={"image_token_index": "<image>"},
        files=_llava_files(
            "LlavaProcessor",
            _CROPPED | {"image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True},
            "default",
            patch_size=8,
            num_additional_image_tokens=1,
        ),
        template=_template("{{ role | upper + ': ' }}", "<image>\n", "{{ ' ' }}", "ASSISTANT:"),
        whole={"image_seq_length": 16},
    ),
    "llava_next": Vlm(
        "LlavaNextConfig",
        text={"model_type": "mistral", "sliding_window": None},
        vision=_CLIP,
        tokens={"image_token_index": "<image>"},
        files=_llava_files(
            "LlavaNextProcessor",
            _CROPPED
            | {
                "image_processor_type": "LlavaNextImageProcessor",
                "image_grid_pinpoints": _PINPOINTS,
                "do_convert_rgb": True,
            },
            "default",
            patch_size=8,
            num_additional_image_tokens=1,
        ),
        template=_template(
            "{{ '[INST] ' if role == 'user' else '' }}", "<image>\n", "{{ ' [/INST]' if role == 'user' }}", ""
        ),
        whole={"image_grid_pinpoints": _PINPOINTS, "image_seq_length": 16},
    ),
    "llava_onevision": Vlm(
        "LlavaOnevisionConfig",
        text={"model_type": "qwen2"} | _SLIDING,
        vision=_SIGLIP | {"model_type": "siglip_vision_model", "image_size": 32, "vision_use_head": False},
        tokens={"image_token_index": "<image>", "video_token_index": "<video>"},
        files=_llava_files(
            "LlavaOnevisionProcessor",
            _IMAGENET
            | {
                "image_processor_type": "LlavaOnevisionImageProcessor",
                "image_grid_pinpoints": _PINPOINTS,
                "size": {"height": 32, "width": 32},
                "do_pad": True,
                "do_convert_rgb": True,
            },
            "full",
            num_image_tokens=16,
            vision_aspect_ratio="anyres_max_9",
            video_token="<video>",
        ),
        template=_chatml("<image>\n"),
        whole={"image_grid_pinpoints": _PINPOINTS},
        added=_CHATML,
    ),
    "idefics3": Vlm(
        "Idefics3Config",
        text={"model_type": "llama"},
        vision=_TOWER | _LOUD | _SMALL,
        tokens={"image_token_id": "<image>"},
        files=_tiled_files("Idefics3Processor", "Idefics3ImageProcessor"),
        template=_IDEFICS,
        added=("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<|im_start|>", *_TILES),
    ),
    "smolvlm": Vlm(
        "SmolVLMConfig",
        text={"model_type": "llama"},
        vision=_TOWER | _LOUD | _SMALL,
        tokens={"image_token_id": "<image>"},
        files=_tiled_files("SmolVLMProcessor", "SmolVLMImageProcessor"),
        template=_IDEFICS,
        added=("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<|im_start|>", *_TILES),
    ),
    "internvl": Vlm(
        "InternVLConfig",
        text={"model_type": "qwen2"} | _SLIDING,
        vision=_TOWER | _LOUD | {"image_size": [32, 32], "patch_size": [8, 8]},
        tokens={"image_token_id": "<IMG_CONTEXT>"},
        named={
            "context_image_token": "<IMG_CONTEXT>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<video>",
        },
        files=_files(
            "InternVLProcessor",
            _OPENAI
            | {
                "image_processor_type": "GotOcr2ImageProcessorFast",
                "crop_to_patches": True,
                "min_patches": 1,
                "max_patches": 6,
                "size": {"height": 32, "width": 32},
                "do_convert_rgb": True,
            },
            image_seq_length=4,
        ),
        template=_chatml("<IMG_CONTEXT>\n"),
        whole={"image_seq_length": 4, "downsample_ratio": 0.5},
        added=_CHATML,
    ),
    "glm4v": Vlm(
        "Glm4vConfig",
        text=_GLM_ROPE | {"initializer_range": 0.15},
        vision=_GLM,
        tokens=_GLM_TOKENS,
        files=_qwen_files("Glm4vProcessor", 14, "Glm4vImageProcessor"),
        template=_GLM_TEMPLATE,
        added=("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"),
    ),
    "glm4v_moe": Vlm(
        "Glm4vMoeConfig",
        text=FAMILIES["glm4_moe"].facts | {"head_dim": 16, "initializer_range": 0.15} | _GLM_ROPE,
        vision=_GLM,
        tokens=_GLM_TOKENS,
        files=_qwen_files("Glm4vProcessor", 14, "Glm4vImageProcessor"),
        template=_GLM_TEMPLATE,
        added=("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"),
    ),
}


def make_vlm(name: str, folder: Path) -> Any:
    """The family's tiny model in fp32, saved into `folder` with its tokenizer and processor files."""
    import transformers

    vlm = VLMS[name]
    tokenizer = _tokenizer(vlm)
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in vlm.tokens.items()}
    config = getattr(transformers, vlm.config)(
        text_config=TINY | {"vocab_size": SIZE} | _IDS | vlm.text, vision_config=vlm.vision, **(ids | vlm.whole)
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    _enliven(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file, content in vlm.files.items():
        (folder / file).write_text(json.dumps(content))
    return model


def _enliven(model: torch.nn.Module) -> None:
    """What starts at 0 or 1 must matter too, and a picture must be seen in the logits."""
    for name, parameter in model.named_parameters():
        if name.endswith("mm_input_projection_weight"):  # Gemma 3's starts at 0
            torch.nn.init.normal_(parameter, 0.0, 0.25)
        is_norm = re.search(r"norm|\.ln_|layrnorm", name, re.IGNORECASE) is not None
        if is_norm or name.endswith("bias"):
            torch.nn.init.normal_(parameter, 1.0 if is_norm and name.endswith("weight") else 0.0, 0.2)


def _tokenizer(vlm: Vlm) -> Any:
    """All bytes, then what the family adds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>", *vlm.tokens.values(), *vlm.named.values(), *vlm.added]
    special = list(dict.fromkeys(special))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: place for place, text in enumerate([*special, *letters])}
    assert len(vocabulary) <= SIZE
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=dict(vlm.named),
    )
    fast.chat_template = vlm.template
    return fast


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Shapes on a gradient, the same in every run."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    colours = [draw(0, 256) for _ in range(6)]
    ramp = Image.linear_gradient("L").resize((width, height))
    turned = Image.linear_gradient("L").rotate(90).resize((width, height))
    bands = [
        ramp.point(lambda v, a=a, b=b: a + (b - a) * v // 255) for a, b in zip(colours[:2], colours[2:4], strict=True)
    ]
    image = Image.merge("RGB", [*bands, turned])
    pen = ImageDraw.Draw(image)
    for _ in range(5):
        x, y = draw(0, width), draw(0, height)
        box = (x, y, x + draw(1, width), y + draw(1, height))
        shape: Callable[..., None] = (pen.rectangle, pen.ellipse)[draw(0, 2)]
        shape(box, fill=(draw(0, 256), draw(0, 256), draw(0, 256)))
    return image
