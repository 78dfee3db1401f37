"""Linear layers, sliced over the tensor-parallel ranks. How a weight is read lives with the layer it belongs to.

T tokens, N outputs, K inputs, S ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from quire_kernels.backends import Backend
from torch import Tensor

from quire_engine.parallel import ParallelGroup
from quire_engine.quantization.config import Quantization
from quire_engine.quantization.schemes import Linear, Part
from quire_engine.weights.tensors import WHOLE, Weights


@dataclass(frozen=True, slots=True)
class Builder:
    """What every layer is built from."""

    weights: Weights
    group: ParallelGroup
    ops: Backend
    quantization: Quantization
    transposed: bool = False  # the checkpoint's weights are [inputs, outputs]

    def column_parallel(self, parts: Sequence[Part], inputs: int, bias: bool) -> Linear:
        """Several projections of one input as one product, each rank computing some of their outputs."""
        scheme = self.quantization.scheme_of(parts[0].name)
        if self.transposed:
            parts = [replace(part, transposed=True) for part in parts]
        added = None
        if bias:
            added = torch.cat([self.weights.take(f"{part.name}.bias", (part.outputs,), part.rows) for part in parts])
        return scheme.linear(self.weights, parts, inputs, WHOLE, added, self.ops)

    def row_parallel(self, name: str, outputs: int, inputs: int, bias: bool, *, summed: bool = True) -> Linear:
        """A projection whose inputs are sliced: every rank's partial result is summed, here or (without `summed`) by
        the caller. Rank 0 alone adds the bias."""
        group = self.group
        added = self.weights.take(f"{name}.bias", (outputs,)) if bias else None
        scheme = self.quantization.scheme_of(name)
        columns = shard(inputs, group) if group.size > 1 else WHOLE
        whole = [Part(name, outputs, WHOLE, self.transposed)]
        partial = scheme.linear(self.weights, whole, inputs, columns, added if group.rank == 0 else None, self.ops)
        if group.size == 1 or not summed:
            return partial

        def reduced(x: Tensor) -> Tensor:
            return group.all_reduce(partial(x))

        return Linear(reduced, partial.input)


def shard(size: int, group: ParallelGroup) -> slice:
    """This rank's part of `size` equal units."""
    part = size // group.size
    return slice(group.rank * part, (group.rank + 1) * part)
