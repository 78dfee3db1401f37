"""Products: batch-invariant, quantized, of experts, of adapters."""

from collections.abc import Callable
from typing import Any

import torch
from case import Built, Case, normal, size
from quire_kernels.lora import reference as lora_reference
from quire_kernels.lora.triton import add_lora
from quire_kernels.matmul import reference as plain_reference
from quire_kernels.matmul.triton import matmul
from quire_kernels.moe import Routing
from quire_kernels.moe import reference as moe_reference
from quire_kernels.moe.int4 import grouped_int4_matmul
from quire_kernels.moe.triton import align, combine, grouped_matmul, route, rows_per_tile
from quire_kernels.quantized_matmul import Int4Weight, reference
from quire_kernels.quantized_matmul.triton import int4_matmul, scaled_matmul
from torch import Tensor

Build = Callable[[torch.device, torch.dtype], Built]


def _invariant(m: int, n: int, k: int) -> Build:
    def build(device: torch.device, fp8: torch.dtype) -> Built:
        a, w = normal(device, m, k), normal(device, n, k)
        return Built(
            run=lambda: matmul(a, w),
            expected=lambda: plain_reference.matmul(a, w),
            bytes=size(a, w) + m * n * 2,
            operations=2.0 * m * n * k,
            terms=k**0.5,
            peers={"cuBLAS": lambda: a @ w.T},
        )

    return build


def _fp8(m: int, n: int, k: int, kind: str) -> Build:
    def build(device: torch.device, fp8: torch.dtype) -> Built:
        a, w = normal(device, m, k, dtype=fp8), normal(device, n, k, dtype=fp8)
        shapes = {
            "tensor": ((1,), (1,)),
            "row": ((m,), (n,)),
            "block": ((m, k // 128), (-(-n // 128), k // 128)),
        }[kind]
        a_scale, w_scale = (torch.rand(shape, device=device) + 0.5 for shape in shapes)
        peers: dict[str, Callable[[], Any]] = {}
        if kind != "block":
            a_shaped, w_shaped = (a_scale[0], w_scale[0]) if kind == "tensor" else (a_scale[:, None], w_scale[None, :])
            peers["_scaled_mm"] = lambda: torch._scaled_mm(
                a, w.T, scale_a=a_shaped, scale_b=w_shaped, out_dtype=torch.bfloat16
            )
        return Built(
            run=lambda: scaled_matmul(a, a_scale, w, w_scale, torch.bfloat16),
            expected=lambda: reference.scaled_matmul(a, a_scale, w, w_scale, torch.bfloat16),
            bytes=size(a, w) + m * n * 2,
            operations=2.0 * m * n * k,
            terms=k**0.5,
            peers=peers,
        )

    return build


def _int8(m: int, n: int, k: int) -> Build:
    def build(device: torch.device, fp8: torch.dtype) -> Built:
        a, w = (torch.randint(-127, 128, (rows, k), device=device, dtype=torch.int8) for rows in (m, n))
        a_scale, w_scale = torch.full((m,), 0.01, device=device), torch.full((n,), 0.01, device=device)
        return Built(
            run=lambda: scaled_matmul(a, a_scale, w, w_scale, torch.bfloat16),
            expected=lambda: reference.scaled_matmul(a, a_scale, w, w_scale, torch.bfloat16),
            bytes=size(a, w) + m * n * 2,
            operations=2.0 * m * n * k,
            terms=k**0.5,
        )

    return build


def _int4(m: int, n: int, k: int, group: int = 128, zeros: bool = True) -> Build:
    def build(device: torch.device, fp8: torch.dtype) -> Built:
        a = normal(device, m, k)
        weight = Int4Weight(
            torch.randint(0, 256, (k // 64, n, 32), device=device, dtype=torch.uint8),
            (torch.rand(k // group, n, device=device) * 0.1).bfloat16(),
            torch.randint(0, 16, (k // group, n), device=device, dtype=torch.uint8) if zeros else None,
            group,
        )
        dense = None if device.type == "meta" else reference.dequantize_int4(weight).bfloat16()
        return Built(
            run=lambda: int4_matmul(a, weight),
            expected=lambda: reference.int4_matmul(a, weight),
            bytes=size(a, weight.packed, weight.scales, weight.zeros) + m * n * 2,
            operations=2.0 * m * n * k,
            terms=k**0.5,
            peers={} if dense is None else {"cuBLAS bf16": lambda: a @ dense.T},
        )

    return build


def _experts_in_int4(tokens: int, experts: int, k: int, hidden: int, inner: int) -> Build:
    def build(device: torch.device, fp8: torch.dtype) -> Built:
        x, n = normal(device, tokens, hidden), 2 * inner
        w = Int4Weight(
            torch.randint(256, (experts, hidden // 64, n, 32), dtype=torch.uint8, device=device),
            torch.rand(experts, hidden // 128, n, device=device).bfloat16() * 0.02,
            torch.randint(16, (experts, hidden // 128, n), dtype=torch.uint8, device=device),
            128,
        )
        chosen = torch.rand(tokens, experts, device=device).topk(k).indices.int()
        alignment = align(chosen, experts, rows_per_tile(tokens * k, experts))
        used = min(experts, tokens * k)
        return Built(
            run=lambda: grouped_int4_matmul(x, w, alignment, k),
            expected=lambda: moe_reference.grouped_matmul(x, w, chosen, k, torch.bfloat16),
            bytes=size(x) + size(w.packed, w.scales, w.zeros) * used / experts + tokens * k * n * 2,
            operations=2.0 * tokens * k * n * hidden,
            terms=0.02 * 8 * hidden**0.5,
        )

    return build


def _experts_in_mxfp4(tokens: int, experts: int, k: int, hidden: int, inner: int) -> Build:
    def build(device: torch.device, fp8: torch.dtype) -> Built:
        x = normal(device, tokens, hidden)
        w = torch.randint(256, (experts, 2 * inner, hidden // 2), dtype=torch.uint8, device=device)
        exponents = torch.randint(118, 124, (experts, 2 * inner, hidden // 32), dtype=torch.uint8, device=device)
        chosen = torch.rand(tokens, experts, device=device).topk(k).indices.int()
        alignment = align(chosen, experts, rows_per_tile(tokens * k, experts))
        used = min(experts, tokens * k)
        return Built(
            run=lambda: grouped_matmul(x, w, alignment, k, torch.bfloat16, w_scale=exponents),
            expected=lambda: moe_reference.grouped_matmul(x, w, chosen, k, torch.bfloat16, w_scale=exponents),
            bytes=size(x) + size(w, exponents) * used / experts + tokens * k * 2 * inner * 2,
            operations=2.0 * tokens * k * 2 * inner * hidden,
            terms=hidden**0.5,
        )

    return build


def _experts(tokens: int, experts: int, k: int, hidden: int, inner: int, blocks: bool) -> Build:
    """The first product of a layer: tokens → gate and up."""

    def build(device: torch.device, fp8: torch.dtype) -> Built:
        dtype = fp8 if blocks else torch.bfloat16
        x, w = normal(device, tokens, hidden, dtype=dtype), normal(device, experts, 2 * inner, hidden, dtype=dtype)
        scales: tuple[Tensor | None, Tensor | None] = (None, None)
        if blocks:
            scales = (
                torch.rand(tokens, hidden // 128, device=device) + 0.5,
                torch.rand(experts, 2 * inner // 128, hidden // 128, device=device) + 0.5,
            )
        chosen = torch.rand(tokens, experts, device=device).topk(k).indices.int()
        alignment = align(chosen, experts, rows_per_tile(tokens * k, experts))
        used = min(experts, tokens * k)
        return Built(
            run=lambda: grouped_matmul(x, w, alignment, k, torch.bfloat16, *scales),
            expected=lambda: moe_reference.grouped_matmul(x, w, chosen, k, torch.bfloat16, *scales),
            bytes=size(x) + size(w) * used / experts + tokens * k * 2 * inner * 2,
            operations=2.0 * tokens * k * 2 * inner * hidden,
            terms=hidden**0.5,
        )

    return build


def _route(tokens: int, experts: int, routing: Routing) -> Build:
    def build(device: torch.device, fp8: torch.dtype) -> Built:
        logits = normal(device, tokens, experts, dtype=torch.float32)
        return Built(
            run=lambda: route(logits, routing, range(experts))[0],
            expected=lambda: moe_reference.route(logits, routing, range(experts))[0],
            bytes=size(logits) + tokens * routing.top_k * 8,
            peers={"torch": lambda: logits.softmax(-1).topk(routing.top_k)},
        )

    return build


def _align(tokens: int, experts: int, k: int) -> Build:
    def build(device: torch.device, fp8: torch.dtype) -> Built:
        chosen = torch.rand(tokens, experts, device=device).topk(k).indices.int()

        def both(made: Any) -> tuple[Tensor, Tensor]:
            return made.pairs, made.tile_experts

        return Built(
            run=lambda: both(align(chosen, experts, 64)),
            expected=lambda: both(moe_reference.align(chosen, experts, 64)),
            bytes=3 * size(chosen),
            peers={"torch sort": lambda: chosen.flatten().sort(stable=True)},
        )

    return build


def _combine(device: torch.device, fp8: torch.dtype) -> Built:
    x, weights = normal(device, 4096 * 8, 2048), torch.rand(4096, 8, device=device)
    return Built(
        run=lambda: combine(x, weights),
        expected=lambda: moe_reference.combine(x, weights),
        bytes=size(x) * 9 / 8,
    )


def _lora(device: torch.device, fp8: torch.dtype) -> Built:
    tokens, adapters, rank, width = 64, 16, 16, 4096
    x, out = normal(device, tokens, width), torch.zeros(tokens, width, device=device, dtype=torch.bfloat16)
    a, b = normal(device, adapters, rank, width, scale=0.01), normal(device, adapters, width, rank, scale=0.1)
    of_token = torch.arange(tokens, device=device, dtype=torch.int32) % adapters
    alignment = align(of_token[:, None], adapters, 16)

    def run() -> Tensor:
        out.zero_()
        add_lora(out, x, a, b, alignment)
        return out

    def expected() -> Tensor:
        fresh = torch.zeros_like(out)
        lora_reference.add_lora(fresh, x, a, b, of_token)
        return fresh

    return Built(run=run, expected=expected, bytes=size(x, a, b) + 3 * size(out), terms=2.0)


DEEPSEEK = Routing(top_k=8, score="sigmoid", groups=8, top_groups=4, scale=2.5)
CASES = [
    *(
        Case(name=f"invariant {m} x 4096 x 4096", build=_invariant(m, 4096, 4096), streams=m == 1)
        for m in (1, 64, 4096)
    ),
    *(
        Case(name=f"fp8 rows {m} x 28672 x 4096", build=_fp8(m, 28672, 4096, "row"), needs_fp8=True, streams=m == 1)
        for m in (1, 64, 4096)
    ),
    Case(name="fp8 tensor 4096 x 4096 x 14336", build=_fp8(4096, 4096, 14336, "tensor"), needs_fp8=True),
    *(
        Case(name=f"fp8 blocks {m} x 4096 x 7168", build=_fp8(m, 4096, 7168, "block"), needs_fp8=True)
        for m in (1, 64, 4096)
    ),
    *(Case(name=f"int8 {m} x 4096 x 4096", build=_int8(m, 4096, 4096)) for m in (1, 4096)),
    *(Case(name=f"int4 {m} x 28672 x 4096", build=_int4(m, 28672, 4096), streams=m == 1) for m in (1, 16, 256)),
    Case(name="int4 group 32, symmetric", build=_int4(16, 4096, 4096, 32, False), timed=False),
    *(
        Case(name=f"experts Qwen3-30B-A3B, {m} tokens", build=_experts(m, 128, 8, 2048, 768, False))
        for m in (1, 64, 4096)
    ),
    *(
        Case(name=f"experts DeepSeek-V3/8 fp8, {m} tokens", build=_experts(m, 256, 8, 7168, 256, True), needs_fp8=True)
        for m in (64, 4096)
    ),
    *(
        Case(name=f"experts gpt-oss-120b mxfp4, {m} tokens", build=_experts_in_mxfp4(m, 128, 4, 2880, 2880))
        for m in (1, 64, 4096)
    ),
    *(
        Case(name=f"experts Qwen3-30B-A3B int4, {m} tokens", build=_experts_in_int4(m, 128, 8, 2048, 768))
        for m in (1, 64, 4096)
    ),
    Case(name="route Qwen3-30B-A3B, 4096 tokens", build=_route(4096, 128, Routing(top_k=8))),
    Case(name="route DeepSeek-V3, 4096 tokens", build=_route(4096, 256, DEEPSEEK)),
    Case(name="align 4096 tokens, 128 experts", build=_align(4096, 128, 8)),
    Case(name="combine 4096 tokens", build=_combine, streams=True),
    Case(name="adapters, 64 tokens, 16 of rank 16", build=_lora),
]
