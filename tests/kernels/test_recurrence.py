"""Recurrent layers: Triton and C against the reference, and the reference against transformers."""

import itertools

import pytest
import torch
from quire_kernels.backends import Backend
from quire_kernels.native.backend import NativeBackend
from quire_kernels.recurrence import Gates, StateBatch, reference
from quire_kernels.torch_backend import TorchBackend
from quire_kernels.triton_backend import TritonBackend
from tolerance import assert_close
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import (
    causal_conv1d_fn,
    torch_chunk_gated_delta_rule,
)

KERNELS = [("triton", torch.float32), ("triton", torch.bfloat16), ("native", torch.float32)]
# tokens of each request, the page it starts from, the page it leaves its state in
BATCHES = [
    ([1], [-1], [0]),
    ([1, 1, 1], [2, 5, -1], [2, 4, 0]),  # in place, elsewhere, from nothing
    ([37, 1, 2, 5, 0, 3], [-1, 3, 6, 6, 5, 1], [0, 3, 2, 4, 7, 1]),  # two start from one page; one has no token
]
PAGES = 8


def backend_of(name: str) -> Backend:
    return TritonBackend(torch.device("cpu")) if name == "triton" else NativeBackend()


def batch_of(counts: list[int], reads: list[int], writes: list[int]) -> StateBatch:
    starts = torch.tensor([0, *counts]).cumsum(0)
    return StateBatch(
        reads=torch.tensor(reads, dtype=torch.int32),
        writes=torch.tensor(writes, dtype=torch.int32),
        query_starts=starts.int(),
        requests=torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).int(),
        longest_query=max(counts),
    )


def states_of(shape: tuple[int, ...], dtype: torch.dtype, reads: list[int]) -> torch.Tensor:
    """Pages that nobody reads hold NaN."""
    states = torch.full((PAGES, *shape), float("nan"))
    for page in {page for page in reads if page >= 0}:
        states[page] = torch.randn(shape)
    return states.to(dtype)


@pytest.mark.parametrize(("counts", "reads", "writes"), BATCHES)
@pytest.mark.parametrize(("channels", "taps", "bias", "silu"), [(40, 4, True, True), (300, 3, False, False)])
@pytest.mark.parametrize(("name", "dtype"), KERNELS)
def test_short_convolution(
    name: str, dtype: torch.dtype, channels: int, taps: int, bias: bool, silu: bool, counts: list[int],
    reads: list[int], writes: list[int],
) -> None:  # fmt: skip
    x = torch.randn(sum(counts), channels + 8).to(dtype)[:, 8:]
    weight, added = torch.randn(taps, channels).to(dtype), torch.randn(channels).to(dtype) if bias else None
    states, batch = states_of((taps - 1, channels), dtype, reads), batch_of(counts, reads, writes)
    expected_states = states.clone()
    got = backend_of(name).short_convolution(x, weight, added, silu, states, batch)
    expected = TorchBackend().short_convolution(x, weight, added, silu, expected_states, batch)
    assert_close(got, expected)
    assert torch.equal(states[writes], expected_states[writes])
    kept = [page for page in range(PAGES) if page not in writes]
    assert torch.equal(states[kept].nan_to_num(), expected_states[kept].nan_to_num())


@pytest.mark.parametrize(("counts", "reads", "writes"), BATCHES)
@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize(("heads", "groups", "rows", "columns"), [(4, 2, 16, 16), (2, 2, 24, 40)])
@pytest.mark.parametrize(("name", "dtype"), KERNELS)
def test_recurrence(
    name: str, dtype: torch.dtype, heads: int, groups: int, rows: int, columns: int, delta: bool,
    counts: list[int], reads: list[int], writes: list[int],
) -> None:  # fmt: skip
    tokens = sum(counts)
    mixed = torch.randn(tokens, 2 * groups * rows + heads * columns + 3).to(dtype)
    q = mixed[:, : groups * rows].unflatten(1, (groups, rows))
    k = mixed[:, groups * rows : 2 * groups * rows].unflatten(1, (groups, rows))
    v = mixed[:, 2 * groups * rows : -3].unflatten(1, (heads, columns))
    dt, beta = torch.randn(tokens, 2 * heads).to(dtype).split(heads, 1)
    gates = Gates(
        decay=-torch.rand(heads) * 2,
        dt_bias=torch.randn(heads),
        skip=None if delta else torch.randn(heads),
        limits=(0.0, float("inf")) if delta else (0.2, 1.1),
    )
    states, batch = states_of((heads, rows, columns), torch.float32, reads), batch_of(counts, reads, writes)
    expected_states = states.clone()
    got = backend_of(name).recurrence(q, k, v, dt, beta if delta else None, gates, states, batch)
    expected = reference.recurrence(q, k, v, dt, beta if delta else None, gates, expected_states, batch)
    in_16_bits = dtype != torch.float32 and max(counts) >= 16  # in chunks the state is read in 16 bits
    assert_close(got, expected, 8.0 if in_16_bits else 1.0)
    near = 1e-2 if in_16_bits else 1e-4
    torch.testing.assert_close(states[writes], expected_states[writes], atol=near, rtol=near)
    kept = [page for page in range(PAGES) if page not in writes]
    assert torch.equal(states[kept].nan_to_num(), expected_states[kept].nan_to_num())


@pytest.mark.parametrize("delta", [True, False])
def test_what_does_not_depend_on_the_cut(delta: bool) -> None:
    """Token by token where that is asked for: the same bits however a prompt is cut up."""
    tokens, heads = 41, 2
    q, k, v = (torch.randn(tokens, heads, 16) for _ in range(3))
    dt, beta = torch.randn(tokens, heads), torch.randn(tokens, heads) if delta else None
    gates = Gates(decay=-torch.rand(heads), dt_bias=torch.randn(heads))
    backend = TritonBackend(torch.device("cpu"), deterministic=True)

    def run(cuts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        states, outs, page = torch.zeros(1, heads, 16, 16), [], -1
        for start, stop in itertools.pairwise(cuts):
            part = slice(start, stop)
            batch = batch_of([stop - start], [page], [0])
            rates = None if beta is None else beta[part]
            outs.append(backend.recurrence(q[part], k[part], v[part], dt[part], rates, gates, states, batch))
            page = 0
        return torch.cat(outs), states

    whole, cut = run([0, 41]), run([0, 16, 23, 40, 41])
    assert torch.equal(whole[0], cut[0])
    assert torch.equal(whole[1], cut[1])


def test_the_reference_is_transformers_convolution() -> None:
    x, weight, bias = torch.randn(30, 12), torch.randn(4, 12), torch.randn(12)
    expected = causal_conv1d_fn(x.T[None], weight.T.contiguous(), bias, activation="silu")[0].T
    states = torch.zeros(2, 3, 12)
    first = reference.short_convolution(x[:11], weight, bias, True, states, batch_of([11], [-1], [1]))
    second = reference.short_convolution(x[11:], weight, bias, True, states, batch_of([19], [1], [0]))
    torch.testing.assert_close(torch.cat((first, second)), expected)
    assert torch.equal(states[0], x[-3:])


def test_the_reference_is_transformers_delta_rule() -> None:
    q, k, v = torch.randn(90, 2, 16), torch.randn(90, 2, 16), torch.randn(90, 4, 24)
    dt, beta = torch.randn(90, 4), torch.randn(90, 4)
    gates = Gates(decay=-torch.rand(4), dt_bias=torch.randn(4))
    expected, last = torch_chunk_gated_delta_rule(
        q[None], k[None], v[None], g=(gates.decay * torch.nn.functional.softplus(dt + gates.dt_bias))[None],
        beta=beta.sigmoid()[None], output_final_state=True, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    states = torch.zeros(1, 4, 16, 24)
    got = reference.recurrence(q, k, v, dt, beta, gates, states, batch_of([90], [-1], [0]))
    torch.testing.assert_close(got, expected[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(states, last, atol=1e-5, rtol=1e-4)


def test_the_reference_is_transformers_scan() -> None:
    """Mamba-2's; transformers keeps the state transposed."""
    x, b, c = torch.randn(90, 4, 24), torch.randn(90, 2, 16), torch.randn(90, 2, 16)
    dt, skip = torch.randn(90, 4), torch.randn(4)
    gates = Gates(decay=-torch.rand(4), dt_bias=torch.randn(4), skip=skip, limits=(0.1, 1.5))
    expected, last = mamba2_chunk_scan(
        x[None], dt[None], gates.decay, b[None], c[None], chunk_size=32, D=skip, z=None, return_final_states=True,
        dt_bias=gates.dt_bias, dt_softplus=True, dt_limit=gates.limits,
    )  # fmt: skip
    states = torch.zeros(1, 4, 16, 24)
    got = reference.recurrence(c, b, x, dt, None, gates, states, batch_of([90], [-1], [0]))
    torch.testing.assert_close(got, expected[0].view(90, 4, 24), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(states.transpose(2, 3), last, atol=1e-4, rtol=1e-4)
