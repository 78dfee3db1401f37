"""Kernels at the shapes of cases: first whether they are right, then how fast. A measure: see findings.py.

The floor of a case is the greater of its bytes over the copy bandwidth and its operations over the matrix rate. A
kernel that is wrong gets no time.
"""

import contextlib
import importlib
import json
import sys
from typing import Any

import torch
from case import Built, Case
from findings import tell
from machine import Stopwatch
from quire_kernels.hardware import Hardware, hardware, stands_for
from quire_kernels.quantize import Quantized
from tolerance import assert_close
from triton.runtime.jit import JITFunction


def cases_of(modules: list[str]) -> list[Case]:
    """All their cases."""
    return [case for module in modules for case in importlib.import_module(module).CASES]


def compile_case(case: Case, chip: Hardware) -> None:
    """Leaves in Triton's cache what the case will launch on the chip, the one that is there: its launchers run on meta
    tensors, and Triton compiles what it would launch."""
    plain = JITFunction.run

    def compile_alone(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        return plain(self, *arguments, grid=grid, warmup=True, **named)

    JITFunction.run = compile_alone
    try:
        with stands_for(chip):
            case.build(torch.device("meta"), chip.fp8 or torch.bfloat16).run()
    finally:
        JITFunction.run = plain


def _parts(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [result.values, result.scale] if isinstance(result, Quantized) else list(result)


def check(built: Built) -> None:
    """Raises AssertionError where the kernel is wrong."""
    expected = [part.clone() for part in _parts(built.expected())]
    for mine, theirs in zip(_parts(built.run()), expected, strict=True):
        if mine.is_floating_point():
            assert_close(mine, theirs, built.terms)
        elif mine.dtype == torch.int8:  # the nearest integer; between two it may be either
            assert (mine.int() - theirs.int()).abs().max() <= 1
        else:
            assert torch.equal(mine, theirs), f"{(mine != theirs).sum()} of {mine.numel()} differ"


def measure(case: Case, chip: Hardware, device: str, rates: dict[str, float]) -> None:
    """Tells a case's finding."""
    torch.manual_seed(0)
    built = case.build(torch.device(device), chip.fp8 or torch.bfloat16)
    check(built)
    if not case.timed or not rates:
        tell(case.name, True)
        return
    watch = Stopwatch(device)
    seconds = watch.seconds(built.run)
    matrix = rates.get("fp8", rates["bf16"]) if case.needs_fp8 and "cache" not in case.name else rates["bf16"]
    floor = max(built.bytes / rates["bytes"], built.operations / matrix)
    peers: dict[str, Any] = {}
    for name, peer in built.peers.items():
        try:
            peers[name] = watch.seconds(peer) / seconds
        except Exception as error:  # a peer that cannot is no fault of the kernel
            peers[name] = f"{type(error).__name__}: {error}"[:200]
    tell(
        case.name,
        True,
        microseconds=seconds * 1e6,
        of_floor=floor / seconds,
        bandwidth=built.bytes / seconds / rates["bytes"],
        matrix=built.operations / seconds / matrix,
        peers=peers,
    )


def _alive() -> bool:
    try:
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return False
    return True


def main(modules: list[str], names: list[str], device: str, rates: dict[str, float], compiles: bool = False) -> None:
    """Every case, or as many until one leaves the device in no state to go on. `compiles`: that alone."""
    chip = hardware(torch.device(device))
    wanted = [case for case in cases_of(modules) if case.name in names]
    for case in wanted:
        if case.needs_fp8 and chip.fp8 is None:
            if not compiles:
                tell(case.name, None, f"there is no fp8 on {chip.target}")
            continue
        if compiles:
            with contextlib.suppress(Exception):  # which the check will meet again, and tell
                compile_case(case, chip)
            continue
        try:
            measure(case, chip, device, rates)
        except Exception as error:
            tell(case.name, False, f"{type(error).__name__}: {error}"[-3000:])
            if device == "cuda" and not _alive():
                return
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
