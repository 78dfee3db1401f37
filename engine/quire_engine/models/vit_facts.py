"""Facts of vision towers: what one vision transformer (vit.py) has to know of each family that it computes.

Tensors are named as transformers names them now.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu", "silu")


@dataclass(frozen=True, slots=True)
class Norm:
    """LayerNorm, or RMSNorm, which has no bias."""

    name: str
    size: int
    eps: float
    rms: bool = False
    less_one: bool = False  # what is stored is the weight - 1


@dataclass(frozen=True, slots=True)
class Linear:
    """A product, with a bias or without."""

    name: str
    inner: int
    outer: int
    bias: bool = True
    kernel: tuple[int, ...] = ()  # a convolution's, which is stored as [outer, inner / kernel, *kernel]
    turned: str = ""  # the tensor's name where it is stored as [inner, outer]


@dataclass(frozen=True, slots=True)
class Activate:
    """An activation by itself."""

    kind: str


@dataclass(frozen=True, slots=True)
class Gated:
    """down(f(gate(x)) * up(x))."""

    name: str
    size: int
    inner: int
    kind: str
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Merge:
    """Squares of patches become one row each: their features side by side, feature by feature, or their mean."""

    side: int
    how: Literal["joined", "by feature", "mean"] = "joined"
    blocks: bool = False  # a square's patches follow each other already; else they lie in rows of the image


@dataclass(frozen=True, slots=True)
class DropFirst:
    """Without the class token."""


Step = Norm | Linear | Activate | Gated | Merge | DropFirst


@dataclass(frozen=True, slots=True)
class Positions:
    """A learned table of [side * side] rows, with one before them for a class token."""

    name: str
    side: int
    kind: Literal["table", "fractions", "bilinear", "bicubic"] = "table"
    leading: tuple[int, ...] = ()  # dimensions that its tensor has before


@dataclass(frozen=True, slots=True)
class Rope:
    """Half of a head's frequencies are of a patch's row, half of its column."""

    theta: float
    alternating: bool = False  # of the frequencies of a whole head, every other one; else the same of half a head


@dataclass(frozen=True, slots=True)
class Windows:
    """Patches see those of their window, but in layers where they see all."""

    side: int  # in merged patches
    all_in: frozenset[int]


@dataclass(frozen=True, slots=True)
class Tiles:
    """An image is seen whole and in pieces, whose rows are put together again; each row ends with `newline`."""

    newline: str
    size: int  # of an embedding
    pinpoints: tuple[tuple[int, int], ...]  # heights and widths
    pixels: int  # of a piece's side
    side: int  # in patches
    most: int | None = None  # so many pieces' patches: an image of more is made smaller


@dataclass(frozen=True, slots=True)
class Names:
    """Of a layer's tensors."""

    layers: str
    attention_norm: str
    qkv: tuple[str, ...]  # one tensor, or three
    out: str
    mlp_norm: str
    mlp: tuple[str, ...]  # up and down, or gate, up and down
    scales: tuple[str, ...] = ()  # of what attention and MLP add
    qk_norm: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class VitSpec:
    """A tower, and what makes a decoder's embeddings of its features."""

    hidden: int
    inner: int
    heads: int
    activation: str
    eps: float
    rms: bool = False
    names: Names
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    patch: Linear
    patch_side: int
    block: int = 0  # pixels come as patches, in squares of so many; 0: as images
    patch_norm: Norm | None = None
    class_token: str = ""
    class_shape: tuple[int, ...] = ()
    positions: Positions | None = None
    rope: Rope | None = None
    embedded_norm: Norm | None = None
    windows: Windows | None = None
    features: tuple[int, ...]  # after so many layers they are taken
    projector: tuple[Step, ...]
    deepstack: tuple[tuple[int, tuple[Step, ...]], ...] = ()  # after so many layers, and by what
    tiles: Tiles | None = None


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
    vision = config.vision_config
    kernel = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
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
        "patch_side": vision.patch_size,
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
    side = vision.window_size // vision.spatial_merge_size // vision.patch_size
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


NATIVE: dict[str, Callable[[Any], VitSpec | None]] = {  # by the whole config's model_type
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3,
    "qwen3_vl_moe": _qwen3,
    "qwen3_5": _qwen3,
    "qwen3_5_moe": _qwen3,
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
    return None if spec is None or spec.hidden % spec.heads or (spec.rope and spec.hidden // spec.heads % 4) else spec


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
