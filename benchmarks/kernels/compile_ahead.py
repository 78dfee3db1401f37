"""Compiles every kernel, at the shapes of the cases, for chips that are not here, and says what came of it.

    python benchmarks/kernels/compile_ahead.py             one JSON object a line: kernel, target, what it takes
    python benchmarks/kernels/compile_ahead.py --table     writes compiled.md beside this file

The launchers themselves run, on "meta" tensors; what they would launch is recorded with the specialization that Triton
would give it (16-byte alignment, constants) and compiled. No GPU is needed, and TRITON_INTERPRET must not be set.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cases_attention
import cases_matrix
import cases_recurrence
import cases_rows
import torch
import triton
from case import Case
from quire_kernels.hardware import CHIPS, Hardware, stands_for
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
CASES: list[Case] = cases_attention.CASES + cases_rows.CASES + cases_matrix.CASES + cases_recurrence.CASES
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e4m3fnuz: "fp8e4b8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int8: "i8",
    torch.uint8: "u8",
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_MATRIX = r"\b(HGMMA|QGMMA|IGMMA|UTC\w*MMA|HMMA|QMMA|IMMA|v_mfma_\w+)"


@dataclass(frozen=True)
class Launch:
    """One kernel as it would be specialized: what it is compiled for, and no more."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Compiled:
    """What a launch takes on a target."""

    kernel: str
    case: str
    target: str
    warps: int
    stages: int
    registers: int
    shared: int
    shared_limit: int
    spills: int
    multiplies: bool  # it has a product of matrices ...
    rows: int  # ... with so many rows a tile
    matrix: str  # the matrix instruction that it became; "": none
    streams: bool
    wide_loads: int  # loads of 16 bytes


def _specialize(kernel: JITFunction, arguments: tuple[Any, ...], named: dict[str, Any]) -> Launch:
    """As triton.runtime.jit specializes a launch: it compiles anew wherever this differs."""
    options = tuple((name, named.pop(name)) for name in ("num_warps", "num_stages") if name in named)
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | named
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned = []
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:  # what allocators give is aligned
                aligned.append(index)
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[parameter.name], constants[parameter.name] = "constexpr", 1
        else:
            signature[parameter.name] = "i64" if "int64" in str(parameter.annotation) or value >= 2**31 else "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(index)
    return Launch(kernel, tuple(signature.items()), tuple(constants.items()), tuple(aligned), options)


@contextmanager
def recorded(chip: Hardware) -> Iterator[dict[Launch, None]]:
    """Within, meta tensors stand for tensors on the chip, and what would be launched is put into the dictionary, the
    same kernel in the same specialization once."""
    found: dict[Launch, None] = {}
    plain = JITFunction.run

    def record(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        found[_specialize(self, arguments, named)] = None

    JITFunction.run = record
    try:
        with stands_for(chip):
            yield found
    finally:
        JITFunction.run = plain


def _inspect_nvidia(binary: bytes) -> tuple[int, int, str, int]:
    """Registers, spills, the matrix instruction, 16-byte loads, from the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage, code = (
            subprocess.run([_TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    registers = max(int(found) for found in re.findall(r"REG:(\d+)", usage))
    stack = max(int(found) for found in re.findall(r"STACK:(\d+)", usage))
    matrix = re.search(_MATRIX, code)
    wide = len(re.findall(r"\bLDG\.E\S*\.128|\bLDGSTS\.E\S*\.128", code))
    return registers, stack + len(re.findall(r"\b(?:STL|LDL)\b", code)), matrix[1] if matrix else "", wide


def _inspect_amd(code: str) -> tuple[int, int, str, int]:
    registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", code)[-1])
    spills = sum(int(found) for found in re.findall(r"\.vgpr_spill_count:\s+(\d+)", code))
    matrix = re.search(_MATRIX, code)
    wide = len(re.findall(r"\b(?:global|buffer)_load_(?:dwordx4|b128|lds_dwordx4)", code))
    return registers, spills, matrix[1] if matrix else "", wide


def compile_launch(launch: Launch, case: Case, target: str) -> Compiled:
    """Down to machine code."""
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in launch.aligned},
    )
    compiled = triton.compile(source, target=TARGETS[target], options=dict(launch.options))
    nvidia = "cubin" in compiled.asm
    found = _inspect_nvidia(compiled.asm["cubin"]) if nvidia else _inspect_amd(compiled.asm["amdgcn"])
    registers, spills, matrix, wide = found
    constants = dict(launch.constants)
    return Compiled(
        kernel=launch.kernel.__name__.removeprefix("_"),
        case=case.name,
        target=target,
        warps=compiled.metadata.num_warps,
        stages=compiled.metadata.num_stages,
        registers=registers,
        shared=compiled.metadata.shared,
        shared_limit=CHIPS[target].shared_bytes,
        spills=spills,
        multiplies="tt.dot" in compiled.asm["ttir"],
        rows=constants.get("TILE_M", constants.get("M", 0)),
        matrix=matrix,
        streams=case.streams,
        wide_loads=wide,
    )


def compile_case(work: tuple[int, str]) -> list[Compiled]:
    """All launches of a case (by its place) for a target."""
    index, target = work
    torch.set_num_threads(1)
    case, chip = CASES[index], CHIPS[target]
    with recorded(chip) as launches:
        case.build(torch.device("meta"), chip.fp8 or torch.bfloat16).run()
    return [compile_launch(launch, case, target) for launch in launches]


def compile_all(targets: list[str], every: int) -> Iterator[Compiled]:
    """Each case (or one of `every` so many) for every target that can run it, each distinct kernel once."""
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "the interpreter compiles nothing"
    work = [
        (index, target)
        for target in targets
        for index, case in enumerate(CASES)
        if index % every == 0 and (not case.needs_fp8 or CHIPS[target].fp8 is not None)
    ]
    with ProcessPoolExecutor() as pool:
        for found in pool.map(compile_case, work, chunksize=1):
            yield from found


def table(results: list[Compiled]) -> str:
    """Kernel x target, markdown."""
    lines = [
        "# What the kernels take",
        "",
        f"Compiled ahead of time by triton {triton.__version__}; `make kernel-table` writes this page. Nothing was",
        "run. Registers of a thread, shared memory of a program in KiB (its limit stands in the heading), spills where",
        "there are any, the matrix instruction where the kernel multiplies matrices.",
        "",
        "| kernel | case | " + " | ".join(f"{t} ({CHIPS[t].shared_bytes >> 10})" for t in TARGETS) + " |",
        "|---|---|" + "---|" * len(TARGETS),
    ]
    rows: dict[tuple[str, str], dict[str, list[str]]] = {}
    for found in results:
        cell = f"{found.registers} / {found.shared / 1024:.3g}" + (f" / {found.matrix}" if found.matrix else "")
        cell += f" / spills {found.spills}" if found.spills else ""
        rows.setdefault((found.kernel, found.case), {}).setdefault(found.target, []).append(cell)
    for (kernel, case), cells in sorted(rows.items()):
        columns = ("; ".join(cells.get(target, ["–"])) for target in TARGETS)
        lines.append(f"| {kernel} | {case} | " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write compiled.md instead of printing JSON")
    parser.add_argument("--target", action="append", choices=TARGETS, help="these alone (default: all)")
    parser.add_argument("--every", type=int, default=1, help="one of so many cases (default: all)")
    options = parser.parse_args()
    results = []
    for found in compile_all(options.target or list(TARGETS), options.every):
        results.append(found)
        if not options.table:
            print(json.dumps(asdict(found)), flush=True)
    if options.table:
        Path(__file__).with_name("compiled.md").write_text(table(results))


if __name__ == "__main__":
    main()
