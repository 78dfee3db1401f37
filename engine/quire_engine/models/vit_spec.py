"""What the vision transformer (vit.py) has to know of a tower."""

from dataclasses import dataclass
from typing import Literal

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
    block: int = 0  # pixels come as patches, in squares of so many by so many; 0: as images
    sized: bool = False  # image_sizes says how much of an image there is
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
