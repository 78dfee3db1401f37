"""What the GPU at hand says of the engine and its kernels, in stages, the most valuable first.

    make gpu-check              all stages, one after the other
    make gpu-check STAGE=a      a: tokens of small models are the CPU's, in every dtype and way of running
                                b: an 8B model: start, prefill, decode against floors, beside vLLM if it is installed
                                c: every kernel: right, then fast
                                d: experts, latent attention, hybrids, FP8, int4, MXFP4

A stage ends within 8 minutes. Every measure is a process of its own; what fails is a finding like others, printed and
appended to $OUT/gpu-check.jsonl (or build/gpu-check.jsonl) as it comes. The exit status is 0 if all was measured and
nothing was wrong.
"""

import argparse
import dataclasses
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from findings import Findings, Stage
from operations import cases_of

ROOT = Path(__file__).parents[2]
SECONDS = 465.0  # of a stage


@dataclass(frozen=True)
class Model:
    """One of stage d."""

    shape: str
    name: str = ""
    expert_bytes: float = 2.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured."""

    device: str
    small: tuple[str, ...]
    backends: tuple[str, ...]
    dtypes: tuple[str, ...]
    small_load: dict[str, int]
    model: str
    concurrency: tuple[int, ...]
    load: dict[str, int]
    other_concurrency: tuple[int, ...]
    cases: tuple[str, ...]
    others: tuple[Model, ...]
    options: dict[str, Any] = field(default_factory=dict)  # of every engine


FP8 = {"quantization": "fp8", "kv_cache_dtype": "fp8"}
GPU = Sizes(
    device="cuda",
    small=("tiny dense", "tiny experts", "tiny latent", "tiny delta rule", "tiny Mamba", "tiny images"),
    backends=("triton", "torch"),
    dtypes=("float32", "bfloat16", "float16"),
    small_load={"requests": 12, "new_tokens": 40},
    model="Llama-3.1-8B",
    concurrency=(1, 8, 64, 256),
    load={"prompt": 1024, "new_tokens": 128},
    other_concurrency=(1, 64),
    cases=("cases_attention", "cases_rows", "cases_matrix", "cases_recurrence"),
    others=(
        Model("Qwen3-30B-A3B"),
        Model("Llama-3.1-8B", "Llama-3.1-8B fp8", options=FP8),
        Model("Llama-3.1-8B AWQ"),
        Model("gpt-oss-20b", expert_bytes=17 / 32),
        Model("DeepSeek-V2-Lite"),
        Model("Qwen3-Next, a quarter"),
    ),
)
REHEARSAL = Sizes(
    device="cpu",
    small=("tiny dense", "tiny images"),
    backends=("torch",),
    dtypes=("float32", "bfloat16"),
    small_load={"requests": 2, "new_tokens": 6},
    model="tiny dense",
    concurrency=(1, 2),
    load={"prompt": 16, "new_tokens": 8},
    other_concurrency=(1, 2),
    cases=("cases_rehearsed",),
    others=(Model("tiny latent"), Model("tiny MXFP4", expert_bytes=17 / 32)),
    options={"kv_cache_memory_bytes": 16 << 20},
)


Rates = dict[str, float]


def machine(stage: Stage, sizes: Sizes) -> Rates:
    """Tells where this is; returns what the device does today (nothing, if that could not be found)."""
    found = stage.measure("machine", "machine.py", 90, device=sizes.device)
    rates = [finding for finding in found if finding["what"] == "rates"]
    return {name: rates[0][name] for name in ("bytes", "bf16", "fp8") if name in rates[0]} if rates else {}


def tokens(stage: Stage, sizes: Sizes, rates: Rates) -> None:
    """Stage a: all models at once, since nothing is timed."""
    work = [(backend, shape) for backend in sizes.backends for shape in sizes.small]

    def one(of: tuple[str, str]) -> None:
        backend, shape = of
        what, load = f"{shape}, {backend}", sizes.small_load
        stage.measure(
            what, "tokens.py", SECONDS, shape=shape, backend=backend, device=sizes.device, dtypes=sizes.dtypes, **load
        )

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        list(pool.map(one, work))


def model(stage: Stage, sizes: Sizes, rates: Rates) -> None:
    """Stage b: the second start finds what the first compiled."""
    common = {"shape": sizes.model, "concurrency": sizes.concurrency, **sizes.load}
    mine = {"device": sizes.device, "rates": rates, "max_num_seqs": sizes.concurrency[-1]} | sizes.options
    stage.measure(sizes.model, "speed.py", 240, **common, **mine)
    again = common | {"concurrency": sizes.concurrency[:1]}
    stage.measure("the second start", "speed.py", 90, name=f"{sizes.model}, again", **again, **mine)
    stage.measure("vLLM", "peer.py", 240, **common)


def kernels(stage: Stage, sizes: Sizes, rates: Rates) -> None:
    """Stage c: everything is compiled first, on all cores; then one process for each module of cases."""
    common: dict[str, Any] = {"device": sizes.device, "rates": rates}
    every = [case.name for case in cases_of(list(sizes.cases))]
    if sizes.device == "cuda":
        begun, cores = time.monotonic(), os.cpu_count() or 1
        with ThreadPoolExecutor(cores) as pool:
            for start in range(cores):
                names = every[start::cores]
                pool.submit(stage.run, "operations.py", 200, modules=sizes.cases, names=names, compiles=True, **common)
        stage.findings.add({"what": "compiling", "right": None, "seconds": time.monotonic() - begun})
    for module in sizes.cases:
        operations(stage, module, [case.name for case in cases_of([module])], common)


def operations(stage: Stage, module: str, names: list[str], common: dict[str, Any]) -> None:
    """Cases until all have been tried; one that ends its process is left out of the next."""
    left = names
    while left:
        ran = stage.run("operations.py", SECONDS, silence=90, modules=[module], names=left, **common)
        done = {finding["what"] for finding in ran.found}
        left = [name for name in left if name not in done]
        if left and stage.left < 1:
            stage.findings.add({"what": module, "right": False, "why": f"no time for {', '.join(left)}"})
            return
        if left and (ran.why or not done):
            stage.findings.add({"what": left[0], "right": False, "why": ran.why or "its process said nothing"})
            left = left[1:]


def others(stage: Stage, sizes: Sizes, rates: Rates) -> None:
    """Stage d."""
    mine = {"device": sizes.device, "rates": rates}
    for one in sizes.others:
        name = one.name or one.shape
        load = {"concurrency": sizes.other_concurrency, "max_num_seqs": sizes.other_concurrency[-1], **sizes.load}
        of_it = {"shape": one.shape, "name": name, "expert_bytes": one.expert_bytes, **one.options}
        stage.measure(name, "speed.py", 150, **of_it, **load, **mine, **sizes.options)


STAGES: dict[str, Callable[[Stage, Sizes, Rates], None]] = {"a": tokens, "b": model, "c": kernels, "d": others}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)} (default: all)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at toy sizes")
    parser.add_argument("--cases", nargs="+", help="modules of cases for stage c")
    options = parser.parse_args()
    if strange := set(options.stages) - set(STAGES):
        parser.error(f"there is no stage {', '.join(sorted(strange))}")
    sizes = REHEARSAL if options.rehearse else GPU
    if options.cases:
        sizes = dataclasses.replace(sizes, cases=tuple(options.cases))
    if sizes.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --rehearse goes through the stages on the CPU")
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
    file = Path(os.environ.get("OUT", ROOT / "build")) / "gpu-check.jsonl"
    begun = time.monotonic()
    findings = Findings("-", file)
    rates = machine(Stage(findings, SECONDS), sizes)
    wrong = findings.wrong
    for name in options.stages or STAGES:
        findings = Findings(name, file)
        STAGES[name](Stage(findings, begun + SECONDS - time.monotonic()), sizes, rates)
        wrong += findings.wrong
        begun = time.monotonic()
    print(f"{wrong} findings are wrong; all are in {file}")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
