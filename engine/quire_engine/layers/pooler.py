"""From hidden states to what clients get of a model that does not generate."""

import numpy as np
import torch
from numpy.typing import NDArray
from quire_kernels.activation import Activation
from quire_kernels.backends import Matmul, unquantized
from torch import Tensor

from quire_engine.layers.linear import Builder
from quire_engine.layers.norm import SquaredLength
from quire_engine.pooling import Pooling
from quire_engine.spec import DecoderSpec
from quire_engine.upload import Upload


class Pooler:
    """Pooled states [S, hidden] → fp32 [S, hidden] vectors, or [S, 1] scores."""

    def __init__(self, build: Builder, spec: DecoderSpec, pooling: Pooling) -> None:
        self._ops = build.ops
        self._pooling = pooling
        self._layers: list[Matmul] = []
        self._squares: SquaredLength | None = None
        if pooling.normalize:
            self._squares = SquaredLength(build.ops, spec.hidden_size, build.weights.device)
        if pooling.scores:
            *inner, last = spec.names.classifier
            for name, outputs in (*((name, spec.hidden_size) for name in inner), (last, 1)):
                weight = build.weights.take(f"{name}.weight", (outputs, spec.hidden_size), dtype=torch.float32)
                bias = None
                if spec.classifier_bias:
                    bias = build.weights.take(f"{name}.bias", (outputs,), dtype=torch.float32)
                self._layers.append(build.ops.linear(weight, bias))

    def __call__(self, states: Tensor) -> Tensor:
        x = states.float()
        for number, layer in enumerate(self._layers):
            x = layer(x if number == 0 else torch.tanh(x))
        if self._pooling.scores:
            return unquantized(self._ops.activate(x, Activation.SIGMOID, False))
        return x if self._squares is None else x * self._squares(x).clamp(min=1e-24).rsqrt()


class PooledStates:
    """The states that stand for a text, gathered while its prompt is computed in parts. R rows of the engine."""

    def __init__(self, pooling: Pooling, rows: int, hidden: int, device: torch.device) -> None:
        self._kind = pooling.kind
        self._upload = Upload(device)
        self._sums = torch.zeros((rows if self._kind == "mean" else 0, hidden), device=device)

    def take(
        self,
        hidden: Tensor,
        rows: NDArray[np.int32],
        starts: NDArray[np.int32],
        counts: NDArray[np.int32],
        draws: NDArray[np.bool_],
    ) -> Tensor:
        """A step's states [T, hidden] of requests whose part begins at `starts` → the pooled ones of `draws` [S]."""
        ends = counts.cumsum()
        if self._kind != "mean":  # models whose first token stands for the text compute it at once
            places = ends - 1 if self._kind == "last" else ends - counts
            [drawn] = self._upload([places[draws].astype(np.int64)])
            return hidden.index_select(0, drawn)
        wide = rows.astype(np.int64)
        fresh, token_rows, drawn, lengths = self._upload(
            [wide[starts == 0], np.repeat(wide, counts), wide[draws], (starts + counts)[draws].astype(np.float32)]
        )
        self._sums.index_fill_(0, fresh, 0.0)
        self._sums.index_add_(0, token_rows, hidden.float())
        return self._sums.index_select(0, drawn) / lengths[:, None]
