"""What the checkpoints have of more families of images and text, made tiny: those whose images transformers' own code
computes."""

from families import FAMILIES
from vlm_families import (
    CHATML,
    CLIP,
    CROPPED,
    DONE,
    IMAGENET,
    LOUD,
    OPENAI,
    PIXTRAL,
    QWEN,
    QWEN_TEMPLATE,
    QWEN_TOKENS,
    SIGLIP,
    SLIDING,
    TOWER,
    Vlm,
    chatml,
    files_of,
    llava_files,
    qwen_files,
    template_of,
)

OTHERS: dict[str, Vlm] = {
    "deepseek_vl": Vlm(
        "DeepseekVLConfig",
        text={"model_type": "llama"},
        vision=SIGLIP | {"model_type": "siglip_vision_model", "image_size": 32, "vision_use_head": False},
        tokens={"image_token_id": "<image_placeholder>"},
        named={"image_token": "<image_placeholder>"},
        files=files_of(
            "DeepseekVLProcessor",
            IMAGENET
            | {
                "image_processor_type": "DeepseekVLImageProcessor",
                "size": {"height": 32, "width": 32},
                "min_size": 8,
                "do_pad": True,
            },
            num_image_tokens=16,
        ),
        template=template_of(
            "{{ role | capitalize + ': ' }}", "<image_placeholder>", "{{ '\\n\\n' }}", "Assistant:", first="<s>"
        ),
    ),
    "exaone4_5": Vlm(
        "Exaone4_5_Config",
        text=FAMILIES["exaone4"].facts | {"model_type": "exaone4"},
        vision=QWEN | {"window_size": 56, "fullatt_block_indexes": [1], "num_heads": 4, "num_key_value_heads": 2},
        tokens={key: QWEN_TOKENS[key] for key in ("image_token_id", "video_token_id")},
        files=qwen_files("Exaone4_5_Processor", 14),
        template=QWEN_TEMPLATE,
        added=("<|vision_start|>", "<|vision_end|>", *CHATML),
    ),
    "lighton_ocr": Vlm(
        "LightOnOcrConfig",
        text={"model_type": "qwen3", "head_dim": 16} | SLIDING,
        vision=PIXTRAL,
        tokens={"image_token_id": "<|image_pad|>"},
        named={
            "image_token": "<|image_pad|>",
            "image_break_token": "<|vision_pad|>",
            "image_end_token": "<|vision_end|>",
        },
        files=files_of(
            "LightOnOcrProcessor",
            OPENAI
            | {
                "image_processor_type": "PixtralImageProcessor",
                "patch_size": {"height": 16, "width": 16},
                "size": {"longest_edge": 96},
            },
            patch_size=8,
            spatial_merge_size=2,
        ),
        template=chatml("<|image_pad|>"),
        whole={"spatial_merge_size": 2},
        added=CHATML,
    ),
    "video_llama_3": Vlm(
        "VideoLlama3Config",
        text={"model_type": "qwen2"} | SLIDING,
        vision=TOWER | LOUD | {"patch_size": 14},
        tokens={"image_token_id": "<image>", "video_token_id": "<|video_pad|>"},
        named={"image_token": "<image>"},
        files={
            "preprocessor_config.json": DONE
            | IMAGENET
            | {
                "image_processor_type": "VideoLlama3ImageProcessor",
                "processor_class": "VideoLlama3Processor",
                "patch_size": 14,
                "size": {"shortest_edge": 16 * 14**2, "longest_edge": 36 * 14**2},
            }
        },
        template=chatml("<image>\n"),
        added=CHATML,
    ),
    "vipllava": Vlm(
        "VipLlavaConfig",
        text={"model_type": "llama"},
        vision=CLIP | {"num_hidden_layers": 3},
        tokens={"image_token_index": "<image>"},
        files=llava_files(
            "LlavaProcessor",
            CROPPED | {"image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True},
            "default",
            patch_size=8,
            num_additional_image_tokens=1,
        ),
        template=template_of("{{ '###' + role | capitalize + ': ' }}", "<image>\n", "", "###Assistant:"),
        whole={"image_seq_length": 16, "vision_feature_layer": [-2, -3, 1]},
    ),
}
