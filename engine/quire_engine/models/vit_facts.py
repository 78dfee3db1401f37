"""Facts of the families whose images the vision transformer (vit.py) computes.

Tensors are named as transformers names them now.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from quire_engine.models.vit_spec import (
    ACTIVATIONS,
    Activate,
    DropFirst,
    Gated,
    Linear,
    Merge,
    Names,
    Norm,
    Positions,
    Rope,
    Step,
    Tiles,
    VitSpec,
    Windows,
)

_VISUAL = "model.visual"
_TOWER = "model.vision_tower"
_PROJECTOR = "model.multi_modal_projector"
_QWEN = Names(f"{_VISUAL}.blocks", "norm1", ("attn.qkv",), "attn.proj", "norm2", ("mlp.fc1", "mlp.fc2"))
_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def _siglip_names(at: str) -> Names:
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    layers = f"{at}.encoder.layers"
    return Names(layers, "layer_norm1", qkv, "self_attn.out_proj", "layer_norm2", ("mlp.fc1", "mlp.fc2"))


def _qwen(config: Any, hidden: int, inner: int, out: int, *, rms: bool, patch_bias: bool, **more: Any) -> VitSpec:
    """What towers have in common whose pixels come as patches."""
    vision, side = config.vision_config, _side(config.vision_config.patch_size)
    kernel = (_side(vision.temporal_patch_size), side, side)
    pixels = vision.in_channels * kernel[0] * kernel[1] * kernel[2]
    facts: dict[str, Any] = {
        "hidden": hidden,
        "inner": inner,
        "heads": vision.num_heads,
        "activation": vision.hidden_act,
        "eps": 1e-6,
        "rms": rms,
        "names": _QWEN,
        "patch": Linear(f"{_VISUAL}.patch_embed.proj", pixels, hidden, patch_bias, kernel),
        "patch_side": side,
        "block": vision.spatial_merge_size,
        "rope": Rope(vision.rope_parameters["rope_theta"]),
        "features": (vision.depth,),
        "projector": _qwen_merger(f"{_VISUAL}.merger", ("ln_q", "mlp.0", "mlp.2"), hidden, out, vision, rms=rms),
    }
    return VitSpec(**(facts | more))


def _qwen_merger(
    at: str, names: tuple[str, str, str], hidden: int, out: int, vision: Any, *, rms: bool = False, late: bool = False
) -> tuple[Step, ...]:
    """`late`: the norm is that of merged patches."""
    joined = hidden * vision.spatial_merge_size**2
    norm = Norm(f"{at}.{names[0]}", joined if late else hidden, 1e-6, rms)
    merge = Merge(vision.spatial_merge_size, blocks=True)
    first, second = Linear(f"{at}.{names[1]}", joined, joined), Linear(f"{at}.{names[2]}", joined, out)
    return (*((merge, norm) if late else (norm, merge)), first, Activate("gelu"), second)


def _qwen2_vl(config: Any) -> VitSpec:
    vision = config.vision_config
    inner = int(vision.embed_dim * vision.mlp_ratio)
    return _qwen(config, vision.embed_dim, inner, vision.hidden_size, rms=False, patch_bias=False)


def _qwen2_5_vl(config: Any) -> VitSpec:
    vision = config.vision_config
    side = vision.window_size // vision.spatial_merge_size // _side(vision.patch_size)
    return _qwen(
        config,
        vision.hidden_size,
        vision.intermediate_size,
        vision.out_hidden_size,
        rms=True,
        patch_bias=False,
        names=replace(_QWEN, mlp=_GATED),
        windows=Windows(side, frozenset(vision.fullatt_block_indexes)),
    )


def _qwen3(config: Any) -> VitSpec:
    vision = config.vision_config
    hidden, out, names = vision.hidden_size, vision.out_hidden_size, ("norm", "linear_fc1", "linear_fc2")
    deepstack = [
        (layer + 1, _qwen_merger(f"{_VISUAL}.deepstack_merger_list.{i}", names, hidden, out, vision, late=True))
        for i, layer in enumerate(getattr(vision, "deepstack_visual_indexes", ()))
    ]
    return _qwen(
        config,
        hidden,
        vision.intermediate_size,
        out,
        rms=False,
        patch_bias=True,
        names=replace(_QWEN, mlp=("mlp.linear_fc1", "mlp.linear_fc2")),
        positions=Positions(f"{_VISUAL}.pos_embed.weight", int(vision.num_position_embeddings**0.5), "bilinear"),
        projector=_qwen_merger(f"{_VISUAL}.merger", names, hidden, out, vision),
        deepstack=tuple(sorted(deepstack, key=lambda one: one[0])),
    )


def _glm(config: Any) -> VitSpec | None:
    vision, hidden, out = config.vision_config, config.vision_config.hidden_size, config.vision_config.out_hidden_size
    if not isinstance(vision.image_size, int):
        return None
    eps, side = vision.rms_norm_eps, vision.spatial_merge_size
    table = f"{_VISUAL}.embeddings.position_embedding.weight"
    return _qwen(
        config,
        hidden,
        out,
        out,
        rms=True,
        patch_bias=True,
        eps=eps,
        names=replace(_QWEN, mlp=_GATED),
        qkv_bias=vision.attention_bias,
        out_bias=False,
        mlp_bias=False,
        patch_norm=Norm(f"{_VISUAL}.post_conv_layernorm", hidden, eps, rms=True),
        positions=Positions(table, vision.image_size // _side(vision.patch_size), "bicubic"),
        projector=(
            Norm(f"{_VISUAL}.post_layernorm", hidden, eps, rms=True),
            Merge(side, "by feature", blocks=True),
            Linear(f"{_VISUAL}.downsample", hidden * side**2, out, kernel=(side, side)),
            Linear(f"{_VISUAL}.merger.proj", out, out, bias=False),
            Norm(f"{_VISUAL}.merger.post_projection_norm", out, 1e-5),
            Activate("gelu"),
            Gated(f"{_VISUAL}.merger", out, vision.intermediate_size, vision.hidden_act),
        ),
    )


def _images(vision: Any, patch: str, *, bias: bool, **more: Any) -> VitSpec:
    """What towers have in common whose pixels come as images."""
    side, hidden = _side(vision.patch_size), vision.hidden_size
    facts: dict[str, Any] = {
        "hidden": hidden,
        "inner": vision.intermediate_size,
        "heads": vision.num_attention_heads,
        "activation": vision.hidden_act,
        "eps": getattr(vision, "layer_norm_eps", 1e-5),
        "patch": Linear(patch, vision.num_channels * side**2, hidden, bias, (side, side)),
        "patch_side": side,
        "features": (vision.num_hidden_layers,),
        "projector": (),
    }
    return VitSpec(**(facts | more))


def _siglip(vision: Any, at: str = _TOWER, kind: Literal["table", "fractions"] = "table") -> VitSpec | None:
    """Without what follows its layers."""
    if not isinstance(vision.image_size, int):
        return None
    table = f"{at}.embeddings.position_embedding.weight"
    return _images(
        vision,
        f"{at}.embeddings.patch_embedding",
        bias=True,
        names=_siglip_names(at),
        positions=Positions(table, vision.image_size // _side(vision.patch_size), kind),
    )


def _clip(vision: Any) -> VitSpec | None:
    side = _side(vision.patch_size)
    if not isinstance(vision.image_size, int):
        return None
    return _images(
        vision,
        f"{_TOWER}.embeddings.patch_embedding",
        bias=False,
        names=_siglip_names(_TOWER),
        class_token=f"{_TOWER}.embeddings.class_embedding",
        positions=Positions(f"{_TOWER}.embeddings.position_embedding.weight", vision.image_size // side),
        embedded_norm=Norm(f"{_TOWER}.pre_layrnorm", vision.hidden_size, vision.layer_norm_eps),
    )


def _pixtral(vision: Any) -> VitSpec:
    feed, layers = "feed_forward.", f"{_TOWER}.transformer.layers"
    qkv = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
    mlp = (f"{feed}gate_proj", f"{feed}up_proj", f"{feed}down_proj")
    return _images(
        vision,
        f"{_TOWER}.patch_conv",
        bias=False,
        rms=True,
        names=Names(layers, "attention_norm", qkv, "attention.o_proj", "ffn_norm", mlp),
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        sized=True,
        patch_norm=Norm(f"{_TOWER}.ln_pre", vision.hidden_size, 1e-5, rms=True),
        rope=Rope(vision.rope_parameters["rope_theta"], alternating=True),
    )


_TOWERS: dict[str, Callable[[Any], VitSpec | None]] = {
    "clip_vision_model": _clip,
    "siglip_vision_model": _siglip,
    "pixtral": _pixtral,
}


def _projector(config: Any, inner: int) -> tuple[Step, ...]:
    out, bias = config.text_config.hidden_size, getattr(config, "multimodal_projector_bias", True)
    first, second = Linear(f"{_PROJECTOR}.linear_1", inner, out, bias), Linear(f"{_PROJECTOR}.linear_2", out, out, bias)
    return first, Activate(config.projector_hidden_act), second


def _llava(config: Any, merger: tuple[Step, ...] = ()) -> VitSpec | None:
    """One of several towers, and features of a layer amid it, or of several; `merger`: what comes before the
    projector."""
    vision, layer = config.vision_config, config.vision_feature_layer
    tower = _TOWERS[vision.model_type](vision) if vision.model_type in _TOWERS else None
    layers = vision.num_hidden_layers
    features = tuple(n if n >= 0 else layers + 1 + n for n in ([layer] if isinstance(layer, int) else layer))
    if tower is None or not all(0 <= n <= layers for n in features) or (merger and len(features) > 1):
        return None
    drop = getattr(config, "vision_feature_select_strategy", "full") == "default"
    projector = _projector(config, vision.hidden_size * len(features))
    return replace(tower, features=features, projector=(*((DropFirst(),) if drop else ()), *merger, *projector))


def _mistral3(config: Any) -> VitSpec | None:
    hidden, side = config.vision_config.hidden_size, config.spatial_merge_size
    merger = (
        Norm(f"{_PROJECTOR}.norm", hidden, config.text_config.rms_norm_eps, rms=True),
        Merge(side, "by feature"),
        Linear(f"{_PROJECTOR}.patch_merger.merging_layer", hidden * side**2, hidden, bias=False),
    )
    return _llava(config, merger)


def _gemma3(config: Any) -> VitSpec | None:
    vision, hidden = config.vision_config, config.vision_config.hidden_size
    tower = _siglip(vision) if vision.model_type == "siglip_vision_model" else None
    if tower is None or tower.positions is None:
        return None
    projection = f"{_PROJECTOR}.mm_input_projection_weight"
    projector = (
        Norm(f"{_TOWER}.post_layernorm", hidden, vision.layer_norm_eps),
        Merge(tower.positions.side // int(config.mm_tokens_per_image**0.5), "mean"),
        Norm(f"{_PROJECTOR}.mm_soft_emb_norm", hidden, vision.layer_norm_eps, rms=True, less_one=True),
        Linear("", hidden, config.text_config.hidden_size, bias=False, turned=projection),
    )
    return replace(tower, projector=projector)


def _idefics3(config: Any) -> VitSpec | None:
    vision, at, side = config.vision_config, "model.vision_model", config.scale_factor
    tower = _siglip(vision, at, "fractions")
    projection = Linear(
        "model.connector.modality_projection.proj",
        vision.hidden_size * side**2,
        config.text_config.hidden_size,
        bias=False,
    )
    norm = Norm(f"{at}.post_layernorm", vision.hidden_size, vision.layer_norm_eps)
    return None if tower is None else replace(tower, projector=(norm, Merge(side), projection))


def _internvl(config: Any) -> VitSpec | None:
    vision, hidden, layer = config.vision_config, config.vision_config.hidden_size, config.vision_feature_layer
    image, side = _side(vision.image_size), int(1 / config.downsample_ratio)
    known = vision.model_type == "internvl_vision" and vision.use_absolute_position_embeddings and image
    if not known or not isinstance(layer, int) or config.vision_feature_select_strategy != "default":
        return None
    qkv = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
    names = Names(
        f"{_TOWER}.encoder.layer",
        "layernorm_before",
        qkv,
        "attention.projection_layer",
        "layernorm_after",
        ("mlp.fc1", "mlp.fc2"),
        scales=("lambda_1", "lambda_2"),
        qk_norm=("attention.q_norm", "attention.k_norm") if vision.use_qk_norm else (),
    )
    norm = Norm(f"{_TOWER}.layernorm", hidden, vision.layer_norm_eps)
    joined = hidden * side**2
    embeddings = f"{_TOWER}.embeddings."
    return _images(
        vision,
        f"{embeddings}patch_embeddings.projection",
        bias=True,
        rms=vision.norm_type == "rms_norm",
        names=names,
        qkv_bias=vision.attention_bias,
        class_token=f"{embeddings}cls_token",
        class_shape=(1, 1),
        positions=Positions(f"{embeddings}position_embeddings", image // _side(vision.patch_size), leading=(1,)),
        features=(layer if layer >= 0 else vision.num_hidden_layers + 1 + layer,),
        projector=(
            *((norm,) if layer == -1 and not vision.use_mean_pooling else ()),
            DropFirst(),
            Merge(side),
            Norm(f"{_PROJECTOR}.layer_norm", joined, 1e-5),
            *_projector(config, joined),
        ),
    )


def _llava_next(config: Any) -> VitSpec | None:
    """With tiles."""
    tower, vision = _llava(config), config.vision_config
    if tower is None or tower.positions is None:
        return None
    ratio = getattr(config, "vision_aspect_ratio", "")
    most = ratio.removeprefix("anyres_max_")
    if ratio and not most.isdecimal():
        return None
    tiles = Tiles(
        "model.image_newline",
        config.text_config.hidden_size,
        tuple((height, width) for height, width in config.image_grid_pinpoints),
        vision.image_size,
        tower.positions.side,
        int(most) if ratio else None,
    )
    return replace(tower, tiles=tiles)


NATIVE: dict[str, Callable[[Any], VitSpec | None]] = {  # by the whole config's model_type
    "gemma3": _gemma3,
    "glm4v": _glm,
    "glm4v_moe": _glm,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_next,
    "mistral3": _mistral3,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen2_vl": _qwen2_vl,
    "qwen3_5": _qwen3,
    "qwen3_5_moe": _qwen3,
    "qwen3_vl": _qwen3,
    "qwen3_vl_moe": _qwen3,
    "smolvlm": _idefics3,
}


def vit_spec(config: Any) -> VitSpec | None:
    """Of a whole config as transformers has it; None where the tower, or something of it, is not known here."""
    made = NATIVE.get(config.model_type)
    if made is None:
        return None
    vision = config.vision_config
    if vision.hidden_act not in ACTIVATIONS or not _plain(vision):
        return None
    spec = made(config)
    if spec is None or spec.hidden % spec.heads or (spec.rope is not None and spec.hidden // spec.heads % 4):
        return None
    kinds = {step.kind for step in spec.projector if isinstance(step, Activate | Gated)}
    return spec if kinds <= set(ACTIVATIONS) else None


def _plain(vision: Any) -> bool:
    """Whether patches are square, and angles what they are in all published towers."""
    rope = getattr(vision, "rope_parameters", None)
    kinds = ("axial", "default", None)
    return _side(vision.patch_size) > 0 and (rope is None or rope.get("rope_type") in kinds)


def _side(size: Any) -> int:
    """Of what is square, and given by one side or by both; 0: it is not."""
    if isinstance(size, int):
        return size
    return size[0] if len(set(size)) == 1 else 0
