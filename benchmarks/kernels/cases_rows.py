"""Kernels that go over rows: norms, activations, sampling."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from case import Built, Case, normal, size
from quire_kernels.activation import Activation
from quire_kernels.activation import reference as activation_reference
from quire_kernels.activation.triton import activate
from quire_kernels.norm import Norm
from quire_kernels.norm import reference as norm_reference
from quire_kernels.norm.triton import add_norm, norm_heads
from quire_kernels.quantize import QuantizedOutput, Scales
from quire_kernels.sampling import Biases, Penalties, Rows, reference
from quire_kernels.sampling.triton import add_bias, draw, mask_logits, penalize, prepare, token_logprobs
from torch import Tensor

Build = Callable[[torch.device, torch.dtype], Built]
VOCABULARY = 128256


def _output(scales: Scales | None, device: torch.device, fp8: torch.dtype) -> QuantizedOutput | None:
    return None if scales is None else QuantizedOutput(scales, fp8, torch.ones(1, device=device))


def _norm(tokens: int, width: int, kind: Norm, scales: Scales | None = None) -> Build:
    def build(device: torch.device, fp8: torch.dtype) -> Built:
        output = _output(scales, device, fp8)
        residual, delta = normal(device, tokens, width), normal(device, tokens, width)
        zeros = torch.zeros_like(delta)
        weight = normal(device, width)
        bias = normal(device, width) if kind.kind == "layer" else None
        written = size(residual) if output is None else size(residual) / 2
        return Built(
            run=lambda: add_norm(residual, zeros, weight, bias, kind, output),
            expected=lambda: norm_reference.add_norm(residual.clone(), zeros, weight, bias, kind, output),
            bytes=3 * size(residual) + written,
            peers={}
            if output is not None or kind.kind != "rms"
            else {"torch": lambda: F.rms_norm(residual + delta, (width,), weight, kind.eps)},
        )

    return build


def _norm_heads(device: torch.device, fp8: torch.dtype) -> Built:
    x, weight = normal(device, 8192, 32, 128), torch.ones(128, device=device, dtype=torch.bfloat16)

    def run() -> Tensor:
        norm_heads(x, weight, None, Norm(1e-6))
        return x

    return Built(run=run, expected=lambda: norm_reference.normalize(x, weight, None, Norm(1e-6)), bytes=2 * size(x))


def _activation(
    tokens: int, width: int, kind: Activation, gated: bool, scales: Scales | None = None, integers: bool = False
) -> Build:
    def build(device: torch.device, fp8: torch.dtype) -> Built:
        output = _output(scales, device, torch.int8 if integers else fp8)
        x = normal(device, tokens, width * (2 if gated else 1))
        peers: dict[str, Callable[[], Any]] = {}
        if output is None and kind is Activation.SILU:
            peers["torch"] = lambda: F.silu(x[:, :width]) * x[:, width:]
        return Built(
            run=lambda: activate(x, kind, gated, output),
            expected=lambda: activation_reference.activate(x, kind, gated, output),
            bytes=size(x) + tokens * width * (2 if output is None else 1),
            terms=4.0,
            peers=peers,
        )

    return build


def _rows(device: torch.device, size: int, temperature: float, top_k: int, top_p: float) -> Rows:
    return Rows(
        temperature=torch.full((size,), temperature, device=device),
        top_k=torch.full((size,), top_k, device=device, dtype=torch.int32),
        top_p=torch.full((size,), top_p, device=device),
        min_p=torch.zeros(size, device=device),
        seeds=torch.arange(size, device=device),
        positions=torch.arange(size, device=device),
    )


def _sampling(temperature: float, top_k: int, top_p: float) -> Build:
    """The kernel's choice is compared by its reference's probability being positive: ties may fall either way."""

    def build(device: torch.device, fp8: torch.dtype) -> Built:
        count = 256
        logits = normal(device, count, VOCABULARY, dtype=torch.float32, scale=4.0)
        rows = _rows(device, count, temperature, top_k, top_p)
        filtered = top_k > 0 or top_p < 1

        def run() -> Tensor:
            return draw(logits, rows, prepare(logits, rows, filtered))

        def possible() -> Tensor:
            drawn = run().cpu()
            chance = reference.probabilities(logits.cpu(), rows.cpu()).gather(1, drawn.long()[:, None])[:, 0]
            return torch.where(chance > 0, drawn, -2).to(device)

        peers: dict[str, Callable[[], Any]] = {"torch": lambda: torch.multinomial(logits.softmax(-1), 1)}
        return Built(run=run, expected=possible, bytes=size(logits), peers=peers)

    return build


def _edits(device: torch.device, fp8: torch.dtype) -> Built:
    count, listed = 256, 1024
    logits = normal(device, count, VOCABULARY, dtype=torch.float32)
    starts = torch.arange(count + 1, device=device, dtype=torch.int32) * listed
    tokens = torch.arange(count * listed, device=device, dtype=torch.int32) % VOCABULARY
    ones = torch.ones(count, device=device)
    penalties = Penalties(
        starts=starts, tokens=tokens, counts=torch.ones_like(tokens), repetition=ones, frequency=ones, presence=ones
    )
    biases = Biases(starts=starts, tokens=tokens, values=torch.ones(count * listed, device=device) * 2)

    def run() -> Tensor:  # what one takes away the other gives back
        penalize(logits, penalties)
        add_bias(logits, biases)
        return logits

    return Built(run=run, expected=logits.clone, bytes=4 * 4 * 8 * count * listed)


def _masks(device: torch.device, fp8: torch.dtype) -> Built:
    """One token of 32 is allowed. The peer's masks are bytes."""
    count, masked = 256, 64
    logits = normal(device, count, VOCABULARY, dtype=torch.float32)
    places = torch.arange(masked, device=device) * (count // masked)
    before = logits.clone()
    masks = torch.full((masked, VOCABULARY // 32), 1 << 7, device=device, dtype=torch.int32)
    banned = (torch.arange(VOCABULARY, device=device) % 32 != 7).expand(masked, -1)

    def run() -> Tensor:  # a second time changes nothing
        mask_logits(logits, places, masks)
        return logits

    def expected() -> Tensor:
        reference.mask_logits(before, places, masks)
        return before

    def peer() -> Tensor:
        return logits.index_copy_(0, places, logits.index_select(0, places).masked_fill_(banned, float("-inf")))

    return Built(run=run, expected=expected, bytes=masked * VOCABULARY * 4 + size(masks), peers={"torch": peer})


def _logprobs(device: torch.device, fp8: torch.dtype) -> Built:
    logits = normal(device, 256, VOCABULARY, dtype=torch.float32)
    tokens = torch.arange(256, device=device, dtype=torch.int32)
    return Built(
        run=lambda: token_logprobs(logits, tokens)[0],
        expected=lambda: reference.token_logprobs(logits, tokens)[0],
        bytes=size(logits),
        peers={"torch": lambda: logits.log_softmax(-1).gather(1, tokens.long()[:, None])},
    )


RMS, LAYER = Norm(1e-5), Norm(1e-5, "layer")
CASES = [
    Case(name="RMSNorm + add 8k x 4096", build=_norm(8192, 4096, RMS), streams=True),
    Case(name="RMSNorm + add 8k x 8192", build=_norm(8192, 8192, RMS), streams=True),
    Case(name="RMSNorm + add 64 x 4096", build=_norm(64, 4096, RMS), streams=True),
    Case(
        name="RMSNorm + add, fp8 per token 8k x 4096",
        build=_norm(8192, 4096, RMS, Scales.TOKEN),
        needs_fp8=True,
        streams=True,
    ),
    Case(
        name="RMSNorm + add, fp8 blocks 8k x 7168",
        build=_norm(8192, 7168, RMS, Scales.BLOCK),
        needs_fp8=True,
        streams=True,
    ),
    Case(name="RMSNorm + add, fp8 static", build=_norm(64, 4096, RMS, Scales.TENSOR), needs_fp8=True, timed=False),
    Case(name="RMSNorm (1 + w)", build=_norm(64, 2304, Norm(1e-6, unit_offset=True)), timed=False),
    Case(name="LayerNorm + add 8k x 4096", build=_norm(8192, 4096, LAYER), streams=True),
    Case(name="head norms 8k x 32 x 128", build=_norm_heads, streams=True),
    Case(name="silu mul 8k x 14336", build=_activation(8192, 14336, Activation.SILU, True), streams=True),
    Case(name="silu mul 64 x 14336", build=_activation(64, 14336, Activation.SILU, True), streams=True),
    Case(
        name="silu mul, fp8 per token 8k x 14336",
        build=_activation(8192, 14336, Activation.SILU, True, Scales.TOKEN),
        needs_fp8=True,
        streams=True,
    ),
    Case(
        name="silu mul, int8 per token 8k x 14336",
        build=_activation(8192, 14336, Activation.SILU, True, Scales.TOKEN, integers=True),
    ),
    Case(
        name="silu mul, fp8 blocks 8k x 2048",
        build=_activation(8192, 2048, Activation.SILU, True, Scales.BLOCK),
        needs_fp8=True,
        streams=True,
    ),
    Case(
        name="quantize fp8 per token 8k x 4096",
        build=_activation(8192, 4096, Activation.IDENTITY, False, Scales.TOKEN),
        needs_fp8=True,
        streams=True,
    ),
    Case(name="gelu mul", build=_activation(64, 9216, Activation.GELU, True), timed=False),
    Case(name="gelu tanh mul", build=_activation(64, 9216, Activation.GELU_TANH, True), timed=False),
    Case(name="relu", build=_activation(64, 9216, Activation.RELU, False), timed=False),
    Case(name="relu squared", build=_activation(64, 9216, Activation.RELU_SQUARED, False), timed=False),
    Case(name="clamped SwiGLU", build=_activation(64, 2880, Activation.SWIGLU_CLAMPED, True), timed=False),
    Case(name="sample greedy 256 x 128k", build=_sampling(0.0, 0, 1.0), streams=True),
    Case(name="sample temperature 256 x 128k", build=_sampling(0.8, 0, 1.0), streams=True),
    Case(name="sample top-p 256 x 128k", build=_sampling(0.8, 0, 0.9), streams=True),
    Case(name="sample top-k 256 x 128k", build=_sampling(0.8, 50, 1.0), streams=True),
    Case(name="grammar masks 64 of 256 x 128k", build=_masks),
    Case(name="penalties and biases 256 x 1k tokens", build=_edits),
    Case(name="log-probabilities 256 x 128k", build=_logprobs, streams=True),
]
