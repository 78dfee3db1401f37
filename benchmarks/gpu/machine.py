"""The machine of a run: card, driver, versions, and what the card does today. A measure: see findings.py."""

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
import triton
from findings import tell
from quire_kernels.hardware import hardware


class Stopwatch:
    """Times work on a device; on a GPU as a captured graph, so that what Python takes to launch is left out, with the
    L2 cache overwritten before each."""

    def __init__(self, device: str) -> None:
        self._gpu = device == "cuda"
        if self._gpu:
            self._flush = torch.empty(256 << 20, dtype=torch.int8, device=device)

    def seconds(self, work: Callable[[], Any], budget: float = 0.15) -> float:
        """The median over about `budget` seconds, at least 5 times."""
        again = self._captured(work) if self._gpu else work
        spent: list[float] = []
        begun = time.monotonic()
        while len(spent) < 5 or (time.monotonic() - begun < budget and len(spent) < 100):
            spent.append(self._once(again))
        return statistics.median(spent)

    def _captured(self, work: Callable[[], Any]) -> Callable[[], None]:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles
                work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def _once(self, work: Callable[[], Any]) -> float:
        if not self._gpu:
            begun = time.perf_counter()
            work()
            return time.perf_counter() - begun
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def rates(device: str) -> dict[str, Any]:
    """Bytes/s of a copy (read and written), operations/s of cuBLAS in bf16 and, where there is fp8, in fp8."""
    watch = Stopwatch(device)
    size, n = (1 << 30, 8192) if device == "cuda" else (1 << 24, 256)
    source = torch.empty(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    found = {"bytes": 2 * size / watch.seconds(lambda: target.copy_(source))}
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    found["bf16"] = 2 * n**3 / watch.seconds(lambda: a @ a.T)
    fp8 = hardware(torch.device(device)).fp8 if device == "cuda" else None
    if fp8 is not None:
        narrow, one = a.to(fp8), torch.ones((), device=device)

        def product() -> torch.Tensor:
            return torch._scaled_mm(narrow, narrow.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

        found["fp8"] = 2 * n**3 / watch.seconds(product)
    return found


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (subprocess.run(query, capture_output=True, text=True, check=False).stdout.split() or ["unknown"])[0]


def main(device: str) -> None:
    """See the module."""
    tell(
        "machine",
        None,
        card=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        driver=_driver(),
        python=sys.version.split()[0],
        torch=torch.__version__,
        triton=triton.__version__,
        transformers=version("transformers"),
    )
    tell("rates", None, **rates(device))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
