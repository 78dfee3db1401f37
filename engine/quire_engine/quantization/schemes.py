"""How the weights of linear layers are stored, and what multiplies with them.

A scheme reads the tensors of one or several projections of one input, each rank its part straight from the file, and
binds them to a kernel. N outputs, K inputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from quire_kernels.backends import Backend
from quire_kernels.moe.reference import dequantize_mxfp4
from quire_kernels.quantize import BLOCK_COLUMNS, Quantized, QuantizedOutput, Scales
from quire_kernels.quantize.reference import quantize
from quire_kernels.quantized_matmul import Int4Weight
from quire_kernels.quantized_matmul.int4 import concatenate, from_awq, from_compressed, from_gptq
from quire_kernels.quantized_matmul.reference import dequantize_int4
from torch import Tensor

from quire_engine.errors import ModelError
from quire_engine.weights.tensors import Weights

_WEIGHT_SCALES = ("weight_scale", "weight_scale_inv")  # both names multiply
_INPUT_SCALES = ("input_scale", "activation_scale")


@dataclass(frozen=True, slots=True)
class Part:
    """One projection of several that share their input: `rows` of its outputs are this rank's."""

    name: str
    outputs: int
    rows: slice
    transposed: bool = False  # stored [inputs, outputs]


@dataclass(frozen=True, slots=True)
class Linear:
    """A projection, and the form in which it wants its input (None: as it is)."""

    apply: Callable[[Any], Tensor]
    input: QuantizedOutput | None = None

    def __call__(self, x: Tensor | Quantized) -> Tensor:
        return self.apply(x)


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight as it is held. The scale is per output [N] or per 128 x 128 block; the input's one [1] or None."""

    values: Tensor
    scale: Tensor | None = None
    input_scale: Tensor | None = None


class Scheme(Protocol):
    """`columns` of the inputs are this rank's."""

    def linear(
        self,
        weights: Weights,
        parts: Sequence[Part],
        inputs: int,
        columns: slice,
        bias: Tensor | None,
        ops: Backend,
    ) -> Linear: ...

    def read(self, weights: Weights, part: Part, inputs: int, columns: slice, ops: Backend) -> Stored:
        """For experts, which are stacked. Raises ModelError where the scheme has no kernel for that."""

    def expert_inputs(self, input_scales: Sequence[Tensor | None], ops: Backend) -> QuantizedOutput | None:
        """The form in which experts want their input, whose scales are those of their weights' checkpoints, if any."""


class Plain:
    """In the engine's own dtype."""

    def linear(
        self,
        weights: Weights,
        parts: Sequence[Part],
        inputs: int,
        columns: slice,
        bias: Tensor | None,
        ops: Backend,
    ) -> Linear:
        rows = [len(range(part.outputs)[part.rows]) for part in parts]
        read = (self.read(weights, part, inputs, columns, ops).values for part in parts)
        if len(parts) == 1:
            return Linear(ops.linear(next(read), bias))
        whole = torch.empty((sum(rows), len(range(inputs)[columns])), dtype=weights.dtype, device=weights.device)
        for target in whole.split(rows):  # each part as it is read: they are never held twice
            target.copy_(next(read))
        return Linear(ops.linear(whole, bias))

    def read(self, weights: Weights, part: Part, inputs: int, columns: slice, ops: Backend) -> Stored:
        return Stored(_weight(weights, part, inputs, columns))

    def expert_inputs(self, input_scales: Sequence[Tensor | None], ops: Backend) -> QuantizedOutput | None:
        return None


@dataclass(frozen=True, slots=True)
class Scaled:
    """fp8 or int8 weights with scales. Inputs are quantized per token, per 128 columns of it, or by a given scale."""

    kind: torch.dtype  # float8_e4m3fn or int8
    online: bool = False  # the checkpoint holds plain weights; they are quantized per output as they are read
    blocks: bool = False
    static_inputs: bool = False

    def linear(
        self,
        weights: Weights,
        parts: Sequence[Part],
        inputs: int,
        columns: slice,
        bias: Tensor | None,
        ops: Backend,
    ) -> Linear:
        stored = [self.read(weights, part, inputs, columns, ops) for part in parts]
        if self.blocks and any(part.values.shape[0] % BLOCK_COLUMNS for part in stored[:-1]):
            raise ModelError(
                f"the parts of {parts[0].name} and its neighbours are no multiples of {BLOCK_COLUMNS} outputs, and "
                "their scales cover such blocks; use fewer ranks (-tp)"
            )
        values = _joined([part.values for part in stored])
        scale = _joined([part.scale for part in stored if part.scale is not None])
        matmul = ops.scaled_linear(values, scale, bias, weights.dtype)
        return Linear(matmul, self.expert_inputs([part.input_scale for part in stored], ops))

    def expert_inputs(self, input_scales: Sequence[Tensor | None], ops: Backend) -> QuantizedOutput:
        kind = self._device_kind(ops)
        if self.blocks:
            return QuantizedOutput(Scales.BLOCK, kind)
        if self.static_inputs:
            scales = [scale for scale in input_scales if scale is not None]
            return QuantizedOutput(Scales.TENSOR, kind, torch.stack(scales).amax(0))
        return QuantizedOutput(Scales.TOKEN, kind)

    def _device_kind(self, ops: Backend) -> torch.dtype:
        if self.kind == torch.int8:
            return torch.int8
        if ops.fp8 is None:
            raise ModelError("this GPU has no fp8; serve an unquantized, int8 or int4 checkpoint on it")
        return ops.fp8

    def read(self, weights: Weights, part: Part, inputs: int, columns: slice, ops: Backend) -> Stored:
        kind = self._device_kind(ops)
        name, shape = part.name, (part.outputs, inputs)
        if self.online:
            made = quantize(_weight(weights, part, inputs, columns), QuantizedOutput(Scales.TOKEN, kind))
            return Stored(made.values, made.scale)
        values = weights.take(f"{name}.weight", shape, part.rows, columns, dtype=self.kind)
        scale = self._scale(weights, part, inputs, columns)
        if values.dtype != kind:
            values, scale = _e4m3fnuz(values), scale * 2
        given = weights.take_all(_first_of(weights, name, _INPUT_SCALES)).reshape(1) if self.static_inputs else None
        if given is not None and kind == torch.float8_e4m3fnuz:
            given = given * 2
        return Stored(values, scale, given)

    def _scale(self, weights: Weights, part: Part, inputs: int, columns: slice) -> Tensor:
        name = _first_of(weights, part.name, _WEIGHT_SCALES)
        rows = range(part.outputs)[part.rows]
        if not self.blocks:
            scale = weights.take_all(name).flatten()
            if scale.numel() == 1:
                return scale.expand(len(rows)).contiguous()
            if scale.numel() != part.outputs:
                raise ModelError(f"{name} has {scale.numel()} scales for {part.outputs} outputs")
            return scale[part.rows].contiguous()
        taken = range(inputs)[columns]
        for cut, whole in ((rows, part.outputs), (taken, inputs)):
            ends = cut.stop % BLOCK_COLUMNS and cut.stop != whole
            if cut.start % BLOCK_COLUMNS or ends:
                raise ModelError(
                    f"{part.name} would be cut inside a block of {BLOCK_COLUMNS} with one scale; use fewer ranks (-tp)"
                )
        block_rows = slice(rows.start // BLOCK_COLUMNS, -(-rows.stop // BLOCK_COLUMNS))
        block_columns = slice(taken.start // BLOCK_COLUMNS, -(-taken.stop // BLOCK_COLUMNS))
        shape = (-(-part.outputs // BLOCK_COLUMNS), -(-inputs // BLOCK_COLUMNS))
        return weights.take(name, shape, block_rows, block_columns, dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class Int4:
    """4-bit weights in groups of inputs: AWQ's, GPTQ's or compressed-tensors' layout, made into the kernels' own."""

    layout: str  # awq, gptq or packed
    group: int  # inputs that share a scale
    symmetric: bool = True  # packed alone; the other layouts always hold zeros
    zero_offset: int = 1  # GPTQ stores one less than the zero; its second format does not

    def linear(
        self,
        weights: Weights,
        parts: Sequence[Part],
        inputs: int,
        columns: slice,
        bias: Tensor | None,
        ops: Backend,
    ) -> Linear:
        return Linear(ops.int4_linear(self.read_packed(weights, parts, inputs, columns), bias))

    def read_packed(self, weights: Weights, parts: Sequence[Part], inputs: int, columns: slice) -> Int4Weight:
        """The outputs of all parts. Raises ModelError for what the kernels' layout cannot hold."""
        try:
            return concatenate([self._read(weights, part, inputs, columns) for part in parts])
        except ValueError as error:
            raise ModelError(f"{parts[0].name}: {error}") from error

    def read(self, weights: Weights, part: Part, inputs: int, columns: slice, ops: Backend) -> Stored:
        """As what it means."""
        return Stored(dequantize_int4(self.read_packed(weights, [part], inputs, columns)).to(weights.dtype))

    def expert_inputs(self, input_scales: Sequence[Tensor | None], ops: Backend) -> QuantizedOutput | None:
        return None

    def _read(self, weights: Weights, part: Part, inputs: int, columns: slice) -> Int4Weight:
        name, outputs, group = part.name, part.outputs, self.group
        rows, taken = range(outputs)[part.rows], range(inputs)[columns]
        if taken.start % group or len(taken) % group or rows.start % 8 or len(rows) % 8:
            raise ModelError(f"{name} would be cut inside a group of {group} inputs or a word; use fewer ranks (-tp)")
        groups = slice(taken.start // group, taken.stop // group)
        n, k = slice(rows.start, rows.stop), slice(taken.start, taken.stop)
        n8, k8 = slice(rows.start // 8, rows.stop // 8), slice(taken.start // 8, taken.stop // 8)

        def words(suffix: str, shape: tuple[int, int], first: slice, second: slice) -> Tensor:
            return weights.take(f"{name}.{suffix}", shape, first, second, dtype=torch.int32)

        if self.layout == "packed":
            packed = words("weight_packed", (outputs, inputs // 8), n, k8)
            scales = weights.take(f"{name}.weight_scale", (outputs, inputs // group), n, groups)
            weights.take_all(f"{name}.weight_shape")
            zeros = None
            if not self.symmetric:
                zeros = words("weight_zero_point", (outputs // 8, inputs // group), n8, groups)
            return from_compressed(packed, scales, zeros)
        scales = weights.take(f"{name}.scales", (inputs // group, outputs), groups, n)
        zeros = words("qzeros", (inputs // group, outputs // 8), groups, n8)
        if self.layout == "awq":
            return from_awq(words("qweight", (inputs, outputs // 8), k, n8), zeros, scales)
        order = None
        if f"{name}.g_idx" in weights:
            order = weights.take(f"{name}.g_idx", (inputs,), k, dtype=torch.int32) - taken.start // group
        return from_gptq(words("qweight", (inputs // 8, outputs), k8, n), zeros, scales, order, self.zero_offset)


class MXFP4(Plain):
    """4-bit floats (e2m1) in blocks of 32 inputs with a power of two each (OCP MX 1.0), of experts that one tensor
    holds; everything else is plain.
    """

    @staticmethod
    def read_codes(
        weights: Weights, name: str, shape: tuple[int, int, int], rows: slice, columns: slice, depths: slice
    ) -> Tensor:
        """Packed [E, N, K / 2]: some outputs of some experts' matrices, of `shape` [E, N, K] in all, and of the blocks
        that have any of the inputs `depths`."""
        experts, outputs, inputs = shape
        whole = (experts, outputs, inputs // 32, 16)
        cut = (rows, columns, _blocks(depths, inputs))
        return weights.take(f"{name}_blocks", whole, *cut, dtype=torch.uint8).flatten(2)

    @staticmethod
    def read_exponents(
        weights: Weights, name: str, shape: tuple[int, int, int], rows: slice, columns: slice, depths: slice
    ) -> Tensor:
        """The same blocks' exponents [E, N, K / 32]."""
        experts, outputs, inputs = shape
        cut = (rows, columns, _blocks(depths, inputs))
        return weights.take(f"{name}_scales", (experts, outputs, inputs // 32), *cut, dtype=torch.uint8)

    def read_stacked(
        self, weights: Weights, name: str, shape: tuple[int, int, int], rows: slice, columns: slice, depths: slice
    ) -> Tensor:
        """The same outputs, and those inputs alone, as what they mean."""
        packed = self.read_codes(weights, name, shape, rows, columns, depths)
        exponents = self.read_exponents(weights, name, shape, rows, columns, depths)
        out = torch.empty((*packed.shape[:2], 2 * packed.shape[2]), dtype=weights.dtype, device=packed.device)
        for expert in range(packed.shape[0]):  # one at a time: the codes take eight bytes each
            out[expert] = dequantize_mxfp4(packed[expert], exponents[expert], weights.dtype)
        first, last, _ = depths.indices(shape[2])
        return out[..., first % 32 :][..., : last - first]


def _blocks(inputs: slice, count: int) -> slice:
    """Of 32 inputs each."""
    first, last, _ = inputs.indices(count)
    return slice(first // 32, -(-last // 32))


def _weight(weights: Weights, part: Part, inputs: int, columns: slice) -> Tensor:
    name = f"{part.name}.weight"
    if part.transposed:
        return weights.take(name, (inputs, part.outputs), columns, part.rows).t().contiguous()
    return weights.take(name, (part.outputs, inputs), part.rows, columns)


def _first_of(weights: Weights, module: str, names: tuple[str, ...]) -> str:
    return next((f"{module}.{name}" for name in names if f"{module}.{name}" in weights), f"{module}.{names[0]}")


def _joined(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if parts[0].dtype.itemsize == 1:  # torch has no cat for every 8-bit dtype on every device
        return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
    return torch.cat(parts)


def _e4m3fnuz(values: Tensor) -> Tensor:
    """e4m3fn bytes as gfx942 reads them: each means half as much, and what was -0 would not be a number."""
    raw = values.view(torch.uint8)
    return torch.where(raw == 0x80, torch.zeros_like(raw), raw).view(torch.float8_e4m3fnuz)
