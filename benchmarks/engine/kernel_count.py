"""How many kernels a layer and a step launch when they decode, beside the fewest there could be, and what a step reads.

Both run on the meta device with the Triton backend of an H100: launches are noted instead of made, and so are torch's
own operators that would launch something. `make kernel-table` writes the result to kernels.md.

python benchmarks/engine/kernel_count.py [--write]
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dry_gpu import CARD, dry_runner
from quire_engine.layers.caches import empty_caches
from quire_engine.layers.linear import Builder
from quire_engine.memory.dry_run import META, DryGroup
from quire_engine.models.decoder import Layer
from quire_engine.models.families import spec_of
from quire_engine.quantization.config import quantization_of
from quire_engine.step import StepPlan
from quire_engine.weights.hf_config import completed
from quire_engine.weights.random import RandomWeights
from quire_kernels.backends import AttentionBatch
from quire_kernels.cache_write import Rope
from quire_kernels.hardware import CHIPS, stands_for
from quire_kernels.triton_backend import TritonBackend
from shapes import SHAPES
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

TABLE = Path(__file__).with_name("kernels.md")
_FREE = {  # these change how memory is seen, or reserve some
    "empty", "empty_like", "new_empty", "view", "_unsafe_view", "slice", "select", "t", "transpose", "expand",
    "unsqueeze", "squeeze", "detach", "alias", "split", "split_with_sizes", "as_strided", "permute", "unbind",
}  # fmt: skip
_ATTENTION = "norm, qkv, rotary + cache, attention, joining its parts, output, norm"
FEWEST = {  # with one kernel per product of matrices and what must be finished before the next can begin
    "dense": f"{_ATTENTION}, gate + up, activation, down",
    "experts": f"{_ATTENTION}, router + choice, sort, gate + up, activation, down + sum",
}


class Launches(TorchDispatchMode):
    """Names of what would be launched, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__.split(".")[0]
        result = func(*args, **(kwargs or {}))
        if name not in _FREE and getattr(result, "device", META) == META:
            self.names.append(f"torch {name}")
        return result


@contextmanager
def recorded() -> Iterator[Launches]:
    """Within, kernels are noted instead of launched."""
    launches = Launches()
    plain = JITFunction.run

    def note(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launches.names.append(str(self.__name__).strip("_"))

    JITFunction.run = note
    try:
        with launches:
            yield launches
    finally:
        JITFunction.run = plain


def layer_launches(
    shape: str, quantization: dict[str, Any] | None, requests: int, deterministic: bool = False
) -> list[str]:
    """Of a layer in the middle of the model, decoding so many requests of up to 8,192 tokens."""
    spec = spec_of(completed(SHAPES[shape]))
    scheme = quantization_of({"quantization_config": quantization} if quantization else {}, None)
    fp8_cache = bool(quantization) and "fp8" in str(quantization)

    def ints(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=META)

    with stands_for(CHIPS["sm_90"]):
        group = DryGroup(dtype=torch.bfloat16)
        backend = TritonBackend(META, deterministic=deterministic)
        layer = Layer(Builder(RandomWeights(torch.bfloat16, META), group, backend, scheme), spec, 1, fp8_cache)
        dtype = torch.float8_e4m3fn if fp8_cache else torch.bfloat16
        (cache,) = empty_caches(
            spec,
            group,
            [1],
            num_pages=4,
            block_size=16,
            num_states=0,
            dtype=torch.bfloat16,
            cache_dtype=dtype,
            device=META,
        )
        batch = AttentionBatch(
            positions=ints(requests),
            slots=ints(requests, dtype=torch.int64),
            block_tables=ints(requests, 512),
            query_starts=ints(requests + 1),
            longest_query=1,
            context_lens=ints(requests),
        )
        residual = torch.empty(requests, spec.hidden_size, dtype=torch.bfloat16, device=META)
        rope = Rope(cos_sin=torch.empty(8192, 2, spec.head_dim // 2, device=META))
        with recorded():  # the first layer makes what the step's others share
            layer(residual, residual.clone(), batch, cache, rope)
        with recorded() as launches:
            layer(residual, residual.clone(), batch, cache, rope)
    return launches.names[1:]  # the clone is not the layer's


_CONTEXT = 1024
_BANDWIDTH = 3.35e12  # bytes/s of an H100 SXM, as NVIDIA publishes it; a copy reaches about 0.9 of it
_HOST = [  # what `python benchmarks/host_side.py steps` says
    "one core of an Intel Xeon (AVX-512), 2026-11-26, kernels and captured steps replaced by nothing",
    "1 request 175 µs, 64 requests 232 µs, 256 requests 379 µs (medians of three runs)",
    "the driver's share of a launch is not in it; it hides behind the step before, where that is longer",
]


def decoding(requests: int) -> StepPlan:
    """A step in which so many requests, 1,024 tokens long, compute one token more and need no new page."""
    each, rows = np.ones(requests, np.int32), np.arange(requests, dtype=np.int32)
    nothing = [np.zeros(0, np.int32)] * 9
    return StepPlan(rows, _CONTEXT * each, each, -each, nothing[0], each, *nothing)


def step_launches(requests: int, **options: Any) -> tuple[list[str], int]:
    """What such a step of Llama-3.1-8B launches, and the bytes of weights and contexts that it reads at least."""
    with (
        tempfile.TemporaryDirectory() as folder,
        dry_runner(Path(folder), SHAPES["Llama-3.1-8B"], max_model_len=8192, **options) as (runner, _),
        recorded() as launches,
    ):
        runner.execute(decoding(requests))
    spec, memory = runner.spec, runner.memory
    read = memory.weight_bytes - 2 * spec.vocab_size * spec.hidden_size  # rows of the embedding are looked up
    return launches.names, read + requests * _CONTEXT * memory.page_bytes // memory.block_size


_BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
_TOKENS = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
ROWS: list[tuple[str, str, dict[str, Any] | None, bool]] = [
    ("Llama-3.1-8B", "bf16", None, False),
    ("Llama-3.1-8B", "bf16, deterministic", None, True),
    ("Llama-3.1-8B", "fp8 and fp8 cache", _TOKENS, False),
    ("Llama-3.1-8B", "int4 (AWQ)", _AWQ, False),
    ("Qwen3-8B", "bf16", None, False),
    ("Qwen3-30B-A3B", "bf16", None, False),
    ("Qwen3-30B-A3B", "fp8 blocks and fp8 cache", _BLOCKS, False),
]


def steps() -> list[str]:
    """The part about whole steps."""
    lines = [
        "## A decoding step of Llama-3.1-8B",
        "",
        f"Contexts of {_CONTEXT:,} tokens, bf16, greedy. The floor is what is read over the {CARD}'s published",
        f"{_BANDWIDTH / 1e12:.2f} TB/s. Outside of the graph are the step's upload, drawing, and keeping the tokens.",
        "",
        "| requests | launches | of them outside of the graph | read | floor |",
        "|---|---|---|---|---|",
    ]
    for requests in (1, 64):
        everything, read = step_launches(requests, enforce_eager=True)
        outside, _ = step_launches(requests)
        lines.append(
            f"| {requests} | {len(everything)} | {len(outside)}: {', '.join(outside)} | {read / 1e9:.2f} GB "
            f"| {read / _BANDWIDTH * 1e3:.2f} ms |"
        )
    return [*lines, "", f"Host time of a step ({_HOST[0]}):", "", *(f"- {line}" for line in _HOST[1:])]


def table() -> str:
    """Markdown."""
    lines = [
        "# Kernels per layer",
        "",
        "What a layer launches when it decodes 64 requests (one, in brackets, where it differs), counted by",
        "running it on the meta device as an H100 would (`kernel_count.py`). torch's own operators are named so;",
        "matrix products in bf16 are cuBLAS's `mm`.",
        "",
        "| model | weights | kernels | fewest | what |",
        "|---|---|---|---|---|",
    ]
    for shape, name, quantization, deterministic in ROWS:
        many, one = (layer_launches(shape, quantization, requests, deterministic) for requests in (64, 1))
        count = str(len(many)) + (f" ({len(one)})" if len(one) != len(many) else "")
        kind = "experts" if spec_of(completed(SHAPES[shape])).experts is not None else "dense"
        fewest = len(FEWEST[kind].split(", "))
        lines.append(f"| {shape} | {name} | {count} | {fewest} | {', '.join(many)} |")
    lines += [
        "",
        "The fewest, with one kernel per product and per step that must be finished before the next begins:",
        "",
    ]
    lines += [f"- {kind}: {names}" for kind, names in FEWEST.items()]
    lines += ["", *steps()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="to kernels.md")
    options = parser.parse_args()
    if options.write:
        TABLE.write_text(table())
    else:
        print(table())


if __name__ == "__main__":
    main()
