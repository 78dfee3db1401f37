"""What each operation compiles in a day of serving after a few warm-up sizes, one JSON object for each: its name, the
chip, how many kernels the warm-up compiled, and what came after.

In a process of its own, without the interpreter: the launchers run on meta tensors.
"""

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "kernels"))

import torch
from compile_ahead import recorded
from quire_kernels.activation import Activation
from quire_kernels.cache_write import HeadNorm, Rope
from quire_kernels.cache_write.triton import copy_pages, rope_cache_write
from quire_kernels.hardware import CHIPS, Hardware
from quire_kernels.lora.triton import add_lora
from quire_kernels.moe import Experts, Routing
from quire_kernels.moe.triton import align
from quire_kernels.norm import Norm
from quire_kernels.quantize import QuantizedOutput, Scales
from quire_kernels.quantized_matmul import Int4Weight
from quire_kernels.recurrence import Gates, StateBatch
from quire_kernels.sampling import Biases, Penalties, Rows
from quire_kernels.sampling.triton import add_bias, draw, mask_logits, penalize, prepare, token_logprobs
from quire_kernels.triton_backend import TritonBackend
from torch import Tensor

META = torch.device("meta")
WARM_TOKENS, WARM_ROWS = (1, 32, 128, 256, 1024, 4096, 8192), (1,)
VOCABULARY = 128256
Operation = Callable[[int], object]  # of so many tokens, or rows


def new(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(size, dtype=dtype, device=META)


def floats(*size: int) -> Tensor:
    return new(*size, dtype=torch.float32)


def ints(*size: int) -> Tensor:
    return new(*size, dtype=torch.int32)


def int4(*lead: int, n: int, k: int) -> Int4Weight:
    return Int4Weight(new(*lead, k // 64, n, 32, dtype=torch.uint8), new(*lead, k // 128, n), None, 128)


def products(chip: Hardware, backend: TritonBackend) -> Iterator[tuple[str, Operation]]:
    """At sizes that are cut into many parts, into few, and that no tile divides."""
    invariant = TritonBackend(META, deterministic=True)
    fp8 = chip.fp8
    for n, k in ((512, 8192), (4096, 4096), (28672, 4096), (2880, 2880)):
        name = f"{n} x {k}"
        yield f"invariant {name}", lambda t, n=n, k=k: invariant.linear(new(n, k), new(n))(new(t, k))
        if k % 128:
            continue
        yield f"int4 {name}", lambda t, n=n, k=k: backend.int4_linear(int4(n=n, k=k), new(n))(new(t, k))
        for dtype, scales, of_weight in (
            (fp8, Scales.TENSOR, (1,)),
            (fp8, Scales.TOKEN, (n,)),
            (fp8, Scales.BLOCK, (n // 128, k // 128)),
            (torch.int8, Scales.TOKEN, (n,)),
        ):
            output = QuantizedOutput(scales, dtype, floats(1))
            multiply = backend.scaled_linear(new(n, k, dtype=dtype), floats(*of_weight), None, torch.bfloat16)
            yield f"{dtype} {scales.name} {name}", lambda t, f=multiply, o=output, k=k: f(o.empty(t, k, META))


def experts(chip: Hardware, backend: TritonBackend) -> Iterator[tuple[str, Operation]]:
    for e, k, hidden, inner in ((8, 2, 4096, 1024), (60, 4, 2048, 1408), (128, 8, 2048, 768), (256, 8, 7168, 256)):
        gate_up, down = (e, 2 * inner, hidden), (e, hidden, inner)
        weights = {
            "bf16": Experts(gate_up=new(*gate_up), down=new(*down)),
            "part": Experts(gate_up=new(*gate_up), down=new(*down), first=e),
            "int4": Experts(gate_up=int4(e, n=2 * inner, k=hidden), down=int4(e, n=hidden, k=inner)),
            "mxfp4": Experts(
                gate_up=new(e, 2 * inner, hidden // 2, dtype=torch.uint8),
                down=new(e, hidden, inner // 2, dtype=torch.uint8),
                gate_up_scale=new(e, 2 * inner, hidden // 32, dtype=torch.uint8),
                down_scale=new(e, hidden, inner // 32, dtype=torch.uint8),
            ),
        }
        for scales in Scales:
            block = scales is Scales.BLOCK
            weights[f"fp8 {scales.name}"] = Experts(
                gate_up=new(*gate_up, dtype=chip.fp8),
                down=new(*down, dtype=chip.fp8),
                gate_up_scale=floats(e, *((2 * inner // 128, hidden // 128) if block else (2 * inner,))),
                down_scale=floats(e, *((hidden // 128, inner // 128) if block else (hidden,))),
                inputs=QuantizedOutput(scales, chip.fp8, floats(1)),
            )
        for name, held in weights.items():
            routed = held.first + e
            yield (
                f"{e} experts {name}",
                lambda t, w=held, r=routed, k=k, h=hidden: backend.experts(
                    new(t, h), floats(t, r), Routing(top_k=k), w
                ),
            )


def of_tokens(chip: Hardware, backend: TritonBackend) -> Iterator[tuple[str, Operation]]:
    yield from products(chip, backend)
    yield from experts(chip, backend)
    outputs = [None, *(QuantizedOutput(scales, chip.fp8, floats(1)) for scales in Scales)]
    for output in outputs:
        name = "bf16" if output is None else output.scales.name
        yield (
            f"norm {name}",
            lambda t, o=output: backend.add_norm(new(t, 4096), new(t, 4096), new(4096), None, Norm(1e-6), o),
        )
        yield f"activate {name}", lambda t, o=output: backend.activate(new(t, 2 * 1536), Activation.SILU, True, o)
    yield "norm of heads", lambda t: backend.norm_heads(new(t, 32, 128), new(128), None, Norm(1e-6))
    cache = new(9, 8, 16, 128)
    norm, rope = HeadNorm(q_weight=new(128), k_weight=new(128), eps=1e-6), Rope(cos_sin=floats(4096, 2, 64))
    yield (
        "cache write",
        lambda t: rope_cache_write(
            new(t, 6144), cache, cache, ints(t), new(t, dtype=torch.int64), 32, rope, norm, None
        ),
    )
    yield "copy pages", lambda t: copy_pages(cache, new(t, 2, dtype=torch.int64))
    yield (
        "adapters",
        lambda t: add_lora(
            new(t, 4096), new(t, 4096), new(16, 16, 4096), new(16, 1024, 16), align(ints(t, 1), 16, 16), 1024
        ),
    )
    yield (
        "convolution",
        lambda t: backend.short_convolution(new(t, 4096), new(4, 4096), None, True, new(9, 3, 4096), _states(t)),
    )
    gates = Gates(decay=floats(32), dt_bias=floats(32))
    yield (
        "recurrence",
        lambda t: backend.recurrence(
            new(t, 16, 128), new(t, 16, 128), new(t, 32, 128), new(t, 32), new(t, 32), gates, floats(9, 32, 128, 128),
            _states(t),
        ),
    )  # fmt: skip


def _states(tokens: int) -> StateBatch:
    requests = max(1, tokens // 50)
    return StateBatch(
        reads=ints(requests),
        writes=ints(requests),
        query_starts=ints(requests + 1),
        requests=ints(tokens),
        longest_query=-(-tokens // requests),
    )


def rows_of(count: int) -> Rows:
    return Rows(
        temperature=floats(count),
        top_k=ints(count),
        top_p=floats(count),
        min_p=floats(count),
        seeds=new(count, dtype=torch.int64),
        positions=new(count, dtype=torch.int64),
    )


def of_rows() -> Iterator[tuple[str, Operation]]:
    def drawn(filtered: bool) -> Operation:
        def run(count: int) -> None:
            logits, rows = floats(count, VOCABULARY), rows_of(count)
            draw(logits, rows, prepare(logits, rows, filtered))

        return run

    def edited(count: int) -> None:
        logits, listed = floats(count, VOCABULARY), 7 * count
        three = {name: floats(count) for name in ("repetition", "frequency", "presence")}
        penalize(logits, Penalties(starts=ints(count + 1), tokens=ints(listed), counts=ints(listed), **three))
        add_bias(logits, Biases(starts=ints(count + 1), tokens=ints(listed), values=floats(listed)))

    def masked(count: int) -> None:
        places = new(count, dtype=torch.int64)
        mask_logits(floats(1024, VOCABULARY), places, ints(count, -(-VOCABULARY // 32)))

    yield "edits", edited
    yield "masks", masked
    for filtered in (False, True):
        yield f"draw, filtered {filtered}", drawn(filtered)
    yield "logprobs", lambda count: token_logprobs(floats(count, VOCABULARY), ints(count))


def a_day(most: int, seed: str) -> list[int]:
    """Sizes: all small ones, random ones of every magnitude, and where multiples of 16 begin and end."""
    numbers = random.Random(seed)
    random_ones = [numbers.randint(1, numbers.choice((100, 1000, most))) for _ in range(60)]
    edges = [edge + by for edge in (64, 128, 256, 512, most - 1) for by in (-1, 0, 1)]
    return [*range(1, 20), *(size for size in edges if size <= most), *random_ones]


def main() -> None:
    for target in ("sm_90", "gfx942"):
        chip = CHIPS[target]
        with recorded(chip) as keys:
            backend = TritonBackend(META)
            work = [(*made, WARM_TOKENS, 8192) for made in of_tokens(chip, backend)]
            work += [(*made, WARM_ROWS, 1024) for made in of_rows()]
            for name, operation, warm, most in work:
                keys.clear()
                for size in warm:
                    operation(size)
                warmed = len(keys)
                late = {}
                for size in a_day(most, name):
                    before = len(keys)
                    operation(size)
                    if len(keys) > before:
                        late[size] = [launch.kernel.__name__ for launch in list(keys)[before:]]
                print(json.dumps({"operation": name, "target": target, "warmed": warmed, "late": late}), flush=True)


if __name__ == "__main__":
    main()
