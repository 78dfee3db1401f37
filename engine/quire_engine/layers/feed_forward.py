"""Feed-forward layers, gated or not."""

from quire_kernels.quantize import Quantized, QuantizedOutput
from torch import Tensor

from quire_engine.layers.linear import Builder, shard
from quire_engine.quantization.schemes import Part
from quire_engine.spec import DecoderSpec, joined


class FeedForward:
    """down(f(gate(x)) * up(x)), or down(f(up(x)))."""

    def __init__(
        self,
        build: Builder,
        spec: DecoderSpec,
        at: str,
        inner: int,
        projections: tuple[str, str, str],
        *,
        summed: bool = True,
    ) -> None:
        """`projections`: gate ("" for none), up, down. Without `summed` the result is this rank's share."""
        self._ops = build.ops
        self._activation = spec.activation
        gate, up, down = (name and joined(at, name) for name in projections)
        self._gated = bool(gate)
        part = shard(inner, build.group)
        if gate == up:  # one tensor, the gate first
            halves = [Part(up, 2 * inner, slice(part.start + at, part.stop + at)) for at in (0, inner)]
        else:
            halves = [Part(name, inner, part) for name in (gate, up) if name]
        self._up = build.column_parallel(halves, spec.hidden_size, spec.mlp_bias)
        self._down = build.row_parallel(down, spec.hidden_size, inner, spec.mlp_bias, summed=summed)

    @property
    def input(self) -> QuantizedOutput | None:
        """The form in which the first projection wants its input."""
        return self._up.input

    def __call__(self, x: Tensor | Quantized) -> Tensor:
        return self._down(self._ops.activate(self._up(x), self._activation, self._gated, self._down.input))
