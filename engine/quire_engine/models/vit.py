"""The vision transformer that all families of vit_facts.py share, and what makes a decoder's embeddings of it.

Shapes: B pieces of an image (frames, tiles), N tokens of each, R = B * N rows; h and w patches down and across a piece.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from quire_engine.models import vit_spec as facts
from quire_engine.models.vit_grid import Grid, blocks_of, fractions_of, frequencies_of, put_together, rows_of, taps_of
from quire_engine.models.vit_spec import Merge, Positions, Step, VitSpec
from quire_engine.weights.tensors import Weights


@dataclass(frozen=True, slots=True)
class Features:
    """What is seen of an image."""

    embeddings: Tensor  # [n, hidden], one for each of its tokens
    deepstack: list[Tensor]  # each [n, hidden], added to what the first layers of the decoder give


class _Taken:
    """The tensors that a tower has taken of a checkpoint."""

    def __init__(self, weights: Weights) -> None:
        self.dtype, self.device = weights.dtype, weights.device
        self._weights = weights
        self.tensors: list[Tensor] = []

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        self.tensors.append(self._weights.take(name, shape, dtype=dtype))
        return self.tensors[-1]

    def joined(self, names: Sequence[str], outer: int, *inner: int) -> Tensor:
        """Of several, one under another, for one product."""
        if len(names) == 1:
            return self.take(names[0], (outer, *inner))
        whole = torch.empty((len(names) * outer, *inner), dtype=self.dtype, device=self.device)
        for part, name in zip(whole.split(outer), names, strict=True):
            part.copy_(self._weights.take(name, (outer, *inner)))
        self.tensors.append(whole)
        return whole


class _Product:
    """x [R, inner] → [R, outer]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight.t(), bias

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """`out`: room for the result."""
        if self._bias is None:
            return torch.mm(x, self._weight, out=out)
        return torch.addmm(self._bias, x, self._weight, out=out)

    def of_squares(self, images: Tensor, side: int) -> Tensor:
        """[B, colours, tall, broad] → [R, outer], of each square of pixels. A convolution: the sums are in the order of
        transformers' own, to which some small models' logits are sensitive."""
        kernel = self._weight.t().unflatten(1, (-1, side, side))
        x = F.conv2d(images, kernel, self._bias, stride=side)
        return x.flatten(2).transpose(1, 2).reshape(-1, x.shape[1])


def _products(taken: _Taken, names: Sequence[str], inner: int, outer: int, bias: bool) -> _Product:
    """Several in one."""
    weight = taken.joined([f"{name}.weight" for name in names], outer, inner)
    return _Product(weight, taken.joined([f"{name}.bias" for name in names], outer) if bias else None)


def _linear(taken: _Taken, fact: facts.Linear) -> _Product:
    if fact.turned:
        return _Product(taken.take(fact.turned, (fact.inner, fact.outer)).t(), None)
    shape = (fact.inner // math.prod(fact.kernel), *fact.kernel)
    weight = taken.take(f"{fact.name}.weight", (fact.outer, *shape)).flatten(1)
    return _Product(weight, taken.take(f"{fact.name}.bias", (fact.outer,)) if fact.bias else None)


class _Norm:
    def __init__(self, taken: _Taken, fact: facts.Norm) -> None:
        self._shape, self._eps, self._rms = (fact.size,), fact.eps, fact.rms
        self._wide = torch.float32 if fact.less_one else None
        self._weight = taken.take(f"{fact.name}.weight", self._shape, self._wide)
        if fact.less_one:
            self._weight += 1
        self._bias = None if fact.rms else taken.take(f"{fact.name}.bias", self._shape)

    def __call__(self, x: Tensor) -> Tensor:
        if not self._rms:
            return F.layer_norm(x, self._shape, self._weight, self._bias, self._eps)
        return F.rms_norm(x.to(self._wide or x.dtype), self._shape, self._weight, self._eps).to(x.dtype)


def _activated(x: Tensor, kind: str) -> Tensor:
    """In place."""
    if kind == "silu":
        return F.silu(x, inplace=True)
    if kind == "quick_gelu":
        return x.mul_((1.702 * x).sigmoid_())
    return torch.ops.aten.gelu_(x, approximate="tanh" if kind == "gelu_pytorch_tanh" else "none")


class _Mlp:
    """down(f(up(x))), or down(f(gate(x)) * up(x))."""

    def __init__(self, taken: _Taken, names: Sequence[str], size: int, inner: int, kind: str, bias: bool) -> None:
        *up, down = names
        self._up = _products(taken, up, size, inner, bias)
        self._down = _products(taken, (down,), inner, size, bias)
        self._gated, self._kind = len(up) == 2, kind

    def __call__(self, x: Tensor, wide: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        x = self._up(x, wide)
        if self._gated:
            gate, up = x.chunk(2, -1)
            x = _activated(gate, self._kind).mul_(up)
        else:
            x = _activated(x, self._kind)
        return self._down(x, out)


class _Layer:
    """Attention and MLP, added to x in place."""

    def __init__(self, taken: _Taken, spec: VitSpec, number: int) -> None:
        names, hidden = spec.names, spec.hidden
        at = f"{names.layers}.{number}."
        self._heads = spec.heads
        self._width = spec.hidden * 3, spec.inner * (len(names.mlp) - 1)
        self._attention_norm, self._mlp_norm = (
            _Norm(taken, facts.Norm(at + name, hidden, spec.eps, spec.rms))
            for name in (names.attention_norm, names.mlp_norm)
        )
        outer = hidden * 3 // len(names.qkv)
        self._qkv = _products(taken, [at + name for name in names.qkv], hidden, outer, spec.qkv_bias)
        self._out = _products(taken, (at + names.out,), hidden, hidden, spec.out_bias)
        self._qk_norm = [_Norm(taken, facts.Norm(at + name, hidden, 1e-6, rms=True)) for name in names.qk_norm]
        mlp = [at + name for name in names.mlp]
        self._mlp = _Mlp(taken, mlp, hidden, spec.inner, spec.activation, spec.mlp_bias)
        self._scales = [taken.take(at + name, (hidden,)) for name in names.scales]
        windows = spec.windows
        self._in_windows = windows is not None and number not in windows.all_in

    def __call__(
        self, x: Tensor, grid: Grid, angles: tuple[Tensor, Tensor] | None, mask: Tensor | None, room: Tensor
    ) -> None:
        """x [R, hidden]; `room`: for the widest result."""
        rows, hidden = x.shape
        attention, inner = (room[: rows * width].view(rows, width) for width in self._width)
        qkv = self._qkv(self._attention_norm(x), attention)
        for part, norm in zip(qkv.split(hidden, -1), self._qk_norm, strict=False):
            part.copy_(norm(part))
        heads = qkv.view(grid.pieces, rows // grid.pieces, 3, self._heads, -1)
        if angles is not None:
            _rotate(heads[:, :, :2], *angles)
        seen = self._attended(heads, grid.windows if self._in_windows else (), mask).reshape(rows, hidden)
        self._add(x, self._out(seen), 0)
        del seen
        self._add(x, self._mlp(self._mlp_norm(x), inner), 1)

    def _add(self, x: Tensor, delta: Tensor, which: int) -> None:
        if self._scales:
            delta.mul_(self._scales[which])
        x.add_(delta)

    def _attended(self, qkv: Tensor, windows: Sequence[tuple[int, int]], mask: Tensor | None) -> Tensor:
        """[B, N, 3, heads, size] → [B, N, heads, size]. Windows of one size are computed at once."""
        if not windows:
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)
        pieces, _, _, heads, size = qkv.shape
        seen, first = [], 0
        for count, patches in windows:
            last = first + count * patches
            part = qkv[:, first:last].reshape(pieces * count, patches, 3, heads, size)
            query, key, value = part.permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
            seen.append(out.reshape(pieces, last - first, heads, size))
            first = last
        return torch.cat(seen, 1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Queries and keys [B, N, 2, heads, size], in place; angles [N, 1, 1, size / 2] in fp32."""
    one, other = x.chunk(2, -1)
    turned = one * cos
    turned -= other * sin
    other_turned = other * cos
    other_turned += one * sin
    one.copy_(turned)
    other.copy_(other_turned)


class Vit:
    """Pixels to embeddings."""

    def __init__(self, spec: VitSpec, weights: Weights, patches: Callable[[int], int]) -> None:
        """`patches`: at most so many are seen for an image of so many tokens."""
        self.dtype, self._device = weights.dtype, weights.device
        self._spec, self._patches = spec, patches
        taken = _Taken(weights)
        self._patch = _linear(taken, spec.patch)
        self._patch_norm = _Norm(taken, spec.patch_norm) if spec.patch_norm is not None else None
        self._class = taken.take(spec.class_token, (*spec.class_shape, spec.hidden)) if spec.class_token else None
        self._table: Tensor | None = None
        if (place := spec.positions) is not None:
            count = place.side**2 + bool(spec.class_token)
            self._table = taken.take(place.name, (*place.leading, count, spec.hidden)).view(count, spec.hidden)
        self._embedded_norm = _Norm(taken, spec.embedded_norm) if spec.embedded_norm is not None else None
        self._layers = [_Layer(taken, spec, number) for number in range(max(spec.features))]
        self._deepstack = {after: [_step(taken, step) for step in steps] for after, steps in spec.deepstack}
        self._projector = [_step(taken, step) for step in spec.projector]
        self._newline = taken.take(spec.tiles.newline, (spec.tiles.size,)) if spec.tiles is not None else None
        self._frequencies: list[Tensor] = []
        if spec.rope is not None:
            self._frequencies = [one.to(self._device) for one in frequencies_of(spec.rope, spec.hidden // spec.heads)]
        self.num_parameters = sum(tensor.numel() for tensor in taken.tensors)
        self.weight_bytes = sum(tensor.nbytes for tensor in taken.tensors)

    @torch.no_grad()
    def encode(self, inputs: Mapping[str, np.ndarray]) -> Features:
        """One image, as its processor gives it."""
        spec = self._spec
        x, grid = self._of_patches(inputs) if spec.block else self._of_images(inputs)
        if self._embedded_norm is not None:
            x = self._embedded_norm(x)
        mask = None
        if grid.seen is not None:
            mask = torch.from_numpy(grid.seen.reshape(grid.pieces, 1, 1, -1)).to(self._device)
        angles = self._angles(grid)
        room = x.new_empty(len(x) * max(3 * spec.hidden, spec.inner * (len(spec.names.mlp) - 1)))
        kept: dict[int, Tensor] = {0: x.clone()} if 0 in spec.features and self._layers else {}
        deepstack = []
        for number, layer in enumerate(self._layers, 1):
            layer(x, grid, angles, mask, room)
            if number in spec.features and number < len(self._layers):
                kept[number] = x.clone()
            if number in self._deepstack:
                deepstack.append(self._projected(x, grid, self._deepstack[number]))
        del room
        kept[len(self._layers)] = x
        seen = torch.cat([kept[number] for number in spec.features], -1) if len(spec.features) > 1 else x
        embeddings = self._projected(seen, grid, self._projector)
        if spec.tiles is not None:
            assert self._newline is not None
            [(height, width)] = inputs["image_sizes"].tolist()
            pieces = embeddings.view(grid.pieces, -1, spec.tiles.size)
            embeddings = put_together(pieces, self._newline, (height, width), spec.tiles)
        return Features(embeddings, deepstack)

    def activation_bytes(self, tokens: int) -> int:
        """About what encoding an image of so many tokens takes beside the weights, rather more than less."""
        spec, patches = self._spec, self._patches(tokens)
        wide = max(3 * spec.hidden, spec.inner * (len(spec.names.mlp) - 1))
        rotated = 3 * spec.hidden * 4 // self.dtype.itemsize if spec.rope is not None else 0
        kept = 2 * len(spec.features) + 2
        return self.dtype.itemsize * patches * (2 * spec.patch.inner + wide + rotated + (4 + kept) * spec.hidden)

    def _of_patches(self, inputs: Mapping[str, np.ndarray]) -> tuple[Tensor, Grid]:
        """Embedded, with their positions where those are learned: [R, hidden]."""
        spec, pixels = self._spec, inputs["pixel_values"]
        [(pieces, height, width)] = inputs["image_grid_thw"].tolist()
        if len(pixels) != pieces * height * width:
            raise ValueError(f"an image of {pieces} x {height} x {width} patches has {len(pixels)}")
        grid = blocks_of(pieces, height, width, spec.block, spec.windows.side if spec.windows is not None else 0)
        x = self._patch(self._tensor(pixels))
        if self._patch_norm is not None:
            x = self._patch_norm(x)
        if grid.order is not None:
            place = torch.from_numpy(grid.order).to(self._device)
            x = x.view(pieces, -1, spec.block**2, spec.hidden)[:, place].view(len(x), -1)
        if spec.positions is not None:
            table = self._interpolated(height, width, spec.positions)
            x.view(pieces, height * width, -1).add_(_blocks(table[None], spec.block).view(-1, spec.hidden))
        return x, grid

    def _of_images(self, inputs: Mapping[str, np.ndarray]) -> tuple[Tensor, Grid]:
        """Their patches, row by row, each image's after its class token."""
        spec, side, pixels = self._spec, self._spec.patch_side, inputs["pixel_values"]
        images = self._tensor(pixels.reshape(-1, *pixels.shape[-3:]))
        if spec.sized and "image_sizes" in inputs:
            [(tall, broad)] = inputs["image_sizes"].tolist()
            images = images[:, :, :tall, :broad]
        pieces, height, width = len(images), images.shape[2] // side, images.shape[3] // side
        x = self._patch.of_squares(images, side)
        del images
        if self._patch_norm is not None:
            x = self._patch_norm(x)
        grid = rows_of(pieces, height, width, side, inputs.get("pixel_attention_mask"))
        if self._class is not None:
            tokens = self._class.view(1, 1, -1).expand(pieces, 1, -1)
            x = torch.cat((tokens, x.view(pieces, -1, spec.hidden)), 1).view(-1, spec.hidden)
        if (place := spec.positions) is not None:
            assert self._table is not None
            table = self._table
            if place.kind == "fractions":
                seen = np.ones((1, height, width), bool) if grid.seen is None else grid.seen
                table = table[torch.from_numpy(fractions_of(seen, place.side)).to(self._device)]
            elif (height, width) != (place.side, place.side):
                raise ValueError(f"an image of {height} x {width} patches, where the tower sees {place.side} each way")
            x.view(pieces, -1, spec.hidden).add_(table)
        return x, grid

    def _tensor(self, value: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(value)).to(self._device, self.dtype)

    def _interpolated(self, height: int, width: int, place: Positions) -> Tensor:
        """The table as one of height x width rows: [height, width, hidden]."""
        assert self._table is not None
        table = self._table.view(place.side, place.side, -1)
        for axis, count in enumerate((height, width)):
            places, shares = (one.to(self._device) for one in taps_of(count, place.side, place.kind))
            shape = (-1, 1, 1) if axis == 0 else (-1, 1)
            parts = (
                table.index_select(axis, place).float().mul_(share.view(shape))
                for place, share in zip(places, shares, strict=True)
            )
            total = next(parts)
            for part in parts:
                total += part
            table = total
        return table.to(self.dtype)

    def _angles(self, grid: Grid) -> tuple[Tensor, Tensor] | None:
        """[N, 1, 1, size / 2]: cosines and sines."""
        if not self._frequencies:
            return None
        places = torch.from_numpy(np.stack((grid.rows, grid.columns)).astype(np.float32)).to(self._device)
        turns = [place[:, None] * each for place, each in zip(places, self._frequencies, strict=True)]
        angles = torch.cat(turns, -1)[:, None, None]
        return angles.cos(), angles.sin()

    def _projected(self, x: Tensor, grid: Grid, steps: Sequence[Callable[[Tensor, Grid], Tensor]]) -> Tensor:
        """[R, ...] → [n, hidden]."""
        for step in steps:
            x = step(x, grid)
        if grid.order is not None:
            back = torch.from_numpy(np.argsort(grid.order)).to(self._device)
            x = x.view(grid.pieces, len(back), -1)[:, back].flatten(0, 1)
        return x


def _step(taken: _Taken, fact: Step) -> Callable[[Tensor, Grid], Tensor]:
    if isinstance(fact, facts.Norm):
        norm = _Norm(taken, fact)
        return lambda x, grid: norm(x)
    if isinstance(fact, facts.Linear):
        product = _linear(taken, fact)
        return lambda x, grid: product(x)
    if isinstance(fact, facts.Gated):
        names = [f"{fact.name}.{name}_proj" for name in ("gate", "up", "down")]
        mlp = _Mlp(taken, names, fact.size, fact.inner, fact.kind, fact.bias)
        return lambda x, grid: mlp(x)
    if isinstance(fact, facts.Activate):
        return lambda x, grid: _activated(x, fact.kind)
    if isinstance(fact, facts.DropFirst):
        return lambda x, grid: x.view(grid.pieces, -1, x.shape[-1])[:, 1:].reshape(-1, x.shape[-1])
    return lambda x, grid: _merged(x, grid, fact)


def _merged(x: Tensor, grid: Grid, fact: Merge) -> Tensor:
    if not fact.blocks:
        x = x.view(grid.pieces, grid.height, grid.width, -1)
        if fact.how == "mean":
            return F.avg_pool2d(x.permute(0, 3, 1, 2), fact.side).flatten(2).transpose(1, 2).flatten(0, 1)
        x = _blocks(x, fact.side)
    x = x.view(-1, fact.side**2, x.shape[-1])
    return (x.transpose(1, 2) if fact.how == "by feature" else x).flatten(1)


def _blocks(x: Tensor, side: int) -> Tensor:
    """[B, h, w, hidden] → [B, h / side, w / side, side, side, hidden]: squares, without what is over at the edges."""
    pieces, height, width, hidden = x.shape
    down, across = height // side, width // side
    x = x[:, : down * side, : across * side].reshape(pieces, down, side, across, side, hidden)
    return x.transpose(2, 3).contiguous()
