"""The Triton kernels compile for NVIDIA (in `make test-all` in every case, and for AMD), without a GPU, into what they
should be."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import triton

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "kernels"
GPU_CHECK = BENCHMARKS.parent / "gpu"
WARPGROUP = {"HGMMA", "QGMMA", "IGMMA"}


QUICK = ["sm_90"], 8  # targets, and one of how many cases
ALL = ["sm_80", "sm_90", "sm_100", "gfx942", "gfx950"], 1


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("targets", "every"), [QUICK, pytest.param(*ALL, marks=pytest.mark.slow)], ids=["quick", "all"]
)
def test_ahead_of_time(tmp_path: Path, targets: list[str], every: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(BENCHMARKS / "compile_ahead.py"), *(f"--target={target}" for target in targets)]
    command.append(f"--every={every}")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {found["target"] for found in compiled} == set(targets)
    wide = defaultdict(int)
    for found in compiled:
        # The assembler that comes with triton 3.6 spills a few words where registers are left.
        assert found["spills"] <= (64 if triton.__version__.startswith("3.6") else 0), found
        assert found["shared"] <= found["shared_limit"], found
        assert bool(found["matrix"]) == found["multiplies"], found
        if found["target"] == "sm_90" and found["rows"] >= 64:
            assert found["matrix"] in WARPGROUP, found
        if found["streams"]:
            wide[found["target"], found["case"]] += found["wide_loads"]
    assert len(wide) > 20 * len(targets) // every
    assert not [case for case, loads in wide.items() if loads == 0], "no loads of 16 bytes"
    # The table in the repository is this one, as far as this triton wrote it.
    table = (BENCHMARKS / "compiled.md").read_text()
    if f"triton {triton.__version__};" in table:
        fresh = fresh_table(done.stdout, environment)
        if every == 1:
            assert table == fresh, "`make kernel-table` writes it anew"
        else:
            missing = [row for row in cells(fresh, targets) if row not in cells(table, targets)]
            assert not missing, "`make kernel-table` writes it anew"


def cells(table: str, targets: list[str]) -> list[list[str]]:
    """Names of the cases and what is in the targets' columns."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    heading = [cell.split(" ")[0] for cell in rows[0]]
    columns = [0, 1, *(heading.index(target) for target in targets)]
    picked = [[row[column] for column in columns] for row in rows[2:]]
    return [row for row in picked if set(row[2:]) != {"–"}]


def fresh_table(lines: str, environment: dict[str, str]) -> str:
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import compile_ahead as c;"
        "print(c.table([c.Compiled(**json.loads(line)) for line in sys.stdin]), end='')"
    )
    command = [sys.executable, "-c", code, str(BENCHMARKS)]
    return subprocess.run(command, input=lines, capture_output=True, text=True, env=environment, check=True).stdout


LAUNCH_AFTER_COMPILING = """
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:]
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
import cases_attention, cases_matrix, cases_recurrence, cases_rows
from operations import compile_case
from quire_kernels.hardware import CHIPS

class Driver:  # of a GPU that is not here
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

driver.set_active(Driver())
os.environ["TRITON_INTERPRET"] = "1"  # gives the CPU a chip; the kernels are imported, and compiled, already
names = ["RMSNorm + add 64 x 4096", "head norms 8k x 32 x 128", "sample top-p 256 x 128k", "invariant 1 x 4096 x 4096",
         "route Qwen3-30B-A3B, 4096 tokens", "short convolution decode 64 x 8k"]
every = cases_attention.CASES + cases_rows.CASES + cases_matrix.CASES + cases_recurrence.CASES
cases = [case for case in every if case.name in names]
assert len(cases) == len(names)
for case in cases:
    compile_case(case, CHIPS["interpreter"])
compiled = set(os.listdir(os.environ["TRITON_CACHE_DIR"]))
assert len(compiled) >= len(names), compiled
plain, launched = JITFunction.run, []
def launch(self, *arguments, grid, warmup, **named):  # all of it but the launch
    launched.append(self.__name__)
    return plain(self, *arguments, grid=grid, warmup=True, **named)
JITFunction.run = launch
for module in list(sys.modules.values()):
    for kernel in vars(module).values():
        if isinstance(kernel, JITFunction):
            kernel.device_caches.clear()  # as in a process that finds nothing but the folder
for case in cases:
    case.build(torch.device("cpu"), CHIPS["interpreter"].fp8).run()
assert len(launched) >= len(compiled)
fresh = set(os.listdir(os.environ["TRITON_CACHE_DIR"])) - compiled
assert not fresh, (fresh, launched)
"""


def test_gpu_check_compiles_what_it_will_launch(tmp_path: Path) -> None:
    """From meta tensors: launches with real ones find all of it in Triton's cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    paths = [str(path) for path in (BENCHMARKS, GPU_CHECK, Path(__file__).parent)]
    command = [sys.executable, "-c", LAUNCH_AFTER_COMPILING, *paths]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
