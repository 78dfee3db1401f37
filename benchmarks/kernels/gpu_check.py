"""Every kernel on the GPU at hand: first whether it is right, then how fast, against the floor and against peers.

    make gpu-check                  all; a table last, JSON to $OUT/gpu-check.json (or build/gpu-check.json)
    ... ARGS='--only decode'        the cases whose name has it

The floor of a case is the greater of its bytes over the copy bandwidth and its operations over the matrix rate, both
measured in this run. A kernel that is wrong gets no time. Times are medians of captured graphs, so that what Python
takes to launch is left out, with the L2 cache overwritten before each.
"""

import argparse
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cases_attention
import cases_matrix
import cases_recurrence
import cases_rows
import torch
import triton
from case import Built, Case
from quire_kernels.hardware import hardware
from quire_kernels.quantize import Quantized
from tolerance import assert_close

ROOT = Path(__file__).parents[2]
CASES: list[Case] = cases_attention.CASES + cases_rows.CASES + cases_matrix.CASES + cases_recurrence.CASES


class Stopwatch:
    """Times work on the GPU."""

    def __init__(self) -> None:
        self._flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def seconds(self, work: Callable[[], Any], budget: float = 0.15) -> float:
        """The median over about `budget` seconds, at least 5 times."""
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles
                work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        spent: list[float] = []
        begun = time.monotonic()
        while len(spent) < 5 or (time.monotonic() - begun < budget and len(spent) < 100):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            spent.append(start.elapsed_time(end) / 1e3)
        return statistics.median(spent)


def rates(watch: Stopwatch, fp8: torch.dtype | None) -> dict[str, float]:
    """What this card does today: bytes/s of a copy (read and written), operations/s of cuBLAS."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    found = {"bytes": 2 * source.numel() / watch.seconds(lambda: target.copy_(source))}
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    found["bf16"] = 2 * 8192**3 / watch.seconds(lambda: a @ a.T)
    if fp8 is not None:
        narrow, one = a.to(fp8), torch.ones((), device="cuda")
        found["fp8"] = (
            2
            * 8192**3
            / watch.seconds(
                lambda: torch._scaled_mm(narrow, narrow.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
            )
        )
    return found


def _parts(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [result.values, result.scale] if isinstance(result, Quantized) else list(result)


def check(built: Built) -> None:
    """Raises AssertionError where the kernel is not its reference."""
    for mine, theirs in zip(_parts(built.run()), _parts(built.expected()), strict=True):
        if mine.is_floating_point():
            assert_close(mine, theirs, built.terms)
        elif mine.dtype == torch.int8:  # the nearest integer; between two it may be either
            assert (mine.int() - theirs.int()).abs().max() <= 1
        else:
            assert torch.equal(mine, theirs)


def measure(case: Case, watch: Stopwatch, rate: dict[str, float], fp8: torch.dtype | None) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = {"case": case.name}
    try:
        torch.manual_seed(0)
        built = case.build(torch.device("cuda"), fp8 or torch.bfloat16)
        check(built)
        row["right"] = True
        if case.timed:
            seconds = watch.seconds(built.run)
            matrix = rate.get("fp8", rate["bf16"]) if case.needs_fp8 and "cache" not in case.name else rate["bf16"]
            floor = max(built.bytes / rate["bytes"], built.operations / matrix)
            row |= {
                "microseconds": seconds * 1e6,
                "bytes": built.bytes,
                "operations": built.operations,
                "bandwidth": built.bytes / seconds / rate["bytes"],
                "matrix": built.operations / seconds / matrix,
                "of_floor": floor / seconds,
                "peers": {},
            }
            for name, peer in built.peers.items():
                try:
                    row["peers"][name] = watch.seconds(peer) / seconds
                except Exception as error:  # a peer that cannot is no fault of the kernel
                    row["peers"][name] = f"{type(error).__name__}: {error}"[:200]
    except Exception:  # shown in the table; the other kernels are still to be tried
        row |= {"right": False, "why": traceback.format_exc()[-1500:]}
    torch.cuda.empty_cache()
    return row


def show(report: dict[str, Any]) -> None:
    """The table, short."""
    rate = report["rates"]
    print(f"\n{report['gpu']}, torch {report['torch']}, triton {report['triton']}, {report['date']}")
    print(
        f"copy {rate['bytes'] / 1e9:.0f} GB/s, cuBLAS bf16 {rate['bf16'] / 1e12:.0f} TFLOP/s"
        + (f", fp8 {rate['fp8'] / 1e12:.0f} TFLOP/s" if "fp8" in rate else "")
    )
    print(f"{'case':50} {'us':>9} {'band':>5} {'matrix':>6} {'floor':>6}  peers, times as long")
    for row in report["rows"]:
        if not row["right"]:
            print(f"{row['case']:50} WRONG {row['why'].strip().splitlines()[-1][:90]}")
        elif "microseconds" in row:
            peers = ", ".join(
                f"{name} {value:.2f}" if isinstance(value, float) else f"{name} failed"
                for name, value in row["peers"].items()
            )
            print(
                f"{row['case']:50} {row['microseconds']:9.1f} {row['bandwidth']:5.0%} {row['matrix']:6.0%} "
                f"{row['of_floor']:6.0%}  {peers}"
            )
    wrong = sum(not row["right"] for row in report["rows"])
    print(f"{len(report['rows']) - wrong} of {len(report['rows'])} kernels right")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="the cases whose name has this")
    parser.add_argument("--seconds", type=float, default=440.0, help="start no case after so long")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_check needs a GPU; without one see compile_ahead.py")
    begun = time.monotonic()
    chip, watch = hardware(torch.device("cuda")), Stopwatch()
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "target": chip.target,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rates": rates(watch, chip.fp8),
        "rows": [],
        "left_out": [],
    }
    folder = Path(os.environ.get("OUT", ROOT / "build"))
    folder.mkdir(exist_ok=True)
    for case in CASES:
        if options.only not in case.name:
            continue
        if time.monotonic() - begun > options.seconds:
            report["left_out"].append(case.name)
        elif case.needs_fp8 and chip.fp8 is None:
            report["left_out"].append(f"{case.name} (no fp8 on {chip.target})")
        else:
            report["rows"].append(measure(case, watch, report["rates"], chip.fp8))
            print(".", end="", flush=True)
            (folder / "gpu-check.json").write_text(json.dumps(report, indent=1))
    show(report)
    if report["left_out"]:
        print("left out:", ", ".join(report["left_out"]))
    (folder / "gpu-check.json").write_text(json.dumps(report, indent=1))
    if not all(row["right"] for row in report["rows"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
