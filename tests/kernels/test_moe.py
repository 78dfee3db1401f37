"""Mixture of experts in Triton against its reference, and the routing against transformers'."""

import pytest
import torch
from quire_kernels.moe import Routing, aligned_rows, reference
from quire_kernels.moe.int4 import grouped_int4_matmul
from quire_kernels.moe.triton import align, combine, grouped_matmul, route
from quire_kernels.quantize import QuantizedOutput, Scales
from quire_kernels.quantize.reference import quantize
from quire_kernels.quantized_matmul import Int4Weight
from tolerance import FP8, assert_close

ROUTINGS = [
    (8, Routing(top_k=2)),
    (60, Routing(top_k=4, renormalize=False)),
    (128, Routing(top_k=8, scale=2.5)),
    (32, Routing(top_k=4, score="sigmoid", correction_bias=torch.randn(32))),
    (64, Routing(top_k=6, score="sigmoid", correction_bias=torch.randn(64), groups=8, top_groups=3)),
    (64, Routing(top_k=6, groups=8, top_groups=3, group_score="max", renormalize=False)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("experts", "routing"), ROUTINGS, ids=[f"{e}-{r.score}-{r.groups}" for e, r in ROUTINGS])
@pytest.mark.parametrize("tokens", [1, 63, 200, pytest.param(1000, marks=pytest.mark.slow)])
def test_route(tokens: int, experts: int, routing: Routing, dtype: torch.dtype) -> None:
    # Exact in bf16 and no two alike, or rounding would choose among equals.
    logits = (torch.rand(tokens, experts).argsort(-1) / 32).to(dtype)
    for held in (range(experts), range(experts // 2, experts)):
        weights, chosen = route(logits, routing, held)
        expected_weights, expected = reference.route(logits, routing, held)
        assert torch.equal(chosen, expected)
        assert_close(weights, expected_weights)


def test_experts_held_elsewhere_weigh_nothing() -> None:
    logits, routing = torch.randn(50, 8), Routing(top_k=3, scale=2.0)
    weights, chosen = reference.route(logits, routing, range(8))
    parts = torch.zeros(50, 8).scatter_(1, chosen.long(), weights)
    for held in (range(3), range(3, 8)):
        weights, chosen = reference.route(logits, routing, held)
        spread = torch.zeros(50, len(held) + 1).scatter_add_(1, chosen.long(), weights)
        assert torch.equal(spread[:, :-1], parts[:, held.start : held.stop])
        assert (spread[:, -1] == 0).all()


def test_routing_is_deepseeks() -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    facts = {"n_routed_experts": 64, "n_group": 8, "topk_group": 3, "num_experts_per_tok": 6, "hidden_size": 32}
    router = DeepseekV3TopkRouter(DeepseekV3Config(**facts, routed_scaling_factor=2.5, norm_topk_prob=True))
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias.normal_()
    with torch.no_grad():
        logits, weights, experts = router(torch.randn(50, 32))
    routing = Routing(
        top_k=6,
        score="sigmoid",
        correction_bias=router.e_score_correction_bias,
        groups=8,
        top_groups=3,
        scale=2.5,
    )
    got_weights, got = reference.route(logits, routing, range(64))
    order, expected_order = got.sort(1), experts.sort(1)
    assert torch.equal(order.values.long(), expected_order.values)
    assert_close(got_weights.gather(1, order.indices), weights.gather(1, expected_order.indices))


# By one program, of one block of pairs or of several; by many programs, of one block each or of several.
@pytest.mark.parametrize(
    ("tokens", "experts", "k"),
    [
        *((1, 8, 2), (9, 1, 1), (63, 60, 4), (40, 128, 8), (700, 3, 1), (1100, 250, 8)),
        pytest.param(1000, 128, 8, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("tile", [16, 64])
def test_align(tokens: int, experts: int, k: int, tile: int) -> None:
    chosen = torch.rand(tokens, experts).topk(k).indices.int()
    chosen[::5] = experts  # goes nowhere
    if experts == 3:
        chosen[:] = 2  # two experts get nothing
    got, expected = align(chosen, experts, tile), reference.align(chosen, experts, tile)
    assert torch.equal(got.pairs, expected.pairs)
    assert torch.equal(got.tile_experts, expected.tile_experts)
    assert got.pairs.shape[0] == aligned_rows(tokens * k, experts, tile)


def expert_layer(tokens: int, experts: int, k: int) -> torch.Tensor:
    chosen = torch.rand(tokens, experts).topk(k).indices.int()
    chosen[chosen == 1] = 0  # expert 1 gets nothing
    return chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "k", "tile"), [(1, 2, 16), (63, 3, 16), (100, 2, 64), (150, 2, 128)])
def test_grouped_matmul(tokens: int, k: int, tile: int, bias: bool, dtype: torch.dtype) -> None:
    experts, n, width = 5, 90, 136
    chosen = expert_layer(tokens, experts, k)
    w = torch.randn(experts, n, width).to(dtype)
    w[1] = float("nan")  # nobody reads it
    shift = torch.randn(experts, n).to(dtype) if bias else None
    for rows, per_row in ((tokens, k), (tokens * k, 1)):
        a = torch.randn(rows, width).to(dtype)
        got = grouped_matmul(a, w, align(chosen, experts, tile), per_row, dtype, bias=shift)
        assert_close(got, reference.grouped_matmul(a, w, chosen, per_row, dtype, bias=shift), width**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "tile", "width"), [(1, 16, 96), (63, 16, 160), (100, 64, 256)])
def test_grouped_matmul_in_mxfp4(tokens: int, tile: int, width: int, dtype: torch.dtype) -> None:
    experts, n, k = 4, 90, 2
    chosen = expert_layer(tokens, experts, k)
    w = torch.randint(256, (experts, n, width // 2), dtype=torch.uint8)
    exponents = torch.randint(118, 131, (experts, n, width // 32), dtype=torch.uint8)
    a, shift = torch.randn(tokens, width).to(dtype), torch.randn(experts, n).to(dtype)
    got = grouped_matmul(a, w, align(chosen, experts, tile), k, dtype, w_scale=exponents, bias=shift)
    expected = reference.grouped_matmul(a, w, chosen, k, dtype, w_scale=exponents, bias=shift)
    assert_close(got, expected, 16 * width**0.5)


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize(("tokens", "tile", "group"), [(1, 16, 32), (63, 16, 128), (100, 64, 64), (150, 128, 32)])
def test_grouped_matmul_in_int4(tokens: int, tile: int, group: int, zeros: bool) -> None:
    experts, n, width, k = 4, 88, 256, 2
    chosen = expert_layer(tokens, experts, k)
    w = Int4Weight(
        torch.randint(256, (experts, width // 64, n, 32), dtype=torch.uint8),
        (torch.rand(experts, width // group, n) + 0.1).bfloat16(),
        torch.randint(16, (experts, width // group, n), dtype=torch.uint8) if zeros else None,
        group,
    )
    a, shift = torch.randn(tokens, width).bfloat16(), torch.randn(experts, n).bfloat16()
    got = grouped_int4_matmul(a, w, align(chosen, experts, tile), k, shift)
    expected = reference.grouped_matmul(a, w, chosen, k, torch.bfloat16, bias=shift)
    assert_close(got, expected, 8 * width**0.5)


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize(("a_scales", "w_shape"), [(1, ()), (2, (1,)), (2, ()), (3, (2, 3))])
def test_grouped_matmul_in_fp8(a_scales: int, w_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    experts, n, width, tokens, k = 4, 200, 384, 63, 2
    chosen = expert_layer(tokens, experts, k)
    a = quantize(torch.randn(tokens, width), QuantizedOutput(Scales(a_scales), dtype, torch.tensor([0.02])))
    w = torch.randn(experts, n, width).to(dtype)
    w_scale = torch.rand(experts, *((n,) if w_shape == (1,) else w_shape)) + 0.1
    got = grouped_matmul(a.values, w, align(chosen, experts, 16), k, torch.bfloat16, a.scale, w_scale)
    expected = reference.grouped_matmul(a.values, w, chosen, k, torch.bfloat16, a.scale, w_scale)
    assert_close(got, expected, width**0.5)


@pytest.mark.parametrize(("tokens", "k", "width"), [(1, 8, 63), (63, 4, 1000), (200, 2, 64)])
def test_combine(tokens: int, k: int, width: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, weights = torch.randn(tokens * k, width).to(dtype), torch.rand(tokens, k)
        assert_close(combine(x, weights), reference.combine(x, weights))
        weights[::2, 1], x[1 :: 2 * k] = 0.0, float("nan")  # what weighs nothing is not read
        expected = (x.nan_to_num().float().unflatten(0, weights.shape) * weights[..., None]).sum(1).to(dtype)
        for combined in (combine, reference.combine):
            assert_close(combined(x, weights), expected)


def test_a_layer_of_experts_is_transformers() -> None:
    """Routed, sorted, multiplied, added up: Mixtral's block."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=64, intermediate_size=96, num_local_experts=8, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(1, 37, 64)
    with torch.no_grad():
        expected = block(x)
        expected = (expected[0] if isinstance(expected, tuple) else expected)[0]
        weights, chosen = route(x[0] @ block.gate.weight.T, Routing(top_k=2), range(8))
        alignment = align(chosen, 8, 16)
        inner = grouped_matmul(x[0], block.experts.gate_up_proj.data, alignment, 2, torch.float32)
        gate, up = inner.chunk(2, -1)
        act = torch.nn.functional.silu(gate) * up
        got = combine(grouped_matmul(act, block.experts.down_proj.data, alignment, 1, torch.float32), weights)
    assert_close(got, expected)
