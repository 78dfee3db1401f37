"""What the checkpoints have of the families whose images Quire's vision transformer computes, made tiny."""

from dataclasses import dataclass, field
from typing import Any

from families import FAMILIES

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
LOUD = {"initializer_range": 0.1}  # of towers, for pictures to be seen in the logits
SMALL = {"image_size": 32, "patch_size": 8}
PIXTRAL = TOWER | LOUD | {"model_type": "pixtral", "head_dim": 16, "image_size": 96, "patch_size": 8}
CLIP = TOWER | LOUD | SMALL | {"model_type": "clip_vision_model", "projection_dim": 32}
SIGLIP = TOWER | LOUD | {"image_size": 64, "patch_size": 8}
QWEN = LOUD | {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 14,
}
_QWEN3 = QWEN | {"patch_size": 16, "num_position_embeddings": 64}
_GLM = QWEN | {"image_size": 112, "spatial_merge_size": 2}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
_MROPE = {"rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}}
_INTERLEAVED = {"head_dim": 32, "rope_parameters": ROPE | {"mrope_section": [6, 5, 5], "mrope_interleaved": True}}
_PARTIAL = {
    "rope_parameters": ROPE | {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.25}
}
_GLM_ROPE = {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True}
CHATML = ("<|im_start|>", "<|im_end|>")
QWEN_TOKENS = {
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
IMAGENET = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
OPENAI = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
DONE = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}


def template_of(before: str, image: str, after: str, end: str, *, first: str = "") -> str:
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


def chatml(image: str) -> str:
    return template_of("{{ '<|im_start|>' + role + '\\n' }}", image, "{{ '<|im_end|>\\n' }}", "<|im_start|>assistant\n")


QWEN_TEMPLATE = chatml("<|vision_start|><|image_pad|><|vision_end|>")
_INST = template_of(
    "{{ '[INST]' if role == 'user' else '' }}",
    "[IMG]",
    "{{ '[/INST]' if role == 'user' else eos_token }}",
    "",
    first="{{ bos_token }}",
)
_IDEFICS = template_of(
    "{{ role | capitalize }}{{ ':' if message.content[0].type == 'image' else ': ' }}",
    "<image>",
    "{{ '<end_of_utterance>\\n' }}",
    "Assistant:",
    first="<|im_start|>",
)
_GLM_TEMPLATE = template_of(
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


def qwen_files(processor: str, patch: int, kind: str = "Qwen2VLImageProcessor", **more: Any) -> dict[str, Any]:
    pixels = {"min_pixels": 4 * (2 * patch) ** 2, "max_pixels": 36 * (2 * patch) ** 2}
    size = {"shortest_edge": pixels["min_pixels"], "longest_edge": pixels["max_pixels"]}
    return {
        "preprocessor_config.json": DONE
        | OPENAI
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
        tokens=QWEN_TOKENS,
        files=qwen_files("Qwen3VLProcessor", 16, "Qwen2VLImageProcessorFast", **IMAGENET),
        template=QWEN_TEMPLATE,
        added=CHATML,
    )


def files_of(processor: str, of_images: dict[str, Any], **of_both: Any) -> dict[str, dict[str, Any]]:
    return {
        "preprocessor_config.json": {"processor_class": processor} | DONE | of_images,
        "processor_config.json": {"processor_class": processor} | of_both,
    }


def _pixtral_files(merge: int) -> dict[str, dict[str, Any]]:
    side = {"height": 8, "width": 8}
    return files_of(
        "PixtralProcessor",
        OPENAI
        | {"image_processor_type": "PixtralImageProcessor", "patch_size": side, "size": {"longest_edge": 64 * merge}},
        image_token="[IMG]",
        image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]",
        patch_size=8,
        spatial_merge_size=merge,
    )


def llava_files(processor: str, of_images: dict[str, Any], strategy: str, **more: Any) -> dict[str, dict[str, Any]]:
    return files_of(processor, of_images, image_token="<image>", vision_feature_select_strategy=strategy, **more)


def _tiled_files(processor: str, kind: str) -> dict[str, dict[str, Any]]:
    return files_of(
        processor,
        IMAGENET
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


PINPOINTS = [[32, 64], [64, 32], [64, 64]]
CROPPED = OPENAI | {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
SLIDING = {"use_sliding_window": False}
NATIVE: dict[str, Vlm] = {
    "qwen2_vl": Vlm(
        "Qwen2VLConfig",
        text=_MROPE,
        vision=LOUD
        | {"embed_dim": 32, "hidden_size": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14},
        tokens=QWEN_TOKENS,
        files=qwen_files("Qwen2VLProcessor", 14),
        template=QWEN_TEMPLATE,
        added=CHATML,
    ),
    "qwen2_5_vl": Vlm(
        "Qwen2_5_VLConfig",
        text=_MROPE,
        vision=QWEN | {"window_size": 56, "fullatt_block_indexes": [1]},
        tokens=QWEN_TOKENS,
        files=qwen_files("Qwen2_5_VLProcessor", 14),
        template=QWEN_TEMPLATE,
        added=CHATML,
    ),
    "qwen3_vl": _qwen3("Qwen3VLConfig", _INTERLEAVED, deepstack_visual_indexes=[0, 2]),
    "qwen3_vl_moe": _qwen3("Qwen3VLMoeConfig", _INTERLEAVED | _EXPERTS, deepstack_visual_indexes=[0, 2]),
    "qwen3_5": _qwen3("Qwen3_5Config", FAMILIES["qwen3_5"].facts | _PARTIAL | {"initializer_range": 0.045}),
    "qwen3_5_moe": _qwen3("Qwen3_5MoeConfig", FAMILIES["qwen3_5_moe"].facts | _PARTIAL | {"initializer_range": 0.045}),
    "gemma3": Vlm(
        "Gemma3Config",
        text=FAMILIES["gemma3"].facts,
        vision=SIGLIP | {"vision_use_head": False},
        tokens={"image_token_index": "<image_soft_token>"},
        named={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        files=files_of(
            "Gemma3Processor",
            IMAGENET
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
        template=template_of(
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
        vision=PIXTRAL,
        tokens={"image_token_index": "[IMG]"},
        files=_pixtral_files(2),
        template=_INST,
        whole={"spatial_merge_size": 2, "vision_feature_layer": -1},
        added=("[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"),
    ),
    "pixtral": Vlm(
        "LlavaConfig",
        text={"model_type": "mistral", "head_dim": 32, "sliding_window": None},
        vision=PIXTRAL,
        tokens={"image_token_index": "[IMG]"},
        files=_pixtral_files(1),
        template=_INST,
        whole={"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        added=("[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"),
    ),
    "llava": Vlm(
        "LlavaConfig",
        text={"model_type": "llama"},
        vision=CLIP,
        tokens={"image_token_index": "<image>"},
        files=llava_files(
            "LlavaProcessor",
            CROPPED | {"image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True},
            "default",
            patch_size=8,
            num_additional_image_tokens=1,
        ),
        template=template_of("{{ role | upper + ': ' }}", "<image>\n", "{{ ' ' }}", "ASSISTANT:"),
        whole={"image_seq_length": 16},
    ),
    "llava_next": Vlm(
        "LlavaNextConfig",
        text={"model_type": "mistral", "sliding_window": None},
        vision=CLIP,
        tokens={"image_token_index": "<image>"},
        files=llava_files(
            "LlavaNextProcessor",
            CROPPED
            | {
                "image_processor_type": "LlavaNextImageProcessor",
                "image_grid_pinpoints": PINPOINTS,
                "do_convert_rgb": True,
            },
            "default",
            patch_size=8,
            num_additional_image_tokens=1,
        ),
        template=template_of(
            "{{ '[INST] ' if role == 'user' else '' }}", "<image>\n", "{{ ' [/INST]' if role == 'user' }}", ""
        ),
        whole={"image_grid_pinpoints": PINPOINTS, "image_seq_length": 16},
    ),
    "llava_onevision": Vlm(
        "LlavaOnevisionConfig",
        text={"model_type": "qwen2"} | SLIDING,
        vision=SIGLIP | {"model_type": "siglip_vision_model", "image_size": 32, "vision_use_head": False},
        tokens={"image_token_index": "<image>", "video_token_index": "<video>"},
        files=llava_files(
            "LlavaOnevisionProcessor",
            IMAGENET
            | {
                "image_processor_type": "LlavaOnevisionImageProcessor",
                "image_grid_pinpoints": PINPOINTS,
                "size": {"height": 32, "width": 32},
                "do_pad": True,
                "do_convert_rgb": True,
            },
            "full",
            num_image_tokens=16,
            vision_aspect_ratio="anyres_max_9",
            video_token="<video>",
        ),
        template=chatml("<image>\n"),
        whole={"image_grid_pinpoints": PINPOINTS},
        added=CHATML,
    ),
    "idefics3": Vlm(
        "Idefics3Config",
        text={"model_type": "llama"},
        vision=TOWER | LOUD | SMALL,
        tokens={"image_token_id": "<image>"},
        files=_tiled_files("Idefics3Processor", "Idefics3ImageProcessor"),
        template=_IDEFICS,
        added=("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<|im_start|>", *_TILES),
    ),
    "smolvlm": Vlm(
        "SmolVLMConfig",
        text={"model_type": "llama"},
        vision=TOWER | LOUD | SMALL,
        tokens={"image_token_id": "<image>"},
        files=_tiled_files("SmolVLMProcessor", "SmolVLMImageProcessor"),
        template=_IDEFICS,
        added=("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<|im_start|>", *_TILES),
    ),
    "internvl": Vlm(
        "InternVLConfig",
        text={"model_type": "qwen2"} | SLIDING,
        vision=TOWER | LOUD | {"image_size": [32, 32], "patch_size": [8, 8]},
        tokens={"image_token_id": "<IMG_CONTEXT>"},
        named={
            "context_image_token": "<IMG_CONTEXT>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<video>",
        },
        files=files_of(
            "InternVLProcessor",
            OPENAI
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
        template=chatml("<IMG_CONTEXT>\n"),
        whole={"image_seq_length": 4, "downsample_ratio": 0.5},
        added=CHATML,
    ),
    "glm4v": Vlm(
        "Glm4vConfig",
        text=_GLM_ROPE | {"initializer_range": 0.15},
        vision=_GLM,
        tokens=_GLM_TOKENS,
        files=qwen_files("Glm4vProcessor", 14, "Glm4vImageProcessor"),
        template=_GLM_TEMPLATE,
        added=("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"),
    ),
    "glm4v_moe": Vlm(
        "Glm4vMoeConfig",
        text=FAMILIES["glm4_moe"].facts | {"head_dim": 16, "initializer_range": 0.15} | _GLM_ROPE,
        vision=_GLM,
        tokens=_GLM_TOKENS,
        files=qwen_files("Glm4vProcessor", 14, "Glm4vImageProcessor"),
        template=_GLM_TEMPLATE,
        added=("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"),
    ),
}
